"""Run the notebooks of this folder from their first cell to their last, and store what they show.

    make notebooks

What a cell prints to stderr (progress, remarks of libraries) is not kept, nor when or by which program it was run.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

PRINTED = 4000  # characters of a cell's output at most: its end


def main(paths: list[str]) -> None:
    for path in map(Path, paths) if paths else sorted(Path(__file__).parent.glob("*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        with tempfile.TemporaryDirectory() as place:
            NotebookClient(
                notebook, timeout=3600, kernel_name="python3", resources={"metadata": {"path": place}}
            ).execute()
        nbformat.write(stored(notebook), path)
        print(f"{path.name}: {sum(cell.cell_type == 'code' for cell in notebook.cells)} cells ran")


def stored(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The notebook with what its readers want to see, and nothing of the machine."""
    notebook.metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    for number, cell in enumerate(cell for cell in notebook.cells if cell.cell_type == "code"):
        cell.metadata, cell.execution_count = {}, number + 1
        kept = []
        for output in cell.outputs:
            if output.output_type == "stream" and output.name == "stdout":
                lines = (line.rpartition("\r")[2] for line in output.text.splitlines())
                output.text = "\n".join(line.rstrip() for line in lines if line.strip())[-PRINTED:] + "\n"
                kept.append(output)
            elif output.output_type in ("execute_result", "display_data"):
                best = "text/html" if "text/html" in output.data else "text/plain"
                output.data = {best: _without_places(output.data[best])}
                if "execution_count" in output:
                    output.execution_count = number + 1
                kept.append(output)
        cell.outputs = kept
    return notebook


def _without_places(text: str) -> str:
    """Paths of packages begin where the package does."""
    for place in sorted(filter(None, sys.path), key=len, reverse=True):
        text = text.replace(f"{place}{os.sep}", "")
    return text


if __name__ == "__main__":
    # Programs that a cell starts are those of this repository's environment.
    programs = (Path(__file__).parents[2] / ".venv" / "bin", Path(sys.executable).parent, os.environ["PATH"])
    os.environ["PATH"] = os.pathsep.join(map(str, programs))
    os.environ |= {"HF_HUB_OFFLINE": "1", "COLUMNS": "80"}
    main(sys.argv[1:])
