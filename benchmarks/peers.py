"""Other ways to the same numbers: column and row sums of squared per-example gradients of linear maps.

Each gives, per linear map with weight gradient G_s (out × in) of example s's loss, Σ_s Σ_o G_s² (in,) and
Σ_s Σ_i G_s² (out,), in float32. Each is written the way that serves its library best: no gradient is formed that is not
asked for, and what a library leaves on a parameter is added up and dropped as soon as it is there, so that one map's
gradients are held at a time, where the library allows it.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

Loss = Callable[[Any, dict[str, Tensor]], Tensor]  # (outputs, batch) -> (B,)
Sums = dict[str, tuple[Tensor, Tensor]]  # linear map -> columns (in,), rows (out,)

PIP = "pip install --no-deps backpack-for-pytorch==1.7.1 unfoldNd==0.2.3 einops opacus==1.6.0 opt_einsum scipy"


@dataclasses.dataclass
class Case:
    """A model, its linear maps that are measured, a batch on the model's device, and the loss."""

    model: nn.Module
    maps: dict[str, nn.Linear]
    batch: dict[str, Tensor]
    loss: Loss
    plain_loss: Loss  # the same in torch's own functions
    found: Sums = dataclasses.field(default_factory=dict)

    @property
    def examples(self) -> int:
        return len(self.batch["labels"])

    def parts(self, size: int) -> Iterator[dict[str, Tensor]]:
        for start in range(0, self.examples, size):
            yield {key: value[start : start + size] for key, value in self.batch.items()}

    def start(self) -> None:
        self.found = {}

    def add(self, name: str, columns: Tensor, rows: Tensor) -> None:
        if name in self.found:
            self.found[name][0].add_(columns)
            self.found[name][1].add_(rows)
        else:
            self.found[name] = columns, rows

    def losses_from_embeddings(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Each example's loss, and the embedded tokens, down to which it can be differentiated."""
        inputs = {key: value for key, value in batch.items() if key not in ("labels", "input_ids")}
        embedded = self.model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
        return self.loss(self.model(inputs_embeds=embedded, **inputs), batch), embedded


@dataclasses.dataclass(frozen=True)
class Peer:
    """``run(case, size)`` works through the batch in parts of so many examples; ``ready(case)`` puts hooks up."""

    name: str
    run: Callable[[Case, int], None]
    ready: Callable[[Case], contextlib.AbstractContextManager[Any]]
    sizes: tuple[float, ...] = ()  # to try, as parts of the batch, where they are not left open


def square_sums(gradients: Tensor) -> tuple[Tensor, Tensor]:
    """Columns and rows of squared gradients (out, in) or (B, out, in)."""
    over = tuple(range(gradients.ndim - 2))
    if gradients.is_cuda:  # reads twice and writes nothing
        columns, rows = (
            torch.linalg.vector_norm(gradients, dim=(*over, last), dtype=torch.float32).square_() for last in (-2, -1)
        )
        return columns, rows
    squares = gradients.float().square()
    return squares.sum((*over, -2)), squares.sum((*over, -1))


# -- the floor ----------------------------------------------------------------------------------------------------------


def floor(case: Case, size: int) -> None:
    """No relevance: forward, and backward to the embedded tokens without any weight's gradient."""
    for batch in case.parts(size):
        losses, embedded = case.losses_from_embeddings(batch)
        losses.sum().backward(inputs=[embedded])


@contextlib.contextmanager
def frozen(case: Case) -> Iterator[None]:
    yield


@contextlib.contextmanager
def trainable(case: Case) -> Iterator[None]:
    """Only the measured weights require a gradient."""
    weights = [module.weight for module in case.maps.values()]
    for weight in weights:
        weight.requires_grad_(True)
    try:
        yield
    finally:
        for weight in weights:
            weight.requires_grad_(False)
            weight.grad = None


# -- one example at a time ----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def loop_ready(case: Case) -> Iterator[None]:
    """Each weight's gradient is added up and dropped as soon as autograd has it."""

    def keep(name: str) -> Callable[[Tensor], None]:
        def hook(weight: Tensor) -> None:
            with torch.no_grad():
                case.add(name, *square_sums(weight.grad))
            weight.grad = None

        return hook

    with trainable(case):
        handles = [m.weight.register_post_accumulate_grad_hook(keep(name)) for name, m in case.maps.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def loop(case: Case, size: int) -> None:
    """Plain autograd, one example at a time: FISH Mask's way, and the oracle. ``size`` is 1."""
    for one in case.parts(1):
        inputs = {key: value for key, value in one.items() if key != "labels"}
        case.loss(case.model(**inputs), one).sum().backward()


# -- BackPACK -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def backpack_ready(case: Case) -> Iterator[None]:
    """Extend the linear maps alone: first-order extensions need nothing of the modules around them."""
    from backpack import extend
    from backpack.context import CTX

    with trainable(case):
        try:
            for module in case.maps.values():
                extend(module)
            yield
        finally:
            CTX.remove_hooks()
            for module in case.maps.values():
                vars(module).pop("_backpack_extend", None)
                for kept in ("input0", "output"):
                    vars(module).pop(kept, None)


def backpack(case: Case, size: int) -> None:
    """SumGradSquared (Dangel, Kunstner, Hennig, ICLR 2020): G_s of all examples by einsum, squared, added up."""
    from backpack import backpack as backpacking
    from backpack.extensions import SumGradSquared

    names = {module: name for name, module in case.maps.items()}

    def keep(module: nn.Module) -> None:
        squares = module.weight.sum_grad_squared
        case.add(names[module], squares.sum(0, dtype=torch.float32), squares.sum(1, dtype=torch.float32))
        del module.weight.sum_grad_squared

    for batch in case.parts(size):
        losses, embedded = case.losses_from_embeddings(batch)
        loss = losses.sum()
        with torch.no_grad(), backpacking(SumGradSquared(), extension_hook=keep):
            loss.backward(inputs=[embedded])


# -- Opacus -------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def opacus_ready(case: Case) -> Iterator[None]:
    """Hooks of GradSampleModule on the linear maps, and after each of them one that adds up what it left."""
    from opacus.grad_sample import GradSampleModule

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, *_: Any) -> None:
            with torch.no_grad():
                case.add(name, *square_sums(module.weight.grad_sample))
            module.weight.grad_sample = None

        return hook

    handles = []
    with trainable(case):
        # It looks at modules in training mode only. The models here have no dropout, so nothing else changes.
        case.model.train()
        wrapped = GradSampleModule(case.model, loss_reduction="sum")
        try:
            for name, module in case.maps.items():
                handles.append(module.register_full_backward_hook(keep(name)))
            yield
        finally:
            for handle in handles:
                handle.remove()
            wrapped.to_standard_module().eval()
            for module in case.maps.values():
                for kept in ("activations", "max_batch_len"):
                    vars(module).pop(kept, None)


def opacus(case: Case, size: int) -> None:
    """Per-sample gradients (Yousefpour et al., arXiv 2109.12298), squared and added up."""
    for batch in case.parts(size):
        losses, embedded = case.losses_from_embeddings(batch)
        losses.sum().backward(inputs=[embedded])


# -- torch.func ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def eager_ready(case: Case) -> Iterator[None]:
    """Attention written out: vmap has no rule for the fused kernels and runs them example by example."""
    before = case.model.config._attn_implementation
    case.model.set_attn_implementation("eager")
    try:
        yield
    finally:
        case.model.set_attn_implementation(before)


def vmap_of_grad(case: Case, size: int) -> None:
    """torch.func.vmap over torch.func.grad: all maps' gradients of ``size`` examples at a time.

    With torch's own loss: torch.func takes no custom autograd functions of the classic form.
    """
    weights = {f"{name}.weight": module.weight for name, module in case.maps.items()}

    def loss_of_one(weights: dict[str, Tensor], one: dict[str, Tensor]) -> Tensor:
        batch = {key: value[None] for key, value in one.items()}
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        return case.plain_loss(functional_call(case.model, weights, (), inputs), batch).sum()

    def squares_of_one(weights: dict[str, Tensor], one: dict[str, Tensor]) -> Sums:
        gradients = grad(loss_of_one)(weights, one)
        return {name.removesuffix(".weight"): square_sums(gradients.pop(name)) for name in list(gradients)}

    for batch in case.parts(size):
        for name, (columns, rows) in vmap(squares_of_one, in_dims=(None, 0))(weights, batch).items():
            case.add(name, columns.sum(0), rows.sum(0))


def mean_cross_entropy(outputs: Any, batch: dict[str, Tensor]) -> Tensor:
    """One label per example."""
    return F.cross_entropy(outputs.logits.float(), batch["labels"], reduction="none")


def mean_next_token_cross_entropy(outputs: Any, batch: dict[str, Tensor]) -> Tensor:
    """The mean over an example's tokens but the first."""
    logits, labels = outputs.logits[:, :-1].float(), batch["labels"][:, 1:]
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape).mean(1)


FLOOR = Peer("floor (no relevance)", floor, frozen, sizes=(1.0,))
PEERS = [
    Peer("loop over examples", loop, loop_ready, sizes=(0.0,)),
    Peer("BackPACK SumGradSquared", backpack, backpack_ready),
    Peer("Opacus per-sample gradients", opacus, opacus_ready),
    Peer("torch.func.vmap(grad)", vmap_of_grad, eager_ready),
]
