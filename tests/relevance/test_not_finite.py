"""A number that is not finite: the error names the batch and the module nearest to where it began."""

from __future__ import annotations

import pytest
import torch

from measured_models import MODELS
from relevance_cases import data_for, measure, split
from reltune.errors import AnalysisError


class Spoilt(torch.autograd.Function):
    """The same numbers, and on the way back a gradient with one that is not."""

    @staticmethod
    def forward(ctx, y):
        return y.clone()

    @staticmethod
    def backward(ctx, g):
        g = g.clone()
        g.view(-1)[0] = float("nan")
        return g


def spoilt_gradient(model, name, batch):
    """NaN in the gradient of the module's output, from the model's call number ``batch`` on."""
    calls = []
    model.register_forward_pre_hook(lambda module, args: calls.append(1))

    def hook(module, args, output):
        return Spoilt.apply(output) if len(calls) > batch and output.requires_grad else None

    model.get_submodule(name).register_forward_hook(hook)


# The order of registration is not that of execution: in Llama's blocks the norms come last.
PLACES = [
    ("bert", "bert.encoder.layer.0.intermediate.dense"),
    ("bert", "bert.encoder.layer.1.attention.self.key"),
    ("bert", "bert.encoder.layer.0.output.LayerNorm"),
    ("llama", "model.layers.1.self_attn.o_proj"),
    ("llama", "model.layers.0.mlp.gate_proj"),
    ("llama", "model.layers.1.input_layernorm"),
    ("vit", "vit.layers.0.mlp.fc1"),
    ("sequential", "1"),
]


@pytest.mark.parametrize("criterion", ["fisher", "gradient", "taylor", "fisher_true"])
@pytest.mark.parametrize(("kind", "name"), PLACES)
def test_a_gradient_is_named_where_it_begins(kind, name, criterion):
    model = MODELS[kind]()
    batches = split(data_for(model), 1)
    spoilt_gradient(model, name, batch=3)
    with pytest.raises(AnalysisError) as error:
        measure(model, batches, None, [criterion])
    assert f"the gradient of {name} (" in str(error.value)
    assert "is not finite in batch 3." in str(error.value)


def test_an_input_is_named_where_it_begins():
    model = MODELS["llama"]()
    batches = split(data_for(model), 2)

    def spoil(module, args):
        return (args[0] * float("inf"),)

    model.model.layers[1].post_attention_layernorm.register_forward_pre_hook(spoil)
    with pytest.raises(AnalysisError, match=r"the input of model.layers.1.mlp.gate_proj is not finite in batch 0"):
        measure(model, batches, None, ["activation"], target_modules=["mlp", "layers.0"])


def test_the_loss_names_the_output_that_is_first_not_finite():
    model = MODELS["llama"]()
    batches = split(data_for(model), 2)
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight[0, 0] = float("nan")
    with pytest.raises(AnalysisError) as error:
        measure(model, batches)
    assert str(error.value) == (
        "the loss of batch 0 is not finite at examples [0, 1] of the batch: the output of model.layers.1.self_attn.v_proj is "
        "the first that is not finite."
    )
    assert not any(module._forward_hooks for module in model.modules())


def test_the_loss_names_the_batch_or_itself():
    model = MODELS["sequential"]()
    batches = split(data_for(model), 3)
    batches[1][0][2, 0] = float("inf")
    with pytest.raises(
        AnalysisError, match=r"loss of batch 1 is not finite at examples .2. of the batch: its inputs are not finite"
    ):
        measure(model, batches)

    def loss(outputs, batch):
        return outputs.sum(1) / 0

    with pytest.raises(
        AnalysisError, match="the outputs of all modules are finite, so the loss itself makes the number"
    ):
        measure(model, [data_for(model)], loss)
