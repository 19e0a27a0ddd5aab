"""Single weights, rows and columns of whole models whose inputs are made again: the same training, and nothing kept."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

from measured_models import MODELS, tiny_gpt2
from relevance_cases import data_for, lm_batch
from reltune.ops import attach_elements, recompute
from reltune.ops.join_inputs import joined_linear
from reltune.plan.plan import ModulePlan, Plan
from reltune.tuner import ReltuneConfig, linear

WORDS = ("q_proj", "gate_proj", "up_proj", "down_proj", "o_proj", "query", "dense", "fc1", "fc2", "c_attn", "c_proj")


def plan_of(base: nn.Module, every: int, norms: bool = True) -> Plan:
    modules = {}
    for name, module in base.named_modules():
        weight: Any = getattr(module, "weight", None)
        if name.rsplit(".", 1)[-1] in WORDS and weight.ndim == 2:
            shape = tuple(weight.shape) if isinstance(module, nn.Linear) else tuple(weight.mT.shape)
            modules[name] = ModulePlan(shape, rows=[1, 3], columns=[2])
            index = torch.arange(5, weight.numel(), every)
            free = ~torch.isin(index // shape[1], torch.tensor([1, 3])) & (index % shape[1] != 2)
            modules[name].take_elements(index[free])
        elif norms and "norm" in type(module).__name__.lower() and weight is not None:
            modules[name] = ModulePlan(tuple(weight.shape), weight=True)
    return Plan(modules, "all", 10**9, 10**9, "")


def tuned(name: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Any, dict[str, Tensor]]:
    base: Any = MODELS[name]() if name in MODELS else tiny_gpt2()
    batch = data_for(base) if name in MODELS else lm_batch()
    if "pixel_values" in batch:
        batch["pixel_values"] = batch["pixel_values"].to(dtype)
    return get_peft_model(base.to(dtype), ReltuneConfig(plan=plan_of(base, 7 + seed))), batch


def trained(model: Any, batch: dict[str, Tensor], steps: int = 3) -> list[Tensor]:
    """Losses, and then the trained tensors."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.01)
    losses = []
    for _ in range(steps):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return [*losses, *(p.detach() for p in parameters)]


@contextlib.contextmanager
def remade_counted() -> Iterator[list[int]]:
    found: list[int] = []
    read = recompute.Remade.read

    def counted(self: recompute.Remade) -> Tensor:
        found.append(self.again is None)
        return read(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recompute.Remade, "read", counted)
        yield found


@pytest.mark.parametrize("form", ["dense", "sampled"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "bert", "vit", "gpt2"])
def test_training_is_the_same(name: str, form: Any) -> None:
    found = []
    for on in (False, True):
        model, batch = tuned(name)
        with recompute.force(on), attach_elements.force(form), remade_counted() as reads:
            found.append(trained(model, batch))
        assert bool(reads) == on and (not on or sum(reads) < len(reads))  # rows and elements share one input
    assert found[0][0] != found[0][2]
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


@pytest.mark.parametrize("reentrant", [True, False])
def test_with_gradient_checkpointing(reentrant: bool) -> None:
    found = []
    for checkpointing in (False, True):
        model, batch = tuned("llama")
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            model.enable_input_require_grads()
        with recompute.force(True):
            found.append(trained(model.train(), batch))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


def test_several_adapters_switching_and_disabling() -> None:
    found = []
    for on in (False, True):
        model, batch = tuned("llama")
        model.add_adapter("other", ReltuneConfig(plan=plan_of(MODELS["llama"](), 11, norms=False)))
        with recompute.force(on):
            values = []
            for name in ("default", "other", "default"):
                model.set_adapter(name)
                values += trained(model, batch, 2)
            model.base_model.set_adapter(["default", "other"])
            values += trained(model, batch, 2)
            first = model(**batch).loss
            with torch.no_grad(), model.disable_adapter():
                values.append(model(**batch).logits)
            first.backward()
            values.append(first.detach())
        found.append(values)
        assert not any("forward" in module.__dict__ for module in model.unload().modules())
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


def test_under_autocast() -> None:
    found = []
    for on in (False, True):
        model, batch = tuned("llama", torch.float32)
        with recompute.force(on), torch.autocast("cpu", torch.bfloat16):
            found.append(trained(model, batch))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


def test_an_error_in_the_forward_pass_leaves_everything_as_it_was() -> None:
    model, batch = tuned("llama")
    wanted = trained(tuned("llama")[0], batch)
    handle = model.get_base_model().score.register_forward_pre_hook(lambda *_: 1 / 0)
    with recompute.force(True):
        with pytest.raises(ZeroDivisionError):
            model(**batch)
        handle.remove()
        for a, b in zip(trained(model, batch), wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


def test_inputs_are_not_kept() -> None:
    for on in (False, True):
        model, batch = tuned("llama")
        layer = model.get_base_model().model.layers[1]
        inputs: list[Any] = []
        for module in (layer.mlp.gate_proj, layer.mlp.down_proj):
            module.register_forward_pre_hook(
                lambda _, args, to=inputs: to.append(weakref.ref(args[0].untyped_storage()))
            )
        with recompute.force(on):
            loss = model(**batch).loss
        assert [of() is not None for of in inputs] == [not on, not on]
        loss.backward()


def test_gradients_in_the_types_in_which_norms_are_fused() -> None:
    for dtype, close in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        found = []
        for on in (False, True):
            model, batch = tuned("qwen2", dtype)
            with recompute.force(on):
                loss = model(**batch).loss
                assert any("RMSNorm" in type(node).__name__ for node in nodes_of(loss)) == on
                loss.backward()
            found.append([loss.detach(), *(p.grad for p in model.parameters() if p.requires_grad)])
        for a, b in zip(*found, strict=True):
            assert (a - b).norm() <= close * b.norm()


def nodes_of(loss: Tensor) -> set[Any]:
    found, left = set(), [loss.grad_fn]
    while left:
        node = left.pop()
        if node is not None and node not in found:
            found.add(node)
            left += [of for of, _ in node.next_functions]
    return found


@pytest.mark.parametrize("reentrant", [None, True, False])
@pytest.mark.parametrize("name", ["llama", "qwen2", "bert"])
def test_inputs_whose_gradients_are_added_up_in_the_products(
    name: str, reentrant: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without checkpointing and with both kinds of it."""
    found, joined = [], []
    for on in (False, True):
        model, batch = tuned(name)
        if reentrant is not None:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        # as on a GPU, whatever the size
        monkeypatch.setattr(linear, "joins", lambda x, *_, on=on: on and x.grad_fn is not None)
        monkeypatch.setattr(linear, "joined_linear", lambda *of: joined.append(of) or joined_linear(*of))
        with recompute.force(True):
            found.append(trained(model.train(), batch))
    assert joined
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
