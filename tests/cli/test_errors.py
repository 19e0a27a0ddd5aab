"""How commands end: exit codes, errors in a sentence, and what libraries say kept to themselves."""

from __future__ import annotations

import io
import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr
from types import ModuleType
from unittest import mock

import pytest
import typer

from reltune.__main__ import main
from reltune.cli.errors import run_program
from reltune.errors import InputError
from reltune.notes import Note


def ended(command: Callable[[], object], *words: str, **environment: str) -> tuple[object, str]:
    """The exit code of a program that does this, and what it wrote to stderr."""
    app = typer.Typer()
    app.callback(invoke_without_command=True)(lambda: command() and None)
    return of_program(app, *words, **environment)


def of_program(app: typer.Typer, *words: str, **environment: str) -> tuple[object, str]:
    handler, err = signal.signal(signal.SIGTERM, signal.SIG_IGN), io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["reltune", *words]),
        mock.patch.dict(os.environ, environment),
        warnings.catch_warnings(),
        redirect_stderr(err),
        pytest.raises(SystemExit) as end,
    ):
        warnings.simplefilter("always")
        try:
            run_program(app)
        finally:
            signal.signal(signal.SIGTERM, handler)
    return end.value.code, err.getvalue()


def raises(error: BaseException) -> Callable[[], object]:
    def command() -> object:
        raise error

    return command


def terminates() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(
    ("command", "code", "message"),
    [
        (lambda: None, 0, ""),
        (raises(InputError("rows are\nbad; mend them.")), 2, "reltune: error: rows are bad; mend them.\n"),
        (
            raises(OSError(2, "No such file")),
            1,
            "reltune: error: FileNotFoundError: [Errno 2] No such file (--debug shows",
        ),
        (
            raises(OSError(28, "No space left", "f")),
            1,
            "reltune: error: f could not be written (no space left on device); ",
        ),
        (
            raises(OSError(30, "", "f")),
            1,
            "reltune: error: f could not be written (read-only file system); make it writ",
        ),
        (raises(KeyboardInterrupt()), 130, "reltune: error: interrupted; what was done is kept, and the same command"),
        (terminates, 143, "reltune: error: terminated; what was done is kept, and the same command"),
    ],
)
def test_exit_codes(command: Callable[[], object], code: int, message: str) -> None:
    found, err = ended(command)
    assert found == code
    assert err.startswith(message) and bool(err) == bool(message) and "Traceback" not in err
    assert err.count("\n") == bool(message)


@pytest.mark.parametrize("command", [raises(KeyboardInterrupt()), terminates])
def test_what_would_begin_anew_is_not_said_to_go_on(command: Callable[[], object]) -> None:
    app = typer.Typer()

    @app.callback(invoke_without_command=True)
    def start(overwrite_output_dir: bool = typer.Option(False, "--overwrite_output_dir")) -> None:
        command()

    _, err = of_program(app, "--overwrite_output_dir")
    assert "kept, and the same command without --overwrite_output_dir goes on from there." in err


def test_wrong_usage_is_bad_input() -> None:
    code, err = ended(lambda: None, "--nonsense")
    assert code == 2 and err.startswith("reltune: error: ") and "--nonsense" in err and err.count("\n") == 1


@pytest.mark.parametrize("error", [InputError("bad rows."), OSError("broken")])
def test_debug_shows_where_an_error_comes_from(error: Exception) -> None:
    code, err = ended(raises(error), "--debug")
    assert code == (2 if isinstance(error, InputError) else 1)
    assert err.startswith("Traceback") and f'File "{__file__}"' in err and err.rstrip().count("reltune: error:") == 1


def test_an_error_of_all_processes_is_the_first_one_s_to_say() -> None:
    agreed = OSError("full")
    agreed.agreed = True  # type: ignore[attr-defined]
    for error, code in ((InputError("bad rows."), 2), (agreed, 1), (KeyboardInterrupt(), 130)):
        assert ended(raises(error), WORLD_SIZE="2", RANK="1") == (code, "")
        assert ended(raises(error), WORLD_SIZE="2", RANK="0")[1] != ""
    code, err = ended(raises(OSError("its own")), WORLD_SIZE="2", RANK="1")
    assert code == 1 and "its own" in err


def test_an_interruption_while_the_program_is_loaded_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupting(ModuleType):
        def __getattr__(self, name: str) -> object:
            raise KeyboardInterrupt

    monkeypatch.setitem(sys.modules, "reltune.cli.commands", Interrupting("reltune.cli.commands"))
    err = io.StringIO()
    with redirect_stderr(err), pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 130 and err.getvalue() == "reltune: error: interrupted; nothing was begun.\n"


# -- what libraries say ---------------------------------------------------------------------------------------------


LIBRARY = "/home/reltune/.venv/site-packages/library/module.py"  # in the environment of a clone that is called as git calls it


def remarks() -> None:
    """Warnings and log records as libraries and reltune make them."""
    warnings.warn_explicit("call me otherwise", FutureWarning, LIBRARY, 7)
    warnings.warn_explicit("trial 1 failed.", UserWarning, run_program.__code__.co_filename, 7)
    warnings.warn_explicit("the column 'id' is not used.", Note, LIBRARY, 7)
    log = logging.getLogger("a_library")
    log.addHandler(handler := logging.StreamHandler(sys.stderr))
    try:
        log.warning("could not load a kernel")
        log.error("the disk is full")
    finally:
        log.removeHandler(handler)


OWN = "reltune: warning: trial 1 failed.\nreltune: note: the column 'id' is not used.\n"


def test_remarks_of_libraries_are_for_debugging() -> None:
    assert ended(remarks) == (0, OWN + "the disk is full\n")
    code, err = ended(remarks, "--debug")
    assert code == 0 and err.endswith(OWN + "could not load a kernel\nthe disk is full\n")
    assert err.startswith(f"{LIBRARY}:7: FutureWarning: call me otherwise\n")


def test_notes_are_said_by_one_process() -> None:
    assert ended(remarks, WORLD_SIZE="2", RANK="1")[1] == "reltune: warning: trial 1 failed.\nthe disk is full\n"


@pytest.mark.parametrize("command", [lambda: None, raises(InputError("bad rows."))])
def test_logging_is_as_before_afterwards(command: Callable[[], object]) -> None:
    ended(command)
    assert logging.getLogger("a_library").isEnabledFor(logging.WARNING)
