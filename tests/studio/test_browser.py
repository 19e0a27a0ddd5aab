"""The studio in a real browser, with nothing to reach but the studio itself."""

from __future__ import annotations

import csv
import io
import os
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

from command_line import reltune, review_rows, write_csv
from tiny_models import save_tiny_bert, save_tiny_llama

pytestmark = pytest.mark.browser

EVIL = "<script>alert(1)</script>"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
SECONDS = 120  # for what is computed; a busy machine takes its time
TRAINING = ("--use_cpu", "--per_device_train_batch_size", 8, "--num_train_epochs", 1, "--criteria", "fisher")


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
        self.process.wait(60)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        pytest.fail("Playwright is missing; run these tests by `make test-browser`, which installs it.", pytrace=False)
    path = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.fail(
            "Chromium is missing; install it (on Debian: apt-get install chromium), or name it in CHROMIUM.",
            pytrace=False,
        )
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield launched
        launched.close()


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
    write_csv(runs / "texts.csv", [(text, "") for text, _ in rows])
    common = ("--model_name_or_path", runs / "bert", "--train_file", runs / "reviews.csv", *TRAINING)
    for name, budget in (("first", "2%"), ("second", "5%")):
        answer = reltune(
            "run",
            *common,
            "--granularity",
            "column",
            "--budget",
            budget,
            "--output_dir",
            runs / name,
            "--seed",
            len(name),
        )
        assert answer.code == 0, answer.err
    started = Studio(runs)
    yield started
    started.end()


@pytest.fixture
def page(browser: Any, studio: Studio) -> Iterator[Any]:
    with opened(browser, studio.url) as page:
        yield page


class opened:
    """A page of the studio; at the end nothing may have gone wrong in it or been asked of another address."""

    def __init__(self, browser: Any, url: str, width: int = 1440) -> None:
        self.page = browser.new_page(viewport={"width": width, "height": 900})
        self.page.set_default_timeout(SECONDS * 1000)
        self.url, self.errors = url, []
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("dialog", lambda dialog: self.errors.append(dialog.message))
        self.page.on("request", lambda request: self._note(request.url))

    def _note(self, url: str) -> None:
        if not url.startswith((self.url, "data:", "blob:")):
            self.errors.append(url)

    def __enter__(self) -> Any:
        self.page.goto(self.url)
        self.page.wait_for_selector("#runs table")
        return self.page

    def __exit__(self, *_: Any) -> None:
        self.page.close()
        assert self.errors == []


def pick(page: Any, element: str, value: str) -> None:
    """Choose of a list with a field to write in."""
    field = page.locator(f"#{element} input").first
    field.click()
    field.fill(value)
    field.press("Enter")
    page.locator("h1").click()  # which closes the list


def tab(page: Any, name: str) -> None:
    page.get_by_role("tab", name=name, exact=True).click()


def waited(page: Any, element: str, text: str) -> str:
    """What an element says as soon as it says a text."""
    page.locator(f"#{element}").filter(has_text=text).wait_for()
    return str(page.locator(f"#{element}").inner_text())


def test_runs_are_shown_with_the_reports_figures(page: Any) -> None:
    table = page.locator("#runs").inner_text()
    assert "first" in table and "second" in table and "damaged" in table and "not valid YAML" in table
    pick(page, "chosen", "first")
    shown = waited(page, "details", "Trainable parameters")
    assert "the backward pass ends at" in shown and "accuracy" in shown
    page.wait_for_selector("#heat .heatmaplayer image, #heat .heatmaplayer .hm")
    ends = page.locator("#heat .cbtitle").text_content()
    page.get_by_label("rank").check()
    page.wait_for_function("ends => !document.querySelector('#heat .cbtitle').textContent.includes(ends)", arg=ends)
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
    page.locator("#modules input[type=checkbox]").nth(1).click()  # of the first module; the first is the head's
    command = waited(page, "budget_command", "--exclude_modules=")
    excluded = re.search(r"--exclude_modules=(\S+)", command)[1]  # type: ignore[index]
    assert f"--budget={budget}" in command and excluded == "bert.encoder.layer.0.attention.self.query"
    trained = int(
        re.search(r"Trained parameters\s+([\d,]+)", page.locator("#summary").inner_text())[1].replace(",", "")
    )  # type: ignore[index]
    page.locator("#save_plan").click()
    assert "--overwrite_output_dir" in waited(page, "saved", "already holds")
    page.locator("#replace_plan input").check()
    waited(page, "budget_command", "--overwrite_output_dir")
    page.locator("#save_plan").click()
    waited(page, "saved", ": done")
    plan = yaml.safe_load((studio.runs / "first" / "plan" / "plan.yaml").read_text(encoding="utf-8"))
    assert plan["predicted"]["trainable_parameters"] == trained
    assert plan["budget"]["asked"] == budget and excluded not in plan["modules"]


def test_a_job_runs_to_its_end_and_outlives_the_studio(page: Any, browser: Any, studio: Studio) -> None:
    tab(page, "New run")
    pick(page, "data_file", "broken.jsonl")
    assert "line 2" in waited(page, "preview", "broken.jsonl")
    pick(page, "model", str(studio.runs / "bert"))
    pick(page, "data_file", "reviews.csv")
    shown = waited(page, "preview", "as the model sees it")
    assert EVIL in shown and "sequence_classification" in shown and "[CLS]" in shown
    page.locator("#run_name input, #run_name textarea").fill("third")
    page.locator("#epochs input").fill("1")
    page.locator("#cpu input").check()
    pick(page, "new_granularity", "bias")
    assert "--granularity=bias" in waited(page, "new_command", "--use_cpu=True")
    page.locator("#predict_cost").click()
    assert "lora" in waited(page, "predicted", "Largest batch")
    page.locator("#start").click()
    job = re.search(r"Started: (\S+)", waited(page, "predicted", "Started"))[1]  # type: ignore[index]
    tab(page, "Jobs")
    page.wait_for_function(
        "job => [...document.querySelectorAll('#jobs tr')].some(e => e.innerText.includes(job) && e.innerText.includes('done'))",
        arg=job,
    )
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
    pick(page, "data_file", "reviews.csv")
    page.locator("#run_name input, #run_name textarea").fill("long")
    page.locator("#epochs input").fill("100000")
    page.locator("#cpu input").check()
    waited(page, "new_command", "--num_train_epochs=100000")
    page.locator("#start").click()
    job = re.search(r"Started: (\S+)", waited(page, "predicted", "Started"))[1]  # type: ignore[index]
    tab(page, "Jobs")
    waited(page, "output", "train")
    page.locator("#stop").click()
    page.wait_for_function(
        "job => [...document.querySelectorAll('#jobs tr')].some(e => e.innerText.includes(job) && e.innerText.includes('stopped'))",
        arg=job,
    )


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


@pytest.mark.parametrize("width", [390, 1440])
def test_no_page_is_wider_than_the_window(browser: Any, studio: Studio, width: int) -> None:
    for language, names in (("en", ("Runs", "Budget")), ("zh", ("运行", "预算"))):
        with opened(browser, studio.url, width) as page:
            page.goto(f"{studio.url}{language}/")
            waited(page, "runs", "second")
            pick(page, "chosen", "second")
            page.wait_for_selector("#heat .heatmaplayer")
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            tab(page, names[1])
            pick(page, "budget_run", "second")
            page.wait_for_selector("#summary .fact")
            assert page.evaluate("document.documentElement.scrollWidth") <= width


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
