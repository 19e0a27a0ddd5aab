"""Preference tuning: pairs as examples, DPO's loss against TRL's and by hand, relevance against plain autograd, whole runs."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from measured_models import CLASSIFIER, LANGUAGE_MODEL, VOCAB, made, tiny_gpt2, tiny_mixtral
from oracles.criteria import expected
from relevance_cases import assert_parts_equal, canonical, measure, of_expert
from reltune.config.run_config import RunConfig
from reltune.data.rows import Row
from reltune.errors import InputError
from reltune.losses import LOSSES, preference_loss, rows_of
from reltune.names import TASKS as NAMES
from reltune.relevance.batches import contents
from reltune.runs.evaluation import evaluate
from reltune.runs.splits import read_data
from reltune.runs.training import arguments
from reltune.tasks.preference import ITEM, Preference
from reltune.tasks.registry import TASKS
from reltune.tuner import ReltuneConfig
from task_cases import run_task, write_rows
from tiny_models import CHAT, save_tiny_llama

BETA = 0.1
OPPOSITES = {"good": "bad", "great": "dull", "fine": "poor", "好": "坏"}
LENGTHS = ((3, 9, 5), (2, 3, 8), (4, 6, 6), (1, 4, 2), (5, 11, 7))  # of prompts, and of both sequences


def tiny_llama(**changes: Any) -> LlamaForCausalLM:
    return made(LlamaForCausalLM, LlamaConfig(**LANGUAGE_MODEL, num_key_value_heads=1, attention_bias=True, **changes))


def pair_batch(lengths: Any = LENGTHS, seed: int = 0) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    longest = max(max(of) for of in lengths)
    batch = {key: torch.zeros(len(lengths), 2, longest, dtype=torch.long) for key in ("input_ids", "attention_mask")}
    batch["completion_mask"] = torch.zeros_like(batch["input_ids"])
    for i, (prompt, *ends) in enumerate(lengths):
        start = torch.randint(1, VOCAB, (prompt,), generator=draw)
        for j, end in enumerate(ends):
            answer = torch.randint(1, VOCAB, (end - prompt,), generator=draw)
            batch["input_ids"][i, j, :end] = torch.cat([start, answer])
            batch["attention_mask"][i, j, :end] = 1
            batch["completion_mask"][i, j, prompt:end] = 1
    return {**batch, "labels": torch.ones(len(lengths), dtype=torch.long)}


def part(batch: dict[str, Tensor], *places: int) -> dict[str, Tensor]:
    """Some of the pairs, cut to their own longest sequence."""
    some = {key: value[list(places)] for key, value in batch.items()}
    longest = int(some["attention_mask"].sum(-1).max())
    return {key: value[..., :longest] if value.ndim == 3 else value for key, value in some.items()}


def log_prob(model: nn.Module, batch: dict[str, Tensor], i: int, j: int) -> Tensor:
    """One answer's log probability, alone and without padding."""
    end, answer = int(batch["attention_mask"][i, j].sum()), int(batch["completion_mask"][i, j].sum())
    ids = batch["input_ids"][i, j, :end]
    logits = model(input_ids=ids[None]).logits[0, :-1].double()
    return -F.cross_entropy(logits, ids[1:], reduction="none")[-answer:].sum()


def pair_losses(model: nn.Module, batch: dict[str, Tensor], reference: list[Tensor] | None = None) -> list[Tensor]:
    """DPO's loss of every pair by the paper's equation 7."""
    losses = []
    for i in range(len(batch["labels"])):
        log_probs = torch.stack([log_prob(model, batch, i, j) for j in (0, 1)])
        of_reference = log_probs.detach() if reference is None else reference[i]
        ratios = log_probs - of_reference
        losses.append(-torch.log(torch.sigmoid(BETA * ratios[0] - BETA * ratios[1])))
    return losses


def pair_gradients(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, list[Tensor]]:
    """Every parameter's gradient of every pair's loss, by plain autograd."""
    named = dict(model.named_parameters())
    found: dict[str, list[Tensor]] = {name: [] for name in named}
    for loss in pair_losses(model.eval(), batch):
        gradients = torch.autograd.grad(loss, list(named.values()), allow_unused=True, retain_graph=True)
        for (name, p), g in zip(named.items(), gradients, strict=True):
            found[name].append(torch.zeros_like(p) if g is None else g)
    return found


