"""docs/results.md, from the records of selection_study.py: every way to train, side by side.

    python benchmarks/results_page.py

selection_tables.py --keep puts the records into benchmarks/results first. All figures of the page are computed here; the text around
them is results_page.md. Test figures are at the rate that validation chose per method and task. Differences are paired over task and
seed; the intervals are 95% by bootstrap over the pairs (10,000 draws).
"""

from __future__ import annotations

import re
import statistics as stats
from collections.abc import Callable

import numpy as np
from scipy.stats import rankdata

import results_picture
import selection_tables as tables
from selection_tables import Figures, Record, difference, figures_of, read

PAGE = tables.HERE.parent / "docs" / "results.md"
PICTURE = PAGE.with_suffix(".svg")
TEXT = tables.HERE / "results_page.md"
MODEL = {
    "proof": 22_713_216,
    "proof_decoder": 134_515_008,
}  # weights of MiniLM-L6, whose whole vocabulary counts, and of SmolLM2
LORA = {"proof": "LoRA 4", "proof_decoder": "LoRA 8"}
MAIN = {"proof": "weights 0.12%", "proof_decoder": "weights 0.5%"}
SIZES = ("0.05%", "0.12%", "0.5%", "2%")
FAMILIES = (
    "weights",
    "random",
    "NeuroAda",
    "SHiRA-WM",
    "SHiRA-Grad",
    "SHiRA-SNIP",
    "SMT",
    "columns",
    "directions",
    "Spectrum",
)
PROBED = ("weights", "directions", "columns")  # measured by 100 steps of the probe before training
WARMED = ("SMT",)  # by 100 steps of full tuning
NEWS = ("bbc", "capitals")  # made of the texts that forgetting is measured on
SMALL = (200, 2000, 10000)
FLIPPED = ("0%", "10%", "30%")


NEEDS = {"correlation": "depth", "nearly_all_kept": "depth", "again": "depth"}  # what functions without a phase read

UNFINISHED = "Not run to its end yet."


def finished() -> tuple[str, ...]:
    """The phases that have what all others of it are compared with."""
    wanted = {phase: {MAIN[phase], LORA[phase], "full"} for phase in MAIN}
    few = {MAIN["proof"], LORA["proof"], "full"}
    wanted |= {"small_data": few, "noise": few, "depth": {MAIN["proof"]}}
    there = [phase for phase in tables.SIDE_BY_SIDE if (tables.RESULTS / f"selection_{phase}.json").exists()]
    return tuple(phase for phase in there if wanted[phase] <= set(complete(read(phase))))


def family(method: str) -> str:
    return method.split(" ")[0].rstrip(",")


def trained(records: list[Record]) -> dict[str, int]:
    return {r["method"]: r["trained"] for r in records}


def steps_of(records: list[Record], method: str) -> str:
    """Training steps, and those of the probe or of the warm-up before them; the most of any task."""
    own = max(r["steps"] for r in records if r["method"] == method)
    return f"{own} + 100" if family(method) in (*PROBED, *WARMED) else str(own)


def complete(records: list[Record]) -> dict[str, Figures]:
    """The figures of the methods that ran on all tasks, and there on all seeds."""
    figures = figures_of(records)
    every = {key for figure in figures.values() for key in figure}
    return {method: figure for method, figure in figures.items() if set(figure) == every}


def partly(records: list[Record]) -> dict[str, tuple[str, ...]]:
    """By method that did not run on all tasks and seeds, the tasks on which it did run on all seeds."""
    figures, whole = figures_of(records), complete(records)
    every = {key for figure in figures.values() for key in figure}
    tasks = list(dict.fromkeys(r["task"] for r in records))
    found = {}
    for method in (m for m in dict.fromkeys(r["method"] for r in records) if m not in whole):
        missing = {task for task, _ in every - set(figures.get(method, {}))}
        found[method] = tuple(task for task in tasks if task not in missing)
    return found


def mean(figures: Figures, tasks: tuple[str, ...] = ()) -> float:
    """Over the tasks, each the mean over its seeds."""
    by_task: dict[str, list[float]] = {}
    for (task, _), value in figures.items():
        if not tasks or task in tasks:
            by_task.setdefault(task, []).append(value)
    return stats.mean(stats.mean(values) for values in by_task.values())


