"""A training step of language models that computes no full logits, beside TRL's own step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

from reltune import ReltuneConfig
from reltune.layers.deferred_logits import DeferredLogits
from reltune.runs import training
from reltune.runs.training import LogFile, arguments, train
from reltune.tasks import sft_step
from reltune.tasks.causal_lm import CausalLM
from reltune.tasks.task import Examples
from tiny_models import tiny_tokenizer

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 14}
LLAMA = LlamaConfig(**SIZES, num_key_value_heads=1, tie_word_embeddings=False, eos_token_id=0, pad_token_id=0)
ADAPTERS = {
    "reltune": ReltuneConfig(target_modules=["q_proj", "down_proj"], r=3, task_type="CAUSAL_LM"),
    "lora": LoraConfig(target_modules=["q_proj", "down_proj"], r=3, task_type="CAUSAL_LM"),
}


def examples() -> Examples:
    generator = torch.Generator().manual_seed(0)
    items = []
    for length in (3, 9, 5, 7, 2, 9, 6, 4, 8, 3):
        ids = torch.randint(1, 14, (length,), generator=generator).tolist()
        labels = [-100] * (length // 2) + ids[length // 2 :]
        items.append({"input_ids": ids, "attention_mask": [1] * length, "labels": labels})
    return Examples(items)


def trained(
    model: Any, place: Path, packing: bool = False, offload: bool = False, **fields: Any
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """What a training logs, and the trained weights."""
    task = CausalLM(packing=packing, max_length=12)
    given = {
        "learning_rate": 1e-2,
        "logging_steps": 2,
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "use_cpu": True,
    }
    args = arguments(str(place), "lora", 0, {**given, "save_strategy": "no", **fields}, task)
    place.mkdir()
    callbacks = [LogFile(place / "log.jsonl")]
    train(model, args, task, tiny_tokenizer(), examples(), examples(), callbacks=callbacks, offload=offload)
    log = [json.loads(line) for line in (place / "log.jsonl").read_text().splitlines()]
    return log, {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("adapter", "fields"),
    [("reltune", {"gradient_accumulation_steps": 2}), ("lora", {"packing": True}), ("reltune", {"bf16": True})],
    ids=str,
)
def test_a_training_is_that_of_trl(adapter: str, fields: dict[str, Any], tmp_path: Path) -> None:
    found = []
    for ours in (True, False):
        torch.manual_seed(0)
        model = get_peft_model(LlamaForCausalLM(LLAMA), ADAPTERS[adapter])
        if ours:
            with (
                mock.patch.object(DeferredLogits, "computed", side_effect=AssertionError),
                mock.patch.object(DeferredLogits, "losses", autospec=True, side_effect=DeferredLogits.losses) as losses,
            ):
                found.append(trained(model, tmp_path / "ours", **fields))
            assert losses.call_count == (
                7 if "gradient_accumulation_steps" in fields else 4
            )  # five batches in an epoch
        else:
            with mock.patch.object(sft_step.SFTStep, "_has_plain_loss", lambda self: False):
                found.append(trained(model, tmp_path / "trl", **fields))
    (log, weights), (wanted_log, wanted) = found
    rounding = 2e-2 if "bf16" in fields else 1e-5
    for entry, other in zip(log, wanted_log, strict=True):
        assert entry.keys() == other.keys() and ("loss" not in entry or {"entropy", "num_tokens"} <= set(entry))
        for name in {"loss", "entropy", "mean_token_accuracy", "num_tokens", "grad_norm", "eval_loss"} & set(entry):
            assert entry[name] == pytest.approx(other[name], rel=rounding, abs=rounding), name
    for name, weight in weights.items():
        assert torch.allclose(weight, wanted[name], rtol=rounding, atol=rounding), name


class Questions(TorchDispatchMode):
    """Counts the operations whose result Python waits for, as a GPU would have to be asked for it."""

    ASKED = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default, torch.ops.aten.equal.default)

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self.ASKED:
            self.asked.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("lengths", [(9, 9), (9, 5)], ids=["all of one length", "padded"])
def test_a_step_asks_the_device_nothing(lengths: tuple[int, ...], attention: str, tmp_path: Path) -> None:
    items = [item for item in examples().items for length in lengths if len(item["input_ids"]) == length]
    assert {len(item["input_ids"]) for item in items} == set(lengths)
    step = sft_step.SFTStep.compute_loss
    asked = []

    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not self.model.training:
            return step(self, *args, **kwargs)
        with Questions() as questions:
            loss = step(self, *args, **kwargs)
            loss.backward(retain_graph=True)
        asked.append(questions.asked)
        return loss

    torch.manual_seed(0)
    model = get_peft_model(LlamaForCausalLM._from_config(LLAMA, attn_implementation=attention), ADAPTERS["reltune"])
    task, batch = CausalLM(max_length=12), {"per_device_train_batch_size": len(items), "max_steps": 2, "use_cpu": True}
    args = arguments(str(tmp_path), "lora", 0, {**batch, "save_strategy": "no"}, task)
    with mock.patch.object(sft_step.SFTStep, "compute_loss", watched):
        train(model, args, task, tiny_tokenizer(), Examples(items), examples())
    assert asked == [[], []]


def test_a_model_that_caps_its_logits_is_left_to_trl_after_one_step(tmp_path: Path) -> None:
    config = Gemma2Config(**SIZES, num_key_value_heads=1, head_dim=8, final_logit_softcapping=2.0, pad_token_id=0)
    torch.manual_seed(0)
    model = get_peft_model(Gemma2ForCausalLM(config), ADAPTERS["lora"])
    with mock.patch.object(sft_step, "defer", wraps=sft_step.defer) as defer:
        trained(model, tmp_path / "run")
    assert defer.call_count == 1


def test_activations_that_wait_elsewhere_train_the_same_weights(tmp_path: Path) -> None:
    """With a stand-in for the copies to the host's memory, of which a CPU has no other."""
    waiting: list[torch.Tensor] = []

    def away(kept: torch.Tensor) -> int:
        waiting.append(kept.clone())
        return len(waiting) - 1

    found = []
    for offload in (False, True):
        torch.manual_seed(0)
        model = get_peft_model(LlamaForCausalLM(LLAMA), ADAPTERS["reltune"])
        stand_in = torch.autograd.graph.saved_tensors_hooks(away, waiting.__getitem__)
        with mock.patch.object(training, "offloaded_activations", lambda model, hooks=stand_in: hooks):
            found.append(trained(model, tmp_path / f"{offload}", offload=offload, gradient_checkpointing=True)[1])
        assert bool(waiting) == offload
    kept = {tuple(tensor.shape) for tensor in waiting}
    assert all(torch.equal(found[0][name], weight) for name, weight in found[1].items())
    assert not any(SIZES["intermediate_size"] in shape for shape in kept)  # inside checkpointed layers nothing is kept
