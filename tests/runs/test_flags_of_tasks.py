"""Every flag that is for some tasks alone, with every task: it is used, or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from reltune.config.data import DataConfig
from reltune.config.run_config import RunConfig
from reltune.errors import InputError
from reltune.runs.splits import read_data
from reltune.tasks.registry import TASKS
from task_cases import write_rows

ROWS: dict[str, dict[str, Any]] = {
    "sequence_classification": {"text": "good film {n}", "label": "a{b}"},
    "multilabel_classification": {"text": "good film {n}", "label": ["a{b}", "c"]},
    "regression": {"text": "good film {n}", "label": "{n}.5"},
    "token_classification": {"tokens": ["good", "film", "{n}"], "ner_tags": ["O", "B-X", "O"]},
    "question_answering": {"question": "what {n}", "context": "a good film", "answers": "good"},
    "seq2seq": {"source": "good film {n}", "target": "fine {n}"},
    "causal_lm": {"prompt": "good film {n}", "completion": " fine"},
    "masked_lm": {"text": "good film {n}"},
    "preference": {"prompt": "good film {n}", "chosen": " fine", "rejected": " poor"},
    "image_classification": {"image": "{n}.png", "label": "a{b}"},
}
# flag -> a value that is not its default, and the tasks that use it
FLAGS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "completion_only_loss": (False, ("causal_lm",)),
    "packing": (True, ("causal_lm",)),
    "max_new_tokens": (9, ("causal_lm", "preference", "seq2seq")),
    "sample_prompts": (["good"], ("causal_lm", "preference", "seq2seq")),
    "generation_examples": (3, ("causal_lm",)),
    "chat_template": ("chatml", ("causal_lm", "preference")),
    "beta": (0.5, ("preference",)),
    "loss_type": ("ipo", ("preference",)),
    "max_length": (64, tuple(task for task in TASKS if task != "image_classification")),
    "label_column": (
        "extra",
        ("sequence_classification", "multilabel_classification", "regression", "image_classification"),
    ),
    "text_column": ("also", ("sequence_classification", "multilabel_classification", "regression", "masked_lm")),
    "text_pair_column": ("also", ("sequence_classification", "multilabel_classification", "regression")),
}


def test_the_table_has_every_task_and_flag() -> None:
    assert ROWS.keys() == TASKS.keys()
    assert set(FLAGS) >= {field for task in TASKS.values() for field in task.fields}


def written(value: Any, n: int) -> Any:
    if isinstance(value, list):
        return [written(one, n) for one in value]
    return value.format(n=n, b=n % 2)


@pytest.mark.parametrize("flag", FLAGS)
@pytest.mark.parametrize("task", TASKS)
def test_a_flag_is_used_or_refused(tmp_path: Path, task: str, flag: str, monkeypatch: pytest.MonkeyPatch) -> None:
    value, takers = FLAGS[flag]
    monkeypatch.setattr(TASKS["image_classification"], "problem", lambda *_: None)  # there are no images
    label = ROWS[task].get("label", "x{b}")
    rows = [
        {key: written(one, n) for key, one in {**ROWS[task], "also": "a book {n}", "extra": label}.items()}
        for n in range(40)
    ]
    config = RunConfig(
        "model", "run", train_file=str(write_rows(tmp_path / "rows.jsonl", rows)), task=task, **{flag: value}
    )
    if task in takers:
        found, _ = read_data(config)
        assert found.name == task and (flag not in found.fields or getattr(found, flag) == value)
        assert not flag.endswith("_column") or value in found.columns.values()
        return
    with pytest.raises(InputError) as error:
        read_data(config)
    assert f"--{flag}" in str(error.value), error.value
    assert "leave" in str(error.value)


@pytest.mark.parametrize("flag", ["dataset_config", "dataset_path"])
def test_what_belongs_to_a_data_set_is_refused_beside_a_file(flag: str) -> None:
    with pytest.raises(InputError, match=f"{flag} is given without dataset_name"):
        DataConfig(train_file="rows.csv", **{flag: "x"}).check()
