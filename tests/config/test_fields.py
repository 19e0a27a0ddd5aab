"""One check for every value, whichever way it comes in: from Python, a YAML file, a run's config.yaml or a flag."""

from __future__ import annotations

import dataclasses
import enum
import inspect
import math
import typing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from transformers import TrainingArguments

from command_line import assert_refused, reltune
from reltune.config.analysis import AnalysisConfig
from reltune.config.data import DataConfig
from reltune.config.evaluation import EvaluationConfig
from reltune.config.export import ExportConfig
from reltune.config.file import read_config
from reltune.config.method import MethodConfig
from reltune.config.model import ModelConfig
from reltune.config.run_config import FIELDS, ORDER, RunConfig
from reltune.config.selection import SelectionConfig
from reltune.config.training import TrainingConfig
from reltune.config.training_fields import named_training_fields, training_declarations, training_field_names
from reltune.errors import InputError

SUBJECTS = (
    ModelConfig,
    DataConfig,
    MethodConfig,
    AnalysisConfig,
    SelectionConfig,
    TrainingConfig,
    EvaluationConfig,
    ExportConfig,
)
NEEDED = {"model_name_or_path": "model", "output_dir": "run", "train_file": "train.csv"}
NUMBERS = [
    ("seed", -1, "seed is -1; it must be at least 0"),
    ("seed", 2**32, "seed is 4294967296; it must be at most 4294967295"),
    ("seed", 1.5, "it must be a whole number"),
    ("max_length", 0, "max_length is 0; it must be at least 1"),
    ("max_trials", 3, "max_trials is 3; it must be at least 4"),
    ("analysis_batch_size", 2**31, "it must be at most 2147483647"),
    ("probe_steps", 10**400, "it must be at most 32767"),
    ("head_epochs", -0.25, "head_epochs is -0.25; it must be at least 0"),
    ("head_epochs", math.nan, "it must be a finite number"),
    ("head_epochs", math.inf, "it must be a finite number"),
    ("head_epochs", 10**400, "it must be a finite number"),
    ("beta", 0, "beta is 0.0; it must be above 0"),
    ("beta", -0.0, "beta is 0.0; it must be above 0"),
    ("beta", math.nan, "it must be a finite number"),
]
WORDS = [
    ("text_column", "", "text_column is empty"),
    ("train_file", " ", "train_file is empty"),
    ("model_name_or_path", "", "model_name_or_path is empty"),
    ("task", "regresion", "task 'regresion' is unknown; did you mean 'regression'"),
    ("granularity", ["column", "rows"], "granularity 'rows' is unknown; did you mean 'row'"),
    ("target_modules", ["query", ""], "target_modules"),
    ("lm_eval_tasks", ["", ""], "lm_eval_tasks"),
]
KINDS = [  # that no flag can have
    ("seed", True, "seed is True; it must be a whole number"),
    ("head_epochs", False, "head_epochs is False; it must be a finite number"),
    ("elements", 1, "elements is 1; it must be true or false"),
    ("text_column", True, "text_column is True; it must be text"),
    ("criteria", [], "criteria is empty"),
    ("criteria", [["fisher"]], "it must be a list of words"),
    ("target_modules", [None], "it must be a list of words"),
    ("target_modules", [True], "it must be a list of words"),
    ("training", [1], "training is [1]; it must be a mapping"),
    ("sweep", {"learning_rate": []}, "it must be a mapping of fields to lists of values"),
    ("sweep", {"learning_rate": ["1e-3", ""]}, "sweep is empty"),
]


def shown(value: Any) -> str:
    return str(value)[:20]


@pytest.mark.parametrize(("name", "value", "words"), NUMBERS + WORDS + KINDS, ids=shown)
def test_wrong_values_from_python_and_files(tmp_path: Path, name: str, value: Any, words: str) -> None:
    with pytest.raises(InputError) as caught:
        RunConfig(**{**NEEDED, name: value})
    assert words in str(caught.value)
    config = RunConfig(**NEEDED)
    setattr(config, name, value)
    with pytest.raises(InputError) as caught:
        config.check()
    assert words in str(caught.value)
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({**NEEDED, name: value}))
    for read in (read_config, RunConfig.load):
        with pytest.raises(InputError) as caught:
            read(path)
        assert words in str(caught.value) and str(path) in str(caught.value)


