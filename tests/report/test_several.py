"""Runs side by side, and reports in Markdown and as pictures, against what was put in."""

from __future__ import annotations

import dataclasses
import io
import re
import shlex
import shutil
import sys
from pathlib import Path
from xml.etree import ElementTree

import plotly.graph_objects as go
import pytest
from PIL import Image

from command_line import assert_refused, contents, reltune
from reltune.markup import CIVIDIS
from reltune.relevance.heatmap import OUTSIDE, Heatmap
from reltune.report.forms import write_run, write_runs
from reltune.report.markdown import run_markdown, runs_markdown
from reltune.report.picture import run_picture, runs_picture, ticks
from reltune.report.record import LMEvalRecord, LMEvalScore, Predicted, RunRecord
from reltune.report.several import NamedRun, differences, method, notes, reached, terminal_tables, took
from report_cases import BERT, EMPTY, EVIL, FULL, LLAMA, OUTPUTS, Page, relevance, shown

OLD = Path(__file__).parents[1] / "artefacts" / "v0_1"
SVG = "{http://www.w3.org/2000/svg}"
ONE = dataclasses.replace(
    FULL,
    config={
        "method": "weights",
        "granularity": ["column"],
        "criteria": ["fisher"],
        "budget": "1%",
        "output_dir": "a",
        "seed": 1,
    },
    metrics={
        **{"test_before_accuracy": 0.5, "test_accuracy": 0.75, "test_samples": 40, "trainable_parameters": 12_345},
        **{"train_steps": 20, "learning_rate": 0.002, "adapter_bytes": 2048, "train_seconds_per_step": 0.25},
        "train_peak_memory_bytes": 2**30,
    },
)
OTHER = dataclasses.replace(
    EMPTY,
    config={"method": "lora", "granularity": [], "criteria": [], "lora_r": 8, "output_dir": "b", "seed": 1},
    metrics={"test_accuracy": 0.8, "test_samples": 40},
    history=[{"loss": 2.0, "step": 5}, {"loss": 1.0, "step": 10}],
)
RUNS = [NamedRun("one", ONE), NamedRun("other", OTHER)]


def page(tmp_path: Path, runs: list[NamedRun]) -> Page:
    write_runs(tmp_path / "runs.html", runs, "html")
    return Page((tmp_path / "runs.html").read_text(encoding="utf-8"))


def elements(svg: str, tag: str) -> list[ElementTree.Element]:
    return list(ElementTree.fromstring(svg).iter(SVG + tag))


def texts(svg: str) -> list[str]:
    return ["".join(text.itertext()) for text in elements(svg, "text")]


def test_tables_of_runs() -> None:
    heads, rows = reached(RUNS)
    assert heads == ["run", "method", "trained", "accuracy %\nbase", "accuracy %\ntuned"]
    assert rows == [
        ["one", "column by fisher, 1%", "12,345", "50.00", "75.00"],
        ["other", "lora", "—", "—", "80.00"],
    ]
    assert took(RUNS)[1][0] == ["one", "0.002", "20", "0.250", "1.0 GiB", "2.0 KiB"]
    assert took(RUNS)[1][1] == ["other", *["—"] * 5]
    assert method(EMPTY) == "weights"


def test_settings_that_differ_are_all_and_only_those() -> None:
    heads, rows = differences(RUNS)
    assert heads == ["setting", "one", "other"]
    assert rows == [
        ["method", "weights", "lora"],
        ["granularity", "column", "—"],
        ["criteria", "fisher", "—"],
        ["budget", "1%", "—"],
        ["lora_r", "—", "8"],
    ]


def test_runs_that_cannot_be_compared_are_said_to_be() -> None:
    assert notes(RUNS) == []
    fewer = dataclasses.replace(OTHER, metrics={**OTHER.metrics, "test_samples": 39})
    assert "numbers of held-out rows" in notes([RUNS[0], NamedRun("fewer", fewer)])[0]
    bert = dataclasses.replace(OTHER, config={**OTHER.config, "model_name_or_path": "bert"})
    assert "different models" in notes([RUNS[0], NamedRun("bert", bert)])[0]
    tags = dataclasses.replace(OTHER, config={**OTHER.config, "task": "token_classification"})
    assert "different tasks" in notes([RUNS[0], NamedRun("tags", tags)])[0]


