"""Out of memory while training: batches are halved, and the weights come out as without."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from command_line import reltune
from task_cases import write_rows
from tasks.test_more_text_tasks import save_tiny_t5
from tiny_models import save_tiny_bert, save_tiny_llama, save_tiny_masked

WORDS = ("good", "bad", "fine", "poor")


def text(number: int) -> str:
    return " ".join(
        [WORDS[number % 4], WORDS[number // 4 % 4], *("film book very not great dull".split()[: number % 6])]
    )


ROWS: dict[str, Any] = {
    "sequence_classification": (save_tiny_bert, lambda n: {"text": text(n), "label": n % 2}),
    "multilabel_classification": (save_tiny_bert, lambda n: {"text": text(n), "label": [f"a{n % 2}", f"b{n % 3}"]}),
    "token_classification": (
        save_tiny_bert,
        lambda n: {
            "tokens": text(n).split(),
            "ner_tags": ["B-X" if word == "film" else "O" for word in text(n).split()],
        },
    ),
    "masked_lm": (save_tiny_masked, lambda n: {"text": text(n)}),
    "seq2seq": (save_tiny_t5, lambda n: {"source": text(n), "target": text(n + 1)}),
    "causal_lm": (save_tiny_llama, lambda n: {"prompt": text(n), "completion": " " + text(n + 1)}),
    "preference": (
        save_tiny_llama,
        lambda n: {"prompt": text(n), "chosen": " good book", "rejected": f" {text(n + 2)}"},
    ),
}


def train(
    place: Path, name: str, rows: Iterable[Mapping[str, Any]], task: str, *flags: object
) -> tuple[Any, dict[str, torch.Tensor]]:
    words = (
        "--model_name_or_path",
        place / "model",
        "--train_file",
        write_rows(place / "rows.jsonl", rows),
        "--task",
        task,
    )
    words = (
        *words,
        "--output_dir",
        place / name,
        "--max_steps",
        3,
        "--max_grad_norm",
        0,
    )
    words = (*words, "--optim", "sgd", "--learning_rate", "0.05", "--eval_strategy", "no", "--warmup_steps", 0)
    answer = reltune("run", *words, "--lr_scheduler_type", "constant", *flags)
    assert answer.code == 0, answer
    files = list((place / name / "adapter").glob("*.safetensors"))
    return answer, {key: value for file in files for key, value in load_file(file).items()}


@pytest.mark.parametrize(
    ("task", "accumulation", "method", "first"),
    [
        *((task, 2, "full", 2) for task in ROWS),
        ("causal_lm", 1, "full", 2),
        ("causal_lm", 2, "layers", 2),
        ("multilabel_classification", 2, "full", 3),
    ],
)
def test_weights_come_out_as_without(
    tmp_path: Path, task: str, accumulation: int, method: str, first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``first``: the number of the first batch that memory does not hold."""
    save, row = ROWS[task]
    save(tmp_path / "model")
    for file in (tmp_path / "model").glob("config.json"):  # dropout would draw other numbers for parts
        file.write_text(file.read_text().replace('_dropout_prob": 0.1', '_dropout_prob": 0.0'))
    rows = [row(n) for n in range(60)]
    flags = ("--method", method, "--per_device_train_batch_size", 8, "--gradient_accumulation_steps", accumulation)
    _, whole = train(tmp_path, "whole", rows, task, *flags)

    from transformers import Trainer

    plain, sizes, calls = Trainer.training_step, [], []

    def step(self: Trainer, model: Any, inputs: Any, *rest: Any, **options: Any) -> Any:
        count = len(inputs["input_ids"]) // (2 if task == "preference" else 1)
        calls.append(count)
        loss = plain(self, model, inputs, *rest, **options)
        if count > 3 and len(calls) >= first:  # its gradients are there already
            raise torch.OutOfMemoryError("CUDA out of memory")
        sizes.append(count)
        return loss

    monkeypatch.setattr(Trainer, "training_step", step)
    answer, halved = train(tmp_path, "halved", rows, task, *flags)
    assert "out of memory with 8 examples in a batch; training goes on with 2 at a time" in answer.err, answer.err
    assert max(sizes[first - 1 :]) == 2 and answer.err.count("out of memory") == 2  # 8, then 4
    assert whole.keys() == halved.keys() and whole
    start = load_file(tmp_path / "model" / "model.safetensors")
    moved = 0.0
    for key, value in whole.items():
        torch.testing.assert_close(
            halved[key], value, rtol=1e-4, atol=1e-6, msg=lambda words, key=key: f"{key}: {words}"
        )
        name = next((own for own in start if key.endswith(own)), None)
        if name is not None and start[name].shape == value.shape:
            moved = max(moved, float((start[name] - value).abs().max()))
    assert moved > 1e-4  # training did something


def test_one_example_that_does_not_fit_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny_bert(tmp_path / "model")
    from transformers import Trainer

    def step(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Trainer, "training_step", step)
    rows = write_rows(tmp_path / "rows.jsonl", [{"text": text(n), "label": n % 2} for n in range(60)])
    words = ("--model_name_or_path", tmp_path / "model", "--train_file", rows, "--method", "full", "--max_steps", 1)
    answer = reltune("run", *words, "--output_dir", tmp_path / "run")
    assert answer.code == 1 and "out of memory" in answer.err and "1 at a time" in answer.err, answer
