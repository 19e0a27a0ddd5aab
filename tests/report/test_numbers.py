"""Numbers as people read them: heads of columns, cells, cuts."""

from __future__ import annotations

import math

import pytest

from reltune.metrics import METRICS
from reltune.relevance.heatmap import Heatmap
from reltune.report import numbers
from reltune.report.record import LMEvalScore
from reltune.report.terminal import metrics_table
from report_cases import shown


def test_counts_and_sizes() -> None:
    assert [numbers.count(value) for value in (None, 0, 999.6, 1234567)] == ["—", "0", "1,000", "1,234,567"]
    assert numbers.short_count(9_999_999) == "9,999,999" and numbers.short_count(10_000_000) == "10.0 M"
    assert numbers.short_count(7_654_321_000) == "7,654.3 M"
    sizes = (None, 0, 1023, 1024, 1024**2 - 1, 1024**2, 1024**3, 1.5 * 1024**4)
    wanted = ["—", "0 B", "1023 B", "1.0 KiB", "1024.0 KiB", "1.0 MiB", "1.0 GiB", "1536.0 GiB"]
    assert [numbers.size(value) for value in sizes] == wanted


def test_numbers_that_were_not_measured_or_are_none() -> None:
    for missing in (None, math.nan, math.inf):
        assert numbers.percent(missing) == numbers.fixed(missing, 2) == numbers.score("mse", missing) == "—"
    assert numbers.percent(0.12345) == "12.35" and numbers.percent(0.12345, 1) == "12.3"
    assert numbers.fixed(1234.5678, 2) == "1,234.57"
    hours = [numbers.hours(value) for value in (None, 0.0, 0.0001, 0.0025, 0.5, 1234.567)]
    assert hours == ["—", "0", "<0.001", "0.003", "0.50", "1,234.57"]


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("test_accuracy", 0.5, "50.00 %"),
        ("test_accuracy", 0, "0.00 %"),
        ("test_accuracy", 1, "100.00 %"),
        ("test_accuracy", 1.5, "1.5"),  # no share after all
        ("test_pearson", 0.5, "0.5"),
        ("adapter_bytes", 2048, "2.0 KiB"),
        ("train_steps", 7, "7"),
        ("test_loss", 1234.5, "1,234"),
        ("test_loss", 0.123456, "0.1235"),
        ("test_loss", 1e13, "1e+13"),
        ("test_loss", math.nan, "—"),
        ("learning_rate", None, "—"),
        ("device", "cpu", "cpu"),
        ("bf16", True, "True"),
    ],
)
def test_results(name: str, value: object, shown: str) -> None:
    assert numbers.metric(name, value) == shown


def test_heads_that_are_counted_are_new_ones() -> None:
    results = {"trainable_parameters": 7, "head_parameters": 66}
    assert numbers.before_and_after(results)[1] == ("head_parameters (new heads)", None, 66)
    assert numbers.before_and_after({**results, "head_parameters": 0}) == [("trainable_parameters", None, 7)]


def test_heads_name_the_unit_and_are_narrow() -> None:
    heads = {name: numbers.head(name) for name in METRICS}
    assert heads["accuracy"] == "accuracy\n%" and heads["token_accuracy"] == "token\naccuracy %"
    assert (
        heads["pearson"] == "Pearson\ncorrelation"
        and heads["perplexity"] == "perplexity"
        and heads["mse"] == "mean\nsquared error"
    )
    assert numbers.head("accuracy", short=True) == "acc.\n%" and numbers.head("f1_macro", short=True) == "macro\nF1 %"
    assert numbers.head("perplexity", short=True) == "perpl."


def test_cells_of_lm_eval() -> None:
    score = LMEvalScore("arc", "1", "acc", "none", True, 5, 1000, 0.25, 0.0123, 0.5, None)
    assert numbers.lm_eval_cells(score) == ("arc", "acc ↑", "0.25 ± 0.012", "0.5", "1,000", "5")
    other = LMEvalScore("qa", "1", "word_perplexity", "strict", False, None, 10, None, 0.1, 12.3456, 0.5)
    assert numbers.lm_eval_cells(other) == ("qa", "word_perplexity (strict) ↓", "—", "12.35 ± 0.5", "10", "—")
    assert numbers.lm_eval_cells(LMEvalScore("a", "1", "m", "none", None, 0, 1, 1, None, 1, None))[1] == "m"


def test_rows_of_a_sweep() -> None:
    trials = [
        {"number": 0, "values": {"learning_rate": 1e-4, "optim": "sgd"}, "metric": 0.5, "failed": None},
        {"number": 1, "values": {"learning_rate": 0.1234567891, "optim": "sgd"}, "metric": None, "failed": "diverged."},
    ]
    record = {"sweep": {"learning_rate": [], "optim": []}, "metric": "accuracy", "trials": trials, "best": trials[0]}
    heads, rows = numbers.sweep_rows(record)
    assert heads == ["trial", "learning_rate", "optim", "validation accuracy"]
    assert rows == [
        (["0", "0.0001", "sgd", "50.00 %"], True),
        (["1", "0.123457", "sgd", "failed: diverged."], False),
    ]
    assert numbers.sweep_rows({**record, "metric": "loss"})[0][-1] == "validation loss"


def test_which_metrics_were_measured() -> None:
    results = [{"eval_loss": 1, "eval_f1": 2, "test_accuracy": 3}, {"eval_accuracy": 1, "eval_f1": 1}]
    assert numbers.measured(results, "eval_") == ["f1", "accuracy"]
    assert numbers.measured(results) == []


