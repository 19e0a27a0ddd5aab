"""Which learning rate each method wants on a causal language model, and what it then reaches: prompts with completions.

    python benchmarks/learning_rates_decoder.py --model DIR --data NAME=PREFIX … --output_dir benchmarks/results

PREFIX_train.jsonl, PREFIX_validation.jsonl and PREFIX_test.jsonl hold rows of prompt and completion. Every (method, rate, seed)
is one training run through the program's own path; the rate is chosen by the loss on validation data (mean over seeds), and the
loss and exact match on test data are reported at that rate. All runs, good and bad, are in the JSON. Runs that the log in
``--output_dir`` has already are not repeated.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from harness import commit, hardware, versions

FULL_RATES = (2e-5, 6e-5, 2e-4)
SMALL_RATES = (2e-4, 5e-4, 1e-3, 2e-3, 4e-3)
METHODS = ("full", "LoRA", "fisher global", "fisher even", "gradient even", "random even")


def one_job(job: dict[str, Any]) -> list[dict[str, Any]]:
    """All rates of one method, for one data set, size and seed."""
    import torch
    import transformers
    from peft import LoraConfig, get_peft_model

    from reltune.config.run_config import RunConfig
    from reltune.plan.selection import select
    from reltune.runs import stages, training
    from reltune.runs.directory import RunDirectory
    from reltune.runs.evaluation import evaluate
    from reltune.runs.materials import prepare
    from reltune.tuner.config import ReltuneConfig

    transformers.logging.set_verbosity_error()
    torch.set_num_threads(job["threads"])
    torch.backends.cuda.matmul.allow_tf32 = True
    keys = ("data", "seed", "method", "rank")
    records = [r for r in job["known"] if all(r[key] == job[key] for key in keys)]
    rates = (FULL_RATES if job["method"] == "full" else SMALL_RATES)[: job["rates"]]
    rates = tuple(rate for rate in rates if rate not in [r["learning_rate"] for r in records])
    with tempfile.TemporaryDirectory() as scratch:
        config = RunConfig(
            model_name_or_path=job["model"],
            output_dir=str(Path(scratch) / "run"),
            train_file=f"{job['prefix']}_train.jsonl",
            validation_file=f"{job['prefix']}_validation.jsonl",
            test_file=f"{job['prefix']}_test.jsonl",
            max_length=128,
            max_new_tokens=8,
            generation_examples=job["generations"],
            criteria=[job["method"].split()[0] if " " in job["method"] else "depth"],
            analysis_examples=512,
            seed=job["seed"],
            training={
                "disable_tqdm": True,
                "logging_strategy": "no",
                "report_to": "none",
                "num_train_epochs": 2,
                "per_device_train_batch_size": 16,
                **job["training"],
            },
        )
        materials = prepare(config)
        directory = RunDirectory(config.output_dir)
        directory.create(config)
        relevance = stages.analyze(materials, directory) if " " in job["method"] and rates else None

        for rate in rates:
            model: Any = materials.base.take()
            if job["method"] == "full":
                model.requires_grad_(True)
            elif job["method"] == "LoRA":
                rank = job["rank"]
                model = get_peft_model(
                    model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
                )
            else:
                assert relevance is not None
                criterion, spread = job["method"].split()
                plan = select(relevance, str(job["budget"]), criterion=criterion, spread=spread, task_type="CAUSAL_LM")
                model = get_peft_model(model, ReltuneConfig(plan=plan))
            args = materials.arguments("selection", learning_rate=rate, save_strategy="no", eval_strategy="no")
            started = time.perf_counter()
            record = {
                "data": job["data"],
                "seed": job["seed"],
                "method": job["method"],
                "rank": job["rank"],
                "learning_rate": rate,
                "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
            }
            try:
                _, cost = training.train(model, args, materials.task, materials.tokenizer, materials.train)
                record["steps"] = cost.steps
                metrics = evaluate(
                    model, materials.held_out, materials.task, materials.tokenizer, disable_tqdm=True
                ).metrics
                record |= {k: v for k, v in metrics.items() if "samples" not in k and "generations" not in k}
            except ArithmeticError as error:  # training diverged
                record["error"] = str(error)
            record["seconds"] = time.perf_counter() - started
            records.append(record)
            with open(job["log"], "a", encoding="utf-8") as log:  # what is cut short keeps what it has
                log.write(json.dumps(record) + "\n")
            del model
        if job["method"] == "full" and job["seed"] == 0:
            metrics = evaluate(
                materials.base.take(), materials.held_out, materials.task, materials.tokenizer, disable_tqdm=True
            ).metrics
            untuned = {
                "data": job["data"],
                "seed": 0,
                "method": "untuned",
                "rank": job["rank"],
                "learning_rate": 0.0,
            }
            records.append({**untuned, "trainable_parameters": 0, **metrics})
    return records


def summarise(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per data set, method and size: the rate with the best mean validation loss, and the test figures at it."""
    rows = []
    keys = ("data", "method", "rank")
    for case in dict.fromkeys(tuple(r[key] for key in keys) for r in records):
        mine = [r for r in records if tuple(r[key] for key in keys) == case]
        rates = sorted({r["learning_rate"] for r in mine})
        by_rate = {rate: [r for r in mine if r["learning_rate"] == rate] for rate in rates}
        finished = {rate: runs for rate, runs in by_rate.items() if not any("error" in run for run in runs)}
        best = min(finished, key=lambda rate: statistics.mean(r["eval_loss"] for r in finished[rate]))
        rows.append(
            {
                **dict(zip(keys, case, strict=True)),
                "trainable_parameters": mine[0]["trainable_parameters"],
                "learning_rate": best,
                "at_the_edge": len(rates) > 1 and best in (rates[0], rates[-1]),
                "eval_loss": statistics.mean(r["eval_loss"] for r in finished[best]),
                "test_loss": [r["test_loss"] for r in finished[best]],
                "test_exact_match": [r["test_exact_match"] for r in finished[best]],
                "by_rate": {
                    f"{rate:g}": {
                        key: round(statistics.mean(r[key] for r in runs), 4)
                        for key in ("eval_loss", "test_loss", "test_exact_match")
                    }
                    for rate, runs in finished.items()
                },
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", nargs="+", required=True, help="NAME=PREFIX")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--rates", type=int, default=5, help="how many of each method's rates to try")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 8], help="sizes: those of LoRA with these ranks")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--generations", type=int, default=500, help="test examples for which the model writes")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2, help="of each worker")
    parser.add_argument("--max_steps", type=int, default=-1)
    parser.add_argument("--commit", default="")
    parser.add_argument("--output_dir", required=True)
    options = parser.parse_args()

    import torch
    from transformers import AutoModelForCausalLM

    Path(options.output_dir).mkdir(parents=True, exist_ok=True)
    base = AutoModelForCausalLM.from_pretrained(options.model)
    head = base.get_output_embeddings()
    maps = [m for m in base.modules() if isinstance(m, torch.nn.Linear) and m is not head]
    of_rank_one = sum(m.in_features + m.out_features for m in maps)
    log = Path(options.output_dir) / "learning_rates_decoder.jsonl"
    known = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.is_file() else []
    jobs = [
        {
            "known": known,
            "model": options.model,
            "data": item.split("=")[0],
            "prefix": item.split("=")[1],
            "seed": seed,
            "method": method,
            "rank": rank,
            "budget": rank * of_rank_one,
            "rates": options.rates,
            "generations": options.generations,
            "threads": options.threads,
            "training": {"max_steps": options.max_steps},
            "log": str(log),
        }
        for seed, item, rank, method in itertools.product(
            range(options.seeds), options.data, sorted(options.ranks, reverse=True), options.methods
        )
        if method != "full" or rank == max(options.ranks)  # it has one size
    ]
    with ProcessPoolExecutor(options.workers) as pool:
        records = [record for records in pool.map(one_job, jobs) for record in records]
    rows = summarise(records)
    for row in rows:
        match = " ".join(f"{100 * value:.1f}" for value in row["test_exact_match"])
        loss = " ".join(f"{value:.4f}" for value in row["test_loss"])
        edge = " (edge)" if row["at_the_edge"] else ""
        print(
            f"{row['data']:7} {row['method']:14} {row['trainable_parameters']:>11,} lr {row['learning_rate']:g}{edge}"
            f"  loss {loss}  exact match {match}"
        )
    kept = ("seeds", "rates", "ranks", "methods", "generations", "max_steps")
    result = {
        "benchmark": "learning_rates_decoder",
        **commit(options.commit),
        "arguments": {key: getattr(options, key) for key in kept},
        "hardware": hardware(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
        "versions": versions(("trl", "accelerate")),
        "summary": rows,
        "runs": records,
    }
    (Path(options.output_dir) / "learning_rates_decoder.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    import multiprocessing

    multiprocessing.set_start_method("spawn")
    main()
