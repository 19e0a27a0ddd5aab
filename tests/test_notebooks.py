"""What notebooks show: the numbers of the object, every text escaped, small at the size of 8B models."""

from __future__ import annotations

import dataclasses
import math
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset
from transformers import LlamaConfig

import reltune
from reltune.markup import CIVIDIS, shade, table
from reltune.relevance.heatmap import OUTSIDE, Heatmap
from report_cases import EVIL, LLAMA, WAYS, relevance


class Shown(HTMLParser):
    """The rows of all tables, the texts, and the elements."""

    def __init__(self, shown: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.texts: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.feed(shown)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data: str) -> None:
        self.texts.append(data)
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] += data


def shown(value: object) -> Shown:
    found = Shown(value._repr_html_())  # type: ignore[attr-defined]
    assert "script" not in {tag for tag, _ in found.elements}
    return found


def test_a_map_shows_its_shares() -> None:
    h = Heatmap(
        "fisher",
        ["h.0", "h.1", "pooler"],
        ["key", OUTSIDE],
        [[1.0, None], [3.0, None], [None, 12.0]],
        [0.06, 0.19, 0.75],
    )
    found = shown(h)
    assert found.rows == [
        ["", "key", OUTSIDE, "all"],
        ["pooler", "", "75.00", "75.0"],
        ["h.1", "18.75", "", "19.0"],
        ["h.0", "6.25", "", "6.0"],
    ]
    colours = [
        attrs["style"].partition("background:")[2][:7]
        for tag, attrs in found.elements
        if tag == "td" and "background" in (attrs["style"] or "")
    ]
    # the pooler is beyond the scale, which ends at h.1; h.0 is at a third of it
    assert colours == [CIVIDIS[9], CIVIDIS[9], CIVIDIS[3]]


def test_negative_relevance_has_two_colours() -> None:
    found = shown(Heatmap("correlation", ["h.0"], ["a", "b", "c"], [[-1.0, 0.0, 3.0]], [1.0], adds_up=False))
    assert found.rows[1][1:4] == ["-25.00", "0.00", "75.00"] and "absolute" in found.texts[0]
    assert [shade(place, True)[11:18] for place in (-1.0, 0.0, 0.5, 2.0)] == [
        "#0072b2",
        "#f2f2f2",
        "#e4a879",
        "#d55e00",
    ]


def test_texts_of_models_are_escaped() -> None:
    shown(Heatmap(EVIL, [EVIL], [EVIL], [[0.0]], [0.0]))
    ways = dataclasses.replace(WAYS, notes=[EVIL])
    ways.tables[0] = dataclasses.replace(WAYS.tables[0], title=EVIL)
    assert EVIL in "".join(shown(ways).texts)
    assert Shown(table([EVIL], [[EVIL, EVIL]])).rows == [[EVIL], [EVIL, EVIL]]


@pytest.mark.parametrize("layers", [32, 80])
def test_large_maps_stay_small(layers: int) -> None:
    assert len(relevance(layers, LLAMA)._repr_html_()) < 1200 * layers


def test_a_comparison_shows_every_method() -> None:
    found = shown(WAYS)
    names = {row.label for table in WAYS.tables for row in table.rows}
    assert names <= {row[0] for row in found.rows} and WAYS.notes[0] in found.texts
    assert any("failed" in text for text in found.texts)


def test_scores_and_plan_of_a_model() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    loader = DataLoader(TensorDataset(torch.randn(12, 4), torch.randint(3, (12,))), 4)
    scores = reltune.analyze(model, loader, criteria=["fisher", "magnitude"], progress=False)
    found = shown(scores)
    assert "2 modules" in found.texts[0] and [t for t, _ in found.elements].count("details") == 1
    modules = {name: float(value) for name, value in scores.by("module", "fisher").items()}
    share = {name: f"{100 * value / math.fsum(modules.values()):.2f}" for name, value in modules.items()}
    assert {row[0]: next(filter(None, row[1:])) for row in found.rows[1:3]} == share

    plan = reltune.select(scores, budget="30%", granularity="column")
    found = shown(plan)
    assert set(plan.describe()) <= set(found.texts)
    counts = {name: f"{module.parameters:,}" for name, module in plan.modules.items()}
    assert {row[0]: row[1] for row in found.rows[1:]} == counts


def test_a_plan_of_many_modules_names_the_largest() -> None:
    module = reltune.plan.plan.ModulePlan
    modules = {f"h.{i}": module([64, 8], columns=list(range(1 + i % 8))) for i in range(224)}
    plan = reltune.Plan(modules, "1%", 1000, 100_000, "f")
    found = shown(plan)
    assert len(found.rows) == 12 and found.rows[1][1:] == ["512", "100.00%"]
    assert found.rows[-1][:2] == ["214 others", f"{plan.parameters - 10 * 512:,}"]


def test_an_estimate_stands_beside_lora(tmp_path: Path) -> None:
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 64,
    }
    LlamaConfig(**sizes, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)
    estimate = reltune.estimate(str(tmp_path), device="h100-80gb", method="columns", budget="5%", max_length=16)
    found = shown(estimate)
    assert found.rows[0] == ["", "columns", "lora", "full"] and found.rows[4][0] == "fits"
    assert found.rows[1][1:] == [f"{row.trained:,}" for row in estimate.rows]
