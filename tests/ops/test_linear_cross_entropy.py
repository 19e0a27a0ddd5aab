"""Cross entropy behind a frozen output map, a block of tokens at a time: against torch's of all logits, by plain autograd."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from reltune.ops import linear_cross_entropy as module
from reltune.ops.kernels.cross_entropy import cross_entropy as by_kernel
from reltune.ops.linear_cross_entropy import cross_entropy_reference, linear_cross_entropy

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def case(tokens, features, classes, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, weight, bias = (
        torch.randn(*size, generator=generator).to(DEVICE, dtype)
        for size in ((tokens, features), (classes, features), (classes,))
    )
    return x, weight, bias, torch.randint(classes, (tokens,), generator=generator).to(DEVICE)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("tokens", [0, 1, 7, 8, 9])
def test_losses_and_gradient_equal_plain_autograd(tokens, with_bias, monkeypatch):
    monkeypatch.setattr(module, "NUMBERS", (4 * 11, 4 * 11))  # blocks of four tokens
    x, weight, bias, labels = case(tokens, 5, 11, torch.float64)
    bias = bias if with_bias else None
    ours, plain = x.clone().requires_grad_(), x.clone().requires_grad_()
    found = linear_cross_entropy(ours, weight, bias, labels)
    logits = F.linear(plain, weight, bias)
    wanted = F.cross_entropy(logits, labels, reduction="none")
    importance = torch.arange(1.0, tokens + 1, dtype=torch.float64, device=DEVICE)
    (found.losses * importance).sum().backward()
    (wanted * importance).sum().backward()
    assert torch.allclose(found.losses, wanted, rtol=1e-10) and torch.allclose(ours.grad, plain.grad, rtol=1e-10)
    shares = logits.softmax(-1)
    assert torch.allclose(found.entropies, -(shares * shares.log()).sum(-1), rtol=1e-10)
    assert torch.equal(found.guessed, logits.argmax(-1) == labels)
    assert not found.entropies.requires_grad and found.guessed.dtype == torch.bool
    with torch.no_grad():
        assert torch.equal(linear_cross_entropy(x, weight, bias, labels).losses, found.losses)


def test_half_precision_is_as_good_as_with_all_logits(monkeypatch):
    monkeypatch.setattr(module, "NUMBERS", (32 * 300, 32 * 300))
    x, weight, _, labels = case(96, 64, 300, torch.bfloat16)
    weight = weight / 8
    errors = []
    wide = x.double().requires_grad_()
    wanted = F.cross_entropy(wide @ weight.double().T, labels)
    wanted.backward()
    for loss in (
        lambda x: linear_cross_entropy(x, weight, None, labels).losses.mean(),
        lambda x: F.cross_entropy(F.linear(x, weight).float(), labels),
    ):
        own = x.clone().requires_grad_()
        found = loss(own)
        found.backward()
        assert abs(found - wanted) < 2e-3 * wanted and own.grad.dtype == torch.bfloat16
        errors.append((own.grad - wide.grad).norm() / wide.grad.norm())
    assert errors[0] < 1.5 * errors[1] < 2e-2


def test_autocast_decides_the_type_of_the_products():
    x, weight, bias, labels = case(6, 5, 11, torch.float32)
    x.requires_grad_()
    with torch.autocast(DEVICE, torch.bfloat16):
        losses = linear_cross_entropy(x, weight, bias, labels).losses
        logits = F.linear(x, weight, bias)
    assert logits.dtype == torch.bfloat16 and losses.dtype == torch.float32
    assert torch.allclose(losses, F.cross_entropy(logits.float(), labels, reduction="none"), rtol=1e-5)
    losses.sum().backward()
    assert x.grad.dtype == torch.float32


def test_a_trained_output_map_is_refused():
    x, weight, bias, labels = case(3, 5, 11, torch.float32)
    for trained in (weight, bias):
        trained.requires_grad_(True)
        with pytest.raises(ValueError, match="must be frozen"):
            linear_cross_entropy(x, weight, bias, labels)
        trained.requires_grad_(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("classes", [3, 1024, 9001])
def test_the_kernel_equals_the_reference(classes, dtype):
    generator = torch.Generator().manual_seed(classes)
    logits = (4 * torch.randn(3, classes, generator=generator)).to(DEVICE, dtype)
    logits[1] += 300  # exponentials of it overflow
    labels = torch.tensor([0, classes - 1, classes // 2], device=DEVICE)
    logits[0, 0] = logits[0].amax() + 1
    for with_gradient in (False, True):
        found = by_kernel(logits.clone(), labels, with_gradient)
        wanted = cross_entropy_reference(logits.double(), labels, with_gradient)
        for a, b in zip(found[:2], wanted[:2], strict=True):
            assert a.dtype == torch.float32 and torch.allclose(a.double(), b, rtol=1e-5, atol=1e-5)
        assert torch.equal(found[2], wanted[2]) and found[2].tolist()[0]
    assert found[3].dtype == dtype
    assert (found[3] - wanted[3]).abs().max() <= (2e-6 if dtype == torch.float32 else 1e-3)


def test_a_label_that_is_no_class_gives_no_number():
    logits = torch.randn(2, 5, device=DEVICE)
    losses = by_kernel(logits, torch.tensor([5, 1], device=DEVICE), True)[0]
    assert losses.isnan().tolist() == [True, False]
