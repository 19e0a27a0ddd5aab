"""The config file: read with the flags' checks, printed with its defaults, described by a schema that agrees with both."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jsonschema
import pytest
import yaml
from transformers import IntervalStrategy

from command_line import reltune
from reltune.config.file import defaults_yaml, json_schema, read_config
from reltune.config.run_config import FIELDS, RunConfig
from reltune.config.training_fields import DEFAULTS, checked_training_fields, training_field_kinds
from reltune.errors import InputError

FULL = """
# 中文注释
model_name_or_path: model
output_dir: run
train_file: data/训练.csv
validation_file:
task: regression
text_column: 评论
encoding: gbk
on_bad_rows: skip
streaming: false
max_length: 64
budget: 100000
criteria: fisher, gradient
granularity: [column, bias]
target_modules: ['layer\\.(1|2)', query]
head_epochs: 1e-1
seed: 7
sweep: {adam_beta1: [0, 1e-2, 0.1], optim: "sgd, adamw_torch", warmup_steps: 1..9, tf32: [true, false]}
sweep_trials: 5
learning_rate: 1e-3
max_steps: 5
training:
  num_train_epochs: 2
  bf16: false
  save_strategy: no
  report_to: [tensorboard, wandb]
  lr_scheduler_type: cosine
  lr_scheduler_kwargs: {num_cycles: 0.5}
  weight_decay: 0.1
