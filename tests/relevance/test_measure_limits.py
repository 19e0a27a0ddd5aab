"""What the analysis refuses, how it hands the model back, and what it does in lower precision."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from measured_models import tiny_bert, tiny_llama, tiny_sequential
from oracles.per_example_gradients import gradient_sums
from relevance_cases import (
    assert_parts_equal,
    by_module,
    cross_entropy_of_one,
    data_for,
    measure,
    parts_by_formula,
    split,
    text_batch,
)
from reltune.errors import AnalysisError, InputError
from reltune.layers.linear import LinearType
from reltune.ops.squared_gradient import squared_gradient_sums_reference

BOTH = ["fisher", "gradient"]


def state_of(model):
    return (
        [(name, module.training) for name, module in model.named_modules()],
        [(name, p.requires_grad, p.grad, p.clone()) for name, p in model.named_parameters()],
        [(name, len(module._forward_hooks)) for name, module in model.named_modules()],
    )


def assert_same_state(before, after):
    assert before[0] == after[0]
    assert before[2] == after[2]
    for (name, needs, grad, value), (name2, needs2, grad2, value2) in zip(before[1], after[1], strict=True):
        assert (name, needs, grad) == (name2, needs2, grad2)
        assert torch.equal(value, value2)


def unusual(model):
    """A model whose parts differ in mode and in what requires a gradient, with a hook of its user's."""
    model.train()
    model[1].eval()
    model[0].weight.requires_grad_(False)
    model[3].weight.grad = torch.ones_like(model[3].weight)
    model[0].register_forward_hook(lambda module, args, output: None)
    return model


def test_the_model_is_handed_back_as_it_was():
    model = unusual(tiny_sequential())
    grad = model[3].weight.grad
    before = state_of(model)
    with torch.no_grad():
        measure(model, [data_for(model)], None, BOTH)
        assert not torch.is_grad_enabled()
    assert_same_state(before, state_of(model))
    assert model[3].weight.grad is grad and bool((grad == 1).all())


@pytest.mark.parametrize("fault", ["loss", "forward", "backward", "loader"])
def test_the_model_is_handed_back_after_an_exception(fault):
    model = unusual(tiny_sequential())
    batch = data_for(model)

    class Fault(Exception):
        pass

    def fail(*_):
        raise Fault

    class Failing(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        backward = staticmethod(fail)

    def loader():
        yield batch
        if fault == "loader":
            fail()
        yield batch

    def loss_fn(outputs, batch):
        if fault == "loss":
            fail()
        outputs = Failing.apply(outputs) if fault == "backward" else outputs
        return F.cross_entropy(outputs, batch[1], reduction="none")

    if fault == "forward":
        model[6].register_forward_pre_hook(fail)
    before = state_of(model)
    with pytest.raises(Fault):
        measure(model, loader(), loss_fn, BOTH)
    assert_same_state(before, state_of(model))


def test_losses_that_are_not_one_number_per_example_are_refused():
    model = tiny_sequential()
    inputs, labels = data_for(model)
    with pytest.raises(InputError, match=r"shape \(\).*one loss per example"):
        measure(model, [(inputs, labels)], lambda outputs, batch: F.cross_entropy(outputs, batch[1]))
    with pytest.raises(InputError, match=r"shape \(7, 3\).*one loss per example"):
        measure(model, [(inputs, labels)], lambda outputs, batch: outputs)
    with pytest.raises(InputError, match="1 losses for 7 examples"):
        measure(
            model,
            [(inputs, labels)],
            lambda outputs, batch: F.cross_entropy(outputs, batch[1])[None],
            target_modules=["0"],
        )


def test_labels_that_broadcast_against_logits_are_refused():
    """MSELoss of (B, 1) and (B,) is (B, B): every example's loss would hold every other's label."""
    model = nn.Sequential(nn.Linear(6, 1)).double()
    batch = torch.randn(7, 6).double(), torch.randn(7).double()
    with (
        pytest.warns(UserWarning, match="target size"),
        pytest.raises(InputError, match=r"labels of shape \(7,\).*logits of shape \(7, 1\)"),
    ):
        measure(model, [batch], nn.MSELoss())
    measure(model, [(batch[0], batch[1][:, None])], nn.MSELoss())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_names_batch_and_example(value):
    model = tiny_sequential()
    good, bad = data_for(model), data_for(model)
    bad[0][5] = value
    with pytest.raises(AnalysisError, match=r"loss of batch 1 is not finite at examples \[5\]"):
        measure(model, [good, bad])


@pytest.mark.parametrize("criterion", BOTH)
def test_a_gradient_that_is_not_finite_names_module_and_batch(criterion):
    """√0 is finite and its derivative is not."""
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3)).double()
    with torch.no_grad():
        model[2].weight.zero_()
        model[2].bias.zero_()
    good = torch.randn(2, 6).double()

    def loss_fn(outputs, batch):
        return outputs.square().sum(1) if batch[1] else outputs.square().sum(1).sqrt()

    with pytest.raises(AnalysisError, match=r"gradient of 2 \(\w+\) is not finite in batch 1"):
        measure(model, [(good, True), (good, False)], loss_fn, criterion)


