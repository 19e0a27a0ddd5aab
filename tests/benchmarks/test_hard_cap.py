"""The benchmark's training on a GPU, here on a CPU: which limit it sets, and what the record says of each case."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import hard_cap
from reltune.cost.memory import CONTEXT
from reltune.runs import halving, training

TOTAL, TINY = 80 << 30, hard_cap.SIZES["tiny"]


@pytest.fixture
def fractions(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    set_to: list[float] = []
    for name in ("max_memory_reserved", "memory_reserved"):
        monkeypatch.setattr(torch.cuda, name, lambda: 2 << 30)
    found_free = itertools.cycle([TOTAL - (1 << 30), TOTAL - (3 << 30)])  # before the training, and after it
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (next(found_free), TOTAL))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", set_to.append)
    return set_to


def test_the_allocator_gets_the_budget_less_the_context(
    fractions: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = hard_cap.worker("ViT, LoRA", TINY, device="h100-80gb")
    assert found["code"] == 0 and not found["halved"]
    assert fractions == [(found["budget_bytes"] - CONTEXT) / TOTAL]
    assert (
        0.98 * found["budget_bytes"] < found["predicted_bytes"] <= found["budget_bytes"] < found["without_limit_bytes"]
    )
    assert found["context_bytes"] == 1 << 30 and found["measured_bytes"] == 3 << 30
    monkeypatch.setattr(
        torch.cuda, "mem_get_info", lambda: (TOTAL - (3 << 30), TOTAL)
    )  # another process is there: whose memory it is cannot be told
    control = hard_cap.worker("ViT, LoRA", TINY, control=found["budget_bytes"])
    assert control["code"] == 0 and fractions == [fractions[0]] * 2
    assert control["context_bytes"] is None and control["measured_bytes"] is None


def test_what_does_not_fit_is_no_success(fractions: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    step, failed = training.Trainer.training_step, []

    def once_too_much(*given: Any, **options: Any) -> Any:
        if not failed:
            failed.append(True)
            raise torch.OutOfMemoryError("no more")
        return step(*given, **options)

    monkeypatch.setattr(training.Trainer, "training_step", once_too_much)
    found = hard_cap.worker("ViT, LoRA", TINY, control=2 << 30)
    assert found["code"] == 0 and found["halved"]  # training went on, with half of a batch at a time
    monkeypatch.setattr(training, "train", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("no more")))
    found = hard_cap.worker("ViT, LoRA", TINY, control=2 << 30)
    assert found["code"] == 1 and "no more" in found["said"]
    assert hard_cap.HALVED in Path(halving.__file__).read_text(encoding="utf-8")


def test_each_case_has_the_stamp_of_its_own_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[str] = []

    def found(name: str, size: str) -> dict[str, Any]:
        if len(begun) == 2:
            raise KeyboardInterrupt
        begun.append(name)
        return {"code": 0, "halved": False}

    monkeypatch.setattr(hard_cap, "on_gpu", found)
    monkeypatch.setattr(hard_cap, "hardware", lambda device: {"gpu": str(device)})
    path = tmp_path / "record.json"
    for given in ("first", "second"):
        words = ["hard_cap", "--device", "cuda", "--out", str(path), "--commit", given]
        monkeypatch.setattr(sys, "argv", words if given == "first" else [*words, "--only", "Llama, LoRA"])
        if given == "first":
            with pytest.raises(KeyboardInterrupt):
                hard_cap.main()
            begun.clear()
        else:
            assert hard_cap.main() == 0
    cases = json.loads(path.read_text(encoding="utf-8"))["cases"]
    assert [(case["case"], case["commit"]) for case in cases] == [
        ("BERT, LoRA", "first"),
        ("BERT, all weights", "first"),
        ("Llama, LoRA", "second"),
    ]
    assert all(case["hardware"] == {"gpu": "cuda"} and case["versions"]["torch"] for case in cases)


def test_a_case_is_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[list[str]] = []

    def run(words: list[str], **_: Any) -> Any:
        lines.append(words)
        out = json.dumps({"code": 0, "halved": len(lines) > 1, "said": "", "budget_bytes": 7})
        return subprocess.CompletedProcess(words, 0, f"a line of Trainer\n{out}\n", "")

    monkeypatch.setattr(subprocess, "run", run)
    found = hard_cap.on_gpu("ViT, LoRA", "tiny")
    assert [line[2:] for line in lines] == [
        ["--size", "tiny", "--worker", "ViT, LoRA"],
        ["--size", "tiny", "--worker", "ViT, LoRA", "--control", "7"],
    ]
    assert not found["halved"] and found["control"] == {"code": 0, "halved": True, "said": ""}
