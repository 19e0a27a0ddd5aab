"""Run the notebooks of this folder from their first cell to their last, and store what they show.

    make notebooks

What a cell prints to stderr (remarks of libraries) is not kept, nor bars of progress, nor when or by which program it was run.
``make test-notebooks`` runs them with ``--check``, which stores nothing.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

PRINTED = 10_000  # characters of a cell's output at most: its end
PROGRESS = re.compile(r"\d+%\|")  # in tqdm's bars
TERMINAL = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")  # what moves a terminal's cursor or sets its colours


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="*", type=Path, help="all of this folder, if none is named")
    parser.add_argument("--check", action="store_true", help="run them, and store nothing")
    options = parser.parse_args()
    for path in options.notebooks or sorted(Path(__file__).parent.glob("*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as place:
            NotebookClient(
                notebook, timeout=3600, kernel_name="python3", resources={"metadata": {"path": place}}
            ).execute()
        if not options.check:
            nbformat.write(stored(notebook), path)
        cells = sum(cell.cell_type == "code" for cell in notebook.cells)
        print(f"{path.name}: {cells} cells ran in {time.monotonic() - began:.0f} s", flush=True)


def stored(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The notebook with what its readers want to see, and nothing of the machine."""
    notebook.metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    for number, cell in enumerate(cell for cell in notebook.cells if cell.cell_type == "code"):
        cell.metadata, cell.execution_count = {}, number + 1
        kept: list[nbformat.NotebookNode] = []
        for output in cell.outputs:
            if output.output_type == "stream" and output.name == "stdout":
                # A program's output comes in pieces.
                if kept and kept[-1].output_type == "stream":
                    kept[-1].text += output.text
                else:
                    kept.append(output)
            elif output.output_type in ("execute_result", "display_data"):
                best = "text/html" if "text/html" in output.data else "text/plain"
                output.data = {best: _without_places(output.data[best])}
                if "execution_count" in output:
                    output.execution_count = number + 1
                kept.append(output)
        for output in kept:
            if output.output_type == "stream":
                output.text = _printed(output.text)
        cell.outputs = [output for output in kept if output.get("text") != "\n"]
    return notebook


def _printed(text: str) -> str:
    """What a terminal would show in the end, without bars and colours."""
    lines = (line.rstrip().rpartition("\r")[2] for line in TERMINAL.sub("", text).split("\n"))
    text = _without_places("\n".join(line.rstrip() for line in lines if line.strip() and not PROGRESS.search(line)))
    if len(text) > PRINTED:
        text = "…\n" + text[-PRINTED:].partition("\n")[2]
    return f"{text}\n"


def _without_places(text: str) -> str:
    """Paths of packages begin where the package does."""
    for place in sorted(filter(None, sys.path), key=len, reverse=True):
        text = text.replace(f"{place}{os.sep}", "")
    return text


if __name__ == "__main__":
    # Programs that a cell starts are those of this repository's environment.
    programs = (Path(__file__).parents[2] / ".venv" / "bin", Path(sys.executable).parent, os.environ["PATH"])
    os.environ["PATH"] = os.pathsep.join(map(str, programs))
    os.environ |= {"HF_HUB_OFFLINE": "1", "COLUMNS": "80", "NO_COLOR": "1"}
    main()
