"""Each task's loss, sampled labels and metric: one number, or one set of labels, for each example.

``outputs`` is a model's output with ``logits``, or the logits themselves; ``batch`` is a mapping with ``labels``, or
an ``(inputs, labels)`` pair. Losses are computed in float32 at least. The loss of an example with n label tokens is
the mean of their cross entropies, so its squared gradients are those of the example's log likelihood over n². That of a
preference pair, which is one example of two sequences, sums over their tokens.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from reltune.errors import InputError, nearest
from reltune.names import PREFERENCE_LOSSES

IGNORED = -100  # the label of tokens that are no part of the loss, as in transformers


@dataclasses.dataclass(frozen=True)
class Loss:
    """What a task asks of a model's outputs.

    Attributes:
        per_example: ``(outputs, batch) -> (B,)``, the loss of each example, to be differentiated.
        sample_labels: ``(outputs, batch, generator) -> labels`` of the shape and dtype of the batch's own, drawn from
            the model's predictive distribution given the batch's inputs. With them in place of the data's labels, the
            mean squared gradient is the true Fisher information and not the empirical one (Kunstner, Hennig and
            Balles, NeurIPS 2019, equations 2 and 3). The generator may be on another device, or None.
        metric: ``(outputs, batch) -> (B,)``, the task metric of each example; higher is better.
        metric_name: what ``metric`` measures.
        rows_per_example: rows that the model takes for one example. Where there are several, the model's inputs are
            (B, rows, …) in the batch, and ``rows_of`` gives them as (B · rows, …).
        beside: entries of the batch that the loss reads and the model does not, other than ``labels``.
        of_untouched: ``(outputs, batch) -> entries`` that the loss needs of the untouched model when another one, changed
            since, is judged. A batch without them is one that the untouched model itself is run on.
    """

    per_example: Callable[[Any, Any], Tensor]
    sample_labels: Callable[[Any, Any, torch.Generator | None], Tensor]
    metric: Callable[[Any, Any], Tensor]
    metric_name: str
    rows_per_example: int = 1
    beside: tuple[str, ...] = ()
    of_untouched: Callable[[Any, Any], dict[str, Tensor]] | None = None


def rows_of(batch: Any, loss: Any) -> Any:
    """The batch as a model takes it for this loss: (B, rows, …) as (B · rows, …), an example's rows one after the other,
    and nothing that the loss alone reads."""
    rows = getattr(loss, "rows_per_example", 1)
    if rows == 1:
        return batch
    own = ("labels", *loss.beside)
    inputs = {key: value for key, value in batch.items() if key not in own} if isinstance(batch, Mapping) else {}
    if not inputs or any(
        not isinstance(value, Tensor) or value.ndim < 2 or value.shape[1] != rows for value in inputs.values()
    ):
        raise InputError(
            f"the loss takes {rows} rows for each example; give batches as mappings, with input_ids and all else that the "
            f"model reads of shape (examples, {rows}, …)."
        )
    return {key: value.flatten(0, 1) for key, value in inputs.items()}


def as_loss(loss: str | nn.Module | Callable[[Any, Any], Tensor] | Loss | None) -> Loss:
    """The Loss that a user means.

    Args:
        loss: a key of ``LOSSES``; a torch loss module, which is applied without its reduction to logits and labels
            just as they are (torch wants classes in dimension 1, and nothing is shifted), then averaged over each
            example's labels, those it ignores left out; ``loss_fn(outputs, batch) -> (B,)``, with an attribute
            ``sample_labels`` if labels are to be drawn; anything with ``per_example``, taken as it is; None for
            ``nn.CrossEntropyLoss()``.

    Class weights, ``pos_weight`` and label smoothing change a torch module's loss, not the distribution that labels
    are drawn from: the softmax or the sigmoid of the logits.

    Raises:
        InputError: an unknown name, or an object that is no loss. The Loss's own functions raise it for labels that
            do not fit the logits, and ``sample_labels`` for a loss that belongs to no known distribution.
    """
    if loss is None:
        loss = nn.CrossEntropyLoss()
    if isinstance(loss, str):
        if loss not in LOSSES:
            raise InputError(f"loss {loss!r} is unknown; {nearest(loss, LOSSES)}")
        return LOSSES[loss]
    if hasattr(loss, "per_example"):
        return cast(Loss, loss)
    if isinstance(loss, type):
        raise InputError(f"the loss is the class {loss.__name__}; pass an object of it: {loss.__name__}(…).")
    if isinstance(loss, nn.Module) and hasattr(loss, "reduction"):
        return _module_loss(loss)
    if callable(loss):
        return _callable_loss(loss)
    raise InputError(
        f"{loss!r} is no loss; give a name ({', '.join(LOSSES)}), a torch loss module or loss_fn(outputs, batch)."
    )


def _logits_and_labels(outputs: Any, batch: Any) -> tuple[Tensor, Tensor]:
    logits = getattr(outputs, "logits", outputs)
    if not isinstance(logits, Tensor):
        raise InputError(f"the model gave a {type(outputs).__name__} without logits; use a model with a head.")
    if isinstance(batch, Mapping) and "labels" not in batch:
        raise InputError(f"the batch has no labels, only {', '.join(map(str, batch))}; add a column 'labels'.")
    labels = batch["labels"] if isinstance(batch, Mapping) else batch[1]
    return logits, labels.to(logits.device)


def _wide(logits: Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)


def _mean(values: Tensor, counted: Tensor) -> Tensor:
    """Each example's mean of the counted values, (B, …) -> (B,); 0 where none is counted."""
    values, counted = values[:, None].flatten(1), counted[:, None].flatten(1)
    return values.where(counted, 0).sum(1) / counted.sum(1).clamp(min=1)


