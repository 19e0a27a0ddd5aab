"""Rows of whatever a user names as data: a file, a directory, a data set of a package or of the Hub."""

from __future__ import annotations

import os
from pathlib import Path

from reltune.data.packages import CORPORA
from reltune.data.rows import Rows
from reltune.data.streams import StreamedRows
from reltune.data.text_files import check_text_file, read_text_file, stream_text_file
from reltune.errors import InputError


def read_rows(source: str | os.PathLike, encoding: str = "utf-8", split: str = "train") -> Rows:
    """The rows of a file or directory in any known format, with all columns.

    Args:
        source: a text file or Parquet file, a directory that ``datasets`` saved, a folder of images.
        encoding: the encoding of text files.
        split: which split to take if the source has several: "train", "validation" or "test".

    Raises:
        InputError: the source cannot be read; the message says where and why.
    """
    splits = read_splits(source, encoding)
    if len(splits) > 1 and split not in splits:
        raise InputError(f"{source} has the splits {', '.join(splits)} and none called {split}; name another file.")
    rows = splits[split] if split in splits else splits["train"]
    assert isinstance(rows, Rows)
    return rows


def read_splits(
    source: str | os.PathLike, encoding: str = "utf-8", streaming: bool = False
) -> dict[str, Rows | StreamedRows]:
    """The splits of a file or directory by name; a source without splits is all "train".

    Args:
        streaming: whether to read rows only when they are asked for, and keep nothing on the disk.
    """
    path = Path(source)
    if path.is_dir():
        from reltune.data.arrow import read_folder

        return dict(read_folder(path, streaming))
    if path.suffix.lower() == ".parquet" and path.exists():
        from reltune.data.arrow import read_parquet

        return dict(read_parquet(path, streaming))
    check_text_file(path)
    if streaming:
        return {"train": StreamedRows(stream_text_file(path, encoding), str(path))}
    return dict(read_text_file(path, encoding))


def read_dataset(
    name: str, config: str | None = None, path: str | None = None, streaming: bool = False
) -> dict[str, Rows | StreamedRows]:
    """The splits of a data set by its name: one of ``CORPORA``, else one of the Hugging Face Hub.

    Args:
        config: which variant to read.
        path: where the files of one of ``CORPORA`` are, if its package does not bring them.
    """
    if name in CORPORA:
        return {"train": CORPORA[name].read(config, path)}
    from reltune.data.arrow import read_hub

    return dict(read_hub(name, config, streaming))
