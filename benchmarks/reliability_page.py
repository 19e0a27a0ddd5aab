"""docs/reliability.md, from the records in benchmarks/results.

    python benchmarks/reliability_page.py

The text is benchmarks/reliability_page.md. Its figures are from coverage.json, mutation.json, interruption.json, fuzz_loaders.json and
on_gpus.json.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import on_gpus as gpus
from mutation import said
from speed_tables import record, table

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "reliability.md"


def coverage() -> str:
    files = record("coverage")["files"]
    packages: dict[str, list[dict[str, Any]]] = {}
    for name, file in files.items():
        packages.setdefault(name.partition("/")[0], []).append(file)
    rows = [
        _covered(f"`{name}`" if name else "**the core**", mine)
        for name, mine in [*packages.items(), ("", files.values())]
    ]
    return table(["package", "files", "lines", "run", "branches", "taken"], rows)


def _covered(name: str, files: Iterable[dict[str, Any]]) -> list[str]:
    total = {key: sum(file[key] for file in files) for key in ("lines", "lines_run", "branches", "branches_taken")}
    shares = [
        f"{total[part] / total[whole]:.1%}" for part, whole in (("lines_run", "lines"), ("branches_taken", "branches"))
    ]
    return [name, str(len(list(files))), f"{total['lines']:,}", shares[0], f"{total['branches']:,}", shares[1]]


def tests() -> str:
    return ", ".join(f"`{path}`" for path in record("coverage")["tests"])


def slow() -> str:
    return "" if record("coverage")["slow_tests"] else ", without those marked slow"


def left_out() -> str:
    found = record("coverage")
    by_reason: dict[str, list[str]] = {}
    for name, why in found["left_out"].items():
        by_reason.setdefault(why, []).append(f"`{name}`")
    lines = [f"- {why}: {', '.join(names)};" for why, names in by_reason.items()]
    asked = ", ".join(f"`{name}`" for name, file in found["files"].items() if any(file["on_cuda"]))
    patterns = ", ".join(f"`{pattern}`" for pattern in found["no_code"])
    return "\n".join(
        [
            *lines,
            f"- what is done only where a condition asks for a CUDA device, which matches `{found['on_cuda']}`, in {asked};",
            f"- lines that are not meant to run, which match one of {patterns}.",
        ]
    )


def missing() -> str:
    """The files with the most that is not run."""
    files = record("coverage")["files"]
    gaps = {n: (f["lines"] - f["lines_run"], f["branches"] - f["branches_taken"]) for n, f in files.items()}
    most = sorted(gaps, key=lambda name: (-sum(gaps[name]), name))[:8]
    whole = sum(gap == (0, 0) for gap in gaps.values())
    rows = [[f"`{name}`", *map(str, gaps[name])] for name in most if sum(gaps[name])]
    head = f"Of {len(files)} files {whole} are run whole. The most that is not run is in:\n\n"
    return head + table(["file", "lines", "branches"], rows)


def wilson(successes: int, trials: int, population: int) -> tuple[float, float]:
    """95% interval of a share (Wilson 1927), of a sample drawn without replacement."""
    if trials == population:
        return successes / trials, successes / trials
    z = 1.959964 * math.sqrt((population - trials) / (population - 1))
    share, scale = successes / trials, 1 + z * z / trials
    centre = (share + z * z / (2 * trials)) / scale
    half = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials)) / scale
    return centre - half, centre + half


def mutation() -> str:
    rows = []
    areas: dict[str, dict[str, Any]] = record("mutation")["areas"]
    for name, area in areas.items():
        low, high = wilson(area["killed_at_first"], area["run"], area["mutants"])
        interval = f" ({low:.1%} to {high:.1%})"
        rows.append([name, ", ".join(f"`{pattern}`" for pattern in area["files"]), *_killed([area], interval)])
    rows.append(["**all**", "", *_killed(areas.values())])
    head = ["area", "files", "mutants", "drawn", "killed (95%)", "with tests for survivors", "of those with an effect"]
    return table(head, rows)


def _killed(areas: Iterable[dict[str, Any]], interval: str = "") -> list[str]:
    areas = list(areas)
    mutants, run, first, killed = (
        sum(a[key] for a in areas) for key in ("mutants", "run", "killed_at_first", "killed")
    )
    effect = run - sum(bool(one["without_effect"]) for area in areas for one in area["survivors"])
    shares = [f"{first / run:.1%}{interval}", f"{killed / run:.1%}", f"{killed / effect:.1%}"]
    return [f"{mutants:,}", f"{run:,}", *shares]


def most() -> str:
    found = record("mutation")
    return " and later ".join(dict.fromkeys(f"{found[key]:g}" for key in ("most_seconds_at_first", "most_seconds")))


def dear() -> str:
    return f"{record('mutation')['dear_seconds']:g}"


def seed() -> str:
    return str(record("mutation")["seed"])


def no_fault() -> str:
    found = record("mutation")
    counts = {name: sum(area[name] for area in found["areas"].values()) for name in found["no_fault"]}
    return "; ".join(f"{why} ({counts[name]:,})" for name, why in found["no_fault"].items())


def survivors() -> str:
    """Those that a test could kill, and then those without an effect, with the reason."""
    real, same = [], []
    for area in record("mutation")["areas"].values():
        for one in area["survivors"]:
            old, new = said(one["change"])
            untested = " (no quick test runs it)" if one["outcome"] == "no test" else ""
            line = f"- `{one['file']}:{one['line']}`{untested}: `{old}` → `{new}`"
            if one["without_effect"]:
                same.append(f"{line}: {one['without_effect']}")
            else:
                real.append(line)
    parts = [
        "\n".join(real) or "None with an effect.",
        "Read by hand, these change no result:",
        "\n".join(same) or "None.",
    ]
    return "\n\n".join(parts)


def coverage_commit() -> str:
    return str(record("coverage")["commit"][:7])


def mutation_commit() -> str:
    return str(record("mutation")["commit"][:7])


def interruption() -> str:
    found = record("interruption")
    rows = [
        [
            check["check"],
            f"{check['value']:g}",
            f"{check['sense']} {check['limit']}",
            "yes" if check["passed"] else "**no**",
        ]
        for check in found["checks"]
    ]
    kills = found["values"]["moments by stage"]
    stages = ", ".join(f"{stage} ({count})" for stage, count in sorted(kills.items()))
    return f"{table(['check', 'value', 'wanted', 'passed'], rows)}\n\nKilled in: {stages}."


def fuzz() -> str:
    rows = [
        [
            name,
            f"{loader['inputs']:,}",
            f"{loader['accepted']:,}",
            str(sum(kind["count"] for kind in loader["unexpected"].values())),
            f"{loader['slowest_cpu_seconds']:.2f}",
            f"{loader['most_memory_bytes'] / 2**20:.1f}",
        ]
        for name, loader in record("fuzz_loaders")["loaders"].items()
    ]
    return table(["reader", "inputs", "accepted", "unexpected", "slowest, s", "most memory, MiB"], rows)


def on_gpus() -> str:
    """Each case's figures, and then what did not pass, with its error, and what has no result."""
    found = {row["case"]: (row, run["commit"][:7]) for run in record("on_gpus")["runs"] for row in run["cases"]}
    rows, failed = [], []
    for case in gpus.every():
        if case.name not in found:
            continue
        row, commit = found[case.name]
        figures = ["" if row.get(name) is None else f"{row[name]:.2g}" for name in ("loss", "tensors", "limit")]
        alike = f"{row['alike']:.1%}" if "alike" in row else "not all" if "other units" in row.get("note", "") else ""
        passed = ("refused" if case.refused else "yes") if row["passed"] else "**no**"
        rows.append([case.name, *figures[:2], alike, figures[2], passed, commit])
        if not row["passed"]:
            error = row.get("error", "its numbers are too far from those of its reference")
            failed.append(f"- {case.name}: {error if len(error) < 160 else f'{error[:160]} …'}")
    lines = [table(["case", "loss", "tensors", "units", "limit", "passed", "commit"], rows)]
    if failed:
        lines += ["Did not pass:", "\n".join(failed)]
    lines += [line for count in (1, *gpus.SEVERAL) if (line := _without_result(count, found))]
    return "\n\n".join(lines)


