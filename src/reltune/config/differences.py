"""Whether two configs ask for the same results, and what they differ in."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from reltune.config.run_config import RunConfig

# Fields, of the run and of its training, that change nothing in what is measured or trained.
WITHOUT_EFFECT = (
    *("output_dir", "export", "report_examples", "sample_prompts", "resume_from_checkpoint", "on_leak"),
    *("report_to", "run_name", "project", "trackio_space_id", "logging_dir", "logging_strategy", "logging_first_step"),
    *("logging_nan_inf_filter", "log_level", "log_level_replica", "log_on_each_node", "disable_tqdm", "debug"),
    *("save_total_limit", "include_num_input_tokens_seen", "skip_memory_metrics", "enable_jit_checkpoint"),
    *(
        "push_to_hub",
        "hub_model_id",
        "hub_strategy",
        "hub_token",
        "hub_private_repo",
        "hub_always_push",
        "hub_revision",
    ),
)
PATHS = ("train_file", "validation_file", "test_file", "forgetting_file", "dataset_path")


def differences(before: RunConfig, now: RunConfig) -> dict[str, tuple[Any, Any]]:
    """The fields in which two configs differ, of those that have an effect on results: name -> the value of each, None where it
    has none. Values of training fields may be words still, which count as the same where only transformers can read them; a task that the one named and the other read off its data is the
    same."""
    one, other = _flat(before), _flat(now)
    found = {
        name: (one.get(name), other.get(name))
        for name in dict.fromkeys([*one, *other])
        if name not in WITHOUT_EFFECT and not _same(name, one.get(name), other.get(name))
    }
    if None in found.get("task", ()):
        del found["task"]
    if "logging_steps" in found and ("eval_steps" in other or str(other.get("eval_strategy")) != "steps"):
        del found["logging_steps"]  # else it says how often is evaluated
    return found


def in_words(found: Mapping[str, tuple[Any, Any]], most: int = 3) -> str:
    """The differences in a phrase: "budget was 1% and is 5%"."""
    shown = [f"{name} was {_word(before)} and is {_word(now)}" for name, (before, now) in list(found.items())[:most]]
    return ", ".join(shown) + (f" and {len(found) - most} more" if len(found) > most else "")


def _flat(config: RunConfig) -> dict[str, Any]:
    values = config.values()
    training = values.pop("training")
    values["cuda_graphs"] = bool(values["cuda_graphs"])  # a run records nothing unless told to
    return values | training


def _same(name: str, one: Any, other: Any) -> bool:
    if name in PATHS and one and other:
        return os.path.abspath(one) == os.path.abspath(other)
    if one == other:
        return True
    if None in (one, other):
        return False
    if isinstance(one, str) != isinstance(other, str):
        word, value = (one, other) if isinstance(one, str) else (other, one)
        if isinstance(value, Mapping | list):
            return True  # the word is not read yet
        if isinstance(value, bool):
            return word == "" or (word.lower() in ("true", "t", "yes", "y", "1")) == value
    try:
        return float(one) == float(other)
    except (TypeError, ValueError):
        return str(one).lower() == str(other).lower()


def _word(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "nothing"
    return "not given" if value is None else str(value)
