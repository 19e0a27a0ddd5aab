"""docs/results.md would say what its records say: on made records, whose figures are known."""

import json
import re

import numpy as np
import pytest
from scipy.stats import spearmanr

import results_page
import results_picture
import selection_tables

GOOD = {"weights": 85.0, "LoRA": 84.0, "full": 86.0, "random": 83.0, "SMT": 82.0, "NeuroAda": 84.5}
SIZES = {"weights": 27_000, "LoRA": 166_000, "full": 19_000_000, "random": 27_000, "SMT": 500_000, "NeuroAda": 27_000}


def made(phase, tasks, methods, seeds=3):
    """Every rate of every method; the middle one is the best. Full tuning forgets 1, others a tenth; more on news."""
    records = []
    for method in methods:
        name = method.split(" ")[0].rstrip(",")
        for task in tasks:
            for seed in range(seeds):
                for rate in (1e-3, 1e-2, 1e-1):
                    record = {"task": task, "method": method, "rate": rate, "seed": seed, "steps": 187}
                    record |= {"trained": SIZES[name], "validation_metric": 80 + (rate == 1e-2), "validation_loss": 1.0}
                    if rate == 1e-2:
                        rise = (1.0 if name == "full" else 0.1) + 5 * (task in results_page.NEWS)
                        record |= {"test_metric": GOOD[name] + len(task) + seed / 10, "test_loss": 1.0}
                        record |= {"plain_before": 3.0, "plain_loss": 3.0 + rise}
                    records.append(record)
    return records


def keep(folder, commit, phases):
    selection_tables.keep(folder, dict.fromkeys(phases, commit), {"hardware": "made", "torch": "0"})


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    folder, results = tmp_path_factory.mktemp("study"), tmp_path_factory.mktemp("results")
    phases = {}
    for phase, size, lora in (("proof", "0.12%", "LoRA 4"), ("proof_decoder", "0.5%", "LoRA 8")):
        tasks = ("movie", "bbc", "nyt") if phase == "proof" else ("gcd", "sums")
        families = [f"{name} {size}" for name in ("weights", "random", "SMT", "NeuroAda")]
        phases[phase] = made(phase, tasks, [*families, lora, "full", f"{lora}, equal cost", "full, equal cost"])
    phases["proof_decoder"] = [
        r for r in phases["proof_decoder"] if (r["method"], r["task"]) != ("LoRA 8, equal cost", "sums")
    ]
    phases["proof"] = [r for r in phases["proof"] if (r["method"], r["task"]) != ("NeuroAda 0.12%", "nyt")]
    phases["decoder"] = made("decoder", ("gcd", "sums"), ["weights 1%", "LoRA 8, equal cost"])
    few = ["weights 0.12%", "LoRA 4", "full"]
    phases["small_data"] = made("small_data", ("movie, 200 examples", "bbc, 200 examples", "nyt, 200 examples"), few)
    phases["small_data"] += made("small_data", ("movie, 10000 examples",), few)
    phases["noise"] = made("noise", ("movie, 10% flipped", "movie, 30% flipped"), few)
    deep = ["weights 0.12%", "weights 0.12%, top 3 of 6 layers"]
    phases["depth"] = made("depth", ("movie", "bbc"), deep)
    for r in phases["depth"]:
        r["relevance_kept"] = 0.75 + (r["task"] == "bbc") / 10 if "top" in r["method"] else 1.0
        if "top" in r["method"] and "test_metric" in r:
            r["test_metric"] -= 1 if r["task"] == "bbc" else 3
    for phase, lines in phases.items():
        (folder / f"{phase}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines), encoding="utf-8")
    patch = pytest.MonkeyPatch()
    patch.setattr(selection_tables, "RESULTS", results)
    keep(folder, "abc", phases)
    keep(folder, "abc", phases)  # the same again
    yield phases
    patch.undo()


def test_records_are_kept_once(records):
    for phase, lines in records.items():
        assert len(selection_tables.read(phase)) == len(lines)


def test_methods_stand_in_order_with_their_differences_and_what_they_forget(records):
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in results_page.quality("proof").splitlines()]
    named = {row[0]: row for row in rows if len(row) > 3}
    assert [row[0] for row in rows[2:7]] == ["full", "**weights 0.12%**", "LoRA 4", "random 0.12%", "SMT 0.12%"]
    assert named["full"][2] == "100%" and named["LoRA 4"][2] == "0.731%"
    assert named["**weights 0.12%**"][3] == "187 + 100" and named["LoRA 4"][3] == "187"
    assert named["**weights 0.12%**"][-3:] == ["+1.00 [+1.00, +1.00]", "-1.00 [-1.00, -1.00]", "+0.100"]
    assert named["full"][-1] == "+1.000"  # not 6 on news, which is made of the text
    assert "Not run on all tasks, and so not shown: NeuroAda 0.12% (movie, bbc)." in results_page.quality("proof")


