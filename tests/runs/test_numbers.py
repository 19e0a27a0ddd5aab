"""Numbers that are none: training and analysis stop with the batch kept, and no output that is NaN counts as an answer."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import EvalPrediction

from command_line import Answer, reltune, review_rows, write_csv
from reltune.errors import InputError
from reltune.methods import adapter
from reltune.runs import training
from reltune.runs.kept_batch import STOPPED_AT, keep_batch
from reltune.tasks.prediction import NumbersOnly, check_outputs, not_numbers
from reltune.tasks.preference import Preference
from reltune.tasks.sequence_classification import SequenceClassification
from reltune.tasks.task import Examples
from reltune.tuner import written_weight
from task_cases import write_rows
from tiny_models import save_tiny_bert, save_tiny_llama

QUICK = ("--budget", "90%", "--granularity", "module", "--criteria", "magnitude", "--head_epochs", "0")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    save_tiny_bert(tmp_path / "model")
    write_csv(tmp_path / "rows.csv", review_rows(80))
    return tmp_path


def run(place: Path, *flags: object, criteria: str = "magnitude") -> Answer:
    words = [
        *QUICK,
        "--model_name_or_path",
        place / "model",
        "--train_file",
        place / "rows.csv",
        "--output_dir",
        place / "run",
    ]
    words[words.index("--criteria") + 1] = criteria
    return reltune("run", *words, "--per_device_train_batch_size", 8, *flags)


def spoil_batches(monkeypatch: pytest.MonkeyPatch, value: float, first: int) -> None:
    """Training's loss is ``value`` from this step on, with the gradients that it brings."""
    from transformers import Trainer

    plain = Trainer.compute_loss

    def spoilt(self: Trainer, model: Any, inputs: Any, *rest: Any, **options: Any) -> Any:
        loss = plain(self, model, inputs, *rest, **options)
        return (
            loss * value if model.training and self.state.global_step >= first and not isinstance(loss, tuple) else loss
        )

    monkeypatch.setattr(Trainer, "compute_loss", spoilt)


@pytest.mark.parametrize("first", [0, 3])
def test_a_loss_that_is_no_number_stops_training(place: Path, monkeypatch: pytest.MonkeyPatch, first: int) -> None:
    spoil_batches(monkeypatch, float("nan"), first)
    answer = run(place, "--save_steps", 1, "--save_strategy", "steps")
    assert answer.code == 1, answer
    begins = (
        f"training diverged, the loss of step {first + 1} is not finite"
        if first
        else "the loss of the first step, before any"
    )
    assert begins in answer.err and "the loss itself makes the number" in answer.err
    assert not (place / "run" / "adapter").exists()
    kept = place / "run" / STOPPED_AT
    assert str(kept) in answer.err
    batch = load_file(kept / "batch.safetensors")
    assert batch["input_ids"].shape[0] == 8 and set(batch) >= {"attention_mask", "labels"}
    record = json.loads((kept / "batch.json").read_text())
    assert len(record["texts"]) == 8 and record["texts"][0].startswith("[CLS]") and f"step {first + 1}" in record["why"]
    rows = {text for text, _ in review_rows(80)}
    for text in record["texts"]:
        assert text.replace(" [PAD]", "").removeprefix("[CLS] ").removesuffix(" [SEP]") in rows


