"""Make the artefacts in this folder with the code of reltune 0.1.

Run it in an empty directory, with the folders ``src`` and ``tests`` of commit 8045d13 on PYTHONPATH, and copy what it
leaves there. All paths that the artefacts name are relative to that directory.
"""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from reltune.comparison import compare
from reltune.materials import prepare
from reltune.run_directory import RunDirectory
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from command_line import reltune, review_rows, write_csv
from reltune import run as stages
from reltune.plan import plan as plan_file
from reltune.relevance.scores import RelevanceScores
from tiny_models import save_tiny_bert, save_tiny_llama

CRITERIA = "fisher,magnitude,taylor,ablation,correlation,movement"
ROWS = [[2, 4, 6, 9, 3], [2, 5, 7, 10, 3], [2, 8, 4, 11, 3]]  # token ids


def call(*words: object) -> None:
    answer = reltune(*words)
    assert answer.code == 0, answer


def numbers_of(relevance: RelevanceScores) -> dict[str, Any]:
    """By criterion, granularity and name: the sum of a name's units and the first three of them."""
    scores: dict[str, Any] = {}
    for criterion in relevance.criteria:
        of_criterion = scores[criterion] = {}
        for granularity in ("layer", "module", "head", "column", "row", "element", "bias", "norm"):
            for name, values in relevance.by(granularity, criterion).items():
                values = values.double().reshape(-1)
                numbers = [float(f"{value:.7g}") for value in (values.sum().item(), *values[:3].tolist())]
                of_criterion.setdefault(granularity, {})[name] = numbers
    return scores


def expectations(run: Path, model: Any) -> dict[str, Any]:
    """What the old code reads from a run: relevance, and logits of ``ROWS`` without and with the adapter."""
    if (run / "relevance" / "head.safetensors").exists():
        model.load_state_dict(load_file(run / "relevance" / "head.safetensors"), strict=False)
    tuned = PeftModel.from_pretrained(model, str(run / "adapter")).eval()
    with torch.no_grad():
        logits = tuned(input_ids=torch.tensor(ROWS)).logits
        with tuned.disable_adapter():
            base = tuned(input_ids=torch.tensor(ROWS)).logits
    scores = numbers_of(RelevanceScores.load(run / "relevance"))
    return {"relevance": scores, "base_logits": base.tolist(), "tuned_logits": logits.tolist()}


def interrupted(batches: Any) -> Iterator[Any]:
    for index, batch in enumerate(batches):
        if index == 1:
            signal.raise_signal(signal.SIGINT)  # the analysis still counts this batch, and then keeps its sums
        yield batch


def make() -> None:
    torch.set_num_threads(1)
    save_tiny_bert("bert", hidden=16, intermediate=32)
    save_tiny_llama("llama", hidden_size=16, intermediate_size=32)
    for place in ("bert", "llama"):  # with weights of ±0.02 all texts look alike
        weights = load_file(f"{place}/model.safetensors")
        weights = {name: 8 * weight if weight.ndim == 2 else weight for name, weight in weights.items()}
        save_file(weights, f"{place}/model.safetensors", metadata={"format": "pt"})
    write_csv(Path("reviews.csv"), review_rows(60))
    opposites = [("good", "bad"), ("great", "dull"), ("fine", "poor"), ("very good", "very bad")] * 10
    lines = (json.dumps({"prompt": first, "completion": f" {second}"}) for first, second in opposites)
    Path("opposites.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    bert = ["--model_name_or_path", "bert", "--train_file", "reviews.csv", "--head_epochs", 4]

    # Columns and norms of a classifier, by one of six criteria, with the baselines beside it and a checkpoint half-way.
    chosen = ["--granularity", "column,norm", "--budget", "5%", "--max_trials", 60, "--probe_steps", 5]
    trained = ["--max_steps", 24, "--save_steps", 12, "--save_strategy", "steps", "--save_total_limit", 2]
    trained += ["--learning_rate", 3e-2, "--per_device_train_batch_size", 8]
    call("run", *bert, "--output_dir", "columns", "--criteria", CRITERIA, *chosen, *trained)
    materials, run = prepare(RunDirectory.open("columns")[1]), RunDirectory("columns")
    compare(materials, run, json.loads(run.results.read_text(encoding="utf-8")))
    shutil.rmtree("columns/checkpoint-24")
    Path("columns/checkpoint-12/training_args.bin").unlink()  # a pickle that nothing reads

    # Single weights and biases, in a file beside the plan, the best of two learning rates.
    plan_file.INLINE_INDICES = 10
    chosen = ["--granularity", "element,bias", "--budget", "3%", "--sweep", "learning_rate=1e-3,3e-2"]
    call("run", *bert, "--output_dir", "elements", "--criteria", "fisher,taylor", *chosen, "--max_steps", 8)
    for checkpoint in Path("elements").rglob("checkpoint-*"):
        shutil.rmtree(checkpoint)

    # Rows and columns of a language model, and the same as a LoRA adapter.
    llama = ["--model_name_or_path", "llama", "--train_file", "opposites.jsonl", "--output_dir", "language"]
    chosen = ["--granularity", "column,row", "--budget", "4%", "--max_steps", 6, "--learning_rate", 1e-2]
    call("run", *llama, *chosen, "--save_strategy", "no", "--max_new_tokens", 6)
    call("export", "language", "--to", "lora", "--output_dir", "language_lora")

    # An analysis that Ctrl-C ended after two of its batches.
    loader = stages.DataLoader
    stages.DataLoader = lambda *given, **options: interrupted(loader(*given, **options))
    analysis = ["analyze", *bert, "--output_dir", "interrupted", "--analysis_batch_size", 8]
    answer = reltune(*analysis)
    assert answer.code == 130, answer
    stages.DataLoader = loader
    shutil.copytree("interrupted", "kept")
    call(*analysis)
    expected: dict[str, Any] = {"interrupted": {"relevance": numbers_of(RelevanceScores.load("interrupted/relevance"))}}
    shutil.rmtree("interrupted")
    shutil.move("kept", "interrupted")

    for name, kind, base in (
        ("columns", AutoModelForSequenceClassification, "bert"),
        ("elements", AutoModelForSequenceClassification, "bert"),
        ("language", AutoModelForCausalLM, "llama"),
    ):
        expected[name] = expectations(Path(name), kind.from_pretrained(base))
    Path("expected.json").write_text(json.dumps(expected) + "\n", encoding="utf-8")
    for report in Path().glob("*/report.html"):  # megabytes of a drawing library; whoever reads a run draws it anew
        report.unlink()


if __name__ == "__main__":
    make()
