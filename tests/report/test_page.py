"""Reports against what was put in: every figure is there, nothing is loaded, nothing breaks the frame."""

import dataclasses
import io
import json
import math
import re
import sys
from html.parser import HTMLParser

import plotly.graph_objects as go
import pytest
from rich.console import Console

from reltune.errors import InputError
from reltune.relevance.heatmap import Heatmap
from reltune.report import numbers
from reltune.report.page import write_report
from reltune.report.record import MethodResult, Output, RunRecord
from reltune.report.terminal import comparison_table, heatmap, metrics_table, outputs

BERT = [
    *("attention.self.query", "attention.self.key", "attention.self.value"),
    *("attention.output.dense", "attention.output.LayerNorm"),
    *("intermediate.dense", "output.dense", "output.LayerNorm"),
]
LLAMA = [
    *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "input_layernorm", "post_attention_layernorm"),
]
EVIL = "<script>alert(1)</script>"


def relevance(layers=12, columns=BERT, criterion="fisher", prefix="bert.encoder.layer"):
    """Value 1, 2, 3, … from the first cell on; an embedding norm of value 1 stands outside the layers."""
    rows = ["bert.embeddings.LayerNorm", *(f"{prefix}.{i}" for i in range(layers))]
    count = len(columns)
    values = [[None] * count + [1.0]]
    values += [[float(i * count + j + 1) for j in range(count)] + [None] for i in range(layers)]
    total = 1 + layers * count * (layers * count + 1) / 2
    shares = [math.fsum(v for v in row if v is not None) / total for row in values]
    return Heatmap(criterion, rows, [*columns, "(outside the layers)"], values, shares)


def shown(renderable, width):
    """Lines as a console of that width prints them, without colour. A wider line would be folded or cut."""
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(renderable)
    return console.export_text().splitlines()


def scores(accuracy, f1_macro):
    return {"accuracy": accuracy, "f1_macro": f1_macro}


FULL = RunRecord(
    title="News by topic",
    config={"model_name_or_path": "some/model", "training": {"learning_rate": 0.003}, "criteria": ["fisher"]},
    heatmaps=[relevance(), relevance(criterion="magnitude")],
    depth_sentence="By fisher, layer 11 matters most.",
    plan_lines=["712 columns in 58 modules", "the backward pass ends at layer 4"],
    selected_by_layer={"bert.encoder.layer.10": 1024, "bert.encoder.layer.11": 4096},
    metrics={
        "test_accuracy": 0.97213,
        "test_f1_macro": 0.9643,
        "eval_loss": 0.1234,
        "eval_accuracy": 0.5,
        "trainable_parameters": 5120,
    },
    history=[
        {"loss": 1.5, "step": 10, "epoch": 0.5},
        {"loss": float("nan"), "step": 15, "epoch": 0.75},
        {"loss": 0.75, "step": 20, "epoch": 1.0},
        {"eval_loss": 0.625, "eval_accuracy": 0.875, "eval_f1_macro": 0.8125, "step": 20, "epoch": 1.0},
        {"train_runtime": 3.0, "step": 20, "epoch": 1.0},
    ],
    comparison=[
        MethodResult(
            "columns", 547072, 3845, scores(0.9713, 0.9654), 0.0891, 0.1234, 2 * 2**30, 3 * 2**20, 2.25, 2.125
        ),
        MethodResult("head alone", 0, 3845, scores(0.9111, 0.9022), 0.3, None, None, None, None, note="base unchanged"),
    ],
    notes=["Measured on two cores."],
)
EMPTY = RunRecord("Nothing yet", {}, [], "", [], {}, {}, [], [], [])


class Page(HTMLParser):
    """What a browser would see: text outside scripts and styles, and every element with its attributes."""

    def __init__(self, page):
        super().__init__()
        self.text, self.elements, self.code, self.inside = [], [], [], False
        self.cells, self.cell = [], None  # of the outputs' table: attributes, and text with its tags left out
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag == "td" and ("dir", "auto") in attrs:
            self.cell = ""
        if tag in ("script", "style"):
            self.inside = True
            self.code.append((tag, dict(attrs).get("id"), ""))

    def handle_endtag(self, tag):
        self.inside = False
        if tag == "td" and self.cell is not None:
            self.cells.append(self.cell)
            self.cell = None

    def handle_data(self, data):
        if self.cell is not None:
            self.cell += data
        if self.inside:
            tag, name, code = self.code.pop()
            self.code.append((tag, name, code + data))
        elif data.strip():
            self.text.append(data.strip())

    @property
    def figures(self):
        return next(json.loads(code) for _, name, code in self.code if name == "figures")


