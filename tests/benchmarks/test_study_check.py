"""The selection study's engine trains, chooses and measures what Transformers and PEFT do."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest

import selection_study
import study_check
import study_data
from selection_study import PROOF, Worker, best_rate, halves, on_edge


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_trainings_are_those_of_transformers_and_peft(kind):
    assert "KappaTune LoRA" in study_check.eager(kind)


def test_flipped_labels_are_those_of_training_and_validation_alone():
    labels = np.arange(5000) % 3
    task = {"ids": np.zeros((5000, 2)), "labels": labels, "n_test": np.array(1000), "kind": np.array("class")}
    form = study_data.variant({"news": task}, "news, 30% flipped")
    wrong = form["labels"] != labels
    assert not wrong[:1000].any() and abs(wrong[1000:].mean() - 0.3) < 0.03
    assert set(((form["labels"] - labels) % 3)[wrong].tolist()) == {1, 2}
    assert (task["labels"] == np.arange(5000) % 3).all()


def test_a_number_of_examples_is_what_is_trained_on():
    tasks = {
        name: {"ids": np.zeros((n, 2)), "labels": np.zeros(n), "n_test": np.array(100)}
        for name, n in (("news", 4000), ("news_large", 9000))
    }
    few, many = (study_data.variant(tasks, f"news, {n} examples") for n in (200, 10000))
    assert len(study_data.split(few, 0)["train"]) == 200
    assert len(study_data.split(many, 0)["train"]) == 9000 - 100 - study_data.VALIDATION
    assert study_data.variant(tasks, "news") is tasks["news"]


def records(*figures):
    return [
        {"task": "movie", "rate": rate, "seed": seed, "validation_metric": m, "validation_loss": 0}
        for rate, seed, m in figures
    ]


def test_the_best_rate_is_chosen_on_the_seeds_that_all_were_tried_with():
    tried = records((1e-3, 0, 80), (1e-3, 1, 81), (1e-2, 0, 90), (1e-2, 1, 70), (1e-4, 0, 60), (1e-4, 1, 60))
    assert best_rate(tried) == 1e-3
    assert best_rate([*tried, *records((1e-3, 2, 10))]) == 1e-3  # a seed more, at the chosen rate alone
    assert on_edge(tried) is None
    assert on_edge(records((1e-3, 0, 80), (1e-2, 0, 79))) == 1e-3


def test_rates_lie_on_half_decades_also_where_records_rounded_them():
    assert halves(-9, -8, -4) == (3.16e-5, 1e-4, 1e-2)
    assert Worker._beyond(SimpleNamespace(phase=PROOF), 3e-5, [3e-5, 1e-4]) == 1e-5
    assert Worker._beyond(SimpleNamespace(phase=PROOF), 0.01, [1e-3, 0.01]) == 0.0316


def test_a_phase_with_nothing_left_to_train_ends_at_once(tmp_path, monkeypatch, capsys):
    of_image = {("digits", name): records((1e-3, 0, 80)) for name in selection_study.PHASES["image"].methods}
    monkeypatch.setattr(selection_study, "kept_before", lambda options: of_image)
    monkeypatch.setattr(selection_study, "on_edge", lambda tried: None)
    monkeypatch.setattr(sys, "argv", ["selection_study", "--phase", "image", "--go_on", "--output_dir", str(tmp_path)])
    selection_study.main()
    assert capsys.readouterr().out == "nothing is left to train\n"
