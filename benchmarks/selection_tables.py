"""docs/selection.md, from the records of selection_study.py.

    python benchmarks/selection_tables.py --keep DIR --commits explore=64d8636 encoder=0096a34 … --hardware "4 × NVIDIA H200" --torch 2.11
    python benchmarks/selection_tables.py

The first keeps DIR/PHASE.jsonl as benchmarks/results/selection_PHASE.json, a line per training; the second writes docs/selection.md
from those files alone. Test figures are at the rate that validation chose per method and task; differences are paired over task and
seed, with 95% intervals by bootstrap over the pairs.
"""

from __future__ import annotations

import argparse
import json
import statistics as stats
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
RESULTS = HERE / "results"
PAGE = HERE.parent / "docs" / "selection.md"
PHASES = ("explore", "encoder", "confirm", "decoder", "heads", "cover", "image")
SIDE_BY_SIDE = (
    "proof",
    "proof_decoder",
    "small_data",
    "noise",
    "depth",
)  # docs/results.md is made from these: results_page.py
FIELDS = ("task", "method", "rate", "seed", "steps", "trained", "validation_metric", "validation_loss")
TESTED = ("test_metric", "test_loss")
FORGOTTEN = ("plain_loss",)
KEPT = ("relevance_kept",)
CLASSES = ("movie", "amazon", "nyt", "tweets", "bbc")
SIMPLE, BEST, LARGER = (
    "weights 0.25%, 100 steps",
    "weights 0.25%, 100 steps, relative, columns first",
    "weights 1%, 100 steps, relative, columns first",
)

Record = dict[str, Any]
Figures = dict[tuple[str, int], float]


