"""Images of every kind that files have: what reaches the model, and what is said of files that hold none."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image

from reltune.data.images import image_needed, image_problem, located, open_image
from reltune.data.sources import read_splits
from reltune.errors import InputError
from reltune.notes import collecting

GREY = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def stored(image: Any, kind: str = "PNG", **options: Any) -> dict[str, Any]:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return {"bytes": buffer.getvalue(), "path": None}


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (GREY, "PNG"),
        (GREY.astype(np.uint16) * 257, "PNG"),
        (GREY.astype(np.int32) * 257, "TIFF"),
        (GREY.astype(np.int32), "TIFF"),
        (GREY.astype(np.float32) / 255, "TIFF"),
        (GREY.astype(np.float32), "TIFF"),
    ],
)
def test_grey_values_of_any_depth(values: np.ndarray, kind: str) -> None:
    opened = open_image(stored(Image.fromarray(values), kind))
    assert opened.mode == "RGB"
    assert np.abs(np.asarray(opened, int) - GREY[..., None]).max() <= 1


def test_what_is_transparent_is_white() -> None:
    pixels = np.zeros((8, 8, 4), np.uint8)
    pixels[:4, :, 3] = 255  # the upper half is black
    for image in (Image.fromarray(pixels), Image.fromarray(pixels).convert("LA")):
        found = np.asarray(open_image(stored(image)))
        assert found[:4].max() == 0 and found[4:].min() == 255


def test_pictures_are_turned_as_cameras_say() -> None:
    exif = Image.Exif()
    exif[0x112] = 6  # a quarter to the right
    assert open_image(stored(Image.fromarray(GREY[:, :4]), "JPEG", exif=exif)).size == (8, 4)


def test_paths(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.png").write_bytes(stored(Image.fromarray(GREY))["bytes"])
    path = str(tmp_path / "a" / "1.png")
    for written in (path, "a/1.png", "a\\1.png"):
        assert located(written, tmp_path) == path
    assert located("a/2.png", tmp_path) == "a/2.png" and located({"bytes": b""}, tmp_path) == {"bytes": b""}


def test_what_is_no_file(tmp_path: Path) -> None:
    for value, words in (
        (str(tmp_path / "no.png"), "a 'image' that cannot be decoded, because its file is not there"),
        ({"path": str(tmp_path / "left" / "no.png"), "bytes": None}, "its file is not there (left/no.png)"),
        ("https://example.org/a.png", "a link or the image itself"),
        ("data:image/png;base64,iVBO", "a link or the image itself"),
        ("iVBO" * 300, "a link or the image itself"),
        ({"path": "left/a.png", "bytes": b"no image"}, "that cannot be decoded (left/a.png)"),
    ):
        assert words in str(image_problem({"image": value}, "image"))


def test_an_image_that_was_moved_away(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"The image .*no\.png cannot be opened any longer.*Put it back"):
        image_needed({"path": str(tmp_path / "no.png"), "bytes": None})


def folder(path: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(stored(Image.fromarray(GREY + number))["bytes"] if name.endswith(".png") else b"x")
    return path


def test_splits_called_as_people_call_them(tmp_path: Path) -> None:
    names = [
        f"{split}/{label}/{number}.png" for split in ("Training", "Testing") for label in "ab" for number in (1, 2)
    ]
    splits = read_splits(folder(tmp_path / "images", *names))
    assert {name: [row.values["label"] for row in rows] for name, rows in splits.items()} == {
        "train": ["a", "a", "b", "b"],
        "test": ["a", "a", "b", "b"],
    }


def test_files_of_a_folder_that_are_not_read(tmp_path: Path) -> None:
    path = folder(
        tmp_path / "images", "a/1.png", "b/2.png", "b/3.heic", "b/.hidden", "__MACOSX/b/._2.png", "a/Thumbs.db"
    )
    with collecting() as notes:
        assert len(read_splits(path)["train"]) == 2
    assert notes == ["images: not read, because they are no images of a known kind: 1 of '.heic'."]


def test_images_without_a_row(tmp_path: Path) -> None:
    path = folder(tmp_path / "images", "1.png", "2.png", "3.png")
    (path / "metadata.csv").write_text("file_name,label\n1.png,a\n2.png,b\n")
    with collecting() as notes:
        assert len(read_splits(path)["train"]) == 2
    assert notes == ["images: 1 images are in no row of the metadata file, and are left out."]


def test_folders_in_folders(tmp_path: Path) -> None:
    path = folder(tmp_path / "images", "left/day/1.png", "right/day/2.png", "left/night/3.png")
    with pytest.raises(InputError, match=r"left/day and right/day, and does not say which names are the labels"):
        read_splits(path)
