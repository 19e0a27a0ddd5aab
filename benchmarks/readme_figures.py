"""Figures in the READMEs that were measured, and the records that they come from.

A comment right after the figures names a file of benchmarks/results and says how each of them is got from it:

    takes 0.506 s and 58.4 GiB <!-- tuner_step.json: seconds("eager", "columns, r = 32"), gib("eager", "columns, r = 32") -->

As many expressions as there are figures since the comment before, or since the paragraph, list item or row of a table began. Each is
rounded to the places that the figure shows. Whatever else is a number is a setting and matches one of SETTINGS: a size, a version,
a budget. A number that is neither is a figure without a record, and the test of the READMEs fails.

    python benchmarks/readme_figures.py     says what is wrong, and with what a figure should be replaced
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import selection_tables

ROOT = Path(__file__).parent.parent
READMES = ("README.md", "README.zh.md", "docs/costs.md", "docs/criteria.md")
MARK = re.compile(r"<!--\s*([\w.]+\.json): (.*?)\s*-->", re.DOTALL)
FIGURE = re.compile(r"(?<![\w.\-])[+\-−]?\d[\d,]*(?:\.\d+)?(?:e-?\d+)?(?!\w)")

# Numbers that nothing measured.
SETTINGS = re.compile(
    "|".join(
        (
            r"`[^`]*`",  # code
            r"\]\([^)]*\)",  # where a link leads
            r"^\s*\d\. ",  # a list
            r"all-MiniLM-L6-v2|MiniLM(?:-L6)?(?:, 22\.7M)?|SmolLM2-135M(?:-Instruct)?|Llama-3\.1-8B|\b(?:8B|70B)\b|Apache-2\.0",
            r"Python 3\.11 (?:or|或) 3\.12|GPT-2|2-D|FSDP2|H[12]00|1e-\d",
            r"\b(?:19|20)\d\d\b",  # years
            r"95%|95 ?%|\b(?:0\.(?:12|5)|2)% of the weights|2% 的权重",
            r"\br ?= ?\d+|\*\*(?:single weights|单个权重|reltune: element by movement)[,，](?: 模型的 |模型的 | )?[\d.]+%|\| 0\.12%, with|single weights, 0\.12% of the model",
            r"\d+ × \d+ (?:tokens|个词元)|\d+ (?:test )?texts|[\d,]+ (?:examples|个样本)|(?:at |\n)\d+ tokens",
            r"\d+ columns|\d+ 列|(?:top|the) \d+ of (?:the )?\d+ layers|layer (?:\.)?11",
            r"\d+ CPU cores|\d+ cores|cap of \d+ GiB|\d+(?: or |/)\d+ ?(?:bits|位)|in \d+ bits",
            r"\d+ of\s+the\s+\d+\s+layers|over 100 batches|100 steps on top",
        )
    ),
    re.MULTILINE,
)


class Record:
    """What expressions may use of a record."""

    def __init__(self, name: str):
        self.data = json.loads((selection_tables.RESULTS / name).read_text(encoding="utf-8"))
        phase = re.fullmatch(r"selection_(\w+)\.json", name)
        self.figures = selection_tables.figures_of(selection_tables.read(phase[1])) if phase else {}

    def method(self, case: str, name: str) -> dict[str, Any]:
        cases = [c for c in self.data["cases"] if c["case"] == case]
        return next(m for c in cases for m in c["methods"] if m["method"] == name)

    def seconds(self, case: str, name: str) -> float:
        """The median of the repeats."""
        return statistics.median(self.method(case, name)["seconds"])

    def gib(self, case: str, name: str) -> float:
        """The peak."""
        return max(self.method(case, name)["peak_bytes"]) / 2**30

    def over(self, case: str, name: str, other: str = "floor") -> float:
        """Its time as a multiple of another's."""
        return self.seconds(case, name) / self.seconds(case, other)

    def demo(self, label: str) -> list[float]:
        """A row of the demo's comparison: bytes on disk in KiB below one MiB, in MiB from there."""
        row = next(row for row in self.data["rows"] if row["label"] == label)
        quality = [100 * row["metrics"]["accuracy"], 100 * row["metrics"]["f1_macro"]]
        if "trainable_parameters" not in row:
            return quality
        disk = row["adapter_bytes"]
        return [
            row["trainable_parameters"],
            *quality,
            row["seconds_per_step"],
            row["peak_memory_bytes"] / 2**20,
            disk / 2**20 if disk >= 2**20 else disk / 2**10,
            *([row["analysis_seconds"]] if "analysis_seconds" in row else []),
            row["seconds"],
        ]

    def peer(self, name: str, case: str = "llama, 16 × 512 tokens", own: str = "reltune, one batch") -> float:
        """A peer's time as a multiple of reltune's."""
        return self.seconds(case, name) / self.seconds(case, own)

    def peer_memory(self, name: str) -> float:
        case = "llama, 16 × 512 tokens"
        return self.gib(case, name) / self.gib(case, "reltune, one batch")

    def fastest(self, tokens: str, own: str = "reltune, one batch") -> float:
        """The fastest peer's time on MiniLM as a multiple of reltune's."""
        case = f"minilm, 32 × {tokens} tokens"
        names = [m["method"] for c in self.data["cases"] if c["case"] == case for m in c["methods"]]
        return min(self.peer(n, case, own) for n in names if not n.startswith(("reltune", "floor")))

    def gain(self, one: str, other: str, *tasks: str) -> list[float]:
        """Mean difference in points and its 95% interval."""
        text = selection_tables.difference(self.figures[one], self.figures[other], tasks)
        return [float(number) for number in re.findall(r"[+-][\d.]+", text)]

    def tasks(self, ending: str) -> list[str]:
        """Of the study, those whose names end so."""
        return sorted({task for of_method in self.figures.values() for task, _ in of_method if task.endswith(ending)})

    def trained(self, method: str) -> int:
        fields = self.data["fields"]
        values = next(v for v in self.data["trainings"] if v[fields.index("method")] == method)
        return int(values[fields.index("trained")])

    def value(self, expression: str) -> list[float]:
        """What the expression says, as a list of numbers."""
        public = (n for n in dir(self) if not n.startswith("_") and n not in ("value", "data", "figures"))
        names = {n: getattr(self, n) for n in public} | {"whole": "reltune.analyze, whole call"}
        plain = {"max": max, "min": min, "median": statistics.median}
        found = eval(expression, {"__builtins__": plain, "data": self.data, **names})
        return [float(v) for v in (found if isinstance(found, tuple) else (found,)) for v in _flat(v)]


