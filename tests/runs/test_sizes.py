"""How long batches are: against all batches that there can be, and against those that the Trainers make."""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BertConfig, T5Config

from command_line import reltune as call
from cost_cases import MACHINE
from reltune.config.run_config import RunConfig
from reltune.cost.devices import Card
from reltune.runs import flow, stages
from reltune.runs.directory import RunDirectory
from reltune.runs.estimate import Row, Subject, beside
from reltune.runs.forecast import counts_of, forecast
from reltune.runs.materials import prepare
from reltune.runs.sizes import GROUPED, IN_ORDER, Sizes, TextLengths, multiple_for
from reltune.studio import views
from reltune.studio.budget import BudgetView
from reltune.studio.words import Words
from task_cases import write_rows
from tasks.test_more_text_tasks import save_tiny_t5
from tiny_models import WORDS, save_tiny_bert, save_tiny_llama

ROWS, BATCH, LIMIT = 80, 4, 40


def lengths_of(*lengths: int) -> TextLengths:
    return TextLengths([(length,) for length in lengths])


@pytest.mark.parametrize(("count", "size"), [(7, 3), (6, 6), (5, 1), (3, 8), (1, 1)])
def test_the_mean_of_random_batches_is_that_of_all_there_can_be(count: int, size: int) -> None:
    draw = random.Random(count)
    tokens = [(draw.randrange(10**5), draw.randrange(10**5)) for _ in range(count)]
    batches = list(itertools.combinations(tokens, min(size, count)))
    expected = [np.mean([max(one[k] for one in batch) for batch in batches]) for k in (0, 1)]
    assert TextLengths(tokens).padded(size) == tuple(map(round, expected))


def test_batches_in_order_are_as_long_as_the_longest_in_each() -> None:
    found = lengths_of(10, 60, 20, 30, 50, 40, 1000)  # the last one is alone in its batch
    assert found.padded(3, IN_ORDER) == (55,)
    assert found.cut(45).padded(3, IN_ORDER) == (45,) and found.cut(45).longest == (45,)
    assert found.mean == pytest.approx(1210 / 7)


def text(words: int, number: int) -> str:
    return " ".join(random.Random(number).choices(WORDS, k=words))


def drawn(number: int, most: int = 2 * LIMIT) -> int:
    """How many words; some are too many."""
    return random.Random(str(number)).randint(1, most)


CASES: dict[str, tuple[Callable[[Any], Any], Callable[[int], Mapping[str, Any]]]] = {
    "sequence_classification": (
        save_tiny_bert,
        lambda n: {"text": f"{text(drawn(n), n)} {n}", "label": "no" if n % 2 else "yes"},
    ),
    "seq2seq": (save_tiny_t5, lambda n: {"source": f"{text(drawn(n), n)} {n}", "target": text(drawn(n + 99, 20), n)}),
    "causal_lm": (save_tiny_llama, lambda n: {"text": f"{text(drawn(n), n)} {n}"}),
    "preference": (
        save_tiny_llama,
        lambda n: {
            "prompt": text(drawn(n + 9, 25), n),
            "chosen": f"good {text(drawn(n, 25), n)}",
            "rejected": f"bad {text(drawn(n + 99, 25), n)}",
        },
    ),
}


