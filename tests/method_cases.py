"""A tiny model and a few rows for each task, on which every method can be tried."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tokenizers import processors
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)

from task_cases import write_rows
from tiny_models import save_tiny_bert, save_tiny_gpt2, save_tiny_llama, save_tiny_masked, tiny_tokenizer

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
WORDS = ("good", "bad", "fine", "poor")


def save_tiny_t5(path: Path) -> None:
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = "[SEP]"
    tokenizer.save_pretrained(path)
    config = T5Config(
        vocab_size=len(tokenizer), d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, dropout_rate=0.0,
        pad_token_id=0, decoder_start_token_id=0, eos_token_id=3, tie_word_embeddings=False,
    )  # fmt: skip
    T5ForConditionalGeneration(config).save_pretrained(path)


def save_tiny_vit(path: Path) -> None:
    torch.manual_seed(0)
    ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, **SIZES)).save_pretrained(path)
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(path)


def save_tiny_reader(path: Path) -> None:
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer([*WORDS, "what", "is", "?", "film", "book", "very", "not"])
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.save_pretrained(path)
    config = BertConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **SIZES)
    BertForQuestionAnswering(config).save_pretrained(path)


def _row(task: str, i: int, place: Path) -> dict[str, Any]:
    word, text = WORDS[i % 4], f"film {'very ' * (i % 5)}book {'not ' * (i // 5)}{WORDS[i % 4]}"
    if task == "image_classification":
        path = place / f"{i}.png"
        Image.new("RGB", (8, 8), (8 * i, 0, 255 - 8 * i)).save(path)
        return {"image": str(path), "label": ("left", "right")[i % 2]}
    return {
        "sequence_classification": {"text": text, "label": ("neg", "pos")[i % 2]},
        "multilabel_classification": {"text": text, "label": sorted({word, "film"})[: 1 + i % 2]},
        "regression": {"text": text, "label": 0.25 + i % 4},
        "token_classification": {"tokens": text.split(), "ner_tags": ["O"] * (len(text.split()) - 1) + ["B-X"]},
        "question_answering": {
            "question": "what is ?",
            "context": text,
            "answers": {"text": [word], "answer_start": [text.rindex(word)]},
        },
        "seq2seq": {"source": text, "target": WORDS[(i + 1) % 4]},
        "causal_lm": {"prompt": text, "completion": f" {WORDS[(i + 1) % 4]}"},
        "masked_lm": {"text": f"{text} {text}"},
        "preference": {"prompt": text, "chosen": f" {WORDS[(i + 1) % 4]}", "rejected": f" {WORDS[(i + 2) % 4]}"},
    }[task]


MODELS: dict[str, Callable[[Path], None]] = {
    "sequence_classification": save_tiny_bert,
    "multilabel_classification": save_tiny_bert,
    "regression": save_tiny_bert,
    "token_classification": save_tiny_bert,
    "question_answering": save_tiny_reader,
    "seq2seq": save_tiny_t5,
    "causal_lm": save_tiny_gpt2,
    "masked_lm": save_tiny_masked,
    "preference": save_tiny_llama,
    "image_classification": save_tiny_vit,
}


def task_place(place: Path, task: str) -> list[str]:
    """Write the task's model and 40 rows to a directory; the words of a command line that name them."""
    MODELS[task](place / "model")
    rows = write_rows(place / "train.jsonl", (_row(task, i, place) for i in range(40)))
    return ["--model_name_or_path", str(place / "model"), "--train_file", str(rows), "--task", task]
