"""Lists and objects that stand as text in a cell of a table, as Python, NumPy, pandas and JSON write them."""

from __future__ import annotations

import ast
import dataclasses
import io
import json
import re
import tokenize
from collections.abc import Callable
from typing import Any

BRACKETS = {"[": "]", "{": "}"}
NEIGHBOURS = re.compile(r"""['"]\s+\w{0,2}['"]|['"]{2}""")  # where Python may join two strings, or one is empty
ATOMS = (tokenize.NUMBER, tokenize.STRING, tokenize.NAME)


@dataclasses.dataclass(frozen=True)
class Unreadable:
    """Stands in a row for a cell that cannot be read; the row is bad for this reason ("a 'tags' that …")."""

    reason: str


def looks_structured(text: str) -> bool:
    """Whether a text starts and ends as a list or an object does."""
    text = text.strip()
    return len(text) > 1 and BRACKETS.get(text[0]) == text[-1]


def structure_in(text: str) -> list[Any] | dict[str, Any] | None:
    """The list or object that a text spells, or None if it spells none.

    JSON (``["a", null]``), Python (``['a', None]``), NumPy (``['a' 'b']``, ``[1 0]``) and objects that hold arrays
    (``{'text': array(['a'], dtype=object)}``). Words without quotes, and what NumPy shortens by ``...``, are no values.
    """
    if not looks_structured(text):
        return None
    readers: list[Callable[[str], Any]] = [json.loads, lambda text: ast.literal_eval(_python_from_numpy(text))]
    if not NEIGHBOURS.search(text):
        readers.insert(1, ast.literal_eval)  # many times faster
    for read in readers:
        try:
            value = read(text.strip())
        except (ValueError, SyntaxError, tokenize.TokenError, RecursionError, MemoryError, TypeError):
            continue
        return value if isinstance(value, list | dict) else None
    return None


def _python_from_numpy(text: str) -> str:
    """The text with commas between neighbours, and arrays as lists.

    Python itself would join neighbouring strings to one.
    """
    words = [word for word in tokenize.generate_tokens(io.StringIO(text).readline) if word.string.strip()]
    written: list[str] = []
    arrays: list[bool] = []  # of every open round bracket, whether it is an array's
    ended = False  # whether the word before ends a value
    place = 0
    while place < len(words):
        word = words[place]
        follows = [next_word.string for next_word in words[place + 1 : place + 3]]
        if word.string == "array" and follows[:1] == ["("]:
            arrays.append(True)
            if ended:
                written.append(",")
            place, ended = place + 2, False
            continue
        if arrays and word.string == "," and follows == ["dtype", "="]:
            place += 4
            continue
        if word.string == ")" and arrays:
            written += [] if arrays.pop() else [")"]
        else:
            if word.string == "(":
                arrays.append(False)
            starts = word.type in ATOMS or word.string in BRACKETS or (word.string in "+-" and _is_sign(words, place))
            if ended and starts:
                written.append(",")
            written.append(word.string)
        ended = word.type in ATOMS or word.string in (*BRACKETS.values(), ")")
        place += 1
    return " ".join(written)


def _is_sign(words: list[tokenize.TokenInfo], place: int) -> bool:
    """Whether the word stands apart from the one before it and directly before a number."""
    before, word, after = words[max(place - 1, 0)], words[place], words[min(place + 1, len(words) - 1)]
    return after.type == tokenize.NUMBER and word.end == after.start and word.start != before.end
