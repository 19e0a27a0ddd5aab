"""Hand an adapter to programs that do not know reltune: as a standard LoRA adapter, or merged into a plain model.

A change of columns idx is ΔW = (D − W₀[:, idx]) Eᵀ with E one-hot, which is a LoRA adapter with lora_A = Eᵀ (c × in) and
lora_B = D − W₀[:, idx] (out × c); rows are the same with lora_B one-hot. So nothing is approximated.

Conv1D takes the same two (PEFT's LoRA counts its features as a linear map's). A convolution's rows are the filters of its
lora_A, with lora_B one-hot; a column needs one of lora_A's filters for each of its places in the kernel. An embedding has
W = (tokens × features) and ΔWᵀ = lora_embedding_B lora_embedding_A.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import save_file
from torch import Tensor

from reltune.errors import InputError
from reltune.files import check_destination, make_directory
from reltune.tuner.conv2d import ReltuneConv2d
from reltune.tuner.embedding import ReltuneEmbedding
from reltune.tuner.float8 import ReltuneFloat8Linear
from reltune.tuner.layer import ReltuneLayer
from reltune.tuner.linear import ReltuneLinearConv1D


def to_lora(model: PeftModel, output_dir: str | os.PathLike, adapter_name: str = "default") -> Path:
    """Write the adapter as a PEFT LoRA adapter that loads without reltune. Changed columns and rows carry over exactly.

    Rank and alpha differ per module (``rank_pattern``, ``alpha_pattern``). Raises InputError when the adapter trains
    single weights, whole weights, biases or norms, which have no low-rank form.
    """
    path = check_destination(output_dir)
    layers = {
        name.removeprefix("base_model.model."): layer
        for name, layer in model.named_modules()
        if isinstance(layer, ReltuneLayer) and adapter_name in layer._all_available_adapter_names()
    }
    rounded = [n for n, layer in layers.items() if isinstance(layer, ReltuneFloat8Linear)]
    if rounded:
        raise InputError(
            f"the base's weights are held in float8 (in {len(rounded)} modules, {rounded[0]} the first), so that changes from "
            "its own columns are not known; load the base anew and the adapter with PeftModel.from_pretrained, and export that."
        )
    single = [n for n, layer in layers.items() if adapter_name in layer.reltune_elements]
    if single:
        raise InputError(
            f"the adapter trains single weights (in {len(single)} modules, {single[0]} the first), whose change has no low rank "
            "that a LoRA adapter could carry; use --to merged."
        )
    cannot = [
        n for n, layer in layers.items() if adapter_name in layer.reltune_weight or adapter_name in layer.reltune_bias
    ]
    if cannot:
        raise InputError(
            f"the adapter trains whole weights, biases or norms (in {len(cannot)} modules, {cannot[0]} the first), which a "
            "LoRA adapter cannot carry; use --to merged."
        )
    for name, layer in layers.items():
        if isinstance(layer, ReltuneConv2d) and not layer.is_plain:
            raise InputError(
                f"{name} is a convolution with groups, dilation or a padding mode of its own, which a LoRA adapter cannot carry; "
                "use --to merged."
            )
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for name, layer in layers.items():
        lora_a, lora_b = _factors(layer, adapter_name)
        if isinstance(layer, ReltuneEmbedding):
            tensors[f"base_model.model.{name}.lora_embedding_A"] = lora_b.mT
            tensors[f"base_model.model.{name}.lora_embedding_B"] = lora_a.mT
        else:
            tensors[f"base_model.model.{name}.lora_A.weight"] = lora_a
            tensors[f"base_model.model.{name}.lora_B.weight"] = lora_b
        ranks[name] = lora_a.shape[0]
    config = model.peft_config[adapter_name]
    heads = _modules_to_save(model, adapter_name)
    tensors |= heads
    # PEFT enters the usual names of classifiers too, whether the model has them or not, and anew with every load.
    named = dict.fromkeys(getattr(config, "modules_to_save", None) or [])
    saved = [name for name in named if any(f".{name}." in key for key in heads)]
    lora = LoraConfig(
        r=max(ranks.values()),
        lora_alpha=max(ranks.values()),
        lora_dropout=0.0,
        target_modules=sorted(ranks),
        fan_in_fan_out=any(isinstance(layer, ReltuneLinearConv1D) for layer in layers.values()),
        rank_pattern=ranks,
        alpha_pattern=ranks,
        modules_to_save=saved or None,
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
        inference_mode=True,
    )
    make_directory(path)
    lora.save_pretrained(str(path))
    save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, path / "adapter_model.safetensors")
    return path


def _factors(layer: ReltuneLayer, adapter_name: str) -> tuple[Tensor, Tensor]:
    """lora_A (c + r, in) and lora_B (out, c + r) with lora_B lora_A = the adapter's change of the weight (out, in).

    Of a convolution (c · h · w + r, in, h, w) and (out, c · h · w + r, 1, 1).
    """
    kept = layer.originals[adapter_name]
    out_features, in_features = (layer.weight.shape[dim] for dim in (layer.row_dim, layer.column_dim))
    a, b = [], []
    if kept.columns is not None and kept.column_idx is not None:
        # a cell in both belongs to the row
        change = layer._outside_rows((layer.reltune_columns[adapter_name] - kept.columns).detach(), kept)
        change = change.movedim((layer.row_dim, layer.column_dim), (0, 1))
        kernel = change.shape[2:]
        one_hot = _one_hot(kept.column_idx, in_features, change)
        if kernel:
            places = torch.eye(kernel.numel()).to(change).unflatten(1, kernel)
            one_hot = torch.einsum("ci,khw->ckihw", one_hot, places).flatten(0, 1)
        a.append(one_hot)
        b.append(change.flatten(1))
    if kept.rows is not None and kept.row_idx is not None:
        change = (layer.reltune_rows[adapter_name] - kept.rows).detach()
        change = change.movedim((layer.row_dim, layer.column_dim), (0, 1))
        a.append(change)
        b.append(_one_hot(kept.row_idx, out_features, change).mT)
    lora_a, lora_b = torch.cat(a, 0), torch.cat(b, 1)
    return lora_a, lora_b[..., None, None] if lora_a.ndim == 4 else lora_b


def _one_hot(idx: Tensor, size: int, like: Tensor) -> Tensor:
    return like.new_zeros(len(idx), size).scatter_(1, idx[:, None], 1)


def _modules_to_save(model: PeftModel, adapter_name: str) -> dict[str, Tensor]:
    """The whole modules (heads) that the adapter saves, under the names PEFT gives them in a file."""
    from peft import get_peft_model_state_dict

    state: dict[str, Any] = get_peft_model_state_dict(model, adapter_name=adapter_name)
    return {key: value for key, value in state.items() if ".reltune_" not in key}


def to_merged(model: PeftModel, tokenizer: Any, output_dir: str | os.PathLike) -> Path:
    """Write a plain Transformers model with the adapter's values in its weights: inference costs what the base costs."""
    path = check_destination(output_dir)
    merged = model.merge_and_unload(safe_merge=True)
    make_directory(path)
    merged.save_pretrained(str(path))
    tokenizer.save_pretrained(str(path))
    return path


def lora_summary(path: str | os.PathLike) -> str:
    """One line on an exported adapter: the largest rank that a server has to allow."""
    config = json.loads((Path(path) / "adapter_config.json").read_text(encoding="utf-8"))
    ranks = config["rank_pattern"].values()
    return f"{len(ranks)} modules, ranks {min(ranks)} to {max(ranks)} (rank_pattern)"
