"""Attention heads: which rows of the query, key and value projections and columns of the output projection are one head.

The unit is the query head. It holds its rows of the query projection, its columns of the output projection, and its rows
of the key and value projections where no other head reads them. Under grouped-query attention keys and values are shared
by several heads and belong to none: so every weight is in one head at most, heads add up and are paid for once, and taking
a head's output columns out removes that head and nothing else. Biases are not part of a head: an output bias
belongs to all heads together, and a query bias is chosen whole or not at all. Norms of queries and keys, attention sinks
and tables of relative positions are not part of a head either.

Heads are found by the names of the projections and by sizes that fit the number of heads and their size. All
architectures below lay heads out as consecutive blocks of rows in the heads' order. An attention module with projections
or parameters beyond the known ones may mix its heads (differential attention, convolutions): it has no heads here, and the
reason is kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import nn

from reltune.layers.head_group import HeadGroup
from reltune.layers.registry import layer_type
from reltune.layers.units import ModuleInfo

# Names of the query, key, value and output projections, under the attention module.
SEPARATE = (
    ("q_proj", "k_proj", "v_proj", "o_proj"),  # Llama, Qwen, Mistral, Mixtral, Gemma, ViT, gpt-oss
    ("q_proj", "k_proj", "v_proj", "out_proj"),  # BART, OPT, GPT-Neo, CLIP, Whisper
    ("q_lin", "k_lin", "v_lin", "out_lin"),  # DistilBERT
    ("q", "k", "v", "o"),  # T5
)
BERT = ("query", "key", "value")  # BERT, RoBERTa, ELECTRA; the output is output.dense, in the parent module
HEADS = ("num_attention_heads", "num_heads", "n_heads", "n_head")
HEAD_SIZE = ("head_dim", "attention_head_size", "key_value_proj_dim")
BESIDE = ("q_norm", "k_norm", "sinks", "relative_attention_bias")  # what may stand beside the projections


def find_attention_heads(
    model: nn.Module, modules: Mapping[str, ModuleInfo], left_out: Mapping[str, str]
) -> tuple[list[HeadGroup], dict[str, str]]:
    """The attention heads of a model, and why an attention module has none, by the module's name.

    An attention module has heads where its structure is known and all its projections are among the ``modules`` that
    have units. ``left_out`` says why other parameters have none.
    """
    groups: list[HeadGroup] = []
    reasons: dict[str, str] = {}
    for name, module in model.named_modules():
        names = _projections(model, name, module)
        if names is None:
            if _looks_like_attention(module):
                reasons[name] = f"the projections of {type(module).__name__} are not known"
            continue
        try:
            groups.append(_group(name, module, names, modules, left_out))
        except ValueError as error:
            reasons[name] = str(error)
    return groups, reasons


def _looks_like_attention(module: nn.Module) -> bool:
    """Whether the class is called …Attention, with weights and no other attention module inside."""
    nested = any("Attention" in type(child).__name__ for child in module.modules() if child is not module)
    return "Attention" in type(module).__name__ and not nested and any(True for _ in module.parameters())


def _projections(model: nn.Module, name: str, module: nn.Module) -> tuple[list[str], str] | None:
    """The query, key and value projections, or the fused ones, and the output projection, where the names are known."""

    def inner(*keys: str) -> list[str]:
        return [f"{name}.{key}" if name else key for key in keys]

    children = dict(module.named_children())
    for *keys, output in SEPARATE:
        if all(key in children for key in (*keys, output)):
            return inner(*keys), inner(output)[0]
    if all(key in children for key in BERT):
        parent = name.rpartition(".")[0]
        output = f"{parent}.output.dense" if parent else "output.dense"
        return (inner(*BERT), output) if _has(model, output) else None
    if "c_attn" in children and "c_proj" in children:
        return inner("q_attn", "c_attn") if "q_attn" in children else inner("c_attn"), inner("c_proj")[0]
    return None


def _has(model: nn.Module, name: str) -> bool:
    try:
        model.get_submodule(name)
    except AttributeError:
        return False
    return True


def _group(
    name: str,
    module: nn.Module,
    names: tuple[list[str], str],
    modules: Mapping[str, ModuleInfo],
    left_out: Mapping[str, str],
) -> HeadGroup:
    """The heads of an attention module with projections of these names; ValueError, saying why, where it has none."""
    inputs, output = names
    infos: dict[str, ModuleInfo] = {}
    for key in (*inputs, output):
        if key not in modules:
            raise ValueError(left_out.get(f"{key}.weight", f"{key} has no units"))
        infos[key] = modules[key]
    fused = len(inputs) < 3
    for key, info in infos.items():
        # Fused projections of other types are laid out otherwise (GPTBigCode's c_attn: head by head).
        if layer_type(info.layer_type).head_layout != ("fused" if fused else "separate"):
            raise ValueError(f"{key} is of layer type {info.layer_type}")
    others = sorted({key.split(".")[0] for key in _own_parameters(name, module, infos)} - set(BESIDE))
    if others:
        raise ValueError(f"{type(module).__name__} has {others[0]}, whose part in the heads is not known")

    config = getattr(module, "config", None)
    heads = next((getattr(place, key) for place in (module, config) for key in HEADS if hasattr(place, key)), None)
    size = next((getattr(module, key) for key in HEAD_SIZE if hasattr(module, key)), None)
    if not isinstance(heads, int) or not isinstance(size, int) or heads < 1 or size < 1:
        raise ValueError(f"{type(module).__name__} does not say how many heads of what size it has")
    end = heads * size
    misfit = ValueError(f"the sizes of its projections do not fit {heads} heads of size {size}")
    if infos[output].columns != end:
        raise misfit
    rows = [infos[key].rows for key in inputs]
    if fused:
        starts = [[0], [0, end]] if len(inputs) == 2 else [[0, end, 2 * end]]
        if rows != [len(blocks) * end for blocks in starts]:
            raise misfit
        projections = dict(zip(inputs, starts, strict=True))
    else:
        groups, rest = divmod(rows[1], size)
        if rows[0] != end or rows[1] != rows[2] or rest or not groups or heads % groups:
            raise misfit
        projections = {key: [0] for key in (inputs if groups == heads else inputs[:1])}
    return HeadGroup(name, infos[output].layer, heads, size, output, projections)


def _own_parameters(name: str, module: nn.Module, projections: Mapping[str, ModuleInfo]) -> Iterator[str]:
    """The module's parameters that are not in a projection, by their names inside it."""
    for key, _ in module.named_parameters():
        owner = (f"{name}." if name else "") + key.rpartition(".")[0]
        if owner not in projections:
            yield key
