"""docs/speed.md, from the records in benchmarks/results.

    python benchmarks/speed_tables.py

The text is benchmarks/speed_page.md. Its tables are from tuner_step_single.json, tuner_step_few_bits.json, unsloth_step.json,
tuner_step_float8.json, float8_blocks.json, training_loop.json, training_loop_1b.json, graphed_step.json, long_context.json, streamed_weights.json,
step_profile.json, crowded_places.json, sampled_on_cpu.json and tuner_minilm.json.
"""

from __future__ import annotations

import functools
import json
import re
import statistics
from collections.abc import Callable
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
    """The ratios of records; one that is in two of them is the first's."""
    checks: dict[str, dict[str, Any]] = {}
    for name in names:
        for check in record(name)["checks"]:
            checks.setdefault(check["check"], check)
    rows = [
        [
            check["check"],
            f"{check['value']:.3f}",
            f"{check['sense']} {check['limit']}",
            "yes" if check["passed"] else "**no**",
        ]
        for check in checks.values()
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
        ended = [method for method in case["methods"] if (method["error"] or "").startswith("OutOfMemoryError")]
        rows += [[case["case"], method["method"], "out of memory", "", ""] for method in ended]
    return table(["case", "method", "s", "of the first", "peak GiB"], rows)


def streamed_ratio() -> str:
    there, here = (medians(case, "seconds") for case in reversed(record("streamed_weights")["cases"]))
    first = next(iter(here))
    return f"{there[first] / here[first]:.1f}"


def float8() -> str:
    """Every step beside LoRA's, and beside the frozen model in float8."""
    cases = record("tuner_step_float8")["cases"]
    of = {(case["case"], name): time for case in cases for name, time in medians(case, "seconds").items()}
    lora, floor = (
        next(time for (case, name), time in of.items() if case == c and name.startswith(n)) for c, n in BESIDE
    )
    peaks = {(case["case"], name): peak for case in cases for name, peak in medians(case, "peak_bytes").items()}
    peak = next(peak for (_, name), peak in peaks.items() if name.startswith("LoRA"))
    rows = [
        [
            *key,
            f"{time:.3f}",
            f"{time / lora:.3f} ×",
            f"{1e3 * (time - floor):+.1f}",
            f"{peaks[key] / 2**30:.1f}",
            f"{peaks[key] / peak:.3f} ×",
        ]
        for key, time in of.items()
    ]
    return table(["case", "method", "s", "of LoRA", "ms above the float8 floor", "peak GiB", "of LoRA"], rows)


BESIDE = (("fp8, before", "LoRA"), ("fp8", "floor"))
LAYERS = 32
BLOCKS = {  # kernel: its setting, and how many calls a layer has with each map's shape
    "adding the columns to y": ("(64, 128, 8, 1)", {"q, o": 2, "k, v": 2, "gate, up": 2, "down": 1}),
    "adding the columns to ∂x": ("(64, 128, 4, 5)", {"q, o": 2, "k, v": 2, "gate, up": 2, "down": 1}),
    "rounding x": ("2048", {"q, o": 2, "gate, up": 1, "down": 1}),  # q, k and v have one x, gate and up another
    "rounding g": ("2048", {"q, o": 2, "k, v": 2, "gate, up": 2, "down": 1}),
}


def blocks() -> str:
    found, rows = record("float8_blocks")["values"], []
    for kernel, (setting, calls) in BLOCKS.items():
        tried = {shape: found[f"{shape}: {kernel}"] for shape in calls}
        times = {
            each: LAYERS * 1e-3 * sum(count * tried[shape][each] for shape, count in calls.items())
            for each in set.intersection(*map(set, tried.values()))
        }
        before = times.pop("now")
        longest = max(times.values())
        rows.append([kernel, str(len(times)), *(f"{time:.1f}" for time in (before, times[setting], longest))])
    return table(["ms of a step", "settings tried", "before", "now", "longest"], rows)


def loop() -> str:
    """Both runs of the loop, the newer one first."""
    rows = []
    for found in (record("training_loop_1b"), record("training_loop")):
        for case in found["cases"]:
            bare = medians(case, "seconds")["bare step"]
            for method in case["methods"]:
                seconds, peak = method["seconds"], statistics.median(method["peak_bytes"])
                median = statistics.median(seconds)
                times = f"{median:.3f}", f"{median / bare:.3f} ×"
                spread = f"{min(seconds):.3f} to {max(seconds):.3f}"
                rows.append(
                    [case["case"], found["commit"][:7], method["method"], *times, f"{peak / 2**30:.1f}", spread]
                )
    return table(["case", "commit", "step", "s", "of the bare step", "peak GiB", "s of the repeats"], rows)


def graphs() -> str:
    rows = []
    for case in record("graphed_step")["cases"]:
        seconds, peaks = medians(case, "seconds"), medians(case, "peak_bytes")
        for name, plain in seconds.items():
            if (graphed := f"{name}, CUDA graphs") in seconds:
                times = f"{1e3 * plain:.1f}", f"{1e3 * seconds[graphed]:.1f}", f"{seconds[graphed] / plain:.2f} ×"
                rows.append([case["case"], name, *times, f"{(peaks[graphed] - peaks[name]) / 2**20:.0f}"])
    return table(["model", "method", "ms", "ms with graphs", "of without", "MiB more at the peak"], rows)


def graphs_differ() -> str:
    return f"{max(check['value'] for check in record('graphed_step')['checks']):.0e}"


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


def on_cpu() -> str:
    """Milliseconds of each way to the sampled product, the longest texts."""
    cases = [case for case in record("sampled_on_cpu")["cases"] if case["config"]["vectors"] == 2048]
    rows: dict[tuple[str, str], list[str]] = {}
    for case in cases:
        weight, share, _ = case["case"].split(", ", 2)
        times = medians(case, "seconds")
        cell = " / ".join(f"{1e3 * times[way]:.1f}" for way in ("dense", "gathered", "dots"))
        rows.setdefault((weight, share), []).append(cell)
    kinds = [
        f"{case['config']['dtype']}, threads: {case['config']['threads']}"
        for case in cases[: len(next(iter(rows.values())))]
    ]
    return table(["weight", "chosen", *kinds], [[*key, *cells] for key, cells in rows.items()])


def about(name: str) -> str:
    """On what a record was measured."""
    found = record(name)
    return f"one {found['hardware']['gpu']}, torch {found['versions']['torch']}, commit {found['commit'][:7]}"


def page() -> str:
    text = (HERE / "speed_page.md").read_text(encoding="utf-8")
    each_made = (steps, profile, crowding, on_cpu, unsloth, float8, blocks, loop, graphs, graphs_differ)
    made: dict[str, Callable[[], str]] = {function.__name__: function for function in each_made}
    made["goals"] = functools.partial(
        goals, "tuner_step_single", "tuner_step_few_bits", "training_loop_1b", "training_loop", "tuner_minilm"
    )
    made["about"] = functools.partial(about, "tuner_step_single")
    made["about_float8"] = functools.partial(about, "tuner_step_float8")
    made["about_blocks"] = functools.partial(about, "float8_blocks")
    made["about_graphs"] = functools.partial(about, "graphed_step")
    made["goals_float8"] = functools.partial(goals, "tuner_step_float8")
    made["about_streamed"] = functools.partial(about, "streamed_weights")
    made["streamed_weights_gib"] = lambda: f"{record('streamed_weights')['values']['weights, GiB']:.1f}"
    made["streamed_ratio"] = streamed_ratio
    for name in ("tuner_step_few_bits", "long_context", "streamed_weights"):
        made[name] = functools.partial(each, name)
    return re.sub(r"\{(\w+)\}", lambda found: made[found[1]]() if found[1] in made else found[0], text)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)
