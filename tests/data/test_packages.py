"""Data sets inside packages."""

from __future__ import annotations

import importlib
import shutil
import tarfile
import types
import zipfile
from collections import Counter
from pathlib import Path

import pytest
from sklearn.datasets import load_digits

from reltune.data.columns import guess_task
from reltune.data.images import open_image
from reltune.data.packages import CORPORA
from reltune.data.sources import read_dataset
from reltune.errors import InputError
from reltune.names import DATASETS


def test_every_set_says_where_it_is_from() -> None:
    assert tuple(CORPORA) == DATASETS
    assert all(
        corpus.note.startswith("Data: ") and "licen" in corpus.note.lower() + "cc by licence"
        for corpus in CORPORA.values()
    )


def test_digits() -> None:
    rows = read_dataset("digits")["train"]
    data = load_digits()
    assert guess_task(rows.columns, rows)[0] == "image_classification"
    assert Counter(row.values["label"] for row in rows) == Counter(data.target.tolist())
    for index in (0, 1000, 1796):
        image = open_image(rows[index].values["image"])
        grey = [image.getpixel((x, y))[0] for y in range(8) for x in range(8)]
        assert image.size == (8, 8)
        assert [round(value * 16 / 255) for value in grey] == data.images[index].ravel().tolist()


SNIPPETS = "1_1\t-0.9\tno picture, scrolling b/w.\r\n1_2\t2.3\tgreat\tplayer — 好\r\n2_1\t0.0\tit is a player.\r\n"
EXPECTED = [
    {"text": "no picture, scrolling b/w.", "label": -0.9, "sentiment": "negative"},
    {"text": "great\tplayer — 好", "label": 2.3, "sentiment": "positive"},
    {"text": "it is a player.", "label": 0.0, "sentiment": "neutral"},
]


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """The layout of vaderSentiment 0.5's source package: an archive in a zip."""
    inner = tmp_path / "hutto_ICWSM_2014"
    inner.mkdir()
    (inner / "amazonReviewSnippets_GroundTruth.txt").write_bytes(SNIPPETS.encode())
    with tarfile.open(tmp_path / "inner.tar.gz", "w:gz") as archive:
        archive.add(inner, "hutto_ICWSM_2014")
    with zipfile.ZipFile(tmp_path / "vaderSentiment-0.5.zip", "w") as archive:
        archive.write(tmp_path / "inner.tar.gz", "vaderSentiment-0.5/additional_resources/hutto_ICWSM_2014.tar.gz")
        archive.writestr("vaderSentiment-0.5/PKG-INFO", "")
    shutil.rmtree(inner)
    return tmp_path / "vaderSentiment-0.5.zip"


def test_rated_sentences(package: Path, tmp_path: Path) -> None:
    for place in (package, tmp_path / "inner.tar.gz", tmp_path):
        rows = read_dataset("amazon_reviews", path=str(place))["train"]
        assert [row.values for row in rows] == EXPECTED
    assert guess_task(rows.columns, rows) == ("regression", {"text": "text", "label": "label"})
    assert guess_task(rows.columns, rows, label_column="sentiment")[0] == "sequence_classification"


def test_rated_sentences_that_are_not_there(package: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"pip download.*--dataset_path"):
        read_dataset("tweets")
    with pytest.raises(InputError, match=r"holds no tweets_GroundTruth\.txt"):
        read_dataset("tweets", path=str(package))
    with pytest.raises(InputError, match="does not exist"):
        read_dataset("tweets", path=str(tmp_path / "none"))
    (tmp_path / "torn.zip").write_bytes(b"PK torn")
    with pytest.raises(InputError, match=r"torn\.zip cannot be unpacked"):
        read_dataset("tweets", path=str(tmp_path / "torn.zip"))


def test_reasoning_gym(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a module with its interface; the package itself brings more than a test needs."""

    def create_dataset(name: str, size: int, seed: int, max_terms: int = 6) -> list[dict]:
        assert (name, seed) == ("chain_sum", 42)
        return [{"question": f"{n} + {max_terms}", "answer": n + max_terms} for n in range(size)]

    module = types.SimpleNamespace(
        create_dataset=create_dataset, factory=types.SimpleNamespace(DATASETS={"chain_sum": None, "basic": None})
    )
    import_module = importlib.import_module
    monkeypatch.setattr(
        importlib, "import_module", lambda name: module if name == "reasoning_gym" else import_module(name)
    )
    rows = read_dataset("reasoning_gym", "chain_sum, max_terms=3, size=2")["train"]
    assert [row.values for row in rows] == [
        {"prompt": "0 + 3", "completion": "3"},
        {"prompt": "1 + 3", "completion": "4"},
    ]
    assert len(read_dataset("reasoning_gym", "chain_sum")["train"]) == 3000
    for config, words in {
        None: "is no task of reasoning-gym; known: ",
        "chain_sums": "did you mean 'chain_sum'",
        "chain_sum,size": "'size'; write settings as name=number",
        "chain_sum,terms=3": "cannot be generated.*'terms'",
    }.items():
        with pytest.raises(InputError, match=words):
            read_dataset("reasoning_gym", config)


def test_a_package_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(InputError, match="pip install reasoning-gym"):
        read_dataset("reasoning_gym", "chain_sum")
