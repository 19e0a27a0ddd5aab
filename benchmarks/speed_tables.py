"""docs/speed.md, from the records in benchmarks/results.

    python benchmarks/speed_tables.py

The text is benchmarks/speed_page.md. Its tables are from tuner_step_single.json, step_profile.json, crowded_places.json and
tuner_minilm.json.
"""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "speed.md"


def record(name: str) -> dict[str, Any]:
    return json.loads((HERE / "results" / f"{name}.json").read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def medians(case: dict[str, Any], key: str) -> dict[str, float]:
    return {method["method"]: statistics.median(method[key]) for method in case["methods"] if method[key]}


def steps() -> str:
    rows = []
    for case in record("tuner_step_single")["cases"]:
        seconds, peaks = medians(case, "seconds"), medians(case, "peak_bytes")
        lora = next((name for name in seconds if name.startswith("LoRA")), None)
        for name, each in seconds.items():
            times = f"{each / seconds['floor']:.3f} ×"
            of_lora = "" if lora is None else f"{each / seconds[lora]:.3f} ×"
            rows.append(
                [
                    case["case"],
                    name,
                    f"{each:.3f}",
                    times,
                    of_lora,
                    f"{peaks[name] / 2**30:.1f}",
                    f"{peaks[name] / peaks['floor']:.3f} ×",
                ]
            )
    return table(["case", "method", "s", "of the floor", "of LoRA", "peak GiB", "of the floor"], rows)


def goals() -> str:
    rows = [
        [
            check["check"],
            f"{check['value']:.3f}",
            f"{check['sense']} {check['limit']}",
            "yes" if check["passed"] else "**no**",
        ]
        for name in ("tuner_step_single", "tuner_minilm")
        for check in record(name)["checks"]
        if " / " in check["check"] and "last" not in check["check"] and check["value"] not in (None, "nan")
    ]
    return table(["ratio", "measured", "goal", "reached"], rows)


def profile() -> str:
    values = {name: value for name, value in record("step_profile")["values"].items() if "kinds" in value}
    kinds = sorted(
        {kind for value in values.values() for kind in value["kinds"]},
        key=lambda kind: -max(value["kinds"].get(kind, 0) for value in values.values()),
    )
    rows = [[kind, *(f"{value['kinds'].get(kind, 0):.1f}" for value in values.values())] for kind in kinds]
    rows = [row for row in rows if any(float(cell) >= 0.3 for cell in row[1:])]
    rows.append(["all", *(f"{sum(value['kinds'].values()):.1f}" for value in values.values())])
    return table(["ms of a step", *values], rows)


def crowding() -> str:
    rows = []
    for name, value in record("crowded_places")["values"].items():
        for side in ("rows", "columns"):
            rows.append([name, side, *(f"{100 * value[side][f'most crowded {n}%']:.0f}%" for n in (1, 10, 50))])
    return table(["model, share of its matrices", "", "the top 1% hold", "10%", "50%"], rows)


def page() -> str:
    text = (HERE / "speed_page.md").read_text(encoding="utf-8")
    about = record("tuner_step_single")
    hardware = about["hardware"]
    made = {"steps": steps, "goals": goals, "profile": profile, "crowding": crowding}
    text = re.sub(r"\{(\w+)\}", lambda found: made[found[1]]() if found[1] in made else found[0], text)
    return text.replace(
        "{about}", f"one {hardware['gpu']}, torch {about['versions']['torch']}, commit {about['commit'][:7]}"
    )


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)
