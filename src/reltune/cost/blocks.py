"""The blocks of a model that are alike: a few of them are counted, and the counts repeated."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

COUNTED = 4  # of blocks that are alike in a row: the first, two between, the last


def block_lists(model: nn.Module) -> Iterator[nn.ModuleList]:
    """The lists of a model's blocks; not those within a block, such as experts."""

    def lists(module: nn.Module) -> Iterator[nn.ModuleList]:
        for child in module.children():
            if isinstance(child, nn.ModuleList):
                if len(child) > 1:
                    yield child
            else:
                yield from lists(child)

    yield from lists(model)


def shorten(model: nn.Module) -> dict[str, int]:
    """Take out blocks that are like their neighbours. Gives, by name, how many each block that stands for others stands for.

    What is counted of such a block counts as often. A model whose config gives blocks different types is left as it is.
    """
    types = getattr(getattr(model, "config", None), "layer_types", None)
    if types and len(set(types)) > 1:
        return {}
    names = {id(module): name for name, module in model.named_modules()}
    repeats: dict[str, int] = {}
    for blocks in list(block_lists(model)):
        signatures = [_signature(block) for block in blocks]
        kept: list[nn.Module] = []
        start = 0
        while start < len(blocks):
            end = start
            while end < len(blocks) and signatures[end] == signatures[start]:
                end += 1
            run = list(blocks)[start:end]
            if len(run) > COUNTED:
                repeats[f"{names[id(blocks)]}.{len(kept) + 2}"] = len(run) - COUNTED + 1
                run = [*run[: COUNTED - 1], run[-1]]
            kept += run
            start = end
        blocks._modules.clear()
        for index, block in enumerate(kept):
            blocks._modules[str(index)] = block
    return repeats


def _signature(block: nn.Module) -> tuple[Any, ...]:
    modules = tuple((name, type(module)) for name, module in block.named_modules())
    shapes = tuple((name, tuple(p.shape), p.dtype, p.requires_grad) for name, p in block.named_parameters())
    return modules, shapes
