"""How long a report takes, and how large it is, at the shapes of a large model.

    python benchmarks/report_page.py --commit HASH --output_dir benchmarks/results

Writes the directory of a run with made-up scores of every column of Llama-3.1-8B (32 layers, 224 linear maps), a plan, curves of
500 steps and answers to prompts, and calls `reltune report` on it in a fresh process per repeat. Wall time is what a user waits for;
processor seconds, of the process and its children, are what the report itself takes where other programs share the machine.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from harness import commit, hardware, versions
from reltune.config.run_config import RunConfig
from reltune.files import write_json
from reltune.layers.inventory import take_inventory
from reltune.layers.units import unit_shapes
from reltune.plan.selection import select
from reltune.relevance.scores import RelevanceScores
from reltune.report.record import Sample
from reltune.runs.directory import RunDirectory

LARGEST = 6_000_000  # bytes
LONGEST = 5.0  # seconds


def make_run(
    path: Path, layers: int, hidden: int, intermediate: int, vocab: int, criteria: list[str]
) -> dict[str, int]:
    """A run's directory as the stages leave it, without adapter; gives what it counts."""
    heads = max(1, hidden // 128)
    config = LlamaConfig(vocab_size=vocab, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
                         num_attention_heads=heads, num_key_value_heads=max(1, heads // 4), tie_word_embeddings=False)  # fmt: skip
    with torch.device("meta"):
        inventory = take_inventory(LlamaForCausalLM(config))
    generator = torch.Generator().manual_seed(0)
    parts: dict[str, Any] = {criterion: {} for criterion in criteria}
    columns = 0
    for criterion in criteria:
        for info in inventory.modules:
            found = {
                part: torch.rand(shape, generator=generator) ** 8 * (1 + info.depth)
                for part, shape in unit_shapes(info).items()
            }
            if "column" in found:
                found["weight"] = found["column"].sum()
                columns += info.columns
            parts[criterion][info.name] = found
    facts = {
        "model": "llama",
        "architecture": "LlamaForCausalLM",
        "examples": 128,
        "data": "0" * 32,
        "seed": 42,
        "versions": {},
    }
    relevance = RelevanceScores(parts, inventory, [], "0" * 32, facts)
    run = RunDirectory(path)
    chosen = RunConfig(
        "some/model",
        str(path),
        train_file="train.jsonl",
        task="causal_lm",
        criteria=criteria,
        granularity=["column"],
        budget="1%",
    )
    run.create(chosen)
    relevance.save(run.relevance)
    run.plan.mkdir()
    select(relevance, "1%", ["column"], model_name_or_path="some/model").save(run.plan)
    history = [{"loss": 3 - i / 250, "step": i, "epoch": i / 100} for i in range(500)]
    write_json(run.path / "trainer_state.json", {"log_history": history})
    write_json(run.results, {"test_perplexity": 12.5, "test_samples": 1000})
    samples = [Sample(step, step / 100, f"prompt {i}", "word " * 60) for step in range(0, 500, 50) for i in range(5)]
    run.samples.write_text("".join(json.dumps(vars(sample)) + "\n" for sample in samples), encoding="utf-8")
    linear = sum(len(info.shape) == 2 and info.in_block for info in inventory.modules)
    return {"linear_maps": linear, "columns": columns // len(criteria), "criteria": len(criteria)}


def one_report(path: Path) -> dict[str, Any]:
    """What `reltune report` takes in a process of its own."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "reltune", "report", str(path)], capture_output=True, text=True)
    seconds = time.perf_counter() - started
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        return {"error": done.stderr[-500:]}
    worked = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": seconds, "processor_seconds": worked, "bytes": RunDirectory(path).report.stat().st_size}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--intermediate", type=int, default=14336)
    parser.add_argument("--vocab", type=int, default=128256)
    parser.add_argument("--criteria", nargs="+", default=["fisher", "magnitude"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--commit", default="")
    parser.add_argument("--output_dir", required=True)
    options = parser.parse_args()
    shape = {name: getattr(options, name) for name in ("layers", "hidden", "intermediate", "vocab")}
    with tempfile.TemporaryDirectory() as scratch:
        counts = make_run(Path(scratch) / "run", criteria=options.criteria, **shape)
        runs = []
        for _ in range(options.repeats):
            runs.append(one_report(Path(scratch) / "run"))
            print(json.dumps(runs[-1]), flush=True)
    checks = [
        {"check": "every report was made", "passed": not any("error" in run for run in runs)},
        {"check": f"less than {LARGEST:,} bytes", "passed": all(run.get("bytes", LARGEST) < LARGEST for run in runs)},
        {
            "check": f"less than {LONGEST:.0f} processor seconds",
            "passed": all(run.get("processor_seconds", LONGEST) < LONGEST for run in runs),
        },
    ]
    record = {
        "benchmark": "report_page",
        **commit(options.commit),
        "arguments": {**shape, "criteria": options.criteria, "repeats": options.repeats},
        "hardware": hardware(torch.device("cpu")),
        "versions": versions(["plotly", "jinja2"]),
        **counts,
        "runs": runs,
        "checks": checks,
    }
    Path(options.output_dir).mkdir(parents=True, exist_ok=True)
    target = Path(options.output_dir) / "report_page.json"
    target.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0 if all(check["passed"] for check in checks) else 1


if __name__ == "__main__":
    sys.exit(main())
