"""A language model as one file in llama.cpp's format (GGUF), with its tokenizer and chat template.

Names and layout are those of llama.cpp's own converter. Its Llama turns pairs of neighbours by the rotary positions where
Transformers turns halves of a head, so that the rows of the query and key projections are put in another order. Norms and
biases stay in float32, matrices have the type that is asked for: f32, f16, bf16, or q8_0, which has 8 bits for each weight
and one float16 scale for 32 weights of a row.

llama.cpp splits texts before byte-level merges by rules that have names; a tokenizer whose rules have none here is refused.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from reltune.errors import InputError
from reltune.files import whole_file
from reltune.names import GGUF_TYPES
from reltune.notes import note
from reltune.pretrained import load_config

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}  # by Transformers' name
IN_OTHER_ORDER = ("q_proj", "k_proj")  # of llama.cpp's "llama"
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
OTHER_MARKS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {  # what a tokenizer splits texts by before it merges bytes -> llama.cpp's name of it
    (("ByteLevel", True),): "gpt-2",
    (("Digits", True), ("ByteLevel", True)): "smollm",
    (("Split", CONTRACTIONS + OTHER_MARKS), ("ByteLevel", False)): "qwen2",
    (("Split", CONTRACTIONS + "{1,3}" + OTHER_MARKS), ("ByteLevel", False)): "llama-bpe",
}
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # llama.cpp's types of tokens
LARGEST_F16 = 65504.0


def check_architecture(name: str, config: PreTrainedConfig | None = None) -> str:
    """llama.cpp's name for the architecture of the model ``name``.

    Raises InputError for one that is not known here, or that does something which the file cannot say.
    """
    if importlib.util.find_spec("gguf") is None:
        raise InputError('--to gguf needs the package gguf, which is not installed; run: pip install "reltune[gguf]"')
    config = config or load_config(name)
    kind = str(config.model_type)
    if kind not in ARCHITECTURES:
        raise InputError(
            f"{name} is a {kind!r} model, which reltune cannot write in llama.cpp's format (it knows {', '.join(ARCHITECTURES)}); use --to "
            "merged, and llama.cpp's own converter."
        )
    rope = _rope(config)
    if rope.get("rope_type", "default") not in ("default", "linear", "llama3"):
        raise InputError(
            f"{name} scales its rotary positions by {rope['rope_type']!r}, which reltune cannot write in llama.cpp's format; use --to merged, "
            "and llama.cpp's own converter."
        )
    if getattr(config, "hidden_act", "silu") != "silu":
        raise InputError(
            f"{name} has the activation {config.hidden_act!r}, and llama.cpp's {kind} has silu; use --to merged."
        )
    return ARCHITECTURES[kind]


def write_gguf(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    path: Path,
    gguf_type: str = "f16",
    tokenizer_file: str | None = None,
) -> Path:
    """Write the plain model with its tokenizer to a file, which appears when it is whole.

    Args:
        gguf_type: the type of the matrices, one of ``names.GGUF_TYPES``.
        tokenizer_file: a file in the same format whose tokenizer it is, which is then taken over as it is there.

    Raises:
        InputError: a model or tokenizer that the format cannot hold, or weights beyond the range of f16.
    """
    import gguf

    config = model.config
    architecture = check_architecture(config.name_or_path, config)
    tensors = dict(_tensors(model, architecture))
    if gguf_type == "f16" and (large := next((n for n, t in tensors.items() if t.abs().max() > LARGEST_F16), None)):
        raise InputError(f"weights in {large} lie beyond the range of f16; use --gguf_type bf16.")
    types = {name: _type_of(tensor, gguf_type) for name, tensor in tensors.items()}
    with whole_file(path) as partial:
        writer = gguf.GGUFWriter(partial, architecture)
        _add_shape(writer, config, model)
        writer.add_file_type(getattr(gguf.LlamaFileType, FILE_TYPES[gguf_type]))
        if tokenizer_file is not None:
            _copy_tokenizer(writer, tokenizer_file, tokenizer)
        else:
            _add_tokenizer(writer, tokenizer, len(tensors["token_embd.weight"]))
        add_ends(writer, model, tokenizer)
        for name, tensor in tensors.items():
            block, size = gguf.GGML_QUANT_SIZES[types[name]]
            size *= tensor.numel() // block
            writer.add_tensor_info(name, tuple(tensor.shape), np.dtype(np.float32), size, types[name])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, tensor in tqdm(tensors.items(), desc=f"write {gguf_type}", unit="tensor"):
            values = tensor.detach().float().cpu().numpy()
            writer.write_tensor_data(gguf.quants.quantize(values, types[name]))
        writer.close()
    return path


FILE_TYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}
assert tuple(FILE_TYPES) == GGUF_TYPES


def _type_of(tensor: Tensor, gguf_type: str) -> Any:
    """What a tensor is held in: vectors in float32, and matrices whose rows are no whole blocks in float16."""
    import gguf

    types = gguf.GGMLQuantizationType
    if tensor.ndim < 2:
        return types.F32
    wanted = types[gguf_type.upper()]
    return types.F16 if tensor.shape[-1] % gguf.GGML_QUANT_SIZES[wanted][0] else wanted


# -- the model ------------------------------------------------------------------------------------------------------


def _rope(config: PreTrainedConfig) -> dict[str, Any]:
    return dict(getattr(config, "rope_parameters", None) or {})


def _add_shape(writer: Any, config: PreTrainedConfig, model: Any) -> None:
    """The numbers that describe the model."""
    import gguf

    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    rope = _rope(config)
    writer.add_name(Path(str(config.name_or_path)).name.removesuffix(".gguf") or "model")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(model.get_input_embeddings().weight.shape[0])
    writer.add_rope_dimension_count(size)
    writer.add_rope_freq_base(rope.get("rope_theta", 10000.0))
    if rope.get("rope_type") == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    window = getattr(config, "sliding_window", None)
    if window is not None and window < config.max_position_embeddings:
        note(f"The model attends to the last {window} tokens alone; llama.cpp's {writer.arch} attends to all of them.")


def _tensors(model: Any, architecture: str) -> Iterator[tuple[str, Tensor]]:
    """The model's tensors under llama.cpp's names, in its order of rows."""
    import gguf

    config = model.config
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(kinds[architecture], config.num_hidden_layers)
    rope = _rope(config)
    if rope.get("rope_type") == "llama3":  # llama.cpp divides each frequency by a factor
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        plain = rope["rope_theta"] ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
        yield "rope_freqs.weight", (plain / model.model.rotary_emb.inv_freq.cpu().double()).float()
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        found = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise InputError(
                f"the model has a tensor {name}, for which llama.cpp's {architecture} has no place; use --to merged."
            )
        if architecture == "llama" and (part := next((one for one in IN_OTHER_ORDER if f".{one}." in name), None)):
            heads = config.num_attention_heads if part == "q_proj" else config.num_key_value_heads
            tensor = neighbours(tensor, heads)
        yield found, tensor


def neighbours(rows: Tensor, heads: int) -> Tensor:
    """Rows of a query or key projection in llama.cpp's order: row i of each half of a head becomes one of a pair."""
    return rows.reshape(heads, 2, len(rows) // heads // 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


# -- the tokenizer --------------------------------------------------------------------------------------------------


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """llama.cpp's names of the tokenizer's kind, and of how it splits texts.

    Raises InputError for a kind that has none here.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    described = json.loads(backend.to_str()) if backend is not None else {"model": {}}
    if described["model"].get("type") == "BPE":
        first = described["pre_tokenizer"] or {}
        steps = tuple(_step(step) for step in first.get("pretokenizers", [first]))
        if steps in SPLITS:
            return "gpt2", SPLITS[steps]
        if described["model"].get("byte_fallback"):
            return "llama", "default"
    kind = described["model"].get("type") or type(tokenizer).__name__
    raise InputError(
        f"the model's tokenizer ({kind}) splits texts in a way that reltune knows no name for in llama.cpp's format; use --to merged, and "
        "llama.cpp's own converter."
    )


def _step(step: dict[str, Any]) -> tuple[Any, ...]:
    """What a step of splitting does, as in ``SPLITS``."""
    kind = step.get("type")
    if kind == "ByteLevel" and not step.get("add_prefix_space"):
        return kind, bool(step.get("use_regex", True))
    if kind == "Digits":
        return kind, bool(step.get("individual_digits"))
    if kind == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
        return kind, step["pattern"].get("Regex")
    return kind, None


def _add_tokenizer(writer: Any, tokenizer: PreTrainedTokenizerBase, rows: int) -> None:
    """The tokens, one for each row of the embedding, with their merges and the ids of those with a meaning."""
    kind, split = check_tokenizer(tokenizer)
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    tokens, types = _tokens(tokenizer, rows, kind)
    writer.add_tokenizer_model(kind)
    writer.add_tokenizer_pre(split)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if kind == "gpt2":
        writer.add_token_merges(merges)
        writer.add_add_space_prefix(False)
    else:  # merges follow from scores: the pieces of the first merge have the best one
        rank = {pair.replace(" ", ""): -float(i) for i, pair in reversed(list(enumerate(merges)))}
        writer.add_token_scores([rank.get(token, -float(len(merges))) for token in tokens])
        writer.add_add_space_prefix(tokenizer.tokenize("a")[:1] == ["▁a"])
    for name, add in (
        ("bos", writer.add_bos_token_id),
        ("eos", writer.add_eos_token_id),
        ("unk", writer.add_unk_token_id),
        ("pad", writer.add_pad_token_id),
    ):
        if (token := getattr(tokenizer, f"{name}_token_id")) is not None:
            add(token)
    ids = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(ids[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(ids[-1] == tokenizer.eos_token_id)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _tokens(tokenizer: PreTrainedTokenizerBase, rows: int, kind: str) -> tuple[list[str], list[int]]:
    """Each token and its type by its number; numbers that no token has are unused ones."""
    tokens, types = [f"[PAD{i}]" for i in range(rows)], [UNUSED] * rows
    added = tokenizer.added_tokens_decoder
    for token, i in tokenizer.get_vocab().items():
        if i >= rows:
            continue
        tokens[i], types[i] = token, NORMAL
        if i in added:
            types[i] = CONTROL if added[i].special else USER_DEFINED
        if kind == "llama" and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            types[i] = BYTE
    if tokenizer.unk_token_id is not None and tokenizer.unk_token_id not in (
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
    ):
        types[tokenizer.unk_token_id] = UNKNOWN
    return tokens, types


def _copy_tokenizer(writer: Any, file: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Everything that another file says of its tokenizer, with this one's chat template."""
    import gguf

    for name, field in gguf.GGUFReader(file).fields.items():
        if not name.startswith("tokenizer.") or (name == "tokenizer.chat_template" and tokenizer.chat_template):
            continue
        kind, *inner = field.types
        writer.add_key_value(name, field.contents(), kind, sub_type=inner[-1] if inner else None)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def add_ends(writer: Any, model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """The token that ends a turn, where the model's settings name one beside the end of sequence."""
    from reltune.tasks.generation import ends_of

    others: Sequence[int] = [token for token in ends_of(model, tokenizer) if token != tokenizer.eos_token_id]
    if others and not any("tokenizer.ggml.eot_token_id" in part for part in writer.kv_data):
        writer.add_eot_token_id(others[0])
