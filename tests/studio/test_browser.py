"""The studio in a real browser, with nothing to reach but the studio itself.

Whatever is waited for is waited for by what the page shows, for as long as a slow machine may take.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import re
import shutil
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from chromium import chromium
from command_line import reltune, review_rows, write_csv
from reltune.errors import InputError
from reltune.runs import flow
from reltune.studio.jobs import Jobs
from reltune.studio.places import Place
from reltune.studio.words import Words
from tiny_models import save_tiny_bert, save_tiny_llama

pytestmark = pytest.mark.browser

EVIL = "<script>alert(1)</script>"
SECONDS = 300  # the longest that anything is waited for
TRAINING = ("--use_cpu", "--per_device_train_batch_size", 8, "--num_train_epochs", 1, "--granularity", "column")


class Studio:
    """A studio of its own process."""

    def __init__(self, runs: Path, *words: str) -> None:
        self.runs = runs
        command = [sys.executable, "-m", "reltune", "studio", str(runs), "--port", "0", *words]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        found = re.search(r"http://\S+?/(?= )", line)
        assert found, line
        self.url = found[0]

    def end(self) -> None:
        self.process.send_signal(signal.SIGINT)
        self.process.wait(SECONDS)
        jobs = Jobs(Place(self.runs))
        for job in jobs.all():  # which go on without a studio
            if job.state == "running":
                with contextlib.suppress(InputError):
                    jobs.stop(job.name)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as launched:
        yield launched


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Studio]:
    runs = tmp_path_factory.mktemp("place") / "runs"
    (runs / "torn").mkdir(parents=True)
    (runs / "torn" / "config.yaml").write_text("a: [")
    save_tiny_bert(runs / "bert", num_layers=3)
    save_tiny_llama(runs / "llama")
    rows = review_rows(48, labels=(EVIL, "pos"))
    write_csv(runs / "reviews.csv", rows)
    (runs / "broken.jsonl").write_text('{"text": "good", "label": "a"}\n{"text": \n')
    texts = [text for text, _ in rows[:24]]
    chats = [[{"role": "user", "content": text}, {"role": "assistant", "content": "very good"}] for text in texts]
    (runs / "chats.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    (runs / "stories.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    bert = ("--model_name_or_path", runs / "bert", "--train_file", runs / "reviews.csv", *TRAINING)
    llama = ("--model_name_or_path", runs / "llama", "--train_file", runs / "stories.jsonl", *TRAINING)
    for name, *more in (
        ("first", *bert, "--criteria", "fisher,magnitude", "--budget", "2%", "--seed", 5),
        ("second", *bert, "--criteria", "fisher", "--budget", "5%", "--seed", 6),
        ("talker", *llama, "--criteria", "fisher", "--budget", "5%", "--max_length", 16),
    ):
        answer = reltune("run", *more, "--output_dir", runs / name)
        assert answer.code == 0, answer.err
    half = shutil.copytree(runs / "first", runs / "half") / "relevance" / "scores.safetensors"
    half.write_bytes(half.read_bytes()[: half.stat().st_size // 2])
    started = Studio(runs)
    yield started
    started.end()


@pytest.fixture
def page(browser: Any, studio: Studio) -> Iterator[Any]:
    with opened(browser, studio.url) as page:
        yield page


class opened:
    """A page of the studio; at the end nothing may have gone wrong in it or been asked of another address."""

    def __init__(self, browser: Any, url: str, width: int = 1440, language: str = "") -> None:
        self.page = browser.new_page(viewport={"width": width, "height": 900})
        self.page.set_default_timeout(SECONDS * 1000)
        self.page.set_default_navigation_timeout(SECONDS * 1000)
        self.url, self.language, self.errors = url, language, []
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("dialog", lambda dialog: self.errors.append(dialog.message))
        self.page.on("request", lambda request: self._note(request.url))

    def _note(self, url: str) -> None:
        if not url.startswith((self.url, "data:", "blob:")):
            self.errors.append(url)

    def __enter__(self) -> Any:
        self.page.goto(f"{self.url}{self.language}")
        self.page.wait_for_selector("#runs table, #runs .remark")
        return self.page

    def __exit__(self, *_: Any) -> None:
        self.page.close()
        assert self.errors == []


def pick(page: Any, element: str, value: str) -> None:
    """Choose of a list with a field to write in, as soon as the list has it."""
    field = page.locator(f"#{element} input").first
    field.click()
    field.fill(value)
    page.get_by_role("option", name=value, exact=True).click()
    page.locator("h1").click()  # which closes the list


def tab(page: Any, name: str) -> None:
    page.get_by_role("tab", name=name, exact=True).click()


def waited(page: Any, element: str, text: str) -> str:
    """What an element says as soon as it says a text."""
    page.locator(f"#{element}").filter(has_text=text).wait_for()
    return str(page.locator(f"#{element}").inner_text())


def waited_row(page: Any, job: str, state: str) -> None:
    page.locator("#jobs tr").filter(has_text=job).filter(has_text=state).wait_for()


def heatmaps(run: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((run / "relevance" / "scores.json").read_text())["overview"]["heatmaps"]
    return found


def first_cell(heatmap: dict[str, Any]) -> tuple[int, int, float]:
    cells = ((i, j, value) for i, row in enumerate(heatmap["values"]) for j, value in enumerate(row))
    return next(cell for cell in cells if cell[2] is not None)


def test_a_run_is_shown_with_its_map_and_curves(page: Any, studio: Studio) -> None:
    table = page.locator("#runs").inner_text()
    assert "first" in table and "second" in table and "damaged" in table and "not valid YAML" in table
    pick(page, "chosen", "first")
    shown = waited(page, "details", "Trainable parameters")
    assert "the backward pass ends at" in shown and "accuracy" in shown
    fisher, magnitude = heatmaps(studio.runs / "first")

    def hovered(heatmap: dict[str, Any]) -> None:
        """A cell of the first layer, which lies at the bottom, tells its exact value."""
        i, j, value = first_cell(heatmap)
        said = (heatmap["rows"][i], heatmap["columns"][j], f"relevance {value:.6g}")
        page.mouse.move(0, 0)
        cells = page.locator("#heat .nsewdrag").first
        size = cells.bounding_box()
        x, y = (j + 0.5) / len(heatmap["columns"]), 1 - (i + 0.5) / len(heatmap["rows"])
        cells.hover(position={"x": size["width"] * x, "y": size["height"] * y})
        text = re.compile(".*".join(map(re.escape, said)), re.S)
        page.locator("#heat .hoverlayer").filter(has_text=text).wait_for()

    page.wait_for_selector("#heat .heatmaplayer image")
    hovered(fisher)
    ends = page.locator("#heat .cbtitle").text_content()
    page.get_by_label("rank").check()
    page.wait_for_function("ends => !document.querySelector('#heat .cbtitle').textContent.includes(ends)", arg=ends)
    pick(page, "criterion", "magnitude")
    page.wait_for_function(
        "said => document.querySelector('#heat .js-plotly-plot').data[0].customdata.flat().some(one => one.includes(said))",
        arg=f"relevance {first_cell(magnitude)[2]:.6g}<",
    )
    hovered(magnitude)
    page.wait_for_selector("#layers .bars")
    page.wait_for_selector("#loss .scatterlayer")


def test_two_runs_are_compared(page: Any) -> None:
    pick(page, "chosen", "first")
    pick(page, "chosen", "second")
    shown = waited(page, "details", "what differs")
    assert re.search(r"budget\s+2%\s+5%", shown), shown
    page.wait_for_selector("#loss .scatterlayer")
    assert "first: " in page.locator("#loss .legend").text_content()


def test_the_slider_tells_what_falls_in_and_the_plan_is_saved(page: Any, studio: Studio) -> None:
    tab(page, "Budget")
    pick(page, "budget_run", "first")
    before = waited(page, "summary", "Memory of a step")
    slider = page.locator("#slider input[type=range]")
    slider.focus()
    slider.press("ArrowRight")
    page.wait_for_function("before => document.querySelector('#summary').innerText != before", arg=before)
    budget = "2.5%"
    written = "document.querySelector('#budget_text input, #budget_text textarea').value"
    page.wait_for_function(f"budget => {written} == budget", arg=budget)
    excluded = [f"bert.encoder.layer.0.attention.self.{name}" for name in ("query", "key")]
    for place, name in enumerate(excluded, 1):  # the box of all comes first
        page.locator("#modules input[type=checkbox]").nth(place).click()
        command = waited(page, "budget_command", f"--exclude_modules={name}")
    assert f"--budget={budget}" in command and re.findall(r"--exclude_modules=(\S+)", command) == excluded
    page.locator("#save_plan").click()
    assert "--overwrite_output_dir" in waited(page, "saved", "already holds")
    waited(page, "saved", ": failed")
    page.locator("#replace_plan input").check()
    waited(page, "budget_command", "--overwrite_output_dir")
    page.locator("#save_plan").click()
    waited(page, "saved", ": done")
    plan = yaml.safe_load((studio.runs / "first" / "plan" / "plan.yaml").read_text(encoding="utf-8"))
    assert plan["budget"]["asked"] == budget and not set(excluded) & set(plan["modules"])
    said = re.search(r"Trained parameters\s+([\d,]+)", page.locator("#summary").inner_text())
    assert said and int(said[1].replace(",", "")) == plan["predicted"]["trainable_parameters"]


def test_a_budget_that_cannot_be_is_said_to_be_none(page: Any) -> None:
    tab(page, "Budget")
    pick(page, "budget_run", "second")
    waited(page, "summary", "Memory of a step")
    field = page.locator("#budget_text input, #budget_text textarea")
    for budget, problem in (("lots", "'lots' is no number"), ("101%", "above 100% of the model")):
        field.fill(budget)
        field.press("Enter")
        assert "Trained parameters" not in waited(page, "summary", problem)
        assert page.locator("#budget_command").inner_text().strip() == ""
    field.fill("1%")
    field.press("Enter")
    waited(page, "summary", "Trained parameters")
    waited(page, "budget_command", "--budget=1%")


def test_scores_that_are_half_written_are_said_to_be(page: Any) -> None:
    tab(page, "Budget")
    pick(page, "budget_run", "half")
    waited(page, "summary", "cannot be read")


def test_a_job_runs_to_its_end_and_outlives_the_studio(page: Any, browser: Any, studio: Studio) -> None:
    tab(page, "New run")
    page.wait_for_function("document.querySelector('#model input').value")
    pick(page, "data_file", "broken.jsonl")
    assert "line 2" in waited(page, "preview", "broken.jsonl")
    pick(page, "model", str(studio.runs / "bert"))
    pick(page, "data_file", "reviews.csv")
    shown = waited(page, "preview", "as the model sees it")
    assert EVIL in shown and "sequence_classification" in shown and "[CLS]" in shown
    page.locator("#run_name input, #run_name textarea").fill("third")
    page.locator("#cpu input").check()
    pick(page, "new_granularity", "bias")
    waited(page, "new_command", "--granularity=bias")
    page.locator("#predict_cost").click()
    assert "lora" in waited(page, "predicted", "Largest batch")
    page.locator("#epochs input").fill("1")
    page.wait_for_function("document.querySelector('#predicted').innerText.trim() == ''")  # it was of another form
    waited(page, "new_command", "--num_train_epochs=1")
    page.locator("#start").click()
    job = re.search(r"Started: (\S+)", waited(page, "predicted", "Started"))[1]  # type: ignore[index]
    tab(page, "Jobs")
    waited_row(page, job, "done")
    assert "Report:" in waited(page, "output", "Report:")
    assert (studio.runs / "third" / "all_results.json").is_file()
    page.reload()
    assert re.search(r"third\s+run\s+finished", waited(page, "runs", "third"))
    again = Studio(studio.runs)
    try:
        with opened(browser, again.url) as other:
            tab(other, "Jobs")
            assert job in waited(other, "jobs", job)
    finally:
        again.end()


def test_a_job_is_stopped(page: Any) -> None:
    tab(page, "New run")
    page.wait_for_function("document.querySelector('#model input').value")
    pick(page, "data_file", "reviews.csv")
    page.locator("#run_name input, #run_name textarea").fill("long")
    page.locator("#epochs input").fill("100000")
    page.locator("#cpu input").check()
    waited(page, "new_command", "--num_train_epochs=100000")
    page.locator("#start").click()
    job = re.search(r"Started: (\S+)", waited(page, "predicted", "Started"))[1]  # type: ignore[index]
    tab(page, "Jobs")
    page.wait_for_function("job => document.querySelector('#job input').value == job", arg=job)
    page.wait_for_selector("#job_loss .scatterlayer")  # it trains, and its curve is drawn
    page.locator("#stop").click()
    waited_row(page, job, "stopped")


def test_a_model_without_a_chat_template_says_so_and_one_is_offered(page: Any, studio: Studio) -> None:
    tab(page, "New run")
    page.wait_for_function("document.querySelector('#model input').value")
    pick(page, "model", str(studio.runs / "llama"))
    pick(page, "data_file", "chats.jsonl")
    assert "chatml" in waited(page, "preview", "has no chat template")
    page.locator("#run_name input, #run_name textarea").fill("chats")
    pick(page, "chat_template", "chatml")
    waited(page, "preview", "as the model sees it")
    waited(page, "new_command", "--chat_template=chatml")
    tab(page, "Try")
    pick(page, "try_run", "talker")
    page.locator("#load").click()
    waited(page, "loaded", "no chat template")
    page.locator("#message textarea").fill("good film")
    page.locator("#message textarea").press("Enter")
    for side, conversation in flow.chat(str(studio.runs / "talker"), compare=True).items():
        answer = "".join(conversation.answer("good film")).strip()
        assert answer
        page.locator(f"#chat_{side}").filter(has_text=re.compile(rf"good film.*{re.escape(answer)}", re.S)).wait_for()
    page.locator("#chat_base").get_by_label("Clear").click()  # both begin anew
    page.wait_for_function("!document.querySelector('#chat_tuned').innerText.includes('good film')")


def test_base_and_tuned_model_answer_side_by_side(page: Any, studio: Studio) -> None:
    tab(page, "Try")
    pick(page, "try_run", "second")
    page.locator("#load").click()
    waited(page, "loaded", "for sequence_classification")
    page.locator("#text_0 textarea").fill("good film")
    page.locator("#ask").click()
    assert EVIL in waited(page, "answer_base", "prediction")
    shown = float(re.search(r"score ([\d.]+)", waited(page, "answer_tuned", "prediction"))[1])  # type: ignore[index]
    write_csv(studio.runs / "asked.csv", [("good film", "pos")])
    answer = reltune(
        "predict",
        studio.runs / "second",
        "--input_file",
        studio.runs / "asked.csv",
        "--output_file",
        studio.runs / "said.csv",
    )
    assert answer.code == 0, answer.err
    (said,) = csv.DictReader(io.StringIO((studio.runs / "said.csv").read_text(encoding="utf-8")))
    assert shown == pytest.approx(float(said["score"]), abs=1e-5)


CUT = """() => [...document.querySelectorAll("button, label, h1, h2, h3, th, p")].filter(one => {
  const box = one.getBoundingClientRect();
  if (!box.width || one.closest(".scroll, .js-plotly-plot, #modules")) return false;
  return box.right > document.documentElement.clientWidth + 0.5 || one.scrollWidth > one.clientWidth + 1;
}).map(one => one.outerHTML.slice(0, 120))"""


@pytest.mark.parametrize("width", [390, 1440])
@pytest.mark.parametrize("language", ["en", "zh"])
def test_no_tab_is_wider_than_the_window(browser: Any, studio: Studio, width: int, language: str) -> None:
    words = Words(language)
    with opened(browser, studio.url, width, f"{language}/") as page:
        waited(page, "runs", "second")
        pick(page, "chosen", "second")
        page.wait_for_selector("#heat .heatmaplayer")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        for name in ("budget", "new", "jobs", "try"):
            tab(page, words(f"tab_{name}"))
            if name == "budget":
                pick(page, "budget_run", "second")
                page.wait_for_selector("#summary .fact")
            page.locator(f"#tab_{name}").wait_for()
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            assert page.evaluate(CUT) == []


def test_figures_can_be_read_in_the_dark(browser: Any, studio: Studio) -> None:
    with opened(browser, studio.url, language="en/?__theme=dark") as page:
        pick(page, "chosen", "second")
        page.wait_for_selector("#heat .heatmaplayer")
        color = "one => getComputedStyle(document.querySelector(one[0]))[one[1]]"
        texts = {
            page.evaluate(color, [f"#heat {name}", "fill"]) for name in (".xtick text", ".ytick text", ".cbtitle text")
        }
        assert texts == {page.evaluate(color, ["#details h2", "color"])}


def test_an_empty_directory_says_how_to_begin(browser: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    empty = Studio(tmp_path)
    try:
        assert capfd.readouterr().err == ""  # no library warns of what the studio asks of it
        with opened(browser, empty.url) as page:
            assert "No runs here yet" in page.locator("#runs").inner_text()
            tab(page, "Budget")
            waited(page, "saved", "No run was analyzed yet")
    finally:
        empty.end()


def status(url: str, password: str | None = None) -> int:
    manager = urllib.request.HTTPPasswordMgrWithDefaultRealm()
    manager.add_password(None, url, "anybody", password or "")
    opener = (
        urllib.request.build_opener(urllib.request.HTTPBasicAuthHandler(manager))
        if password
        else urllib.request.build_opener()
    )
    try:
        return int(opener.open(url, timeout=SECONDS).status)
    except urllib.error.HTTPError as error:
        return error.code


def test_reports_are_those_of_runs_alone(studio: Studio) -> None:
    assert status(f"{studio.url}report/second") == 200
    (studio.runs.parent / "report.html").write_text("secret")
    for name in ("", "..", "%2e%2e", "..%2f", "torn", "nothing", "second%2f..%2f.."):
        assert status(f"{studio.url}report/{name}") == 404, name


def test_a_password_is_asked_for_on_another_address(studio: Studio) -> None:
    other = Studio(studio.runs, "--host", "0.0.0.0", "--password", "secret")
    try:
        url = other.url.replace("0.0.0.0", "127.0.0.1")
        assert [status(f"{url}{place}") for place in ("", "en/", "en/config", "report/second")] == [401] * 4
        assert status(f"{url}report/second", "wrong") == 401
        assert status(f"{url}report/second", "secret") == 200
    finally:
        other.end()
