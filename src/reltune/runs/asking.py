"""How training has asked a model that writes texts, which is how it is best asked afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from reltune.data.prompts import Asked
from reltune.data.rows import Row
from reltune.errors import InputError
from reltune.runs.directory import RunDirectory
from reltune.runs.kept_rows import kept
from reltune.tasks.causal_lm import CausalLM, Prompt
from reltune.tasks.task import RowProblem, Task

IN_TEXT = CausalLM({"text": "text"})
IN_CHAT = CausalLM({"messages": "messages"})
BY_INSTRUCTION = CausalLM({name: name for name in ("instruction", "output", "system", "history")})


def asked_in(task: Task, tokenizer: Any, run: RunDirectory | None = None, rows: Sequence[Row] | None = None) -> str:
    """How training asked the model: in a "chat", by an "instruction" (Alpaca's prompt) or by a "text" as it stands.

    Prompts may be messages as well as texts; the rows of the data say which, or those that a ``run`` has kept.
    """
    template = getattr(tokenizer, "chat_template", None) is not None
    if "messages" in task.asked:
        return "chat"
    if "instruction" in task.asked:
        return "chat" if template else "instruction"
    if not template or not {"prompt"} & set(task.asked):
        return "text"
    if rows is None and run is not None:
        rows = kept(run.kept_rows / "test.jsonl", "")
    values = [row.values.get(column) for row in (rows or ())[:1] for column in task.columns.values()]
    return "text" if values and not any(isinstance(value, list) for value in values) else "chat"


def prompt_of(
    form: str, asked: Asked, tokenizer: Any, system: str | None = None, turns: Sequence[tuple[str, str]] = ()
) -> Prompt:
    """The tokens that a decoder goes on from for a question, as training asks it (``asked_in``), or for a chat whatever the form.

    ``system`` is what it is told first, ``turns`` are earlier questions with their answers.

    Raises InputError for a question that cannot be asked.
    """
    if form == "chat" or isinstance(asked, list):
        messages = [{"role": "system", "content": system}] if system else []
        for question, answer in turns:
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        messages += asked if isinstance(asked, list) else [{"role": "user", "content": asked}]
        task, values = IN_CHAT, dict[str, Any](messages=messages)
    elif form == "instruction":
        task, values = BY_INSTRUCTION, {"instruction": asked, "system": system, "history": list(map(list, turns))}
    else:
        task, values = IN_TEXT, {"text": asked}
    try:
        return task.question(Row(values, 1), tokenizer)
    except RowProblem as problem:
        raise InputError(f"the question cannot be asked: {problem}.") from problem
