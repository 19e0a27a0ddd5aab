"""--cache_frozen_prefix through the real training: the same weights, and what is decided, said and refused."""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from command_line import reltune
from reltune.config.run_config import RunConfig
from reltune.errors import InputError
from reltune.notes import collecting
from reltune.runs import stages, training
from reltune.runs.directory import RunDirectory
from reltune.runs.materials import prepare
from task_cases import write_rows
from tiny_models import WORDS, save_tiny_llama, save_tiny_masked, tiny_tokenizer
from two_processes import torchrun

QUICK = {
    "per_device_train_batch_size": 8,
    "num_train_epochs": 3,
    "eval_strategy": "no",
    "save_strategy": "no",
    "use_cpu": True,
}
TOP = ["layer.2", "layer.3"]
COMMAND = "import sys; from reltune.cli.commands import main; sys.argv[0] = 'reltune'; main()"


def save_bert(path: Path, dropout: float) -> None:
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    config = transformers.BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    transformers.BertModel(config).save_pretrained(path)
    tokenizer.save_pretrained(path)


def texts(count: int, shortest: int, longest: int) -> list[dict[str, str]]:
    draw = random.Random(count + longest)
    return [
        {"text": " ".join(draw.choices(WORDS, k=draw.randint(shortest, longest))), "label": "ab"[i % 2]}
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("prefix")
    save_bert(place / "model", 0.0)
    save_bert(place / "dropping", 0.1)
    save_tiny_llama(place / "llama", num_hidden_layers=3)
    write_rows(place / "equal.jsonl", texts(48, 12, 12))
    write_rows(place / "ragged.jsonl", texts(45, 1, 50))
    write_rows(place / "held_out.jsonl", texts(6, 3, 9))
    return place


def config_of(place: Path, name: str, mode: str, data: str, model: str = "model", **fields: Any) -> RunConfig:
    own = {"method": "layers", "target_modules": TOP, **fields}
    return RunConfig(
        model_name_or_path=str(place / model),
        output_dir=str(place / name),
        train_file=str(place / f"{data}.jsonl"),
        validation_file=str(place / "held_out.jsonl"),
        test_file=str(place / "held_out.jsonl"),
        cache_frozen_prefix=mode,
        **{**own, "training": {**QUICK, **own.get("training", {})}},
    )


class Tuned:
    """A training: the weights, what it says of the cache, and what it noted."""

    def __init__(self, config: RunConfig, **how: Any) -> None:
        shutil.rmtree(config.output_dir, ignore_errors=True)
        materials, run = prepare(config), RunDirectory(config.output_dir)
        run.create(config)
        stages.check_choice(materials)
        if config.needs_plan:
            stages.analyze(materials, run)
            stages.select(config, run)
        with collecting() as self.notes:
            stages.tune(materials, run, **how)
        self.path = run.path
        self.weights = weights(run.path)
        self.facts = json.loads((run.path / "training_cost.json").read_text()).get("frozen_prefix")
        assert not run.prefix.exists()


def weights(run: Path) -> dict[str, Tensor]:
    (file,) = (run / "adapter").glob("*.safetensors")
    return load_file(file)


def tuned(*words: Any, **fields: Any) -> Tuned:
    return Tuned(config_of(*words, **fields))


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def near(one: dict[str, Tensor], other: dict[str, Tensor], within: float) -> bool:
    return one.keys() == other.keys() and all(torch.allclose(one[n], other[n], rtol=0, atol=within) for n in one)


@pytest.mark.parametrize("training", [{}, {"gradient_accumulation_steps": 2}, {"bf16": True}])
def test_the_weights_are_those_without_it(place: Path, training: dict[str, Any]) -> None:
    fields = {"training": training}
    plain, cached = (tuned(place, "run", mode, "equal", **fields) for mode in ("off", "on"))
    assert plain.facts is None and not plain.notes
    assert cached.facts["frozen_layers"] == 2 and cached.facts["layers"] == 4
    assert (cached.facts["examples_read"], cached.facts["examples_computed"]) == (96, 48)
    assert cached.facts["bytes"] == cached.facts["bytes_expected"] == 48 * 14 * 32 * 4
    assert same(cached.weights, plain.weights)


def test_texts_of_all_lengths(place: Path) -> None:
    """Batches of other lengths and sizes round otherwise in the frozen layers."""
    plain, cached = (tuned(place, "run", mode, "ragged") for mode in ("off", "on"))
    assert near(cached.weights, plain.weights, 1e-4)
    some = tuned(place, "run", "on", "ragged", cache_size="60KB")
    assert 0 < some.facts["bytes"] <= 60_000 < some.facts["bytes_expected"]
    assert 0 < some.facts["examples_read"] < cached.facts["examples_read"]
    assert some.facts["examples_read"] + some.facts["examples_computed"] == 3 * 45
    assert near(some.weights, plain.weights, 1e-4)


@contextlib.contextmanager
def held_in_evaluation(model: Any) -> Iterator[None]:
    """In place of a context of the training: the same, with the embeddings and the two lowest layers in evaluation mode."""
    below = [model.bert.embeddings, *model.bert.encoder.layer[:2]]
    for module in (part for whole in below for part in whole.modules()):
        module.eval()
        module.train = lambda mode=True, module=module: module
    yield


def test_dropout_is_off_in_the_frozen_layers_alone(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cached = tuned(place, "run", "on", "equal", model="dropping")
    assert "dropout is off in them" in cached.notes[0]
    plain = tuned(place, "run", "off", "equal", model="dropping")
    assert not near(plain.weights, cached.weights, 1e-6)
    assert same(tuned(place, "run", "on", "equal", model="dropping", cache_size="0").weights, cached.weights)
    monkeypatch.setattr(training, "frozen_statistics", held_in_evaluation)
    assert same(tuned(place, "run", "off", "equal", model="dropping").weights, cached.weights)


def test_methods_that_leave_the_lowest_layers_alone(place: Path) -> None:
    for fields, layers in (
        ({"method": "head", "target_modules": []}, 4),
        ({"method": "lora", "target_modules": ["layer.3"]}, 3),
        ({"method": "columns", "target_modules": ["layer.3"], "budget": "1%", "criteria": ["magnitude"]}, 3),
        ({"method": "layers", "target_modules": []}, 3),
    ):
        plain, cached = (tuned(place, "run", mode, "equal", **fields) for mode in ("off", "auto"))
        assert cached.facts["frozen_layers"] == layers and cached.facts["examples_read"] == 96
        assert same(cached.weights, plain.weights)


def test_a_decoder_through_trl(place: Path) -> None:
    draw = random.Random(0)
    write_rows(place / "prose.jsonl", [{"text": " ".join(draw.choices(WORDS, k=14))} for _ in range(24)])
    fields = {
        "model": "llama", "method": "lora", "target_modules": [r"model\.layers\.2\..*"], "task": "causal_lm",
        "generation_examples": 0, "validation_file": None, "test_file": None,
    }  # fmt: skip

    def run(mode: str, training: dict[str, Any], **more: Any) -> Tuned:
        config = config_of(place, "run", mode, "prose", **{k: v for k, v in fields.items() if not k.endswith("_file")})
        config.validation_file = config.test_file = None
        config.training |= training
        for name, value in more.items():
            setattr(config, name, value)
        return Tuned(config)

    for how in ({}, {"gradient_checkpointing": True}):
        plain, cached = run("off", how), run("auto", how)
        assert cached.facts["frozen_layers"] == 2 and same(cached.weights, plain.weights)
    packed = run("auto", {}, packing=True, max_length=20)
    assert packed.facts is None and "packing joins other examples" in packed.notes[0]


def test_pictures(place: Path) -> None:
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        image_size=16, patch_size=8, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    transformers.ViTModel(config).save_pretrained(place / "vit")
    transformers.ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(place / "vit")
    image = pytest.importorskip("PIL.Image")
    folder = place / "pictures"
    folder.mkdir()
    rows = []
    for i in range(24):
        pixels = np.random.default_rng(i).integers(0, 255, (16, 16, 3), dtype=np.uint8)
        image.fromarray(pixels).save(folder / f"{i}.png")
        rows.append({"image": str(folder / f"{i}.png"), "label": "ab"[i % 2]})
    write_rows(place / "pictures.jsonl", rows)

    def run(mode: str) -> Tuned:
        config = config_of(place, "run", mode, "pictures", model="vit", target_modules=[], task="image_classification")
        config.validation_file = config.test_file = None
        return Tuned(config)

    plain, cached = run("off"), run("auto")
    assert cached.facts["frozen_layers"] == 2 and cached.facts["examples_read"] == 2 * cached.facts["examples_computed"]
    assert same(cached.weights, plain.weights)


def test_a_training_that_goes_on_reads_what_was_kept(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit, with texts of all lengths: the file is taken up again."""
    saving = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "epoch", "save_total_limit": 30}
    whole = tuned(place, "whole", "on", "ragged", model="dropping", training=saving)
    ends: Any = training._StepClock.on_step_end
    for step in (3, 8):  # in the first pass of 6 steps, and in the second
        config = config_of(place, "stopped", "on", "ragged", model="dropping", training=saving)

        def stop(self: Any, args: Any, state: Any, control: Any, at: int = step, **kwargs: Any) -> None:
            ends(self, args, state, control, **kwargs)
            if state.global_step == at:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(training._StepClock, "on_step_end", stop)
            Tuned(config)
        run = RunDirectory(config.output_dir)
        assert run.prefix.is_dir()
        stages.tune(prepare(config), run, goes_on=True)
        facts = json.loads((run.path / "training_cost.json").read_text())["frozen_prefix"]
        # The step after the checkpoint was taken, and is not in the index of the checkpoint's file.
        assert facts["examples_computed"] == max(0, 45 - 8 * (step - 1))
        assert same(weights(run.path), whole.weights) and not run.prefix.exists()


def test_evaluations_between_see_the_model_itself(place: Path) -> None:
    fields = {"training": {"eval_strategy": "steps", "eval_steps": 4, "logging_steps": 2}}
    plain, cached = (tuned(place, mode, mode, "equal", **fields) for mode in ("off", "on"))
    logs = [
        [
            {name: value for name, value in json.loads(line).items() if "runtime" not in name and "second" not in name}
            for line in (run.path / "train_log.jsonl").read_text().splitlines()
        ]
        for run in (plain, cached)
    ]
    assert logs[0] == logs[1] and sum("eval_loss" in entry for entry in logs[0]) == 5


@pytest.mark.slow
def test_two_processes(place: Path) -> None:
    fields = {"training": {"per_device_train_batch_size": 4}}
    run = tuned(place, "two", "off", "equal", **fields, method="head", target_modules=[])
    for mode in ("off", "on"):
        shutil.copytree(run.path, place / f"two-{mode}")
        done = torchrun("--no-python", sys.executable, "-c", COMMAND, "tune", place / f"two-{mode}", "--overwrite_output_dir",
                        "--cache_frozen_prefix", mode)  # fmt: skip
        assert done.returncode == 0, done.stderr
    assert "in each of 2 processes" in done.stderr
    assert near(weights(place / "two-on"), weights(place / "two-off"), 1e-5)
    facts = json.loads((place / "two-on" / "training_cost.json").read_text())["frozen_prefix"]
    assert facts["examples_read"] + facts["examples_computed"] == 3 * 24 and 24 <= facts["examples_computed"] < 48
    assert not (place / "two-on" / "frozen_prefix").exists()


# -- what is decided ---------------------------------------------------------------------------------------------------


def test_auto_says_what_it_keeps(place: Path) -> None:
    run = tuned(place, "run", "auto", "equal")
    assert run.notes == [
        "What the 2 frozen layers of 4 give is computed once for each example and kept, 84.0 KiB; of 3 passes over the data the later "
        "ones begin above them."
    ]


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"training": {"num_train_epochs": 1}}, ""),
        ({"training": {"max_steps": 9}}, ""),  # a pass takes 6
        ({"method": "lora", "target_modules": []}, ""),
        ({"model": "dropping"}, "have dropout, which --cache_frozen_prefix on would turn off there"),
        ({"cache_size": "80KB"}, "takes 84.0 KiB, and --cache_size is 80KB"),
        ({"training": {"neftune_noise_alpha": 5.0}}, "neftune_noise_alpha adds noise"),
    ],
)
def test_auto_keeps_nothing(place: Path, fields: dict[str, Any], sentence: str) -> None:
    run = tuned(place, "run", "auto", "equal", **fields)
    assert run.facts is None and len(run.notes) == bool(sentence)
    assert sentence in "".join(run.notes)


def test_auto_keeps_nothing_where_that_was_predicted_not_to_pay(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "settled", lambda materials, *_: (materials, {"frozen_prefix_pays": False}))
    run = tuned(place, "run", "auto", "equal")
    assert run.facts is None and "takes as long as to compute it" in run.notes[0]
    assert tuned(place, "run", "on", "equal").facts is not None


def test_auto_of_streamed_rows(place: Path) -> None:
    run = tuned(place, "run", "auto", "equal", streaming=True, training={"max_steps": 3, "num_train_epochs": 1})
    assert run.facts is None and "streamed rows are not known to come again" in run.notes[0]


def test_on_is_refused(place: Path, tmp_path: Path) -> None:
    words = [
        "--model_name_or_path",
        place / "model",
        "--train_file",
        place / "equal.jsonl",
        "--output_dir",
        tmp_path / "run",
    ]
    words += ["--cache_frozen_prefix", "on"]
    for more, sentence in (
        (["--streaming", "--max_steps", 5], "streamed rows are not known to come again"),
        (["--method", "full"], "the method full trains the lowest layer"),
        (["--method", "lora"], "the lowest layer is trained"),
        (["--method", "head", "--neftune_noise_alpha", 5], "neftune_noise_alpha adds noise"),
        (["--cache_size", "big"], "cache_size: 'big' is no size, such as 500MB or 20GiB"),
        (["--cache_frozen_prefix", "yes"], "cache_frozen_prefix 'yes' is unknown"),
    ):
        answer = reltune("run", *words, *more)
        assert answer.code == 2 and sentence in answer.err, answer.err
        assert len(answer.err.strip().splitlines()[-1]) < 300
        assert not (tmp_path / "run" / "adapter").exists()
        shutil.rmtree(tmp_path / "run", ignore_errors=True)


def test_on_is_refused_for_tasks_and_models_that_change(place: Path, tmp_path: Path) -> None:
    save_tiny_masked(tmp_path / "masked")
    t5 = transformers.T5Config(
        vocab_size=40, d_model=8, d_kv=4, d_ff=8, num_layers=2, num_heads=2, decoder_start_token_id=0
    )
    transformers.T5ForConditionalGeneration(t5).save_pretrained(tmp_path / "t5")
    tiny_tokenizer().save_pretrained(tmp_path / "t5")
    rows = [{"source": row["text"], "target": "good film"} for row in texts(20, 3, 5)]
    write_rows(tmp_path / "pairs.jsonl", rows)
    for model, data, task, sentence in (
        ("masked", place / "equal.jsonl", "masked_lm", "other tokens are masked in every pass"),
        ("t5", tmp_path / "pairs.jsonl", "seq2seq", "T5ForConditionalGeneration is not among the architectures"),
    ):
        config = RunConfig(
            str(tmp_path / model),
            str(tmp_path / "run"),
            train_file=str(data),
            task=task,
            method="lora",
            cache_frozen_prefix="on",
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            materials = prepare(config)
        with pytest.raises(InputError, match=sentence):
            stages.check_choice(materials)


def test_a_full_disk_ends_the_keeping_and_not_the_training(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno
    import os

    write, written = os.pwrite, []

    def full(file: int, data: Any, offset: int) -> int:
        if len(written) >= 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(len(data))
        return write(file, data, offset)

    plain = tuned(place, "run", "off", "equal")
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.warns(UserWarning, match="was full, so that only 28.0 KiB of hidden states were kept"):
        cached = tuned(place, "run", "on", "equal")
    assert cached.facts["bytes"] == sum(written) and near(cached.weights, plain.weights, 1e-5)