def by_module(model: nn.Module, infos: list[Any], values: dict[str, Any]) -> dict[str, Any]:
    """Values of parameters (or lists of them, one per pair) as each measured module's own, of experts each its part."""
    found = {}
    for info in infos:
        module = model.get_submodule(info.owner)
        own = {name: values[f"{info.owner}.{name}"] for name, _ in module.named_parameters(recurse=False)}
        if info.layer_type == "experts":
            projection, expert = info.name.split(".")[-2:]
            found[info.name] = of_expert(module, projection, int(expert), own)
        else:
            found[info.name] = canonical(module, own)
    return found


CRITERIA = ["fisher", "gradient", "taylor", "relative_gradient", "gradient_snr"]


@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2, tiny_mixtral])
def test_relevance_is_that_of_pairs(make: Any, size: int) -> None:
    model, batch = make(), pair_batch()
    batches = [part(batch, *range(start, min(start + size, 5))) for start in range(0, 5, size)]
    found = measure(model, batches, "preference", [*CRITERIA, "fisher_true"])
    infos = found.inventory.modules
    kinds = {info.layer_type for info in infos}
    assert {"linear", "norm", "embedding"} <= kinds
    gradients = pair_gradients(model, batch)
    each = [by_module(model, infos, {k: of[i] for k, of in gradients.items()}) for i in range(5)]
    weights = by_module(model, infos, {k: p.detach() for k, p in model.named_parameters()})
    for criterion in CRITERIA:
        wanted = {}
        for info in infos:
            shell = nn.LayerNorm(1) if info.layer_type == "norm" else nn.Linear(1, 1, bias=info.bias)
            wanted[info.name] = expected(criterion, shell, [of[info.name] for of in each], weights[info.name])
        own = {
            name: {p: v for p, v in parts.items() if p in wanted[name]}
            for name, parts in found.parts[criterion].items()
            if name in wanted
        }
        assert_parts_equal(own, wanted, 1e-7 if criterion in ("gradient_snr", "relative_gradient") else 1e-9)
    # whichever answer is drawn as the preferred one, at the untouched model its gradient is the same but for the sign
    assert_parts_equal(found.parts["fisher_true"], found.parts["fisher"], 1e-12)


def test_single_weights_of_pairs() -> None:
    model, batch = tiny_gpt2(), pair_batch()
    found = measure(model, [part(batch, 0, 1, 2), part(batch, 3, 4)], "preference", ["fisher"], elements=True)
    gradients = pair_gradients(model, batch)
    for info in found.inventory.modules:
        of = torch.stack([g.mT if info.layer_type == "conv1d" else g for g in gradients[f"{info.name}.weight"]])
        wanted = of.square().mean(0)
        assert (found.parts["fisher"][info.name]["element"] - wanted).abs().max() <= 1e-9 * wanted.abs().max(), info


def test_activations_are_those_of_both_sequences() -> None:
    """|w| · ‖x‖ over all tokens that are no padding, of chosen and rejected alike."""
    model, batch = tiny_llama().eval(), pair_batch()
    found = measure(model, [part(batch, 0, 1), part(batch, 2, 3, 4)], "preference", ["activation"])
    name = "model.layers.1.mlp.down_proj"
    squares = torch.zeros(CLASSIFIER["intermediate_size"], dtype=torch.float64)

    def see(module: nn.Module, args: tuple[Tensor]) -> None:
        squares.add_(args[0].detach().flatten(0, 1).square().sum(0))

    handle = model.get_submodule(name).register_forward_pre_hook(see)
    for i, j in ((i, j) for i in range(5) for j in (0, 1)):
        log_prob(model, batch, i, j)
    handle.remove()
    wanted = (model.get_parameter(f"{name}.weight").detach().abs() * squares.sqrt()).sum(0)
    got = found.parts["activation"][name]["column"]
    assert (got - wanted).abs().max() <= 1e-9 * wanted.max()


def test_a_batch_that_does_not_fit_is_halved_by_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = tiny_llama(), pair_batch()
    wanted = measure(model, [batch], "preference", ["fisher"]).parts["fisher"]
    forward = type(model).forward

    def small(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if len(kwargs["input_ids"]) > 4:
            raise torch.OutOfMemoryError
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(model), "forward", small)
    with pytest.warns(UserWarning, match="out of memory with 5 examples"):
        found = measure(model, [batch], "preference", ["fisher"])
    assert found.provenance["examples"] == 5
    assert_parts_equal(found.parts["fisher"], wanted, 1e-12)
    with pytest.raises(
        torch.OutOfMemoryError
    ):  # what is noted of the untouched model is halved likewise, down to one pair
        monkeypatch.setattr(type(model), "forward", lambda *_, **__: (_ for _ in ()).throw(torch.OutOfMemoryError()))
        measure(model, [batch], "preference", ["ablation"])