"""


def read(tmp_path: Path, text: str) -> dict:
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return read_config(path)


def test_every_kind_of_field(tmp_path: Path) -> None:
    fields = read(tmp_path, FULL)
    assert fields.pop("training") == {
        "num_train_epochs": 2.0,
        "bf16": False,
        "save_strategy": "no",
        "report_to": ["tensorboard", "wandb"],
        "lr_scheduler_type": "cosine",
        "lr_scheduler_kwargs": {"num_cycles": 0.5},
        "weight_decay": 0.1,
        "learning_rate": 1e-3,
        "max_steps": 5,
    }
    assert fields == {
        "model_name_or_path": "model",
        "output_dir": "run",
        "train_file": "data/训练.csv",
        "task": "regression",
        "text_column": "评论",
        "encoding": "gbk",
        "on_bad_rows": "skip",
        "streaming": False,
        "max_length": 64,
        "budget": "100000",
        "criteria": ["fisher", "gradient"],
        "granularity": ["column", "bias"],
        "target_modules": ["layer\\.(1|2)", "query"],
        "head_epochs": 0.1,
        "seed": 7,
        "sweep": {
            "adam_beta1": ["0", "1e-2", "0.1"],
            "optim": ["sgd", "adamw_torch"],
            "warmup_steps": ["1..9"],
            "tf32": ["True", "False"],
        },
        "sweep_trials": 5,
    }
    jsonschema.validate(
        yaml.safe_load(FULL.replace("save_strategy: no", "save_strategy: 'no'")), json.loads(json_schema())
    )


WRONG = [
    ("max_lenght: 5", "'max_lenght' is no field; did you mean 'max_length'"),
    ("learnig_rate: 1e-3", "'learnig_rate' is no field; did you mean 'learning_rate'"),
    (
        "training: {learnig_rate: 1e-3}",
        "'learnig_rate' is no field of transformers.TrainingArguments; did you mean 'lear",
    ),
    ("max_length: long", "max_length is 'long'; it must be a whole number"),
    ("max_length: 1.5", "max_length is 1.5; it must be a whole number"),
    ("max_length: true", "max_length is True; it must be a whole number"),
    ("head_epochs: few", "head_epochs is 'few'; it must be a finite number"),
    ("head_epochs: -1", "head_epochs is -1.0; it must be at least 0"),
    ("max_length: 0", "max_length is 0; it must be at least 1"),
    ("seed: -1", "seed is -1; it must be at least 0"),
    ("seed: 4294967301", "seed is 4294967301; it must be at most 4294967295"),
    ("probe_steps: 32768", "probe_steps is 32768; it must be at most 32767"),
    ("probe_steps: often", "probe_steps is 'often'; it must be a whole number or auto"),
    ("task: regresion", "task 'regresion' is unknown; did you mean 'regression'"),
    ("granularity: [columns]", "granularity 'columns' is unknown; did you mean 'column'"),
    ("criteria: []", "criteria is empty"),
    ("criteria: [fisher, '']", "criteria is empty"),
    ("target_modules: [query, true]", "target_modules is ['query', True]; it must be a list of words"),
    ("text_column: ' '", "text_column is empty"),
    ("label_column: yes", "label_column is True; it must be text (put it in quotes)"),
    ("elements: 'yes please'", "elements is 'yes please'; it must be true or false"),
    ("train_file: [a.csv]", "train_file is ['a.csv']; it must be text"),
    ("criteria: {fisher: 1}", "criteria is {'fisher': 1}; it must be a list of words"),
    ("sweep: learning_rate=1e-3", "sweep is 'learning_rate=1e-3'; it must be a mapping of fields to lists of values"),
    ("sweep: {learning_rate: [[1e-3]]}", "it must be a mapping of fields to lists of values"),
    ("sweep: {learning_rate: [1e-3, ' ']}", "sweep is empty"),
    ("sweep: {learning_rate: []}", "it must be a mapping of fields to lists of values"),
    ("sweep_trials: some", "sweep_trials is 'some'; it must be a whole number"),
    ("training: fast", "training is 'fast'; it must be a mapping"),
    ("learning_rate: fast", "learning_rate is 'fast'; it must be a number"),
    ("max_steps: 2.5", "max_steps is '2.5'; it must be a whole number"),
    ("lr_scheduler_type: linea", "lr_scheduler_type 'linea' is unknown; did you mean 'linear'"),
    ("bf16: maybe", "bf16 is 'maybe'; it must be true or false"),
    ("learning_rate: [1e-3]", "learning_rate is ['1e-3']; it must be a single value"),
    ("training: {seed: 3}", "seed is a field of the run"),
]
BESIDE_THE_SCHEMA = [
    ("max_steps: 1\ntraining: {max_steps: 2}", "max_steps stands both in training and outside it"),
    ("max_length: 1\nseed: 2\nmax_length: 3", "line 3 gives 'max_length' a second time"),
    ("training:\n  max_steps: 1\n  max_steps: 1", "line 3 gives 'max_steps' a second time"),
    ("head_epochs: .nan", "head_epochs is nan; it must be a finite number"),
    ("beta: .inf", "beta is inf; it must be a finite number"),
    ("criteria: 'fisher,'", "criteria has an empty word"),
    ("- max_length", "must be a mapping"),
    ("max_length: [", "line 1 is not valid YAML"),
    ("", "must be a mapping"),
]


@pytest.mark.parametrize(("text", "words"), WRONG + BESIDE_THE_SCHEMA)
def test_wrong_files(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(InputError) as caught:
        read(tmp_path, text)
    message = str(caught.value)
    assert message.startswith(f"config {tmp_path / 'run.yaml'}") and words in message


@pytest.mark.parametrize("text", [text for text, _ in WRONG])
def test_the_schema_refuses_what_reading_refuses(text: str) -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(yaml.safe_load(text), json.loads(json_schema()))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        read_config(tmp_path / "none.yaml")
    (tmp_path / "gbk.yaml").write_bytes("text_column: 评论".encode("gbk"))
    with pytest.raises(InputError, match="UTF-8"):
        read_config(tmp_path / "gbk.yaml")


def test_defaults_are_what_they_say(tmp_path: Path) -> None:
    text = defaults_yaml()
    schema = json.loads(json_schema())
    jsonschema.Draft202012Validator.check_schema(schema)
    values = yaml.safe_load(text)
    jsonschema.validate({**values, "training": {**values["training"], "save_strategy": "epoch"}}, schema)
    fields = read(tmp_path, text)
    training = fields.pop("training")
    made = RunConfig(model_name_or_path="m", output_dir="o", **fields)
    assert made == RunConfig("m", "o")
    assert list(values) == [field.name for field in FIELDS]
    assert training == DEFAULTS
    for field in dataclasses.fields(RunConfig):
        assert field.metadata["help"], field.name
        if field.name != "training":
            assert schema["properties"][field.name]["description"] == field.metadata["help"]
    # every other field of TrainingArguments stands in a comment, and reads as it stands
    for name in set(training_field_kinds()) - {"output_dir", "seed", "resume_from_checkpoint"}:
        assert f"  {name}:" in text or f"  # {name}:" in text
        assert name in schema["properties"] and name in schema["properties"]["training"]["properties"]
    uncommented = text.replace("\n  # ", "\n  ")
    lines = [line for line in uncommented.partition("training:\n")[2].splitlines() if _names_a_field(line)]
    assert set(read(tmp_path, "training:\n" + "\n".join(lines))["training"]) >= set(DEFAULTS) | {"adam_beta1", "optim"}


def _names_a_field(line: str) -> bool:
    return line.strip().partition(":")[0] in training_field_kinds()


def test_typed_values_of_training_stay_what_they_are() -> None:
    """A run's config.yaml holds typed values, and words where somebody has edited it; Python has members of enums."""
    typed = checked_training_fields(
        yaml.safe_load(FULL.replace("save_strategy: no", "save_strategy: 'no'"))["training"]
    )
    assert checked_training_fields(typed) == typed and list(checked_training_fields(typed)) == list(typed)
    assert checked_training_fields({"learning_rate": "1e-3", "eval_strategy": IntervalStrategy.EPOCH}) == {
        "learning_rate": 1e-3,
        "eval_strategy": "epoch",
    }
    with pytest.raises(InputError, match=r"^warmup_steps is 'many'; it must be a number"):
        checked_training_fields({"warmup_steps": "many"})


def test_no_field_of_a_run_is_one_of_training_too() -> None:
    """Else a top-level key would have two meanings."""
    own = {field.name for field in dataclasses.fields(RunConfig)}
    assert own & set(training_field_kinds()) == {"output_dir", "seed"}


def test_config_command(tmp_path: Path) -> None:
    assert reltune("config", "--defaults").out == defaults_yaml()
    assert reltune("config", "--schema").out == json_schema()
    for words in ((), ("--defaults", "--schema")):
        answer = reltune("config", *words)
        assert answer.code == 2 and "--defaults or --schema" in answer.err
