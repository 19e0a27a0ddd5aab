"""Conversations with a tuned model and its base, against plain generation."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, T5Config, T5ForConditionalGeneration

from command_line import Answer, assert_refused, reltune, review_rows, write_csv
from reltune.cli.chat import converse
from reltune.errors import InputError
from reltune.runs.chat import Conversation, conversations
from reltune.tasks.seq2seq import Seq2Seq
from task_cases import write_rows
from tiny_models import CHAT, save_tiny_bert, save_tiny_llama, tiny_tokenizer

QUESTIONS = ["film good not", "very bad"]
LOUD = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system prompt') }}{% endif %}" + CHAT


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on chats, with its LoRA adapter and its merged model."""
    place = tmp_path_factory.mktemp("place")
    save_tiny_llama(place / "model", chat_template=CHAT)
    GenerationConfig(max_new_tokens=5, eos_token_id=0).save_pretrained(place / "model")
    rows = [
        {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "good"}]}
        for text, _ in review_rows(30)
    ]
    words = ("--train_file", write_rows(place / "train.jsonl", rows), "--max_steps", 3, "--learning_rate", 3e-2)
    budget = ("--granularity", "column", "--budget", "30%", "--generation_examples", 0)
    answer = reltune("run", "--model_name_or_path", place / "model", *words, *budget, "--output_dir", place / "run")
    assert answer.code == 0, answer.err
    for form in ("lora", "merged"):
        assert reltune("export", place / "run", "--to", form, "--output_dir", place / form).code == 0
    return place


