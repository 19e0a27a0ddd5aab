"""Images as rows hold them: stored, not decoded, so that a bad one can be named."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

from reltune.errors import InputError


def open_image(value: Mapping[str, Any] | str) -> Any:
    """A decoded RGB ``PIL.Image`` of ``{"path": …, "bytes": …}`` (either may be None) or of a path.

    Raises:
        InputError: Pillow is not installed.
        OSError, ValueError: no file, or nothing that Pillow can decode.
    """
    image = _pillow()
    data = value.get("bytes") if isinstance(value, Mapping) else None
    path = value.get("path") if isinstance(value, Mapping) else value
    with image.open(io.BytesIO(data) if data is not None else path) as opened:
        return opened.convert("RGB")


def image_problem(values: Mapping[str, Any], column: str) -> str | None:
    """A phrase if the column holds no image that can be decoded: for a task's own rule. Reads the whole image."""
    value = values.get(column)
    if value is None or value == "":
        return f"an empty {column!r}"
    if not isinstance(value, Mapping | str):
        return f"a {column!r} that is no image"
    try:
        open_image(value)
    except InputError:
        raise
    except Exception:  # decoders raise whatever they stumble over
        return f"a {column!r} that cannot be decoded"
    return None


def png(pixels: Any) -> bytes:
    """A PNG file of grey values, (height, width) of uint8."""
    buffer = io.BytesIO()
    _pillow().fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise InputError(
            'Images need the package Pillow, which is not installed; run: pip install "reltune[images]"'
        ) from error
    return Image
