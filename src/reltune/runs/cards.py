"""What stands beside an adapter for those who have nothing else: a card for readers, the task for programs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from reltune import __version__
from reltune.config.run_config import RunConfig
from reltune.files import read_json, write_json, write_text
from reltune.names import CONTINUING
from reltune.plan.plan import Plan
from reltune.report import numbers
from reltune.report.markdown import plain, table
from reltune.runs.directory import TASK, RunDirectory
from reltune.tasks.classes import ClassTask
from reltune.tasks.task import Task

# The kind of pipeline that the Hub and Transformers would ask the model through, by task.
PIPELINES = {
    **dict.fromkeys(("sequence_classification", "multilabel_classification", "regression"), "text-classification"),
    "token_classification": "token-classification",
    "question_answering": "question-answering",
    "seq2seq": "text2text-generation",
    **dict.fromkeys(("causal_lm", "preference"), "text-generation"),
    "masked_lm": "fill-mask",
    "image_classification": "image-classification",
}
RESULTS = "\n## Results\n"  # the last section, which an evaluation writes


def describe_adapter(path: Path, plan: Plan, config: RunConfig, run: RunDirectory, task: Task) -> None:
    """Write the card of reltune's own adapter, in place of PEFT's empty form, and its task."""
    loads = """PEFT loads it once reltune is imported (without, it says `KeyError: 'RELTUNE'`):

```python
import reltune
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "this directory")
```

An adapter of input directions, columns or rows (no single weights) becomes a standard LoRA adapter, which needs no reltune, by `reltune export RUN --to lora`; any
adapter becomes a plain model by `--to merged`."""
    card = _Card("Adapter for {}", "peft", ["reltune"], plan.describe(), loads)
    _write(path, card, config, run, task)


def describe_method(path: Path, config: RunConfig, run: RunDirectory, lines: Sequence[str], task: Task) -> None:
    """Write the card of what a method trained that no plan describes, and its task."""
    whole = (path / "trained.safetensors").is_file()
    loads = """`trained.safetensors` holds the trained tensors under their names in the model:

```python
from safetensors.torch import load_file

base_model.load_state_dict(load_file("this directory/trained.safetensors"), strict=False)
```

`reltune export RUN --to merged` writes a plain model."""
    if not whole:
        loads = """PEFT loads it without reltune: `PeftModel.from_pretrained(base_model, "this directory")`. `reltune export RUN --to merged` writes a
plain model."""
    method = str(config.method)
    card = _Card(f"{method} of {{}}", "transformers" if whole else "peft", [method], lines, loads)
    _write(path, card, config, run, task)


def describe_lora(path: Path, config: RunConfig, run: RunDirectory, task: Task, asked_in: str) -> None:
    """Write the card of an exported LoRA adapter, and its task with what predictions need of the run's config."""
    loads = f"""PEFT loads it without reltune, on the base model above: `PeftModel.from_pretrained(base_model, "this directory")`.
`{TASK}` says what it is for in a form that programs can read; `reltune predict` goes by it."""
    card = _Card("LoRA adapter for {}", "peft", ["lora"], [], loads)
    _write(path, card, config, run, task, _settings(config, task, asked_in))


def describe_merged(path: Path, config: RunConfig, run: RunDirectory, task: Task, asked_in: str) -> None:
    """Write the card of a merged model, and its task with what predictions need of the run's config."""
    loads = f"""A plain model: `from_pretrained` and `pipeline` of Transformers load this directory. `{TASK}` says what it is for in a form that programs can
read; `reltune predict` goes by it."""
    own = (
        dataclasses.replace(task, head_labels=None) if isinstance(task, ClassTask) else task
    )  # its head's names are the task's
    card = _Card("{}, tuned", "transformers", [], [], loads)
    _write(path, card, config, run, own, _settings(config, task, asked_in))


def add_results(path: Path, results: Mapping[str, float]) -> None:
    """Write what an evaluation measured to the card of a directory, in place of what an earlier one did."""
    card = path / "README.md"
    if card.is_file():
        write_text(card, card.read_text(encoding="utf-8").split(RESULTS)[0] + _results(results))


def _settings(config: RunConfig, task: Task, asked_in: str) -> dict[str, Any]:
    """The fields of a run's config by which examples are made and predicted; and how a model that writes was asked."""
    names = dict.fromkeys(("max_length", "max_new_tokens", *task.fields))
    settings = {"settings": {name: getattr(config, name) for name in names}}
    return {**settings, "asked_in": asked_in} if task.name in CONTINUING else settings


@dataclasses.dataclass
class _Card:
    """What tells one kind of card from another; ``title`` has a place for the base model's name."""

    title: str
    library: str
    tags: Sequence[str]
    facts: Sequence[str]
    loads: str  # Markdown: how it is loaded


def _written(card: _Card, config: RunConfig, run: RunDirectory, task: Task) -> str:
    """The sections that PEFT's form asks for, as far as the run's artefacts tell; names from models and data stand as text."""

    def read(path: Path) -> Any:
        return read_json(path) if path.is_file() else {}

    name = str(config.model_name_or_path)
    head: dict[str, Any] = {"base_model": name, "library_name": card.library}
    if task.name in PIPELINES:
        head["pipeline_tag"] = PIPELINES[task.name]
    adapter = [f"base_model:adapter:{name}"] if card.library == "peft" else []
    if tags := [*card.tags, *adapter]:
        head["tags"] = tags
    cost = read(run.path / "training_cost.json")
    rows = [[split, *_of_split(record)] for split, record in read(run.data).items()]
    values = config.values()
    chosen = {one: values[one] for one in ("method", "criteria", "granularity", "budget", "max_length", "seed")}
    reached = {"steps": cost.get("steps"), "learning_rate": cost.get("learning_rate")}
    given = {one: value for one, value in values["training"].items() if one not in ("hub_token", *reached)}
    settings = {one: value for one, value in {**chosen, **reached, **given}.items() if value is not None}
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False, allow_unicode=True, width=math.inf)}---",
        f"# {plain(card.title.format(name))}",
        "\n".join(f"- {plain(fact)}" for fact in [*card.facts, *task.facts()]),
        card.loads,
    ]
    if rows:
        parts += ["## Data", table(["", "source", "rows", "fingerprint"], rows, counts=False)]
    parts += ["## Training procedure", table(["", ""], numbers.flatten(settings), counts=False)]
    if "machine" in cost:
        parts += ["### Framework versions", plain(f"reltune {__version__}; {cost['machine']}")]
    return "\n\n".join(parts) + "\n" + _results(read(run.results))


def _of_split(record: Mapping[str, Any]) -> list[str]:
    source = Path(record["source"])
    name = source.name if source.is_absolute() else record["source"]  # where it lies is of no use to others
    return [name, f"{record['rows']:,}", record["fingerprint"]] if "rows" in record else [name, "streamed", ""]


def _results(results: Mapping[str, float]) -> str:
    """Metrics on held-out data before training and after it, as a section; nothing where none were measured."""
    rows = [
        [name, "" if before is None else numbers.metric(name, before), numbers.metric(name, value)]
        for name, before, value in numbers.before_and_after(results)
        if name.startswith(("eval_", "test_"))
    ]
    return f"{RESULTS}\n{table(['', 'base model', 'tuned'], rows)}\n" if rows else ""


def _write(
    path: Path,
    card: _Card,
    config: RunConfig,
    run: RunDirectory,
    task: Task,
    more: Mapping[str, Any] | None = None,
) -> None:
    write_json(path / TASK, {**task.record(), **(more or {})})
    write_text(path / "README.md", _written(card, config, run, task))
