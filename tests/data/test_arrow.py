"""Rows through the library ``datasets``: what is read is what was written, and stays on the disk."""

from __future__ import annotations

import csv
import json
from decimal import Decimal
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from reltune.data.bad_rows import checked
from reltune.data.images import image_problem, open_image
from reltune.data.rows import Row, Rows
from reltune.data.sources import read_dataset, read_rows, read_splits
from reltune.errors import InputError
from reltune.notes import collecting

RECORDS = [{"text": f"第{n}", "label": n % 3, "tags": [n % 2, 1]} for n in range(12)]
FEATURES = datasets.Features(
    {
        "text": datasets.Value("string"),
        "label": datasets.ClassLabel(names=["差", "中", "好"]),
        "tags": datasets.List(datasets.ClassLabel(names=["O", "B-人"])),
    }
)
NAMED = [
    {"text": r["text"], "label": "差中好"[r["label"]], "tags": [["O", "B-人"][t] for t in r["tags"]]} for r in RECORDS
]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def data() -> datasets.Dataset:
    return datasets.Dataset.from_list(RECORDS, features=FEATURES)


def values(rows: Rows) -> list[dict]:
    return [row.values for row in rows]


def test_parquet_and_class_names(tmp_path: Path, data: datasets.Dataset) -> None:
    data.to_parquet(tmp_path / "data.parquet")
    rows = read_rows(tmp_path / "data.parquet")
    assert values(rows) == NAMED and rows.columns == ["text", "label", "tags"]
    assert [row.line for row in rows] == list(range(1, 13))
    assert rows[3] == Row(NAMED[3], 4) and rows[-1] == Row(NAMED[-1], 12)
    part = rows.select([5, 2])
    assert list(part) == [Row(NAMED[5], 6), Row(NAMED[2], 3)]
    assert list(rows[2:4]) == [Row(NAMED[2], 3), Row(NAMED[3], 4)]
    assert rows.records.data.cache_files  # memory-mapped


def test_no_class_is_none(tmp_path: Path, data: datasets.Dataset) -> None:
    record = {"text": "t", "label": -1, "tags": None}
    datasets.Dataset.from_list([record], features=FEATURES).save_to_disk(tmp_path / "saved")
    assert values(read_rows(tmp_path / "saved")) == [{"text": "t", "label": None, "tags": None}]


def test_saved_datasets(tmp_path: Path, data: datasets.Dataset) -> None:
    data.save_to_disk(tmp_path / "one")
    assert values(read_rows(tmp_path / "one")) == NAMED
    splits = {"train": data.select(range(8)), "dev": data.select(range(8, 10)), "test": data.select(range(10, 12))}
    datasets.DatasetDict({**splits, "unlabelled": data}).save_to_disk(tmp_path / "several")
    with collecting() as notes:
        found = read_splits(tmp_path / "several")
    assert notes == ["several: not used: split 'unlabelled'."]
    assert {name: values(rows) for name, rows in found.items()} == {
        "train": NAMED[:8],
        "validation": NAMED[8:10],
        "test": NAMED[10:],
    }
    with collecting():
        assert values(read_rows(tmp_path / "several", split="validation")) == NAMED[8:10]
    datasets.DatasetDict({"a": data, "b": data}).save_to_disk(tmp_path / "nameless")
    with pytest.raises(InputError, match="splits a, b and none called train"):
        read_rows(tmp_path / "nameless")
    datasets.DatasetDict({"train": data, "test": data}).save_to_disk(tmp_path / "two")
    with pytest.raises(InputError, match="train, test and none called validation"):
        read_rows(tmp_path / "two", split="validation")


def picture(path: Path, grey: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (4, 4), grey).save(path)


def test_folder_of_images(tmp_path: Path) -> None:
    for label in ("狗", "cat"):
        for grey in (0, 200):
            picture(tmp_path / "images" / label / f"{grey}.png", grey)
    (tmp_path / "images" / "cat" / "torn.png").write_bytes(b"\x89PNG\r\n\x1a\n torn")
    rows = read_rows(tmp_path / "images")
    assert rows.columns == ["image", "label"]
    found = {row.values["image"]["path"]: row.values["label"] for row in rows}
    assert {Path(path).parent.name: label for path, label in found.items()} == {"狗": "狗", "cat": "cat"}
    with pytest.raises(InputError, match=r"1 row|on row \d"):
        checked(rows, lambda row: image_problem(row.values, "image"))
    good = checked(rows, lambda row: image_problem(row.values, "image"), "skip")
    assert len(good) == 4 and list(good.skipped) == ["a 'image' that cannot be decoded (cat/torn.png)"]
    assert sorted(open_image(row.values["image"]).getpixel((0, 0))[0] for row in good) == [0, 0, 200, 200]


@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_images_with_metadata(tmp_path: Path, form: str) -> None:
    records = [{"file_name": f"{n}.png", "label": name} for n, name in enumerate(["好", "坏", "好"])]
    for record in records:
        picture(tmp_path / "images" / record["file_name"], 9)
    with (tmp_path / "images" / f"metadata.{form}").open("w", encoding="utf-8", newline="") as file:
        if form == "csv":
            writer = csv.DictWriter(file, ["file_name", "label"])
            writer.writeheader()
            writer.writerows(records)
        else:
            file.writelines(json.dumps(record) + "\n" for record in records)
    rows = read_rows(tmp_path / "images")
    assert sorted(row.values["label"] for row in rows) == sorted(["好", "坏", "好"])


