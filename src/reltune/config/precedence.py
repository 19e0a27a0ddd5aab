"""Which value counts where a file, a run's saved config and flags all give one."""

from __future__ import annotations

from typing import Any

from reltune.errors import InputError


def combined(stored: dict[str, Any], given: dict[str, Any], training: dict[str, Any]) -> dict[str, Any]:
    """A config's stored fields with those given on the command line, ``training`` fields apart; the given ones win.

    A field that is given a value is no longer swept, and a field that is now swept loses its stored value.

    Raises InputError for a field that is given a value and swept on the same command line.
    """
    swept = given.get("sweep", {})
    if twice := [name for name in swept if name in training or name in given]:
        raise InputError(f"{twice[0]} has a value and is swept too; leave out --{twice[0]} or that --sweep.")
    left = {name: values for name, values in stored.get("sweep", {}).items() if name not in {**given, **training}}
    kept = {name: value for name, value in stored.get("training", {}).items() if name not in swept}
    sweep = swept or left
    trials = given.get("sweep_trials", stored.get("sweep_trials") if sweep else None)
    return {**stored, **given, "sweep": sweep, "sweep_trials": trials, "training": {**kept, **training}}