def _without_result(count: int, found: dict[str, Any]) -> str:
    names = [case.name for case in gpus.every() if case.gpus == count]
    left = [name for name in names if name not in found]
    where = f"{count} GPU{'s' if count > 1 else ''}"
    if not left:
        return ""
    return f"On {where} nothing was run." if left == names else f"Without a result on {where}: {'; '.join(left)}."


def alike() -> str:
    return f"{gpus.ALIKE:.0%}"


def cards() -> str:
    runs = record("on_gpus")["runs"]
    return " and ".join(dict.fromkeys(run["hardware"]["gpu"] for run in runs))


def gpu_versions() -> str:
    runs = [run["versions"] for run in record("on_gpus")["runs"]]
    names = dict.fromkeys(name for run in runs for name in run)
    seen = {name: dict.fromkeys(run[name] for run in runs if run[name]) for name in names}  # not every run needs all
    return ", ".join(f"{name} {' and '.join(numbers)}" for name, numbers in seen.items())


def page() -> str:
    made = (
        coverage,
        tests,
        slow,
        left_out,
        missing,
        mutation,
        most,
        dear,
        seed,
        no_fault,
        coverage_commit,
        mutation_commit,
        survivors,
        interruption,
        fuzz,
        on_gpus,
        alike,
        cards,
        gpu_versions,
    )
    functions = {function.__name__: function for function in made}
    text = (HERE / "reliability_page.md").read_text(encoding="utf-8")
    return re.sub(r"\{(\w+)\}", lambda match: functions[match[1]](), text)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
