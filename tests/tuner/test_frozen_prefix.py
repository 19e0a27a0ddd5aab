"""What is kept of the frozen layers, for which examples, and that a forward pass above it is the model's own."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from reltune.tuner.frozen_prefix import (
    TOLD,
    FrozenPart,
    FrozenPrefix,
    Identifying,
    Identity,
    Unsuited,
    frozen_blocks,
    identified,
)
from reltune.tuner.kept_states import KeptStates

SIZES = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
WIDE = {**SIZES, "intermediate_size": 24, "max_position_embeddings": 40}
DECODER = {**WIDE, "num_key_value_heads": 1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
PATCHES = {"image_size": 8, "patch_size": 4, **{name: WIDE[name] for name in (*SIZES, "intermediate_size")}}
del PATCHES["vocab_size"]
MODELS: dict[str, Callable[[], nn.Module]] = {
    "Bert": lambda: classifier("Bert", **WIDE),
    "Roberta": lambda: classifier("Roberta", **WIDE, pad_token_id=0),
    "XLMRoberta": lambda: classifier("XLMRoberta", **WIDE, pad_token_id=0),
    "Camembert": lambda: classifier("Camembert", **WIDE, pad_token_id=0),
    "Electra": lambda: classifier("Electra", **WIDE, embedding_size=8),
    "DistilBert": lambda: classifier("DistilBert", vocab_size=50, dim=16, n_layers=3, n_heads=2, hidden_dim=24),
    "ModernBert": lambda: classifier("ModernBert", **WIDE, pad_token_id=0),
    "Llama": lambda: decoder("Llama", **DECODER),
    "Mistral": lambda: decoder("Mistral", **DECODER),
    "Qwen2": lambda: decoder("Qwen2", **DECODER, tie_word_embeddings=True),
    "Qwen3": lambda: decoder("Qwen3", **DECODER, head_dim=8),
    "SmolLM3": lambda: decoder("SmolLM3", **DECODER),
    "Gemma": lambda: decoder("Gemma", **DECODER, head_dim=8),
    "Phi3": lambda: decoder("Phi3", **DECODER),
    "GPT2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=50, n_embd=16, n_layer=3, n_head=2, n_positions=40)
    ),
    "GPTNeoX": lambda: decoder("GPTNeoX", **WIDE),
    "ViT": lambda: pictures("ViT"),
    "DeiT": lambda: pictures("DeiT"),
    "Dinov2": lambda: pictures("Dinov2"),
}


def classifier(name: str, **sizes: int) -> nn.Module:
    config = getattr(transformers, f"{name}Config")(**sizes)
    return getattr(transformers, f"{name}ForSequenceClassification")(config)


def decoder(name: str, **sizes: int) -> nn.Module:
    return getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**sizes))


def pictures(name: str) -> nn.Module:
    config = getattr(transformers, f"{name}Config")(**PATCHES)
    return getattr(transformers, f"{name}ForImageClassification")(config)


def top_trained(model: nn.Module, layers: int = 1) -> nn.Module:
    """The model with its top layers and what is above them free."""
    model.requires_grad_(False)
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == 3]
    for block in list(lists[0])[3 - layers :]:
        block.requires_grad_(True)
    return model


def texts(lengths: list[int], width: int, seed: int = 0, left: bool = False) -> dict[str, Tensor]:
    """Token ids of these lengths, padded to a width."""
    ids = torch.zeros(len(lengths), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, length in enumerate(lengths):
        columns = slice(width - length, width) if left else slice(0, length)
        ids[i, columns] = torch.randint(3, 50, (length,), generator=torch.Generator().manual_seed(seed + i))
        mask[i, columns] = 1
    return {"input_ids": ids, "attention_mask": mask}


def images(count: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(0))}


def one_of(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    mask = batch.get("attention_mask")
    return {name: x[:1] if mask is None else x[:1, mask[0].bool()] for name, x in batch.items()}


def rows(batch: dict[str, Tensor], wanted: list[int]) -> dict[str, Tensor]:
    return {name: x[wanted] for name, x in batch.items()}


@contextlib.contextmanager
def caching(model: nn.Module, batch: dict[str, Tensor], place: Path, limit: int = 10**6) -> Iterator[FrozenPrefix]:
    part = FrozenPart(model, one_of(batch))
    kept = KeptStates(place / "kept", part.width, part.dtype, limit, part.origin())
    prefix = FrozenPrefix(part, kept)
    with prefix.installed():
        yield prefix
    kept.close()


def passed(prefix: FrozenPrefix, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    with prefix.batch(identified(batch)):
        return model(**batch).logits


@pytest.mark.parametrize("name", MODELS)
def test_a_later_pass_gives_what_the_model_gives(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = top_trained(MODELS[name]()).eval()
    batch = images(4) if name in ("ViT", "DeiT", "Dinov2") else texts([7, 7, 7, 7], 7)
    plain = model(**batch).logits
    gradient = torch.autograd.grad(
        plain.square().sum(), [p for p in model.parameters() if p.requires_grad], allow_unused=True
    )
    with caching(model, batch, tmp_path) as prefix:
        assert (prefix.part.depth, prefix.part.of) == (2, 3)
        assert torch.equal(passed(prefix, model, batch), plain)
        assert (prefix.read, prefix.computed) == (0, 4)
        block = prefix.part.frozen[0]
        broken = [p.detach().clone() for p in block.parameters()]
        with torch.no_grad():
            for p in block.parameters():
                p.zero_()  # a later pass does not look at it
        shuffled = rows(batch, [2, 0, 3, 1])
        again = passed(prefix, model, shuffled)
        assert (prefix.read, prefix.computed) == (4, 4)
        with torch.no_grad():
            for p, was in zip(block.parameters(), broken, strict=True):
                p.copy_(was)
    assert torch.allclose(again, plain[[2, 0, 3, 1]], rtol=0, atol=2e-6)
    own = torch.autograd.grad(
        again.square().sum(), [p for p in model.parameters() if p.requires_grad], allow_unused=True
    )
    for one, other in zip(gradient, own, strict=True):
        assert (one is None) == (other is None) and (one is None or torch.allclose(one, other, rtol=1e-4, atol=1e-5))
    assert torch.equal(model(**batch).logits, plain)  # everything is as it was


@pytest.mark.parametrize("name", ["Bert", "Roberta", "Llama", "GPT2"])
def test_other_padding_and_other_company(name: str, tmp_path: Path) -> None:
    """Examples come back in longer and shorter batches, some of them not kept: near what the model gives for the batch itself."""
    torch.manual_seed(0)
    model = top_trained(MODELS[name]()).eval()
    model.config.pad_token_id = 0
    lengths = [3, 9, 5, 12, 1, 7]
    batch = texts(lengths, 12)
    with caching(model, batch, tmp_path) as prefix:
        first = rows(batch, [0, 1, 2])
        passed(prefix, model, {key: x[:, :9] for key, x in first.items()})
        for wanted, width, computed in (([1, 2, 0], 9, 0), ([0, 2], 5, 0), ([3, 0, 5], 12, 2), ([5, 4, 1, 3], 20, 1)):
            some = {key: nn.functional.pad(x[wanted], (0, 8))[:, :width] for key, x in batch.items()}
            before = prefix.computed
            given = passed(prefix, model, some)
            assert prefix.computed - before == computed
            plain = model(**some).logits
            real = some["attention_mask"].bool() if name in ("Llama", "GPT2") else slice(None)
            assert torch.allclose(given[real], plain[real], rtol=0, atol=2e-6)


def test_padding_on_the_left_counts_where_positions_do(tmp_path: Path) -> None:
    """GPT-2 counts positions from the first column, so that the same text behind more padding is another example."""
    model = top_trained(MODELS["GPT2"]()).eval()
    batch = texts([4, 6], 6, left=True)
    wider = texts([4, 6], 9, left=True)
    with caching(model, batch, tmp_path) as prefix:
        for each in (batch, wider, batch):
            given, plain = passed(prefix, model, each), model(**each).logits
            assert torch.allclose(given[each["attention_mask"].bool()], plain[each["attention_mask"].bool()], atol=2e-6)
        assert (prefix.read, prefix.computed) == (2, 4)


def test_a_model_without_trained_layers_begins_above_all_of_them(tmp_path: Path) -> None:
    model = top_trained(MODELS["Bert"](), layers=0).eval()
    model.classifier.requires_grad_(True)
    batch = texts([5, 5], 5)
    plain = model(**batch).logits
    with caching(model, batch, tmp_path) as prefix:
        assert prefix.part.depth == 3
        passed(prefix, model, batch)
        assert torch.equal(passed(prefix, model, batch), plain) and prefix.read == 2


def test_dropout_is_off_below_and_on_above(tmp_path: Path) -> None:
    model = top_trained(MODELS["Bert"](), layers=2)
    batch = texts([5, 6], 6)
    below = [model.bert.embeddings, model.bert.encoder.layer[0]]
    with caching(model, batch, tmp_path) as prefix:
        assert prefix.part.draws
        for _ in range(2):
            model.train()
            torch.manual_seed(3)
            given = passed(prefix, model, batch)
            for module in below:
                assert not any(part.training for part in module.modules())
            assert model.bert.encoder.layer[1].training and model.dropout.training
    for _ in range(2):
        model.train()
        for module in below:
            module.eval()
        torch.manual_seed(3)
        assert torch.equal(model(**batch).logits, given)
    model.train()
    assert all(module.training for module in model.modules())
    assert not FrozenPart(top_trained(MODELS["Llama"]()), one_of(batch)).draws


def test_checkpointed_layers_get_their_gradient(tmp_path: Path) -> None:
    """Also where checkpoints re-enter autograd, which takes an input that requires a gradient."""
    base = MODELS["Llama"]()
    model = get_peft_model(
        base, LoraConfig(target_modules=["q_proj"], layers_to_transform=[2], init_lora_weights=False)
    )
    batch = texts([6, 6], 6)
    trained = [p for p in model.parameters() if p.requires_grad]
    wanted = torch.autograd.grad(model(**batch).logits.square().mean(), trained)
    for reentrant in (False, True):
        base.gradient_checkpointing_enable({"use_reentrant": reentrant})
        base.enable_input_require_grads()
        model.train()
        with caching(model, batch, tmp_path / str(reentrant)) as prefix:
            for _ in range(2):
                for p in trained:
                    p.grad = None
                passed(prefix, model, batch).square().mean().backward()
                for p, gradient in zip(trained, wanted, strict=True):
                    assert torch.allclose(p.grad, gradient, rtol=1e-5, atol=1e-9)
        base.disable_input_require_grads()


def test_bfloat16_is_kept_to_the_bit(tmp_path: Path) -> None:
    model = top_trained(MODELS["Llama"]()).to(torch.bfloat16).eval()
    batch = texts([6, 6], 6)
    with caching(model, batch, tmp_path) as prefix:
        given = [passed(prefix, model, batch) for _ in range(2)]
        assert prefix.part.dtype == torch.bfloat16 and prefix.read == 2 and torch.equal(*given)


def test_a_model_without_a_head_is_looked_at_too() -> None:
    model = top_trained(transformers.BertModel(transformers.BertConfig(**WIDE)))
    part = FrozenPart(model, texts([3], 3))
    assert (part.depth, part.of, part.body) == (2, 3, model)


def test_what_cannot_be_computed_once() -> None:
    t5 = transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=2, num_heads=2)
    )
    with pytest.raises(Unsuited, match="T5ForConditionalGeneration is not among"):
        frozen_blocks(t5.requires_grad_(False))
    with pytest.raises(Unsuited, match="the lowest layer is trained"):
        frozen_blocks(MODELS["Bert"]())
    model = top_trained(MODELS["Bert"]())
    model.bert.embeddings.LayerNorm.bias.requires_grad_(True)
    with pytest.raises(Unsuited, match="the embeddings are trained"):
        FrozenPart(model, texts([3], 3))


def test_examples_are_told_apart_by_all_that_the_model_reads() -> None:
    batch = {**texts([3, 5], 5), "token_type_ids": torch.zeros(2, 5, dtype=torch.long)}
    keys = identified(batch).keys
    assert keys[0] != keys[1]
    wider = {name: nn.functional.pad(x, (0, 4)) for name, x in batch.items()}
    assert identified(wider).keys == keys and identified(rows(wider, [1, 0])).keys == keys[::-1]
    padded = {**wider, "input_ids": wider["input_ids"] + 7 * (1 - wider["attention_mask"])}
    assert identified(padded).keys == keys  # whatever stands at padding
    for name in ("input_ids", "token_type_ids", "attention_mask"):
        other = {key: x.clone() for key, x in batch.items()}
        other[name][0, 1] = 1 - other[name][0, 1]
        assert identified(other).keys[0] != keys[0] and identified(other).keys[1] == keys[1]


def test_what_is_no_row_of_tokens_is_looked_at_whole() -> None:
    """Of an example that may have several labels, shorter than the text as it is, none is padding."""
    batch = {**texts([3, 5], 5, left=True), "labels": torch.eye(2)}
    other = {**batch, "labels": torch.tensor([[1.0, 1.0], [0.0, 1.0]])}
    before, after = identified(batch).keys, identified(other).keys
    assert before[0] != after[0] and before[1] == after[1]


def test_a_collator_tells_what_its_batch_is() -> None:
    batch = Identifying(lambda items: {"input_ids": torch.tensor(items)})([[1, 2], [3, 4]])
    assert batch.pop(TOLD).keys == identified(batch).keys and batch["input_ids"].tolist() == [[1, 2], [3, 4]]


def test_the_file_holds_what_fits_and_is_taken_up_again(tmp_path: Path) -> None:
    keys = [bytes([i]) * 16 for i in range(4)]
    states = torch.randn(10, 3)
    kept = KeptStates(tmp_path / "kept", 3, torch.float32, 7 * 12 + 5, "model")
    kept.put(keys[:3], [2, 4, 3], states[:9])
    assert kept.full == "limit" and kept.size == 72 and keys[2] not in kept
    assert torch.equal(kept.get([keys[1], keys[0]]), torch.cat([states[2:6], states[:2]]))
    kept.save()
    kept.put(keys[3:], [1], states[9:])  # not in the index
    kept.close()
    again = KeptStates(tmp_path / "kept", 3, torch.float32, 7 * 12, "model")
    assert list(again.places) == keys[:2] and torch.equal(again.get([keys[1]]), states[2:6])
    again.put([keys[3]], [1], states[9:])
    assert torch.equal(again.get([keys[3], keys[0]]), torch.cat([states[9:], states[:2]]))
    again.close()
    less = KeptStates(tmp_path / "kept", 3, torch.float32, 4 * 12, "model")
    assert list(less.places) == keys[:1] and torch.equal(less.get([keys[0]]), states[:2])
    less.close()
    for origin, dtype in (("another model", torch.float32), ("model", torch.bfloat16)):
        other = KeptStates(tmp_path / "kept", 3, dtype, 84, origin)
        assert not other.places
        other.close()


def test_a_full_disk_keeps_what_was_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys, states = [bytes([i]) * 16 for i in range(3)], torch.randn(6, 3)
    kept = KeptStates(tmp_path / "kept", 3, torch.float32, 600, "model")
    write = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, data, place: write(file, data[:5], place))  # a few bytes at a time
    kept.put(keys[:1], [2], states[:2])
    assert torch.equal(kept.get(keys[:1]), states[:2]) and not kept.full

    def fails(number: int) -> Callable[..., int]:
        def pwrite(*_: object) -> int:
            raise OSError(number, os.strerror(number))

        return pwrite

    monkeypatch.setattr(os, "pwrite", fails(errno.EIO))
    with pytest.raises(OSError, match="Input/output error"):
        kept.put(keys[1:2], [2], states[2:4])
    monkeypatch.setattr(os, "pwrite", fails(errno.ENOSPC))
    kept.put(keys[1:2], [2], states[2:4])
    assert kept.full == "disk" and kept.size == 24 and keys[1] not in kept
    monkeypatch.setattr(os, "pwrite", write)
    kept.put(keys[2:], [2], states[4:])  # nothing more is tried
    assert keys[2] not in kept and torch.equal(kept.get(keys[:1]), states[:2])
    with pytest.raises(TypeError, match="and those that are kept"):
        kept.put(keys[2:], [2], states[4:].double())
    kept.close()


def test_states_that_do_not_fit_are_computed_each_time(tmp_path: Path) -> None:
    model = top_trained(MODELS["Bert"]()).eval()
    batch = texts([6, 6, 6, 6], 6)
    plain = model(**batch).logits
    with caching(model, batch, tmp_path, limit=2 * 6 * 16 * 4) as prefix:
        for _ in range(2):
            assert torch.allclose(passed(prefix, model, batch), plain, atol=2e-6)
        assert (prefix.read, prefix.computed) == (2, 6) and prefix.kept.size == 768
    with caching(model, batch, tmp_path / "none", limit=0) as prefix:
        for _ in range(2):
            assert torch.equal(passed(prefix, model, batch), plain)
        assert (prefix.read, prefix.computed) == (0, 8)


def test_the_origin_follows_the_frozen_weights_alone() -> None:
    model = top_trained(MODELS["Bert"]())
    one = one_of(texts([4], 4))
    before = FrozenPart(model, one).origin()
    with torch.no_grad():
        model.bert.encoder.layer[2].output.dense.weight.zero_()
    assert FrozenPart(model, one).origin() == before
    with torch.no_grad():
        model.bert.encoder.layer[1].output.dense.weight.zero_()
    assert FrozenPart(model, one).origin() != before


def test_an_identity_stays_on_the_cpu() -> None:
    from accelerate.utils import send_to_device

    identity = identified(texts([2], 2))
    moved = send_to_device({"x": torch.zeros(1), "told": identity}, "meta")
    assert moved["x"].is_meta and moved["told"] is identity and isinstance(identity, Identity)
