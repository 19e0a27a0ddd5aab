"""Images as rows hold them: stored, not decoded, so that a bad one can be named."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reltune.errors import InputError, first_line

LONGEST = 1000  # characters of a path


def open_image(value: Mapping[str, Any] | str) -> Any:
    """A decoded RGB ``PIL.Image`` of ``{"path": …, "bytes": …}`` (either may be None) or of a path, turned as its EXIF data say.

    Grey values of more than 8 bits are scaled to 8, and transparent parts are white.

    Raises:
        InputError: Pillow is not installed.
        OSError, ValueError: no file, or nothing that Pillow can decode.
    """
    image = _pillow()
    data = value.get("bytes") if isinstance(value, Mapping) else None
    path = value.get("path") if isinstance(value, Mapping) else value
    with image.open(io.BytesIO(data) if data is not None else path) as opened:
        return _in_rgb(opened)


def _in_rgb(opened: Any) -> Any:
    from PIL import Image, ImageOps

    turned: Any = ImageOps.exif_transpose(opened)
    if turned.mode.startswith("I") or turned.mode == "F":  # Pillow would cut them off at 255
        import numpy as np

        values = np.asarray(turned, np.float64)
        low, high = _range(values.min(), values.max(), turned.mode)
        return Image.fromarray((255 * (values - low) / (high - low)).astype(np.uint8)).convert("RGB")
    if "A" in turned.getbands() or "transparency" in turned.info:
        turned = turned.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", turned.size, "white"), turned).convert("RGB")
    return turned.convert("RGB")


def _range(least: float, largest: float, mode: str) -> tuple[float, float]:
    """Which numbers are black and white: those of the usual depth that holds an image's least and largest one, else these two."""
    depths = {"F": (1.0, 255.0, 65535.0), "I": (255.0, 65535.0)}.get(mode, (65535.0,))
    usual = next((depth for depth in depths if least >= 0 and largest <= depth), None)
    return (0.0, usual) if usual else (float(least), float(largest) + (least == largest))


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
    except Exception as error:  # decoders raise whatever they stumble over
        if isinstance(value, str) and (len(value) > LONGEST or value.startswith(("http:", "https:", "data:"))):
            return f"a {column!r} that is a link or the image itself, and not the path of a file"
        path = value.get("path") if isinstance(value, Mapping) else None
        name = f" ({Path(path).parent.name}/{Path(path).name})" if path else ""
        missing = isinstance(error, FileNotFoundError)
        return f"a {column!r} {'that cannot be decoded, because its file is not there' if missing else 'that cannot be decoded'}{name}"
    return None


def located(value: Any, folder: Path) -> Any:
    """A path that leads to a file: as it is, from ``folder``, or with / for the \\ of Windows; other values as they are."""
    if not isinstance(value, str) or not value or len(value) > LONGEST or os.path.exists(value):
        return value
    ways = (folder / written for written in (value, value.replace("\\", "/")))
    return next((str(path.absolute()) for path in ways if path.is_file()), value)


def image_needed(value: Mapping[str, Any] | str) -> Any:
    """``open_image`` of an image that could be decoded when the data were read.

    Raises:
        InputError: it cannot any longer.
    """
    try:
        return open_image(value)
    except (OSError, ValueError) as error:
        path = value.get("path") if isinstance(value, Mapping) else value
        raise InputError(
            f"The image {path} cannot be opened any longer ({first_line(error)}). Put it back where it was when the run was made, or "
            "name the data's new place (--train_file, --validation_file, --test_file)."
        ) from error


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