def written(model: Path, *turns: str) -> str:
    """The answer to the last of questions and answers in turn, by Transformers alone."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    messages = [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    tokens = AutoModelForCausalLM.from_pretrained(model).generate(**inputs, do_sample=False, max_new_tokens=5)
    return str(tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)).strip()


def piped(monkeypatch: pytest.MonkeyPatch, text: str, *words: object) -> Answer:
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    return reltune("chat", *words)


def test_a_chat_through_a_pipe(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = written(place / "merged", QUESTIONS[0])
    second, alone = (
        written(place / "merged", QUESTIONS[0], first, QUESTIONS[1]),
        written(place / "merged", QUESTIONS[1]),
    )
    base = written(place / "model", QUESTIONS[0])
    assert first != base
    asked = f"{QUESTIONS[0]}\n\n{QUESTIONS[1]}\n/reset\n{QUESTIONS[1]}\n/quit\nnever asked\n"
    for path in ("run", "lora", "merged"):
        answer = piped(monkeypatch, asked, place / path)
        assert answer.code == 0 and [line.strip() for line in answer.out.splitlines()] == [first, second, alone], answer
    answer = piped(monkeypatch, QUESTIONS[0], place / "run", "--compare")
    assert [line.strip() for line in answer.out.splitlines()] == [f"base: {base}", f"tuned: {first}"], answer
    assert first.startswith(piped(monkeypatch, QUESTIONS[0], place / "run", "--max_new_tokens", 2).out.strip())


def test_answers_are_drawn_where_that_is_wanted(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = (place / "run", "--temperature", 5, "--max_new_tokens", 30)
    drawn = [piped(monkeypatch, QUESTIONS[0], *words, "--seed", seed).out for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    (conversation,) = conversations(place / "run", sampling={"top_k": 3, "do_sample": True}).values()
    settings = conversation._asked(QUESTIONS[0])[1]
    assert (settings.top_k, settings.do_sample, settings.max_new_tokens) == (3, True, 5)


def test_the_system_prompt_comes_first(place: Path) -> None:
    (conversation,) = conversations(place / "run", system="very good").values()
    list(conversation.answer(QUESTIONS[0]))
    text = conversation.tokenizer.decode(conversation._asked(QUESTIONS[1])[0]["input_ids"][0])
    said = conversation.turns[0][1]
    assert (
        text.split()
        == (
            f"<|system|> very good <|end|> <|user|> {QUESTIONS[0]} <|end|> <|assistant|> {said} <|end|> "
            f"<|user|> {QUESTIONS[1]} <|end|> <|assistant|>"
        ).split()
    )
    conversation.tokenizer.chat_template = LOUD
    with pytest.raises(InputError, match=r"cannot be asked: .*no system prompt"):
        list(conversation.answer(QUESTIONS[0]))
    assert len(conversation.turns) == 1


def test_an_answer_that_nobody_waits_for_is_stopped(place: Path) -> None:
    (conversation,) = conversations(place / "run", sampling={"max_new_tokens": 40}).values()
    parts = conversation.answer(QUESTIONS[0])
    first = next(part for part in parts if part)
    parts.close()  # type: ignore[attr-defined]
    assert conversation.turns[0][1].startswith(first.strip())


def test_an_error_while_writing_is_not_lost(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (conversation,) = conversations(place / "run").values()

    def fails(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(conversation.model, "generate", fails)
    with pytest.raises(torch.OutOfMemoryError):
        list(conversation.answer(QUESTIONS[0]))
    assert conversation.turns == []


def test_a_conversation_that_is_too_long(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = piped(monkeypatch, "good " * 70, place / "run")
    answer = Answer(answer.code, answer.out.strip(), answer.err[answer.err.index("reltune: error") :])
    assert_refused(answer, "leaves the model no room for an answer")


def test_typed_words_go_on_after_an_error(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """At a terminal a question that cannot be asked is said, and an answer can be interrupted."""
    made = conversations(place / "run")
    lines = iter(["good " * 70, "/help", QUESTIONS[0]])

    def typed(_: str) -> str:
        line = next(lines, None)
        if line is None:
            raise EOFError
        return line

    monkeypatch.setattr(sys, "stdin", type("Terminal", (io.StringIO,), {"isatty": lambda self: True})())
    monkeypatch.setattr("builtins.input", typed)
    converse(made)
    shown = capsys.readouterr()
    assert "no room for an answer" in shown.err and shown.err.count("/reset forgets") == 2
    assert written(place / "merged", QUESTIONS[0]) in shown.out


def test_texts_and_instructions_stand_as_training_had_them(tmp_path: Path) -> None:
    save_tiny_llama(tmp_path / "model")
    rows = [{"prompt": text, "completion": " good"} for text, _ in review_rows(30)]
    words = ("--train_file", write_rows(tmp_path / "train.jsonl", rows), "--max_steps", 1, "--method", "full")
    assert (
        reltune("run", "--model_name_or_path", tmp_path / "model", *words, "--output_dir", tmp_path / "run").code == 0
    )
    (conversation,) = conversations(tmp_path / "run").values()
    assert conversation.form == "text"
    list(conversation.answer(QUESTIONS[0]))
    tokenizer = conversation.tokenizer
    ids = conversation._asked(QUESTIONS[1])[0]["input_ids"][0].tolist()
    assert ids == tokenizer(QUESTIONS[1])["input_ids"]  # nothing of what was said before
    with pytest.raises(InputError, match="leave --system_prompt out"):
        conversations(tmp_path / "run", system="very good")
    asked = Conversation(conversation.task, conversation.model, tokenizer, "instruction")
    asked.turns = [("bad", "film")]
    text = "### Instruction:\nbad\n\n### Response:\nfilm\n\n### Instruction:\ngood\n\n### Response:\n"
    assert asked._asked("good")[0]["input_ids"][0].tolist() == tokenizer(text)["input_ids"]


def test_a_model_that_writes_targets(tmp_path: Path) -> None:
    """Each source stands by itself; the answer is what the model generates."""
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = "[SEP]"
    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2, "vocab_size": len(tokenizer)}
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0, eos_token_id=3)).eval()
    conversation = Conversation(Seq2Seq(), model, tokenizer, "text", sampling={"max_new_tokens": 6})
    for question in QUESTIONS:
        tokens = model.generate(
            tokenizer(question, return_tensors="pt")["input_ids"], max_new_tokens=6, do_sample=False
        )
        expected = tokenizer.decode(tokens[0], skip_special_tokens=True)
        assert "".join(conversation.answer(question)).strip() == expected.strip()


def test_models_that_do_not_write_are_refused(place: Path, tmp_path: Path) -> None:
    save_tiny_bert(tmp_path / "model")
    train = write_csv(tmp_path / "train.csv", review_rows(40))
    words = ("--model_name_or_path", tmp_path / "model", "--train_file", train, "--method", "head", "--max_steps", 1)
    assert reltune("run", *words, "--output_dir", tmp_path / "run").code == 0
    assert_refused(reltune("chat", tmp_path / "run"), "tuned for sequence_classification, which writes no texts")
    assert_refused(reltune("chat", place / "merged", "--compare"), "no base beside it")
    assert_refused(reltune("chat", tmp_path), "holds neither a run")
