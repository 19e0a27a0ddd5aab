"""What lies in a directory of runs. Nothing outside of it is read or written: names are resolved, links included, before they are used."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from pathlib import Path
from typing import Any

from reltune.data.text_files import TEXT_SUFFIXES
from reltune.errors import InputError, first_line
from reltune.files import check_writable, read_json
from reltune.metrics import METRICS
from reltune.report import numbers
from reltune.runs.comparison.directory import ComparisonDirectory
from reltune.runs.directory import RunDirectory

OWN = ".studio"  # what the studio keeps of its jobs
UPLOADS = "data"  # files that were dropped on the page
DEPTH = 3  # levels below the directory, in which runs are looked for
# What damaged files raise when they are read.
DAMAGE = (InputError, OSError, ValueError, KeyError, TypeError, AttributeError, IndexError)
PARTS = (
    "relevance",
    "plan",
    "adapter",
    "task.json",
    "all_results.json",
)  # of a run, one of which makes a directory look like one
DATA = (*TEXT_SUFFIXES, ".parquet")


@dataclasses.dataclass(frozen=True)
class Found:
    """A run or a comparison: its path below the directory, how far it came, and its main result.

    Attributes:
        kind: "run" or "comparison"; "damaged" where it cannot be read, and ``problem`` then says why.
        stage: what has to be done next, "" where nothing has.
    """

    name: str
    kind: str
    stage: str = ""
    model: str = ""
    method: str = ""
    result: str = ""
    trained: str = ""
    problem: str = ""


class Place:
    """The directory of runs that the studio was started with."""

    def __init__(self, root: str | os.PathLike) -> None:
        """Raises InputError for one that does not exist or cannot be written."""
        self.path = Path(root)
        if not self.path.exists():
            raise InputError(
                f"RUNS_DIR {root} does not exist; make it (mkdir {root}), or name the directory that your runs are in."
            )
        if not self.path.is_dir():
            raise InputError(f"RUNS_DIR {root} is a file; name the directory that your runs are in.")
        check_writable(self.path)
        if (self.path / "config.yaml").is_file() and (self.path / "relevance").is_dir():
            raise InputError(
                f"RUNS_DIR {root} is a run itself; name the directory that it lies in: {self.path.absolute().parent}."
            )
        self._root = self.path.resolve()

    def inside(self, name: str) -> Path:
        """The path of something in the directory. Raises InputError for a name that leads out of it."""
        path = self.path / name
        try:
            below = path.resolve().relative_to(self._root)
        except (ValueError, OSError, RuntimeError) as error:  # outside; too long; a link to itself
            raise InputError(f"{name!r} leads out of {self.path}; name something in it.") from error
        if "\0" in name or not below.parts:
            raise InputError(f"{name!r} is no name in {self.path}.")
        return path

    def new(self, name: str) -> Path:
        """Where a new run of this name is written."""
        if not re.fullmatch(r"\w[\w.-]{0,80}(/\w[\w.-]{0,80}){0,2}", name):
            raise InputError(f"{name!r} is no name for a run; write letters, digits, and - _ . between them.")
        return self.inside(name)

    def name_of(self, path: Path) -> str:
        return path.relative_to(self.path).as_posix()

    def found(self) -> list[Found]:
        """Every run and comparison, by name; damaged ones with what is wrong."""
        return sorted(self._below(self.path, DEPTH), key=lambda one: one.name)

    def _below(self, folder: Path, levels: int) -> list[Found]:
        found: list[Found] = []
        try:
            children = [child for child in folder.iterdir() if not child.name.startswith(".") and child.is_dir()]
        except OSError:
            return found
        for child in children:
            name = self.name_of(child)
            try:
                self.inside(name)
            except InputError:  # a link to somewhere else
                continue
            if one := self._read(child, name):
                found.append(one)
            elif levels > 1 and not child.is_symlink():
                found += self._below(child, levels - 1)
        return found

    def _read(self, path: Path, name: str) -> Found | None:
        comparison, run = ComparisonDirectory(path), RunDirectory(path)
        try:
            if comparison.config_file.is_file():
                return _comparison(comparison, name)
            if run.config_file.is_file():
                return _run(run, name)
        except DAMAGE as error:
            return Found(name, "damaged", problem=sentence(error))
        if any((path / part).exists() for part in PARTS) and not (path / "config.json").is_file():
            return Found(
                name,
                "damaged",
                problem=f"{path} has no config.yaml; it was not written to its end, or files were taken away.",
            )
        return None

    def data(self) -> list[str]:
        """The files that can be trained on: those of a known format here and one level below, outside of runs."""
        runs = {one.name for one in self.found()}
        folders = [self.path, *(child for child in sorted(self.path.iterdir()) if child.is_dir())]
        found = []
        for folder in folders:
            if folder != self.path and (
                folder.name.startswith(".") or self.name_of(folder) in runs or (folder / "config.json").is_file()
            ):
                continue
            try:
                found += [
                    self.name_of(file)
                    for file in sorted(folder.iterdir())
                    if file.suffix.lower() in DATA and file.is_file()
                ]
            except OSError:
                continue
        return [name for name in found if self._is_inside(name)]

    def models(self) -> list[str]:
        """The models that lie here, and those of the runs: the person who made these has named them."""
        here = [
            str(folder)
            for folder in sorted(self.path.iterdir())
            if (folder / "config.json").is_file() and self._is_inside(self.name_of(folder))
        ]
        return list(dict.fromkeys([*here, *(one.model for one in self.found() if one.model)]))

    def model(self, name: str, known: list[str]) -> str:
        """A model that may be loaded: a ``known`` one, one in this directory, or an id on the Hub.

        Raises InputError for another path.
        """
        if not name:
            raise InputError("no model is named; choose one, or write its id on the Hub.")
        if name in known:
            return name
        if Path(name).exists() or Path(name).is_absolute() or ".." in Path(name).parts:
            path = Path(name).resolve()
            if not path.is_relative_to(self._root):
                raise InputError(
                    f"the model {name!r} lies outside of {self.path}; start the studio with --model {name}, or put it there."
                )
        return name

    def keep(self, file: str | os.PathLike) -> str:
        """Copy a file that was dropped on the page into the directory; its name there. One of the same name is not replaced."""
        source = Path(file)
        stem = re.sub(r"[^\w.-]", "_", source.stem).lstrip(".") or "data"
        suffix = source.suffix.lower()
        if suffix not in DATA:
            raise InputError(f"{source.name} has the unknown suffix {suffix!r}; use one of {', '.join(DATA)}.")
        content = source.read_bytes()
        folder = self.inside(UPLOADS)
        folder.mkdir(exist_ok=True)
        for count in range(1, 1000):
            target = folder / (f"{stem}{suffix}" if count == 1 else f"{stem}-{count}{suffix}")
            self.inside(self.name_of(target))
            if target.is_file() and target.read_bytes() == content:
                return self.name_of(target)
            if not target.exists():
                target.write_bytes(content)
                return self.name_of(target)
        raise InputError(f"{folder} has a thousand files called {stem}; remove some.")

    def _is_inside(self, name: str) -> bool:
        try:
            self.inside(name)
        except InputError:
            return False
        return True


def _run(run: RunDirectory, name: str) -> Found:
    directory, config = RunDirectory.open(run.path)
    results = _results(directory.results)
    stage = directory.next_stage(config) or ""
    trained = results.get("trainable_parameters")
    if stage in ("report", "export") and results:
        stage = ""
    return Found(
        name, "run", stage, config.model_name_or_path, config.method, main_result(results), numbers.count(trained)
    )


def _comparison(directory: ComparisonDirectory, name: str) -> Found:
    from reltune.config.comparison import ComparisonConfig

    config = ComparisonConfig.load(directory.config_file)
    done = directory.record.is_file()
    if done:
        read_json(directory.record)["tables"]
    return Found(name, "comparison", "" if done else "comparison", str(config.shared.get("model_name_or_path", "")))


def _results(path: Path) -> dict[str, Any]:
    values = read_json(path) if path.is_file() else {}
    if not isinstance(values, dict):
        raise InputError(f"{path} holds no results; run `reltune evaluate` again.")
    return values


def main_result(results: dict[str, Any]) -> str:
    """The first metric on test data, else on validation data, in words."""
    for prefix, split in (("test_", "test"), ("eval_", "validation")):
        for name in numbers.measured([results], prefix):
            return f"{METRICS[name].label} ({split}) {numbers.metric(name, results[prefix + name])}"
    return ""


def sentence(error: Exception) -> str:
    """What is wrong with files that cannot be read."""
    return str(error) if isinstance(error, InputError) else f"it cannot be read ({first_line(error)})."


def history_of(run: RunDirectory) -> list[dict[str, Any]]:
    """What the training has logged so far, of one that goes on too. A line that is being written is left out."""
    if run.log.is_file():
        entries = []
        for line in run.log.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            if isinstance(entry, dict):
                entries.append(entry)
        return entries
    state = run.path / "trainer_state.json"
    history = read_json(state).get("log_history", []) if state.is_file() else []
    return [entry for entry in history if isinstance(entry, dict)]