def test_a_file_with_other_rows_is_other_data() -> None:
    def run(rows: str, source: str = "a.csv") -> NamedRun:
        facts = [
            ("train data", f"{source}: 2 rows, fingerprint {rows}"),
            ("test data", f"{source}: 1 rows, fingerprint {rows}"),
        ]
        return NamedRun(rows, dataclasses.replace(OTHER, facts=facts))

    assert "different training data, held-out rows:" in notes([run("11"), run("22")])[0]
    assert notes([run("11"), run("11", "copy.csv")]) == []  # of the same rows under another name nothing is said
    assert notes([run("11"), RUNS[1]]) == []  # an old run did not write down what it read


def test_validation_metrics_where_no_run_was_tested() -> None:
    runs = [
        NamedRun(name, dataclasses.replace(EMPTY, metrics={"eval_accuracy": value}))
        for name, value in (("a", 0.5), ("b", 1.0))
    ]
    assert [row[-1] for row in reached(runs)[1]] == ["50.00", "100.00"]


def test_the_terminal_has_80_columns() -> None:
    runs = [NamedRun("a-directory-with-a-rather-long-name-of-its-own", ONE), *RUNS]
    lines = shown(terminal_tables(runs), 80)
    assert max(map(len, lines)) <= 80 and any("12,345" in line for line in lines)


def test_the_page_has_all_curves_together(tmp_path: Path) -> None:
    found = page(tmp_path, RUNS)
    assert [curve["name"] for curve in found.figures["training-loss"]["data"]] == ["one", "other"]
    assert [(c["x"], c["y"]) for c in found.figures["training-loss"]["data"]] == [
        ([10, 20], [1.5, 0.75]),
        ([5, 10], [2.0, 1.0]),
    ]
    assert [(c["x"], c["y"]) for c in found.figures["scores"]["data"]] == [([20], [87.5])]
    assert set(found.figures) == {"training-loss", "validation-loss", "scores", "heatmap-0"}
    assert set(found.figures) <= {attrs.get("id") for _, attrs in found.elements}
    for figure in found.figures.values():
        go.Figure(figure)
    for text in ("12,345", "80.00", "lora", "column by fisher, 1%", "Settings that differ"):
        assert text in found.text, text
    assert not [(tag, attrs) for tag, attrs in found.elements if attrs.keys() & {"src", "href"}]


def test_what_users_wrote_is_escaped(tmp_path: Path) -> None:
    h = Heatmap(EVIL, [EVIL, "h.1"], [EVIL], [[0.0], [1.0]], [0.0, 1.0])
    record = dataclasses.replace(ONE, title=EVIL, heatmaps=[h], config={EVIL: EVIL}, plan_lines=[EVIL], notes=[EVIL])
    runs = [NamedRun(EVIL, record), NamedRun("other", OTHER)]
    scripts = [tag for tag, _ in page(tmp_path, RUNS).elements].count("script")
    assert [tag for tag, _ in page(tmp_path, runs).elements].count("script") == scripts
    for svg in (run_picture(record), runs_picture(runs)):
        assert not elements(svg, "script") and EVIL in "".join(texts(svg))
    assert "<script" not in run_markdown(record) + runs_markdown(runs)
    torn = dataclasses.replace(record, title="a\x00b\ud800")
    assert "a�b�" in texts(run_picture(torn))


def test_markdown_has_the_numbers() -> None:
    text = run_markdown(FULL)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    h = FULL.heatmaps[0]
    total = sum(v for row in h.values for v in row if v is not None)
    layer = next(row for row in rows if row[0] == "bert.encoder.layer.4")
    assert layer[4] == f"{100 * h.values[5][3] / total:.2f}"
    assert ["test\\_accuracy", "", "97.21 %"] in rows and ["20", "1.00", "0.7500", "", "", ""] in rows
    for line in (*FULL.plan_lines, *FULL.notes, FULL.depth_sentence):
        assert line in text
    assert any(row[0] == "lora" or row[0].startswith("lora ") for row in rows)  # of the comparison
    assert ["budget", "1%", "—"] in [
        [c.strip() for c in line.strip("|").split("|")] for line in runs_markdown(RUNS).splitlines()
    ]