def test_what_is_measured_of_a_changed_model_refers_to_the_untouched_one() -> None:
    """Ablation is the rise of DPO's loss from log 2, the reference being the model as it came."""
    model, batch = tiny_llama().eval(), pair_batch()
    options = {"ablation": {"kinds": ["module"]}, "movement": {"steps": 3, "learning_rate": 1e-3}}
    found = measure(
        model, [part(batch, 0, 1, 2), part(batch, 3, 4)], "preference", ["ablation", "movement"], options=options
    )
    assert found.provenance["ablation"]["of_the_model"] == pytest.approx(-math.log(2), rel=1e-12)
    with torch.no_grad():
        reference = [torch.stack([log_prob(model, batch, i, j) for j in (0, 1)]) for i in range(5)]
        for name in ("model.layers.0.mlp.up_proj", "model.layers.1.self_attn.v_proj"):
            handle = model.get_submodule(name).register_forward_hook(lambda *of: torch.zeros_like(of[-1]))
            wanted = torch.stack(pair_losses(model, batch, reference)).mean() - math.log(2)
            handle.remove()
            assert wanted.abs() > 1e-3
            assert found.parts["ablation"][name]["module"] == pytest.approx(float(wanted), rel=1e-9)

    # movement: the same three steps of AdamW by hand
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    for places in ((0, 1, 2), (3, 4), (0, 1, 2)):
        some = {key: value[list(places)] for key, value in batch.items()}
        torch.stack(pair_losses(model, some, [reference[i] for i in places])).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    name = "model.layers.0.mlp.up_proj"
    wanted = (model.get_parameter(f"{name}.weight") - before[f"{name}.weight"]).abs().sum(0)
    got = found.parts["movement"][name]["column"]
    assert (got - wanted).abs().max() <= 1e-6 * wanted.max()


@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "ipo"])
def test_losses_are_those_of_trl(loss_type: str, tmp_path: Path) -> None:
    """Of a model that has moved from its reference, against DPOTrainer's mean of each pair alone."""
    task = Preference(beta=0.3, loss_type=loss_type)
    save_tiny_llama(tmp_path / "model")
    model, _ = task.load_model(tmp_path / "model")
    tokenizer = task.load_tokenizer(tmp_path / "model")
    examples = task.encode([Row(values, 1) for values in TEXTS], tokenizer, 30)
    tuned = get_peft_model(model, ReltuneConfig(target_modules=["up_proj", "v_proj"], r=8, init_weights=False)).eval()
    args = arguments(str(tmp_path), "selection", 0, {"use_cpu": True, "eval_strategy": "no"}, task)
    trainer = task.trainer(tuned, args, tokenizer, examples)
    assert set(tuned.peft_config) == {"default"}  # no copy for the reference
    assert all(p.requires_grad == ("reltune_" in name) for name, p in tuned.named_parameters())
    loss = task.relevance_loss
    collate = task.collator(tokenizer)
    for item in examples.items:
        batch = collate([item])
        with torch.no_grad():
            theirs = trainer.compute_loss(tuned, trainer.data_collator([item]))
            with tuned.disable_adapter():
                batch |= loss.of_untouched(tuned(**rows_of(batch, loss)), batch)
            ours = loss.per_example(tuned(**rows_of(batch, loss)), batch)
        assert float(theirs) == pytest.approx(float(ours), rel=1e-4)
    # all of them together, and their metrics, by the trainer that evaluates
    found = evaluate(tuned, {"test": examples}, task, tokenizer, use_cpu=True, per_device_eval_batch_size=2).metrics
    with torch.no_grad():
        batch = collate(examples.items)
        ours = {}
        for name in ("base", "tuned"):
            with tuned.disable_adapter() if name == "base" else contextlib.nullcontext():
                ours[name] = torch.stack(
                    [torch.stack([log_prob(tuned, batch, i, j) for j in (0, 1)]) for i in range(len(examples))]
                )
    margins = 0.3 * (ours["tuned"] - ours["base"]) @ torch.tensor([1.0, -1.0], dtype=torch.float64)
    assert found["test_reward_margin"] == pytest.approx(float(margins.mean()), rel=1e-4)
    assert found["test_reward_accuracy"] == pytest.approx(float((margins > 0).double().mean()))
    likelier = (ours["tuned"][:, 0] > ours["tuned"][:, 1]).double().mean()
    assert found["test_chosen_likelier"] == pytest.approx(float(likelier))
    assert 0 < found["test_reward_accuracy"] < 1