WIDE_NUMBERS = 1 << 25  # of the probabilities at a time: 128 MiB in float32


class _CrossEntropy(torch.autograd.Function):
    """−log softmax(logits)[label] for logits (…, classes) and labels (…), in float32 at least.

    One wide copy of the logits lives at a time, and none from forward to backward: the probabilities are made again
    from the logits themselves, which the model's output holds anyway, a few rows at a time. (On a CPU, logits in half
    precision are widened once more while they are subtracted from.)
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        index = labels[..., None]
        largest = logits.amax(-1, keepdim=True).to(_wide(logits))
        wide = logits - largest
        chosen = wide.gather(-1, index)
        log_sum = wide.exp_().sum(-1, keepdim=True).log_()
        ctx.save_for_backward(logits, largest + log_sum, index)
        return (log_sum - chosen).squeeze(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        logits, log_sum, index = ctx.saved_tensors
        gradient = torch.empty_like(logits)
        # By rows of classes, with a dimension more for a single one.
        of = [x[None] for x in (gradient, logits, log_sum, index, g[..., None])]
        step = max(1, WIDE_NUMBERS * of[0].shape[-2] // max(1, logits.numel()))
        for into, *part in zip(*(x.split(step, -2) for x in of), strict=True):
            logits, log_sum, index, g = part
            into.copy_((logits - log_sum).exp_().mul_(g).scatter_add_(-1, index, -g))
        return gradient, None


def _categorical(logits: Tensor, labels: Tensor, ignored: int, generator: torch.Generator | None) -> Tensor:
    """Labels (B, …) drawn from the softmax of logits (B, …, classes); ignored ones stay.

    logit − log(exponential noise) is largest at class c with probability softmax(logits)[c], the Gumbel-max trick
    (Gumbel 1954): the noise, of labelled positions only, is the one wide tensor that it takes.
    """
    counted = labels != ignored
    rows = logits[counted]
    noise = torch.empty(rows.shape, dtype=_wide(logits), device=generator.device if generator else logits.device)
    noise.exponential_(generator=generator)  # torch never draws 0 here
    scores = noise.to(logits.device).log_().neg_().add_(rows)
    drawn = labels.clone()
    drawn[counted] = scores.argmax(-1).to(labels.dtype)
    return drawn


def _random(draw: Callable[..., Tensor], logits: Tensor, generator: torch.Generator | None) -> Tensor:
    device = generator.device if generator else logits.device
    return draw(logits.shape, dtype=logits.dtype, device=device, generator=generator).to(logits.device)


def _cross_entropy(metric_name: str, shifted: bool = False) -> Loss:
    """Cross entropy of logits (B, …, classes) and labels (B, …), in nats.

    ``shifted``: the logits at t predict the label at t + 1, so the first label is predicted by nothing.
    """

    def aligned(outputs: Any, batch: Any) -> tuple[Tensor, Tensor]:
        logits, labels = _logits_and_labels(outputs, batch)
        if logits.ndim < (3 if shifted else 2) or labels.shape != logits.shape[:-1]:
            raise InputError(
                f"labels of shape {tuple(labels.shape)} do not fit logits of shape {tuple(logits.shape)}; give one "
                f"label for each row of classes, shape {tuple(logits.shape[:-1])}."
            )
        if labels.is_floating_point():
            raise InputError(
                "the labels are floating-point numbers and not classes; give integers, or use the loss 'regression' "
                "or 'multilabel_classification'."
            )
        # The labels move and not the logits, which would be copied.
        return logits, F.pad(labels, (0, 1), value=IGNORED)[:, 1:] if shifted else labels

    def per_example(outputs: Any, batch: Any) -> Tensor:
        logits, labels = aligned(outputs, batch)
        counted = labels != IGNORED
        if (of_labelled := getattr(logits, "losses", None)) is not None:  # layers/deferred_logits.py
            values = of_labelled(labels)
            return _mean(values.new_zeros(labels.shape).masked_scatter(counted, values), counted)
        return _mean(_CrossEntropy.apply(logits, labels.where(counted, 0).long()), counted)

    @torch.no_grad()
    def sample_labels(outputs: Any, batch: Any, generator: torch.Generator | None = None) -> Tensor:
        logits, labels = aligned(outputs, batch)
        drawn = _categorical(logits, labels, IGNORED, generator)
        if not shifted:
            return drawn
        return torch.cat([_logits_and_labels(outputs, batch)[1][:, :1], drawn[:, :-1]], 1)

    @torch.no_grad()
    def metric(outputs: Any, batch: Any) -> Tensor:
        logits, labels = aligned(outputs, batch)
        return _mean(_guessed(logits, labels), labels != IGNORED)

    return Loss(per_example, sample_labels, metric, metric_name)


def _guessed(logits: Tensor, labels: Tensor) -> Tensor:
    """Of logits (…, classes) whether the label (…) is the likeliest: 1 or 0, and NaN where a logit is NaN, which is no class."""
    most, best = logits.max(-1)
    return (best == labels).float().masked_fill(most.isnan(), torch.nan)


def _numbers_and_labels(outputs: Any, batch: Any) -> tuple[Tensor, Tensor]:
    """Logits of the labels' shape (B, …), widened; a head with one output may have labels (B,)."""
    logits, labels = _logits_and_labels(outputs, batch)
    if logits.shape == (*labels.shape, 1):
        logits = logits.squeeze(-1)
    if logits.shape != labels.shape:
        raise InputError(
            f"labels of shape {tuple(labels.shape)} do not fit logits of shape {tuple(logits.shape)}; "
            "give both the same shape."
        )
    return logits.to(_wide(logits)), labels


