"""Rows that the library ``datasets`` holds: Parquet files, saved data sets, folders of images, data sets of the Hub.

They stay on the disk, memory-mapped; a row is read when it is asked for. Class numbers are given as their names, and
images as they were stored (path or bytes): a picture that cannot be decoded must not stop a pass over the rest.
"""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet
from transformers.utils.hub import is_offline_mode

from reltune.data.folders import IMAGE_SUFFIXES, kind_of_folder
from reltune.data.rows import SPLITS, Rows
from reltune.data.streams import StreamedRows
from reltune.errors import InputError, first_line, nearest
from reltune.names import DATASETS
from reltune.notes import note


def read_parquet(path: Path, streaming: bool = False) -> dict[str, Rows | StreamedRows]:
    """The rows of a Parquet file, as one split."""
    with _reading(str(path), "check that it is whole"):
        pyarrow.parquet.read_metadata(path)  # which says so in a moment, and without files of a cache
        data = datasets.load_dataset("parquet", data_files=str(path), split="train", streaming=streaming)
    return {"train": _rows(data, str(path))}


def read_folder(path: Path, streaming: bool = False) -> dict[str, Rows | StreamedRows]:
    """The splits of a directory: one that ``save_to_disk`` wrote, or images.

    Images lie in a folder for each label, under a folder for each split if there are several; or beside a
    ``metadata.csv`` or ``metadata.jsonl`` with a column ``file_name``, as the ``imagefolder`` of ``datasets`` has it.
    """
    kind = kind_of_folder(path)
    if kind == "saved":
        with _reading(str(path), "save it again with save_to_disk"):
            data = datasets.load_from_disk(str(path))
            if streaming:
                data = _each(data, lambda split: split.to_iterable_dataset())
    elif kind == "images":
        images = _check_images(path)
        splits = _split_folders(path)
        with _reading(str(path), "give each label a folder, or write a metadata.csv with file_name and label"):
            data = datasets.load_dataset("imagefolder", data_dir=str(path), data_files=splits, streaming=streaming)
        if images and not streaming and (rest := images - sum(map(len, data.values()))) > 0:
            note(f"{path.name}: {rest} images are in no row of the metadata file, and are left out.")
    else:
        with _reading(str(path), "check that its files are whole"):
            files = datasets.load_dataset_builder("parquet", data_dir=str(path)).config.data_files
            data = datasets.load_dataset("parquet", data_files=files, streaming=streaming)
        taken = {Path(file) for split in files.values() for file in split}
        if unused := sorted(file.name for file in path.rglob("*.parquet") if file.resolve() not in taken):
            note(f"{path.name}: not used, because their names say no split: {', '.join(map(repr, unused[:10]))}.")
    return _splits(data, str(path))


def _split_folders(path: Path) -> dict[str, str] | None:
    """Split -> its files, where all folders of a folder are called as splits are, in any case ("Training"); else None."""
    names = {folder.name: SPLITS.get(folder.name.casefold()) for folder in _visible(path) if folder.is_dir()}
    if not names or None in names.values() or len(set(names.values())) < len(names):
        return None
    return {str(split): f"{name}/**" for name, split in names.items()}


def _visible(path: Path) -> list[Path]:
    """What lies in a folder, but for what programs hide there."""
    return sorted(inner for inner in path.iterdir() if not inner.name.startswith((".", "__")))


def _check_images(path: Path) -> int:
    """The number of images of a folder that a metadata file should list; 0 where there is none. Says which files are not read.

    Raises:
        InputError: folders of labels hold folders of the same names, so that no one knows which are the labels.
    """
    files = [file for file in path.rglob("*") if file.is_file() and not _is_hidden(file.relative_to(path))]
    described = any(file.name in ("metadata.csv", "metadata.jsonl", "metadata.parquet") for file in files)
    images = [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES]
    others = Counter(
        file.suffix or file.name for file in files if file not in set(images) and not file.name.startswith("metadata.")
    )
    if others:
        shown = ", ".join(f"{count} of {suffix!r}" for suffix, count in others.most_common(5))
        note(f"{path.name}: not read, because they are no images of a known kind: {shown}.")
    above: dict[str, set[Path]] = {}
    for image in images:
        above.setdefault(image.parent.name, set()).add(image.parent.parent)
    splits = [name for name in above for parent in above[name] if parent.name.casefold() in SPLITS]
    twice = next((name for name, parents in above.items() if len(parents) > 1 and name not in splits), None)
    if twice is not None and not described:
        first, second, *_ = sorted(parent.name for parent in above[twice])
        raise InputError(
            f"{path} holds folders in folders, {first}/{twice} and {second}/{twice}, and does not say which names are the labels; put "
            "all images of a label into one folder, or write a metadata.csv with file_name and label."
        )
    return len(images) if described else 0


def _is_hidden(path: Path) -> bool:
    return path.name in ("Thumbs.db", "desktop.ini") or any(part.startswith((".", "__")) for part in path.parts)


