"""Tiny models with random weights and their tokenizers, made locally for the tests."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

WORDS = ("good", "bad", "fine", "poor", "film", "book", "very", "not", "great", "dull", "好", "坏", "电影")


def tiny_tokenizer(words: Sequence[str] = WORDS) -> PreTrainedTokenizerFast:
    """One token per word between spaces, in BERT's frame [CLS] … [SEP]; [PAD] is token 0."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    backend = _word_level([*special, *words], unknown="[UNK]")
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def tiny_decoder_tokenizer(words: Sequence[str] = WORDS) -> PreTrainedTokenizerFast:
    """One token per word between spaces and nothing else: no padding token, as GPT-2 has none."""
    backend = _word_level(["<|endoftext|>", *words], unknown="<|endoftext|>")
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>", unk_token="<|endoftext|>")


def save_tiny_bert(
    path: str | os.PathLike,
    num_layers: int = 2,
    hidden: int = 32,
    intermediate: int = 64,
    vocab: Sequence[str] = WORDS,
    labels: Sequence[str] | None = None,
    seed: int = 0,
) -> None:
    """Save a BERT and its tokenizer; without ``labels`` its weights hold no classifier."""
    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer(vocab)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        num_hidden_layers=num_layers,
        num_attention_heads=2,
        intermediate_size=intermediate,
        max_position_embeddings=64,
    )
    if labels is None:
        BertModel(config).save_pretrained(path)
    else:
        config.num_labels = len(labels)
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: index for index, label in enumerate(labels)}
        BertForSequenceClassification(config).save_pretrained(path)
    tokenizer.save_pretrained(path)


def save_tiny_masked(path: str | os.PathLike) -> None:
    """Save a BERT with its masked language modelling head, and a tokenizer that has a mask."""
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer(["[MASK]", *WORDS])
    tokenizer.mask_token = "[MASK]"
    tokenizer.save_pretrained(path)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **sizes)).save_pretrained(path)


def save_tiny_gpt2(
    path: str | os.PathLike,
    num_layers: int = 2,
    hidden: int = 32,
    vocab: Sequence[str] = WORDS,
    seed: int = 0,
) -> None:
    """Save a GPT-2 language model and its tokenizer, neither of which has a padding token."""
    torch.manual_seed(seed)
    tokenizer = tiny_decoder_tokenizer(vocab)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_embd=hidden,
        n_layer=num_layers,
        n_head=2,
        n_positions=32,
        bos_token_id=0,
        eos_token_id=0,
    )
    GPT2LMHeadModel(config).save_pretrained(path)
    tokenizer.save_pretrained(path)


def _word_level(words: Sequence[str], unknown: str) -> Tokenizer:
    vocabulary = {word: index for index, word in enumerate(words)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=unknown))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return backend


CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|> {{ m['content'] }} <|end|> {% endfor %}"
    "{% if add_generation_prompt %}<|assistant|> {% endif %}"
)


def save_tiny_llama(
    path: str | os.PathLike,
    vocab: Sequence[str] = WORDS,
    chat_template: str | None = None,
    seed: int = 0,
    **changes: int,
) -> None:
    """Save a Llama language model with untied embeddings and its tokenizer, with the chat's marks in its vocabulary."""
    torch.manual_seed(seed)
    tokenizer = tiny_decoder_tokenizer(["<pad>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>", *vocab])
    tokenizer.pad_token = "<pad>"
    tokenizer.chat_template = chat_template
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, **changes}
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **sizes,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