def page_of(tmp_path, record):
    write_report(tmp_path / "report.html", record)
    return Page((tmp_path / "report.html").read_text(encoding="utf-8"))


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
    assert len(backgrounds) == 8 and backgrounds == sorted(backgrounds)
    for s in segments:
        dark, light = sorted((luminance(s.style.color), luminance(s.style.bgcolor)))
        assert (light + 0.05) / (dark + 0.05) >= 4.5  # WCAG 2, level AA


def test_layer_labels():
    both = [f"{side}coder.block.{i}" for side in ("en", "de") for i in (0, 11)]
    assert numbers.layer_labels(both)[0] == ["encoder.0", "encoder.11", "decoder.0", "decoder.11"]
    assert numbers.layer_labels(["model.norm", "model.layers.3"]) == (["model.norm", "3"], "model.layers.N")
    assert numbers.layer_labels(["0", "1"]) == (["0", "1"], "")
    assert numbers.layer_labels(["bert.embeddings.LayerNorm"], 10) == (["…LayerNorm"], "")
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


def test_comparison_table_fits_100_columns():
    wide = MethodResult(
        *("full fine-tuning of every parameter", 7_241_748_480, 10_592_130, scores(1.0, 1.0), 0.0791),
        *(12.28123, 127 * 2**30, 13 * 2**30, 1234.567, 1234.567),
    )
    lines = shown(comparison_table([*FULL.comparison, wide]), 100)
    assert max(map(len, lines)) <= 100
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


OUTPUTS = [
    Output("Wie viel ist 1 + 1?", "2", " 2\n", "zwei"),
    Output("كم يساوي ٢ + ٢؟", "٤", "", "٤"),
    Output("写\n" * 9, "好", "很" * 300, "[bold]好[/bold] \x1b[31m"),
    *[Output(f"question {i}", "answer", "base", "tuned") for i in range(5)],
]


def test_outputs_stand_side_by_side(tmp_path):
    page = page_of(tmp_path, dataclasses.replace(EMPTY, outputs=OUTPUTS))
    rows = [page.cells[i : i + 4] for i in range(0, len(page.cells), 4)]
    assert rows[0] == ["Wie viel ist 1 + 1?", "2", "2 ✓", "zwei"]
    assert rows[1] == ["كم يساوي ٢ + ٢؟", "٤", "", "٤ ✓"]
    assert [text.replace("\n", "") for text in rows[2][:3]] == ["写" * 9, "好", "很" * 300]
    assert rows[2][3] == "[bold]好[/bold] \x1b[31m" and len(rows) == 8
    assert sum(tag == "details" for tag, _ in page.elements) == 2  # the two long ones are folded
    assert "Outputs" not in page_of(tmp_path, EMPTY).text


def test_the_terminal_shows_a_few_outputs():
    lines = shown(outputs(OUTPUTS), 80)
    assert max(map(len, lines)) <= 80
    text = "\n".join(lines)
    assert [line.split()[0] for line in lines[1:6] if line.strip()] == ["prompt", "reference", "base", "tuned"]
    assert "[bold]好[/bold]" in text and "\x1b" not in text  # neither markup nor what a terminal would obey
    assert "question 0" not in text and text.count("很") == 200 and "…" in text


def test_report_loads_nothing(tmp_path):
    page = page_of(tmp_path, FULL)
    assert not [(tag, attrs) for tag, attrs in page.elements if attrs.keys() & {"src", "href", "srcset", "data"}]
    assert not {"link", "iframe", "object", "embed", "base"} & {tag for tag, _ in page.elements}
    styles = [code for tag, _, code in page.code if tag == "style"]
    assert styles and not any(re.search(r"url\(|@import", style) for style in styles)
    policy = next(a["content"] for tag, a in page.elements if tag == "meta" and "http-equiv" in a)
    assert "default-src 'none'" in policy and "http" not in policy


