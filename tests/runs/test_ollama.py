"""Modelfiles: what their templates make of chats, against what the models' own chat templates make of them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import GenerationConfig, PreTrainedTokenizerFast

from reltune.runs.ollama import turn_of, write_modelfile

CHATML = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}DEFAULT{% endif %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
HEADERS = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n{{ m['content'] | trim }}<|eot_id|>"
    "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
MARKS = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
TRANSLATED = {
    "ChatML": CHATML.replace("DEFAULT", ""),
    "ChatML with a system prompt of its own": CHATML.replace(
        "DEFAULT", "<|im_start|>system\nYou are kind.<|im_end|>\n"
    ),
    "Llama 3": HEADERS,
    "Zephyr": MARKS,
}
NOT_TRANSLATED = {
    "the system prompt within the first question": (
        "{% set ns = namespace(s='') %}{% for m in messages %}{% if m['role'] == 'system' %}{% set ns.s = m['content'] ~ '\n' %}"
        "{% elif m['role'] == 'user' %}[INST] {{ ns.s }}{{ m['content'] }} [/INST]{% set ns.s = '' %}"
        "{% else %}{{ m['content'] }}</s>{% endif %}{% endfor %}"
    ),
    "no system prompt": MARKS.replace(
        "<|{{", "{% if m['role'] == 'system' %}{{ raise_exception('none') }}{% endif %}<|{{"
    ),
    "turns that are counted": MARKS.replace("<|{{", "{{ loop.index }}<|{{"),
    "marks of Go's templates": MARKS.replace("<|{{", "{{ '{{' }}<|{{"),
    "answers that change when more follow": MARKS.replace(
        "{{ m['content'] }}", "{{ m['content'][1 if loop.first else 0:] }}"
    ),
}
CHATS = (
    ("", ["How are you?"], []),
    ("Be brief.", ["How are you?"], []),
    ("", ["How are you?", "And now?"], ["Well."]),
    ("Be brief.", ["How are you?", "And now?", "Why?"], ["Well.", "Better."]),
)


def tokenizer_of(template: str | None, begins: bool = False) -> PreTrainedTokenizerFast:
    special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    backend = Tokenizer(models.WordLevel({token: i for i, token in enumerate([*special, "a"])}, unk_token="a"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if begins:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "a", "additional_special_tokens": special[2:]}
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template, **named)


def ended_by(*ids: int) -> SimpleNamespace:
    return SimpleNamespace(generation_config=GenerationConfig(eos_token_id=list(ids), temperature=0.6, do_sample=True))


def of_go(template: str, system: str, questions: Sequence[str], answers: Sequence[str]) -> str:
    """What Ollama makes of a chat: a turn after another, the system prompt in the first, up to where the next answer begins."""
    text = ""
    for i, question in enumerate(questions):
        values = {"System": system if i == 0 else "", "Prompt": question}
        turn = template
        for name, value in values.items():
            turn = re.sub(rf"\{{\{{ if \.{name} \}}\}}(.*?)\{{\{{ end \}}\}}", r"\1" if value else "", turn, flags=re.S)
        for name, value in values.items():
            turn = turn.replace(f"{{{{ .{name} }}}}", value)
        before, after = turn.split("{{ .Response }}")
        text += before + (answers[i] + after if i < len(answers) else "")
    return text


def read(folder: Path) -> tuple[str | None, str]:
    """The template of a Modelfile, and its system prompt."""
    text = (folder / "Modelfile").read_text(encoding="utf-8")
    template, system = (re.search(rf'^{name} """(.*?)"""$', text, flags=re.S | re.M) for name in ("TEMPLATE", "SYSTEM"))
    return template and template[1], system[1] if system else ""


@pytest.mark.parametrize("name", TRANSLATED)
def test_a_modelfile_writes_chats_as_the_model_knows_them(name: str, tmp_path: Path) -> None:
    begins = name in ("Llama 3", "Zephyr")  # whether the tokenizer puts a token before every text
    tokenizer = tokenizer_of(TRANSLATED[name], begins)
    assert write_modelfile(tmp_path, "model.gguf", ended_by(1, 3), tokenizer, "chat") == ""
    template, default = read(tmp_path)
    for system, questions, answers in CHATS:
        messages = [{"role": "system", "content": system}] if system else []
        for i, question in enumerate(questions):
            messages.append({"role": "user", "content": question})
            messages += [{"role": "assistant", "content": answers[i]}] if i < len(answers) else []
        expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        # llama.cpp puts the token there that the tokenizer puts before every text
        assert of_go(str(template), system or default, questions, answers) == (
            expected.removeprefix("<s>") if begins else expected
        )
    lines = (tmp_path / "Modelfile").read_text(encoding="utf-8").splitlines()
    assert (
        lines[0] == "FROM ./model.gguf"
        and 'PARAMETER stop "<|im_end|>"' in lines
        and "PARAMETER temperature 0.6" in lines
    )
    assert ('PARAMETER stop "<|eot_id|>"' in lines) == (name == "Llama 3")


@pytest.mark.parametrize("name", NOT_TRANSLATED)
def test_what_cannot_be_translated_is_said(name: str, tmp_path: Path) -> None:
    sentence = write_modelfile(tmp_path, "model.gguf", ended_by(1), tokenizer_of(NOT_TRANSLATED[name]), "chat")
    assert "could not be translated" in sentence and read(tmp_path)[0] is None
    assert 'PARAMETER stop "</s>"' in (tmp_path / "Modelfile").read_text(encoding="utf-8")


def test_a_model_that_was_asked_without_a_chat(tmp_path: Path) -> None:
    from reltune.tasks.causal_lm import instruction_as_prompt

    tokenizer = tokenizer_of(None)
    assert write_modelfile(tmp_path, "model.gguf", ended_by(1), tokenizer, "text") == ""
    assert of_go(str(read(tmp_path)[0]), "", ["Once upon"], []) == "Once upon"
    assert write_modelfile(tmp_path, "model.gguf", ended_by(1), tokenizer, "instruction") == ""
    template = str(read(tmp_path)[0])
    for system, questions, answers in CHATS:
        *before, (question, _) = zip(questions, [*answers, ""], strict=True)
        values = {"instruction": question, "output": "", "system": system, "history": before}
        assert of_go(template, system, questions, answers) == instruction_as_prompt(values, tokenizer)["prompt"]


def test_a_default_system_prompt_is_told_from_the_turns() -> None:
    turn = turn_of(tokenizer_of(TRANSLATED["ChatML with a system prompt of its own"]))
    assert turn is not None and turn.default == "You are kind."
    assert turn.question[0] == "<|im_start|>user\n" and turn.end == "<|im_end|>\n"
