"""Which learning rate each method wants, and what it then reaches: a sweep on a user's own files.

    python benchmarks/learning_rates.py --model DIR --data NAME=FILE.csv … --output_dir benchmarks/results

Every (method, rate, seed) is one training run from the same head; the rate is chosen on validation data (mean over seeds)
and the test figure reported at that rate. All runs, good and bad, are in the JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

BASELINES = {"head only": "head", "top encoder layer": "layers", "full fine-tuning": "full"}
HEAD_RATES = (1e-3, 3e-3, 1e-2, 3e-2)
FULL_RATES = (3e-5, 1e-4, 2e-4, 4e-4)
LAYER_RATES = (1e-4, 3e-4, 1e-3, 3e-3)
SMALL_RATES = (1e-3, 2e-3, 4e-3, 8e-3)
SELECTIONS = {  # name -> criterion, granularity
    "fisher column": ("fisher", ["column"]),
    "gradient column": ("gradient", ["column"]),
    "magnitude column": ("magnitude", ["column"]),
    "random column": ("random", ["column"]),
    "fisher row": ("fisher", ["row"]),
    "fisher column+bias+norm": ("fisher", ["column", "bias", "norm"]),
}


def one_job(job: dict[str, Any]) -> list[dict[str, Any]]:
    """All methods and rates for one data set and seed."""
    import transformers
    from peft import LoraConfig, get_peft_model

    from reltune.config.run_config import RunConfig
    from reltune.methods.registry import METHODS
    from reltune.plan.lora import lora_config
    from reltune.plan.selection import select
    from reltune.runs import stages, training
    from reltune.runs.directory import RunDirectory
    from reltune.runs.evaluation import evaluate
    from reltune.runs.materials import prepare
    from reltune.tuner.config import ReltuneConfig

    transformers.logging.set_verbosity_error()
    records: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        config = RunConfig(
            model_name_or_path=job["model"],
            output_dir=str(Path(scratch) / "run"),
            train_file=job["file"],
            max_length=64,
            criteria=["fisher", "gradient", "magnitude", "random", "depth"],
            elements=True,
            budget=job["budget"],
            seed=job["seed"],
            training={"disable_tqdm": True, "logging_strategy": "no", "report_to": "none", **job["training"]},
        )
        materials = prepare(config)
        directory = RunDirectory(config.output_dir)
        directory.create(config)
        relevance = stages.analyze(materials, directory)

        def record(method: str, rate: float, trainable: int, model: Any) -> None:
            args = materials.arguments("selection", learning_rate=rate, save_strategy="no", eval_strategy="no")
            started = time.perf_counter()
            _, cost = training.train(model, args, materials.task, materials.tokenizer, materials.train)
            metrics = evaluate(
                model, materials.held_out, materials.task, materials.tokenizer, disable_tqdm=True
            ).metrics
            records.append(
                {
                    "data": job["data"],
                    "seed": job["seed"],
                    "method": method,
                    "learning_rate": rate,
                    "trainable_parameters": trainable,
                    "seconds": time.perf_counter() - started,
                    "steps": cost.steps,
                    **{k: v for k, v in metrics.items() if "samples" not in k},
                }
            )
            # A run that is cut short keeps what it has.
            with open(job["log"], "a", encoding="utf-8") as log:
                log.write(json.dumps(records[-1]) + "\n")

        for baseline, way in {} if job["only"] else BASELINES.items():
            rates = {"head": HEAD_RATES, "layers": LAYER_RATES, "full": FULL_RATES}[way]
            for rate in rates[: job["rates"]]:
                own = dataclasses.replace(config, method=way, target_modules=[], exclude_modules=[])
                base = stages.base_of(materials, stages.model_with_new_heads(materials, directory), None)
                trainable = METHODS[way].prepare(dataclasses.replace(base, config=own))
                record(baseline, rate, trainable.parameters, trainable.model)
        for rank in () if job["only"] else (3,):  # the size nearest to the budget of 0.5%
            for rate in SMALL_RATES[: job["rates"]]:
                model = get_peft_model(
                    stages.model_with_new_heads(materials, directory),
                    LoraConfig(
                        r=rank,
                        lora_alpha=2 * rank,
                        target_modules="all-linear",
                        task_type="SEQ_CLS",
                        modules_to_save=materials.new_heads,
                    ),
                )
                trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
                record(f"LoRA r={rank}, all-linear", rate, trainable - relevance.inventory.head_parameters, model)
        everything = [info.name for info in relevance.inventory.modules]  # the pooler too: it competes only when named
        plans = {
            name: select(
                relevance,
                config.budget,
                granularity,
                criterion=criterion,
                target_modules=everything,
                task_type="SEQ_CLS",
            )
            for name, (criterion, granularity) in SELECTIONS.items()
        }
        for criterion in ("fisher", "gradient", "random"):
            plans[f"{criterion} column, without pooler"] = select(
                relevance, config.budget, criterion=criterion, exclude_modules=["pooler"], task_type="SEQ_CLS"
            )
            plans[f"{criterion} column, even over modules"] = select(
                relevance,
                config.budget,
                criterion=criterion,
                spread="even",
                target_modules=everything,
                task_type="SEQ_CLS",
            )
            for spread in ("global", "even"):
                plans[f"{criterion} element, {spread}"] = select(
                    relevance, config.budget, "element", criterion=criterion, spread=spread, task_type="SEQ_CLS"
                )
        for name, plan in plans.items():
            if job["only"] and job["only"] not in name:
                continue
            for rate in SMALL_RATES[: job["rates"]]:
                model = get_peft_model(stages.model_with_new_heads(materials, directory), ReltuneConfig(plan=plan))
                record(name, rate, plan.parameters, model)
        for criterion in ("fisher", "gradient"):
            name = f"LoRA ranked by {criterion}"
            if job["only"] and job["only"] not in name:
                continue
            plan = select(relevance, config.budget, criterion=criterion, task_type="SEQ_CLS")
            for rate in SMALL_RATES[: job["rates"]]:
                model = get_peft_model(stages.model_with_new_heads(materials, directory), lora_config(plan))
                trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
                record(name, rate, trainable - relevance.inventory.head_parameters, model)
    return records


def summarise(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per data set and method: the rate with the best mean validation accuracy, and the test figures at it."""
    rows = []
    for data, method in dict.fromkeys((r["data"], r["method"]) for r in records):
        mine = [r for r in records if (r["data"], r["method"]) == (data, method)]
        by_rate = {rate: [r for r in mine if r["learning_rate"] == rate] for rate in {r["learning_rate"] for r in mine}}
        best = max(sorted(by_rate), key=lambda rate: statistics.mean(r["eval_accuracy"] for r in by_rate[rate]))
        rows.append(
            {
                "data": data,
                "method": method,
                "trainable_parameters": mine[0]["trainable_parameters"],
                "learning_rate": best,
                "eval_accuracy": statistics.mean(r["eval_accuracy"] for r in by_rate[best]),
                "test_accuracy": [r["test_accuracy"] for r in by_rate[best]],
                "by_rate": {
                    f"{rate:g}": round(statistics.mean(r["test_accuracy"] for r in by_rate[rate]), 4)
                    for rate in sorted(by_rate)
                },
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", nargs="+", required=True, help="NAME=FILE.csv")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rates", type=int, default=4, help="how many of each method's rates to try")
    parser.add_argument("--budget", default="0.5%")
    parser.add_argument("--name", default="learning_rates", help="of the result file")
    parser.add_argument("--only", default="", help="only the selections whose name contains this")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--max_steps", type=int, default=-1)
    parser.add_argument("--commit", default="")
    parser.add_argument("--output_dir", required=True)
    options = parser.parse_args()

    import torch
    import transformers

    Path(options.output_dir).mkdir(parents=True, exist_ok=True)
    jobs = [
        {
            "model": options.model,
            "data": item.split("=")[0],
            "file": item.split("=")[1],
            "seed": seed,
            "budget": options.budget,
            "rates": options.rates,
            "only": options.only,
            "training": {"max_steps": options.max_steps},
            "log": str(Path(options.output_dir) / "learning_rates.jsonl"),
        }
        for item in options.data
        for seed in range(options.seeds)
    ]
    with ProcessPoolExecutor(options.workers) as pool:
        records = [record for records in pool.map(one_job, jobs) for record in records]
    rows = summarise(records)
    for row in rows:
        test = " ".join(f"{100 * value:.1f}" for value in row["test_accuracy"])
        print(
            f"{row['data']:8} {row['method']:28} {row['trainable_parameters']:>10,} lr {row['learning_rate']:g}  {test}  {row['by_rate']}"
        )
    commit = (
        options.commit
        or subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    )
    result = {
        "benchmark": "learning_rates",
        "commit": commit,
        "arguments": {k: v for k, v in vars(options).items() if k in ("seeds", "rates", "budget", "max_steps", "only")},
        "hardware": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor(),
        "versions": {
            "python": sys.version.split()[0],
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "summary": rows,
        "runs": records,
    }
    (Path(options.output_dir) / f"{options.name}.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    import multiprocessing

    multiprocessing.set_start_method("spawn")
    main()
