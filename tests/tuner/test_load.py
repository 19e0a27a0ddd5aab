"""Many adapters on one base, switched by many threads, and memory that stays where it is."""

from __future__ import annotations

import gc
import random
import threading
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import TrainerCallback

from reltune.plan.plan import ModulePlan, Plan
from reltune.runs import training
from reltune.tasks.sequence_classification import SequenceClassification
from reltune.tasks.task import Examples
from reltune.tuner import ReltuneConfig

SIZE = 8
SLACK = 64 << 10  # bytes that Python's own tables may take


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(SIZE, SIZE), nn.Linear(SIZE, SIZE)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        y = self.second(torch.tanh(self.first(x)))
        return y if labels is None else {"loss": y.square().mean(), "logits": y}


def config(number: int) -> ReltuneConfig:
    """Columns of one map and single weights of the other, other ones for each number."""
    places = random.Random(number).sample(range(SIZE * SIZE), 5)
    modules = {
        "first": ModulePlan((SIZE, SIZE), columns=sorted({number % SIZE, (number + 3) % SIZE})),
        "second": ModulePlan((SIZE, SIZE), elements=sorted(places)),
    }
    return ReltuneConfig(plan=Plan(modules, "all", 9999, 9999, ""), init_weights=False)


def with_adapters(*numbers: int) -> PeftModel:
    torch.manual_seed(0)
    model = get_peft_model(Base(), config(numbers[0]), adapter_name=f"a{numbers[0]}")
    for number in numbers[1:]:
        model.add_adapter(f"a{number}", config(number))
    generator = torch.Generator().manual_seed(numbers[0] + 1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "reltune" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator))
    return model.eval()


def tensors() -> int:
    gc.collect()
    return sum(isinstance(one, Tensor) for one in gc.get_objects())


X = torch.randn(4, SIZE, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(
    ("count", "switches"),
    [(24, 400), pytest.param(1000, 20_000, marks=pytest.mark.slow)],
    ids=["few", "a thousand adapters"],
)
def test_no_answer_is_another_adapters(tmp_path: Path, count: int, switches: int) -> None:
    """Saved, listed, loaded, and switched by eight threads that hold a lock around a switch and its answer."""
    expected = {}
    for number in range(count):  # on a base of its own each, which no other adapter was ever on
        single = with_adapters(number)
        single.save_pretrained(str(tmp_path))
        with torch.no_grad():
            expected[f"a{number}"] = single(X)
    names = sorted(path.parent.name for path in tmp_path.glob("*/adapter_config.json"))
    assert names == sorted(expected)
    assert len({tuple(one.flatten().tolist()) for one in expected.values()}) == count
    torch.manual_seed(0)
    model = PeftModel.from_pretrained(Base(), str(tmp_path / names[0]), adapter_name=names[0])
    for name in names[1:]:
        model.load_adapter(str(tmp_path / name), adapter_name=name)
    model.eval()
    lock, wrong, answered = threading.Lock(), [], []

    def serve(number: int) -> None:
        draw = random.Random(number)
        with torch.no_grad():
            for _ in range(switches // 8):
                name = draw.choice(names)
                with lock:
                    model.set_adapter(name)
                    answer = model(X)
                if not torch.allclose(answer, expected[name], rtol=0, atol=1e-6):
                    wrong.append(name)
                answered.append(name)

    threads = [threading.Thread(target=serve, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and len(answered) == switches
    with torch.no_grad():  # a batch that mixes adapters needs no switch
        for start in range(0, count, 100):
            some = [*names[start : start + 20], "__base__"]
            rows = X[:1].repeat(len(some), 1)
            mixed = model(rows, adapter_names=some)
            for row, name in enumerate(some[:-1]):
                torch.testing.assert_close(mixed[row], expected[name][0], rtol=0, atol=1e-6)
            with model.disable_adapter():
                torch.testing.assert_close(mixed[-1], model(X)[0], rtol=0, atol=1e-6)


def test_memory_is_flat_over_switches() -> None:
    model = with_adapters(*range(10))

    def switch(times: int) -> None:
        with torch.no_grad():
            for number in range(times):
                model.set_adapter(f"a{number % 10}")
                model(X)

    switch(50)
    before = tensors()
    tracemalloc.start()
    try:
        switch(20)
        gc.collect()
        first, _ = tracemalloc.get_traced_memory()
        switch(200)
        gc.collect()
        last, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert tensors() == before
    assert last - first < SLACK


class Counted(TrainerCallback):
    """How many tensors there are, and bytes of Python, at some steps."""

    def __init__(self, *steps: int) -> None:
        self.steps, self.found = steps, dict[int, tuple[int, int]]()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.steps[0] // 2:
            tracemalloc.start()
        if state.global_step in self.steps:
            count = tensors()
            self.found[state.global_step] = count, tracemalloc.get_traced_memory()[0]


@pytest.mark.slow
def test_memory_is_flat_over_two_thousand_steps(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = get_peft_model(Base(), config(0))
    task = SequenceClassification(["a", "b"])
    task.collator = lambda processor: (
        lambda items: {  # type: ignore[method-assign]
            "x": torch.tensor([item["x"] for item in items]),
            "labels": torch.tensor([item["labels"] for item in items]),
        }
    )
    items = Examples([{"x": [float(n % 7), 1.0, -1.0, *[0.5] * (SIZE - 3)], "labels": 0} for n in range(64)])
    given = {
        **{"eval_strategy": "no", "save_strategy": "no", "max_steps": 2000, "use_cpu": True, "logging_strategy": "no"},
        **{"per_device_train_batch_size": 8, "label_names": ["labels"], "remove_unused_columns": False},
    }
    args = training.arguments(str(tmp_path), "selection", 0, given, task)
    counted = Counted(400, 2000)
    try:
        training.train(model, args, task, None, items, callbacks=[counted])
    finally:
        tracemalloc.stop()
    (before, bytes_before), (after, bytes_after) = counted.found[400], counted.found[2000]
    assert after == before
    assert bytes_after - bytes_before < 4 * SLACK  # 1,600 times that steps took are among them