def test_splits_of_images(tmp_path: Path) -> None:
    for split, count in (("train", 3), ("val", 2)):
        for label in "ab":
            for n in range(count):
                picture(tmp_path / "images" / split / label / f"{n}.png", n)
    assert {name: len(rows) for name, rows in read_splits(tmp_path / "images").items()} == {"train": 6, "validation": 4}


def test_image_problems() -> None:
    for value, words in ((None, "empty"), (5, "no image"), ({"path": "none.png", "bytes": None}, "cannot be decoded")):
        assert words in str(image_problem({"image": value}, "image"))


@pytest.mark.parametrize("streaming", [False, True])
def test_text_in_another_encoding(tmp_path: Path, streaming: bool) -> None:
    """Arrow does not look at the bytes of a column of texts before they are asked for."""
    words = [b"gut", "schön".encode("latin-1")]
    places = pyarrow.py_buffer(np.array([0, 3, 8], np.int32).tobytes())
    texts = pyarrow.StringArray.from_buffers(2, places, pyarrow.py_buffer(b"".join(words)))
    pyarrow.parquet.write_table(pyarrow.table({"text": texts, "label": [0, 1]}), tmp_path / "latin.parquet")
    rows = read_splits(tmp_path / "latin.parquet", streaming=streaming)["train"]
    with pytest.raises(InputError, match=r"latin\.parquet holds text that is not UTF-8"):
        list(rows)
    if not streaming:
        assert rows[0].values["text"] == "gut"
        with pytest.raises(InputError, match="not UTF-8"):
            rows[1]


@pytest.mark.parametrize("streaming", [False, True])
def test_what_cannot_be_read(tmp_path: Path, streaming: bool) -> None:
    (tmp_path / "torn.parquet").write_bytes(b"PAR1 torn")
    with pytest.raises(InputError, match=r"torn\.parquet cannot be read"):
        list(read_splits(tmp_path / "torn.parquet", streaming=streaming)["train"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="neither a data set that datasets saved nor images"):
        read_splits(tmp_path / "empty", streaming=streaming)
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "state.json").write_text("{}")
    with pytest.raises(InputError, match="saved cannot be read"):
        read_splits(tmp_path / "saved", streaming=streaming)
    with pytest.raises(InputError, match=r"none\.parquet does not exist"):
        read_splits(tmp_path / "none.parquet", streaming=streaming)


def test_hub_names() -> None:
    with pytest.raises(InputError, match=r"'imdb' comes with no package and cannot be loaded .* HF_HUB_OFFLINE is set"):
        read_dataset("imdb")
    with pytest.raises(InputError, match="did you mean 'bbc_news'"):
        read_dataset("bbc")
    with pytest.raises(InputError, match="is no id of a data set; pass files and directories as --train_file"):
        read_dataset("../data.csv")
    with pytest.raises(InputError, match="bbc_news has no use for dataset_config"):
        read_dataset("bbc_news", "sports")


def test_streamed_rows_are_the_same(tmp_path: Path, data: datasets.Dataset) -> None:
    data.to_parquet(tmp_path / "data.parquet")
    data.save_to_disk(tmp_path / "saved")
    for name in ("data.parquet", "saved"):
        rows = read_splits(tmp_path / name, streaming=True)["train"]
        assert rows.columns == ["text", "label", "tags"]
        assert [row.values for row in rows] == NAMED == [row.values for row in rows], "a second pass gives them again"


@pytest.mark.parametrize("streaming", [False, True])
def test_a_directory_of_parquet_files(tmp_path: Path, data: datasets.Dataset, streaming: bool) -> None:
    """As data sets of the Hub lie on the disk."""
    folder = tmp_path / "snapshot" / "data"
    folder.mkdir(parents=True)
    for name, rows in (
        ("train-00000-of-00002", range(4)),
        ("train-00001-of-00002", range(4, 8)),
        ("test-00000-of-00001", [9]),
        ("more", [10]),
    ):
        data.select(rows).to_parquet(folder / f"{name}.parquet")
    with collecting() as notes:
        splits = read_splits(tmp_path / "snapshot", streaming=streaming)
    assert notes == ["snapshot: not used, because their names say no split: 'more.parquet'."]
    assert {name: [row.values for row in rows] for name, rows in splits.items()} == {
        "train": NAMED[:8],
        "test": [NAMED[9]],
    }


def test_nested_lists_and_missing_values(tmp_path: Path) -> None:
    rows = [
        {"messages": [{"role": "user", "content": "a", "name": None}], "label": None, "scores": [[1], []]},
        {"messages": [{"role": "user", "content": None, "name": "b"}], "label": 1.0, "scores": None},
    ]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "data.parquet")
    assert values(read_rows(tmp_path / "data.parquet")) == rows


def test_decimal_numbers_are_plain_ones(tmp_path: Path) -> None:
    table = pyarrow.table({"label": pyarrow.array([Decimal("1.50"), None])})
    pyarrow.parquet.write_table(table, tmp_path / "data.parquet")
    assert values(read_rows(tmp_path / "data.parquet")) == [{"label": 1.5}, {"label": None}]


def test_a_parquet_file_without_rows(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(
        pyarrow.table({"label": pyarrow.array([], pyarrow.string())}), tmp_path / "data.parquet"
    )
    with pytest.raises(InputError, match="has no rows of data"):
        read_rows(tmp_path / "data.parquet")
