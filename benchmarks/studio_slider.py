"""How soon the studio's page answers at the shapes of an 8B model: from a key on the slider, or a click on a module, to the new figures.

On a CPU, in Chromium, from the repository's root and without a network:

    make chromium .venv-browser/.installed
    .venv-browser/bin/python benchmarks/studio_slider.py

and in seconds: .venv-browser/bin/python benchmarks/studio_slider.py --tiny --output_dir /tmp

The run has Llama-3.1-8B's shapes (224 linear maps, 1,245,184 columns) and random relevance. Its single weights are as many as the
model has; within a map all rows have the same random relevance, which takes no memory and as long. The server runs in this process, so that
it has them without a file. What is timed is what a person waits for: the page's own clock, from the key to the first other figures
or command. ``opened`` is the time until a run's first figures are there, once: it reads the scores, puts them in order and counts the model.
"""

from __future__ import annotations

import argparse
import functools
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from harness import Benchmark, Method, Timed, arguments, benchmark
from llama import TINY, Shape, configuration
from reltune.config.run_config import RunConfig
from reltune.layers.inventory import Inventory, take_inventory
from reltune.relevance.scores import RelevanceScores
from reltune.studio.places import Place
from reltune.studio.server import bound, make_app

LIMIT = 0.2  # seconds
RUNS = {
    "columns": (["column"], "global"),
    "single weights, spread evenly": (["element"], "even"),
    "single weights of the whole model": (["element"], "global"),
}
# What the page does when it is touched: the key or the click starts the clock, the first other figures or command stop it.
WATCH = """() => {
    const facts = () => [...document.querySelectorAll('#summary .fact, #budget_command pre')].map(e => e.textContent).join('|');
    const before = facts();
    let began = 0;
    const start = () => { began = began || performance.now(); };
    for (const event of ['keydown', 'pointerdown']) document.addEventListener(event, start, {capture: true, once: true});
    window.answered = new Promise(done => {
        const watcher = new MutationObserver(() => {
            if (began && facts() && facts() != before) { watcher.disconnect(); done(performance.now() - began); }
        });
        watcher.observe(document.body, {subtree: true, childList: true, characterData: true});
    });
}"""


def relevance_of(shape: Shape) -> RelevanceScores:
    """Random relevance of every column and every single weight of the model's linear maps."""
    from transformers import LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(configuration(shape))
    everything = take_inventory(model, [])
    inventory: Inventory = everything.only(
        {info.name for info in everything.modules if info.in_block and not info.is_vector}
    )
    draw = torch.Generator().manual_seed(0)
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for info in inventory.modules:
        columns = torch.rand(info.columns, generator=draw) ** 8
        parts[info.name] = {"column": columns, "weight": columns.sum(), "element": columns.expand(info.shape)}
    return RelevanceScores({"fisher": parts}, inventory, [], "0" * 16, {"model": "model", "examples": 1})


def save_runs(place: Path, relevance: RelevanceScores, shape: Shape) -> None:
    """The model's config, and a run for each case."""
    configuration(shape).save_pretrained(place / "model")
    kept = RelevanceScores(
        {
            "fisher": {
                name: {"column": of["column"], "weight": of["weight"]} for name, of in relevance.parts["fisher"].items()
            }
        },
        relevance.inventory,
        [],
        relevance.fingerprint,
        relevance.provenance,
    )
    for name, (granularity, spread) in RUNS.items():
        run = place / name
        config = RunConfig(
            str(place / "model"),
            str(run),
            train_file="chats.jsonl",  # which is not read
            task="causal_lm",
            criteria=["fisher"],
            granularity=granularity,
            spread=spread,
            budget="0.5%",
            max_length=512,
        )
        run.mkdir()
        config.save(run / "config.yaml")
        kept.save(run / "relevance")


@contextmanager
def served(place: Path) -> Iterator[str]:
    """The address of a studio in a thread of this process."""
    import uvicorn

    held = bound("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(make_app(Place(place), "en"), log_level="warning"))
    thread = threading.Thread(target=functools.partial(server.run, sockets=[held]), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{held.getsockname()[1]}/en/"
    finally:
        server.should_exit = True
        thread.join()


def open_run(page: Any, name: str) -> float:
    """Choose a run under Budget; the seconds until its figures are there."""
    field = page.locator("#budget_run input").first
    field.click()
    field.fill(name)
    option = page.get_by_role("option", name=name, exact=True)
    option.wait_for()
    began = time.perf_counter()
    option.click()
    page.locator("#budget_command").filter(has_text=name).wait_for()
    page.locator("#summary .fact").first.wait_for()
    return time.perf_counter() - began


def slid(page: Any, keys: Iterator[str]) -> Timed:
    slider = page.locator("#slider input[type=range]")
    slider.focus()
    page.evaluate(WATCH)
    slider.press(next(keys))
    return answered(page)


def clicked(page: Any, modules: Iterator[int]) -> Timed:
    box = page.locator("#modules input[type=checkbox]").nth(next(modules))
    box.scroll_into_view_if_needed()
    page.evaluate(WATCH)
    box.click()
    return answered(page)


def answered(page: Any) -> Timed:
    seconds = Timed(page.evaluate("window.answered") / 1000)
    page.wait_for_timeout(500)  # what else came with the answer is drawn; the page never stops listening to the server
    return seconds


def back_and_forth(first: Any, second: Any) -> Iterator[Any]:
    while True:
        yield first
        yield second


def measure(bench: Benchmark, page: Any, repeats: int) -> None:
    for name in RUNS:
        print(name, file=sys.stderr)
        bench.value(f"{name}: opened, s", open_run(page, name))
        methods = [
            Method("a step of the slider", functools.partial(slid, page, back_and_forth("ArrowRight", "ArrowLeft"))),
            Method("a click on a module", functools.partial(clicked, page, back_and_forth(1, 1))),
        ]
        bench.measure(name, {}, methods, repeats, warmups=2)
        for method in methods:
            bench.check(f"{name}: {method.name}, s", bench.median(name, method.name), LIMIT)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--tiny", action="store_true", help="a model of two small layers, to try the script")
    options = arguments(parser, "studio_slider")
    from playwright.sync_api import sync_playwright

    bench = benchmark(options, ["gradio", "playwright"])
    shape = TINY if options.tiny else Shape()
    relevance = relevance_of(shape)
    path = os.environ.get("CHROMIUM") or shutil.which("chromium")
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(RelevanceScores, "load", lambda _: relevance):
        save_runs(Path(folder), relevance, shape)
        bench.value("modules", len(relevance.inventory.modules))
        bench.value("columns", sum(info.columns for info in relevance.inventory.modules))
        bench.value("single weights", sum(info.weight_parameters for info in relevance.inventory.modules))
        with served(Path(folder)) as address, sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
            bench.value("browser", f"Chromium {browser.version}")
            page = browser.new_page(viewport={"width": 1440, "height": 900})
            page.set_default_timeout(600_000)
            page.goto(address)
            page.get_by_role("tab", name="Budget", exact=True).click()
            measure(bench, page, options.repeats)
            browser.close()
    return bench.finish(options.output_dir, options.name)


if __name__ == "__main__":
    raise SystemExit(main())