def test_markdown_has_what_a_page_has_beside() -> None:
    took = [Predicted("peak memory", 3 * 2**20, 2 * 2**20), Predicted("seconds per step", 0.5, 0.25)]
    record = RunRecord(**{**vars(EMPTY), "predicted": took, "outputs": OUTPUTS, "sweep": SWEEP, "lm_eval": LM_EVAL})
    lines = run_markdown(record).splitlines()
    assert "| peak memory | 3.0 MiB | 2.0 MiB | +50.0 % |" in lines
    assert "| seconds per step | 0.500 | 0.250 | +100.0 % |" in lines
    assert "| Wie viel ist 1 + 1? | 2 | 2 | zwei |" in lines
    assert any("很 …" in line and "\x1b" in line for line in lines)  # a long text is cut
    assert "| 1 | 0.01 | 75.00 % | yes |" in lines and "| 0 | 0.1 | failed: diverged |  |" in lines
    assert any(line.startswith("| hellaswag | acc ↑ | 0.5 ± 0.1 | 0.75 ± 0.1 | 200 | 0 |") for line in lines)


SWEEP = {"sweep": {"learning_rate": [0.1, 0.01]}, "metric": "accuracy"}
SWEEP["trials"] = [
    {"number": 0, "values": {"learning_rate": 0.1}, "metric": None, "failed": "diverged"},
    {"number": 1, "values": {"learning_rate": 0.01}, "metric": 0.75, "failed": ""},
]
SWEEP["best"] = SWEEP["trials"][1]
LM_EVAL = LMEvalRecord(
    "0.4", None, 1, False, [LMEvalScore("hellaswag", "1", "acc", "none", True, 0, 200, 0.5, 0.1, 0.75, 0.1)]
)
POOLED = Heatmap(
    "fisher", ["l.0", "l.1", "pooler"], ["key", OUTSIDE], [[1.0, None], [3.0, None], [None, 12.0]], [0.06, 0.19, 0.75]
)


def test_the_picture_has_the_map() -> None:
    svg = run_picture(dataclasses.replace(FULL, heatmaps=[POOLED]))
    cells = [rect for rect in elements(svg, "rect") if rect.find(SVG + "title") is not None]
    assert [cell.find(SVG + "title").text for cell in cells] == [
        "pooler (outside the layers): 75 %",
        "l.1 key: 18.75 %",
        "l.0 key: 6.25 %",
    ]  # type: ignore[union-attr]
    assert [cell.get("style") for cell in cells] == [f"fill:{CIVIDIS[i]}" for i in (9, 9, 3)]
    heights = [float(str(cell.get("y"))) for cell in cells]
    assert heights == sorted(heights) and len(set(heights)) == 3  # the deepest is the highest
    assert {"75.0", "18.8", "6.2", "key", "all"} <= set(texts(svg))


def test_the_picture_has_the_curves_to_scale() -> None:
    svg = runs_picture(RUNS)
    lines = [
        [tuple(map(float, point.split(","))) for point in str(line.get("points")).split()]
        for line in elements(svg, "polyline")
    ]
    (one, other) = lines  # losses 1.5, 0.75 at steps 10, 20; 2, 1 at 5, 10
    assert other[0][1] < one[0][1] < other[1][1] < one[1][1]  # a smaller loss is lower, at a larger y
    assert (one[0][1] - other[0][1]) / (one[1][1] - other[0][1]) == pytest.approx(0.5 / 1.25, abs=1e-2)
    assert (other[1][0] - other[0][0]) / (one[1][0] - other[0][0]) == pytest.approx(5 / 15, abs=1e-2)
    assert other[1][0] == pytest.approx(one[0][0], abs=0.1)


@pytest.mark.parametrize(
    ("layers", "columns"), [(6, BERT), (80, LLAMA), (2, [f"experts.{i}.down_proj" for i in range(40)])]
)
def test_nothing_of_a_picture_stands_outside_it(layers: int, columns: list[str]) -> None:
    svg = run_picture(dataclasses.replace(FULL, heatmaps=[relevance(layers, columns)]))
    root = ElementTree.fromstring(svg)
    width, height = float(str(root.get("width"))), float(str(root.get("height")))
    for rect in root.iter(SVG + "rect"):
        x, y, w, h = (float(rect.get(name) or 0) for name in ("x", "y", "width", "height"))
        assert min(x, y) >= 0 and x + w <= width + 1 and y + h <= height, rect.attrib
    for text in root.iter(SVG + "text"):
        assert 0 <= float(str(text.get("x"))) <= width and 0 <= float(str(text.get("y"))) <= height
    shown_columns = texts(svg)
    assert all(name in shown_columns for name in columns)


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.12, 0.13), (3, 40_000), (-2, 5), (1.0, 1.0)])
def test_ticks_are_round_and_within(low: float, high: float) -> None:
    found = ticks(low, high)
    assert found == sorted(set(found)) and 1 <= len(found) <= 9
    assert all(low - 1e-9 <= tick <= high + 1e-9 for tick in found)


