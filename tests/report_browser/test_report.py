"""The report in a real browser: what it draws, says when it is pointed at, and does when it is clicked."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from reltune.relevance.heatmap import Heatmap
from reltune.relevance.profiles import Leading, Profiles, profile
from reltune.report.page import write_report
from reltune.report.record import Predicted, RunRecord, Sample
from report_cases import BERT, EVIL, FULL, LLAMA, OUTPUTS, relevance

pytestmark = pytest.mark.browser

SAMPLES = [
    Sample(step, step / 10, prompt, f"{text} {step}")
    for step in (0, 10, 20)
    for prompt, text in (("What is relevance?", "a number"), (EVIL, EVIL), ("长" * 90, "x" * 500))
]
FACTS = [
    ("base model", f"{EVIL} (BertModel)"),
    ("its fingerprint", "0123456789abcdef" * 2),
    ("versions", "reltune 1.0"),
]
COMMANDS = [f"reltune run --model_name_or_path some/model --train_file 'data {EVIL}.csv' --output_dir " + "run/" * 40]


def columns_of(h: Heatmap, width: int = 40, buckets: int = 10) -> Profiles:
    """Columns that add up to each cell of the layers: column c of a cell has a share of c + 1."""
    parts = np.arange(1, width + 1) / (width * (width + 1) / 2)
    cells = [
        profile(i, j, value * parts, 1, buckets)
        for i, row in enumerate(h.values)
        for j, value in enumerate(row)
        if value is not None and not h.columns[j].endswith("LayerNorm") and "outside" not in h.columns[j]
    ]
    last = cells[-1]
    return Profiles(cells, [Leading(h.rows[last.row], h.columns[last.column], width - 1, float(last.peaks[-1]))])


def report_of(layers: int, columns: list[str] = BERT, **changes: Any) -> RunRecord:
    maps = [relevance(layers, columns), relevance(layers, columns, criterion="magnitude")]
    # Signed values of a criterion that does not add up.
    rest = [[None if v is None else v * (-1) ** i for v in row] for i, row in enumerate(maps[1].values)]
    maps.append(dataclasses.replace(maps[1], criterion="ablation", values=rest, adds_up=False))
    own: dict[str, Any] = {
        "heatmaps": maps,
        "profiles": [columns_of(maps[0]), columns_of(maps[1], 8), Profiles([], [])],
        "selected_by_layer": {f"bert.encoder.layer.{i}": 1000 * i for i in range(layers // 2, layers)},
        "outputs": OUTPUTS,
        "samples": SAMPLES,
        "facts": FACTS,
        "commands": COMMANDS,
    }
    return dataclasses.replace(FULL, **{**own, **changes})


@contextlib.contextmanager
def opened(browser: Any, path: Path, width: int = 1440, **options: Any) -> Iterator[Any]:
    """The page of a file; at the end nothing may have gone wrong in it, and nothing been asked of another address."""
    context = browser.new_context(viewport={"width": width, "height": 900}, **options)
    page, wrong = context.new_page(), []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    page.on("dialog", lambda dialog: wrong.append(dialog.message))
    url = path.as_uri()
    page.on("request", lambda asked: None if asked.url.startswith((url, "data:", "blob:")) else wrong.append(asked.url))
    page.goto(url)
    yield page
    context.close()
    assert wrong == []


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report(path, report_of(6))
    return path


def point(page: Any, plot: str, x: float, y: float, click: bool = False) -> None:
    """Move to a place of a chart, or click it: shares of its width and, from the top, its height."""
    area = page.locator(f"#{plot} .nsewdrag")
    area.scroll_into_view_if_needed()
    box = area.bounding_box()
    place = (box["x"] + x * box["width"], box["y"] + y * box["height"])
    page.mouse.move(place[0] - 2, place[1])
    page.mouse.move(*place)
    if click:
        page.mouse.click(*place)


def hovered(page: Any, plot: str, x: float, y: float) -> str:
    point(page, plot, x, y)
    page.wait_for_selector(f"#{plot} .hoverlayer .hovertext")
    return str(page.locator(f"#{plot} .hoverlayer .hovertext").first.text_content())


def test_charts_are_drawn_and_say_exact_values(browser: Any, file: Path) -> None:
    with opened(browser, file) as page:
        for name in ("heatmap-0", "layers-0", "loss", "scores", "ways-seconds"):
            assert page.locator(f"#{name} .main-svg").first.is_visible(), name
        assert not page.locator("#heatmap-1").is_visible()
        assert page.locator("details.table[open]").count() == 0
        h = FULL.heatmaps[0]
        h = relevance(6)
        total = math.fsum(v for row in h.values for v in row if v is not None)
        rows, columns = len(h.rows), len(h.columns)
        said = hovered(page, "heatmap-0", 0.5 / columns, 0.5 / rows)  # the first module of the last layer
        assert f"relevance {h.values[-1][0]:g}" in said and f"{100 * h.values[-1][0] / total:.4g} %" in said


def test_criterion_and_scale_are_switched(browser: Any, file: Path) -> None:
    with opened(browser, file) as page:
        title = page.locator("#heatmap-0 .cbtitle")
        assert title.text_content() == "share of all relevance, %"
        page.get_by_label("log", exact=True).check()
        assert title.text_content() == "share of all relevance, %, log"
        page.get_by_label("rank", exact=True).check()
        assert "rank, of 49" in title.text_content()
        page.get_by_label("ablation").check()
        assert not page.locator("#heatmap-0").is_visible()
        assert "rank by absolute value" in page.locator("#heatmap-2 .cbtitle").text_content()
        assert not page.locator("#panel-2 .zoom").count()  # which scores no columns


def test_the_map_zooms_to_a_layer_and_its_columns(browser: Any, file: Path) -> None:
    h = relevance(6)
    shown = columns_of(h)
    with opened(browser, file) as page:
        point(page, "heatmap-0", 0.5 / len(h.columns), 0.5 / len(h.rows), click=True)
        page.wait_for_selector("#zoom-0 .heatmaplayer")
        assert not page.locator("#heatmap-0").is_visible()
        names = page.locator("#zoom-0 .ytick text").all_text_contents()
        assert names == [name for name in BERT if not name.endswith("LayerNorm")]
        assert "A bucket is 4 columns" in page.locator("#panel-0 .zoom-words").text_content()
        cell = next(cell for cell in shown.cells if cell.row == len(h.rows) - 1 and cell.column == 0)
        said = hovered(page, "zoom-0", 0.95, 0.5 / len(names))
        assert "columns 36 to 39" in said and f"mean {cell.means[-1]:.6g}" in said
        assert f"column 39 has {cell.peaks[-1]:.6g}" in said
        point(page, "zoom-0", 0.95, 0.5 / len(names), click=True)
        page.wait_for_selector("#zoom-0 .bars")
        assert "the circle the column with the most" in page.locator("#panel-0 .zoom-words").text_content()
        for scale in ("log", "rank", "linear"):
            page.get_by_label(scale, exact=True).check()
            page.wait_for_selector("#zoom-0 .bars")
        # Another criterion shows the same module; its eight columns stand by themselves.
        page.get_by_label("magnitude").check()
        page.wait_for_selector("#zoom-1 .bars")
        assert page.locator("#panel-1 .zoom-words").text_content() == "Every column by itself."
        page.locator("#panel-1 select[name=layer]").select_option(label="all")
        page.wait_for_selector("#zoom-1 .heatmaplayer")
        assert page.locator("#zoom-1 .ytick text").all_text_contents() == [str(i) for i in range(6)]
        page.locator("#panel-1 .zoom button").click()
        page.wait_for_selector("#heatmap-1 .heatmaplayer")
        assert not page.locator("#zoom-1").is_visible()
        page.reload()
        page.wait_for_selector("#heatmap-0 .heatmaplayer")
        assert page.locator("#heatmap-0").is_visible() and not page.locator("#zoom-0").is_visible()


def test_names_and_texts_of_others_stay_text(browser: Any, tmp_path: Path) -> None:
    h = Heatmap(EVIL, [f"{EVIL}.0", f"{EVIL}.1"], [EVIL, "a.b"], [[1.0, 2.0], [3.0, 4.0]], [0.3, 0.7])
    profiles = [Profiles([profile(i, j, np.arange(5.0), 1, 5) for i in (0, 1) for j in (0, 1)], [])]
    record = report_of(6, heatmaps=[h], profiles=profiles, selected_by_layer={f"{EVIL}.0": 3}, title=EVIL)
    write_report(tmp_path / "report.html", record)
    with opened(browser, tmp_path / "report.html") as page:
        assert page.locator("h1").inner_text() == EVIL
        texts = page.locator("body").inner_text()
        assert texts.count(EVIL) >= 8
        assert EVIL in "".join(page.locator("#heatmap-0 .xtick text").all_text_contents())
        assert EVIL in hovered(page, "heatmap-0", 0.25, 0.25)
        page.locator("select[name=layer]").select_option(index=1)
        page.wait_for_selector("#zoom-0 .heatmaplayer")
        assert EVIL in "".join(page.locator("#zoom-0 .ytick text").all_text_contents())
        assert EVIL in hovered(page, "zoom-0", 0.5, 0.25)
        assert page.evaluate("[...document.scripts].filter(one => one.textContent.includes('alert')).length") == sum(
            name in page.content() for name in ('id="figures"', 'id="profiles"')
        )  # as data alone


OVERLAPS = """() => {
  const found = [];
  for (const axis of document.querySelectorAll(".plot .xaxislayer-above, .plot .yaxislayer-above, .plot .xaxislayer-below, .plot .yaxislayer-below")) {
    const boxes = [...axis.querySelectorAll("text")].map(text => [text.textContent, text.getBoundingClientRect()]).filter(([, box]) => box.width);
    for (let i = 0; i < boxes.length; i++) for (let j = 0; j < i; j++) {
      const [a, b] = [boxes[i][1], boxes[j][1]];
      const across = Math.min(a.right, b.right) - Math.max(a.left, b.left), down = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
      if (across > 1 && down > 3) found.push(`${boxes[i][0]} / ${boxes[j][0]}`);
    }
  }
  return found;
}"""
CUT = """() => [...document.querySelectorAll("table, h1, h2, h3, p, li, pre, dl, fieldset, select, .plot text")].filter(one => {
  const box = one.getBoundingClientRect(), scroll = one.closest(".scroll");
  return box.width && !scroll && box.right > document.documentElement.clientWidth + 0.5;
}).map(one => one.outerHTML.slice(0, 120))"""


@pytest.mark.parametrize("width", [390, 1440])
@pytest.mark.parametrize("layers", [6, 80])
@pytest.mark.parametrize("columns", [BERT, LLAMA], ids=["bert", "llama"])
def test_nothing_is_cut_or_overlaps(browser: Any, tmp_path: Path, width: int, layers: int, columns: list[str]) -> None:
    path = tmp_path / "report.html"
    write_report(path, report_of(layers, columns))
    assert path.stat().st_size < 6_000_000
    with opened(browser, path, width) as page:
        for zoom in (None, "layer", "module"):
            if zoom is not None:
                page.locator("#panel-0 .zoom button").evaluate("button => button.click()")
                page.locator(f"#panel-0 select[name={zoom}]").select_option(index=1)
                page.wait_for_selector("#zoom-0 .heatmaplayer")
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            assert page.evaluate(CUT) == []
            assert page.evaluate(OVERLAPS) == []


def test_a_narrow_screen_has_the_whole_prediction(browser: Any, tmp_path: Path) -> None:
    took = [Predicted("peak memory", 1023 * 2**20, 1022 * 2**20), Predicted("seconds per step", 0.465, 0.139)]
    path = tmp_path / "report.html"
    write_report(path, report_of(6, BERT, predicted=took))
    with opened(browser, path, 390) as page:
        box = page.locator("table", has_text="seconds per step").bounding_box()
        assert box and box["x"] + box["width"] <= 390 - 16


def test_a_page_with_many_maps_stays_small(browser: Any, tmp_path: Path) -> None:
    maps = [relevance(80, LLAMA, criterion=f"criterion {i}") for i in range(10)]
    path = tmp_path / "report.html"
    write_report(path, report_of(80, LLAMA, heatmaps=maps, profiles=[columns_of(h) for h in maps]))
    assert path.stat().st_size < 6_000_000
    with opened(browser, path) as page:
        page.wait_for_selector("#heatmap-0 .heatmaplayer")
        assert page.locator("details.table[open]").count() == 0
        page.get_by_label("criterion 9").check()
        page.wait_for_selector("#heatmap-9 .heatmaplayer")
        page.locator("#panel-9 select[name=layer]").select_option(index=1)
        page.wait_for_selector("#zoom-9 .heatmaplayer")


def test_without_scripts_the_tables_are_there(browser: Any, file: Path) -> None:
    with opened(browser, file, java_script_enabled=False) as page:
        text = page.locator("main").inner_text()
        for said in (
            "fisher as a table",
            "columns with the most relevance by fisher",
            "What is relevance?",
            "reltune run --model_name_or_path",
        ):
            assert said in text, said
        assert not page.locator(".plot").first.is_visible() and not page.locator(".zoom").first.is_visible()
        assert page.locator("details.table[open]").count() == page.locator("details.table").count()
