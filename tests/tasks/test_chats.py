"""Chat templates as models have them, written by hand: what is trained is what is generated, and what they refuse is named."""

from __future__ import annotations

import json
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from reltune.data.conversations import as_messages
from reltune.data.rows import Row
from reltune.errors import InputError
from reltune.losses import IGNORED
from reltune.notes import collecting
from reltune.tasks.causal_lm import CausalLM
from reltune.tasks.chats import Chat, as_text
from reltune.tasks.preference import Preference
from tiny_models import tiny_decoder_tokenizer

RAISES = "{{ raise_exception('%s') }}"
TEMPLATES = {
    "mistral": (
        "{% if messages[0]['role'] == 'system' %}" + RAISES % "System role not supported" + "{% endif %}<s> "
        "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        + RAISES
        % "Conversation roles must alternate user/assistant/user/assistant/..."
        + "{% endif %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST] {% else %}{{ m['content'] }} </s> "
        "{% endif %}{% endfor %}"
    ),
    "chatml": (
        "{% if messages[0]['role'] != 'system' %}<|im_start|> system very good <|im_end|> {% endif %}"
        "{% if tools %}<|im_start|> tools {{ tools | map(attribute='name') | join(' ') }} <|im_end|> {% endif %}"
        "{% for m in messages %}<|im_start|> {{ m['role'] }} {{ m['content'] }} <|im_end|> {% endfor %}"
        "{% if add_generation_prompt %}<|im_start|> assistant {% endif %}"
    ),
    "gemma": (
        "<s> {% for m in messages %}<start_of_turn> {{ 'model' if m['role'] == 'assistant' else m['role'] }} "
        "{{ m['content'] | trim }} <end_of_turn> {% endfor %}{% if add_generation_prompt %}<start_of_turn> model {% endif %}"
    ),
    "phi": (
        "{% for m in messages %}<|{{ m['role'] }}|> {{ m['content'] }} <|end|> {% endfor %}"
        "{% if add_generation_prompt %}<|assistant|> {% else %}</s>{% endif %}"
    ),
    "deaf": (  # to the system
        "{% for m in messages if m['role'] != 'system' %}<|{{ m['role'] }}|> {{ m['content'] }} </s> {% endfor %}"
        "{% if add_generation_prompt %}<|assistant|> {% endif %}"
    ),
    "endless": "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}",
    "thinking": (  # opens an answer with more than answers have
        "{% for m in messages %}<|{{ m['role'] }}|> {{ m['content'] }} </s> {% endfor %}"
        "{% if add_generation_prompt %}<|assistant|> <think> {% endif %}"
    ),
    "forgetful": (  # an answer looks another way when it is not the last
        "{% for m in messages %}<|{{ m['role'] }}|> {% if m['role'] == 'assistant' and not loop.last %}very {% endif %}"
        "{{ m['content'] }} </s> {% endfor %}{% if add_generation_prompt %}<|assistant|> {% endif %}"
    ),
    "tools": (  # written as JSON
        "{% for m in messages %}<|{{ m['role'] }}|> {{ m['content'] }} {% for call in m['tool_calls'] %}"
        "{{ call['function']['arguments'] | tojson }} {% endfor %}</s> {% endfor %}"
    ),
    "items": (  # taken apart
        "{% for m in messages %}<|{{ m['role'] }}|> {{ m['content'] }} {% for call in m['tool_calls'] %}"
        "{% for key, value in call['function']['arguments'] | items %}{{ key }}={{ value }} {% endfor %}{% endfor %}</s> {% endfor %}"
    ),
    "text": (  # joined to other text
        "{% for m in messages %}<|{{ m['role'] }}|> {{ m['content'] }} {% for call in m['tool_calls'] %}"
        "{{ 'very ' + call['function']['arguments'] }} {% endfor %}</s> {% endfor %}"
    ),
    "two roles": (
        "{% for m in messages %}{% if m['role'] in ('user', 'assistant') %}<|{{ m['role'] }}|> {{ m['content'] }} </s> {% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<|assistant|> {% endif %}"
    ),
    "of parts": (  # of a text it shows none
        "{% for m in messages %}<|{{ m['role'] }}|> {% for part in m['content'] %}{{ part['text'] }}{% endfor %} </s> {% endfor %}"
    ),
    "soon thoughtless": (  # leaves out what was thought when more follows
        "{% for m in messages %}<|{{ m['role'] }}|> {{ m['content'] if loop.last else m['content'].split('</think>')[-1] }} </s> "
        "{% endfor %}{% if add_generation_prompt %}<|assistant|> {% endif %}"
    ),
    "thoughtless": (  # leaves out what was thought, also of the last answer
        "{% for m in messages %}<|{{ m['role'] }}|> {{ m['content'].split('</think>')[-1] }} </s> {% endfor %}"
        "{% if add_generation_prompt %}<|assistant|> {% endif %}"
    ),
    "strict": "{% for m in messages %}{{ m['tool_calls'][0]['name'] }} {{ m['content'] }} </s> {% endfor %}",
}
SPECIAL = "<s> </s> [INST] [/INST] <|im_start|> <|im_end|> <start_of_turn> <end_of_turn> <|user|> <|assistant|> <|end|> <think>"
USER, MODEL = ({"role": "user", "content": "good film"}, {"role": "assistant", "content": "bad book"})
SYSTEM = {"role": "system", "content": "not great"}