def read_hub(name: str, config: str | None = None, streaming: bool = False) -> dict[str, Rows | StreamedRows]:
    """The splits of a data set of the Hugging Face Hub, from its cache where it is there."""
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name):  # the form of ids on the Hub
        raise InputError(f"dataset_name {name!r} is no id of a data set; pass files and directories as --train_file.")
    try:
        data = datasets.load_dataset(name, config, streaming=streaming)
    except Exception as error:  # of the network, of the Hub, of the files
        if "Config name is missing" in str(error):
            names = first_line(Exception(str(error).partition("available configs: ")[2])).strip("[]")
            raise InputError(
                f"dataset_name {name!r} has several configurations; name one with --dataset_config: {names}."
            ) from error
        offline = " while HF_HUB_OFFLINE is set" if is_offline_mode() else f" ({first_line(error)})"
        close = nearest(name, DATASETS)
        mend = (
            close if close.startswith("did") else "check the name, the network, and your login if access is restricted."
        )
        raise InputError(
            f"dataset_name {name!r} comes with no package and cannot be loaded from the Hugging Face Hub{offline}; {mend}"
        ) from error
    return _splits(data, name)


@contextlib.contextmanager
def _reading(source: str, mend: str) -> Iterator[None]:
    """Turn what ``datasets`` and pyarrow raise into InputError, and keep their progress bars off the terminal."""
    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    verbosity = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    except (MemoryError, InputError):
        raise
    except Exception as error:
        cause = error.__cause__ if isinstance(error, datasets.exceptions.DatasetGenerationError) else error
        if "BatchSize must be greater than 0" in str(
            cause or error
        ):  # what pyarrow says of a Parquet file without rows
            raise InputError(f"{source} has no rows of data; add some.") from error
        raise InputError(f"{source} cannot be read ({first_line(cause or error)}); {mend}.") from error
    finally:
        datasets.logging.set_verbosity(verbosity)
        if shown:
            datasets.enable_progress_bars()


def _each(data: Any, change: Callable[[Any], Any]) -> Any:
    return {name: change(split) for name, split in data.items()} if isinstance(data, dict) else change(data)


def _splits(data: Any, source: str) -> dict[str, Rows | StreamedRows]:
    """The splits under the names train, validation and test."""
    if not isinstance(data, dict):
        return {"train": _rows(data, source)}
    if len(data) == 1:
        return {"train": _rows(next(iter(data.values())), source)}
    known = {SPLITS[str(name)]: split for name, split in data.items() if str(name) in SPLITS}
    if "train" not in known:
        raise InputError(f"{source} has the splits {', '.join(map(str, data))} and none called train; rename one.")
    if unknown := [str(name) for name in data if str(name) not in SPLITS]:
        note(
            f"{Path(source).name}: not used: {'splits' if len(unknown) > 1 else 'split'} {', '.join(map(repr, unknown))}."
        )
    return {name: _rows(split, source) for name, split in known.items()}


def _rows(data: Any, source: str) -> Rows | StreamedRows:
    if isinstance(data, datasets.IterableDataset):
        if data.features is None:
            data = data._resolve_features()
        named = _naming(data.features)
        stored = _stored(data)
        return StreamedRows(
            lambda: enumerate(map(named, _decoded(stored, source)), start=1), source, list(data.features), unit="row"
        )
    return Rows(_Records(_stored(data), _naming(data.features), source), source, unit="row")


def _decoded(rows: Iterable[Any], source: str) -> Iterator[Any]:
    """The same rows."""
    with _decoding(source):
        yield from rows


@contextlib.contextmanager
def _decoding(source: str) -> Iterator[None]:
    """Turn what Python raises at bytes that are no text into InputError."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise InputError(
            f"{source} holds text that is not UTF-8, which Parquet and Arrow files are to be in ({error}); write it anew."
        ) from error


def _stored(data: Any) -> Any:
    """The data with images as they are stored, and with decimal numbers as plain ones."""
    for name, feature in data.features.items():
        if isinstance(feature, datasets.Image):
            data = data.cast_column(name, datasets.Image(decode=False))
        elif str(getattr(feature, "dtype", "")).startswith("decimal"):
            data = data.cast_column(name, datasets.Value("float64"))
    return data


class _Records(Sequence[dict[str, Any]]):
    """The rows of a Dataset with names for class numbers."""

    def __init__(self, data: Any, named: Callable[[dict[str, Any]], dict[str, Any]], source: str) -> None:
        self.data, self.named, self.source = data, named, source
        self.column_names = data.column_names

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: Any) -> Any:
        with _decoding(self.source):
            values = self.data[index]
        return self.named(values)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return map(self.named, _decoded(self.data, self.source))

    def mapped(self, convert: Callable[[dict[str, Any]], dict[str, Any]]) -> _Records:
        return _Records(self.data, lambda values: convert(self.named(values)), self.source)

    def select(self, indices: Sequence[int]) -> _Records:
        return _Records(self.data.select(indices), self.named, self.source)


def _naming(features: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """What puts names for class numbers into a row; a number below 0 means no class."""

    def one(value: int | None, names: list[str]) -> str | None:
        return None if value is None or value < 0 else names[value]

    single = {name: feature.names for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)}
    lists = {
        name: feature.feature.names
        for name, feature in features.items()
        if isinstance(getattr(feature, "feature", None), datasets.ClassLabel)
    }

    def named(values: dict[str, Any]) -> dict[str, Any]:
        changed: dict[str, Any] = {name: one(values[name], names) for name, names in single.items()}
        for name, names in lists.items():
            changed[name] = None if values[name] is None else [one(value, names) for value in values[name]]
        return values | changed

    return named if single or lists else dict