def _each(values: Tensor) -> Tensor:
    """Each example's mean, (B, …) -> (B,)."""
    return values[:, None].flatten(1).mean(1)


def _binary_cross_entropy(outputs: Any, batch: Any) -> Tensor:
    logits, labels = _numbers_and_labels(outputs, batch)
    return _each(F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), reduction="none"))


@torch.no_grad()
def _bernoulli(outputs: Any, batch: Any, generator: torch.Generator | None = None) -> Tensor:
    logits, labels = _numbers_and_labels(outputs, batch)
    return (_random(torch.rand, logits, generator) < logits.sigmoid()).to(labels.dtype)


@torch.no_grad()
def _share_of_labels_right(outputs: Any, batch: Any) -> Tensor:
    logits, labels = _numbers_and_labels(outputs, batch)
    right = ((logits > 0) == (labels > 0.5)).float()
    return _each(right.masked_fill(logits.isnan(), torch.nan))


def _squared_error(outputs: Any, batch: Any) -> Tensor:
    logits, labels = _numbers_and_labels(outputs, batch)
    return _each((logits - labels).square())


@torch.no_grad()
def _gaussian(outputs: Any, batch: Any, generator: torch.Generator | None = None) -> Tensor:
    """Labels around the predictions with variance k/2 for k outputs.

    Then −log p(y) = Σ (y − ŷ)² / (2 · k/2) + const, which is the mean of the k squared errors, up to a constant.
    """
    logits, labels = _numbers_and_labels(outputs, batch)
    if not labels.is_floating_point():
        raise InputError("labels of a regression cannot be drawn as integers; give floating-point labels.")
    deviation = math.sqrt(math.prod(labels.shape[1:]) / 2)
    return (logits + deviation * _random(torch.randn, logits, generator)).to(labels.dtype)


