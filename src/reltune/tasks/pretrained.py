"""A pretrained model's config, or the reason why there is none, in words."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

from transformers import AutoConfig, PreTrainedConfig
from transformers.utils.hub import is_offline_mode

from reltune.records import InputError


def first_line(error: Exception) -> str:
    line = str(error).strip().partition("\n")[0].rstrip(".: ")
    return textwrap.shorten(line, 160, placeholder=" …") or type(error).__name__


def load_config(name: str) -> PreTrainedConfig:
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=False)
    except Exception as error:
        raise InputError(_why_no_config(name, error)) from error


def _why_no_config(name: str, error: Exception) -> str:
    folder = Path(name)
    if "trust_remote_code" in str(error):
        return (
            f"{name} needs Python code of its own, which reltune does not run; "
            "name a model whose architecture transformers itself has."
        )
    if folder.is_file():
        return f"{name} is a file; name the model's directory."
    if folder.is_dir() and (folder / "config.json").is_file():
        return (
            f"{folder / 'config.json'} does not describe a model that this version of transformers knows "
            f"({first_line(error)}). Copy or download the model again, or update transformers."
        )
    if folder.is_dir() and (folder / "adapter_config.json").is_file():
        return f"{name} is an adapter, not a model; name the base model it was trained on."
    if folder.is_dir():
        return f"{name} has no config.json, so it is no model; name a directory that save_pretrained wrote."
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name):  # the form of ids on the Hub
        return f"The model directory {name} does not exist; check the path."
    offline = " while HF_HUB_OFFLINE is set" if is_offline_mode() else ""
    return (
        f"{name!r} is no local directory and cannot be loaded from the Hugging Face Hub{offline}; "
        "check the path or id, the network, and your login if access is restricted."
    )