def tokenizer_of(template: str) -> PreTrainedTokenizerBase:
    words = ["user", "assistant", "system", "model", "tools", "search", "good", "bad", "film", "book", "very", "not"]
    tokenizer = tiny_decoder_tokenizer([*SPECIAL.split(), *words, "great", "fine"])
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<|endoftext|>"})
    tokenizer.add_special_tokens({"extra_special_tokens": SPECIAL.split()[2:]})
    tokenizer.chat_template = TEMPLATES[template]
    return tokenizer


def encoded(template: str, *messages: dict[str, Any], tools: Any = None) -> tuple[str, str, Any]:
    """The words that go in, those that the loss is of, and what the model is asked to go on from."""
    tokenizer = tokenizer_of(template)
    task = CausalLM(columns={"messages": "messages", "tools": "tools"})
    row = Row({"messages": list(messages), "tools": tools}, 7)
    assert task.problem(row) is None
    examples = task.encode([row], tokenizer, 100)
    if not len(examples):
        return "", "", dict(examples.lost)
    item = examples[0]
    kept = [label for label in item["labels"] if label != IGNORED]
    prompt = (examples.sources or [None])[0]
    assert prompt is None or item["input_ids"][: len(prompt.ids)] == prompt.ids
    return tokenizer.decode(item["input_ids"]), tokenizer.decode(kept), prompt


@pytest.mark.parametrize(
    ("template", "answers", "end"),
    [
        ("mistral", "bad book </s> fine </s>", "</s>"),
        ("chatml", "bad book <|im_end|> fine <|im_end|>", "<|im_end|>"),
        ("gemma", "bad book <end_of_turn> fine <end_of_turn>", "<end_of_turn>"),
        ("phi", "bad book <|end|> fine <|end|> </s>", "</s>"),
        ("deaf", "bad book </s> fine </s>", "</s>"),
    ],
)
def test_answers_are_learned_with_what_ends_them(template: str, answers: str, end: str) -> None:
    with collecting() as notes:
        words, kept, prompt = encoded(template, USER, MODEL, USER, {**MODEL, "content": "fine"})
    assert kept == answers and not notes
    tokenizer = tokenizer_of(template)
    assert prompt.reference == "fine" and prompt.stop == tokenizer.convert_tokens_to_ids(end)
    assert words.startswith(tokenizer.decode(prompt.ids)) and words.count("<s>") <= 1
    asked = tokenizer.apply_chat_template([USER, MODEL, USER], add_generation_prompt=True, return_dict=True)
    assert prompt.ids == asked["input_ids"]  # what others ask the model with


def test_an_answer_that_is_opened_with_more_than_training_has() -> None:
    with collecting() as notes:
        _, kept, prompt = encoded("thinking", USER, MODEL)
    assert kept == "bad book </s>"
    assert tokenizer_of("thinking").decode(prompt.ids) == "<|user|> good film </s> <|assistant|>"
    assert len(notes) == 1 and "'<think>'" in notes[0]


def test_a_template_without_an_end() -> None:
    with collecting() as notes:
        _, kept, prompt = encoded("endless", USER, MODEL)
    assert kept == "bad book" and prompt.stop is None
    assert len(notes) == 1 and "nothing to stop at" in notes[0]


