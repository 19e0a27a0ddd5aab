"""Talking to a tuned model: a conversation that its tokenizer's chat template writes, or texts that the model goes on from."""

from __future__ import annotations

from typing import Any

from reltune.runs.directory import RunDirectory
from reltune.runs.kept_rows import kept
from reltune.tasks.task import Task


def asked_in(task: Task, tokenizer: Any, run: RunDirectory) -> str:
    """How training asked the model of a run: in a "chat", by an "instruction" (Alpaca's prompt) or by a "text" as it stands."""
    template = getattr(tokenizer, "chat_template", None) is not None
    if "messages" in task.asked:
        return "chat"
    if "instruction" in task.asked:
        return "chat" if template else "instruction"
    if "text" in task.asked or not template:
        return "text"
    rows = kept(run.kept_rows / "test.jsonl", "") or ()
    values = [row.values.get(column) for row in rows[:1] for column in task.columns.values()]
    return "text" if values and not any(isinstance(value, list) for value in values) else "chat"
