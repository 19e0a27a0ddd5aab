"""The page against what was put in: every figure is there, nothing is loaded, nothing breaks the frame."""

import base64
import dataclasses
import json
import math
import re
import sys

import numpy as np
import plotly.graph_objects as go
import pytest

from reltune.errors import InputError
from reltune.relevance.heatmap import OUTSIDE, Heatmap
from reltune.relevance.profiles import Leading, Profiles, profile
from reltune.report import figures
from reltune.report.figures import SCALES, heatmap_figure, heatmap_views, layers_figure
from reltune.report.page import write_report
from reltune.report.record import ComparisonRecord, Output, RunRecord, Sample, WayResult, WayTable
from report_cases import EMPTY, EVIL, FULL, LLAMA, OUTPUTS, page_of, relevance, scores


def test_outputs_stand_side_by_side(tmp_path):
    page = page_of(tmp_path, dataclasses.replace(EMPTY, outputs=OUTPUTS))
    rows = [page.cells[i : i + 4] for i in range(0, len(page.cells), 4)]
    assert rows[0] == ["Wie viel ist 1 + 1?", "2", "2 ✓", "zwei"]
    assert rows[1] == ["كم يساوي ٢ + ٢؟", "٤", "", "٤ ✓"]
    assert [text.replace("\n", "") for text in rows[2][:3]] == ["写" * 9, "好", "很" * 300]
    assert rows[2][3] == "[bold]好[/bold] \x1b[31m" and len(rows) == 8
    assert sum(tag == "details" for tag, _ in page.elements) == 2  # the two long ones are folded
    assert "Outputs" not in page_of(tmp_path, EMPTY).text


def test_answers_to_prompts_stand_by_step(tmp_path):
    samples = [
        Sample(step, step / 9, prompt, f"{prompt} at {step}") for step in range(0, 45, 3) for prompt in ("a", EVIL)
    ]
    page = page_of(tmp_path, dataclasses.replace(EMPTY, samples=[*samples, Sample(45, 5.0, "long", "x" * 300)]))
    assert "Answers while it trained" in page.text and EVIL in page.text
    assert page.text.count("answer (12 of 15)") == 2
    assert page.cells[0] == "a at 0" and page.cells[11] == "a at 42" and page.cells[12] == f"{EVIL} at 0"
    assert page.cells[-1] == "x" * 300 and [tag for tag, _ in page.elements].count("details") == 1
    assert "Answers while it trained" not in page_of(tmp_path, EMPTY).text