def keep(folder: Path, commits: dict[str, str], about: dict[str, str]) -> None:
    """Keep the records of a study that ran, one training per line; they replace those of the same task, method, rate and seed.

    The head says of each run its commit and machine, and how many of the trainings are its own, in the order in which they follow.
    Raises ValueError where the untouched model's loss on plain text is not that of the runs before, which forgetting is measured against.
    """
    for phase in (*PHASES, *SIDE_BY_SIDE):
        source = folder / f"{phase}.jsonl"
        if not source.exists():
            continue
        names = [*FIELDS, *(KEPT if phase == "depth" else ()), *TESTED, *(FORGOTTEN if phase in SIDE_BY_SIDE else ())]
        records = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
        before = sorted(r["plain_before"] for r in records if "plain_before" in r) if phase in SIDE_BY_SIDE else []
        new = {_training(record) for record in records}
        path = RESULTS / f"selection_{phase}.json"
        head: Record = {"phase": phase}
        runs: list[tuple[Record, list[Record]]] = []
        if path.exists():
            head |= head_of(phase)
            earlier = iter(read(phase))
            for run in head["runs"]:
                mine = [next(earlier) for _ in range(run.pop("trainings"))]
                runs.append((run, [r for r in mine if _training(r) not in new]))
        own = {"commit": commits[phase], **about}
        if own not in [run for run, _ in runs]:
            runs.append((own, []))
        next(mine for run, mine in runs if run == own).extend(records)
        runs = [(run, mine) for run, mine in runs if mine]
        head |= {"runs": [run | {"trainings": len(mine)} for run, mine in runs], "fields": names}
        if before:
            value = round(before[len(before) // 2], 5)
            if abs(head.setdefault("plain_loss_before", value) - value) > 1e-3:
                raise ValueError(f"{source}: before any training the loss on plain text is {value}, not that of {path}")
        lines = [
            json.dumps([_kept(name, record[name]) for name in names if name in record])
            for _, mine in runs
            for record in mine
        ]
        text = (
            json.dumps(head, indent=1, ensure_ascii=False)[:-2]
            + ',\n "trainings": [\n'
            + ",\n".join(lines)
            + "\n ]\n}\n"
        )
        path.write_text(text, encoding="utf-8")


def _training(record: Record) -> tuple[Any, ...]:
    return (record["task"], record["method"], f"{record['rate']:.2g}", record["seed"])


def _kept(name: str, value: Any) -> Any:
    if name == "rate" or not isinstance(value, float):
        return value
    return round(value, 5) if np.isfinite(value) else None


def head_of(phase: str) -> Record:
    """What a phase's file says of its trainings."""
    kept: Record = json.loads((RESULTS / f"selection_{phase}.json").read_text(encoding="utf-8"))
    del kept["trainings"]
    return kept


def read(phase: str) -> list[Record]:
    kept = json.loads((RESULTS / f"selection_{phase}.json").read_text(encoding="utf-8"))
    return [dict(zip(kept["fields"], values, strict=False)) for values in kept["trainings"]]


def figures_of(records: list[Record]) -> dict[str, Figures]:
    """By method and (task, seed): the test figure at the rate that was chosen."""
    figures: dict[str, Figures] = {}
    for record in records:
        if "test_metric" in record:
            figures.setdefault(record["method"], {})[record["task"], record["seed"]] = record["test_metric"]
    return figures


def difference(one: Figures, other: Figures, tasks: tuple[str, ...] = ()) -> str:
    """Mean paired difference and its 95% interval."""
    pairs = np.array([one[key] - other[key] for key in one if key in other and (not tasks or key[0] in tasks)])
    draws = np.random.default_rng(0).integers(len(pairs), size=(10_000, len(pairs)))
    low, high = np.quantile(pairs[draws].mean(1), (0.025, 0.975))
    return f"{pairs.mean():+.2f} [{low:+.2f}, {high:+.2f}]"


def methods_table(records: list[Record], against: tuple[str, ...]) -> str:
    """A row per method: what it trains, mean test figure per task, differences to others."""
    figures = figures_of(records)
    tasks = list(dict.fromkeys(r["task"] for r in records))
    complete = [method for method, figure in figures.items() if {task for task, _ in figure} == set(tasks)]
    means = {m: {t: stats.mean(v for (task, _), v in figures[m].items() if task == t) for t in tasks} for m in complete}
    lines = [
        f"| method | trained | {' | '.join(tasks)} | mean | {' | '.join(f'− {other}' for other in against)} | rates |",
        "|" + "---|" * (len(tasks) + len(against) + 4),
    ]
    for method in sorted(complete, key=lambda m: -stats.mean(means[m].values())):
        best = [r for r in records if r["method"] == method and "test_metric" in r]
        rates = sorted({r["rate"] for r in best})
        off = [difference(figures[method], figures[other]) if other != method else "" for other in against]
        lines.append(
            f"| {method} | {best[0]['trained']:,} | {' | '.join(f'{means[method][t]:.1f}' for t in tasks)} "
            f"| {stats.mean(means[method].values()):.2f} | {' | '.join(off)} | {rates[0]:g} to {rates[-1]:g} |"
        )
    if left := [method for method in figures if method not in complete]:
        lines.append(f"\nNot run on all tasks for want of time: {', '.join(left)}.")
    return "\n".join(lines)


def on_common_seeds(records: list[Record], methods: set[str]) -> list[Record]:
    """The records of the methods at the (task, seed) that all of them have."""
    figures = figures_of([r for r in records if r["method"] in methods])
    common = set.intersection(*(set(figure) for figure in figures.values()))
    return [r for r in records if r["method"] in methods and (r["task"], r["seed"]) in common]


def regret_table(rows: list[tuple[str, str]]) -> str:
    """By (phase, method): validation points lost, on average over tasks, where one rate serves all tasks."""
    rates = (0.0025, 0.005, 0.01, 0.02, 0.04)
    lines = [f"| phase | method | {' | '.join(f'{r:g}' for r in rates)} |", "|" + "---|" * (len(rates) + 2)]
    for phase, method in rows:
        by_task: dict[str, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
        mine = [r for r in read(phase) if r["method"] == method]
        tried = Counter((r["task"], r["seed"]) for r in mine)
        for r in mine:
            if tried[r["task"], r["seed"]] > 1:  # later seeds were trained at the chosen rate alone
                by_task[r["task"]][round(r["rate"], 6)].append(r["validation_metric"])
        means = [{rate: stats.mean(v) for rate, v in by_rate.items()} for by_rate in by_task.values()]
        lost = [
            f"{stats.mean(max(m.values()) - m[rate] for m in means):.2f}" if all(rate in m for m in means) else "—"
            for rate in rates
        ]
        lines.append(f"| {phase} | {method} | {' | '.join(lost)} |")
    return "\n".join(lines)


def rules_table(rows: list[tuple[str, str, float]]) -> str:
    """By (phase, method, share): validation points lost at c / √share, over the encoder's classification tasks and over the two others.

    "left out": at each task the c, of those shown, that loses least on the others of its kind.
    """
    kinds = (("classes", CLASSES), ("score, tags", ("movie_score", "capitals")))
    factors = (5e-4, 1e-3)
    heads = [f"{kind}: {word}" for kind, _ in kinds for word in ("half", "whole", "left out")]
    lines = [f"| phase | method | {' | '.join(heads)} |", "|" + "---|" * (len(heads) + 2)]
    for phase, method, share in rows:
        cells = []
        for _, tasks in kinds:
            lost = []  # by task, at each factor
            for task in tasks:
                by_rate: dict[float, list[float]] = defaultdict(list)
                for r in read(phase):
                    if (r["method"], r["task"]) == (method, task):
                        by_rate[round(r["rate"], 6)].append(r["validation_metric"])
                means = {rate: stats.mean(values) for rate, values in by_rate.items()}
                lost.append([max(means.values()) - means[round(factor / share**0.5, 6)] for factor in factors])
            left = []
            for i, own in enumerate(lost):
                others = [stats.mean(task[j] for k, task in enumerate(lost) if k != i) for j in range(len(factors))]
                left.append(own[others.index(min(others))])
            cells += [
                *(f"{stats.mean(task[j] for task in lost):.2f}" for j in range(len(factors))),
                f"{stats.mean(left):.2f}",
            ]
        lines.append(f"| {phase} | {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def on_an_edge(phase: str) -> str:
    """How many pairs of task and method have their best rate on an edge of those tried, and of how many."""
    tried: dict[tuple[str, str], set[float]] = defaultdict(set)
    best: dict[tuple[str, str], float] = {}
    for r in read(phase):
        tried[r["task"], r["method"]].add(r["rate"])
        if "test_metric" in r:
            best[r["task"], r["method"]] = r["rate"]
    edges = sum(rate in (min(tried[pair]), max(tried[pair])) for pair, rate in best.items())
    return f"{phase} {edges} of {len(best)}"


def goals_table() -> str:
    encoder, confirm, decoder, cover = (figures_of(read(phase)) for phase in ("encoder", "confirm", "decoder", "cover"))
    rows = []
    for name in (SIMPLE, BEST, LARGER):
        for other in ("LoRA 4", "LoRA 4, equal cost", "full", "full, equal cost", "random 0.25%"):
            rows.append((f"MiniLM: {name} − {other}", difference(confirm[name], confirm[other])))
        rows.append(
            (f"MiniLM, the 5 classification tasks: {name} − full", difference(confirm[name], confirm["full"], CLASSES))
        )
    for other in ("full", "full, equal cost", "LoRA 8", "LoRA 8, equal cost", "random 1%"):
        rows.append((f"SmolLM2: weights 1% − {other}", difference(decoder["weights 1%"], decoder[other])))
    for other in ("LoRA 1", "LoRA 1, equal cost"):
        rows.append((f"SmolLM2: weights 0.25% − {other}", difference(decoder["weights 0.25%"], decoder[other])))
    rows.append(
        ("SmolLM2: weights 0.25% − random 0.25%", difference(decoder["weights 0.25%"], decoder["random 0.25%"]))
    )
    fixed = "LoRA 16, A from movement and fixed"
    for other in ("LoRA 8", "LoRA 8, equal cost", "full"):
        rows.append((f"SmolLM2: {fixed} − {other}", difference(decoder[fixed], decoder[other])))
    for name in ("both first", "both first, relative", "both first, 200 steps"):
        for other in ("LoRA 4", "full", "random, both first"):
            rows.append((f"MiniLM, six more seeds: {name} − {other}", difference(cover[name], cover[other])))
    for name in ("columns 1%, diverse movement", "columns 1%, diverse", "LoRA 5, A from movement and fixed"):
        rows.append((f"MiniLM: {name} − LoRA 3", difference(encoder[name], encoder["LoRA 3"])))
    image = figures_of(read("image"))
    for name, others in (
        ("weights 0.25%", ("LoRA 1", "LoRA 1, equal cost", "full", "full, equal cost", "random 0.25%")),
        ("weights 1%", ("LoRA 4", "LoRA 4, equal cost", "full", "full, equal cost", "random 1%")),
    ):
        for other in others:
            rows.append((f"ViT: {name} − {other}", difference(image[name], image[other])))
    return "\n".join(["| case | points [95%] |", "|---|---|", *(f"| {case} | {figure} |" for case, figure in rows)])


def chance_table() -> str:
    """Choices beside random ones of the same kind and size."""
    explore, confirm, decoder = (figures_of(read(phase)) for phase in ("explore", "confirm", "decoder"))
    rows = [
        ("single weights, `movement`, 100 steps (the default)", confirm, SIMPLE, "random 0.25%"),
        ("single weights, `movement`, 50 steps", explore, "sign 50 all moved", "random"),
        ("single weights, signs of the gradient, nothing moves", explore, "sign 50 still", "random"),
        ("single weights, summed gradient over its deviation, along the path", explore, "sign 50 by SNR", "random"),
        ("single weights of SmolLM2, `movement`, 0.25%", decoder, "weights 0.25%", "random 0.25%"),
        ("single weights of SmolLM2, `movement`, 1%", decoder, "weights 1%", "random 1%"),
        ("columns, `fisher`", explore, "columns Fisher", "columns random"),
        ("columns, `fisher` of centred inputs", explore, "columns centred Fisher", "columns random"),
        ("columns, `movement`", explore, "columns movement", "columns random"),
        ("columns, diverse in the inputs", explore, "columns diverse", "columns random"),
        ("columns, diverse in the movement", explore, "columns diverse movement", "columns random"),
    ]
    lines = [f"| {name} | {difference(phase[one], phase[other])} |" for name, phase, one, other in rows]
    return "\n".join(["| chosen | points above chance [95%] |", "|---|---|", *lines])


def page() -> str:
    runs = {phase: head_of(phase)["runs"] for phase in PHASES}
    commits = ", ".join(f"{phase} {'+'.join(run['commit'] for run in mine)}" for phase, mine in runs.items())
    decoder = read("decoder")
    more = {r["method"] for r in decoder if r["seed"] >= 3}
    later = figures_of(read("proof_decoder"))
    text = (HERE / "selection_page.md").read_text(encoding="utf-8")
    parts = {
        "about": f"{runs['confirm'][0]['hardware']}, torch {runs['confirm'][0]['torch']}; commits: {commits}",
        "later lora": difference(later["weights 0.5%"], later["LoRA 8, equal cost"]),
        "later full": difference(later["weights 0.5%"], later["full, equal cost"]),
        "goals": goals_table(),
        "chance": chance_table(),
        "edges": ", ".join(map(on_an_edge, PHASES)),
        "explore": methods_table(read("explore"), ("LoRA 4", "full", "random")),
        "encoder": methods_table(read("encoder"), ("LoRA 4", "full", "random 0.25%")),
        "confirm": methods_table(read("confirm"), ("LoRA 4", "full", "random 0.25%")),
        "decoder": methods_table([r for r in decoder if r["seed"] < 3], ("LoRA 8", "full", "random 1%")),
        "decoder more": methods_table(on_common_seeds(decoder, more), ("LoRA 8", "full", "full, equal cost")),
        "heads": methods_table(read("heads"), ("full",)),
        "cover": methods_table(read("cover"), ("LoRA 4", "full", "random, both first")),
        "image": methods_table(read("image"), ("LoRA 4", "full", "random 0.25%")),
        "regret": regret_table(
            [
                ("encoder", "weights 0.1%"),
                ("confirm", SIMPLE),
                ("confirm", BEST),
                ("encoder", "weights 1%"),
                ("confirm", LARGER),
                ("decoder", "weights 0.25%"),
                ("decoder", "weights 1%"),
                ("image", "weights 0.25%"),
                ("image", "weights 1%"),
            ]
        ),
    }
    parts["rules"] = rules_table(
        [
            *(
                ("encoder", f"weights 0.25%{more}", 0.0025)
                for more in ("", ", 100 steps", ", relative", ", columns first")
            ),
            ("confirm", SIMPLE, 0.0025),
            ("confirm", BEST, 0.0025),
            *(("cover", name, 0.0025) for name in ("both first", "both first, relative", "both first, 200 steps")),
            ("encoder", "weights 1%", 0.01),
            ("confirm", LARGER, 0.01),
        ]
    )
    for name, value in parts.items():
        assert f"{{{name}}}" in text, name
        text = text.replace(f"{{{name}}}", value)
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path, help="folder with the study's PHASE.jsonl")
    parser.add_argument("--commits", nargs="*", default=[], help="that each phase ran, like explore=64d8636")
    parser.add_argument("--hardware", default="")
    parser.add_argument("--torch", default="", help="its version there")
    options = parser.parse_args()
    if options.keep:
        commits = dict(word.split("=") for word in options.commits)
        keep(options.keep, commits, {"hardware": options.hardware, "torch": options.torch})
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
