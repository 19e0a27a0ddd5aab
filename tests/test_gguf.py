"""Models in llama.cpp's format."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest
import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, Trainer, TrainingArguments

from reltune.tasks.pretrained import as_it_is, load_model


def test_a_file_of_llama_cpp_is_loaded_as_the_plain_model_that_it_is(tmp_path: Path) -> None:
    """Trainer refuses to evaluate what it takes for a quantised model."""
    writer = gguf.GGUFWriter(tmp_path / "tiny.gguf", "llama")
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
    model, missing = load_model(
        str(tmp_path / "tiny.gguf"),
        AutoModelForCausalLM,
        MODEL_FOR_CAUSAL_LM_MAPPING,
        "head",
        as_it_is,
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
