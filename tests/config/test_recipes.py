"""What a config holds where the user names no criterion, granularity, budget or spread, or only some of them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml

from reltune.config.file import defaults_yaml, json_schema
from reltune.config.recipes import BEST, CHOICE, COLUMNS, chosen_again, larger_budget
from reltune.config.run_config import RunConfig

BEST_FIELDS = (["movement"], ["element"], "0.12%", "even")
DIRECTION_FIELDS = (["movement"], ["direction"], "0.5%", "even")
COLUMN_FIELDS = (["fisher"], ["column"], "0.5%", "global")
CASES: list[tuple[dict[str, Any], tuple[list[str], list[str], str, str]]] = [
    ({}, BEST_FIELDS),
    ({"criteria": "movement"}, BEST_FIELDS),
    ({"budget": "1%"}, (["movement"], ["element"], "1%", "even")),
    ({"spread": "global"}, (["movement"], ["element"], "0.12%", "global")),
    # a granularity
    ({"granularity": "element"}, (["movement"], ["element"], "0.5%", "even")),
    ({"granularity": "element,bias"}, (["movement"], ["element", "bias"], "0.5%", "global")),
    ({"granularity": "bias,element"}, (["movement"], ["bias", "element"], "0.5%", "global")),
    *[
        ({"granularity": name}, (["fisher"], [name], "0.5%", "global"))
        for name in ("column", "row", "head", "module", "layer", "bias", "norm")
    ],
    ({"granularity": "direction"}, DIRECTION_FIELDS),
    ({"granularity": "direction", "load_in_4bit": True}, DIRECTION_FIELDS),
    ({"granularity": "direction", "spread": "global"}, (["movement"], ["direction"], "0.5%", "global")),
    ({"granularity": "element", "spread": "columns"}, (["movement"], ["element"], "0.5%", "columns")),
    ({"granularity": "column", "spread": "even"}, (["fisher"], ["column"], "0.5%", "even")),
    # criteria
    ({"criteria": "gradient"}, (["gradient"], ["column"], "0.5%", "global")),
    ({"criteria": "movement,fisher"}, (["movement", "fisher"], ["column"], "0.5%", "global")),
    ({"criteria": "depth", "budget": "3%"}, (["depth"], ["column"], "3%", "global")),
    # both
    ({"criteria": "fisher", "granularity": "element"}, (["fisher"], ["element"], "0.5%", "global")),
    ({"criteria": "movement", "granularity": "column"}, (["movement"], ["column"], "0.5%", "global")),
    # bases in few bits
    ({"load_in_4bit": True}, BEST_FIELDS),
    ({"load_in_8bit": True}, BEST_FIELDS),
    ({"frozen_dtype": "float8_e4m3fn"}, BEST_FIELDS),
    ({"load_in_4bit": True, "granularity": "column"}, COLUMN_FIELDS),
]


def choice_of(config: RunConfig) -> tuple[Any, ...]:
    return tuple(getattr(config, name) for name in CHOICE)


@pytest.mark.parametrize(("given", "wanted"), CASES, ids=lambda value: str(value)[:40])
def test_what_is_not_named_is_found(given: dict[str, Any], wanted: tuple[Any, ...], tmp_path: Path) -> None:
    config = RunConfig("model", "run", train_file="train.csv", **given)
    assert choice_of(config) == wanted
    config.check()
    config.save(tmp_path / "config.yaml")  # the values themselves, which another version reads as they are
    saved = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert tuple(saved[name] for name in CHOICE) == wanted
    assert RunConfig.load(tmp_path / "config.yaml") == config


def test_a_change_of_one_value_leaves_the_others() -> None:
    config = RunConfig("model", "run", train_file="train.csv")
    assert choice_of(dataclasses.replace(config, budget="5%")) == (["movement"], ["element"], "5%", "even")


def chosen(stored: dict[str, Any], **given: Any) -> tuple[Any, ...]:
    """What `reltune select` makes of a run's config."""
    values = RunConfig("model", "run", train_file="train.csv", **stored).values()
    return choice_of(RunConfig(**{**values, **chosen_again(values, given), **given}))


def test_another_granularity_of_a_run_with_the_best_recipe() -> None:
    """The budget and the spread of single weights go with them; what was measured stays."""
    assert chosen({}, granularity=["column"]) == (["movement"], ["column"], "0.5%", "global")
    assert chosen({}, granularity=["module"], budget="20%") == (["movement"], ["module"], "20%", "global")
    assert chosen({"budget": "0.3%"}, granularity=["column"]) == (["movement"], ["column"], "0.3%", "global")
    assert chosen({}, granularity=["direction"]) == DIRECTION_FIELDS
    assert chosen({}, budget="1%") == (["movement"], ["element"], "1%", "even")
    assert chosen({}, criteria=["movement"]) == BEST_FIELDS


def test_every_other_run_keeps_its_meaning() -> None:
    columns = {"criteria": "fisher", "granularity": "column", "budget": "0.5%", "spread": "global"}
    assert chosen(columns, granularity=["element"]) == (["fisher"], ["element"], "0.5%", "global")
    even = {**columns, "spread": "even", "budget": "0.12%"}
    assert chosen(even, granularity=["row"]) == (["fisher"], ["row"], "0.12%", "even")
    assert chosen({**even, "criteria": "movement"}, granularity=["element"]) == BEST_FIELDS


def test_words_say_what_happens() -> None:
    values = yaml.safe_load(defaults_yaml())
    assert [values[name] for name in CHOICE] == [None] * 4
    for text in (" ".join(defaults_yaml().replace("\n#", " ").split()), json_schema()):
        assert f"If not given: {BEST.criterion} for single weights" in text and COLUMNS.criterion in text
        assert f"If not given: {BEST.budget}, and {COLUMNS.budget} where" in text
        assert f"If not given: {BEST.granularity}, and {COLUMNS.granularity} where" in text
        assert f"If not given: {BEST.spread} for single weights and directions by {BEST.criterion}, else" in text


@pytest.mark.parametrize(
    ("chosen", "examples", "parameters", "more"),
    [
        (27_000, 200, 22_700_000, None),  # enough of them
        (27_000, 2_000, 22_700_000, "0.44%"),
        (113_000, 2_000, 22_700_000, None),
        (113_000, 10_000, 22_700_000, "2%"),
        (400_000, 100_000, 22_700_000, None),  # the most that was ever tried is near
        (9_600_000, 50_000, 8_000_000_000, None),
        (27, 2_000, 22_700, None),  # a toy
    ],
)
def test_more_weights_are_advised_for_many_examples(chosen, examples, parameters, more):
    assert larger_budget(chosen, examples, parameters) == more
