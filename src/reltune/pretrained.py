"""A pretrained model's config, tokenizer and weights, or the reason why there is none, in words."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging
from transformers.utils.hub import is_offline_mode

from reltune.errors import InputError, first_line
from reltune.files import model_directory_problem
from reltune.notes import note

HEADS = ("classifier.", "score.", "fc.", "head.")  # of models that keep their body under no name of its own


def load_config(name: str) -> PreTrainedConfig:
    path, options = _place(name)
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False, **options)
    except Exception as error:
        raise InputError(_why_no_config(name, error)) from error


def _why_no_config(name: str, error: Exception) -> str:
    folder = Path(name)
    if "trust_remote_code" in str(error):
        return (
            f"{name} needs Python code of its own, which reltune does not run; "
            "name a model whose architecture transformers itself has."
        )
    if problem := model_directory_problem(name):
        return problem
    if (folder / "config.json").is_file():
        return (
            f"{folder / 'config.json'} does not describe a model that this version of transformers knows "
            f"({first_line(error)}). Copy or download the model again, or update transformers."
        )
    if folder.is_file():
        if "architecture" in str(error) and "not supported" in str(error):
            return (
                f"{name} holds a model that transformers cannot make of a file in llama.cpp's format ({first_line(error)}); name the "
                "directory of the model that it was made from."
            )
        return (
            f"{name} cannot be read as a model in llama.cpp's format ({first_line(error)}); copy or download it again."
        )
    offline = " while HF_HUB_OFFLINE is set" if is_offline_mode() else ""
    return (
        f"{name!r} is no local directory and cannot be loaded from the Hugging Face Hub{offline}; "
        "check the path or id, the network, and your login if access is restricted."
    )


def _place(name: str) -> tuple[str, dict[str, Any]]:
    """Where to load from, and what to say of it: a file in llama.cpp's format lies in a directory."""
    if name.endswith(".gguf") and Path(name).is_file():
        if importlib.util.find_spec("gguf") is None:
            raise InputError(
                f'{name} is in llama.cpp\'s format, and the package gguf is not installed; run: pip install "reltune[gguf]"'
            )
        return str(Path(name).parent), {"gguf_file": Path(name).name}
    return name, {}


def saved_tokenizer(name: str, **options: Any) -> PreTrainedTokenizerBase:
    """The model's tokenizer as it was saved; but with a padding token that the model has, where it comes without one.

    ``options`` are its own.
    """
    path, place = _place(name)
    config = load_config(name)
    mend = "Save it there with tokenizer.save_pretrained, or name a model that comes with one."
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False, **place, **options)
    except Exception as error:  # the tokenizers library raises bare Exceptions on a damaged file
        raise InputError(f"{name} has no usable tokenizer ({first_line(error)}). {mend}") from error
    if place:  # the file's own: transformers 5.17 takes the token that begins a text for the one that ends it
        for kind in ("bos", "eos", "pad"):
            if (token_id := getattr(config, f"{kind}_token_id", None)) is not None:
                setattr(tokenizer, f"{kind}_token", tokenizer.convert_ids_to_tokens(token_id))
    # without any file transformers returns a tokenizer of special tokens only (T5's: one more)
    if len(set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens)) < 2:
        raise InputError(f"{name} has no tokenizer files. {mend}")
    _pad_with_a_known_token(tokenizer, name, vocabulary_size(config))
    return tokenizer


def _pad_with_a_known_token(tokenizer: PreTrainedTokenizerBase, name: str, rows: int | None) -> None:
    """Give the tokenizer another padding token where it has none, or one that was added without a row in the embedding."""

    def known(token_id: Any) -> bool:
        return isinstance(token_id, int) and (rows is None or token_id < rows)

    if known(tokenizer.pad_token_id):
        return
    added = tokenizer.pad_token
    others = [tokenizer.eos_token] if added is None else [tokenizer.eos_token, tokenizer.unk_token, tokenizer.bos_token]
    other = next((token for token in others if token and known(tokenizer.convert_tokens_to_ids(token))), None)
    if other is None and added is None:
        raise InputError(
            f"The tokenizer of {name} has neither a padding nor an end-of-sequence token; "
            "set pad_token in its tokenizer_config.json."
        )
    if other is None:
        raise InputError(
            f"The tokenizer of {name} pads with {added!r} (token {tokenizer.pad_token_id}), and the model's embedding has {rows} "
            "rows; set pad_token in its tokenizer_config.json to a token that the model has."
        )
    if added is not None:
        note(
            f"Texts are padded with {other!r}: the tokenizer's own padding token {added!r} (token {tokenizer.pad_token_id}) has no "
            f"row in the model's embedding of {rows}."
        )
    tokenizer.pad_token = other