def spread(figures: Figures) -> float:
    """Standard deviation over the seeds of the mean over the tasks."""
    by_seed: dict[int, list[float]] = {}
    for (_, seed), value in figures.items():
        by_seed.setdefault(seed, []).append(value)
    return stats.stdev(stats.mean(values) for values in by_seed.values())


def forgotten(phase: str) -> dict[str, Figures]:
    """By method and (task, seed): by how much the loss on plain text rose. Without the tasks that are made of those texts."""
    before = tables.head_of(phase)["plain_loss_before"]
    rise: dict[str, Figures] = {}
    for r in read(phase):
        if r.get("plain_loss") is not None and r["task"] not in NEWS:
            rise.setdefault(r["method"], {})[r["task"], r["seed"]] = r["plain_loss"] - before
    return rise


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])


def quality(phase: str) -> str:
    """A row per method at equal steps, best first; those of equal total cost are in a table of their own."""
    records = read(phase)
    figures = complete(records)
    tasks = tuple(dict.fromkeys(task for task, _ in next(iter(figures.values()))))
    size, rise, edges = trained(records), forgotten(phase), on_edges(records)
    rows = []
    for method in sorted(figures, key=lambda m: -mean(figures[m])):
        if "equal cost" in method:
            continue
        off = [
            "" if other == method else difference(figures[method], figures[other]) for other in (LORA[phase], "full")
        ]
        share = 100 * size[method] / MODEL[phase] if method != "full" else 100
        flag = " †" if method in edges else ""
        rows.append(
            [f"**{method}**" if method == MAIN[phase] else method, f"{size[method]:,}", f"{share:.3g}%"]
            + [steps_of(records, method)]
            + [f"{mean(figures[method], (task,)):.1f}" for task in tasks]
            + [f"{mean(figures[method]):.2f} ± {spread(figures[method]):.2f}{flag}", *off]
            + [f"{mean(rise[method]):+.3f}"]
        )
    head = ["method", "trained", "of the model", "steps", *tasks, "mean", f"− {LORA[phase]}", "− full", "forgotten"]
    return table(head, rows) + left_out(phase)


def left_out(phase: str) -> str:
    missing = [f"{method} ({', '.join(tasks) or 'not a whole task'})" for method, tasks in partly(read(phase)).items()]
    text = f"\n\nNot run on all tasks, and so not shown: {', '.join(missing)}." if missing else ""
    return text + (f"\n\nPlanned and not run: {', '.join(never)}." if (never := not_run(phase)) else "")


def not_run(phase: str) -> list[str]:
    """The methods that the study names and of which there is no record."""
    import selection_study

    there = {r["method"] for r in read(phase)}
    return [method for method in selection_study.PHASES[phase].methods if method not in there]


def by_task(phase: str, one: str, *others: str) -> str:
    """In the text: {by_task|proof_decoder|weights 0.5%|LoRA 8|full}: mean differences on each task, over its seeds."""
    figures = complete(read(phase))
    tasks = dict.fromkeys(task for task, _ in figures[one])
    rows = [
        [f"− {other}", *(f"{mean(figures[one], (task,)) - mean(figures[other], (task,)):+.1f}" for task in tasks)]
        for other in others
        if other in figures
    ]
    return table([one, *tasks], rows)


def on_edges(records: list[Record]) -> dict[str, list[str]]:
    """By method, the tasks whose best rate lies on an edge of those tried."""
    found: dict[str, list[str]] = {}
    for method, task in dict.fromkeys((r["method"], r["task"]) for r in records):
        mine = [r for r in records if (r["method"], r["task"]) == (method, task)]
        rates = {r["rate"] for r in mine}
        best = {r["rate"] for r in mine if "test_metric" in r}
        if best & {min(rates), max(rates)}:
            found.setdefault(method, []).append(task)
    return found


def edges() -> str:
    """Pairs of task and method whose best rate is the lowest or the highest tried, after two widenings."""
    parts = []
    for phase in finished():
        records = read(phase)
        pairs = {(r["method"], r["task"]) for r in records}
        parts.append(f"{phase} {sum(map(len, on_edges(records).values()))} of {len(pairs)}")
    return ", ".join(parts)


