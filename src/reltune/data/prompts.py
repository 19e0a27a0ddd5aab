"""Prompts that a model answers while it trains: texts as they stand, or files of texts and chats."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from reltune.data.bad_rows import in_words, lines_by_problem, row_problem
from reltune.data.rows import Row
from reltune.data.text_files import JSON_SUFFIXES, read_lines, read_text_file
from reltune.errors import InputError

Asked = str | list[dict[str, Any]]  # a text, or the messages of a chat
MOST = 100  # which all are answered at every evaluation


def read_prompts(given: Sequence[str]) -> list[Asked]:
    """The prompts that are given, in their order; what ends in the suffix of a text or of JSON is a file of them.

    Raises InputError for a file that is not there, or that holds a line that is no prompt, and for more than ``MOST``.
    """
    prompts: list[Asked] = []
    for word in given:
        suffix = Path(word).suffix.lower() if "\n" not in word else ""
        if suffix == ".txt":
            prompts += read_lines(word)
        elif suffix in JSON_SUFFIXES:
            prompts += _in_rows(word)
        else:
            prompts.append(word.strip())
    if len(prompts) > MOST:
        raise InputError(
            f"sample_prompts are {len(prompts):,}, which the model would answer at every evaluation; give at most {MOST}."
        )
    return prompts


def _in_rows(path: str) -> Iterator[Asked]:
    rows = read_text_file(path)["train"]
    bad = list(rows.broken)
    bad += [(row.line, problem) for row in rows if (problem := row_problem(row, _problem))]
    if bad:
        raise InputError(
            f"{path} has {in_words(lines_by_problem(sorted(bad)), rows.unit)}. Mend or delete these {rows.unit}s."
        )
    for row in rows:
        yield row.values["messages"] if "messages" in row.values else row.values["prompt"]


def _problem(row: Row) -> str | None:
    """What keeps a row from being a prompt, as a phrase, or None."""
    if not {"messages", "prompt"} & set(row.values):
        return "neither 'messages' nor a 'prompt'"
    asked = row.values.get("messages", row.values.get("prompt"))
    if isinstance(asked, str) and "messages" not in row.values:
        return None if asked.strip() else "an empty 'prompt'"
    if not isinstance(asked, list) or not asked:
        return "a prompt that is neither a text nor messages"
    for message in asked:
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            return "a message without a role and a content"
    return None
