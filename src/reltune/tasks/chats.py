"""How chats become tokens: by the chat template of the model's tokenizer, with what it cannot take found and named."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from reltune.errors import InputError, first_line
from reltune.notes import note
from reltune.tasks.task import RowProblem
from reltune.tasks.texts import shared

Messages = list[dict[str, Any]]
Span = tuple[int, int]  # the first token, and the one after the last


@dataclass(frozen=True)
class Chat:
    """Messages, and the tools that the model may call in them, as JSON schemas."""

    messages: Messages
    tools: Sequence[Any] | None = None


def messages_problem(messages: list[Any], column: str) -> str | None:
    """What is wrong with a list that should be messages, as a phrase, or None."""
    if not messages:
        return f"an empty {column!r}"
    for message in messages:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            return f"a {column!r} with a message that has no role"
        if not isinstance(message.get("content"), str | list) and not message.get("tool_calls"):
            return f"a {column!r} with a message that has no content"
        if message["role"] == "assistant" and not _says_something(message):
            return f"a {column!r} in which the assistant gives an empty answer"
    return None


def _says_something(message: Mapping[str, Any]) -> bool:
    """Whether a message has words, calls of tools, or whatever else a template may show (what the model thought)."""
    content = message.get("content")
    words = content.strip() if isinstance(content, str) else content
    return bool(words) or any(value for key, value in message.items() if key not in ("role", "content", "name"))


def rendered(chat: Chat, tokenizer: PreTrainedTokenizerBase, prompt: bool = False) -> list[int]:
    """A chat's token ids by the tokenizer's template; of a ``prompt``, with what opens the answer.

    Raises:
        RowProblem: the template refuses the chat.
        InputError: there is no template.
    """
    if tokenizer.chat_template is None:
        raise InputError(
            "the model's tokenizer has no chat template, which rows of messages need; give it one (--chat_template chatml), "
            "or use an instruction-tuned model."
        )
    return list(_applied(chat, tokenizer, add_generation_prompt=prompt)["input_ids"]) if chat.messages else []


def _applied(chat: Chat, tokenizer: PreTrainedTokenizerBase, **options: Any) -> Any:
    options = {"tokenize": True, "return_dict": True, "tools": list(chat.tools) if chat.tools else None, **options}
    try:
        try:
            return tokenizer.apply_chat_template(chat.messages, **options)
        except TypeError:  # some templates take the arguments of a tool's call as text
            if (written := _with_written_arguments(chat.messages)) == chat.messages:
                raise
            return tokenizer.apply_chat_template(written, **options)
    except MemoryError:
        raise
    except Exception as error:  # templates are programs: they raise errors of their own, and those of Jinja and Python
        raise RowProblem(f"messages that the chat template refuses ({first_line(error)})") from error


def _with_written_arguments(messages: Messages) -> Messages:
    """The messages with the arguments of calls as JSON texts."""

    def written(call: Any) -> Any:
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), Mapping):
            return call
        return {**call, "function": {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}}

    return [
        {**one, "tool_calls": list(map(written, one["tool_calls"]))} if "tool_calls" in one else one for one in messages
    ]


def check_heard(chat: Chat, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise InputError where the template leaves out a chat's tools, the messages of a role or the calls of tools without a word.

    Other fields that it leaves out, and answers that it changes, are noted.
    """
    whole = as_text(chat, tokenizer)

    def heard(messages: Messages, tools: Sequence[Any] | None = chat.tools) -> bool:
        try:
            return as_text(Chat(messages, tools), tokenizer) != whole
        except RowProblem:  # it takes no chat without
            return True

    if chat.tools and not heard(chat.messages, None):
        raise InputError(
            "the model's chat template does not show tools to the model, and the data have some; use a model whose template does, "
            "or leave that column out."
        )
    looked_at: set[tuple[str, str]] = set()
    for i, message in enumerate(chat.messages):
        before, after = chat.messages[:i], chat.messages[i + 1 :]
        for key, value in message.items():
            part = (message["role"], key)
            if key == "role" or not value or part in looked_at:
                continue
            looked_at.add(part)
            other = {k: v for k, v in message.items() if k != key}
            if key == "content":
                other[key] = (
                    f"{value}x"  # without a content, some templates put one of their own, which may be the same
                )
            if heard([*before, other, *after]):
                continue
            if key not in ("content", "tool_calls"):
                note(f"The model's chat template leaves out the {key!r} of messages.")
                continue
            what = f"{message['role']} messages" if key == "content" else "calls of tools"
            into = ", or write them into the first question" if message["role"] == "system" else ""
            raise InputError(
                f"the model's chat template leaves {what} out, and the data have some; use a model whose template has them{into}."
            )
    for i, message in enumerate(chat.messages):
        if message["role"] == "assistant" and not _shows(whole, message) and not _shows(
            as_text(Chat(chat.messages[: i + 1], chat.tools), tokenizer), message
        ):  # fmt: skip
            note(
                "The model's chat template changes what the assistant says, as some do that leave out what stands before </think>; "
                "what it makes of an answer is what is learned."
            )


