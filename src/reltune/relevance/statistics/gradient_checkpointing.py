"""transformers' gradient checkpointing, made to work in evaluation mode and without a gradient of the inputs.

``model.activation_checkpointing_enable()`` (formerly ``gradient_checkpointing_enable``) marks blocks, and a marked block
recomputes itself only while its ``training`` flag is set. The analysis runs in evaluation mode, because dropout would
make another function of the model, and it is where memory is short. So the flag of the marked blocks alone is set; what
a block computes runs with the flag as it was, because the same flag switches on the dropout of some blocks (BART's, for one).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer


@contextlib.contextmanager
def checkpointing_in_evaluation(model: nn.Module) -> Iterator[None]:
    """Let the marked blocks of a model, in evaluation mode or not, recompute themselves for as long as the context lasts.

    Always in the form without reentry: the other one needs an input that requires a gradient, and here none does. The
    caches of keys and values are off meanwhile, or recomputing would lengthen them once more.
    """
    blocks: Any = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer) and m.gradient_checkpointing]
    if not blocks:
        yield
        return
    before = [(block, block.training, block._gradient_checkpointing_func) for block in blocks]
    configs = {
        id(config): config for module in model.modules() if (config := getattr(module, "config", None)) is not None
    }
    caching = [config for config in configs.values() if getattr(config, "use_cache", False)]
    try:
        for config in caching:
            config.use_cache = False
        for block in blocks:
            block._gradient_checkpointing_func = _recomputing(block, block._gradient_checkpointing_func)
            block.training = True
        yield
    finally:
        for block, training, function in before:
            block.training, block._gradient_checkpointing_func = training, function
        for config in caching:
            config.use_cache = True


def _recomputing(block: nn.Module, given: Callable[..., Any]) -> Callable[..., Any]:
    mode = block.training

    def in_its_mode(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            block.training = mode
            try:
                return function(*args, **kwargs)
            finally:  # recomputing ends with an exception as soon as it has what it needs
                block.training = True

        return run

    plain = given is checkpoint or isinstance(given, functools.partial)
    options = {"use_reentrant": False} if plain else {}
    return lambda function, *args: given(in_its_mode(function), *args, **options)
