"""Templates that users name: what they write, what is refused, and that a run keeps its own."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from command_line import assert_refused, reltune, review_rows, write_csv
from reltune.errors import InputError
from reltune.names import CHAT_TEMPLATES
from reltune.tasks.causal_lm import CausalLM, instruction_as_prompt
from reltune.tasks.chat_templates import text_of, with_chat_template
from task_cases import write_rows
from tiny_models import CHAT, save_tiny_bert, save_tiny_llama, tiny_decoder_tokenizer

WRITTEN = {
    "chatml": "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n",
    "llama3": (
        "<s><|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nQ<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nA<|eot_id|>"
    ),
    "zephyr": "<|system|>\nS<|endoftext|>\n<|user|>\nQ<|endoftext|>\n<|assistant|>\nA<|endoftext|>\n",
    "alpaca": "S\n\n### Instruction:\nQ\n\n### Response:\nA<|endoftext|>\n\n",
}
MESSAGES = [{"role": role, "content": said} for role, said in (("system", "S"), ("user", "Q"), ("assistant", "A"))]


def test_templates_by_name() -> None:
    assert tuple(WRITTEN) == CHAT_TEMPLATES
    for name, expected in WRITTEN.items():
        tokenizer = with_chat_template(tiny_decoder_tokenizer(), name)
        tokenizer.bos_token = "<s>"
        assert tokenizer.apply_chat_template(MESSAGES, tokenize=False) == expected
        asked = tokenizer.apply_chat_template(MESSAGES[:2], tokenize=False, add_generation_prompt=True)
        assert expected.startswith(asked) and expected[len(asked) :].startswith("A")
    values = {"instruction": "Q", "output": "A", "system": "S"}
    assert instruction_as_prompt(values, tiny_decoder_tokenizer())["prompt"] == WRITTEN["alpaca"].partition("A<")[0]


def test_templates_that_cannot_be_used(tmp_path: Path) -> None:
    for text, words in (
        ("chatlm", "neither a file nor a template that is known; did you mean 'chatml'"),
        ("{% for m in messages %}\n{% if %}", "line 2 is no Jinja template"),
        ("{{ text }}", "shows no messages"),
    ):
        with pytest.raises(InputError, match=words):
            text_of(text)
    (tmp_path / "bytes.jinja").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(InputError, match="cannot be read"):
        text_of(str(tmp_path / "bytes.jinja"))
    marked = (
        "{% for m in messages %}{% generation %}{{ m }}{% endgeneration %}{% break %}{% endfor %}"  # Transformers' tags
    )
    assert text_of(marked) == marked and text_of(None) is None


def test_a_run_keeps_its_template(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For later stages and for exports, whatever becomes of the file."""
    save_tiny_llama(tmp_path / "model")
    rows = [
        {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "good"}]}
        for text, _ in review_rows(24)
    ]
    words = ("--model_name_or_path", tmp_path / "model", "--train_file", write_rows(tmp_path / "train.jsonl", rows))
    words = (*words, "--method", "lora", "--max_steps", 1, "--output_dir", tmp_path / "run")
    assert "--chat_template chatml" in reltune("run", *words).err
    assert_refused(reltune("run", *words, "--chat_template", tmp_path / "absent.jinja"), "absent.jinja")
    (tmp_path / "own.jinja").write_text(CHAT)
    answer = reltune("run", *words, "--chat_template", tmp_path / "own.jinja")
    assert answer.code == 0, answer.err
    (tmp_path / "own.jinja").unlink()
    assert reltune("evaluate", tmp_path / "run").code == 0
    assert AutoTokenizer.from_pretrained(tmp_path / "run" / "adapter").chat_template == CHAT
    prompt = json.loads((tmp_path / "run" / "outputs.jsonl").read_text().splitlines()[0])["prompt"]
    assert prompt in [row["messages"][0]["content"] for row in rows]
    assert reltune("export", tmp_path / "run", "--to", "lora", "--output_dir", tmp_path / "lora").code == 0
    for path in ("run", "lora"):
        monkeypatch.setattr(sys, "stdin", io.StringIO("good film\n"))
        assert reltune("chat", tmp_path / path, "--max_new_tokens", 2).code == 0
    assert CausalLM(chat_template=CHAT).load_tokenizer(tmp_path / "model").chat_template == CHAT


def test_tasks_without_chats_have_no_use_for_a_template(tmp_path: Path) -> None:
    save_tiny_bert(tmp_path / "model")
    train = write_csv(tmp_path / "train.csv", review_rows(40))
    words = ("--model_name_or_path", tmp_path / "model", "--train_file", train, "--method", "head", "--max_steps", 1)
    answer = reltune("run", *words, "--output_dir", tmp_path / "run", "--chat_template", "chatml")
    assert_refused(
        answer, "sequence_classification does not use --chat_template (--chat_template is for causal_lm, preference)"
    )
    assert not (tmp_path / "run").exists()
