"""How training has asked a model that writes texts, which is how it is best asked afterwards."""

from __future__ import annotations

from typing import Any

from reltune.runs.directory import RunDirectory
from reltune.runs.kept_rows import kept
from reltune.tasks.task import Task


def asked_in(task: Task, tokenizer: Any, run: RunDirectory | None = None) -> str:
    """How training asked the model: in a "chat", by an "instruction" (Alpaca's prompt) or by a "text" as it stands.

    Prompts may be messages as well as texts; the rows that a ``run`` has kept say which.
    """
    template = getattr(tokenizer, "chat_template", None) is not None
    if "messages" in task.asked:
        return "chat"
    if "instruction" in task.asked:
        return "chat" if template else "instruction"
    if not template or not {"prompt"} & set(task.asked):
        return "text"
    rows = None if run is None else kept(run.kept_rows / "test.jsonl", "")
    values = [row.values.get(column) for row in (rows or ())[:1] for column in task.columns.values()]
    return "text" if values and not any(isinstance(value, list) for value in values) else "chat"
