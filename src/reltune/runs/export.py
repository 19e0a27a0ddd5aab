"""Hand an adapter to programs that do not know reltune: as a standard LoRA adapter, or merged into a plain model, which may be
one file for llama.cpp (gguf_file.py).

A change of columns idx is ΔW = (D − W₀[:, idx]) Eᵀ with E one-hot, which is a LoRA adapter with lora_A = Eᵀ (c × in) and
lora_B = D − W₀[:, idx] (out × c); rows are the same with lora_B one-hot. Directions of the input are lora_A, and what was trained along
them is lora_B. So nothing is approximated.

Conv1D takes the same two (PEFT's LoRA counts its features as a linear map's). A convolution's rows are the filters of its
lora_A, with lora_B one-hot; a column needs one of lora_A's filters for each of its places in the kernel. An embedding has
W = (tokens × features) and ΔWᵀ = lora_embedding_B lora_embedding_A.

Ranks differ per module (PEFT's rank_pattern), which vLLM does not read. For vLLM every module gets the largest rank, padded with zeros,
and what vLLM refuses is refused here: modules that are saved whole, such as a classifier.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from reltune.errors import InputError
from reltune.files import check_destination, read_json, whole_directory
from reltune.layers.quantised import is_quantised
from reltune.runs.gguf_file import write_gguf
from reltune.tensor_files import check_saved
from reltune.tuner.layer import ReltuneLayer
from reltune.tuner.quantised import MERGED_IS_ROUNDED

VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what its --max-lora-rank can be, from 8 on


def to_lora(
    model: PeftModel,
    output_dir: str | os.PathLike,
    adapter_name: str = "default",
    one_rank: bool = False,
    complete: Callable[[Path], object] = lambda path: None,
) -> Path:
    """Write the adapter as a PEFT LoRA adapter that loads without reltune. Changed columns, rows and directions carry over exactly.

    Rank and alpha differ per module (``rank_pattern``, ``alpha_pattern``), unless it is to be ``one_rank`` for all, as vLLM wants it.
    ``complete`` writes what else belongs there; the directory appears when all of it is written.
    Raises InputError when the adapter trains single weights, whole weights, biases or norms, which have no low-rank form; and, for one
    rank, when it saves modules whole, or when the padded file would be larger than the base model.
    """
    path = check_destination(output_dir)
    if isinstance(config := model.peft_config[adapter_name], LoraConfig):
        if one_rank:
            _check_for_vllm(config, model, adapter_name)
        with whole_directory(path) as partial:
            model.save_pretrained(str(partial), selected_adapters=[adapter_name])
            complete(partial)
        return path
    layers = {
        name.removeprefix("base_model.model."): layer
        for name, layer in model.named_modules()
        if isinstance(layer, ReltuneLayer) and adapter_name in layer._all_available_adapter_names()
    }
    reasons = {name: reason for name, layer in layers.items() if (reason := layer.why_no_lora(adapter_name))}
    if reasons:
        first, reason = next(iter(reasons.items()))
        count = list(reasons.values()).count(reason)
        others = f" and {count - 1} more" if count > 1 else ""
        raise InputError(f"what the adapter trains in {first}{others} cannot be a LoRA adapter: it {reason}.")
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for name, layer in layers.items():
        factors = layer.lora_tensors(adapter_name)
        tensors |= {f"base_model.model.{name}.{key}": factor for key, factor in factors.items()}
        ranks[name] = next(iter(factors.values())).shape[0]
    saved_whole = _modules_to_save(model, adapter_name)
    tensors |= saved_whole
    # PEFT enters the usual names of classifiers too, whether the model has them or not, and anew with every load.
    named = dict.fromkeys(getattr(config, "modules_to_save", None) or [])
    saved = [name for name in named if any(f".{name}." in key for key in saved_whole)]
    if one_rank:
        if saved:
            raise InputError(
                f"vLLM serves no adapter that saves modules whole, and this one saves {', '.join(saved)}; export it without --for, or "
                "--to merged."
            )
        tensors = {key: _padded(key, tensor, max(ranks.values())) for key, tensor in tensors.items()}
        _check_not_larger(tensors, model, max(ranks.values()))
    lora = LoraConfig(
        r=max(ranks.values()),
        lora_alpha=max(ranks.values()),
        lora_dropout=0.0,
        target_modules=sorted(ranks),
        fan_in_fan_out=any(layer.fan_in_fan_out for layer in layers.values()),
        rank_pattern={} if one_rank else ranks,
        alpha_pattern={} if one_rank else ranks,
        modules_to_save=saved or None,
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
        inference_mode=True,
    )
    with whole_directory(path) as partial:
        lora.save_pretrained(str(partial))
        on_host = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(on_host, partial / "adapter_model.safetensors")
        check_saved(partial / "adapter_model.safetensors", on_host)
        complete(partial)
    return path


def _check_for_vllm(config: LoraConfig, model: PeftModel, adapter_name: str) -> None:
    """Raise InputError for what vLLM does not serve of an adapter that is LoRA as it is."""
    saved = any(".lora_" not in key for key in _modules_to_save(model, adapter_name))
    reason = "has a rank for each module" if config.rank_pattern else "has magnitudes (DoRA)" if config.use_dora else ""
    reason = reason or ("saves modules whole" if saved else "")
    if reason:
        raise InputError(
            f"vLLM serves no adapter that {reason}, and this one does; export it without --for, or --to merged."
        )


def _padded(key: str, factor: Tensor, rank: int) -> Tensor:
    """A factor with zeros up to this rank: lora_A has it in its first dimension, lora_B in the second."""
    dim = 0 if key.endswith(("lora_A.weight", "lora_embedding_A")) else 1
    shape = list(factor.shape)
    shape[dim] = rank - shape[dim]
    return torch.cat((factor, factor.new_zeros(shape)), dim)


def _check_not_larger(tensors: Mapping[str, Tensor], model: PeftModel, rank: int) -> None:
    size = sum(tensor.nbytes for tensor in tensors.values())
    base = sum(p.nbytes for name, p in model.named_parameters() if ".reltune_" not in name)
    if size > base:
        raise InputError(
            f"padded to one rank of {rank}, the LoRA adapter would take {size:,} bytes, more than the base model's {base:,}; use --to "
            "merged, or select again with --spread even."
        )


def _modules_to_save(model: PeftModel, adapter_name: str) -> dict[str, Tensor]:
    """The modules that the adapter saves whole (new heads), under the names that PEFT gives them in a file."""
    from peft import get_peft_model_state_dict

    state: dict[str, Any] = get_peft_model_state_dict(model, adapter_name=adapter_name)
    return {key: value for key, value in state.items() if ".reltune_" not in key}


def to_merged(
    model: Any,
    tokenizer: Any,
    output_dir: str | os.PathLike,
    complete: Callable[[Path], object] = lambda path: None,
) -> Path:
    """Write a plain Transformers model with the adapter's values in its weights: inference costs what the base costs.

    ``complete`` writes what else belongs there.
    Raises InputError where the adapted weights are held in 4 or 8 bits.
    """
    path = check_destination(output_dir)
    merged = merged_model(model)
    with whole_directory(path) as partial:
        merged.save_pretrained(str(partial))
        _check_merged(merged, partial)
        tokenizer.save_pretrained(str(partial))
        complete(partial)
    return path


def _check_merged(model: Any, path: Path) -> None:
    """Raise StorageError unless the files that were just written hold the model's tensors to the bit. Some models have theirs under
    other names in files; these are looked at for their form alone."""
    own = model.state_dict()
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, "pt") as held:
            names = list(held.keys())
            check_saved(file, {name: own[name] if name in own else held.get_tensor(name) for name in names})


def merged_model(model: Any) -> Any:
    """A plain model with the adapter's values in its weights.

    Raises InputError where the adapted weights are held in 4 or 8 bits.
    """
    for module in model.modules():  # PEFT's own LoRA would be rounded without a word
        if isinstance(module, LoraLayer) and any(map(is_quantised, module.get_base_layer().parameters())):
            raise InputError(MERGED_IS_ROUNDED)
    return model.merge_and_unload(safe_merge=True) if isinstance(model, PeftModel) else model


def to_gguf(
    model: Any,
    tokenizer: Any,
    output_dir: str | os.PathLike,
    gguf_type: str = "f16",
    tokenizer_file: str | None = None,
    complete: Callable[[Path], object] = lambda path: None,
) -> Path:
    """Write the merged model with its tokenizer as one file for llama.cpp. See ``write_gguf`` for the arguments and what is
    refused; ``complete`` writes what else belongs to the directory. Gives the file."""
    path = check_destination(output_dir)
    merged, name = merged_model(model), f"model-{gguf_type}.gguf"
    with whole_directory(path) as partial:
        write_gguf(merged, tokenizer, partial / name, gguf_type, tokenizer_file)
        complete(partial)
    return path / name


def served(rank: int) -> int:
    """The smallest --max-lora-rank of vLLM that allows a rank."""
    return next((allowed for allowed in VLLM_RANKS if allowed >= rank), rank)


def lora_summary(path: str | os.PathLike) -> str:
    """One line on an exported adapter: the largest rank that a server has to allow."""
    config = read_json(Path(path) / "adapter_config.json")
    ranks = config["rank_pattern"].values()
    if not ranks:
        with safe_open(Path(path) / "adapter_model.safetensors", "pt") as file:
            count = sum("lora_A" in key or "lora_embedding_A" in key for key in file.keys())  # noqa: SIM118
        return f"{count} modules of rank {config['r']}; start vLLM with --max-lora-rank {served(config['r'])}"
    return f"{len(ranks)} modules, ranks {min(ranks)} to {max(ranks)} (rank_pattern)"
