"""What is measured before and after training, and what the models wrote: against plain models and plain loops."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from command_line import reltune, review_rows, write_csv
from reltune.config.run_config import RunConfig
from reltune.runs import stages
from reltune.runs.directory import RunDirectory
from reltune.runs.evaluation import evaluate
from reltune.runs.materials import prepare
from task_cases import write_rows
from tiny_models import save_tiny_bert, save_tiny_llama

OPPOSITES = {"good": "bad", "great": "dull", "fine": "poor", "好": "坏"}

# Greedy decoding by PEFT and Transformers alone: a prompt at a time, with no cache and no padding.
READER = """
import json, sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "reltune":
            raise ImportError("reltune is not here")

sys.meta_path.insert(0, Block())
import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

base, lora, prompts, tokens, out = json.loads(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(base)
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), lora).eval()
written, logits = [], {}
for place, prompt in enumerate(prompts):
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    found = model.generate(input_ids=ids, max_new_tokens=tokens, do_sample=False, use_cache=False)
    written.append(found[0, ids.shape[1]:].tolist())
    with torch.no_grad():
        logits[str(place)] = model(input_ids=found).logits
assert not any(name.partition(".")[0] == "reltune" for name in sys.modules)
save_file(logits, out)
print(json.dumps(written))
"""


def opposites(count: int) -> list[dict[str, str]]:
    """Prompts that end in two words, none twice; the completion their opposites."""
    draw, rows = random.Random(0), {}
    while len(rows) < count:
        words = draw.choices(list(OPPOSITES), k=2)
        others = draw.choices(["film", "book", "very"], k=draw.randint(1, 4))
        rows[" ".join([*others, *words])] = " " + " ".join(OPPOSITES[word] for word in words)
    return [{"prompt": prompt, "completion": completion} for prompt, completion in rows.items()]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder that writes different things already, tuned with columns and rows by the command line."""
    place = tmp_path_factory.mktemp("place")
    save_tiny_llama(place / "model", hidden_size=64, intermediate_size=128)
    model = AutoModelForCausalLM.from_pretrained(place / "model")
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            parameter.data.mul_(5)  # else one token is likeliest after any prompt
    model.save_pretrained(place / "model")
    answer = reltune(
        *("run", "--model_name_or_path", place / "model", "--output_dir", place / "run"),
        *("--train_file", write_rows(place / "train.jsonl", opposites(120)), "--max_new_tokens", 5),
        *("--granularity", "column,row", "--budget", "40%", "--learning_rate", 3e-3, "--num_train_epochs", 15),
        *("--per_device_train_batch_size", 8, "--generation_examples", 12, "--report_examples", 4),
    )
    assert answer.code == 0, answer.err
    (place / "out.txt").write_text(answer.out, encoding="utf-8")
    return place


def results_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "all_results.json").read_text(encoding="utf-8"))


def outputs_of(run: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (run / "outputs.jsonl").read_text(encoding="utf-8").split("\n") if line]