def test_an_empty_run_has_every_form(tmp_path: Path) -> None:
    for form in ("html", "md", "svg", "png"):
        write_run(tmp_path / f"report.{form}", EMPTY, form)
        write_runs(tmp_path / f"runs.{form}", [NamedRun("a", EMPTY), NamedRun("b", EMPTY)], form)
    assert len(list(tmp_path.iterdir())) == 8


def test_pixels_are_those_of_the_picture(tmp_path: Path) -> None:
    record = dataclasses.replace(FULL, heatmaps=[POOLED])
    write_run(tmp_path / "report.png", record, "png")
    image = Image.open(io.BytesIO((tmp_path / "report.png").read_bytes())).convert("RGB")
    root = ElementTree.fromstring(run_picture(record))
    assert image.size == (2 * int(str(root.get("width"))), 2 * int(str(root.get("height"))))
    cell = next(rect for rect in root.iter(SVG + "rect") if rect.find(SVG + "title") is not None)
    corner = [2 * int(float(str(cell.get(name)))) + 4 for name in ("x", "y")]
    assert "#{:02x}{:02x}{:02x}".format(*image.getpixel(tuple(corner))) == CIVIDIS[9]


def test_without_its_package_a_png_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    answer = reltune("report", OLD / "columns", "--format", "png", "--output_file", tmp_path / "a.png")
    assert_refused(answer, 'pip install "reltune[png]"', "--format svg")
    assert not list(tmp_path.iterdir())


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("columns", "elements"):
        shutil.copytree(OLD / name, tmp_path / name)
    before = contents(tmp_path / "elements")
    answer = reltune("report", "columns", "elements")
    assert answer.code == 0 and answer.out.endswith("Report: runs.html\n") and "elements" in answer.out
    assert "columns" in Page(Path("runs.html").read_text(encoding="utf-8")).text
    assert contents(tmp_path / "elements") == before  # runs stay as they are
    for form in ("md", "svg", "png"):
        assert reltune("report", "columns", "--format", form).out.endswith(f"Report: columns/report.{form}\n")
    assert reltune("report", "columns", "elements", "--output_file", "both.svg").code == 0
    assert elements(Path("both.svg").read_text(encoding="utf-8"), "polyline")
    shutil.copytree(OLD / "columns", tmp_path / "more" / "columns")
    assert reltune("report", "columns", "more/columns", "--format", "md").code == 0
    assert "| more/columns |" in Path("runs.md").read_text(encoding="utf-8")


def test_every_command_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("run", "other", "third"):
        shutil.copytree(OLD / "columns", tmp_path / name)
    page = (Path(__file__).parents[2] / "docs" / "reports.md").read_text(encoding="utf-8")
    lines = "".join(re.findall(r"^```sh\n(.*?)^```$", page, flags=re.M | re.S)).splitlines()
    for line in lines:
        program, *words = shlex.split(line, comments=True)
        answer = reltune(*words)
        assert program == "reltune" and answer.code == 0, (line, answer)
        assert Path(answer.out.splitlines()[-1].removeprefix("Report: ")).is_file()
    assert len(lines) == 7
    for block in re.findall(r"^```python\n(.*?)^```$", page, flags=re.M | re.S):
        exec(compile(block, "reports.md", "exec"), {})


def test_reports_that_cannot_be_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("ways").mkdir()
    Path("ways/comparison.yaml").write_text("{}")
    run = OLD / "columns"
    for words, *told in (
        ((run, "--format", "pdf"), "--format 'pdf'", "png"),
        ((run, run), "named twice"),
        ((run, "nothing"), "nothing holds no run"),
        ((run, "ways"), "report it by itself"),
        (("ways", "--format", "svg"), "--format html or md"),
        ((run, "--format", "md", "--output_file", "a.svg"), "another format"),
        ((run, "--output_file", "ways"), "is a directory"),
    ):
        assert_refused(reltune("report", *words), *told)
    assert re.search("Missing argument", reltune("report").err)
    assert [path.name for path in tmp_path.iterdir()] == ["ways"]