@torch.no_grad()
def _negative_absolute_error(outputs: Any, batch: Any) -> Tensor:
    logits, labels = _numbers_and_labels(outputs, batch)
    return -_each((logits - labels).abs())


def _ends_and_labels(outputs: Any, batch: Any) -> tuple[Tensor, Tensor]:
    """Logits (B, 2, T) of an answer's first and last token, padding shut out, and their places (B, 2)."""
    if not hasattr(outputs, "start_logits"):
        raise InputError(
            f"the model gave a {type(outputs).__name__} without start_logits; use a question answering head."
        )
    logits = torch.stack([outputs.start_logits, outputs.end_logits], 1)
    labels = batch["labels"].to(logits.device)
    mask = batch.get("attention_mask")
    if mask is not None:
        logits = logits.masked_fill(mask.to(logits.device)[:, None] == 0, torch.finfo(logits.dtype).min)
    return logits, labels


def _span_cross_entropy(outputs: Any, batch: Any) -> Tensor:
    logits, labels = _ends_and_labels(outputs, batch)
    return _each(_CrossEntropy.apply(logits, labels))


@torch.no_grad()
def _spans(outputs: Any, batch: Any, generator: torch.Generator | None = None) -> Tensor:
    logits, labels = _ends_and_labels(outputs, batch)
    return _categorical(logits, labels, IGNORED, generator)


@torch.no_grad()
def _share_of_ends_right(outputs: Any, batch: Any) -> Tensor:
    logits, labels = _ends_and_labels(outputs, batch)
    return _each(_guessed(logits, labels))


REFERENCE = "reference_log_probs"
COMPLETION = "completion_mask"