def equal_cost(phase: str) -> str:
    """What was measured, beside others that were given as many training steps more: in points, and in the loss on plain text."""
    records = read(phase)
    figures, some, rise = figures_of(records), partly(records), forgotten(phase)
    rows = []
    for method in (m for m in (f"weights {size}" for size in SIZES) if m in complete(records)):
        for other in (m for m in dict.fromkeys(r["method"] for r in records) if m.endswith(", equal cost")):
            tasks = some.get(other, ())
            if other in some and not tasks:
                continue
            where = f" ({', '.join(tasks)} alone)" if tasks else ""
            off = difference(figures[method], figures[other], tasks)
            lost = "" if where else differences_of_losses(rise[method], rise[other])
            rows.append([method, other.removesuffix(", equal cost") + where, off, lost])
    head = ["method", "against, with 100 steps more", "points [95%]", "forgotten [95%]"]
    return table(head, rows) if rows else UNFINISHED


def by_size(phase: str) -> str:
    """Means by family and share of the model."""
    figures = complete(read(phase))
    rows = []
    for name in FAMILIES:
        cells = [f"{mean(figures[m]):.2f}" if (m := f"{name} {size}") in figures else "" for size in SIZES]
        if any(cells):
            rows.append([name, *cells])
    return without_empty(["share of the model", *SIZES], rows)


def without_empty(head: list[str], rows: list[list[str]]) -> str:
    """A table of the columns in which something stands."""
    full = [i for i in range(len(head)) if any(row[i] for row in rows)]
    return table([head[i] for i in full], [[row[i] for i in full] for row in rows])


def against_chance(phase: str) -> str:
    """Choices beside random weights of the same size, at equal steps."""
    figures = complete(read(phase))
    rows = []
    for name in (name for name in FAMILIES if name != "random"):
        cells = [
            difference(figures[m], figures[chance])
            if (m := f"{name} {size}") in figures and (chance := f"random {size}") in figures
            else ""
            for size in SIZES
        ]
        if any(cells):
            rows.append([name, *cells])
    return without_empty(["points above random single weights, at equal steps", *SIZES], rows)


def forgetting(phase: str) -> str:
    """By how much the loss on plain text rose, least first, and the difference to full tuning."""
    rise, figures = forgotten(phase), complete(read(phase))
    methods = [m for m in sorted(figures, key=lambda m: mean(rise[m])) if "equal cost" not in m]
    rows = [
        [m, f"{mean(rise[m]):+.3f}"]
        + ["" if m == other else differences_of_losses(rise[m], rise[other]) for other in (LORA[phase], "full")]
        + [f"{mean(figures[m]):.2f}"]
        for m in methods
    ]
    return table(["method", "loss on plain text", f"− {LORA[phase]}", "− full", "own tasks"], rows)


def differences_of_losses(one: Figures, other: Figures) -> str:
    """Mean paired difference with three places and its 95% interval."""
    numbers = re.findall(
        r"[+-][\d.]+", difference({k: 1000 * v for k, v in one.items()}, {k: 1000 * v for k, v in other.items()})
    )
    value, low, high = (float(number) / 1000 for number in numbers)
    return f"{value:+.3f} [{low:+.3f}, {high:+.3f}]"


def grid(levels: list[tuple[str, dict[str, Figures]]], what: str) -> str:
    """A row per method: mean at each level, and the difference to LoRA and to full tuning there."""
    methods = list(dict.fromkeys(m for _, figures in levels for m in figures))
    parts = []

    def cells(method: str, figures: dict[str, Figures]) -> str:
        return f"{mean(figures[method]):.2f}" if method in figures else ""

    parts.append(
        table([what, *(level for level, _ in levels)], [[m, *(cells(m, f) for _, f in levels)] for m in methods])
    )
    for other in ("LoRA 4", "full"):
        rows = [
            [m, *(difference(f[m], f[other]) if m in f and other in f else "" for _, f in levels)]
            for m in methods
            if m != other
        ]
        parts.append(table([f"− {other}", *(level for level, _ in levels)], rows))
    return "\n\n".join(parts)


def named_by_task(figures: dict[str, Figures]) -> dict[str, Figures]:
    """The forms of a task under its own name: "movie, 200 examples" is movie."""
    return {m: {(task.partition(", ")[0], seed): v for (task, seed), v in f.items()} for m, f in figures.items()}


def levels(
    phase: str, whole: str, names: tuple[str, ...], tasks: tuple[str, ...]
) -> list[tuple[str, dict[str, Figures]]]:
    """By level its figures on the tasks; the level ``whole`` is that of the phase proof, with the same methods."""
    records, found = read(phase), []
    methods = {r["method"] for r in records}
    for name in names:
        if name == whole:
            mine = [r for r in read("proof") if r["task"] in tasks and r["method"] in methods]
        else:
            mine = [r for r in records if r["task"] in {f"{task}, {name}" for task in tasks}]
        if mine:
            found.append((name, named_by_task(complete(mine))))
    return found


