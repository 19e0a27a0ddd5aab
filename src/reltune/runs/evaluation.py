"""Metrics on held-out data, and what inference costs."""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import Trainer
from transformers.trainer_pt_utils import find_batch_size

from reltune.runs.progress import show_progress
from reltune.runs.training import frozen_base
from reltune.tasks.task import Examples, Task, Written

DEFAULTS: dict[str, Any] = {
    "per_device_eval_batch_size": 64,
    "report_to": "none",
    "dataloader_pin_memory": False,
    "average_tokens_across_devices": False,  # else Trainer multiplies a mean loss by the number of processes
}


class Evaluation(NamedTuple):
    """Metrics by name, and by the prefix of a data set what the model wrote for its examples."""

    metrics: dict[str, float]
    written: dict[str, list[Written]]


def evaluate(
    model: nn.Module,
    datasets: Mapping[str, Examples],
    task: Task,
    processor: Any,
    generate: bool = True,
    **arguments: Any,
) -> Evaluation:
    """Loss and the task's metrics on each data set, keyed as transformers does: ``eval_loss``, ``test_accuracy``; and the
    texts that the metrics of what the model writes were computed from.

    ``datasets`` maps the prefix ("eval", "test") to the examples, ``arguments`` are fields of TrainingArguments. Run
    times are left out, because they say nothing of the model; without ``generate``, metrics of what the model writes are too.
    """
    evaluation = Evaluation({}, {})
    with tempfile.TemporaryDirectory() as scratch:
        args = task.make_arguments(output_dir=scratch, **{**DEFAULTS, **task.defaults, **arguments})
        for prefix, examples in datasets.items():
            with frozen_base(model):
                trainer = task.make_trainer(_counting_once(task.trainer_class), model, args, processor, examples)
            show_progress(trainer, f"evaluate {data_of(prefix)}")
            output = trainer.predict(examples, metric_key_prefix=prefix)
            metrics = {
                name: value
                for name, value in (output.metrics or {}).items()
                if not name.endswith(("_runtime", "_per_second", "_time"))
            }
            if math.isnan(metrics.get(f"{prefix}_loss", 0.0)):
                raise ArithmeticError(
                    f"the loss on {data_of(prefix)} is no number, so that the metrics would say nothing; train again with a lower "
                    "--learning_rate, or load the model in another type than float16."
                )
            if generate:
                written = task.written(model, examples, processor, args.per_device_eval_batch_size, output.predictions)
                metrics |= {f"{prefix}_{name}": value for name, value in task.written_metrics(written).items()}
                evaluation.written[prefix] = written
            evaluation.metrics.update(metrics, **{f"{prefix}_samples": len(examples)})
    return evaluation


def data_of(prefix: str) -> str:
    """What a bar calls the data of a prefix: "validation before training" for ``eval_before``."""
    name, _, when = prefix.partition("_")
    data = "validation" if name == "eval" else name
    return f"{data} {when} training" if when else data


def _counting_once(trainer_class: type[Trainer]) -> type[Trainer]:
    """A subclass that counts every example once in the mean loss.

    Trainer gives each of several processes equally many examples, and repeats some at the end for that. It leaves the
    repeated ones out of the metrics, but not out of the mean loss of their batch.
    """

    class Evaluator(trainer_class):  # type: ignore[valid-type, misc]
        def prediction_step(
            self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
        ) -> Any:
            loss, logits, labels = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
            state, size = self.accelerator.gradient_state, self.args.eval_batch_size
            if state.end_of_dataloader and state.remainder > 0:
                own = min(state.remainder - self.args.process_index * size, size)
                count = find_batch_size(inputs)
                if 0 < own < count:
                    some = {name: value[:own] if len(value) == count else value for name, value in inputs.items()}
                    loss = super().prediction_step(model, some, True, ignore_keys)[0]
            return loss, logits, labels

    return Evaluator


@torch.no_grad()
def inference_ms_per_text(
    models: Mapping[str, nn.Module],
    dataset: Any,
    collator: Any,
    texts: int = 96,
    batch_size: int = 32,
    rounds: int = 3,
) -> dict[str, float]:
    """Milliseconds per text of each model's forward pass: median over rounds in which the models take turns.

    Taking turns lets a machine whose speed drifts treat all of them alike. The first round warms up and is not counted.
    """
    some: Sequence[Any] = [dataset[i] for i in range(min(texts, len(dataset)))]
    device = next(next(iter(models.values())).parameters()).device
    batches = [
        {key: value.to(device) for key, value in batch.items() if key != "labels"}
        for batch in DataLoader(some, batch_size=batch_size, collate_fn=collator)  # type: ignore[arg-type]
    ]
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for model in models.values():
        model.eval()
    for _ in tqdm(range(rounds + 1), desc="time inference", unit="round"):
        for name, model in models.items():
            if device.type == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            for batch in batches:
                model(**batch)
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
    return {name: 1000 * statistics.median(times[1:]) / len(some) for name, times in seconds.items()}