def test_of_a_method_that_ran_on_some_tasks_there_are_no_means_over_those(records):
    assert results_page.partly(selection_tables.read("proof_decoder")) == {"LoRA 8, equal cost": ("gcd",)}
    assert results_page.equal_cost("proof_decoder").splitlines()[2:] == [
        "| weights 0.5% | LoRA 8 (gcd alone) | +1.00 [+1.00, +1.00] |  |",
        "| weights 0.5% | full | -1.00 [-1.00, -1.00] | -0.900 [-0.900, -0.900] |",
    ]
    assert results_page.forgot("proof_decoder", "weights 0.5%", "LoRA 8, equal cost") == "(not run)"
    assert results_page.forgot("proof_decoder", "full", "LoRA 8") == "+0.900 [+0.900, +0.900]"
    assert results_page.value("proof_decoder", "LoRA 8, equal cost") == "(not run)"
    assert results_page.by_task("proof_decoder", "weights 0.5%", "full", "LoRA 8, equal cost").splitlines()[2:] == [
        "| − full | -1.0 | -1.0 |"
    ]
    assert results_page.paired("proof_decoder", "weights 0.5%", "LoRA 8, equal cost") == "+1.00 [+1.00, +1.00]"
    assert results_page.off("proof_decoder", "LoRA 8, equal cost", "LoRA 8") == "(not run)"
    assert results_page.off("proof_decoder", "weights 0.5%", "LoRA 8, equal cost", "gcd") == "+1.00 [+1.00, +1.00]"
    assert "SmolLM2" not in results_page.drawing() and "MiniLM" in results_page.drawing()


def test_what_was_planned_and_not_run_is_named(records):
    assert results_page.left_out("noise") == "\n\nPlanned and not run: random 0.12%, biases, norms."


def test_words_beside_points_do_not_run_into_one_another():
    assert results_picture.apart([10, 60, 61, 62, 200]) == [10, 47, 61, 75, 200]
    assert results_picture.apart([40, 50, 60]) == [36, 50, 64]
    assert results_picture.apart([]) == []


def test_a_cut_off_is_beside_the_relevance_it_keeps(records):
    depth = results_page.depth().splitlines()
    assert "| top 3 of 6 layers | 80.0% (75.0 to 85.0) | 87.10 | -2.00 [-2.67, -1.33] |" in depth
    assert "| top 3 of 6 layers | -3.0 (75%) | -1.0 (85%) |" in depth
    share, layers, *_ = results_page.share_and_loss().values()
    assert share[0] == pytest.approx(-1) and layers[0] == 0  # one cut-off alone has no order of depth
    assert results_page.nearly_all_kept("0.8").endswith("layers by -1.0 to -1.0 points")


def test_ranks_are_correlated_as_scipy_does(records):
    draw = np.random.default_rng(0)
    one, other = draw.integers(5, size=30).astype(float), draw.normal(size=30)
    assert results_page.ranks(one, other) == pytest.approx(spearmanr(one, other).statistic)
    assert results_page.ranks(np.ones(3), np.arange(3.0)) == 0


def test_a_record_says_which_run_its_trainings_are_of(tmp_path, monkeypatch):
    monkeypatch.setattr(selection_tables, "RESULTS", tmp_path)
    folder = tmp_path / "study"
    folder.mkdir()

    def ran(commit, methods, before=3.0):
        lines = [
            r | ({"plain_before": before} if "plain_before" in r else {}) for r in made("noise", ["movie"], methods)
        ]
        (folder / "noise.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines), encoding="utf-8")
        keep(folder, commit, ["noise"])
        return [(run["commit"], run["trainings"]) for run in selection_tables.head_of("noise")["runs"]]

    assert ran("abc", ["full", "LoRA 4"]) == [("abc", 18)]
    assert ran("def", ["weights 0.12%"]) == [("abc", 18), ("def", 9)]
    assert ran("def", ["LoRA 4"]) == [("abc", 9), ("def", 18)]  # replaced
    assert [r["method"] for r in selection_tables.read("noise")][::9] == ["full", "weights 0.12%", "LoRA 4"]
    assert ran("abc", ["random 0.12%"]) == [("abc", 18), ("def", 18)]
    assert [r["method"] for r in selection_tables.read("noise")][::9] == [
        "full",
        "random 0.12%",
        "weights 0.12%",
        "LoRA 4",
    ]
    assert ran("abc", ["full", "random 0.12%", "weights 0.12%", "LoRA 4"]) == [("abc", 36)]
    with pytest.raises(ValueError, match=r"loss on plain text is 3\.5"):
        ran("ghi", ["full"], before=3.5)


def test_what_does_not_pay_is_named(records):
    assert results_page.what_does_not_pay("proof").splitlines() == [
        "- SMT 0.12% was not shown to beat random weights of that size: -1.00 [-1.00, -1.00].",
        "- SMT 0.12% (500,000) is behind LoRA 4 (166,000): -2.00 [-2.00, -2.00].",
        "- weights 0.12% is behind full with 100 steps more: -1.00 [-1.00, -1.00].",
    ]


def test_the_page_and_its_picture_are_whole(records):
    page = results_page.page()
    assert not re.search(r"\{\w", page)
    assert "| 10000 examples |" in page and "| 0% flipped | 10% flipped | 30% flipped |" in page
    picture = results_page.drawing()
    assert picture.count("<circle") > 10 and picture.rstrip().endswith("</svg>")