def batches_of(trainer: Any, passes: int) -> Iterator[tuple[int, ...]]:
    for number in range(passes):
        loader = trainer.get_train_dataloader()
        if hasattr(loader, "set_epoch"):
            loader.set_epoch(number)
        for batch in itertools.islice(loader, len(trainer.train_dataset) // BATCH):  # without one that is not full
            own = (
                ("input_ids", "labels")
                if "labels" in batch and "T5" in type(trainer.model).__name__
                else ("input_ids",)
            )
            yield tuple(batch[name].shape[-1] for name in own)


@pytest.mark.parametrize(
    ("task", "order", "accumulated"),
    [
        *((task, "random", 1) for task in CASES),
        ("sequence_classification", GROUPED, 1),
        ("sequence_classification", GROUPED, 3),
        ("causal_lm", GROUPED, 1),
        ("sequence_classification", IN_ORDER, 1),
    ],
)
def test_the_trainers_batches_are_as_long_as_told(task: str, order: str, accumulated: int, tmp_path: Path) -> None:
    save, row = CASES[task]
    save(tmp_path / "model")
    training = {
        "per_device_train_batch_size": BATCH,
        "gradient_accumulation_steps": accumulated,
        "train_sampling_strategy": order,
        "use_cpu": True,
    }
    config = RunConfig(
        str(tmp_path / "model"),
        str(tmp_path / "run"),
        train_file=str(write_rows(tmp_path / "rows.jsonl", map(row, range(ROWS)))),
        task=task,
        max_length=LIMIT,
        on_bad_rows="skip",
        training=training,
    )
    materials = prepare(config)
    assert materials.sizes.lengths is not None
    subject = Subject(config, None, cuda=False, sizes=materials.sizes)
    trainer = materials.task.trainer(
        materials.base.take(),
        materials.arguments("selection", eval_strategy="no"),
        materials.tokenizer,
        materials.train,
    )
    seen = list(batches_of(trainer, 30))
    assert subject.usual == pytest.approx(tuple(np.mean(seen, 0)), abs=0.8)
    assert materials.sizes.lengths.longest == tuple(np.max(seen, 0))
    held_out = [
        materials.task.lengths(item) for split in (materials.validation, materials.test) for item in split.items
    ]
    assert subject.longest == tuple(np.max([*seen, *held_out], 0))


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("configs")
    BertConfig(
        vocab_size=256, hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4,
        architectures=["BertModel"],
    ).save_pretrained(place / "bert")  # fmt: skip
    T5Config(
        vocab_size=256, d_model=64, d_ff=160, d_kv=16, num_layers=2, num_heads=4, decoder_start_token_id=0
    ).save_pretrained(place / "t5")  # fmt: skip
    return place


def subject_of(configs: Path, model: str, lengths: TextLengths | None, **fields: Any) -> Subject:
    training = {"per_device_train_batch_size": 8, **fields.pop("training", {})}
    held_out = fields.pop("held_out", None)
    config = RunConfig(
        str(configs / model), ".", **{"method": "lora", "max_length": 128, "training": training, **fields}
    )
    return Subject(config, None, cuda=True, sizes=Sizes(64, 20, 20, lengths, held_out))


def row_of(subject: Subject) -> Row:
    return beside(subject, Card("here", 0, 0, 0, 0), MACHINE, others=()).rows[0]


def test_memory_goes_by_the_longest_text_and_time_by_batches_in_the_mean(configs: Path) -> None:
    mixed = subject_of(configs, "bert", lengths_of(*[9] * 60, *[90] * 4))
    longest, usual = mixed.longest, mixed.usual
    assert longest == (90,) and 9 < usual[0] < 60
    found, held = row_of(mixed), [subject_of(configs, "bert", lengths_of(*[n[0]] * 64)) for n in (longest, usual)]
    assert found.memory == row_of(held[0]).memory
    assert found.seconds == row_of(held[1]).seconds and found.hours_by_part["training"] == pytest.approx(
        row_of(held[1]).hours_by_part["training"]
    )
    unknown = row_of(subject_of(configs, "bert", None))
    assert unknown.total > found.total


def test_sources_and_targets_have_lengths_of_their_own(configs: Path) -> None:
    pairs = TextLengths([(30, 5)] * 60 + [(70, 5), (20, 11)] * 2)
    subject = subject_of(configs, "t5", pairs, task="seq2seq")
    assert subject.longest == (70, 11) and 30 < subject.usual[0] < 70 and 5 < subject.usual[1] < 11
    batch = subject._batch(8, subject.longest)
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (8, 70) and batch["labels"].shape == (8, 11)
    assert subject.counted("lora").bytes < subject.counted("lora", (70, 70)).bytes


def test_what_is_held_out_counts_where_it_is_longer_and_packing_fills_batches(configs: Path) -> None:
    short, held_out = lengths_of(*[9] * 64), lengths_of(*[20] * 39, 500)
    found = subject_of(configs, "bert", short, held_out=held_out, training={"per_device_eval_batch_size": 10})
    assert (found.longest, found.usual, found.evaluated) == ((128,), (9,), (47,))  # (3 · 20 + 128) / 4
    assert found.padded == {"longest": (128,), "training": (9,), "evaluation": (47,)}
    packed = subject_of(configs, "bert", short, held_out=held_out, packing=True)
    assert packed.longest == packed.usual == (128,) and packed.padded is None
    smaller = subject_of(configs, "bert", lengths_of(*range(1, 65)), training={"per_device_train_batch_size": 2})
    assert smaller.usual < subject_of(configs, "bert", lengths_of(*range(1, 65))).usual


def test_graphs_are_of_batches_in_multiples_of_32(configs: Path) -> None:
    lengths = lengths_of(*[9] * 32, *[70] * 32)
    found = subject_of(configs, "bert", lengths, cuda_graphs=True, training={"per_device_train_batch_size": 1})
    assert (found.longest, found.usual) == ((96,), (64,))  # of 32 and of 96
    assert subject_of(configs, "bert", None, cuda_graphs=True, max_length=100).longest == (128,)
    assert multiple_for(BertConfig(max_position_embeddings=40)) == 1


def test_evaluation_takes_as_long_as_its_own_texts(configs: Path) -> None:
    short, long = lengths_of(*[9] * 40), lengths_of(*[100] * 40)
    each = {
        (train, held): row_of(subject_of(configs, "bert", train, held_out=held)).hours_by_part
        for train in (short, long)
        for held in (short, long)
    }
    assert each[short, short]["evaluation"] == each[long, short]["evaluation"] < each[long, long]["evaluation"]
    assert each[short, long]["training"] == each[short, short]["training"] < each[long, long]["training"]


def test_a_profile_has_the_memory_of_the_longest_and_the_time_of_usual_batches(configs: Path) -> None:
    mixed = subject_of(configs, "bert", lengths_of(*[9] * 60, *[90] * 4))
    columns = dataclasses.replace(mixed.config, method="columns", budget="2%", granularity=["column"])
    chosen = counts_of(Subject(columns, None, cuda=False).even_plan())
    profiles = [
        subject_of(configs, "bert", lengths_of(*[n] * 64)).profile(MACHINE) for n in (mixed.longest[0], mixed.usual[0])
    ]
    found, (longest, usual) = mixed.profile(MACHINE).cost(chosen), (each.cost(chosen) for each in profiles)
    assert found.memory == longest.memory and found.seconds == usual.seconds < longest.seconds


def test_one_long_text_decides_on_a_budget_of_memory(configs: Path) -> None:
    long, one_long, short = (lengths_of(*each) for each in ([128] * 64, [9] * 63 + [128], [9] * 64))
    totals = [row_of(subject_of(configs, "bert", each)).total for each in (long, short)]
    budget = f"memory={sum(totals) // 2 >> 10}KiB"

    def settings(lengths: TextLengths | None) -> Mapping[str, Any]:
        config = subject_of(configs, "bert", lengths, budget=budget, fixed=["gradient_checkpointing"]).config
        sizes = Sizes(64, 2, 2, lengths)
        return forecast(config, device="t4-16gb", sizes=sizes, with_others=False).settings.training

    assert settings(one_long) == settings(long) == settings(None) != {}
    assert settings(short) == {}


def test_what_is_predicted_says_the_lengths_that_it_is_for(tmp_path: Path) -> None:
    save_tiny_bert(tmp_path / "model")
    rows = [{"text": f"{text(4 if n % 8 else 30, n)} {n}", "label": "no" if n % 2 else "yes"} for n in range(ROWS)]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    words: list[Any] = [
        "--model_name_or_path",
        tmp_path / "model",
        "--train_file",
        file,
        "--output_dir",
        tmp_path / "run",
    ]
    words += ["--max_length", LIMIT, "--per_device_train_batch_size", BATCH, "--max_steps", 2, "--use_cpu"]
    words += ["--granularity", "column", "--budget", "5%"]
    padded = json.loads(call("run", *words, "--dry_run", "--format", "json").out)["estimate"]["padded"]
    (longest,), (usual,) = padded["longest"], padded["training"]
    assert longest == 33 and 8 < usual < 25  # three more than words: the row's number and BERT's frame
    said = " ".join(call("run", *words, "--dry_run").out.split())
    assert f"a batch is {usual} tokens long on average" in said and f"{longest} at most" in said
    config = RunConfig(
        str(tmp_path / "model"),
        ".",
        train_file=str(file),
        max_length=LIMIT,
        training={"per_device_train_batch_size": BATCH, "max_steps": 2},
    )
    asked = flow.estimate_new(config, "cpu").to_dict()
    assert asked["padded"] == {name: tuple(lengths) for name, lengths in padded.items()}
    assert f"{longest} tokens, time for {usual}" in views.estimate(asked, Words("en"))
    done = call("run", *words)
    assert done.code in (None, 0) and f"seconds per step, batches of {usual} tokens" in done.out
    assert json.loads((tmp_path / "run" / "prediction.json").read_text())["padded"] == padded
    view = BudgetView(tmp_path / "run")
    found = view.choice("5%", view.rule)
    english, chinese = (views.choice(found, Words(language)) for language in ("en", "zh"))
    assert f"batches of {longest} tokens" in english and f"{usual} 个词元" in chinese
    file.unlink()
    unknown = BudgetView(tmp_path / "run").choice("5%", view.rule)
    assert unknown.padded is None and unknown.memory > found.memory


def test_a_prediction_leaves_the_random_numbers_as_they_are(configs: Path) -> None:
    config = subject_of(configs, "bert", lengths_of(9, 90), task="sequence_classification").config
    before = torch.random.get_rng_state()
    stages.forecast_of(config, RunDirectory("."), None, "t4-16gb", Sizes(2, 1, 1, lengths_of(9, 90)))
    assert torch.equal(torch.random.get_rng_state(), before)
