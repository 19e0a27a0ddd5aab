"""How a command ends: its errors and warnings as sentences, and its exit code.

Exit codes: 0 done, 1 failed at run time, 2 bad input or configuration, 130 interrupted, 143 terminated.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import textwrap
import traceback
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any, NoReturn

import typer

from reltune.cli.launcher import first
from reltune.errors import InputError
from reltune.files import storage_error
from reltune.notes import Note

TERMINATED = 143
GOES_ON = "what was done is kept, and the same command goes on from there."
OVERWRITE = "--overwrite_output_dir"
OWN_FILES = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "")

# Click's class, found through Typer, which may bring its own Click.
USAGE_ERROR: Any = typer.BadParameter.__mro__[1]


def run_program(app: typer.Typer) -> NoReturn:
    """Run the command that the process was started with, and exit."""
    words = [word for word in sys.argv[1:] if word != "--debug"]
    debug = "--debug" in sys.argv
    goes_on = GOES_ON.replace("command", f"command without {OVERWRITE}") if OVERWRITE in words else GOES_ON
    warnings.showwarning = _warn
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for stream in (sys.stdout, sys.stderr):  # a terminal that lacks a character shows another one
        with contextlib.suppress(AttributeError):
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    signal.signal(signal.SIGTERM, _terminated)
    try:
        with nullcontext() if debug else _libraries_silent():
            code = app(args=words, prog_name="reltune", standalone_mode=False)
        if code == 130:  # what newer Typers make of KeyboardInterrupt
            raise KeyboardInterrupt
        raise SystemExit(code if isinstance(code, int) else 0)
    except (InputError, USAGE_ERROR) as error:
        if debug:
            traceback.print_exc()
        _fail(error.format_message() if isinstance(error, USAGE_ERROR) else str(error), 2, common=True)
    except (KeyboardInterrupt, typer.Abort):
        _fail(f"interrupted; {goes_on}", 130, common=True)
    except SystemExit as end:
        if end.code == TERMINATED:
            _fail(f"terminated; {goes_on}", TERMINATED, common=True)
        raise
    except BrokenPipeError:  # whoever reads the output has had enough
        os.dup2(
            os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
        )  # else Python complains when it flushes at the end
        raise SystemExit(1) from None
    except Exception as error:
        if debug:
            traceback.print_exc()
        message = f"{type(error).__name__}: {textwrap.shorten(str(error), 500)} (--debug shows where)"
        if (problem := storage_error(error)) is not None:
            message = str(problem)
        _fail(message, 1, common=getattr(error, "agreed", False))


def _fail(message: str, code: int, common: bool) -> NoReturn:
    """End with a message. If it is ``common`` to all processes of a launcher, the first one prints it."""
    if common and not first():
        raise SystemExit(code)
    if "tqdm" in sys.modules:  # end the lines of progress bars that the error has left open
        for bar in list(getattr(sys.modules["tqdm"].tqdm, "_instances", ())):
            bar.close()
    print(f"reltune: error: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(code)


def _terminated(*_: object) -> NoReturn:
    raise SystemExit(TERMINATED)


@contextlib.contextmanager
def _libraries_silent() -> Iterator[None]:
    """Keep from the terminal what libraries remark on themselves, on one another and on how they are used here: nothing that
    a user of reltune could mend. Their errors are still shown."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    warnings.showwarning = partial(_warn, own_only=True)
    try:
        yield
    finally:
        logging.disable(before)


def _warn(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: Any = None,
    line: str | None = None,
    own_only: bool = False,
) -> None:
    """reltune's own notes and warnings are sentences for the user; of a library's it matters where they come from."""
    if issubclass(category, Note):
        if first():
            print(f"reltune: note: {message}", file=sys.stderr)
    elif filename.startswith(OWN_FILES):
        print(f"reltune: warning: {message}", file=sys.stderr)
    elif not own_only:
        print(warnings.formatwarning(message, category, filename, lineno, line), end="", file=sys.stderr)