def test_labels_are_drawn_from_the_rewards() -> None:
    logits = torch.zeros(2, 3, 4, dtype=torch.float64)
    batch = {"input_ids": torch.ones(1, 2, 3).long(), "completion_mask": torch.tensor([[[0, 0, 1], [0, 1, 1]]])}
    batch |= {"labels": torch.ones(1).long(), "reference_log_probs": torch.tensor([[-2.0, 1.0]])}
    loss = preference_loss(0.5)
    # rewards of ½ (−log 4 + 2) and ½ (−2 log 4 − 1)
    h = 0.5 * (3 + math.log(4))
    assert loss.per_example(logits, batch).item() == pytest.approx(math.log1p(math.exp(-h)))
    swapped = {**batch, "labels": torch.zeros(1).long()}
    assert loss.per_example(logits, swapped).item() == pytest.approx(math.log1p(math.exp(h)))
    many = {key: value.expand(4000, *value.shape[1:]) for key, value in batch.items()}
    drawn = loss.sample_labels(logits.repeat(4000, 1, 1), many, torch.Generator().manual_seed(0))
    assert drawn.shape == (4000,) and drawn.dtype == torch.long
    assert drawn.double().mean().item() == pytest.approx(1 / (1 + math.exp(-h)), abs=0.02)
    for name in ("hinge", "ipo"):
        with pytest.raises(InputError, match=f"labels cannot be drawn for the preference loss '{name}'"):
            preference_loss(0.5, name).sample_labels(logits, batch, None)
    with pytest.raises(InputError, match="did you mean 'sigmoid'"):
        preference_loss(loss_type="sigmoidal")
    with pytest.raises(InputError, match="add completion_mask"):
        LOSSES["preference"].per_example(logits, {"input_ids": torch.ones(1, 2, 3).long(), "labels": torch.ones(2)})
    for flat in ({"input_ids": torch.ones(2, 3).long()}, (torch.ones(1, 2, 3).long(), torch.ones(1)), {}):
        with pytest.raises(InputError, match="takes 2 rows for each example"):
            rows_of(flat, loss)


def test_the_contents_of_pairs_depend_on_no_padding() -> None:
    batch = pair_batch()
    total = contents(batch)
    assert sum(contents(part(batch, i)) for i in range(5)) % (1 << 128) == total
    # whose token is whose matters: the end of the chosen sequence moved to the beginning of the rejected one
    one = {"input_ids": torch.tensor([[[1, 2], [3, 0]]]), "attention_mask": torch.tensor([[[1, 1], [1, 0]]])}
    two = {"input_ids": torch.tensor([[[1, 0], [2, 3]]]), "attention_mask": torch.tensor([[[1, 0], [1, 1]]])}
    assert contents(one) != contents(two)


# -- rows and examples ----------------------------------------------------------------------------------------------

