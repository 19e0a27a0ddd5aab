"""Tables for the terminal: as wide as they may be, and readable without colour."""

import dataclasses
import math

import pytest
from rich.console import Console

from reltune.relevance.heatmap import OUTSIDE, Heatmap
from reltune.report.comparison import terminal_tables
from reltune.report.record import Difference, LMEvalRecord, LMEvalScore
from reltune.report.terminal import heatmap, lm_eval_table, metrics_table, outputs, sweep_table
from report_cases import BERT, LLAMA, OUTPUTS, WAYS, relevance, scores, shown, way


@pytest.mark.parametrize("layers, columns", [(12, BERT), (32, LLAMA), (1, BERT), (2, ["only"])])
def test_heatmap_fits_80_columns_and_reads_without_colour(layers, columns):
    h = relevance(layers, columns, prefix="model.layers")
    lines = shown(heatmap(h), 80)
    assert max(map(len, lines)) <= 80
    head = next(i for i, line in enumerate(lines) if line.split()[:1] == ["layer"])
    body = [line.split() for line in lines[head + 1 : head + 2 + layers]]
    # Deepest layer first, the norm outside the layers last; nothing where there is no module.
    assert [row[0] for row in body[:-1]] == [*map(str, reversed(range(layers)))]
    assert body[-1][0] in ("embeddings.LayerNorm", "LayerNorm") and "…" not in body[-1][0]
    total = math.fsum(v for row in h.values for v in row if v is not None)
    for row, values, share in zip(body, reversed(h.values), reversed(h.share_by_layer), strict=True):
        expected = [100 * v / total for v in values if v is not None] + [100 * share]
        assert len(row) == 1 + len(expected)
        for cell, value in zip(row[1:], expected, strict=True):
            assert cell == "<0.1" if value < 0.05 else float(cell) == pytest.approx(value, abs=0.051)
    heads = lines[head].split()[1:-1]
    assert len(set(heads)) == len(h.columns)
    legend = "\n".join(lines[head + 2 + layers :])
    for short, name in zip(heads, h.columns, strict=True):
        assert short == name or f"{short} {name}" in legend
    assert "N model.layers.N" in legend


def test_heatmap_of_zeros_and_of_one_cell():
    lines = shown(heatmap(Heatmap("depth", ["h.0", "h.1"], ["a"], [[0.0], [None]], [0.0, 0.0])), 80)
    assert ["0", "0.0", "0.0"] in [line.split() for line in lines]
    assert ["1", "0.0"] in [line.split() for line in lines]
    lines = shown(heatmap(Heatmap("depth", ["block"], ["a"], [[3.0]], [1.0])), 80)
    assert ["block", "100.0", "100.0"] in [line.split() for line in lines]


def test_modules_that_do_not_fit_continue_below():
    names = [f"mlp.experts.{i}.{part}_proj" for i in range(20) for part in ("gate", "up")]
    names += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    lines = shown(heatmap(relevance(2, names)), 80)
    assert max(map(len, lines)) <= 80
    heads = [line.split()[1:-1] for line in lines if line.split()[:1] == ["layer"]]
    heads = [head for part in heads for head in part]
    assert len(heads) == len(set(heads)) == 43
    legend = " ".join(" ".join(lines).split())
    assert all(f"{head} {name}" in legend for head, name in zip(heads, names, strict=False))


def test_heatmap_colours_grow_lighter_with_the_value():
    """Lightness of the cells' background, in the order of their values; and text that stands out from it."""

    def luminance(color):
        return sum(
            w * (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4)
            for w, c in zip((0.2126, 0.7152, 0.0722), (v / 255 for v in color.triplet), strict=True)
        )

    console = Console(width=80, color_system="truecolor")
    row = Heatmap("fisher", ["h.0"], list("abcdefgh"), [[float(i) for i in range(8)]], [1.0])
    segments = [s for s in console.render(heatmap(row)) if s.style and s.style.bgcolor and s.style.color]
    backgrounds = [luminance(s.style.bgcolor) for s in segments]
    assert len(set(backgrounds)) == 8 and backgrounds == sorted(backgrounds)
    for s in segments:
        dark, light = sorted((luminance(s.style.color), luminance(s.style.bgcolor)))
        assert (light + 0.05) / (dark + 0.05) >= 4.5  # WCAG 2, level AA