@pytest.mark.parametrize(("name", "value", "words"), NUMBERS + WORDS, ids=shown)
def test_wrong_values_of_flags(tmp_path: Path, name: str, value: Any, words: str) -> None:
    given = {**NEEDED, "output_dir": str(tmp_path / "run"), name: ",".join(value) if isinstance(value, list) else value}
    flags = [word for field, of in given.items() for word in (f"--{field}", of)]
    assert_refused(reltune("run", *flags), words.removesuffix("; it must be a whole number"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_of_training_are_finite(value: float) -> None:
    with pytest.raises(InputError, match=r"learning_rate is .*; it must be a finite number"):
        RunConfig(**NEEDED, training={"learning_rate": value}).check()


def test_gradients_may_be_left_as_long_as_they_are() -> None:
    RunConfig(**NEEDED, training={"max_grad_norm": math.inf}).check()


def test_values_are_read_as_what_their_fields_hold() -> None:
    config = RunConfig(
        **NEEDED,
        seed=np.int64(7),
        head_epochs="1e-1",
        budget=100_000,
        criteria="fisher, gradient",
        target_modules=[r"layer\.(1,2)", 3],
        sweep={"tf32": [True, False], "learning_rate": 1e-3},
    )
    assert (config.seed, config.head_epochs, config.budget) == (7, 0.1, "100000")
    assert type(config.seed) is int and type(config.head_epochs) is float
    assert config.criteria == ["fisher", "gradient"] and config.target_modules == [r"layer\.(1,2)", "3"]
    assert config.sweep == {"tf32": ["True", "False"], "learning_rate": ["0.001"]}
    assert RunConfig(**{**NEEDED, "train_file": Path("a") / "b.csv"}).train_file == "a/b.csv"
    assert math.copysign(1, RunConfig(**NEEDED, head_epochs=-0.0).head_epochs) == 1


# -- subjects -------------------------------------------------------------------------------------------------------


def test_every_field_belongs_to_one_subject_and_has_its_place() -> None:
    held = [field.name for subject in SUBJECTS for field in dataclasses.fields(subject)]
    assert sorted([*held, "output_dir", "seed"]) == sorted(ORDER) and len(set(ORDER)) == len(ORDER)
    assert [field.name for field in FIELDS] == ORDER == list(RunConfig(**NEEDED).values())
    assert list(inspect.signature(RunConfig).parameters)[:2] == ["model_name_or_path", "output_dir"]


def test_a_subject_stands_alone_and_checks_its_own_rules() -> None:
    with pytest.raises(InputError, match="choose one"):
        ModelConfig("model", load_in_4bit=True, load_in_8bit=True).check()
    with pytest.raises(InputError, match="both 'text'"):
        DataConfig(train_file="a.csv", label_column="text").check()
    with pytest.raises(InputError, match="packing needs all examples"):
        DataConfig(train_file="a.csv", packing=True, streaming=True).check()
    with pytest.raises(InputError, match="give one of them"):
        DataConfig(train_file="a.csv", dataset_name="digits").check()
    with pytest.raises(InputError, match="nothing is swept"):
        TrainingConfig(sweep_trials=3).check()
    with pytest.raises(InputError, match="learning_rate has a value and is swept too"):
        TrainingConfig(sweep={"learning_rate": ["1", "2"]}, training={"learning_rate": 1}).check()
    for subject in (DataConfig(), AnalysisConfig(), SelectionConfig(), TrainingConfig(), EvaluationConfig()):
        subject.check()


def test_rules_between_subjects() -> None:
    RunConfig("model", "run", criteria=["magnitude", "depth"]).check()
    with pytest.raises(InputError, match="exactly one of train_file and dataset_name"):
        RunConfig("model", "run", criteria=["magnitude", "fisher"]).check()
    with pytest.raises(InputError, match="'fishr' is unknown; did you mean 'fisher'"):
        RunConfig(**NEEDED, criteria=["fishr"]).check()
    for training in ({}, {"max_steps": -1}, {"max_steps": "many"}):
        with pytest.raises(InputError, match="give --max_steps"):
            RunConfig(**NEEDED, streaming=True, training=training).check()
    with pytest.raises(InputError, match="max_steps is 0, so that nothing would be trained"):
        RunConfig(**NEEDED, streaming=True, training={"max_steps": 0}).check()
    for spread in (True, "full_shard"):
        with pytest.raises(InputError, match="write load_in_4bit, or leave fsdp out"):
            RunConfig(**NEEDED, load_in_8bit=True, training={"fsdp": spread}).check()
    for spread in (False, "", None):
        RunConfig(**NEEDED, load_in_8bit=True, training={"fsdp": spread}).check()
    RunConfig(**NEEDED, load_in_4bit=True, training={"fsdp": True}).check()
    RunConfig(**NEEDED, streaming=True, training={"max_steps": 1}).check()
    RunConfig(**NEEDED, streaming=True, sweep={"max_steps": ["1", "2"]}).check()


def test_every_subject_is_checked_in_a_run() -> None:
    for wrong, words in (
        ({"load_in_4bit": True, "load_in_8bit": True}, "choose one"),
        ({"label_column": "text"}, "name two columns"),
        ({"sweep_trials": 3}, "nothing is swept"),
    ):
        with pytest.raises(InputError, match=words):
            RunConfig(**NEEDED, **wrong).check()


def test_training_fields_are_read_right_from_the_source_of_transformers() -> None:
    read = {field.name: field for field in dataclasses.fields(training_declarations())}
    real = dataclasses.fields(TrainingArguments)
    hints = typing.get_type_hints(TrainingArguments)
    assert training_field_names() == tuple(read) == tuple(field.name for field in real)
    for field in real:
        own = read[field.name]
        assert (own.default, own.default_factory) == (field.default, field.default_factory), field.name
        assert own.metadata["help"] == field.metadata["help"], field.name
        assert _words(own.type) == _words(hints[field.name]), field.name


def _words(annotation: Any) -> set[Any]:
    """The types of a union by name, and the members of enums in place of them; what has no name of a word or number is left out."""
    found: set[Any] = set()
    for kind in typing.get_args(annotation) or (annotation,):
        name = getattr(kind, "__name__", str(kind))
        found |= {one.value for one in kind} if isinstance(kind, enum.EnumType) else {name}
    return found - {"ParallelismConfig", "Any"}


def test_a_release_of_transformers_with_names_that_are_not_known_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    read = Path.read_text

    def changed(path: Path, *args: Any, **options: Any) -> str:
        return read(path, *args, **options).replace("trainer_log_levels.keys()", "levels_of_a_later_release()")

    monkeypatch.setattr(Path, "read_text", changed)
    training_declarations.cache_clear()
    try:
        assert training_declarations() is TrainingArguments
    finally:
        training_declarations.cache_clear()


@pytest.mark.parametrize(
    "words", [("4", "--max_steps"), ("--max_steps", "4", "true"), ("--bf16", "true", "x", "--optim", "sgd")]
)
def test_a_word_that_belongs_to_no_flag(words: tuple[str, ...]) -> None:
    with pytest.raises(InputError, match=r"unexpected argument '(4|true|x)'"):
        named_training_fields(words)
    with pytest.raises(
        InputError, match="use_cpu is 'full'; it must be true or false"
    ):  # of --methods lora --use_cpu full
        named_training_fields(("--use_cpu", "full"))
    assert named_training_fields(("--report_to", "tensorboard", "wandb"))
    assert named_training_fields(("--use_cpu", "No", "--bf16", "1")) == {"use_cpu": "No", "bf16": "1"}