def test_the_base_is_measured_before(place: Path) -> None:
    """Against the model's files, one example at a time: its loss, and the likeliest token again and again."""
    model = AutoModelForCausalLM.from_pretrained(place / "model", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(place / "model")
    materials = prepare(RunConfig.load(place / "run" / "config.yaml"))
    results, outputs = results_of(place / "run"), outputs_of(place / "run")
    assert len(outputs) == results["test_generations"] == results["test_before_generations"] == 12
    for name, examples in materials.held_out.items():
        losses = []
        for item in examples.items:
            with torch.no_grad():
                logits = model(torch.tensor([item["input_ids"]])).logits[0, :-1].double()
            losses.append(F.cross_entropy(logits, torch.tensor(item["labels"][1:]), reduction="sum"))
        tokens = sum(label != -100 for item in examples.items for label in item["labels"][1:])
        perplexity = float(torch.exp(sum(losses) / tokens))
        assert results[f"{name}_before_perplexity"] == pytest.approx(perplexity, rel=1e-5)
        assert results[f"{name}_perplexity"] < perplexity / 2
        assert results[f"{name}_before_loss"] > results[f"{name}_loss"]
    rows = {row["prompt"]: row["completion"] for row in opposites(120)}
    for output, source in zip(outputs, materials.test.sources, strict=False):
        assert output["prompt"] == source.text and output["reference"] == rows[output["prompt"]]
        ids = list(source.ids)
        while len(ids) < len(source.ids) + 5 and ids[-1] != tokenizer.eos_token_id:
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        assert output["base"] == tokenizer.decode(ids[len(source.ids) :], skip_special_tokens=True)
    assert len({output["base"] for output in outputs}) > 3
    for name, key in (("test_before", "base"), ("test", "tuned")):
        right = [output[key].strip() == output["reference"].strip() for output in outputs]
        assert results[f"{name}_exact_match"] == pytest.approx(sum(right) / 12)
    assert results["test_exact_match"] > 0.5 > results["test_before_exact_match"]


def test_the_exported_lora_writes_the_same_in_plain_peft(place: Path) -> None:
    answer = reltune("export", place / "run", "--to", "lora", "--output_dir", place / "lora")
    assert answer.code == 0, answer.err
    plan = stages.Plan.load(place / "run" / "plan")
    assert any(module.columns for module in plan.modules.values())
    assert any(module.rows for module in plan.modules.values())
    outputs = outputs_of(place / "run")
    prompts = [output["prompt"] for output in outputs]
    words = [str(place / "model"), str(place / "lora"), prompts, 5, str(place / "logits.safetensors")]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", READER, json.dumps(words)],
        capture_output=True,
        text=True,
        env={**environment, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    written = json.loads(done.stdout)
    tokenizer = AutoTokenizer.from_pretrained(place / "model")
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in written]
    assert texts == [output["tuned"] for output in outputs] != [output["base"] for output in outputs]
    # every word is one token, so that equal texts are equal tokens up to where the model ends
    assert all(len(text.split()) in (len(ids), len(ids) - 1) for text, ids in zip(texts, written, strict=True))
    logits = load_file(place / "logits.safetensors")
    model = stages.load_tuned(
        prepare(RunConfig.load(place / "run" / "config.yaml")), RunDirectory(place / "run")
    ).eval()
    for i, (prompt, ids) in enumerate(zip(prompts, written, strict=True)):
        with torch.no_grad():
            found = model(input_ids=torch.tensor([tokenizer(prompt)["input_ids"] + ids])).logits
        assert (found - logits[str(i)]).abs().max() <= 1e-5


def test_the_report_shows_the_first_outputs(place: Path) -> None:
    page = (place / "run" / "report.html").read_text(encoding="utf-8")
    out = (place / "out.txt").read_text(encoding="utf-8")
    outputs = outputs_of(place / "run")
    prompts = [output["prompt"] for output in outputs]
    assert [f'<td dir="auto">{prompt}</td>' in page for prompt in prompts] == [i < 4 for i in range(12)]
    assert [prompt in out for prompt in prompts] == [i < 3 for i in range(12)]
    results = results_of(place / "run")
    assert f"before training {100 * results['test_before_exact_match']:.2f} %" in page
    line = next(line for line in out.splitlines() if line.strip().startswith("test_exact_match"))
    assert line.split()[1:] == [
        *(f"{100 * results['test_before_exact_match']:.2f}", "%", f"{100 * results['test_exact_match']:.2f}", "%")
    ]


def test_plain_texts_have_no_outputs(place: Path) -> None:
    rows = [{"text": row["prompt"] + row["completion"]} for row in opposites(40)]
    answer = reltune(
        *("run", "--model_name_or_path", place / "model", "--output_dir", place / "texts"),
        *(
            "--train_file",
            write_rows(place / "texts.jsonl", rows),
            "--max_steps",
            2,
            "--granularity",
            "column",
            "--budget",
            "5%",
        ),
    )
    assert answer.code == 0, answer.err
    assert not (place / "texts" / "outputs.jsonl").exists()
    assert "<h2>Outputs</h2>" not in (place / "texts" / "report.html").read_text(encoding="utf-8")
    results = results_of(place / "texts")
    assert results["test_before_perplexity"] > 1 and "test_before_exact_match" not in results


def test_new_heads_are_measured_as_they_were_before(tmp_path: Path) -> None:
    """Before training means the head that relevance was measured with: not the first random one, not the tuned one."""
    save_tiny_bert(tmp_path / "model")
    answer = reltune(
        *("run", "--model_name_or_path", tmp_path / "model", "--output_dir", tmp_path / "run"),
        *("--train_file", write_csv(tmp_path / "train.csv", review_rows(80)), "--head_epochs", 4),
        *("--granularity", "module", "--budget", "50%", "--learning_rate", 1e-2, "--num_train_epochs", 8),
    )
    assert answer.code == 0, answer.err
    results, run = results_of(tmp_path / "run"), RunDirectory(tmp_path / "run")
    materials = prepare(RunConfig.load(run.config_file))
    model = materials.base.take()
    first = evaluate(model, materials.held_out, materials.task, materials.tokenizer).metrics
    model.load_state_dict(load_file(run.head), strict=False)
    found = evaluate(model, materials.held_out, materials.task, materials.tokenizer).metrics
    for name in ("eval", "test"):
        for metric in ("loss", "accuracy", "f1_macro", "matthews", "samples"):
            assert results[f"{name}_before_{metric}"] == pytest.approx(found[f"{name}_{metric}"], abs=1e-7)
        assert abs(results[f"{name}_before_loss"] - first[f"{name}_loss"]) > 1e-4
        assert results[f"{name}_before_loss"] > results[f"{name}_loss"] + 0.05
    # The report has what each model predicts, as the metrics count it.
    shown = outputs_of(tmp_path / "run")
    assert len(shown) == results["test_samples"]
    for who, name in (("base", "test_before_accuracy"), ("tuned", "test_accuracy")):
        right = sum(one[who] == one["reference"] for one in shown) / len(shown)
        assert right == pytest.approx(results[name])
    texts = dict(review_rows(80))
    assert all(texts[one["prompt"]] == one["reference"] for one in shown)