def test_no_checkpoint_has_weights_that_are_no_numbers(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the loss is a number still, and only its gradient is none."""
    plain = training.watch

    def watch(trainer: Any, model: nn.Module, processor: Any) -> None:
        last = [p for p in model.parameters() if p.requires_grad][-1]
        last.register_hook(lambda gradient: gradient * float("nan") if trainer.state.global_step == 2 else gradient)
        plain(trainer, model, processor)

    monkeypatch.setattr(training, "watch", watch)
    answer = run(place, "--save_steps", 1, "--save_strategy", "steps", "--save_total_limit", 9)
    assert answer.code == 1 and "training diverged, the gradient of step 3 is not finite; its batch is in" in answer.err
    checkpoints = sorted(path.name for path in (place / "run").glob("checkpoint-*"))
    assert checkpoints == ["checkpoint-1", "checkpoint-2"]
    for name in checkpoints:
        tensors = load_file(place / "run" / name / "adapter_model.safetensors")
        assert all(tensor.isfinite().all() for tensor in tensors.values())


def test_the_kept_batch_goes_when_training_goes_well(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        spoil_batches(patch, float("inf"), 1)
        assert run(place).code == 1
    assert (place / "run" / STOPPED_AT).is_dir()
    assert run(place).code == 0
    assert not (place / "run" / STOPPED_AT).exists()


def test_a_gradient_that_is_zero_is_refused(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import Trainer

    plain = Trainer.compute_loss

    def cut(self: Trainer, model: Any, inputs: Any, *rest: Any, **options: Any) -> Any:
        loss = plain(self, model, inputs, *rest, **options)
        return loss.detach() + 0 * loss if model.training and not isinstance(loss, tuple) else loss

    monkeypatch.setattr(Trainer, "compute_loss", cut)
    answer = run(place)
    assert answer.code == 2 and "nothing that is trained gets a gradient in the first step" in answer.err, answer
    assert "the loss does not change with them" in answer.err


class Tail(nn.Module):
    """A model of which a part is trained that the loss does not reach, or reaches only through what asks for gradients."""

    def __init__(self, reached: bool) -> None:
        super().__init__()
        self.inside, self.outside = nn.Linear(2, 2), nn.Linear(2, 2)
        self.inside.requires_grad_(False)
        self.reached = reached

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        y = self.inside(x)
        return {"loss": (self.outside(y) if self.reached else y).square().mean()}


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda model: None, "the loss does not depend on them"),
        (lambda model: model.inside.requires_grad_(True), None),
    ],
)
def test_parts_that_the_loss_does_not_reach(tmp_path: Path, spoil: Callable[[Any], Any], words: str | None) -> None:
    model = Tail(reached=False)
    spoil(model)
    items = Examples([{"x": [1.0, 2.0], "labels": 0}] * 4)
    task = SequenceClassification(["a", "b"])
    task.collator = lambda processor: (
        lambda some: {  # type: ignore[method-assign]
            key: torch.tensor([one[key] for one in some]) for key in some[0]
        }
    )
    given = {"eval_strategy": "no", "save_strategy": "no", "max_steps": 1, "use_cpu": True}
    args = training.arguments(str(tmp_path), "full", 0, given, task)
    if words is None:  # something is reached, and the rest is the caller's business
        training.train(model, args, task, None, items)
        return
    with pytest.raises(InputError, match=words):
        training.train(model, args, task, None, items)


def test_checkpointing_that_gives_no_gradient_is_named(tmp_path: Path) -> None:
    model = Tail(reached=False)
    task = SequenceClassification(["a", "b"])
    task.collator = lambda processor: (
        lambda some: {  # type: ignore[method-assign]
            key: torch.tensor([one[key] for one in some]) for key in some[0]
        }
    )
    model.gradient_checkpointing_enable = lambda *_, **__: None  # type: ignore[assignment]
    given = {
        **{
            "eval_strategy": "no",
            "save_strategy": "no",
            "max_steps": 1,
            "use_cpu": True,
            "gradient_checkpointing": True,
        },
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    }
    args = training.arguments(str(tmp_path), "full", 0, given, task)
    with pytest.raises(InputError, match=r"use_reentrant.: false"):
        training.train(model, args, task, None, Examples([{"x": [1.0, 2.0], "labels": 0}] * 4))


@pytest.mark.parametrize("criterion", ["fisher", "movement", "ablation"])
def test_an_analysis_keeps_the_batch_that_it_stopped_at(
    place: Path, monkeypatch: pytest.MonkeyPatch, criterion: str
) -> None:
    """A word's embedding is no number, so that the batches with this word are spoilt: after the checks at the start."""
    from reltune.runs import stages

    plain = stages.measure

    def measure(materials: Any, model: Any, *rest: Any) -> Any:
        with torch.no_grad():
            model.bert.embeddings.word_embeddings.weight[4] = float("nan")
        return plain(materials, model, *rest)

    monkeypatch.setattr(stages, "measure", measure)
    answer = run(place, "--probe_steps", 5, criteria=criterion)
    kept = place / "run" / STOPPED_AT
    assert answer.code in (1, 2) and "not finite" in answer.err and f"The batch is in {kept}." in answer.err, answer
    assert (load_file(kept / "batch.safetensors")["input_ids"] == 4).any()
    assert "not finite" in json.loads((kept / "batch.json").read_text())["why"]


def test_what_cannot_be_kept(tmp_path: Path) -> None:
    assert keep_batch(tmp_path, None, None, "") is None and keep_batch(tmp_path, {"a": "b"}, None, "") is None
    assert keep_batch(tmp_path / "absent", {"a": torch.ones(1)}, None, "") is None
    place = keep_batch(tmp_path, (torch.ones(2), torch.zeros(1)), None, "so")
    assert place is not None and set(load_file(place / "batch.safetensors")) == {"0", "1"}


# -- outputs that are no numbers ------------------------------------------------------------------------------------


def spoil_head(run: Path) -> None:
    """The head of a run's adapter gives NaN for the first class."""
    file = run / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("classifier.bias"))
    tensors[name][0] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.fixture
