"""Conversations as data sets have them, as messages with a role and a content."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeGuard

from reltune.data.cells import Unreadable, structure_in

ROLES = {  # names of speakers in use -> what chat templates call them
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "chatbot", "ai", "model"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "function_response"), "tool"),
    "system": "system",
}
LEFT_OUT_BY = ("weight", "train", "training", "loss")  # marks of messages that are not to be learned, where they are 0


def as_messages(value: Any, column: str) -> Any:
    """The messages that a value holds; a value that holds none as it is.

    Read are lists of ``{"role": …, "content": …}``, of ShareGPT's ``{"from": …, "value": …}``, of ``{"human": …,
    "assistant": …}``, a single message, and any of these written as text. A content in parts of text becomes one text.

    Returns:
        A list of messages, the value itself, or ``Unreadable``.
    """
    if isinstance(value, str):
        parsed = structure_in(value)
        if not _holds_messages(parsed) or not all(
            map(_is_message, [parsed] if isinstance(parsed, Mapping) else parsed)
        ):
            return value  # an answer may be JSON itself
        value = parsed
    if not _holds_messages(value):
        return value
    messages = []
    for message in [value] if isinstance(value, Mapping) else value:
        for turn in _turns(message):
            made = _message(turn, column)
            if isinstance(made, Unreadable):
                return made
            messages.append(made)
    return messages


def with_system(messages: Any, system: Any, column: str) -> Any:
    """The messages with a system message before them, if there is a text for one."""
    if not isinstance(messages, list) or not isinstance(system, str) or not system.strip():
        return messages
    first = messages[0] if messages and isinstance(messages[0], Mapping) else {}
    if first.get("role") != "system":
        return [{"role": "system", "content": system}, *messages]
    return messages if first.get("content") == system else Unreadable(f"a {column!r} beside another system message")


def _holds_messages(value: Any) -> TypeGuard[Mapping[str, Any] | list[Mapping[str, Any]]]:
    if isinstance(value, Mapping):
        return bool({"role", "from"} & set(value))
    return isinstance(value, list) and bool(value) and all(isinstance(one, Mapping) for one in value)


def _is_message(message: Mapping[str, Any]) -> bool:
    return bool({"role", "from"} & set(message)) and bool({"content", "value", "tool_calls"} & set(message))


def _turns(message: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """One message, or the two of an object that holds a question and its answer."""
    asker = next((name for name in ("human", "user") if name in message), None)
    if asker is None or "assistant" not in message or "content" in message:
        return [message]
    return [{"role": "user", "content": message[asker]}, {"role": "assistant", "content": message["assistant"]}]


def _message(message: Mapping[str, Any], column: str) -> dict[str, Any] | Unreadable:
    # Arrow fills what a message lacks with None, and templates ask whether a key is there.
    made = {
        key: value for key, value in message.items() if value is not None and not (key == "tool_calls" and not value)
    }
    if "role" not in made and "from" in made:
        speaker = made.pop("from")
        role = ROLES.get(str(speaker).lower())
        if role is None:
            return Unreadable(f"a {column!r} with a message from {speaker!r}, which is no role that is known")
        made = {"role": role, **made}
    elif isinstance(made.get("role"), str):
        made["role"] = ROLES.get(made["role"].lower(), made["role"])
    if "content" not in made and "value" in made:
        made["content"] = made.pop("value")
    if "function_call" in made and "tool_calls" not in made:  # OpenAI's older name of a single one
        made["tool_calls"] = [{"type": "function", "function": made.pop("function_call")}]
    if "tool_calls" in made:
        made["tool_calls"] = _calls(made["tool_calls"])
        made.setdefault("content", "")  # templates add to it
    if isinstance(made.get("content"), list):
        text = _joined(made["content"])
        if text is None:
            return Unreadable(f"a {column!r} with a message that holds more than text")
        made["content"] = text
    if made.get("role") == "assistant" and any(mark in made and not made[mark] for mark in LEFT_OUT_BY):
        return Unreadable(f"a {column!r} with an answer that is marked as not to be learned")
    return {key: value for key, value in made.items() if key not in LEFT_OUT_BY}


def _calls(calls: Any) -> Any:
    """Calls of tools with their arguments as objects, as chat templates want them; OpenAI's are objects written as JSON."""
    calls = structure_in(calls) if isinstance(calls, str) else calls
    if not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls):
        return calls
    made = []
    for call in map(without_none, calls):
        function = call.get("function", call)
        if isinstance(function, Mapping) and isinstance(function.get("arguments"), str):
            parsed = structure_in(function["arguments"])
            function = {**function, "arguments": parsed if isinstance(parsed, dict) else function["arguments"]}
        made.append({**call, "function": function} if "function" in call else function)
    return made


def without_none(value: Any) -> Any:
    """The value without what Arrow fills in where objects of several rows have different keys."""
    if isinstance(value, Mapping):
        return {key: without_none(one) for key, one in value.items() if one is not None}
    return [without_none(one) for one in value] if isinstance(value, list) else value


def _joined(parts: list[Any]) -> str | None:
    """The text of a content in parts, or None where a part is no text."""
    texts = []
    for part in parts:
        text = part.get("text") if isinstance(part, Mapping) and part.get("type", "text") == "text" else part
        if not isinstance(text, str):
            return None
        texts.append(text)
    return "".join(texts)