@pytest.mark.parametrize(
    ("template", "messages", "phrase"),
    [
        ("mistral", (SYSTEM, USER, MODEL), "System role not supported"),
        ("mistral", (USER, USER, MODEL), "roles must alternate"),
        ("strict", (USER, {**MODEL, "tool_calls": []}), "refuses"),
    ],
)
def test_what_a_template_refuses_is_a_bad_row(template: str, messages: Any, phrase: str) -> None:
    _, _, lost = encoded(template, *messages)
    assert list(lost.values()) == [[7]] and phrase in next(iter(lost)), lost


def test_answers_that_look_another_way_when_more_follow_are_examples_of_their_own() -> None:
    """As when the model writes them. Qwen3's template is of this kind: it drops the thoughts of earlier answers."""
    tokenizer, task = tokenizer_of("forgetful"), CausalLM(columns={"messages": "messages"})
    turns = [USER, MODEL, {**USER, "content": "not good"}, {**MODEL, "content": "fine"}]
    examples = task.encode([Row({"messages": turns}, 7)], tokenizer, 100)
    assert [tokenizer.decode(item["input_ids"]) for item in examples.items] == [
        "<|user|> good film </s> <|assistant|> bad book </s>",
        "<|user|> good film </s> <|assistant|> very bad book </s> <|user|> not good </s> <|assistant|> fine </s>",
    ]
    assert [tokenizer.decode([i for i in item["labels"] if i != IGNORED]) for item in examples.items] == [
        "bad book </s>",
        "fine </s>",
    ]
    assert [prompt and prompt.reference for prompt in examples.sources or ()] == [None, "fine"]
    cut = task.encode([Row({"messages": turns}, 7)], tokenizer, 8)  # what is left of the row is learned
    assert len(cut) == 1 and not cut.lost


@pytest.mark.parametrize("template", ["tools", "items", "text"])
def test_arguments_of_calls_are_what_the_template_takes(template: str) -> None:
    """OpenAI has them as JSON texts; most templates want objects, and some would write a text as JSON once more."""
    written = '{"very": "good"}'
    calls = [{"type": "function", "id": None, "function": {"name": "search", "arguments": written}}]
    rows = [
        as_messages([USER, {"role": "assistant", "content": None, "tool_calls": form}, MODEL], "messages")
        for form in (
            calls,
            json.dumps(calls),
            [{**calls[0], "function": {"name": "search", "arguments": {"very": "good"}}}],
        )
    ]
    texts = [as_text(Chat(messages), tokenizer_of(template)) for messages in rows]
    assert texts[0] == texts[1] == texts[2]
    assert {"tools": written, "items": "very=good", "text": f"very {written}"}[template] in texts[0]


@pytest.mark.parametrize(
    ("template", "message", "what"),
    [
        ("two roles", {"role": "tool", "content": "great"}, "leaves tool messages out"),
        ("two roles", {**MODEL, "tool_calls": [{"function": {"name": "search", "arguments": {}}}]}, "leaves calls of tools out"),
        ("of parts", USER, "leaves user messages out"),
    ],
)  # fmt: skip
def test_messages_that_the_template_does_not_show(template: str, message: dict[str, Any], what: str) -> None:
    with pytest.raises(InputError, match=what):
        encoded(template, USER, message, MODEL)


@pytest.mark.parametrize(
    ("template", "answer", "what"),
    [
        ("two roles", {**MODEL, "reasoning_content": "very"}, "leaves out the 'reasoning_content'"),
        ("thoughtless", {**MODEL, "content": "very </think> bad book"}, "changes what the assistant says"),
        ("two roles", MODEL, None),
        ("forgetful", MODEL, None),
    ],
)
def test_what_a_template_leaves_out_of_answers_is_said(template: str, answer: dict[str, Any], what: str | None) -> None:
    with collecting() as notes:
        _, kept, prompt = encoded(template, USER, answer)
    assert kept == "bad book </s>" and prompt.reference == "bad book"
    assert [what in sentence for sentence in notes if what] == ([True] if what else []) and len(notes) == bool(what)


def test_thoughts_that_are_left_out_later_are_learned_in_time() -> None:
    thought = {**MODEL, "content": "very </think> bad book"}
    with collecting() as notes:
        _, kept, _ = encoded("soon thoughtless", USER, thought, USER, thought)
    assert kept.startswith("very") and len(notes) == 1 and "an example of its own" in notes[0]


