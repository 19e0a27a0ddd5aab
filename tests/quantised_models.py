"""Tiny models with linear maps in 4 or 8 bits, and the plain ones that have the same weights."""

from __future__ import annotations

import copy

import bitsandbytes
import torch
from bitsandbytes.functional import dequantize_4bit
from torch import nn
from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

from relevance_cases import split, text_batch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def in_4_bits(linear, kind="nf4", double=False, compute_dtype=torch.float32):
    layer = bitsandbytes.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        compute_dtype=compute_dtype,
        quant_type=kind,
        compress_statistics=double,
    )
    layer.load_state_dict(linear.state_dict())
    return layer.to(DEVICE)  # moving it is what quantises it


def in_8_bits(linear):
    layer = bitsandbytes.nn.Linear8bitLt(
        linear.in_features, linear.out_features, bias=linear.bias is not None, has_fp16_weights=False
    )
    layer.load_state_dict(linear.state_dict())
    return layer.to(DEVICE)


def by_torchao(config):
    def quantise(linear):
        layer = nn.Sequential(copy.deepcopy(linear))
        quantize_(layer, config)
        return layer[0]

    return quantise


# How a layer is quantised, and its weight again by the library's own words or by definition.
WAYS = {
    "nf4": (in_4_bits, lambda layer: dequantize_4bit(layer.weight.data, layer.weight.quant_state)),
    "fp4 twice": (
        lambda linear: in_4_bits(linear, "fp4", double=True),
        lambda layer: dequantize_4bit(layer.weight.data, layer.weight.quant_state),
    ),
    "8 bits": (in_8_bits, lambda layer: layer.weight.data.float() * layer.weight.SCB[:, None] / 127),
    "torchao int8": (by_torchao(Int8WeightOnlyConfig()), lambda layer: layer.weight.dequantize()),
    "torchao fp8": (by_torchao(Float8WeightOnlyConfig()), lambda layer: layer.weight.dequantize()),
}


def pair(make, way, heads=("classifier", "score")):
    """A quantised model and the plain one that has the same weights."""
    quantise, weight_of = WAYS[way]
    quantised = make().float().to(DEVICE)
    for name, module in list(quantised.named_modules()):
        if type(module) is nn.Linear and name not in heads:
            quantised.set_submodule(name, quantise(module))
    plain = make().float().to(DEVICE)
    with torch.no_grad():
        for name, module in plain.named_modules():
            if type(module) is nn.Linear and name not in heads:
                module.weight = nn.Parameter(weight_of(quantised.get_submodule(name)).float().clone())
    return quantised, plain


def batches():
    return [
        {key: value.to(DEVICE) for key, value in batch.items()}
        for batch in split(text_batch((3, 11, 6, 1, 9, 4, 2)), 4)
    ]