def test_columns_are_in_the_page(tmp_path):
    h = relevance(2)
    cells = [profile(1, 0, np.arange(10) - 4.5, 1, 5), profile(2, 3, np.arange(3.0), 4, 5)]
    profiles = Profiles(cells, [Leading("bert.encoder.layer.1", "x.<b>", 2, 1234567.0)])
    page = page_of(tmp_path, dataclasses.replace(EMPTY, heatmaps=[h], profiles=[profiles]))
    held = next(json.loads(code) for _, name, code in page.code if name == "profiles")["heatmap-0"]
    assert held["cells"] == [[1, 0, 10, 1, 5], [2, 3, 3, 4, 3]]
    data = base64.b64decode(held["data"])
    means, peaks = (np.frombuffer(data, "<f4", 8, start) for start in (0, 32))
    assert means.tolist() == [-4, -2, 0, 2, 4, 0, 1, 2] and peaks.tolist() == [-4.5, -2.5, -0.5, 2.5, 4.5, 0, 1, 2]
    assert np.frombuffer(data, "<u4", 8, 64).tolist() == [0, 0, 0, 1, 1, 0, 0, 0] and len(data) == 96
    assert held["total"] == math.fsum(v for row in h.values for v in row if v is not None)
    for said in ("columns with the most relevance by fisher", "1.23457e+06", "<b>"):
        assert any(said in text for text in page.text), said
    selects = {attrs["name"] for tag, attrs in page.elements if tag == "select"}
    assert selects == {"layer", "module"} and "select" not in {tag for tag, _ in page_of(tmp_path, FULL).elements}


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
        *(
            "547,072",
            "97.13 ± 1.12",
            "+1.25 [-0.31, +2.47]",
            "+0.10",
            "0.002*",
            "94",
            "0.123",
            "2.0 GiB",
            "3.0 MiB",
            "-6.25",
        ),
        *(
            "before training",
            "81.11 ± 0.20",
            "dora r=13",
            "failed: training diverged, some weights are not finite any more.",
            "—",
            *FULL.ways.notes,
        ),
        *("eval_loss", "0.1234", "training.learning_rate", "0.003", "model_name_or_path", "some/model"),
    ):
        assert text in page.text, text
    assert "Test accuracy" in page.text and "Validation accuracy" not in page.text
    assert "held in" not in page.text
    held = page_of(tmp_path, dataclasses.replace(FULL, held_in="8 bits"))
    assert "some/model, linear layers held in 8 bits" in held.text

    figures = page.figures
    ways = {"ways-seconds", "ways-parameters"}
    assert set(figures) == {"heatmap-0", "layers-0", "heatmap-1", "layers-1", "loss", "scores", *ways}
    (points,) = figures["ways-seconds"]["data"]
    assert (points["x"], points["text"]) == ([24.0, 11.0], ["columns", "lora"])
    assert points["y"] == pytest.approx([97.13, 95.88]) and points["error_y"]["array"] == pytest.approx([1.12, 0.89])
    places = {attrs.get("id") for _, attrs in page.elements}
    for name, figure in figures.items():
        assert name in places
        go.Figure(figure)  # Plotly's own check of every property
    h = FULL.heatmaps[0]
    total = math.fsum(v for row in h.values for v in row if v is not None)
    heat = figures["heatmap-0"]["data"][0]
    assert heat["z"][0][:-1] == [None] * 8 and heat["z"][12][7] == 1
    assert heat["z"][5][3] == pytest.approx(h.values[5][3] / h.values[12][7])
    assert heat["customdata"][5][3] == (
        "bert.encoder.layer.4<br>attention.output.dense<br>relevance 36<br>"
        f"{100 * 36 / total:.4g} % of all relevance<br>rank 61 of 97"
    )
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


POOLED = Heatmap(  # the pooler holds nine tenths
    *("fisher", ["bert.encoder.layer.0", "bert.encoder.layer.1", "bert.pooler.dense"], ["query", "key", OUTSIDE]),
    *([[1.0, 10.0, None], [0.0, 89.0, None], [None, None, 900.0]], [0.011, 0.089, 0.9]),
)


def test_what_lies_outside_the_layers_does_not_squeeze_their_scale():
    assert POOLED.outside() == ["bert.pooler.dense"]
    z = {scale: view["z"] for scale, view in heatmap_views(POOLED).items()}
    assert z["linear"][0][:2] == pytest.approx([1 / 89, 10 / 89])
    assert z["linear"][1:] == [[0, 1, None], [None, None, 1]]
    # Two decades from the largest to the smallest within the layers.
    assert z["log"][0][:2] == pytest.approx([1 - math.log10(89) / 2, 1 - math.log10(8.9) / 2])
    assert z["log"][1:] == [[0, 1, None], [None, None, 1]]
    assert z["rank"] == [[2 / 5, 3 / 5, None], [1 / 5, 4 / 5, None], [None, None, 1]]
    assert heatmap_views(POOLED)["rank"]["text"] == [["4", "3", ""], ["5", "2", ""], ["", "", "1"]]
    bars = layers_figure(POOLED.rows, POOLED.share_by_layer, {}, outside=POOLED.outside())
    assert bars["layout"]["xaxis"]["range"] == [0, pytest.approx(1.05 * 8.9)]
    assert [a["text"] for a in bars["layout"]["annotations"]] == ["layer", "90.0 ▸"]
    # A model without layers has a scale of its own.
    alone = Heatmap("fisher", ["stem", "head"], [OUTSIDE], [[1.0], [4.0]], [0.2, 0.8])
    assert alone.outside() == [] and heatmap_figure(alone)["data"][0]["z"] == [[0.25], [1]]


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("values", [[0.0, 0.0], [3.0], [1e-9, 1.0, 0.5], [-2.0, 0.0, 1.0], [7.0, 7.0]])
def test_scales_hold_every_value_in_its_order(scale, values):
    figure = heatmap_figure(Heatmap("x", ["h.0"], list("abc")[: len(values)], [values], [1.0]), scale)
    go.Figure(figure)
    trace = figure["data"][0]
    (places,) = trace["z"]
    assert all(trace["zmin"] <= place <= trace["zmax"] for place in places)
    assert [places[i] for i in sorted(range(len(values)), key=values.__getitem__)] == sorted(places)
    ticks = trace["colorbar"]["tickvals"]
    assert ticks and ticks == sorted(set(ticks)) and trace["zmin"] <= ticks[0] <= ticks[-1] <= trace["zmax"]
    assert len(ticks) == len(trace["colorbar"]["ticktext"])