def _shows(text: str, message: Mapping[str, Any]) -> bool:
    """Whether the words of a message stand in the text, space aside."""
    said = message.get("content")
    return not isinstance(said, str) or "".join(said.split()) in "".join(text.split())


def as_text(chat: Chat, tokenizer: PreTrainedTokenizerBase, prompt: bool = False) -> str:
    """A chat as the template writes it, before it becomes tokens; of a ``prompt``, with what opens the answer."""
    return str(_applied(chat, tokenizer, tokenize=False, return_dict=False, add_generation_prompt=prompt))


def examples_of(chat: Chat, tokenizer: PreTrainedTokenizerBase) -> list[tuple[list[int], list[Span]]]:
    """The examples that a chat makes: token ids, and from where to where the assistant wrote them, a span for each of its messages.

    By the template's own marks, if it has some; else a message is what the chat up to it has more than the prompt for it. A chat
    is one example, unless the template renders an answer otherwise when more follow (Qwen3's leaves out what was thought before an
    earlier one): then each answer ends an example of its own, as it does when the model writes it.
    """
    messages = chat.messages
    if marks_answers(tokenizer):
        marked = _applied(chat, tokenizer, return_assistant_tokens_mask=True)
        return [(list(marked["input_ids"]), _runs(marked["assistant_masks"]))]
    ids, special = rendered(chat, tokenizer), special_tokens(tokenizer)
    whole: list[Span] = []
    alone: list[tuple[list[int], list[Span]]] = []
    for i in [i for i, message in enumerate(messages) if message["role"] == "assistant"]:
        upto = rendered(Chat(messages[: i + 1], chat.tools), tokenizer)
        stop = shared(upto, ids)
        if i:
            start = answer_span(rendered(Chat(messages[:i], chat.tools), tokenizer, prompt=True), upto, tokenizer)[0]
        else:  # before a first message there is what the template puts before any: a system prompt, the turn's marks
            start = shared(rendered(Chat([{**messages[0], "content": ""}], chat.tools), tokenizer), upto)
        alone.append((upto, [(start, len(upto))]))
        if special.issuperset(upto[stop:]):  # some templates end a whole chat with one more
            whole.append((start, stop))
    if len(whole) == len(alone):
        return [(ids, whole)]
    note(
        "The chat template writes an answer in another way once more follow, so that each answer of a chat is an example of its own, which "
        "ends with it."
    )
    return alone


def answer_span(prompt: Sequence[int], ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> Span:
    """Where the answer stands in a chat's ids: behind what the prompt for it and they have in common."""
    start = shared(prompt, ids)
    if 0 < start < len(prompt) and (more := str(tokenizer.decode(list(prompt[start:]))).strip()):
        note(
            f"The chat template opens an answer with {more!r}, which chats that have their answer do not have there; the model "
            "is asked to go on from what both have in common."
        )
    return start, len(ids)


def marks_answers(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the template marks what the assistant writes."""
    template = tokenizer.chat_template
    return isinstance(template, str) and "{% generation" in template.replace("{%-", "{%")


def _runs(mask: Sequence[int]) -> list[Span]:
    """Where a mask is 1, from the first to the one after the last of each run."""
    starts = [i for i, value in enumerate(mask) if value and (i == 0 or not mask[i - 1])]
    stops = [i + 1 for i, value in enumerate(mask) if value and (i + 1 == len(mask) or not mask[i + 1])]
    return list(zip(starts, stops, strict=True))


def closing_token(ids: Sequence[int], span: Span, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The special token that ends the assistant's message, behind which there may be space; None if there is none, which is
    noted: nothing tells the model where to stop."""
    special = special_tokens(tokenizer)
    for token in reversed(ids[span[0] : span[1]]):
        if token in special:
            return token
        if str(tokenizer.decode([token])).strip():
            break
    note(
        "The chat template puts no special token behind what the assistant says, so that the model learns nothing to stop at; "
        "let the template end each answer with the end-of-sequence token."
    )
    return None


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokens that stand for no text: those that begin, end or pad one, and those that templates mark turns with."""
    return {*tokenizer.all_special_ids, *(i for i, token in tokenizer.added_tokens_decoder.items() if token.special)}


def to_read(messages: Messages) -> str:
    """Messages as a text to look at: a single one's words, or each behind its role."""
    words = [message.get("content") or message.get("tool_calls") for message in messages]
    if len(words) == 1 and isinstance(words[0], str):
        return words[0]
    return "\n".join(f"{message['role']}: {said}" for message, said in zip(messages, words, strict=True))