def trained(place: Path) -> Iterator[Path]:
    assert run(place, "--max_steps", 2).code == 0
    spoil_head(place / "run")
    yield place


def test_nan_is_no_class(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter, "FLOATS", ())  # an adapter with such a number is refused before
    monkeypatch.setattr(written_weight, "check_finite", lambda name, values: None)
    answer = reltune("evaluate", trained / "run")
    assert (
        answer.code == 1
        and "the model's outputs for 12 of 12 texts are no finite numbers (the first is text 1)" in answer.err
    ), answer
    answer = reltune(
        "predict", trained / "run", "--input_file", trained / "rows.csv", "--output_file", trained / "out.jsonl"
    )
    assert answer.code == 1 and "are no finite numbers" in answer.err, answer
    assert not (trained / "out.jsonl").exists()


def test_a_writing_model_stops_at_nan(tmp_path: Path) -> None:
    save_tiny_llama(tmp_path / "model")
    rows = [
        {"prompt": f"very {'good ' * (n % 4)}{'bad ' * (n // 4)}film", "completion": " great book"} for n in range(60)
    ]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    words = ("--model_name_or_path", tmp_path / "model", "--train_file", file, "--output_dir", tmp_path / "run")
    assert reltune("run", *words, "--max_steps", 1, *QUICK).code == 0
    weights = tmp_path / "model" / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, weights, metadata={"format": "pt"})
    answer = reltune("predict", tmp_path / "run", "--input_file", file, "--output_file", tmp_path / "out.jsonl")
    assert answer.code != 0 and not (tmp_path / "out.jsonl").exists(), answer


def test_which_outputs_are_no_numbers() -> None:
    nan, inf = float("nan"), float("inf")
    assert not_numbers([[1.0, nan], [0.0, -inf], [inf, 0.0], [0.0, 1.0]]).tolist() == [True, False, True, False]
    assert not not_numbers([[1, 2]]).any()
    check_outputs([{"logits": torch.zeros(2)}], "text")
    with pytest.raises(ArithmeticError, match=r"for 1 of 2 texts are no finite numbers \(the first is text 2\)"):
        check_outputs([{"logits": torch.zeros(2)}, {"start_logits": torch.tensor([nan, 1.0])}], "text")
    with pytest.raises(ArithmeticError, match="for 1 of 2 texts"):
        NumbersOnly()(None, torch.tensor([[0.0, 1.0], [nan, 1.0]]))
    pairs = EvalPrediction(torch.tensor([[1.0, 2.0, nan, nan], [nan, 1.0, 0.0, 0.0]]).numpy(), None)  # type: ignore[arg-type]
    assert Preference().spoilt(pairs, Examples([])).tolist() == [False, True]
