"""Tables for the terminal: as wide as they may be, and readable without colour."""

import math

import pytest
from rich.console import Console

from reltune.relevance.heatmap import Heatmap
from reltune.report.record import MethodResult
from reltune.report.terminal import comparison_table, heatmap, metrics_table, outputs
from report_cases import BERT, FULL, LLAMA, OUTPUTS, relevance, scores, shown


@pytest.mark.parametrize("layers, columns", [(12, BERT), (32, LLAMA), (1, BERT), (2, ["only"])])
def test_heatmap_fits_80_columns_and_reads_without_colour(layers, columns):
    h = relevance(layers, columns, prefix="model.layers")
    lines = shown(heatmap(h), 80)
    assert max(map(len, lines)) <= 80
    head = next(i for i, line in enumerate(lines) if line.split()[:1] == ["layer"])
    body = [line.split() for line in lines[head + 1 : head + 2 + layers]]
    # Deepest layer first, the norm outside the layers last; nothing where there is no module.
    assert [row[0] for row in body[:-1]] == [*map(str, reversed(range(layers)))]
    assert body[-1][0].removeprefix("…") in "embeddings.LayerNorm" and len(body[-1][0]) >= 10
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


def test_comparison_table_fits_100_columns():
    wide = MethodResult(
        *("full fine-tuning of every parameter", 7_241_748_480, 10_592_130, scores(1.0, 1.0), 0.0791),
        *(12.28123, 127 * 2**30, 13 * 2**30, 1234.567, 1234.567),
    )
    lines = shown(comparison_table([*FULL.comparison, wide]), 100)
    assert max(map(len, lines)) <= 100 and lines[0].strip() == "Scores on test data"
    rows = {line.split()[0]: line.split() for line in lines if len(line.split()) > 8}
    assert rows["columns"] == ("columns 547,072 3,845 97.13 96.54 0.1234 2.0 GiB 3.0 MiB 2.25 2.12".split())
    assert rows["head"][-9:] == "0 3,845 91.11 90.22 — — — — —".split()
    assert rows["full"][-13:] == ("7,241.7 M 10.6 M 100.00 100.00 12.2812 127.0 GiB 13.0 GiB 1,234.57 1,234.57".split())


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
