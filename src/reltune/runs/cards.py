"""What stands beside an adapter for those who have nothing else: a card for readers, the task for programs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from reltune.config.run_config import RunConfig
from reltune.files import write_json, write_text
from reltune.plan.plan import Plan
from reltune.runs.directory import TASK
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


def describe_lora(path: Path, model_name_or_path: str, task: Task) -> None:
    """Write the card of an exported LoRA adapter, and its task."""
    card = f"""---
base_model: {model_name_or_path}
library_name: peft
tags:
- lora
---

# LoRA adapter for {model_name_or_path}

{_listed(task.facts())}

PEFT loads it without reltune, on the base model above: `PeftModel.from_pretrained(base_model, "this directory")`.
`{TASK}` says what it is for in a form that programs can read.
"""
    _write(path, card, task)


def _listed(facts: list[str]) -> str:
    return "\n".join(f"- {fact}" for fact in facts)


def _write(path: Path, card: str, task: Task) -> None:
    write_json(path / TASK, task.record())
    write_text(path / "README.md", card)
