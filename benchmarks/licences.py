"""The licences of the direct dependencies, as docs/dependencies.md lists them.

    PYTHONPATH=src python benchmarks/licences.py            # says whether the page is up to date
    PYTHONPATH=src python benchmarks/licences.py --write

Read from the metadata of what is installed; needs pyproject.toml's extras for all lines.
"""

from __future__ import annotations

import re
import sys
import tomllib
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "dependencies.md"
BEGIN, END = "<!-- made by benchmarks/licences.py -->", "<!-- end -->"


def licence(name: str) -> str:
    """The licence expression of a package; else its classifiers, else the first line of its licence field."""
    about = metadata.metadata(name)
    if expression := about.get("License-Expression"):
        return expression
    named = [line.rpartition(" :: ")[2] for line in about.get_all("Classifier") or [] if line.startswith("License ::")]
    return ", ".join(named) or (about.get("License") or "not said").splitlines()[0][:60]


def table() -> str:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    groups = {"": project["dependencies"], **project["optional-dependencies"]}
    lines = ["| package | needed for | licence |", "|---|---|---|"]
    for extra, requirements in groups.items():
        for requirement in requirements:
            name = re.match(r"[A-Za-z0-9._-]+", requirement)[0]
            if name == "reltune":
                continue
            try:
                found = licence(name)
            except metadata.PackageNotFoundError:
                found = "not installed where this page was made"
            lines.append(f"| {name} | {extra or 'reltune'} | {found} |")
    return "\n".join(lines)


def main() -> None:
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    text = f"{before}{BEGIN}\n{table()}\n{END}{rest.partition(END)[2]}"
    if "--write" in sys.argv:
        PAGE.write_text(text, encoding="utf-8")
    sys.exit(int(text != PAGE.read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