class Flattened(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.outer(torch.tanh(self.inner(x.flatten(0, 1))).view(*x.shape).mean(1))


def test_rows_of_one_matrix_are_told_apart_by_example():
    torch.manual_seed(0)
    model = Flattened().double()
    batch = torch.randn(5, 4, 6).double(), torch.randint(3, (5,))
    found = measure(model, [batch]).parts["fisher"]
    squares, _, count = gradient_sums(model, [batch], cross_entropy_of_one)
    wanted = by_module({name: total / count for name, total in squares.items()}, ["inner", "outer"])
    assert_parts_equal(found, parts_by_formula(wanted))


class TimeFirst(Flattened):
    def forward(self, x):
        rows = torch.tanh(self.inner(x.mT.mT.transpose(0, 1).flatten(0, 1)))
        return self.outer(rows.view(x.shape[1], x.shape[0], -1).mean(0))


def test_rows_in_another_order_are_found_out():
    """Position before example: the shapes are those of the model above, the rows are another example's."""
    torch.manual_seed(0)
    model = TimeFirst().double()
    for tokens in (4, 5):  # five positions for five examples: the shape alone says nothing
        batch = torch.randn(5, tokens, 6).double(), torch.randint(3, (5,))
        with pytest.warns(RuntimeWarning, match="inner not measured: an example's loss depends on rows"):
            found = measure(model, [batch])
        assert set(found.parts["fisher"]) == {"outer"}
        assert "rows that belong to another" in found.inventory.left_out["inner.weight"]
        with pytest.raises(AnalysisError, match=r"inner cannot be told apart.*exclude_modules"):
            measure(model, [batch], target_modules=["inner"])


def test_a_batch_that_does_not_fit_is_halved():
    class Full(nn.Module):
        def __init__(self):
            super().__init__()
            self.outer = nn.Linear(6, 3)
            self.inner = nn.Linear(6, 6)

        def forward(self, x):
            h = torch.tanh(self.inner(x))
            if len(x) > 2:  # the upper map has its gradient by then, the lower one has not
                h.register_hook(self.full)
            return self.outer(h)

        def full(self, gradient):
            raise torch.OutOfMemoryError("CUDA out of memory")

    torch.manual_seed(0)
    model = Full().double()
    batch = torch.randn(7, 6).double(), torch.randint(3, (7,))
    with pytest.warns(UserWarning, match="out of memory with 7 examples; going on with 3 at a time"):
        found = measure(model, [batch], criteria=BOTH)
    wanted = measure(model, split(batch, 2), criteria=BOTH)
    for criterion in BOTH:
        assert_parts_equal(found.parts[criterion], wanted.parts[criterion])
    assert found.provenance["examples"] == 7


class Shared(nn.Module):
    """One input row for all examples, as relative-position embeddings have it."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(1, 4, 6))
        self.project, self.outer = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.outer((x * self.project(self.table)).mean(1))


def test_an_input_without_batch_dimension_is_right_or_refused():
    torch.manual_seed(0)
    model = Shared().double()
    batch = torch.randn(5, 4, 6).double(), torch.randint(3, (5,))
    with pytest.warns(RuntimeWarning, match=r"project not measured: its input has shape \(1, 4, 6\) for 5 examples"):
        assert set(measure(model, [batch]).parts["fisher"]) == {"outer"}
    found = measure(model, split(batch, 1)).parts["fisher"]
    squares, _, count = gradient_sums(model, [batch], cross_entropy_of_one)
    wanted = by_module({name: total / count for name, total in squares.items()}, ["project", "outer"])
    assert_parts_equal(found, parts_by_formula(wanted))


@pytest.mark.parametrize("first", ["linear", "norm"])
def test_an_input_changed_in_place_after_use_is_refused(first):
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = nn.Linear(6, 6) if first == "linear" else nn.LayerNorm(6)
            self.outer = nn.Linear(6, 3)

        def forward(self, x):
            x = x.clone()
            h = self.module(x)
            x += h
            return self.outer(x)

    model = Residual().double()
    batch = torch.randn(5, 6).double(), torch.randint(3, (5,))
    with pytest.raises(AnalysisError, match=r"input of module was changed in place.*exclude_modules"):
        measure(model, [batch])
    measure(model, [batch], exclude_modules=["module"])


def test_input_errors_of_the_call():
    model = tiny_sequential()
    batch = data_for(model)
    with pytest.raises(InputError, match=r"criterion 'fischer' is unknown; did you mean 'fisher'"):
        measure(model, [batch], criteria=["fischer"])
    with pytest.raises(InputError, match=r"no criterion.*fisher"):
        measure(model, [batch], criteria=[])
    with pytest.raises(InputError, match=r"'gradient' needs data"):
        measure(model, criteria=["magnitude", "gradient"])
    with pytest.raises(InputError, match=r"loader gave no batch"):
        measure(model, [])
    with pytest.raises(InputError, match=r"batch of type Tensor; give mappings"):
        measure(model, [batch[0]], lambda outputs, batch: outputs.sum(-1))
    with pytest.raises(InputError, match=r"does not depend on any measured module"):
        measure(model, [batch], lambda outputs, batch: outputs.detach()[:, 0])


def test_a_criterion_without_data_runs_no_data():
    def loader():
        raise AssertionError
        yield

    found = measure(tiny_sequential(), loader(), None, ["magnitude", "random", "depth"])
    assert found.provenance["examples"] == 0


def test_float32_agrees_with_a_loop_over_examples():
    """Every module's columns and rows stand in the order of a float32 loop, and close to the exact numbers."""
    for model in (tiny_bert(), tiny_llama()):
        batch = text_batch([9, 30, 17, 24, 12, 28, 5, 20])
        exact, _, count = gradient_sums(model, [batch], cross_entropy_of_one)
        model.float()
        loop, _, _ = gradient_sums(model, [batch], cross_entropy_of_one)
        found = measure(model, split(batch, 4)).parts["fisher"]
        maps = {name: parts for name, parts in found.items() if "column" in parts}
        assert len(maps) > 12
        for name, parts in maps.items():
            for part, axis in (("column", 0), ("row", 1)):
                assert parts[part].dtype == torch.float32
                assert rank_correlation(parts[part], loop[f"{name}.weight"].sum(axis)) >= 0.999, name
                wanted = exact[f"{name}.weight"].sum(axis) / count
                assert (parts[part] - wanted).abs().max() <= 1e-3 * wanted.max(), name


def rank_correlation(a, b):
    ranks = torch.stack([values.argsort().argsort().double() for values in (a, b)])
    return torch.corrcoef(ranks)[0, 1]


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_activations_are_summed_exactly(autocast, monkeypatch):
    """With a bfloat16 model or under the caller's autocast: the sums of what was measured, made in float64."""
    model, batch = tiny_bert().float(), text_batch([9, 30, 17, 24])
    if not autocast:
        model.bfloat16()
    exact = {}
    measured = LinearType.statistics

    def also_exactly(self, info, module, x, g, wanted, shared):
        columns, rows = squared_gradient_sums_reference(x.double(), g.double())
        before = exact.get(module, (0, 0))
        exact[module] = before[0] + columns, before[1] + rows
        return measured(self, info, module, x, g, wanted)

    monkeypatch.setattr(LinearType, "statistics", also_exactly)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = measure(model, split(batch, 2)).parts["fisher"]
    compared = 0
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            for part, wanted in zip(("column", "row"), exact[module], strict=True):
                assert found[name][part].dtype == torch.float32
                assert found[name][part].min() >= 0
                error = (found[name][part] * len(batch["labels"]) - wanted).abs().max()
                assert error <= 1e-3 * wanted.max(), name
                compared += bool(wanted.any())
    assert compared == 28


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_stands_near_a_float32_loop(autocast):
    """The whole bfloat16 path, forward pass and hooks included, against one example at a time in float32.

    What is left is the rounding of bfloat16 activations and gradients (8 bits), not of the sums.
    """
    model, batch = tiny_bert().float(), text_batch([9, 30, 17, 24, 12, 28, 5, 20])
    loop, _, count = gradient_sums(model, [batch], cross_entropy_of_one)
    if not autocast:
        model.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = measure(model, split(batch, 4)).parts["fisher"]
    compared = 0
    for name, parts in found.items():
        if not isinstance(model.get_submodule(name), nn.Linear) or not loop[f"{name}.weight"].any():
            continue
        for part, axis in (("column", 0), ("row", 1)):
            wanted = loop[f"{name}.weight"].sum(axis) / count
            assert (parts[part] - wanted).abs().max() <= 0.1 * wanted.max(), name
            assert rank_correlation(parts[part], wanted) >= 0.95, name
            compared += 1
    assert compared == 28


def test_bfloat16_losses_are_computed_in_float32():
    """Logits of a bfloat16 model are widened before the loss, as in training."""
    model = tiny_sequential().bfloat16()
    inputs, labels = data_for(model)
    seen = []

    class Loss(nn.CrossEntropyLoss):
        def forward(self, logits, labels):
            seen.append(logits.dtype)
            return super().forward(logits, labels)

    measure(model, [(inputs.bfloat16(), labels)], Loss())
    assert set(seen) == {torch.float32}
