"""What the Hugging Face Hub has of a model or data set that is not here, asked before torch, transformers and datasets are loaded."""

from __future__ import annotations

import os
from pathlib import Path

OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")


def model_problem(name: str) -> str | None:
    """Why a model that is no local file or directory cannot be had; None where it was downloaded before, or may be."""
    found = None if os.path.exists(name) else _unavailable(name, "model", "config.json")
    return found and f"{name!r} is no local directory {found[0]}; check the path or id, {found[1]}."


def dataset_problem(name: str, close: str = "") -> str | None:
    """Why a data set that no package has cannot be had; None where it was downloaded before, or may be. ``close``: a sentence that names
    those that the name looks like."""
    found = None if os.path.exists(name) else _unavailable(name, "dataset", "README.md")
    return (
        found and f"dataset_name {name!r} comes with no package {found[0]}; {close or f'check the name, {found[1]}.'}"
    )


def _unavailable(name: str, kind: str, file: str) -> tuple[str, str] | None:
    """Why, and what to look at.

    The Hub is asked once, for one file. An answer that is late, or a fault of the server's, says nothing: what loads it tries again.
    """
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, is_offline_mode
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError, RepositoryNotFoundError

    what = {"model": "model", "dataset": "data set"}[kind]
    unknown = (f"and no {what} of the Hugging Face Hub that can be loaded", "and your login if access is restricted")
    if _kept(name, kind, Path(constants.HF_HUB_CACHE), Path(constants.HF_HOME)):
        return None
    if is_offline_mode():
        variable = next((variable for variable in OFFLINE if os.environ.get(variable)), OFFLINE[0])
        why = f"and was not downloaded before, and {variable} is set"
        return why, f"or unset {variable} to load it from the Hugging Face Hub"
    try:
        get_hf_file_metadata(hf_hub_url(name, file, repo_type=kind))
    except (RepositoryNotFoundError, HFValidationError):
        return unknown
    except EntryNotFoundError:
        return unknown if kind == "model" else None
    except Exception as error:
        if type(error).__name__ in ("ConnectError", "ProxyError"):  # httpx's or httpx2's, whichever huggingface_hub has
            return f"and was not downloaded before, and {constants.ENDPOINT} cannot be reached", "and the network"
    return None


def _kept(name: str, kind: str, hub: Path, home: Path) -> bool:
    """Whether anything of it was downloaded; of data sets also what ``datasets`` has made of them."""
    if (hub / f"{kind}s--{name.replace('/', '--')}" / "snapshots").is_dir():
        return True
    made = Path(os.environ.get("HF_DATASETS_CACHE") or home / "datasets")
    return kind == "dataset" and (made / name.replace("/", "___")).is_dir()
