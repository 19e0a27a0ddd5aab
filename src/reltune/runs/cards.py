"""What stands beside an adapter for those who have nothing else: a card for readers, the task for programs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from reltune.config.run_config import RunConfig
from reltune.files import write_json, write_text
from reltune.names import CONTINUING
from reltune.plan.plan import Plan
from reltune.runs.directory import TASK
from reltune.tasks.classes import ClassTask
from reltune.tasks.task import Task


def describe_adapter(path: Path, plan: Plan, task: Task) -> None:
    """Write the card of reltune's own adapter, in place of PEFT's empty form, and its task."""
    facts = _listed([*plan.describe(), *task.facts()])
    card = f"""---
base_model: {plan.model_name_or_path}
library_name: peft
tags:
- reltune
---

# Adapter for {plan.model_name_or_path}

{facts}

PEFT loads it once reltune is imported (without, it says `KeyError: 'RELTUNE'`):

```python
import reltune
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "this directory")
```

An adapter of input directions, columns or rows (no single weights) becomes a standard LoRA adapter, which needs no reltune, by `reltune export RUN --to lora`; any
adapter becomes a plain model by `--to merged`.
"""
    _write(path, card, task)


def describe_method(path: Path, config: RunConfig, lines: Sequence[str], task: Task) -> None:
    """Write the card of what a method trained that no plan describes, and its task."""
    whole = (path / "trained.safetensors").is_file()
    facts = _listed([*lines, *task.facts()])
    loads = """`trained.safetensors` holds the trained tensors under their names in the model:

```python
from safetensors.torch import load_file

base_model.load_state_dict(load_file("this directory/trained.safetensors"), strict=False)
```

`reltune export RUN --to merged` writes a plain model.
"""
    if not whole:
        loads = """PEFT loads it without reltune: `PeftModel.from_pretrained(base_model, "this directory")`. `reltune export RUN --to merged` writes a
plain model.
"""
    card = f"""---
base_model: {config.model_name_or_path}
library_name: {"transformers" if whole else "peft"}
tags:
- {config.method}
---

# {config.method} of {config.model_name_or_path}

{facts}

{loads}"""
    _write(path, card, task)


def describe_lora(path: Path, config: RunConfig, task: Task, asked_in: str) -> None:
    """Write the card of an exported LoRA adapter, and its task with what predictions need of the run's config."""
    model_name_or_path = config.model_name_or_path
    card = f"""---
base_model: {model_name_or_path}
library_name: peft
tags:
- lora
---

# LoRA adapter for {model_name_or_path}

{_listed(task.facts())}

PEFT loads it without reltune, on the base model above: `PeftModel.from_pretrained(base_model, "this directory")`.
`{TASK}` says what it is for in a form that programs can read; `reltune predict` goes by it.
"""
    _write(path, card, task, _settings(config, task, asked_in))


def describe_merged(path: Path, config: RunConfig, task: Task, asked_in: str) -> None:
    """Write the card of a merged model, and its task with what predictions need of the run's config."""
    card = f"""---
base_model: {config.model_name_or_path}
library_name: transformers
---

# {config.model_name_or_path}, tuned

{_listed(task.facts())}

A plain model: `from_pretrained` and `pipeline` of Transformers load this directory. `{TASK}` says what it is for in a form that programs can
read; `reltune predict` goes by it.
"""
    own = (
        dataclasses.replace(task, head_labels=None) if isinstance(task, ClassTask) else task
    )  # its head's names are the task's
    _write(path, card, own, _settings(config, task, asked_in))


def _settings(config: RunConfig, task: Task, asked_in: str) -> dict[str, Any]:
    """The fields of a run's config by which examples are made and predicted; and how a model that writes was asked."""
    names = dict.fromkeys(("max_length", "max_new_tokens", *task.fields))
    settings = {"settings": {name: getattr(config, name) for name in names}}
    return {**settings, "asked_in": asked_in} if task.name in CONTINUING else settings


def _listed(facts: list[str]) -> str:
    return "\n".join(f"- {fact}" for fact in facts)


def _write(path: Path, card: str, task: Task, more: Mapping[str, Any] | None = None) -> None:
    write_json(path / TASK, {**task.record(), **(more or {})})
    write_text(path / "README.md", card)
