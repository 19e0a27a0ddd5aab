"""Whether model, tokenizer and examples fit one another: looked at, and tried on two examples, before anything is trained."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from reltune.errors import InputError, first_line
from reltune.losses import as_loss, rows_of
from reltune.pretrained import vocabulary_size
from reltune.relevance.batches import forward, frozen, moved
from reltune.tasks.task import Examples, Task

LOOKED_AT = 2000  # examples of which two are tried
LONGEST = 512  # tokens of these two, at most, unless all are longer


def check_tokens(task: Task, model: nn.Module, processor: Any, sets: Iterable[Examples]) -> None:
    """Raise InputError if an example has a token that is beyond the model's embedding."""
    rows = vocabulary_size(model.config) if hasattr(processor, "get_vocab") else None  # type: ignore[arg-type]
    if rows is None:
        return
    beyond = {token_id: token for token, token_id in processor.get_vocab().items() if token_id >= rows}
    if not beyond:
        return
    used = {
        token_id
        for examples in sets
        for item in examples.items
        for ids in task.token_ids(item)
        for token_id in ids
        if token_id >= rows
    }
    if task.draws_tokens:
        used = set(beyond)
    if used:
        first = min(used)
        raise InputError(
            f"the tokenizer's {beyond.get(first, '')!r} (token {first}) stands in the data, and the model's embedding has {rows} "
            "rows, one for each token below that number; save the model after model.resize_token_embeddings, or use its own "
            "tokenizer."
        )


def settle_padding(task: Task, model: nn.Module, processor: Any, examples: Examples) -> None:
    """Let the task and its processor pad on a side on which an example's loss is the same alone and in a padded batch: on the
    right, or else on the left.

    Relevance is exact only where no example sees how long the others in its batch are.

    Raises:
        InputError: the model cannot read the examples, or there is no such side.
    """
    pair = _two_lengths(task, examples)
    collate = task.collator(processor)
    if pair is None:
        if len(examples):
            _value(task, model, collate([examples[0]]))
        return
    short, long = pair
    for side in task.padding_sides:
        task.padding_side = processor.padding_side = side
        alone, padded = (_value(task, model, collate(items)) for items in ([short], [short, long]))
        if not math.isfinite(alone) or abs(alone - padded) <= _tolerance(model) * max(1.0, abs(alone)):
            return
    name = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    raise InputError(
        f"a {name!r} model reads an example otherwise when its batch is padded (loss {alone:.4g} alone, {padded:.4g} padded), so "
        "that no relevance could be measured; use another model."
    )


def _two_lengths(task: Task, examples: Examples) -> tuple[Any, Any] | None:
    """The shortest example and the longest that is not too long; None unless one is longer than the other."""
    some = [examples[i] for i in range(min(len(examples), LOOKED_AT))] if task.padding_sides else []
    order = sorted((max(map(len, task.token_ids(item)), default=0), i) for i, item in enumerate(some))
    longer = [(length, i) for length, i in order if length > order[0][0]]
    if not longer:
        return None
    fitting = [i for length, i in longer if length <= LONGEST]
    return some[order[0][1]], some[fitting[-1] if fitting else longer[0][1]]


@torch.no_grad()
def _value(task: Task, model: nn.Module, batch: Any) -> float:
    """The first example's loss, or what its loss is made of where that is the same for every untouched model."""
    loss = as_loss(task.relevance_loss)
    try:
        with frozen(model):
            batch = moved(dict(batch), next(model.parameters()).device)
            outputs = forward(model, rows_of(batch, loss))
            if loss.of_untouched is not None:
                value = float(sum(value[0].sum() for value in loss.of_untouched(outputs, batch).values()))
            else:
                value = float(loss.per_example(outputs, batch)[0])
        if not math.isfinite(value):
            _check_weights(model)
        return value
    except (MemoryError, torch.OutOfMemoryError, InputError):
        raise
    except Exception as error:  # of the model's own code
        tokens = max(map(len, batch["input_ids"].flatten(0, -2))) if "input_ids" in batch else 0
        raise InputError(
            f"the model cannot read an example of {tokens} tokens ({type(error).__name__}: {first_line(error)}); check that its "
            "tokenizer and its config.json belong to it."
        ) from error


def _check_weights(model: nn.Module) -> None:
    """Raise InputError if a weight is infinite or not a number."""
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not parameter.isfinite().all():
            raise InputError(
                f"the model's weights are not all finite numbers: {name} has {int((~parameter.isfinite()).sum()):,} that are infinite or "
                "not a number; copy or download the model again, or take an earlier checkpoint."
            )


def _tolerance(model: nn.Module) -> float:
    """How far two losses may differ by rounding, as a share of them."""
    types = {parameter.dtype for parameter in model.parameters()}
    return 1e-4 if types <= {torch.float32, torch.float64} else 0.05  # of half precision, or of few bits
