"""Command lines of reltune, as lists of words: what the studio starts, and what it shows for a terminal."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from reltune.config.run_config import FIELDS
from reltune.config.training_fields import training_field_names

STARTS = ("run", "analyze", "compare")  # commands that make something new
CONTINUES = ("select", "tune", "evaluate", "report")  # commands on a run that is there


def new(command: str, output_dir: Path, fields: Mapping[str, Any], overwrite: bool = False) -> list[str]:
    """The words of a command that makes a run or a comparison, with the fields that are given."""
    assert command in STARTS
    return [command, f"--output_dir={output_dir}", *_flags(fields), *_overwrite(overwrite)]


def further(command: str, run: Path, fields: Mapping[str, Any], overwrite: bool = False) -> list[str]:
    """The words of a command on a run."""
    assert command in CONTINUES
    return [command, str(run), *_flags(fields), *_overwrite(overwrite)]


def _flags(fields: Mapping[str, Any]) -> list[str]:
    """``--name=value``, so that no value can be taken for a flag. What is None or empty is left out; of a list each value has its flag."""
    known = {field.name for field in FIELDS} | set(training_field_names())
    words = []
    for name, value in fields.items():
        assert name in known, name
        values = value if isinstance(value, list | tuple) else [value]
        words += [
            f"--{name}={one:g}" if isinstance(one, float) else f"--{name}={one}"
            for one in values
            if one not in (None, "")
        ]
    return words


def _overwrite(overwrite: bool) -> list[str]:
    return ["--overwrite_output_dir"] if overwrite else []


def shown(words: Sequence[str]) -> str:
    """For a terminal."""
    return shlex.join(["reltune", *words])


def started(words: Sequence[str]) -> list[str]:
    """For the system, which gets them without a shell."""
    return [sys.executable, "-m", "reltune", *words]