def test_report_holds_every_figure(tmp_path):
    page = page_of(tmp_path, FULL)
    for text in (
        *(FULL.title, FULL.depth_sentence, *FULL.plan_lines, *FULL.notes),
        *("97.21", "96.43", "5,120"),  # key figures
        *("547,072", "3,845", "97.13", "96.54", "0.0891", "0.1234", "2.0 GiB", "3.0 MiB", "2.25", "2.12"),
        *("head alone", "base unchanged", "91.11", "90.22", "0.3000", "—"),
        *("eval_loss", "0.1234", "training.learning_rate", "0.003", "model_name_or_path", "some/model"),
    ):
        assert text in page.text, text
    assert "Test accuracy" in page.text and "Validation accuracy" not in page.text

    figures = page.figures
    assert set(figures) == {"heatmap-0", "layers-0", "heatmap-1", "layers-1", "loss", "scores"}
    places = {attrs.get("id") for _, attrs in page.elements}
    for name, figure in figures.items():
        assert name in places
        go.Figure(figure)  # Plotly's own check of every property
    h = FULL.heatmaps[0]
    total = math.fsum(v for row in h.values for v in row if v is not None)
    cells = figures["heatmap-0"]["data"][0]["z"]
    assert cells[0][:-1] == [None] * 8
    assert cells[12][7] == pytest.approx(100 * h.values[12][7] / total)
    share, chosen = figures["layers-0"]["data"]
    assert share["x"] == pytest.approx([100 * s for s in h.share_by_layer])
    assert chosen["x"] == [0] * 11 + [1024, 4096]
    # Both charts name their layers alike, and their rows are equally high at equal places.
    one, two = figures["heatmap-0"]["layout"], figures["layers-0"]["layout"]
    assert one["yaxis"] == two["yaxis"] and one["margin"]["t"] == two["margin"]["t"]
    assert [f["height"] - f["margin"]["t"] - f["margin"]["b"] for f in (one, two)] == pytest.approx([286, 286], abs=1)
    training, validation = figures["loss"]["data"]
    assert (training["x"], training["y"]) == ([10, 20], [1.5, 0.75])
    assert (validation["x"], validation["y"]) == ([20], [0.625])
    assert [(c["x"], c["y"]) for c in figures["scores"]["data"]] == [([1.0], [87.5]), ([1.0], [81.25])]


def test_report_escapes_what_users_wrote(tmp_path):
    h = Heatmap(EVIL, [EVIL, "b&amp;.1"], [EVIL, "x.<b>y</b>"], [[0.0, None], [0.0, 0.0]], [0.0, 0.0])
    record = RunRecord(
        *(EVIL, {"model_name_or_path": EVIL, EVIL: [EVIL]}, [h, h], EVIL, [EVIL], {EVIL: 3}, {EVIL: 1.0}),
        *([], [MethodResult(EVIL, 1, 2, scores(0.5, 0.5), 0.1, None, None, None, None, note=EVIL)], [EVIL]),
        [Output(EVIL, EVIL + "!", f'<b title="{EVIL}">' + 300 * "x", f"</td></table>{EVIL}")],
    )
    page = page_of(tmp_path, record)
    assert [tag for tag, _ in page.elements].count("script") == [
        tag for tag, _ in page_of(tmp_path, FULL).elements
    ].count("script")
    assert "b" not in {tag for tag, _ in page.elements}
    assert page.text.count(EVIL) >= 12
    assert page.cells == [EVIL, EVIL + "!", f'<b title="{EVIL}">' + 300 * "x", f"</td></table>{EVIL}"]
    # Plotly reads text as HTML: there it is escaped once more.
    figure = page.figures["heatmap-0"]
    assert not any("<" in code for _, name, code in page.code if name == "figures")
    assert figure["layout"]["xaxis"]["ticktext"] == [
        "&lt;script&gt;alert(1)&lt;/script&gt;",
        "x.&lt;b&gt;y&lt;/b&gt;",
    ]
    assert figure["data"][0]["zmax"] == 1


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"heatmaps": [relevance(32, LLAMA)]},
        {"heatmaps": [Heatmap("fisher", ["h.0"], ["attn"], [[0.0]], [0.0])]},
        {"selected_by_layer": {"h.0": 5}},
        {"history": [{"loss": 1.0, "step": 1}]},
        {"metrics": {"eval_accuracy": 0.5, "train_peak_memory_bytes": None}},
    ],
)
def test_report_of_an_unfinished_run(tmp_path, change):
    page = page_of(tmp_path, dataclasses.replace(EMPTY, **change))
    assert "Nothing yet" in page.text
    assert "No other methods were run for comparison." in page.text
    assert ("No training history was recorded." in page.text) == ("history" not in change)
    assert set(page.figures) <= {attrs.get("id") for _, attrs in page.elements}
    for figure in page.figures.values():
        go.Figure(figure)
    if "metrics" in change:
        assert "Validation accuracy" in page.text and "50.00" in page.text


def test_report_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "report.html"
    path.write_text("before")
    with pytest.raises(UnicodeEncodeError):
        write_report(path, dataclasses.replace(EMPTY, title="half a surrogate pair: \ud83d"))
    assert path.read_text() == "before"


@pytest.mark.parametrize("missing", ["plotly", "jinja2"])
def test_missing_library_says_what_to_install(tmp_path, monkeypatch, missing):
    for name in [name for name in sys.modules if name.partition(".")[0] == missing]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(InputError, match="run: pip install") as caught:
        write_report(tmp_path / "report.html", FULL)
    assert missing in str(caught.value)
    assert not list(tmp_path.iterdir())
