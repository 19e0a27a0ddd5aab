"""What counts when a stored config and the command line both say something."""

from __future__ import annotations

import pytest

from reltune.config.precedence import combined
from reltune.errors import InputError

STORED = {
    "seed": 1,
    "budget": "5%",
    "sweep": {"learning_rate": ["1", "2"], "max_steps": ["3", "4"]},
    "sweep_trials": 9,
    "training": {"num_train_epochs": 2.0, "weight_decay": 0.1},
}


def test_the_command_line_wins() -> None:
    found = combined(STORED, {"seed": 2, "criteria": ["depth"]}, {"weight_decay": 0.5, "bf16": True})
    assert found["seed"] == 2 and found["criteria"] == ["depth"] and found["budget"] == "5%"
    assert found["training"] == {"num_train_epochs": 2.0, "weight_decay": 0.5, "bf16": True}
    assert found["sweep"] == STORED["sweep"] and found["sweep_trials"] == 9


def test_nothing_stored_is_changed() -> None:
    before = {name: dict(value) if isinstance(value, dict) else value for name, value in STORED.items()}
    combined(STORED, {"sweep": {"weight_decay": ["0", "1"]}}, {"max_steps": 5})
    assert before == STORED


def test_a_field_with_a_value_is_no_longer_swept() -> None:
    found = combined(STORED, {}, {"learning_rate": 0.5})
    assert found["sweep"] == {"max_steps": ["3", "4"]} and found["training"]["learning_rate"] == 0.5
    assert found["sweep_trials"] == 9
    nothing_left = combined(STORED, {}, {"learning_rate": 0.5, "max_steps": 1})
    assert nothing_left["sweep"] == {} and nothing_left["sweep_trials"] is None
    own = combined({"sweep": {"budget": ["1%", "2%"]}}, {"budget": "3%"}, {})
    assert own["sweep"] == {} and own["budget"] == "3%"


def test_a_new_sweep_takes_the_place_of_the_old_one_and_of_values() -> None:
    found = combined(STORED, {"sweep": {"weight_decay": ["0", "1"]}}, {})
    assert found["sweep"] == {"weight_decay": ["0", "1"]} and found["training"] == {"num_train_epochs": 2.0}
    assert found["sweep_trials"] == 9
    assert combined(STORED, {"sweep_trials": 4}, {})["sweep_trials"] == 4
    assert combined({}, {"sweep_trials": 4}, {})["sweep_trials"] == 4  # for the config's own check to refuse


@pytest.mark.parametrize(("given", "training"), [({"budget": "3%"}, {}), ({}, {"learning_rate": 1})])
def test_a_value_and_a_sweep_at_once(given: dict, training: dict) -> None:
    swept = {"budget": ["1%", "2%"]} if given else {"learning_rate": ["1", "2"]}
    with pytest.raises(InputError, match="has a value and is swept too"):
        combined(STORED, {**given, "sweep": swept}, training)


def test_nothing_stored() -> None:
    assert combined({}, {"seed": 1}, {}) == {"seed": 1, "sweep": {}, "sweep_trials": None, "training": {}}
