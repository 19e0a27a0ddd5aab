"""docs/results.md and its picture say what the records say."""

import json

import pytest

import results_page
import selection_study
import selection_tables


def test_the_page_and_the_picture_are_made_from_the_records():
    assert results_page.PAGE.read_text(encoding="utf-8") == results_page.page()
    assert results_page.PICTURE.read_text(encoding="utf-8") == results_page.drawing()


@pytest.mark.parametrize("path", sorted(selection_tables.RESULTS.glob("selection_*.json")), ids=lambda path: path.stem)
def test_every_training_is_of_a_run(path):
    record = json.loads(path.read_text(encoding="utf-8"))
    assert sum(run["trainings"] for run in record["runs"]) == len(record["trainings"])


def test_what_the_page_says_of_depth_is_so():
    lost, kept = results_page.losses_by_depth()
    top = "weights 0.12%, top 1 of 6 layers"
    assert min(lost[top], key=lost[top].get) == "bbc" and max(lost[top], key=lost[top].get) == "capitals"
    assert kept[top]["bbc"] > 1 and kept[top]["capitals"] > 1
    share, layers, _, between_tasks = results_page.share_and_loss().values()
    assert layers[0] < share[0] < 0 and between_tasks[1] < 0 < between_tasks[2]
    figures = results_page.complete(selection_tables.read("depth"))
    high = {
        n: results_page.high_end(
            results_page.difference(figures[f"weights 0.12%, top {n} of 6 layers"], figures["weights 0.12%"])
        )
        for n in (5, 4, 3, 2, 1)
    }
    assert [n for n, end in high.items() if end < 0] == [4, 3, 2, 1]


def test_what_the_page_says_of_the_decoder_is_so():
    """The words between the figures: ahead, level, behind, not shown."""
    records = selection_tables.read("proof_decoder")
    assert results_page.partly(records) == {}
    figures, rise = results_page.complete(records), results_page.forgotten("proof_decoder")
    size = results_page.trained(records)

    def ends(one, other, of=figures):
        off = selection_tables.difference(of[one], of[other])
        return results_page.low_end(off), results_page.high_end(off)

    def ahead(one, *others):
        return [other for other in others if ends(one, other)[0] > 0]

    def level(one, *others):
        return [other for other in others if ends(one, other)[0] <= 0 <= ends(one, other)[1]]

    main, longer = "weights 0.5%", [f"{name}, equal cost" for name in ("LoRA 8", "full")]
    beaten = ["LoRA 8", "full"]
    others = ["random 0.5%", "NeuroAda 0.5%", "SMT 0.5%", "SHiRA-WM 0.5%", "KappaTune LoRA 16", "columns 0.5%"]
    assert [ahead(f"weights {share}", *beaten) for share in results_page.SIZES] == [[], beaten, beaten, beaten]
    assert level("weights 0.05%", *beaten) == beaten
    assert ahead(main, *others, "Spectrum 25%", "LoRA 1") == [*others, "Spectrum 25%", "LoRA 1"]
    assert level(main, "LoRA 4", "LoRA 32", "directions 0.5%") == ["LoRA 4", "LoRA 32", "directions 0.5%"]

    assert all(level(f"weights {share}", longer[0]) for share in results_page.SIZES)
    assert [ahead(f"weights {share}", longer[1]) for share in results_page.SIZES] == [[], [], longer[1:], longer[1:]]
    without = {m: {key: v for key, v in f.items() if key[0] != "number_sequence"} for m, f in figures.items()}
    low, high = ends(main, longer[1], without)
    assert low < 0 < high

    gains = {task: results_page.mean(figures[main], (task,)) - results_page.mean(figures["LoRA 8"], (task,)) for task in
             ("chain_sum", "gcd", "number_sequence", "movie_word")}  # fmt: skip
    assert [gain > 0 for gain in gains.values()] == [True, True, False, False]
    assert level("weights 0.12%", main) and level("weights 2%", main) and ahead(main, "weights 0.05%")
    assert min(size, key=size.get) == "biases, norms" and level("biases, norms", "LoRA 1")
    assert max(size["LoRA 1"] / size[m] for m in ("SMT 0.5%", "KappaTune LoRA 16")) < 0.5
    chosen = ("NeuroAda 0.5%", "SHiRA-WM 0.5%", "SMT 0.5%", "columns 0.5%", "directions 0.5%")
    assert not any(ahead(method, "random 0.5%") for method in chosen)
    far = {
        m: [results_page.mean(f, (task,)) for task in ("chain_sum", "gcd", "number_sequence")]
        for m, f in figures.items()
    }
    assert all(top < 0.7 * min(others) for top, *others in zip(far.pop("top layer"), *far.values(), strict=True))

    def forgets(one, other):
        """-1 for less, 1 for more, 0 where it was not shown."""
        low, high = ends(one, other, {m: {k: 1000 * v for k, v in f.items()} for m, f in rise.items()})
        return (low > 0) - (high < 0)

    assert min((m for m in rise), key=lambda m: results_page.mean(rise[m])) == "Spectrum 25%"
    assert [m for m in rise if forgets(m, "LoRA 8") < 0] == ["random 0.5%", "LoRA 4", "Spectrum 25%"]
    more = {"NeuroAda 0.5%", "SHiRA-WM 0.5%", "SMT 0.5%", "LoRA 1", "biases, norms"}
    short = [m for m in rise if m not in longer]
    assert {m for m in short if forgets(m, "LoRA 8") > 0} == more
    assert {m for m in short if forgets(m, "full") > 0} == {*more, "weights 0.05%"}
    assert [forgets(main, m) for m in ("LoRA 8", "full", "random 0.5%", *longer)] == [0, 0, 1, 0, -1]


def test_what_the_page_says_of_missing_methods_is_so():
    missing = results_page.not_run("proof_decoder")
    named = (
        "SHiRA-Grad 0.5%",
        "SHiRA-SNIP 0.5%",
        "LoRA 1, equal cost",
        "NeuroAda 0.12%",
        "SMT 0.12%",
        "random 2%",
        "directions 2%",
    )
    assert missing == [*named, "random 0.5%, equal cost"]
    assert not any(results_page.not_run(phase) for phase in ("proof", "small_data", "noise", "depth"))
    planned = selection_study.PHASES["proof_decoder"].methods
    assert not {"NeuroAda 2%", "SMT 2%", "columns 2%", "Spectrum 2%", "random 0.05%"} & set(planned)
    first, *_ = (i for i, method in enumerate(planned) if method in missing)
    assert first > max(
        list(planned).index(m) for m in ("weights 0.5%", "LoRA 8, equal cost", "full, equal cost", "SHiRA-WM 0.5%")
    )
