"""A language model's loss without all of its logits, where its output map is frozen (ops/linear_cross_entropy.py).

For the time of a forward pass the output map gives ``DeferredLogits``, and the loss is computed of the hidden states behind them: a
block of tokens at a time, and of tokens without a label not at all. It is the model's own, to which its forward hands the logits
(``defer``), or one of the outputs (``deferred``). Whatever else looks at the logits gets them: a model that caps or scales them, a
metric, a user.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map
from transformers.loss.loss_utils import ForCausalLMLoss

from reltune.losses import IGNORED
from reltune.ops import stand_in
from reltune.ops.linear_cross_entropy import OfTokens, linear_cross_entropy

# What is known without the logits.
KNOWN: tuple[Any, ...] = (
    *(getattr(Tensor, name).__get__ for name in ("shape", "ndim", "dtype", "device", "is_cuda")),
    *(getattr(Tensor, name).__get__ for name in ("requires_grad", "grad_fn")),  # DistributedDataParallel and FSDP ask
    *(Tensor.size, Tensor.dim, Tensor.numel),
)


class DeferredLogits(Tensor):
    """The logits that a linear map gives of hidden states (…, in): (…, classes), computed when they are first looked at.

    Attributes:
        hidden: the hidden states.
        head: the map.
        of_tokens: what the loss found of the tokens with a label, once it is computed.
    """

    hidden: Tensor
    head: nn.Linear
    of_tokens: OfTokens | None

    @staticmethod
    def __new__(cls, hidden: Tensor, head: nn.Linear, dtype: torch.dtype | None = None) -> DeferredLogits:
        kind = hidden.device.type
        if kind == "meta":
            cast = stand_in.autocast_dtype()
        else:
            cast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        logits: Any = Tensor._make_wrapper_subclass(
            cls, (*hidden.shape[:-1], head.out_features), dtype=dtype or cast or hidden.dtype, device=hidden.device
        )
        logits.hidden, logits.head, logits.of_tokens = hidden, head, None
        logits._cast, logits._computed = cast, None
        return logits

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in KNOWN:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        if (
            func in (Tensor.float, Tensor.clone) and len(args) == 1 and not kwargs
        ):  # accelerate and DDP do that with all outputs
            return args[0]._again(torch.float32 if func is Tensor.float else args[0].dtype)
        args, kwargs = tree_map(lambda x: x.computed() if isinstance(x, DeferredLogits) else x, (args, kwargs or {}))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, *_: Any) -> Any:
        # An autograd function of its own, which would lose the gradient of what is computed here.
        raise RuntimeError(
            f"{func} cannot look at logits whose computation is deferred; give it logits.computed(), or call the model without labels."
        )

    def computed(self) -> Tensor:
        """The logits themselves, the same tensor each time."""
        own: Any = self
        if own._computed is None:
            parts: tuple[Any, ...] = (self.hidden, self.head.weight, self.head.bias)
            with _autocast(self), torch.enable_grad():
                if self.hidden.is_meta and own._cast is not None:  # no mode that would cast is asked in here
                    parts = tuple(None if part is None else part.to(own._cast) for part in parts)
                own._computed = F.linear(*parts).to(self.dtype)
        return own._computed

    def _again(self, dtype: torch.dtype) -> Tensor:
        """A copy in this type, deferred as far as these are."""
        own: Any = self
        if own._computed is not None:
            return own._computed.to(dtype) if dtype != self.dtype else own._computed.clone()
        with _autocast(self):
            copied = DeferredLogits(self.hidden, self.head, dtype)
        copied.of_tokens = self.of_tokens
        return copied

    def losses(self, labels: Tensor, count: int | None = None) -> Tensor:
        """Cross entropies (M,) of the M tokens whose label, of ``labels`` (…,), is a class; their dtype is float32 at least.

        ``count`` is M where it is known: the device, which then need not be waited for, is not asked.
        """
        labels = labels.to(self.hidden.device).flatten()
        hidden = self.hidden.flatten(0, -2)
        if not labels.is_meta:  # of which nobody knows what they are
            ignored = labels == IGNORED
            places = (~ignored).nonzero().squeeze(1) if count is None else ignored.argsort(stable=True)[:count]
            if len(places) < len(labels):
                hidden, labels = hidden[places], labels[places]
        with _autocast(self):
            self.of_tokens = linear_cross_entropy(hidden, self.head.weight, self.head.bias, labels)
        return self.of_tokens.losses


def _autocast(logits: Any) -> contextlib.AbstractContextManager[Any]:
    """As it was when the map was called."""
    if logits.hidden.is_meta:  # which knows no autocast
        return contextlib.nullcontext()
    return torch.autocast(logits.hidden.device.type, dtype=logits._cast, enabled=logits._cast is not None)


def defer(model: nn.Module, inputs: Mapping[str, Any], count: int | None = None) -> bool:
    """Defer the logits in this model's next forward pass, with these keyword arguments, where the loss can do without them.

    ``count``, if known, is how many tokens but the first of each text have a label. Call ``undo`` after the pass. Gives whether anything was changed.
    """
    if not isinstance(inputs.get("labels"), Tensor) or getattr(model, "loss_function", None) is not ForCausalLMLoss:
        return False
    head = _frozen_head(model)
    if head is None:
        return False
    head.forward = functools.partial(DeferredLogits, head=head)  # type: ignore[method-assign]
    model._loss_function = functools.partial(_loss, model.__dict__.get("_loss_function"), count)  # type: ignore[assignment]
    return True


def undo(model: nn.Module) -> None:
    """Undo ``defer``."""
    loss: Any = model.__dict__.get("_loss_function")
    if getattr(loss, "func", None) is not _loss:
        return
    del model.get_output_embeddings().__dict__["forward"]  # type: ignore[operator]
    before, _ = loss.args
    del model.__dict__["_loss_function"]
    if before is not None:
        model._loss_function = before


@contextlib.contextmanager
def deferred(model: nn.Module) -> Iterator[None]:
    """Defer the logits of forward passes inside, for a loss that asks them for ``losses``."""
    head = _frozen_head(model)
    if head is not None:
        head.forward = functools.partial(DeferredLogits, head=head)  # type: ignore[method-assign]
    try:
        yield
    finally:
        if head is not None:
            del head.__dict__["forward"]


def _frozen_head(model: nn.Module) -> nn.Linear | None:
    """The model's output map, if it is a plain one of which nothing is trained and that nobody watches."""
    # DataParallel collects all outputs of its replicas; of a model under FSDP a weight is there for a while only.
    elsewhere = getattr(model, "_is_replica", False) or hasattr(model, "unshard")
    if elsewhere or torch.compiler.is_compiling():
        return None
    of: Callable[[], Any] | None = getattr(model, "get_output_embeddings", None)
    head = of() if of is not None else None
    if type(head) is not nn.Linear or "forward" in head.__dict__:
        return None
    watched = head._forward_hooks or head._forward_pre_hooks or head._backward_hooks or head._backward_pre_hooks
    frozen = not any(p.requires_grad for p in head.parameters())
    return head if frozen and not watched and type(head.weight) is nn.Parameter else None


def _loss(
    before: Any,
    count: int | None,
    logits: Tensor,
    labels: Tensor,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = IGNORED,
    shift_labels: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """What transformers' loss of causal language models gives: the sum over ``num_items_in_batch``, or else the mean."""
    if not isinstance(logits, DeferredLogits) or ignore_index != IGNORED:
        of_all: Callable[..., Tensor] = ForCausalLMLoss
        options = {"ignore_index": ignore_index, "shift_labels": shift_labels, **kwargs}
        return of_all(logits, labels, vocab_size, num_items_in_batch, **options)
    if shift_labels is None:
        shift_labels = F.pad(labels, (0, 1), value=IGNORED)[..., 1:]
    else:
        count = None
    losses = logits.losses(shift_labels, count)
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(losses.device)
    return losses.sum() / (len(losses) if num_items_in_batch is None else num_items_in_batch)
