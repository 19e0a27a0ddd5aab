"""A batch that a run stopped at, kept for a look: its tensors, and its texts to read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from reltune.files import whole_directory, write_json

STOPPED_AT = "stopped_at"


def keep_batch(run: Path, batch: Any, processor: Any, why: str) -> Path | None:
    """Write ``run/stopped_at/batch.safetensors`` with the batch's tensors, and ``batch.json`` with ``why`` and its texts. Gives the
    directory; None where the batch has no tensors, or nothing can be written there."""
    named = batch.items() if isinstance(batch, Mapping) else enumerate(batch) if isinstance(batch, tuple | list) else ()
    tensors = {str(key): value.detach().cpu().contiguous().clone() for key, value in named if isinstance(value, Tensor)}
    if not tensors or not run.is_dir():
        return None
    try:
        with whole_directory(run / STOPPED_AT) as partial:
            save_file(tensors, partial / "batch.safetensors")
            write_json(partial / "batch.json", {"why": why, "texts": _texts(tensors.get("input_ids"), processor)})
    except Exception:  # what stopped the run matters more
        return None
    return run / STOPPED_AT


def _texts(ids: Tensor | None, processor: Any) -> list[str]:
    if ids is None or not hasattr(processor, "batch_decode"):
        return []
    return [str(text) for text in processor.batch_decode(ids.flatten(0, -2).tolist())]
