"""Checkpoints as people have them, through the command line: what does not fit is mended or refused, nothing is changed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, GPT2Config, GPT2ForSequenceClassification

from command_line import assert_refused, reltune, review_rows, write_csv
from tiny_models import save_tiny_gpt2, save_tiny_llama, tiny_decoder_tokenizer

QUICK = ["--granularity", "column", "--budget", "5%", "--max_steps", 2]


def run(place: Path, model: Path, name: str, *words: object, command: str = "run", train: str = "train.csv") -> Any:
    files = ["--model_name_or_path", model, "--train_file", place / train, "--output_dir", place / name]
    return reltune(command, *files, *(QUICK if command == "run" else []), *words)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("place")
    write_csv(place / "train.csv", [*review_rows(40), ("good " * 50, "pos"), ("bad " * 60, "neg")])
    texts = [{"text": text} for text, _ in review_rows(40)]
    (place / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    return place


@pytest.fixture(scope="module")
def left(place: Path) -> Path:
    """A GPT-2 that is a classifier already, and whose tokenizer pads on the left and cuts at 24."""
    torch.manual_seed(0)
    tokenizer = tiny_decoder_tokenizer()
    tokenizer.padding_side, tokenizer.pad_token, tokenizer.model_max_length = "left", tokenizer.eos_token, 24
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=2, n_positions=32, pad_token_id=0)
    config.id2label, config.label2id = {0: "neg", 1: "pos"}, {"neg": 0, "pos": 1}
    GPT2ForSequenceClassification(config).save_pretrained(place / "left")
    tokenizer.save_pretrained(place / "left")
    return place / "left"


def scores(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "relevance" / "scores.safetensors")


def test_relevance_does_not_depend_on_the_batch_where_padding_was_on_the_left(place: Path, left: Path) -> None:
    for size in (1, 16):
        answer = run(
            place, left, f"batch_{size}", "--criteria", "fisher", "--analysis_batch_size", size, command="analyze"
        )
        assert answer.code == 0, answer
    one, many = scores(place / "batch_1"), scores(place / "batch_16")
    assert one.keys() == many.keys()
    for name, score in one.items():
        torch.testing.assert_close(score, many[name], rtol=1e-3, atol=1e-6 * score.abs().max().item())


def test_the_tokenizer_is_handed_on_as_it_was(place: Path, left: Path, tmp_path: Path) -> None:
    answer = run(place, left, "handed_on")
    assert answer.code == 0, answer
    assert "2 (6.7%) are cut (the model takes 24)" in " ".join(answer.out.split())
    for form in ("lora", "merged"):
        assert reltune("export", place / "handed_on", "--to", form, "--output_dir", tmp_path / form).code == 0
    AutoTokenizer.from_pretrained(left).save_pretrained(tmp_path / "as_it_was")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        wanted = (tmp_path / "as_it_was" / name).read_bytes()
        for directory in (place / "handed_on" / "adapter", tmp_path / "lora", tmp_path / "merged"):
            assert (directory / name).read_bytes() == wanted, directory
    before, after = (json.loads((path / "config.json").read_text()) for path in (left, tmp_path / "merged"))
    assert {**before, "problem_type": None} == {**after, "problem_type": None}


@pytest.mark.parametrize("make", [save_tiny_gpt2, save_tiny_llama])
def test_an_added_padding_token(make: Any, place: Path, tmp_path: Path) -> None:
    make(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(tmp_path)
    answer = run(place, tmp_path, f"padded_{make.__name__}", train="texts.jsonl")
    assert answer.code == 0, answer
    assert answer.err.count("reltune: note: Texts are padded with '<|endoftext|>'") == 1
    assert "Texts are padded with" in (place / f"padded_{make.__name__}" / "report.html").read_text()


def test_other_added_tokens(place: Path, tmp_path: Path) -> None:
    save_tiny_gpt2(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.add_tokens(["<turn>"])
    tokenizer.save_pretrained(tmp_path)
    texts = [{"text": f"<turn> {text}"} for text, _ in review_rows(20)]
    (place / "turns.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    answer = run(place, tmp_path, "turns", train="turns.jsonl")
    assert_refused(answer, "'<turn>'", "resize_token_embeddings")
    assert not (place / "turns").exists()


# -- errors of libraries --------------------------------------------------------------------------------------------

STRICT = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}{% endif %}"
    "<|{{ m['role'] }}|> {{ m['content'] }} <|endoftext|> {% endfor %}{% if add_generation_prompt %}<|assistant|> {% endif %}"
)


def chats(path: Path, bad: bool = True) -> Path:
    lines = []
    for i, (text, label) in enumerate(review_rows(30), start=1):
        messages = [
            {"role": "user", "content": text},
            {"role": "assistant", "content": "good" if label == "pos" else "bad"},
        ]
        if bad and i in (3, 17):
            messages.insert(0, {"role": "system", "content": "very"})
        if bad and i == 9:
            messages.insert(0, {"role": "user", "content": "film"})
        lines.append(json.dumps({"messages": messages}) + "\n")
    path.write_text("".join(lines))
    return path


def test_chats_that_the_template_refuses_are_bad_rows(place: Path, tmp_path: Path) -> None:
    save_tiny_llama(tmp_path / "model", chat_template=STRICT)
    chats(place / "chats.jsonl")
    answer = run(place, tmp_path / "model", "refused", train="chats.jsonl")
    assert_refused(answer, "System role not supported", "on 2 lines (3, 17)", "Roles must alternate", "on line 9")
    assert not (place / "refused").exists()
    answer = run(place, tmp_path / "model", "skipped", "--on_bad_rows", "skip", train="chats.jsonl")
    assert answer.code == 0, answer
    record = json.loads((place / "skipped" / "bad_rows.json").read_text())
    assert sorted(
        line for split in record.values() for kind in split["skipped"].values() for line in kind["lines"]
    ) == [
        3,
        9,
        17,
    ]
    assert "nothing to stop at" not in answer.err


def test_a_template_without_an_end_is_said(place: Path, tmp_path: Path) -> None:
    endless = STRICT.replace(" <|endoftext|>", "")
    save_tiny_llama(tmp_path / "model", chat_template=endless)
    chats(place / "endless.jsonl", bad=False)
    answer = run(place, tmp_path / "model", "endless", train="endless.jsonl")
    assert answer.code == 0 and answer.err.count("nothing to stop at") == 1, answer


def test_pushing_to_the_hub_without_a_network(place: Path, left: Path) -> None:
    answer = run(place, left, "pushed", "--push_to_hub")
    assert_refused(answer, "push_to_hub", "HF_HUB_OFFLINE")
    assert not (place / "pushed").exists()
