"""What predictions of every task share: the model's outputs for examples, and the form of what is read off them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import LogitsProcessor

Outputs = Mapping[str, Tensor]  # by the model's names: logits, start_logits, …


class Predictions(NamedTuple):
    """What a model says of rows: by the line of a row, names with values; and the lines of rows that it says nothing of, by
    a phrase that says why."""

    records: dict[int, dict[str, Any]]
    lost: Mapping[str, list[int]]


@torch.no_grad()
def outputs_of(
    model: nn.Module, examples: Any, collator: Callable[[list[Any]], dict[str, Any]], batch_size: int
) -> list[Outputs]:
    """The model's logits for each example in float32, (classes) or (tokens, classes) without those of padding.

    Examples of like length share a batch.
    """
    device, training = next(model.parameters()).device, model.training
    outputs: list[Outputs] = [{}] * len(examples)
    items = [examples[i] for i in range(len(examples))]
    order = sorted(range(len(items)), key=lambda i: len(items[i].get("input_ids", ())))
    model.eval()
    for start in range(0, len(order), batch_size):
        places = order[start : start + batch_size]
        batch = {key: value.to(device) for key, value in collator([items[i] for i in places]).items()}
        made = model(**{key: value for key, value in batch.items() if key != "labels"})
        for row, place in enumerate(places):
            outputs[place] = {
                name: _own(name, made[name][row].float().cpu(), batch, row) for name in made if name.endswith("logits")
            }
    model.train(training)
    return outputs


def not_numbers(values: Any) -> np.ndarray:
    """Of each of N arrays whether one of its values is NaN or positive infinity. Minus infinity marks what cannot be."""
    values = np.asarray(values)
    if values.dtype.kind not in "fc":
        return np.zeros(len(values), bool)
    spoilt: np.ndarray = (np.isnan(values) | (values == np.inf)).reshape(len(values), -1).any(1)
    return spoilt


def check_numbers(spoilt: Sequence[bool] | np.ndarray, unit: str) -> None:
    """Raise ArithmeticError unless the model's outputs for every example are numbers."""
    bad = np.flatnonzero(spoilt)
    if len(bad):
        raise ArithmeticError(
            f"the model's outputs for {len(bad):,} of {len(spoilt):,} {unit}s are no finite numbers (the first is {unit} {bad[0] + 1}), "
            "which say nothing; train again with a lower --learning_rate, or load the model in another type than float16."
        )


def check_outputs(outputs: Sequence[Outputs], unit: str) -> None:
    """Raise ArithmeticError unless the outputs for every example are numbers."""
    check_numbers([any(not_numbers(value[None]).any() for value in output.values()) for output in outputs], unit)


class NumbersOnly(LogitsProcessor):
    """Raises ArithmeticError while a model writes, where its outputs are no numbers: they would become some token."""

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        if bool(torch.isnan(scores).any()):
            check_numbers(torch.isnan(scores).any(-1).tolist(), "text")
        return scores


def _own(name: str, values: Tensor, batch: Mapping[str, Tensor], row: int) -> Tensor:
    """An example's values without those of padding, where there is one for each token."""
    per_token = values.ndim > 1 or name in ("start_logits", "end_logits")
    return values[batch["attention_mask"][row].bool().cpu()] if per_token and "attention_mask" in batch else values


def rounded(value: Tensor | float) -> float:
    """A number to six digits, as many as float32 has."""
    return float(f"{float(value):.6g}")


def by_label(labels: Sequence[str], probabilities: Tensor) -> dict[str, float]:
    """The probability of each label."""
    return {label: rounded(value) for label, value in zip(labels, probabilities.tolist(), strict=True)}