def vocabulary_size(config: PreTrainedConfig) -> int | None:
    """The rows of the model's embedding; None where it has none of tokens."""
    size = getattr(config.get_text_config(), "vocab_size", None)
    return size if isinstance(size, int) else None


def load_tokenizer(name: str, padding_side: str = "right", **options: Any) -> PreTrainedTokenizerBase:
    """The model's tokenizer to work with: as ``saved_tokenizer`` gives it, with a ``model_max_length`` the model can take, and
    padding on this side. On the right, positions that count from the first token do not move."""
    tokenizer = saved_tokenizer(name, **options)
    tokenizer.padding_side = padding_side
    positions = position_limit(load_config(name))
    if positions is not None:
        tokenizer.model_max_length = min(tokenizer.model_max_length, positions)
    return tokenizer


def position_limit(config: PreTrainedConfig) -> int | None:
    """The number of tokens for which the model has positions; None where they are not counted.

    RoBERTa and its kin count positions from the padding token's number on: those up to it are not for tokens.
    """
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(positions, int) or positions <= 0:
        return None
    if type(config) not in MODEL_FOR_MASKED_LM_MAPPING:
        return positions
    return positions - _reserved_positions(config.to_json_string(use_diff=False))


@functools.lru_cache(maxsize=16)
def _reserved_positions(values: str) -> int:
    """The first rows of the model's embedding of positions that no token uses: those up to its padding index.

    ``values`` are the model's config as JSON.
    """
    config = AutoConfig.for_model(**json.loads(values))
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    for module_name, module in model.named_modules():
        if "position" in module_name and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            return module.padding_idx + 1
    return 0


def load_model(
    name: str,
    auto_class: Any,
    mapping: Any,
    head: str,
    adapt: Callable[[Any], bool],
    dtype: torch.dtype | str | None = None,
    pad_token_id: Callable[[], int | None] | None = None,
    **options: Any,
) -> tuple[PreTrainedModel, list[str]]:
    """A pretrained model with a task's head, and the sorted names of the parameters that must be learned.

    Those are the parameters that loading reports as missing or of another size (freshly initialised from torch's
    global generator: seed it first), and a loaded head's when it was made for something else.

    Args:
        auto_class, mapping: transformers' Auto class and the model types that it knows.
        head: what such a model has, in words ("sequence classification head").
        adapt: sets the config's fields for the task, and says whether a loaded head was made for the same.
        dtype: None keeps the checkpoint's own.
        pad_token_id: gives the token that texts are padded with, for heads on decoders: they look for the last token that is
            another one.
        options: of ``from_pretrained``. Code from model repositories is never run.
    """
    config = load_config(name)
    path, place = _place(name)
    if type(config) not in mapping:
        raise InputError(
            f"{name} is a {config.model_type!r} model, for which transformers has no {head}; "
            f"name another model, such as {_known(mapping)}."
        )
    if place and "quantization_config" in options:
        raise InputError(
            f"{name} is in llama.cpp's format, which is loaded with whole weights and cannot be held in 4 or 8 bits; leave the flag out, "
            "or name the directory of the model that it was made from."
        )
    same = adapt(config)
    if dtype is not None:
        options["dtype"] = dtype
    if (saved := getattr(config, "quantization_config", None)) and "quantization_config" in options:
        del options["quantization_config"]  # else transformers says so itself, in a warning
        kind = saved.get("quant_method") if isinstance(saved, dict) else saved.quant_method
        note(
            f"The weights of {name} are saved in few bits already ({getattr(kind, 'value', kind)}), and stay as they are."
        )
    if "quantization_config" in options:
        options["quantization_config"].llm_int8_skip_modules = _kept_whole(auto_class, config)
    with _held_load_report(name) as report:
        model, loading = _loaded(name, auto_class, path, config=config, **place, **options)
    if "gguf_file" in place:  # its weights are plain ones by now, which Trainer would refuse as quantised
        model.is_quantized, model.hf_quantizer = False, None
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
    # set only now, because an embedding made with a padding token gives it no gradient, and here it may be the end of
    # sequence; and not for encoders, which may count positions from it
    if pad_token_id is not None and type(config) not in MODEL_FOR_MASKED_LM_MAPPING:
        model.config.pad_token_id = model.config.get_text_config().pad_token_id = pad_token_id()
    parameters = {key for key, _ in model.named_parameters(remove_duplicate=False)}
    body = {key for key in parameters if key.startswith(model.base_model_prefix + ".")}
    missing = parameters & set(loading["missing_keys"])
    mismatched = {key for key, *_ in loading["mismatched_keys"]}
    if body & mismatched or (body and body <= missing):
        what = min(body & mismatched, default="everything but the head")
        raise InputError(
            f"The weights of {name} do not fit its config.json ({what} differs); "
            "use the config.json that was saved with these weights."
        )
    # a head is always missing, and so is the pooler of masked language models; anything else is news
    if lacking := sorted(key for key in body & missing if ".pooler." not in key):
        for record in report:
            logging.getLogger(record.name).handle(record)
        note(
            f"The checkpoint has no values for {_first(lacking)} of a {config.model_type!r} model: they begin anew and are trained as a new "
            "head is. Check that config.json belongs to the weights."
        )
    own = f"{model.base_model_prefix}."
    unused = sorted(key for key in loading["unexpected_keys"] if key.startswith(own) and ".pooler." not in key)
    if unused:
        note(
            f"The checkpoint has {_first(unused)}, for which a {config.model_type!r} model has no place, and which are left out. Check that "
            "config.json belongs to the weights."
        )
    new = missing | (parameters & mismatched)
    if not same:
        of_head = parameters - body if body else {key for key in parameters if key.startswith(HEADS)}
        if not of_head | new:
            raise InputError(
                f"{name} has a {head} for something else, and in a {config.model_type!r} model reltune cannot tell it from the "
                "rest to make it anew; name a model without one."
            )
        _make_anew(model, of_head - new)
        new |= of_head
    return model, sorted(new)


