"""Models in llama.cpp's format."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    Trainer,
    TrainingArguments,
)

from reltune.errors import InputError
from reltune.pretrained import load_config, load_model, load_tokenizer
from reltune.tasks.causal_lm import CausalLM


def write_tiny(path: Path) -> dict[str, np.ndarray]:
    """A Llama with a tokenizer of 20 tokens, of which those that begin and end a text are 1 and 2; gives its tensors."""
    writer = gguf.GGUFWriter(path, "llama")
    for add, value in (
        (writer.add_context_length, 32),
        (writer.add_embedding_length, 16),
        (writer.add_block_count, 1),
        (writer.add_feed_forward_length, 24),
        (writer.add_head_count, 2),
        (writer.add_head_count_kv, 2),
        (writer.add_vocab_size, 20),
        (writer.add_rope_dimension_count, 8),
    ):
        add(value)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<unk>", "<begin>", "<end>", *"abcdefghijklmno", "ab", "cd"])
    writer.add_token_types([3, 3, 3] + 17 * [1])
    writer.add_token_merges(["a b", "c d"])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    shapes = {"token_embd": (20, 16), "output_norm": (16,), "blk.0.attn_norm": (16,), "blk.0.ffn_norm": (16,)}
    shapes |= {f"blk.0.attn_{name}": (16, 16) for name in ("q", "k", "v", "output")}
    shapes |= {"blk.0.ffn_gate": (24, 16), "blk.0.ffn_up": (24, 16), "blk.0.ffn_down": (16, 24)}
    drawn = torch.Generator().manual_seed(0)
    tensors = {f"{name}.weight": torch.randn(shape, generator=drawn).numpy() for name, shape in shapes.items()}
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


def test_its_tokenizer_begins_and_ends_texts_as_the_file_says(tmp_path: Path) -> None:
    write_tiny(tmp_path / "tiny.gguf")
    tokenizer = load_tokenizer(str(tmp_path / "tiny.gguf"))
    assert [tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token] == ["<begin>", "<end>", "<unk>"]
    assert [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id] == [1, 2, 0]
    assert tokenizer.decode(tokenizer("abc")["input_ids"], skip_special_tokens=True) == "abc"
    assert tokenizer.model_max_length == 32


def test_a_file_of_llama_cpp_is_loaded_as_the_plain_model_that_it_is(tmp_path: Path) -> None:
    """Trainer refuses to evaluate what it takes for a quantised model."""
    tensors = write_tiny(tmp_path / "tiny.gguf")
    model, missing = load_model(
        str(tmp_path / "tiny.gguf"),
        AutoModelForCausalLM,
        MODEL_FOR_CAUSAL_LM_MAPPING,
        "head",
        lambda config: True,
        None,
        lambda: None,
    )
    assert missing == [] and torch.equal(
        model.get_input_embeddings().weight, torch.tensor(tensors["token_embd.weight"])
    )
    batch = {"input_ids": torch.tensor([[1, 2, 3]]), "labels": torch.tensor([[1, 2, 3]])}
    args = TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    trainer = Trainer(model=model, args=args, train_dataset=[{key: value[0] for key, value in batch.items()}] * 2)
    assert trainer.evaluate(trainer.train_dataset)["eval_loss"] == pytest.approx(model(**batch).loss.item(), rel=1e-5)


def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    write_tiny(tmp_path / "tiny.gguf")
    with pytest.raises(InputError, match="cannot be held in 4 or 8 bits"):
        CausalLM().load_model(tmp_path / "tiny.gguf", quantization_config=BitsAndBytesConfig(load_in_4bit=True))
    writer = gguf.GGUFWriter(
        tmp_path / "other.gguf", "clip"
    )  # the part of a model that reads images, which lies beside it
    writer.add_block_count(1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    whole = (tmp_path / "tiny.gguf").read_bytes()
    for name, content, words in (
        ("other", None, "clip.*name the directory of the model that it was made from"),
        ("half", whole[: len(whole) // 2], "copy or download it again"),
        ("empty", b"", "copy or download it again"),
        ("pointer", b"version https://git-lfs.github.com/spec/v1\n", "copy or download it again"),
    ):
        if content is not None:
            (tmp_path / f"{name}.gguf").write_bytes(content)
        with pytest.raises(InputError, match=words):
            load_config(str(tmp_path / f"{name}.gguf"))