def small_data() -> str:
    every = tuple(dict.fromkeys(r["task"] for r in read("proof")))
    few = [
        (task, _)
        for task, _, form in (t.partition(", ") for t in {r["task"] for r in read("small_data")})
        if "10000" in form
    ]
    many = tuple(sorted(task for task, _ in few))
    parts = [
        "All seven tasks:",
        grid(levels("small_data", "2000 examples", ("200 examples", "2000 examples"), every), "mean"),
    ]
    if many:
        parts += [
            f"The tasks that have more ({', '.join(many)}; movie has 8,300 and movie_score 8,600 to train on):",
            grid(
                levels("small_data", "2000 examples", ("200 examples", "2000 examples", "10000 examples"), many), "mean"
            ),
        ]
    return "\n\n".join(parts)


def noise() -> str:
    tasks = tuple(sorted({r["task"].partition(", ")[0] for r in read("noise")}))
    return f"Mean over {', '.join(tasks)}:\n\n" + grid(
        levels("noise", "0% flipped", ("0% flipped", "10% flipped", "30% flipped"), tasks), "mean"
    )


def depth() -> str:
    """What each cut-off costs, beside the share of relevance that it keeps: over all tasks, and by task."""
    lost, kept = losses_by_depth()
    figures = complete(read("depth"))
    whole = MAIN["proof"]
    tasks = list(kept[whole])
    rows, by_task = [], []
    for method in figures:
        name = method.removeprefix(f"{whole}, ") if method != whole else "all layers"
        shares = kept[method].values()
        off = difference(figures[method], figures[whole]) if method != whole else ""
        between = f" ({100 * min(shares):.1f} to {100 * max(shares):.1f})" if method != whole else ""
        rows.append([name, f"{100 * stats.mean(shares):.1f}%{between}", f"{mean(figures[method]):.2f}", off])
        if method != whole:
            by_task.append(
                [name, *(f"{round(-lost[method][t], 1) + 0.0:+.1f} ({100 * kept[method][t]:.0f}%)" for t in tasks)]
            )
    parts = [
        table(["trained", "of the relevance kept (over the tasks)", "mean", "− all layers"], rows),
        "By task, the difference and in brackets the share that is kept:",
        table(["trained", *tasks], by_task),
    ]
    return "\n\n".join(parts)


def losses_by_depth() -> tuple[dict[str, dict[str, float]], dict[str, dict[str, float]]]:
    """By method and task, means over the seeds: points lost against no cut-off, and the share of the relevance that is kept."""
    records = read("depth")
    figures = complete(records)
    whole = figures[MAIN["proof"]]
    tasks = list(dict.fromkeys(task for task, _ in whole))
    lost = {m: {task: mean(whole, (task,)) - mean(f, (task,)) for task in tasks} for m, f in figures.items()}
    kept = {
        m: {
            task: stats.mean(
                r["relevance_kept"]
                for r in records
                if (r["method"], r["task"]) == (m, task) and "test_metric" in r  # once for each seed
            )
            for task in tasks
        }
        for m in figures
    }
    return lost, kept