def _loaded(name: str, auto_class: Any, path: str, **options: Any) -> tuple[Any, dict[str, Any]]:
    """The model and what loading reports, or the reason why there is none as an InputError."""
    try:
        return auto_class.from_pretrained(
            path, ignore_mismatched_sizes=True, output_loading_info=True, trust_remote_code=False, **options
        )
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except ImportError as error:
        raise InputError(
            f"{name} cannot be loaded without another package ({first_line(error)}); install it, or name the model in another form."
        ) from error
    except OSError as error:
        raise InputError(
            f"The weights of {name} cannot be found or read: "
            "it needs a complete model.safetensors; copy or download the model again."
        ) from error
    except Exception as error:  # safetensors, pickle and quantisation packages each raise their own
        raise InputError(
            f"The weights of {name} cannot be loaded ({first_line(error)}); "
            "if the files are damaged, copy or download the model again."
        ) from error


def _first(names: list[str]) -> str:
    return f"{names[0]} and {len(names) - 1:,} more" if len(names) > 1 else names[0]


@torch.no_grad()
def _make_anew(model: Any, names: set[str]) -> None:
    """Draw these parameters again, as in a model that comes from no checkpoint, from torch's global generator."""
    for owner in sorted({name.rpartition(".")[0] for name in names}):
        module = model.get_submodule(owner)
        for parameter in module.parameters(recurse=False):
            parameter._is_hf_initialized = False  # else transformers leaves it as it was loaded
        model._init_weights(module)


def _kept_whole(auto_class: Any, config: PreTrainedConfig) -> list[str]:
    """What is not held in few bits: heads, which may be new and are trained whole, as is a pooler."""
    with torch.device("meta"):
        model = auto_class.from_config(config)
    children = dict(model.named_children())
    if model.base_model_prefix in children:
        heads = [name for name in children if name != model.base_model_prefix]
    else:
        heads = [name for name, child in children.items() if child is model.get_output_embeddings()]
    return [*heads, "pooler"]


def class_names(config: PreTrainedConfig) -> list[str]:
    """A checkpoint's names for its classes, in the order of its outputs."""
    return [str(name) for _, name in sorted((config.id2label or {}).items())]


def means_the_same(config: PreTrainedConfig, problem_type: str | None) -> bool:
    """Whether a checkpoint's outputs were made for the same kind of answer: one class of several, or any number of them."""
    before = getattr(config, "problem_type", None)
    if problem_type == "single_label_classification":
        return before in (None, problem_type)
    return problem_type is None or before == problem_type


def _known(mapping: Any) -> str:
    """A few well-known model types among those of a mapping."""
    types = {config.model_type for config in mapping}
    famous = ("bert", "roberta", "modernbert", "llama", "qwen3", "gpt2", "t5", "bart", "vit", "convnextv2", "resnet")
    return ", ".join([name for name in famous if name in types][:3])


@contextlib.contextmanager
def _held_load_report(name: str) -> Iterator[list[logging.LogRecord]]:
    """Hold back transformers' table of missing parameters and, for local models, its progress bar.

    A new head is what is wanted here, not a warning. Every other log record passes.
    """
    held: list[logging.LogRecord] = []

    def keep(record: logging.LogRecord) -> bool:
        report = "LOAD REPORT" in record.getMessage()
        if report:
            held.append(record)
        return not report

    logger = logging.getLogger("transformers.modeling_utils")
    # the same switch governs download bars, which a user wants to see
    bar = Path(name).is_dir() and transformers_logging.is_progress_bar_enabled()
    logger.addFilter(keep)
    if bar:
        transformers_logging.disable_progress_bar()
    try:
        yield held
    finally:
        logger.removeFilter(keep)
        if bar:
            transformers_logging.enable_progress_bar()
