"""docs/speed.md, from the records in benchmarks/results.

    python benchmarks/speed_tables.py

The text is benchmarks/speed_page.md. Its tables are from tuner_step_single.json, tuner_step_few_bits.json, unsloth_step.json,
tuner_step_float8.json, training_loop.json, long_context.json, step_profile.json, crowded_places.json and tuner_minilm.json.
"""

from __future__ import annotations

import functools
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


def goals(*names: str) -> str:
    rows = [
        [
            check["check"],
            f"{check['value']:.3f}",
            f"{check['sense']} {check['limit']}",
            "yes" if check["passed"] else "**no**",
        ]
        for name in names
        for check in record(name)["checks"]
        if " / " in check["check"] and "last" not in check["check"] and check["value"] not in (None, "nan")
    ]
    return table(["ratio", "measured", "goal", "reached"], rows)


def unsloth() -> str:
    """Our steps beside Unsloth's, which is a run of its own."""
    peer = record("unsloth_step")["repeats"]
    seconds, peak = (statistics.median(repeat[key] for repeat in peer) for key in ("seconds", "peak_bytes"))
    rows = [["Unsloth, LoRA, r = 16", f"{seconds:.3f}", "1.000 ×", f"{peak / 2**30:.1f}", "1.000 ×"]]
    for case in record("tuner_step_single")["cases"]:
        times, peaks = medians(case, "seconds"), medians(case, "peak_bytes")
        for name in times:
            if (case["case"], name) in (
                ("single, liger", "single weights, 0.12%"),
                ("single, liger", "columns, r = 32"),
                ("fp8", "columns, r = 32, fp8"),
            ):
                ratios = f"{times[name] / seconds:.3f} ×", f"{peaks[name] / peak:.3f} ×"
                rows.append(
                    [
                        f"{case['case']}: {name}",
                        f"{times[name]:.3f}",
                        ratios[0],
                        f"{peaks[name] / 2**30:.1f}",
                        ratios[1],
                    ]
                )
    return table(["step", "s", "of Unsloth's", "peak GiB", "of Unsloth's"], rows)


def each(name: str) -> str:
    """Every method of a record, beside the first of its case."""
    rows = []
    for case in record(name)["cases"]:
        seconds, peaks = medians(case, "seconds"), medians(case, "peak_bytes")
        first = next(iter(seconds.values()))
        for method, time in seconds.items():
            rows.append([case["case"], method, f"{time:.3f}", f"{time / first:.3f} ×", f"{peaks[method] / 2**30:.1f}"])
    return table(["case", "method", "s", "of the first", "peak GiB"], rows)


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


def about(name: str) -> str:
    """On what a record was measured."""
    found = record(name)
    return f"one {found['hardware']['gpu']}, torch {found['versions']['torch']}, commit {found['commit'][:7]}"


def page() -> str:
    text = (HERE / "speed_page.md").read_text(encoding="utf-8")
    made = {"steps": steps, "profile": profile, "crowding": crowding, "unsloth": unsloth}
    made["goals"] = functools.partial(
        goals, "tuner_step_single", "tuner_step_few_bits", "training_loop", "tuner_minilm"
    )
    made["about"] = functools.partial(about, "tuner_step_single")
    made["about_float8"] = functools.partial(about, "tuner_step_float8")
    made["goals_float8"] = functools.partial(goals, "tuner_step_float8")
    for name in ("tuner_step_few_bits", "tuner_step_float8", "training_loop", "long_context"):
        made[name] = functools.partial(each, name)
    return re.sub(r"\{(\w+)\}", lambda found: made[found[1]]() if found[1] in made else found[0], text)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)