def completion_log_probs(outputs: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """The log probability of each completion, the sum over its tokens: (B, rows), of logits (B · rows, T, classes).

    ``batch`` has ``input_ids`` and ``completion_mask``, both (B, rows, T).
    """
    logits = getattr(outputs, "logits", outputs)
    if COMPLETION not in batch or batch[COMPLETION].shape != batch["input_ids"].shape:
        raise InputError(
            "the batch does not say which tokens are the answers'; add completion_mask, of the shape of input_ids with 1 at these."
        )
    labels = batch["input_ids"].masked_fill(batch[COMPLETION] == 0, IGNORED).flatten(0, 1).to(logits.device)
    labels = F.pad(labels, (0, 1), value=IGNORED)[:, 1:]
    counted = labels != IGNORED
    losses = _CrossEntropy.apply(logits, labels.where(counted, 0))
    return -losses.where(counted, 0).sum(1).unflatten(0, batch["input_ids"].shape[:2])


def _margins(log_probs: Tensor, batch: Mapping[str, Tensor], beta: float, by_token: bool = False) -> Tensor:
    """The first sequence's reward less the second's, of each pair."""
    reference = batch.get(REFERENCE)
    rewards = beta * (log_probs - (log_probs.detach() if reference is None else reference))
    if by_token:
        rewards = rewards / batch[COMPLETION].sum(-1).clamp(min=1)
    return rewards[:, 0] - rewards[:, 1]


def preference_losses(log_probs: Tensor, batch: Mapping[str, Tensor], beta: float, loss_type: str) -> Tensor:
    """What ``preference_loss`` gives, from the completions' log probabilities (B, 2)."""
    h = _margins(log_probs, batch, beta, by_token=loss_type == "ipo")
    h = torch.where(batch["labels"].to(h.device) > 0, h, -h)
    if loss_type == "sigmoid":
        return -F.logsigmoid(h)
    return F.relu(1 - h) if loss_type == "hinge" else ((h - 1 / 2) / beta).square()


def preference_loss(beta: float = 0.1, loss_type: str = "sigmoid") -> Loss:
    """Direct preference optimisation (Rafailov et al., NeurIPS 2023, equation 7), one loss per pair.

    A sequence's reward is r = β (log π(y | x) − log π_ref(y | x)), π_ref being the untouched model. With h the chosen
    sequence's reward less the rejected one's, the loss is −log σ(h) for "sigmoid", max(0, 1 − h) for "hinge" (SLiC-HF, Zhao et al.
    2023), and for "ipo" (Azar et al. 2023, equation 17) the square of (h' − 1/2) / β, h' having each reward divided by its
    sequence's number of tokens, as in TRL. Label 1 says that the first sequence of a pair is the preferred one, 0 the second.

    A batch without ``reference_log_probs`` (B, 2) is of the untouched model: rewards are 0 and only their gradient is not.
    """
    if loss_type not in PREFERENCE_LOSSES:
        raise InputError(f"loss_type {loss_type!r} is unknown; {nearest(loss_type, PREFERENCE_LOSSES)}")

    def per_example(outputs: Any, batch: Any) -> Tensor:
        return preference_losses(completion_log_probs(outputs, batch), batch, beta, loss_type)

    @torch.no_grad()
    def sample_labels(outputs: Any, batch: Any, generator: torch.Generator | None = None) -> Tensor:
        """From the Bradley-Terry model: the first sequence is preferred with probability σ(h), 1/2 at the untouched model."""
        if loss_type != "sigmoid":
            raise InputError(
                f"labels cannot be drawn for the preference loss {loss_type!r}, which is no log likelihood; use the criterion "
                "fisher, or loss_type sigmoid."
            )
        h = _margins(completion_log_probs(outputs, batch), batch, beta)
        return (_random(torch.rand, h, generator) < h.sigmoid()).to(batch["labels"].dtype)

    @torch.no_grad()
    def metric(outputs: Any, batch: Any) -> Tensor:
        return -per_example(outputs, batch)

    @torch.no_grad()
    def of_untouched(outputs: Any, batch: Any) -> dict[str, Tensor]:
        return {REFERENCE: completion_log_probs(outputs, batch)}

    own = (COMPLETION, REFERENCE)
    return Loss(per_example, sample_labels, metric, "negative loss", 2, own, of_untouched)


LOSSES: dict[str, Loss] = {
    "sequence_classification": _cross_entropy("accuracy"),
    "multilabel_classification": Loss(_binary_cross_entropy, _bernoulli, _share_of_labels_right, "label accuracy"),
    "regression": Loss(_squared_error, _gaussian, _negative_absolute_error, "negative absolute error"),
    "token_classification": _cross_entropy("token accuracy"),
    "causal_lm": _cross_entropy("token accuracy", shifted=True),
    "masked_lm": _cross_entropy("token accuracy"),
    "seq2seq": _cross_entropy("token accuracy"),
    "question_answering": Loss(_span_cross_entropy, _spans, _share_of_ends_right, "share of ends right"),
    "preference": preference_loss(),
}


def _module_loss(module: nn.Module) -> Loss:
    unreduced = copy.copy(module)
    unreduced.reduction = "none"  # type: ignore[assignment]
    ignored = getattr(module, "ignore_index", None)

    def per_example(outputs: Any, batch: Any) -> Tensor:
        logits, labels = _logits_and_labels(outputs, batch)
        losses = unreduced(logits.to(_wide(logits)), labels)
        if losses.numel() > labels.numel():
            raise InputError(
                f"the loss spreads labels of shape {tuple(labels.shape)} over logits of shape "
                f"{tuple(logits.shape)} and so mixes examples; give both the same shape."
            )
        if losses.ndim <= 1:
            return losses
        # Labels that the loss ignores, such as padding, are no part of an example's mean; class probabilities,
        # which have a dimension more than the losses, hold none.
        if ignored is None or labels.shape != losses.shape:
            return _each(losses)
        return _mean(losses, labels != ignored)

    if isinstance(module, nn.CrossEntropyLoss):
        return _classes_in_dimension_1(per_example, module.ignore_index)
    if isinstance(module, nn.BCEWithLogitsLoss):
        return dataclasses.replace(LOSSES["multilabel_classification"], per_example=per_example)
    if isinstance(module, nn.MSELoss):
        return dataclasses.replace(LOSSES["regression"], per_example=per_example)
    return _scored_by_itself(
        per_example,
        f"labels cannot be drawn for {type(module).__name__}, only for CrossEntropyLoss, BCEWithLogitsLoss and "
        "MSELoss; wrap it in a loss_fn(outputs, batch) that has an attribute sample_labels.",
    )


def _classes_in_dimension_1(unchecked: Callable[[Any, Any], Tensor], ignored: int) -> Loss:
    """torch's cross entropy: logits (B, classes, …) with classes (B, …) or probabilities (B, classes, …)."""

    def classes_last(outputs: Any, batch: Any) -> tuple[Tensor, Tensor]:
        logits, labels = _logits_and_labels(outputs, batch)
        wanted = logits.shape if labels.is_floating_point() else logits.shape[:1] + logits.shape[2:]
        if labels.shape != wanted:
            raise InputError(
                f"labels of shape {tuple(labels.shape)} do not fit logits of shape {tuple(logits.shape)}, whose "
                f"dimension 1 is CrossEntropyLoss's classes; for classes in the last dimension use a loss by name: "
                "'token_classification', 'causal_lm', 'masked_lm' or 'seq2seq'."
            )
        return logits.movedim(1, -1), labels

    def per_example(outputs: Any, batch: Any) -> Tensor:
        classes_last(outputs, batch)
        return unchecked(outputs, batch)

    @torch.no_grad()
    def sample_labels(outputs: Any, batch: Any, generator: torch.Generator | None = None) -> Tensor:
        logits, labels = classes_last(outputs, batch)
        if not labels.is_floating_point():
            return _categorical(logits, labels, ignored, generator)
        none_ignored = torch.zeros(logits.shape[:-1], dtype=torch.long, device=logits.device)
        drawn = _categorical(logits, none_ignored, IGNORED, generator)
        return F.one_hot(drawn, logits.shape[-1]).movedim(-1, 1).to(labels.dtype)

    @torch.no_grad()
    def metric(outputs: Any, batch: Any) -> Tensor:
        logits, labels = classes_last(outputs, batch)
        if labels.is_floating_point():
            return _each(_guessed(logits, labels.argmax(1)))
        return _mean(_guessed(logits, labels), labels != ignored)

    return Loss(per_example, sample_labels, metric, "accuracy")


def _callable_loss(loss_fn: Callable[[Any, Any], Tensor]) -> Loss:
    name = getattr(loss_fn, "__name__", type(loss_fn).__name__)
    loss = _scored_by_itself(
        loss_fn,
        f"labels cannot be drawn for the loss {name}; give it an attribute sample_labels, a function "
        "(outputs, batch, generator) -> labels like the batch's, drawn from the model's predictions.",
    )
    sample_labels = getattr(loss_fn, "sample_labels", None)
    return loss if sample_labels is None else dataclasses.replace(loss, sample_labels=sample_labels)


def _scored_by_itself(per_example: Callable[[Any, Any], Tensor], why_no_sampling: str) -> Loss:
    def sample_labels(outputs: Any, batch: Any, generator: torch.Generator | None = None) -> Tensor:
        raise InputError(why_no_sampling)

    @torch.no_grad()
    def metric(outputs: Any, batch: Any) -> Tensor:
        return -per_example(outputs, batch)

    return Loss(per_example, sample_labels, metric, "negative loss")