def _flat(value: Any) -> Iterator[float]:
    if isinstance(value, list):
        yield from value
    else:
        yield value


def problems(text: str) -> list[str]:
    """What is wrong with the figures of a README: those without a record, and those that differ from it."""
    wrong: list[str] = []
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    blocks = re.split(r"\n\s*\n|\n(?=\||- |\d\. )", text)
    for block in blocks:
        at = 0
        for mark in MARK.finditer(block):
            shown = list(_figures(block[at : mark.start()]))
            at = mark.end()
            try:
                values = Record(mark[1]).value(mark[2])
            except Exception as error:
                wrong.append(f"{mark[0]}: {type(error).__name__}: {error}")
                continue
            if len(values) != len(shown):
                wrong.append(f"{mark[0]}: {len(values)} expressions for {len(shown)} figures, {', '.join(shown)}")
                continue
            for figure, value in zip(shown, values, strict=True):
                expected = written(value, like=figure)
                if expected.replace("−", "-") != figure.replace("−", "-"):
                    wrong.append(f"{figure} is {expected} in {mark[1]}: {mark[2]}")
        for figure in _figures(block[at:]):
            around = " ".join(re.sub(r"<!--.*?-->", "", block, flags=re.DOTALL).split())
            wrong.append(f"{figure} names no record: {around[:120]}")
    return wrong


def _figures(text: str) -> Iterator[str]:
    text = SETTINGS.sub(" ", re.sub(r"<!--.*?-->", " ", text, flags=re.DOTALL))
    for match in FIGURE.finditer(text):
        yield match[0].rstrip(",")


def written(value: float, like: str) -> str:
    """A number with the places, the commas and the sign of a figure."""
    if "e" in like:
        return re.sub(r"e-0*", "e-", f"{value:.0e}")
    places = len(like.partition(".")[2])
    sign = "+" if like.startswith("+") else ""
    return f"{value:{sign},.{places}f}" if "," in like else f"{value:{sign}.{places}f}"


def main() -> int:
    wrong = [
        f"{name}: {problem}" for name in READMES for problem in problems((ROOT / name).read_text(encoding="utf-8"))
    ]
    print("\n".join(wrong) or "Every figure is its record's.")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