def test_shares_of_a_heatmap() -> None:
    h = Heatmap("depth", ["a", "b"], ["x", "y"], [[1.0, None], [-3.0, 0.0]], [0.25, -0.75], adds_up=False)
    assert numbers.shares(h) == [[0.25, None], [-0.75, 0.0]]
    assert numbers.shares(Heatmap("depth", ["a"], ["x"], [[0.0]], [0.0])) == [[0.0]]
    assert numbers.of_what(h) == "the sum of absolute values"
    shown = [numbers.share(value) for value in (None, 0, 0.0004, -0.0004, 0.0005, -0.0005, 0.12345, -1)]
    assert shown == ["", "0.0", "<0.1", ">-0.1", "0.1", "-0.1", "12.3", "-100.0"]


@pytest.mark.parametrize(
    ("text", "start", "rest"),
    [
        ("short", "short", ""),
        ("  \n around \n", "around", ""),
        ("x" * 200, "x" * 200, ""),
        ("x" * 201, "x" * 200, "x"),
        ("a" * 170 + " " + "b" * 60, "a" * 170, "b" * 60),
        ("a" * 150 + " " + "b" * 80, "a" * 150 + " " + "b" * 49, "b" * 31),
        ("1\n2\n3\n4", "1\n2\n3\n4", ""),
        ("1\n2\n3\n4\n5", "1\n2\n3\n4", "5"),
    ],
)
def test_openings(text: str, start: str, rest: str) -> None:
    assert numbers.opening(text) == (start, rest)


@pytest.mark.parametrize(
    ("rows", "labels", "number"),
    [
        (["bert.encoder.layer.0", "bert.encoder.layer.11"], ["0", "11"], "bert.encoder.layer.N"),
        (["encoder.block.0", "decoder.block.0"], ["encoder.0", "decoder.0"], ""),
        (["m.encoder.0", "m.decoder.1"], ["encoder.0", "decoder.1"], ""),
        (["embeddings.norm", "h.3"], ["embeddings.norm", "3"], "h.N"),
        (["score"], ["score"], ""),
    ],
)
def test_labels_of_layers(rows: list[str], labels: list[str], number: str) -> None:
    assert numbers.layer_labels(rows) == (labels, number)


def test_long_labels_keep_their_ends() -> None:
    name = "a_module.with_a_very_long_name_indeed"
    assert numbers.layer_labels([name])[0] == ["…long_name_indeed"]  # from the start of a word
    assert numbers.layer_labels([name], width=len(name))[0] == [name]


def test_labels_of_several_stacks():
    both = [f"{side}coder.block.{i}" for side in ("en", "de") for i in (0, 11)]
    assert numbers.layer_labels(both)[0] == ["encoder.0", "encoder.11", "decoder.0", "decoder.11"]
    assert numbers.layer_labels(["model.norm", "model.layers.3"]) == (["model.norm", "3"], "model.layers.N")
    assert numbers.layer_labels(["0", "1"]) == (["0", "1"], "")
    assert numbers.layer_labels(["bert.embeddings.LayerNorm"], 10) == (["LayerNorm"], "")
    assert numbers.layer_labels(["bert.embeddings.word_embeddings"])[0] == ["word_embeddings"]
    assert numbers.layer_labels(["bert.embeddings.token_type_embeddings"])[0] == ["…type_embeddings"]
    assert numbers.layer_labels([]) == ([], "")


@pytest.mark.parametrize(
    "write, value, text",
    [
        (numbers.size, 1023, "1023 B"),
        (numbers.size, 1536, "1.5 KiB"),
        (numbers.size, 3 * 2**20, "3.0 MiB"),
        (numbers.size, 5.5 * 2**40, "5632.0 GiB"),
        (numbers.percent, 0.97216, "97.22"),
        (numbers.percent, float("nan"), "—"),
        (numbers.share, 0.0, "0.0"),
        (numbers.share, 1e-9, "<0.1"),
        (numbers.share, 1.0, "100.0"),
        (numbers.short_count, 9_999_999, "9,999,999"),
        (numbers.short_count, 109_482_240, "109.5 M"),
    ],
)
def test_numbers(write, value, text):
    assert write(value) == text


def test_metrics_before_training_stand_beside_those_after():
    metrics = {
        **{"test_before_loss": 1.5, "test_before_accuracy": 0.25, "other_before_loss": 3.0},
        **{"test_loss": 0.5, "test_accuracy": 0.75, "train_steps": 7},
        **{"forgetting_before_accuracy": 0.5, "forgetting_after_accuracy": 0.125},
    }
    assert numbers.before_and_after(metrics) == [
        ("other_before_loss", None, 3.0),  # nothing to stand beside
        *[("test_loss", 1.5, 0.5), ("test_accuracy", 0.25, 0.75), ("train_steps", None, 7)],
        ("forgetting_after_accuracy", 0.5, 0.125),
    ]
    lines = [line.split() for line in shown(metrics_table(metrics), 80)]
    for line in ("metric before after", "test_accuracy 25.00 % 75.00 %", "train_steps 7", "test_loss 1.5 0.5"):
        assert line.split() in lines


def test_a_text_is_cut_where_it_can_be_read():
    words = " ".join(["word"] * 60)
    start, rest = numbers.opening(f" {words}\n")
    assert len(start) <= 200 and f"{start} {rest}" == words
    assert numbers.opening("字" * 250) == ("字" * 200, "字" * 50)
    assert numbers.opening("a\nb\nc\nd\n\ne\n") == ("a\nb\nc\nd", "e")
    assert numbers.opening("a\nb\n") == ("a\nb", "") and numbers.opening(" ") == ("", "")
