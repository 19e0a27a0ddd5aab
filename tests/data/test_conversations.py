"""Conversations in the forms that data sets have them in."""

from __future__ import annotations

import json
from typing import Any

import pytest

from reltune.data.cells import Unreadable
from reltune.data.conversations import as_messages, with_system

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
FORMS: list[Any] = [
    CHAT,
    [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}],
    [{"role": "human", "content": "hi"}, {"role": "Assistant", "content": "yes"}],
    [{"human": "hi", "assistant": "yes"}],
    [
        {"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i", "image": None}]},
        CHAT[1],
    ],
    [{"role": "user", "content": "hi", "name": None}, {**CHAT[1], "tool_calls": [], "weight": 1}],
    json.dumps([{"from": "user", "value": "hi"}, {"from": "chatgpt", "value": "yes"}]),
    [{"role": "prompter", "content": "hi"}, {"from": "AI", "value": "yes"}],
    repr(CHAT),
]


@pytest.mark.parametrize("form", FORMS)
def test_all_forms_are_the_same_messages(form: Any) -> None:
    assert as_messages(form, "messages") == CHAT


@pytest.mark.parametrize(
    ("form", "words"),
    [
        (
            [{"role": "user", "content": [{"type": "image", "url": "x"}]}],
            "'m' with a message that holds more than text",
        ),
        ([{"role": "user", "content": [{"type": "text"}]}], "more than text"),
        ([{"from": "narrator", "value": "x"}], "from 'narrator', which is no role"),
        ([*CHAT, {**CHAT[1], "weight": 0}], "marked as not to be learned"),
        ([*CHAT, {**CHAT[1], "train": False}], "marked as not to be learned"),
    ],
)
def test_what_cannot_be_learned_is_named(form: Any, words: str) -> None:
    found = as_messages(form, "m")
    assert isinstance(found, Unreadable) and words in found.reason


@pytest.mark.parametrize(
    "value", ["hi", None, 5, [], ["hi"], '[{"name": "an answer in JSON"}]', "[1, 2]", '{"from": "a", "to": "b"}']
)
def test_what_holds_no_messages_stays(value: Any) -> None:
    assert as_messages(value, "completion") == value


def test_one_message_alone() -> None:
    assert as_messages({"from": "gpt", "value": "yes"}, "chosen") == [CHAT[1]]


def test_calls_of_tools_stay() -> None:
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    expected = [CHAT[0], {**call, "content": ""}]
    assert as_messages([CHAT[0], {**call, "content": None}], "messages") == expected
    older = {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}}
    newer = {
        "role": "assistant",
        "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}],
        "content": "",
    }
    assert as_messages([CHAT[0], older], "messages") == [CHAT[0], newer]


def test_a_system_column() -> None:
    system = {"role": "system", "content": "be kind"}
    assert (
        with_system(CHAT, "be kind", "system") == [system, *CHAT] == with_system([system, *CHAT], "be kind", "system")
    )
    assert with_system(CHAT, None, "system") is CHAT and with_system(CHAT, " ", "system") is CHAT
    assert isinstance(with_system([system, *CHAT], "be brief", "system"), Unreadable)
