"""docs/results.md and its picture say what the records say."""

import json

import pytest

import results_page
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


def test_what_the_page_says_of_the_decoders_missing_parts_is_so():
    assert results_page.partly(selection_tables.read("proof_decoder")) == {"LoRA 8, equal cost": ("chain_sum",)}