USER, OTHER = {"role": "user", "content": "good film"}, {"role": "user", "content": "dull"}
YES, NO = {"role": "assistant", "content": "fine"}, {"role": "assistant", "content": "poor book"}
TEXTS = [
    {"prompt": "good film", "chosen": " bad book", "rejected": " fine"},
    {"prompt": "very", "chosen": " dull", "rejected": " not great film"},
    {"prompt": "not 坏 film", "chosen": " 好", "rejected": " 坏"},
    {"prompt": "film book", "chosen": " very very very", "rejected": " not"},
    {"prompt": "poor", "chosen": " fine", "rejected": " poor poor"},
]
EXPLICIT = {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"}
IMPLICIT = {"chosen": "chosen", "rejected": "rejected"}


@pytest.mark.parametrize(
    ("columns", "values", "words"),
    [
        (EXPLICIT, {"prompt": "a", "chosen": "b", "rejected": " "}, "an empty 'rejected'"),
        (EXPLICIT, {"prompt": "a", "chosen": None, "rejected": "c"}, "an empty 'chosen'"),
        (EXPLICIT, {"prompt": "", "chosen": "b", "rejected": "c"}, "an empty 'prompt'"),
        (EXPLICIT, {"prompt": "a", "chosen": 3, "rejected": "c"}, "a 'chosen' that is no string"),
        (EXPLICIT, {"prompt": "a", "chosen": "b", "rejected": "b"}, "a 'chosen' that equals 'rejected'"),
        (EXPLICIT, {"prompt": "a", "chosen": "b", "rejected": [YES]}, "one is a text and the other messages"),
        (EXPLICIT, {"prompt": [USER], "chosen": "b", "rejected": "c"}, "of messages beside answers that are texts"),
        (
            EXPLICIT,
            {"prompt": [USER], "chosen": [USER], "rejected": [NO]},
            "'chosen' in which the assistant answers nothing",
        ),
        (EXPLICIT, {"prompt": [USER], "chosen": [YES], "rejected": [{"role": "assistant"}]}, "no content"),
        (EXPLICIT, {"prompt": [USER], "chosen": [YES], "rejected": []}, "an empty 'rejected'"),
        (IMPLICIT, {"chosen": "yes sir", "rejected": "no sir"}, "no prompt in common"),
        (IMPLICIT, {"chosen": [USER, YES], "rejected": [OTHER, NO]}, "no prompt in common"),
        (IMPLICIT, {"chosen": [USER, YES], "rejected": [USER]}, "'rejected' in which the assistant answers nothing"),
        (IMPLICIT, {"chosen": [USER, YES], "rejected": [USER, YES]}, "equals"),
    ],
)
def test_bad_rows(columns: dict[str, str], values: dict[str, Any], words: str) -> None:
    found = Preference(columns=columns).problem(Row(values, 1))
    assert found is not None and words in found


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_tiny_llama(folder / "llama")
    save_tiny_llama(folder / "chat", chat_template=CHAT)
    return folder


@pytest.mark.parametrize(
    ("model", "columns", "values"),
    [
        ("chat", EXPLICIT, {"prompt": [USER], "chosen": [YES], "rejected": [NO]}),
        ("chat", IMPLICIT, {"chosen": [USER, YES], "rejected": [USER, NO]}),
        ("chat", EXPLICIT, {"prompt": "good film", "chosen": [USER, YES], "rejected": [USER, NO]}),
        ("chat", EXPLICIT, {"prompt": "good film", "chosen": [YES], "rejected": [NO]}),
        ("chat", EXPLICIT, {"prompt": [USER], "chosen": [USER, YES], "rejected": [USER, NO]}),
        ("llama", EXPLICIT, {"prompt": "good film", "chosen": "good film fine", "rejected": "good film poor book"}),
        ("llama", EXPLICIT, {"prompt": "good film", "chosen": " fine", "rejected": " poor book"}),
        ("llama", IMPLICIT, {"chosen": "good film fine", "rejected": "good film poor book"}),
    ],
)
def test_pairs_of_every_layout(models: Path, model: str, columns: dict[str, str], values: dict[str, Any]) -> None:
    task = Preference(columns=columns)
    row = Row(values, 3)
    assert task.problem(row) is None
    tokenizer = task.load_tokenizer(models / model)
    (item,) = task.encode([row], tokenizer, 40).items
    prompt, chosen, rejected = (" ".join(tokenizer.convert_ids_to_tokens(item[key])) for key in ITEM)
    if model == "chat":
        assert prompt == "<|user|> good film <|end|> <|assistant|>"
        assert (chosen, rejected) == ("fine <|end|>", "poor book <|end|>")
    else:
        assert (prompt, chosen, rejected) == ("good film", "fine <|endoftext|>", "poor book <|endoftext|>")
    batch = task.collator(tokenizer)([item])
    start, longest = len(item["prompt_ids"]), batch["input_ids"].shape[2]
    assert batch["labels"].tolist() == [1] and batch["input_ids"].shape == (1, 2, longest)
    for j, key in enumerate(("chosen_ids", "rejected_ids")):
        end = start + len(item[key])
        assert batch["input_ids"][0, j, :end].tolist() == item["prompt_ids"] + item[key]
        assert batch["attention_mask"][0, j].tolist() == [1] * end + [0] * (longest - end)
        assert batch["completion_mask"][0, j].tolist() == [0] * start + [1] * (end - start) + [0] * (longest - end)


def test_rows_that_the_cut_leaves_nothing_of(models: Path) -> None:
    task = Preference()
    tokenizer = task.load_tokenizer(models / "llama")
    rows = [
        Row({"prompt": "good film", "chosen": " fine book", "rejected": " fine film"}, 1),
        Row({"prompt": "very good film", "chosen": " fine", "rejected": " poor"}, 2),
        Row({"prompt": "good", "chosen": " fine book", "rejected": " fine  book"}, 3),
        Row({"prompt": "good", "chosen": " fine book", "rejected": " poor"}, 4),
    ]
    found = task.encode(rows, tokenizer, 3)
    assert found.lost == {
        "answers that are the same in the first 3 tokens": [1, 3],
        "a prompt of 3 tokens or more": [2],
    }
    assert len(found) == 1 and found.n_truncated == 4
    whole = Preference(columns=IMPLICIT)
    row = Row({"chosen": "good film", "rejected": "great film"}, 5)  # alike in their first letter alone
    assert whole.problem(row) is None
    assert whole.encode([row], tokenizer, 30).lost == {"answers that share no token of a prompt": [5]}
    assert [len(found[0][key]) for key in ("prompt_ids", "chosen_ids", "rejected_ids")] == [1, 2, 2]


# -- whole runs -----------------------------------------------------------------------------------------------------


def opposites(count: int, seed: int = 0) -> list[dict[str, str]]:
    """The opposite of the last word is preferred to that of another."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        word, other = draw.sample(list(OPPOSITES), k=2)
        others = " ".join(draw.choices(["film", "book", "very"], k=draw.randint(1, 4)))
        rows.append(
            {"prompt": f"{others} {word} not", "chosen": f" {OPPOSITES[word]}", "rejected": f" {OPPOSITES[other]}"}
        )
    return rows


def test_a_run_learns_to_prefer(tmp_path: Path) -> None:
    save_tiny_llama(tmp_path / "model", hidden_size=64, intermediate_size=128)
    reverse = [
        {"prompt": row["prompt"], "chosen": row["rejected"], "rejected": row["chosen"]} for row in opposites(24, 1)
    ]
    training = {"num_train_epochs": 8, "learning_rate": 1e-2, "logging_steps": 1, "load_best_model_at_end": True}
    results = run_task(
        tmp_path, opposites(160), training, forgetting_file=str(write_rows(tmp_path / "reverse.jsonl", reverse))
    )
    assert results["test_reward_accuracy"] > 0.9 and results["test_chosen_likelier"] > 0.9, results
    assert results["test_reward_margin"] > 0.1 and results["test_loss"] < 0.65
    # the untouched model has no rewards; the other way round is what it unlearns
    assert results["forgetting_before_loss"] == pytest.approx(math.log(2), rel=1e-6)
    assert not {"forgetting_before_reward_accuracy", "forgetting_before_reward_margin"} & set(results)
    assert results["forgetting_after_reward_accuracy"] < 0.1 and results["forgetting_after_loss"] > math.log(2)
    log = [json.loads(line) for line in (tmp_path / "run" / "train_log.jsonl").read_text().splitlines()]
    # before the first step the adapter is the reference, to the bit
    assert log[0]["loss"] == float(torch.tensor(2.0).log()) and log[0]["rewards/margins"] == 0
    evaluated = [entry["eval_loss"] for entry in log if "eval_loss" in entry]
    assert results["eval_loss"] == pytest.approx(min(evaluated), rel=1e-5)
    assert not [path for path in (tmp_path / "run").rglob("*") if path.name == "ref"]
    note = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "chosen likelier" in note


def test_beta_and_the_loss_are_fields_of_the_run(tmp_path: Path) -> None:
    config = RunConfig("model", str(tmp_path), train_file=str(write_rows(tmp_path / "pairs.jsonl", opposites(40))))
    for changes, words in (
        ({"beta": 0.0}, "beta is 0.0; it must be above 0"),
        ({"loss_type": "dpo"}, "loss_type 'dpo'"),
    ):
        with pytest.raises(InputError, match=words):
            dataclasses.replace(config, **changes).check()
    task, _ = read_data(dataclasses.replace(config, beta=0.5, loss_type="ipo"))
    assert isinstance(task, Preference) and (task.beta, task.loss_type) == (0.5, "ipo")
    args = task.make_arguments(output_dir=str(tmp_path))
    assert (args.beta, args.loss_type, args.max_length) == (0.5, ["ipo"], None)
    assert not args.bf16 and not args.gradient_checkpointing
    assert tuple(TASKS) == NAMES