def test_a_comparison_fits_80_columns():
    wide = way(
        "layers top 24 of them", 7_241_748_480, 1.0, 0.1234, {"lora": Difference(-0.1234, -0.2345, -0.1111)},
        steps=12_345, seconds_per_step=123.456, peak_memory_bytes=127 * 2**30, adapter_bytes=13 * 2**30, seconds=1e6,
        analysis_seconds=1e5, learning_rate=1.26e-5, edge=True, forgetting=scores(-0.5, -0.5),
    )  # fmt: skip
    table = dataclasses.replace(WAYS.tables[0], rows=[*WAYS.tables[0].rows, wide])
    (made,) = terminal_tables(dataclasses.replace(WAYS, tables=[table]))
    lines = shown(made, 80)
    assert max(map(len, lines)) <= 80 and lines[0].strip() == table.title
    text = "\n".join(" ".join(line.split()) for line in lines)
    for words in (
        "547,072 97.13 ± 1.12 +1.25 -10.00",
        "[-0.31, +2.47] [-20.00, +5.00]",
        "7,241.7 M 100.00 ± 12.34 -12.34",
    ):
        assert words in text, words
    assert "columns 0.002* 94 0.123 12 s 24 s 2.0 GiB 3.0 MiB -6.25" in text
    assert "dora r=13 failed: training diverged, some weights are not finite any more." in text


def test_what_lies_outside_the_layers_does_not_darken_them():
    names = ["layer.0", "layer.1", "pooler.dense"]
    pooled = Heatmap("fisher", names, ["a", OUTSIDE], [[1.0, None], [9.0, None], [None, 90.0]], [0.01, 0.09, 0.9])
    console = Console(width=80, color_system="truecolor")
    colors = {
        s.text.strip(): s.style.bgcolor.triplet.hex
        for s in console.render(heatmap(pooled))
        if s.style and s.style.bgcolor and s.text.strip()
    }
    assert colors["9.0"] == colors["90.0"] == "#fee838" and colors["1.0"] not in ("#fee838", "#00224e")
    text = "".join(s.text for s in console.render(heatmap(pooled)))
    assert " 9.0 %" in text and "colours span the layers" in text
    plain = "\n".join(shown(heatmap(pooled), 80))
    assert "blank: no such module" in plain and " 9.0 %" not in plain and "colours" not in plain


def test_tables_of_long_names_fit_80_columns():
    score = LMEvalScore(
        *("leaderboard_math_counting_and_prob_hard", "1", "exact_match_normalised", "strict-match-flexible-extract"),
        *(True, 5, 123_456, 0.123456, 0.01234, 0.23456, 0.01345),
    )
    lines = shown(lm_eval_table(LMEvalRecord("0.4.9", None, 8, True, [score])), 80)
    assert max(map(len, lines)) <= 80
    (first,) = (line.split() for line in lines if "0.1235" in line)
    assert first[-4:] == ["0.1235", "0.2346", "123,456", "5"]
    assert any(line.split()[-4:] == ["±", "0.012", "±", "0.013"] for line in lines)
    names = ["learning_rate", "per_device_train_batch_size", "gradient_accumulation_steps", "lr_scheduler_type", "seed"]
    trials = [
        {"number": i, "values": dict.fromkeys(names, "cosine"), "metric": 0.5, "failed": failed}
        for i, failed in enumerate([None, "the loss is not a number from step 12 on"])
    ]
    record = {"sweep": dict.fromkeys(names), "metric": "eval_accuracy", "trials": trials, "best": trials[0]}
    lines = shown(sweep_table(record), 80)
    assert max(map(len, lines)) <= 80 and "best" in "".join(lines)
    words = set(" ".join(shown(sweep_table({**record, "sweep": dict.fromkeys(names[:3])}), 80)).split())
    assert {"gradient_", "accumulation_", "steps", "learning_", "rate", "per_device_", "train_batch_", "size"} <= words


def test_metrics_table_shows_every_metric_in_its_unit():
    metrics = {
        **{"test_accuracy": 0.97213, "eval_f1_macro": 0.5, "eval_loss": 0.12345, "epoch": 3.0},
        **{
            "total_flos": 1.25e15,
            "train_samples": 1490,
            "train_peak_memory_bytes": None,
            "adapter_bytes": 2048,
        },
        **{"device": "[bold]cpu", "bad_loss": float("inf")},
    }
    lines = [" ".join(line.split()) for line in shown(metrics_table(metrics), 80)]
    for line in (
        *("test_accuracy 97.21 %", "eval_f1_macro 50.00 %", "eval_loss 0.1235", "epoch 3"),
        *("total_flos 1.25e+15", "train_samples 1,490", "train_peak_memory_bytes —", "adapter_bytes 2.0 KiB"),
        *("device [bold]cpu", "bad_loss —"),
    ):
        assert line in lines


def test_the_terminal_shows_a_few_outputs():
    lines = shown(outputs(OUTPUTS), 80)
    assert max(map(len, lines)) <= 80
    text = "\n".join(lines)
    assert [line.split()[0] for line in lines[1:6] if line.strip()] == ["prompt", "reference", "base", "tuned"]
    assert "[bold]好[/bold]" in text and "\x1b" not in text  # neither markup nor what a terminal would obey
    assert "question 0" not in text and text.count("很") == 200 and "…" in text
