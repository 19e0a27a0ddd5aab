"""Training fields that are read a second time, as a run's config.yaml holds them."""

from pathlib import Path

import pytest

from reltune.config.run_config import RunConfig
from reltune.config.training_fields import checked_training_fields, named_training_fields, parse_training_fields


def test_a_flag_without_a_value_is_read_again_as_it_was() -> None:
    given = parse_training_fields(["--fsdp"])
    assert given == {"fsdp": True} and checked_training_fields(given) == given


def test_a_flag_without_a_value_is_told_from_an_empty_one() -> None:
    words = ["--fsdp", "--bf16", "", "--no_fp16", "--optim=sgd", "--max_steps", "3", "--run_name="]
    wanted = {"fsdp": True, "bf16": "", "fp16": False, "optim": "sgd", "max_steps": "3", "run_name": ""}
    assert named_training_fields(words) == wanted


@pytest.mark.parametrize("written", [None, False, "", True, "full_shard"])
def test_fsdp_is_asked_for_where_transformers_takes_it_so(written: str | bool | None, tmp_path: Path) -> None:
    from transformers import TrainingArguments

    fields = checked_training_fields({"fsdp": written})
    asked = TrainingArguments(str(tmp_path), use_cpu=True, fsdp=written).fsdp
    assert bool(TrainingArguments(str(tmp_path), use_cpu=True, **fields).fsdp) is bool(asked)
    for training in ({"fsdp": written}, fields):
        assert RunConfig("model", "run", training=training).is_spread is bool(asked)