def ranks(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Spearman's rank correlation along the last axis; 0 where one of the two is the same everywhere."""
    a, b = (r - r.mean(-1, keepdims=True) for r in (rankdata(one, axis=-1), rankdata(other, axis=-1)))
    scale = np.sqrt((a**2).sum(-1) * (b**2).sum(-1))
    return np.divide((a * b).sum(-1), scale, out=np.zeros_like(scale), where=scale > 0)


def share_and_loss() -> dict[str, tuple[float, float, float]]:
    """Rank correlations with the points that a cut-off loses, and their 95% intervals by bootstrap over the tasks (1,000 draws)."""
    lost, kept = losses_by_depth()
    cut = [method for method in lost if method != MAIN["proof"]]
    shares, points = (np.array([list(of[m].values()) for m in cut]) for of in (kept, lost))  # (cut-offs, tasks)
    layers = np.array([float(re.findall(r"top (\d+)", m)[0]) for m in cut])

    def correlations(tasks: np.ndarray) -> dict[str, np.ndarray]:
        s, p = (values[:, tasks].swapaxes(0, 1) for values in (shares, points))  # (draws, cut-offs, tasks)
        n = np.broadcast_to(layers[:, None], s.shape)
        every, points_of_all, layers_of_all = (values.reshape(len(tasks), -1) for values in (s, p, n))
        return {
            "the share that is kept, all pairs of task and cut-off": ranks(every, points_of_all),
            "the number of layers trained, all pairs": ranks(layers_of_all, points_of_all),
            "the share, over the cut-offs of a task; the mean of the tasks": ranks(
                s.swapaxes(1, 2), p.swapaxes(1, 2)
            ).mean(-1),
            "the share, over the tasks at a cut-off; the mean of the cut-offs": ranks(s, p).mean(-1),
        }

    n_tasks = shares.shape[1]
    drawn = correlations(np.random.default_rng(0).integers(n_tasks, size=(1000, n_tasks)))
    found = correlations(np.arange(n_tasks)[None])
    return {
        name: (float(value[0]), *np.quantile(drawn[name], (0.025, 0.975)).tolist()) for name, value in found.items()
    }


def correlation() -> str:
    rows = [[name, f"{value:+.2f} [{low:+.2f}, {high:+.2f}]"] for name, (value, low, high) in share_and_loss().items()]
    return table(["rank correlation with the points lost (Spearman)", "[95%, tasks drawn anew]"], rows)


def nearly_all_kept(least: str) -> str:
    """In the text: {nearly_all_kept|0.97}: how the pairs of task and cut-off that keep so much differ from no cut-off."""
    lost, kept = losses_by_depth()
    pairs = [(kept[m][t], lost[m][t]) for m in lost if m != MAIN["proof"] for t in lost[m]]
    points = sorted(loss for share, loss in pairs if share >= float(least))
    if not points:
        return f"None of the {len(pairs)} pairs of task and cut-off keeps {100 * float(least):g}%"
    return (
        f"{len(points)} of the {len(pairs)} pairs of task and cut-off keep {100 * float(least):g}% or more, and differ from all "
        f"layers by {-points[0]:+.1f} to {-points[-1]:+.1f} points"
    )


def what_does_not_pay(phase: str) -> str:
    """What was not shown to beat random weights of its size, is behind a LoRA of at most its size, or has no lead at equal total cost."""
    records = read(phase)
    figures, size = complete(records), trained(records)
    lines = []
    for name in (name for name in FAMILIES if name != "random"):
        for share in SIZES:
            one, chance = f"{name} {share}", f"random {share}"
            if one in figures and chance in figures:
                off = difference(figures[one], figures[chance])
                if low_end(off) <= 0:
                    lines.append(f"- {one} was not shown to beat random weights of that size: {off}.")
    loras = [m for m in figures if m.startswith("LoRA") and "equal cost" not in m]
    for method in figures:
        smaller = [m for m in loras if size[m] <= size[method] and m != method]
        if smaller and "equal cost" not in method:
            best = max(smaller, key=lambda m: mean(figures[m]))
            off = difference(figures[method], figures[best])
            if high_end(off) < 0:
                lines.append(f"- {method} ({size[method]:,}) is behind {best} ({size[best]:,}): {off}.")
    for method in (m for m in (f"weights {share}" for share in SIZES) if m in figures):
        for other in (m for m in figures if m.endswith(", equal cost")):
            off = difference(figures[method], figures[other])
            if low_end(off) <= 0:
                is_not = "is behind" if high_end(off) < 0 else "was not shown to beat"
                lines.append(f"- {method} {is_not} {other.removesuffix(', equal cost')} with 100 steps more: {off}.")
    return "\n".join(lines) or "- None of the methods that ran."


def low_end(interval: str) -> float:
    return float(re.findall(r"[+-][\d.]+", interval)[1])


def high_end(interval: str) -> float:
    return float(re.findall(r"[+-][\d.]+", interval)[2])


def about() -> str:
    """A row per run: what was trained by which commit, and on what."""
    rows = []
    for phase in finished():
        runs = tables.head_of(phase)["runs"]
        rows += [
            [f"selection_{phase}.json", f"{r['trainings']:,}", r["commit"], f"{r['hardware']}, torch {r['torch']}"]
            for r in runs
        ]
    return table(["record", "trainings", "commit", "on"], rows)


def again(method: str) -> str:
    """In the text: {again|weights 0.12%}, which the phases proof and depth both trained: by how much the later figures differ."""
    one, other = (figures_of(read(phase)).get(method, {}) for phase in ("depth", "proof"))
    spread = stats.stdev(one[key] - other[key] for key in one if key in other)
    return f"{difference(one, other)}, with a standard deviation of {spread:.1f} over task and seed"


def numbers() -> str:
    counts = [len(read(phase)) for phase in finished()]
    return f"{sum(counts):,}"


def page() -> str:
    """The text with its figures: {name} or {name phase} is what the function of that name gives."""
    functions: dict[str, Callable[..., str]] = {
        f.__name__: f
        for f in (
            about,
            numbers,
            edges,
            quality,
            equal_cost,
            by_size,
            against_chance,
            forgetting,
            small_data,
            noise,
            depth,
            correlation,
            nearly_all_kept,
            again,
            by_task,
            what_does_not_pay,
            off,
            paired,
            forgot,
            value,
            times,
            plain_before,
        )
    }

    phases = finished()

    def filled(match: re.Match[str]) -> str:
        name, *arguments = [part.strip() for part in match[1].split("|")]
        phase = NEEDS.get(name) or (arguments[0] if arguments else name)
        if phase in tables.SIDE_BY_SIDE and phase not in phases:
            return UNFINISHED
        return functions[name](*arguments)

    return re.sub(r"\{(\w[^{}]*)\}", filled, TEXT.read_text(encoding="utf-8"))


def off(phase: str, one: str, other: str, *tasks: str) -> str:
    """In the text: {off|proof|weights 0.12%|LoRA 4}."""
    figures = complete([r for r in read(phase) if not tasks or r["task"] in tasks])
    return difference(figures[one], figures[other]) if {one, other} <= set(figures) else "(not run)"


def paired(phase: str, one: str, other: str) -> str:
    """As ``off``, over the tasks and seeds that both have: in earlier phases they are not as many for all methods."""
    figures = figures_of(read(phase))
    return difference(figures[one], figures[other])


def forgot(phase: str, one: str, other: str) -> str:
    """In the text: {forgot|proof_decoder|weights 0.5%|LoRA 8}: the difference in the loss on plain text."""
    rise = forgotten(phase)
    return differences_of_losses(rise[one], rise[other]) if {one, other} <= set(complete(read(phase))) else "(not run)"


def value(phase: str, method: str) -> str:
    """In the text: {value|proof_decoder|LoRA 8, equal cost}: the mean test figure."""
    figures = complete(read(phase))
    return f"{mean(figures[method]):.2f}" if method in figures else "(not run)"


def times(phase: str, one: str, other: str) -> str:
    """In the text: {times|proof_decoder|LoRA 8|weights 0.5%}: how many times as many numbers the one trains as the other."""
    size = trained(read(phase))
    return f"{size[one] / size[other]:.1f}"


def plain_before(phase: str) -> str:
    return f"{tables.head_of(phase)['plain_loss_before']:.3f}"


def drawing() -> str:
    """docs/results.svg: the models of which others were given the probe's steps as well."""
    rows = []
    for phase, name in (("proof", "MiniLM-L6, seven tasks"), ("proof_decoder", "SmolLM2-135M, four tasks")):
        if phase not in finished():
            continue
        records = read(phase)
        figures, size = complete(records), trained(records)
        if not {f"{LORA[phase]}, equal cost", "full, equal cost"} <= set(figures):
            continue  # against steps, weights alone would stand at the right
        by_share: dict[str, list[results_picture.Point]] = {}
        by_steps: dict[str, list[results_picture.Point]] = {}
        compared = ("full", LORA[phase], *(name for name in figures if family(name) == "weights"))
        for method, mine in figures.items():
            if family(method) not in results_picture.COLOURS:
                continue
            plain = method.removesuffix(", equal cost")
            if method == plain:
                share = 100 if method == "full" else 100 * size[method] / MODEL[phase]
                by_share.setdefault(family(method), []).append((share, mean(mine), ""))
            if plain in compared:
                steps = sum(int(part) for part in steps_of(records, method).split(" + "))
                words = "" if f"{method}, equal cost" in figures else plain
                by_steps.setdefault(family(method), []).append((steps, mean(mine), words))
        rows.append((name, by_share, by_steps))
    return results_picture.picture(rows)


def main() -> None:
    PAGE.write_text(page(), encoding="utf-8")
    PICTURE.write_text(drawing(), encoding="utf-8")


if __name__ == "__main__":
    np.seterr(all="raise")
    main()