def test_without_scripts_everything_is_in_tables(tmp_path):
    record = dataclasses.replace(FULL, heatmaps=[POOLED])
    page = page_of(tmp_path, record)
    tables = [attrs for tag, attrs in page.elements if tag == "details" and attrs.get("class") == "table"]
    assert len(tables) == 2 and all("open" in attrs for attrs in tables)
    for text in ("90.000", "8.900", "1.5000", "0.6250", "87.50", "81.25"):
        assert text in page.text, text
    (sentence,) = (text for text in page.text if "beyond the scale" in text)
    assert "bert.pooler.dense (90.0 %)" in sentence and "lies outside them" in sentence
    chosen = page_of(tmp_path, dataclasses.replace(EMPTY, selected_by_layer={"h.0": 54321}))
    assert "54,321" in chosen.text and "h.0" in chosen.text


def test_switches_for_theme_and_scale(tmp_path):
    inputs = [attrs for tag, attrs in page_of(tmp_path, FULL).elements if tag == "input"]
    values = {name: [a["value"] for a in inputs if a["name"] == name] for name in ("theme", "scale")}
    assert values == {"theme": ["as the system", "light", "dark"], "scale": ["linear", "log", "rank"]}


def test_report_escapes_what_users_wrote(tmp_path):
    h = Heatmap(EVIL, [EVIL, "b&amp;.1"], [EVIL, "x.<b>y</b>"], [[0.0, None], [0.0, 0.0]], [0.0, 0.0])
    record = RunRecord(
        *(EVIL, {"model_name_or_path": EVIL, EVIL: [EVIL]}, [h, h], EVIL, [EVIL], {EVIL: 3}, {EVIL: 1.0}),
        *([], [EVIL]),
        ways=ComparisonRecord(
            "accuracy",
            "accuracy",
            [1],
            [WayTable("usual", EVIL, [WayResult(EVIL, EVIL, 1, 2, scores(0.5, 0.5), failed=EVIL)])],
            [EVIL],
        ),
        outputs=[Output(EVIL, EVIL + "!", f'<b title="{EVIL}">' + 300 * "x", f"</td></table>{EVIL}")],
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


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([3.0, 40.0], ["5", "10", "20"]),
        ([1e3, 2e6], ["100", "1k", "10k", "100k", "1M"]),
        ([270.0, 336.0, 557.0], ["300", "400", "500"]),  # between 200 and 500, and 500 alone in sight
        ([520.0, 580.0], ["520", "540", "560", "580"]),
        ([301.2], ["300"]),
    ],
)
def test_an_axis_of_powers_has_numbers(values: list[float], words: list[str]) -> None:
    found = figures._log_ticks(values)["ticktext"]
    assert set(words) <= set(found) and (len(found) == len(words) or max(values) / min(values) > 10)