def test_a_system_message_that_the_template_would_put_by_itself() -> None:
    default = {"role": "system", "content": "very good"}
    assert encoded("chatml", default, USER, MODEL)[0] == encoded("chatml", USER, MODEL)[0]


def test_empty_answers_are_bad_rows() -> None:
    task = CausalLM(columns={"messages": "messages"})
    for content in ("", " \n"):
        assert "empty answer" in str(task.problem(Row({"messages": [USER, {**MODEL, "content": content}]}, 1)))
    call = {**MODEL, "content": "", "tool_calls": [{"function": {"name": "search", "arguments": {}}}]}
    assert task.problem(Row({"messages": [USER, call]}, 1)) is None


def test_a_template_that_marks_no_answer() -> None:
    tokenizer = tokenizer_of("deaf")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} </s> {% if false %}{% generation %}{% endgeneration %}{% endif %}{% endfor %}"
    lost = CausalLM(columns={"messages": "messages"}).encode([Row({"messages": [USER, MODEL]}, 7)], tokenizer, 100).lost
    assert list(lost.values()) == [[7]] and "marks nothing as the assistant's" in next(iter(lost))


def test_the_system_is_heard() -> None:
    assert encoded("chatml", SYSTEM, USER, MODEL)[0].startswith("<|im_start|> system not great <|im_end|>")
    with pytest.raises(InputError, match="leaves system messages out"):
        encoded("deaf", SYSTEM, USER, MODEL)
    pair = Row({"prompt": [SYSTEM, USER], "chosen": [MODEL], "rejected": [{**MODEL, "content": "fine"}]}, 1)
    with pytest.raises(InputError, match="leaves system messages out"):
        Preference().encode([pair], tokenizer_of("deaf"), 100)


def test_tools_are_shown_to_the_model() -> None:
    tools = [{"name": "search"}]
    words, kept, prompt = encoded("chatml", USER, MODEL, tools=tools)
    assert "<|im_start|> tools search <|im_end|>" in words and kept == "bad book <|im_end|>"
    assert "search" in tokenizer_of("chatml").decode(prompt.ids)
    assert "search" not in encoded("chatml", USER, MODEL, tools=[])[0]
    with pytest.raises(InputError, match="does not show tools"):
        encoded("gemma", USER, MODEL, tools=tools)
    wrong = CausalLM(columns={"messages": "messages", "tools": "tools"}).problem(
        Row({"messages": [USER, MODEL], "tools": "search"}, 1)
    )
    assert wrong is not None and "no list of tools" in wrong


ROLES = {role: role for role in ("instruction", "output", "input", "system", "history")}
GIVEN = {"instruction": "good", "input": "film", "output": "bad", "system": "not great", "history": [["very", "fine"]]}


def test_system_and_history_stand_before_an_instruction() -> None:
    task = CausalLM(columns=ROLES)
    tokenizer = tokenizer_of("chatml")
    assert task.problem(Row(GIVEN, 1)) is None
    item = task.encode([Row(GIVEN, 1)], tokenizer, 100)
    assert tokenizer.decode(item[0]["input_ids"]) == (
        "<|im_start|> system not great <|im_end|> <|im_start|> user very <|im_end|> <|im_start|> assistant fine <|im_end|> "
        "<|im_start|> user good film <|im_end|> <|im_start|> assistant bad <|im_end|>"
    )
    assert tokenizer.decode([label for label in item[0]["labels"] if label != IGNORED]) == "bad <|im_end|>"
    empty = {**GIVEN, "system": None, "history": None, "input": ""}
    assert "not great" not in tokenizer.decode(task.encode([Row(empty, 1)], tokenizer, 100)[0]["input_ids"])
    tokenizer.chat_template = None
    prompt = (task.encode([Row(GIVEN, 1)], tokenizer, 100).sources or [])[0]
    assert prompt.text == (
        "not great\n\n### Instruction:\nvery\n\n### Response:\nfine\n\n"
        "### Instruction:\ngood\n\n### Input:\nfilm\n\n### Response:\n"
    )
    for role, value in (("history", ["very"]), ("history", "very"), ("system", 3)):
        assert role in str(task.problem(Row({**GIVEN, role: value}, 1)))
