"""The tuned model in lm-evaluation-harness (Gao et al.), beside the base model: the same weights, with the adapter off.

The harness's own HFLM takes the model as it is loaded, so that there is no second copy; tasks, prompts, few-shot examples and
metrics are the harness's.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers.utils.hub import is_offline_mode

from reltune.errors import InputError, first_line, nearest
from reltune.processes import Processes
from reltune.report.record import LMEvalScore

BACKENDS = {"CAUSAL_LM": "causal", "SEQ_2_SEQ_LM": "seq2seq"}  # PEFT's task type -> the harness's kind of model


def check_model(peft_task_type: str | None, tokenizer: Any, apply_chat_template: bool) -> None:
    """Raise InputError unless the harness is installed and can ask this kind of model."""
    if importlib.util.find_spec("lm_eval") is None:
        raise InputError('lm_eval_tasks needs lm-evaluation-harness; run: pip install "reltune[lm-eval]"')
    if peft_task_type not in BACKENDS:
        raise InputError(
            "lm_eval_tasks are for language models that write (causal_lm, preference, seq2seq), but this run's task is "
            "another; leave lm_eval_tasks out."
        )
    if apply_chat_template and getattr(tokenizer, "chat_template", None) is None:
        raise InputError(
            "lm_eval_apply_chat_template is given, and the tokenizer has no chat template; leave it out, or set one in its "
            "tokenizer_config.json."
        )


def load_tasks(words: Sequence[str], limit: int | None = None) -> list[Any]:
    """The harness's tasks and groups of tasks by their names (or patterns of names), by YAML files, or by directories of these.

    In a directory files whose names begin with ``_`` are for others to include. Data sets are loaded here; what
    cannot be read, is not known, or cannot be measured here raises InputError. ``limit`` is that of ``evaluate``.
    """
    from lm_eval.api.group import Group
    from lm_eval.tasks import TaskManager

    files = {word: _task_files(word) for word in words}
    configs = {file: _read(file) for paths in files.values() for file in paths}
    for word, paths in files.items():
        if not Path(word).is_dir() and any("group" in configs[file] for file in paths):
            raise InputError(f"lm_eval_tasks {word!r} is a group of tasks; name the directory that holds it and them.")
    written = {str(config.get("group") or config.get("task")) for config in configs.values()}
    members = {
        str(member if isinstance(member, str) else member.get("task") or member.get("group"))
        for config in configs.values()
        if "group" in config
        for member in config.get("task") or []
    }
    with _quiet("lm_eval.tasks"):
        manager = TaskManager(
            include_path=[word for word in words if Path(word).is_dir() and files[word]],
            # an index of thousands of files, which takes a while
            include_defaults=not all(files.values()) or not members <= written,
        )
    known: dict[str, Any] = {}
    places: dict[str, str] = {}
    for word in words:
        specs = files[word] or manager.match_tasks([word])
        if not specs:
            raise InputError(
                f"lm_eval_tasks {word!r} is neither a task of lm-evaluation-harness nor a YAML file or a directory of them; "
                + nearest(word, manager.all_tasks)
            )
        for spec in map(str, specs):
            loaded = _load(manager, spec, configs.get(Path(spec), {}).get("group") or spec)
            # a group comes before those that it holds
            for name, task in list(loaded["groups"].items())[:1] or loaded["tasks"].items():
                if places.setdefault(name, spec) != spec:
                    raise InputError(
                        f"lm_eval_tasks has two tasks {name!r}, of {places[name]} and of {spec}; give one of them another name."
                    )
                known[name] = task
    held = {
        member.name if isinstance(member, Group) else member.task_name
        for group in known.values()
        if isinstance(group, Group)
        for member in (*group.get_all_tasks(), *group.get_all_groups())
    }
    chosen = [task for name, task in known.items() if name not in held]
    for task in (t for one in chosen for t in (one.get_all_tasks() if isinstance(one, Group) else [one])):
        _check(task, limit)
    return chosen


def _task_files(word: str) -> list[Path]:
    """The task files that a word names; none where it is the name of a task."""
    path = Path(word).expanduser()
    if path.is_dir():
        return sorted(file for file in path.glob("*.yaml") if not file.name.startswith("_"))
    if path.suffix not in (".yaml", ".yml"):
        return []
    if not path.is_file():
        raise InputError(f"lm_eval_tasks: the task file {word} does not exist; check the path.")
    return [path]


def _read(file: Path) -> dict[str, Any]:
    """What a task file says, with what it includes; the functions that it names are not looked for."""
    from lm_eval.tasks._yaml_loader import load_yaml

    try:
        return load_yaml(file, resolve_func=False)
    except Exception as error:  # the YAML reader's, the file system's and the harness's own
        raise InputError(
            f"lm_eval_tasks: {file} cannot be read as a task file ({type(error).__name__}: {first_line(error)}); correct it."
        ) from error


def _load(manager: Any, spec: str, name: str) -> Any:
    try:
        return manager.load([name])
    except Exception as error:  # data sets and the functions that a task brings each raise their own
        mend = (
            "correct its file, or the paths of its data, which count from the directory that the command is started in."
        )
        if not spec.endswith((".yaml", ".yml")):
            mend = "check the network, and the login if its data set asks for one."
        if is_offline_mode():
            mend = "if its data set is on the Hub, unset HF_HUB_OFFLINE; else " + mend
        raise InputError(
            f"lm_eval_tasks {spec!r} cannot be loaded ({type(error).__name__}: {first_line(error)}); {mend}"
        ) from error


def _check(task: Any, limit: int | None) -> None:
    name = task.task_name
    if getattr(task, "UNSAFE_CODE", False):
        raise InputError(
            f"lm_eval_tasks {name!r} runs the code that the model writes, which reltune does not; export the model "
            "(reltune export --to merged) and measure it with lm_eval itself."
        )
    if getattr(task, "MULTIMODAL", False):
        raise InputError(
            f"lm_eval_tasks {name!r} shows the model more than text, and this one reads text; leave it out."
        )
    count = len(task.eval_docs)
    count = count if limit is None else min(count, limit)
    processes = Processes.joined().count
    if count < processes:
        raise InputError(
            f"lm_eval_tasks {name!r} has {count} examples for {processes} processes, each of which needs one; start fewer."
        )


def evaluate(
    model: PeftModel,
    tokenizer: Any,
    tasks: Sequence[Any],
    peft_task_type: str,
    *,
    batch_size: int = 8,
    num_fewshot: int | None = None,
    limit: int | None = None,
    apply_chat_template: bool = False,
) -> list[LMEvalScore] | None:
    """What the harness measures of the model without its adapter and with it, on the tasks of ``load_tasks``.

    Several processes, each with the whole model, share the examples, and the first one gets the scores, the others
    None. The model runs where it is. Seeds are the harness's own defaults.

    Args:
        peft_task_type: a key of ``BACKENDS``.
        batch_size: requests per forward pass.
        num_fewshot: examples in a prompt, in place of the tasks' own number; not for tasks that set 0.
        limit: examples per task, at most: the first ones.
        apply_chat_template: give prompts as turns of a chat, through the tokenizer's template.
    """
    from accelerate import Accelerator
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    with _quiet("lm_eval.models.huggingface"):  # which warns of every model that comes loaded
        harness_model = HFLM(
            pretrained=model,
            backend=BACKENDS[peft_task_type],
            tokenizer=tokenizer,
            batch_size=batch_size,
        )
    processes = Processes.joined()
    if processes.count > 1:  # for a model that comes loaded, HFLM leaves this to its caller
        harness_model._rank, harness_model._world_size = processes.rank, processes.count
        harness_model.accelerator = Accelerator(cpu=model.device.type == "cpu")
    results = []
    for adapter in (model.disable_adapter(), contextlib.nullcontext()):
        with adapter:
            results.append(
                simple_evaluate(
                    model=harness_model,
                    tasks=list(tasks),
                    num_fewshot=num_fewshot,
                    limit=limit,
                    apply_chat_template=apply_chat_template,
                    log_samples=False,
                    task_manager=TaskManager(include_defaults=False),
                )
            )
    base, tuned = results
    return None if base is None or tuned is None else scores(base, tuned)


def scores(base: dict[str, Any], tuned: dict[str, Any]) -> list[LMEvalScore]:
    """A row for every metric of every task (and group), of two results of ``simple_evaluate`` on the same tasks."""
    rows = []
    for task, values in tuned["results"].items():
        for key in values:
            metric, comma, kind = key.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            error = f"{metric}_stderr,{kind}"
            rows.append(
                LMEvalScore(
                    task=task,
                    version=str(tuned["versions"].get(task)),
                    metric=metric,
                    filter=kind,
                    higher_is_better=(tuned["higher_is_better"].get(task) or {}).get(metric),
                    num_fewshot=tuned["n-shot"].get(task),
                    samples=values["sample_len"],
                    base=_number(base["results"][task][key]),
                    base_stderr=_number(base["results"][task].get(error)),
                    tuned=_number(values[key]),
                    tuned_stderr=_number(values.get(error)),
                )
            )
    return rows


def _number(value: Any) -> float | None:
    """A finite number; the harness writes "N/A" where there is none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


@contextlib.contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Leave out a logger's warnings while the harness is set up."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
