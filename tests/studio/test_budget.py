"""What the slider tells, against the plans that ``reltune select`` makes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from command_line import reltune, review_rows, write_csv
from reltune.cost.profile import Chosen
from reltune.errors import InputError
from reltune.plan.plan import Plan
from reltune.runs.prediction import SideBySide
from reltune.runs.tuned import Tuned
from reltune.studio import command_lines, views
from reltune.studio.budget import BUDGETS, BudgetView, Rule, select_fields
from reltune.studio.data import look_at
from reltune.studio.words import Words
from tiny_models import save_tiny_bert, save_tiny_llama

EVIL = "<script>alert(1)</script>"
QUERY = "bert.encoder.layer.0.attention.self.query"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("place")
    save_tiny_bert(place / "bert")
    write_csv(place / "reviews.csv", review_rows(40, labels=(EVIL, "pos")))
    words = [
        "--model_name_or_path",
        place / "bert",
        "--train_file",
        place / "reviews.csv",
        "--output_dir",
        place / "run",
    ]
    words += [
        "--granularity",
        "column",
        "--criteria",
        "fisher,magnitude",
        "--budget",
        "3%",
        "--max_steps",
        2,
        "--use_cpu",
    ]
    assert reltune("run", *words).code == 0
    return place / "run"


def costs(config: Any) -> Any:
    """Costs that can be told from the plan."""

    def of(plan: Mapping[str, Chosen]) -> tuple[int, float, int]:
        return sum(chosen.columns for chosen in plan.values()), 2.0, 0

    return SimpleNamespace(of=of, device="a card", device_memory=10**9, padded=None)


def planned(run: Path, view: BudgetView, budget: str, rule: Rule, without: Sequence[str] = ()) -> Plan:
    words = command_lines.further("select", run, select_fields(view, budget, rule, without), overwrite=True)
    answer = reltune(*words, *([] if without else ["--every_module"]))
    assert answer.code == 0, answer.err
    return Plan.load(run / "plan")


def test_what_is_told_is_what_is_saved(run: Path, tmp_path: Path) -> None:
    run = shutil.copytree(run, tmp_path / "run")
    view = BudgetView(run, costs)
    rule = view.rule
    assert rule == Rule("fisher", ("column",), "global") and view.excluded == []
    for budget, other, without in (
        ("2%", rule, []),
        ("1500", Rule("magnitude", ("row",), "even"), []),
        ("4%", Rule("fisher", ("column", "norm"), "global"), []),
        ("60%", Rule("fisher", ("layer",), "global"), []),
        ("2%", rule, [QUERY, "bert.encoder.layer.1.output.dense"]),
    ):
        found = view.choice(budget, other, without)
        plan = planned(run, view, budget, other, without)
        assert {row.name: row.parameters for row in found.rows if row.parameters} == {
            name: module.parameters for name, module in plan.modules.items()
        }
        assert (found.limit, found.parameters) == (plan.budget_parameters, plan.parameters)
        assert found.ends_at == next(iter(plan.modules)) and sum(found.by_layer.values()) == plan.parameters
        assert found.memory == sum(len(module.columns) for module in plan.modules.values()) and found.seconds == 2.0
        assert all(row.used == (row.name not in without) for row in found.rows)
    assert BudgetView(run).excluded == [QUERY, "bert.encoder.layer.1.output.dense"]  # as the last selection left it
    assert QUERY in planned(run, view, "60%", Rule("fisher", ("column",), "global")).modules
    assert BudgetView(run).excluded == []


def test_a_budget_of_memory_is_what_select_makes_of_it(run: Path, tmp_path: Path) -> None:
    run = shutil.copytree(run, tmp_path / "run")
    view = BudgetView(run)
    little, much = (view.choice(budget, view.rule).memory or 0 for budget in ("1%", "60%"))
    assert little < much
    budget = f"60% memory={(little + much) // 2048}KiB"
    for without in ([], [QUERY]):
        found = view.choice(budget, view.rule, without)
        plan = planned(run, view, budget, view.rule, without)
        assert {row.name: row.parameters for row in found.rows if row.parameters} == {
            name: module.parameters for name, module in plan.modules.items()
        }
        predicted = json.loads((run / "prediction.json").read_text(encoding="utf-8"))
        assert (found.memory, found.limit) == (predicted["memory_bytes"], plan.parameters)
        assert found.memory is not None and found.memory <= (little + much) / 2
        assert all(line in views.choice(found, Words("en")) for line in found.settings)
    assert "needs memory=" in view.choice("memory=1KiB", view.rule).problem


def test_what_no_budget_allows_is_said(run: Path) -> None:
    view = BudgetView(run, costs)
    assert "not one column" in view.choice("2", view.rule).problem
    assert view.choice("3%", view.rule, [row.name for row in view.choice("3%", view.rule).rows]).problem
    for budget in ("much", "0%", "101%"):
        with pytest.raises(InputError):
            view.choice(budget, view.rule)
    assert BUDGETS[0] == "0.0001%" and BUDGETS[-1] == "100%" and "0.5%" in BUDGETS and len(set(BUDGETS)) == 61


def test_granularities_and_spreads_are_those_that_can_be_chosen(run: Path) -> None:
    view = BudgetView(run, costs)
    assert {"column", "row", "norm", "layer"} <= set(view.granularities("fisher"))
    assert "element" not in view.granularities("fisher") and "direction" not in view.granularities("fisher")
    assert view.spreads(["element"]) == ["global", "even", "columns"] and view.spreads(["norm"]) == ["global"]


def test_a_model_that_cannot_be_counted_is_chosen_from_all_the_same(run: Path) -> None:
    def refuse(config: Any) -> Any:
        raise InputError("no config")

    def fail(config: Any) -> Any:
        raise RuntimeError

    for make, said in ((refuse, "no config"), (fail, "cannot be predicted")):
        found = BudgetView(run, make).choice("3%", Rule("fisher", ("column",), "global"))
        assert found.parameters and found.memory is None and said in found.unknown
    real = BudgetView(run).choice("3%", Rule("fisher", ("column",), "global"))
    assert real.memory and real.seconds and not real.unknown


def test_names_appear_as_text(run: Path) -> None:
    words = Words("en")
    seen = look_at(run.parent / "reviews.csv", str(run.parent / "bert"), None, 64)
    answers = SideBySide(Tuned.open(run)).answers({"text": "good film"})
    for html in (
        views.data(seen, words),
        views.answer(answers["tuned"]),
        views.table([EVIL], [[EVIL]], EVIL),
        views.problem(EVIL),
    ):
        assert "<script" not in html and "&lt;script&gt;" in html
    assert seen.preview is not None and set(seen.preview["classes"]) == {EVIL, "pos"}
    assert answers["base"].keys() == answers["tuned"].keys() == {"prediction", "score", "scores"}
    assert answers["base"]["score"] != answers["tuned"]["score"]


def test_chats_need_a_template_and_take_the_one_that_is_chosen(tmp_path: Path) -> None:
    save_tiny_llama(tmp_path / "llama")
    with (tmp_path / "chats.jsonl").open("w") as file:
        for text, label in review_rows(20):
            chat = [{"role": "user", "content": text}, {"role": "assistant", "content": label}]
            file.write(json.dumps({"messages": chat}) + "\n")
    seen = look_at(tmp_path / "chats.jsonl", str(tmp_path / "llama"), None, 64)
    assert "no chat template" in seen.problem and "chatml" in seen.problem and seen.preview is not None
    seen = look_at(tmp_path / "chats.jsonl", str(tmp_path / "llama"), None, 64, chat_template="zephyr")
    assert not seen.problem and seen.preview is not None and seen.preview["example"]


def test_a_file_that_cannot_be_read_is_shown_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "torn.jsonl").write_text('{"text": "a", "label": "x"}\n{"text": \n')
    seen = look_at(tmp_path / "torn.jsonl", None, None, 64)
    assert seen.preview is None and "line 2" in seen.problem
    write_csv(tmp_path / "odd.csv", [("a", "b")], header=("one", "two"))
    seen = look_at(tmp_path / "odd.csv", None, None, 64)
    assert seen.preview is None and seen.problem and seen.first == [(2, ["a", "b"])]
    assert "one" in views.data(seen, Words("zh"))
