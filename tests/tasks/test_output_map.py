"""The output map of a language model whose weights FSDP2 keeps in host memory, as TRL sees it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from transformers import LlamaConfig, LlamaForCausalLM

from measured_models import LANGUAGE_MODEL, made
from reltune.runs.training import arguments
from reltune.tasks import output_map
from reltune.tasks.causal_lm import CausalLM
from reltune.tasks.output_map import output_map_on
from reltune.tasks.preference import Preference
from reltune.tasks.task import Examples, Task
from tiny_models import tiny_tokenizer

GPU = torch.device("meta")  # another device than the shard's
TEXT = {"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}
PAIR = {"prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [4]}


def language_model() -> Any:
    return made(LlamaForCausalLM, LlamaConfig(**LANGUAGE_MODEL))


@pytest.fixture
def spread() -> Iterator[Any]:
    """A language model whose output map is the shard of one process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = language_model()
        whole = model.lm_head.weight.detach()
        model.lm_head.weight = nn.Parameter(distribute_tensor(whole, init_device_mesh("cpu", (1,)), [Shard(0)]))
        yield model
    finally:
        dist.destroy_process_group()


def test_a_shard_is_seen_on_the_device_and_gets_the_gradient(spread: Any) -> None:
    with output_map_on(spread, GPU):
        seen = spread.get_output_embeddings().weight
    assert isinstance(seen, DTensor) and seen.device.type == "meta"
    assert seen.grad_fn.next_functions[0][0].variable is spread.lm_head.weight
    assert spread.get_output_embeddings() is spread.lm_head


def test_what_is_in_its_place_is_left_there(spread: Any) -> None:
    for model, device in ((spread, torch.device("cpu")), (language_model(), GPU)):
        with output_map_on(model, device):
            assert model.get_output_embeddings() is model.lm_head


@pytest.mark.parametrize(("task", "item"), [(CausalLM(), TEXT), (Preference(), PAIR)], ids=["text", "preference"])
def test_the_steps_of_trl_see_it(task: Task, item: dict[str, Any], tmp_path: Path) -> None:
    values = {"per_device_train_batch_size": 2, "max_steps": 1, "use_cpu": True}
    args = arguments(str(tmp_path), "lora", 0, {**values, "save_strategy": "no", "eval_strategy": "no"}, task)
    model = get_peft_model(language_model(), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    trainer = task.trainer(model, args, tiny_tokenizer(), Examples([item] * 2))
    with (
        mock.patch.object(trainer, "_has_plain_loss", lambda: False, create=True),
        mock.patch.object(output_map, "output_map_on", side_effect=output_map_on) as seen,
    ):
        trainer.train()
    assert [call.args[1] for call in seen.call_args_list] == [torch.device("cpu")]
