"""Whether a training that was planned for so much memory does with it: ten architectures under a hard limit of the process.

    python benchmarks/hard_cap.py
    PYTHONPATH=src python benchmarks/hard_cap.py --device cuda --out FILE --commit HASH     # needs torch, Transformers, PEFT and Accelerate alone

Models with random weights, texts or images at random, 64 to a batch. Of what training is predicted to take, a share is given as the
budget ``memory=…``, with methods that need no analysis. Each case is a process of its own. Kept is whether training came to its end
without halving a batch, and the peak that was predicted and measured. The control is the same training without the budget, under the same
limit: on a CPU of the first case, on a GPU of every one.

On a CPU the whole command, `reltune run` with loading and evaluation, runs under Linux's RLIMIT_DATA of what the process held after a
small run of the same kind, and the budget: memory that the process may write to, whether it was written or not.

On a GPU the plan is made and trained by what the command calls for it, on batches that are there already.
``torch.cuda.set_per_process_memory_fraction`` gives the allocator the budget less what the budget counts for the context. What the context really
took is measured beside it, where the process has the device alone. The share is one of what is not fixed (context, workspace of products), and
where the plan leaves much of the budget over, the budget is lowered to what the plan needs, and planned for again.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import random
import resource
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from harness import commit, described, hardware, versions  # noqa: E402

MIB = 1 << 20
RECORD = Path(__file__).parent / "results" / "hard_cap.json"
WORDS = [f"w{number}" for number in range(2000)]
STEPS = 4
ALONE = 2 << 30  # bytes: more is held by other processes, and not by this one's context


class Size(NamedTuple):
    wide: int
    blocks: int
    length: int
    image: int
    batch: int = 64


SIZES = {"cpu": Size(256, 6, 64, 32), "cuda": Size(1024, 12, 256, 64), "tiny": Size(64, 2, 32, 8)}


class Case(NamedTuple):
    """``kind``: the class of the config; ``given``: what of the predicted memory is given."""

    kind: str
    config: Mapping[str, Any]
    task: str
    method: str
    given: float


def cases(size: Size) -> dict[str, Case]:
    wide, heads, half = size.wide, max(2, size.wide // 64), size.blocks // 2
    bert = {
        "hidden_size": wide,
        "num_hidden_layers": size.blocks,
        "num_attention_heads": heads,
        "intermediate_size": 4 * wide,
    }
    llama = {**bert, "num_key_value_heads": heads, "max_position_embeddings": 2 * size.length}
    experts = {**llama, "intermediate_size": 2 * wide, "num_local_experts": 4}
    distilbert = {"dim": wide, "n_layers": size.blocks, "n_heads": heads, "hidden_dim": 4 * wide}
    t5 = {"d_model": wide, "d_kv": wide // heads, "d_ff": 4 * wide, "num_layers": half, "num_heads": heads}
    t5 |= {"decoder_start_token_id": 0}
    bart = {"d_model": wide, "max_position_embeddings": 2 * size.length, "decoder_start_token_id": 3}
    for part in ("encoder", "decoder"):
        bart |= {f"{part}_layers": half, f"{part}_attention_heads": heads, f"{part}_ffn_dim": 4 * wide}
    vit = {**bert, "image_size": size.image, "patch_size": 4}
    classes, writes, images = "sequence_classification", "causal_lm", "image_classification"
    return {
        "BERT, LoRA": Case("BertConfig", bert, classes, "lora", 0.5),
        "BERT, all weights": Case("BertConfig", bert, classes, "full", 0.6),
        "DistilBERT, biases": Case("DistilBertConfig", distilbert, classes, "bitfit", 0.6),
        "Llama, LoRA": Case("LlamaConfig", llama, writes, "lora", 0.5),
        "Qwen2, all weights": Case("Qwen2Config", llama, writes, "full", 0.6),
        "Mixtral, all weights": Case("MixtralConfig", experts, writes, "full", 0.6),
        "T5, LoRA": Case("T5Config", t5, "seq2seq", "lora", 0.6),
        "BART, all weights": Case("BartConfig", bart, "seq2seq", "full", 0.7),
        "ViT, LoRA": Case("ViTConfig", vit, images, "lora", 0.5),
        "ViT, all weights": Case("ViTConfig", vit, images, "full", 0.6),
    }


HEADS = {
    "sequence_classification": "SequenceClassification", "causal_lm": "CausalLM", "seq2seq": "Seq2SeqLM",
    "image_classification": "ImageClassification",
}  # fmt: skip


# -- on a CPU: the command ---------------------------------------------------------------------------------------------


def prepare(place: Path, case: Case, size: Size) -> None:
    """Save the model with its tokenizer or processor, and 160 rows."""
    import torch
    import transformers

    from tiny_models import tiny_tokenizer

    torch.manual_seed(0)
    generator = random.Random(0)

    def words(count: int) -> str:
        return " ".join(generator.choices(WORDS, k=count))

    rows: list[dict[str, Any]] = []
    more: dict[str, Any] = {}
    if case.task == "image_classification":
        from PIL import Image
        from transformers import ViTImageProcessorPil

        ViTImageProcessorPil(size={"height": size.image, "width": size.image}).save_pretrained(place / "model")
        for number in range(160):
            path = place / f"{number}.png"
            Image.effect_noise((size.image, size.image), 90).convert("RGB").save(path)
            rows.append({"image": str(path), "label": "ab"[number % 2]})
    else:
        tokenizer = tiny_tokenizer(WORDS)
        tokenizer.eos_token = "[SEP]"
        tokenizer.save_pretrained(place / "model")
        more = {"vocab_size": len(tokenizer), "pad_token_id": 0, "eos_token_id": 3, "bos_token_id": 2}
        for number in range(160):
            if case.task == "sequence_classification":
                rows.append({"text": words(size.length - 2), "label": "ab"[number % 2]})
            elif case.task == "causal_lm":
                rows.append({"text": words(size.length - 2)})
            else:
                rows.append({"source": words(size.length - 2), "target": words(size.length // 3)})
    config = getattr(transformers, case.kind)(**{**case.config, **more})
    getattr(transformers, f"AutoModelFor{HEADS[case.task]}").from_config(config).save_pretrained(place / "model")
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def command(place: Path, case: Case, size: Size, name: str, *more: object) -> list[object]:
    length: list[object] = [] if case.task == "image_classification" else ["--max_length", size.length]
    length += {
        "seq2seq": ["--max_new_tokens", 2],
        "causal_lm": ["--max_new_tokens", 2, "--generation_examples", 4],
    }.get(case.task, [])
    return [
        "run", "--model_name_or_path", place / "model", "--train_file", place / "rows.jsonl", "--task", case.task,
        "--method", case.method, "--output_dir", place / name, "--eval_strategy", "no", "--save_strategy", "no", *length, *more,
    ]  # fmt: skip


def predicted(place: Path, case: Case, size: Size, device: str | None) -> int:
    """Bytes that training takes without a limit of memory, but for holes of malloc's heap, of which a limit leaves none."""
    import reltune as library
    from reltune.runs.estimate import HOLES

    fields: dict[str, Any] = {"per_device_train_batch_size": size.batch, "task": case.task, "method": case.method}
    if case.task != "image_classification":
        fields["max_length"] = size.length
    estimate = library.estimate(str(place / "model"), device=device, **fields)
    row = next(row for row in estimate.rows if row.method == case.method)
    return row.total - row.memory.get(HOLES, 0)


def capped(place: Path, case: Case, size: Size, budget: int, limited: bool) -> dict[str, Any]:
    """In a process of its own."""
    from capped_worker import held
    from command_line import reltune
    from reltune.runs.summary import predicted_and_measured

    first = command(place, case, size, f"small {limited}", "--per_device_train_batch_size", 2, "--max_steps", 2)
    small = reltune(*first)
    assert small.code in (None, 0), small.err[-2000:]
    most = held() + budget
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    words: list[object] = ["--per_device_train_batch_size", size.batch, "--max_steps", STEPS]
    if limited:
        words += ["--budget", f"memory={budget // MIB}MiB"]
    answer = reltune(*command(place, case, size, f"run {limited}", *words))
    found: dict[str, Any] = {"code": answer.code or 0, "halved": HALVED in answer.err}
    found["said"] = "" if not answer.code else answer.err[-300:]
    if not answer.code and limited:
        prediction, cost = (
            json.loads((place / f"run {limited}" / name).read_text(encoding="utf-8"))
            for name in ("prediction.json", "training_cost.json")
        )
        memory = predicted_and_measured(prediction, cost)[0]
        found |= {"predicted_bytes": memory.predicted, "measured_bytes": memory.measured}
    return found


HALVED = "out of memory with"  # what runs/halving.py says where it takes a batch in parts


def on_cpu(case: Case, size: Size, with_control: bool) -> dict[str, Any]:
    import peft  # noqa: F401

    import reltune.tuner.model  # noqa: F401
    from cost_sweep import forked

    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        forked(prepare, place, case, size)
        whole = forked(predicted, place, case, size, "cpu")
        budget = int(case.given * whole) // MIB * MIB
        found = forked(capped, place, case, size, budget, True)
        control = forked(capped, place, case, size, budget, False) if with_control else None
    return {"without_limit_bytes": whole, "budget_bytes": budget, **found, "control": control}


# -- on a GPU: the plan and its training -------------------------------------------------------------------------------


def on_gpu(name: str, size_name: str) -> dict[str, Any]:
    """The case and its control, each in a fresh process, which has the device's memory anew."""
    found: dict[str, Any] = {}
    for limited in (True, False):
        words = [sys.executable, str(Path(__file__).resolve()), "--size", size_name, "--worker", name]
        words += [] if limited else ["--control", str(found["budget_bytes"])]
        answer = subprocess.run(words, capture_output=True, text=True)
        try:
            one = json.loads(answer.stdout.splitlines()[-1])
        except (IndexError, ValueError):
            one = {"code": answer.returncode or 1, "said": answer.stderr[-1500:]}
        if limited:
            found = one
            if "budget_bytes" not in found:
                return found
        else:
            found["control"] = {key: one.get(key) for key in ("code", "halved", "said")}
    return found


def planned(place: Path, case: Case, size: Size, device: str | None) -> tuple[Any, dict[str, Any]]:
    """The config that a plan for the budget gives, and what it says. The model is that of the config in ``place``."""
    from reltune.cost import memory
    from reltune.plan.budget import read_budget
    from reltune.runs.forecast import forecast

    whole = predicted(place, case, size, device)
    fixed = memory.on_card(SimpleNamespace(bytes=0))
    budget = int(fixed + case.given * (whole - fixed))
    for _ in range(2):
        budget = -(-budget // MIB) * MIB
        config = dataclasses.replace(unplanned(place, case, size), budget=f"memory={budget // MIB}MiB")
        plan = forecast(config, device=device, with_frontier=False, with_others=False)
        budget = plan.estimate.rows[0].total  # a plan may leave much of it over, and then the limit would show nothing
    return plan.config, {
        "without_limit_bytes": whole,
        "budget_bytes": read_budget(config.budget).memory,
        "settings": {**plan.settings.fields, **plan.settings.training},
        "predicted_bytes": plan.estimate.rows[0].total,
        "predicted_allocated_bytes": plan.allocated,
    }


def unplanned(place: Path, case: Case, size: Size) -> Any:
    from reltune.config.run_config import RunConfig

    config = RunConfig(str(place / "model"), str(place / "run"), task=case.task, method=case.method)
    training = {"per_device_train_batch_size": size.batch}
    return dataclasses.replace(config, max_length=size.length, training=training)


def worker(name: str, size: Size, control: int | None = None, device: str | None = None) -> dict[str, Any]:
    """Plan and train a case under its budget; or, as a control of such a budget, train it as it is.

    ``device``: what the plan is for, if not the device that is there.
    """
    import torch
    import transformers

    from reltune.cost import memory
    from reltune.methods.contract import Base
    from reltune.methods.registry import METHODS
    from reltune.runs import training
    from reltune.runs.estimate import Subject

    case = cases(size)[name]
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        more = {} if case.task == "image_classification" else {"vocab_size": 8192, "pad_token_id": 0, "bos_token_id": 2}
        settings = getattr(transformers, case.kind)(**{**case.config, **more, "eos_token_id": 3})
        settings.save_pretrained(place / "model")
        found: dict[str, Any] = {}
        if control is None:
            config, found = planned(place, case, size, device)
        else:
            config = unplanned(place, case, size)
        budget = found.get("budget_bytes", control)
        subject = Subject(config, None, cuda=True)
        gc.collect()
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info()
        alone = total - free < ALONE
        torch.cuda.set_per_process_memory_fraction((budget - memory.CONTEXT) / total)
        torch.manual_seed(0)
        model = getattr(transformers, f"AutoModelFor{HEADS[case.task]}").from_config(settings)
        not_tuned = subject._not_tuned(model)
        model = METHODS[case.method].prepare(Base(config, model, subject.new_heads, not_tuned)).model
        task: Any = SimpleNamespace(
            defaults={}, learning_rates={}, make_arguments=transformers.TrainingArguments, trainer=trainer
        )
        fixed_values = {"max_steps": STEPS, "eval_strategy": "no", "save_strategy": "no", "disable_tqdm": True}
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            try:
                args = training.arguments(config.output_dir, case.method, 0, config.training, task, **fixed_values)
                _, cost = training.train(model, args, task, None, examples(case, size, settings))
                found |= {"code": 0, "said": "", "measured_allocated_bytes": cost.peak_memory_bytes}
            except Exception as error:  # whatever it is, out of memory above all: it is what the record is about
                found |= {"code": 1, "said": described(error)[-300:]}
    found["halved"] = any(HALVED in str(one.message) for one in said)
    free = torch.cuda.mem_get_info()[0]
    context = total - free - torch.cuda.memory_reserved()
    measured = torch.cuda.max_memory_reserved()
    return found | {
        "reserved_bytes": measured,
        "context_bytes": context if alone else None,
        "measured_bytes": measured + context if alone else None,
        "control": None,
    }


def trainer(model: Any, args: Any, processor: Any, train: Any, held_out: Any, callbacks: Any) -> Any:
    """As of a task: Transformers' own, which is what those of tasks but for language models are."""
    from transformers import Trainer, default_data_collator

    return Trainer(model, args, default_data_collator, train_dataset=train, callbacks=callbacks)


def examples(case: Case, size: Size, settings: Any) -> list[dict[str, Any]]:
    """Two batches, of the full length: what is predicted is the most that one takes."""
    import torch

    torch.manual_seed(0)
    rows: list[dict[str, Any]] = []
    for number in range(2 * size.batch):
        if case.task == "image_classification":
            rows.append({"pixel_values": torch.rand(3, size.image, size.image), "labels": number % 2})
            continue
        ids = torch.randint(4, settings.vocab_size, (size.length,))
        row = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        rows.append(row | {"labels": number % 2 if case.task == "sequence_classification" else ids.clone()})
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, default=RECORD)
    parser.add_argument("--commit", default="")
    parser.add_argument("--size", choices=SIZES, help="of the models, if not as for the device")
    parser.add_argument("--only", nargs="*", metavar="CASE")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--control", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    size = SIZES[options.size or options.device]
    if options.worker:
        print(json.dumps(worker(options.worker, size, options.control)))
        return 0
    import torch

    here = {"device": options.device, "hardware": hardware(torch.device(options.device)), "versions": versions()}
    about = {**commit(options.commit), **here}
    every = json.loads(options.out.read_text(encoding="utf-8"))["cases"] if options.out.is_file() else []  # it goes on
    done = [case["case"] for case in every if case["device"] == options.device]
    for name, case in cases(size).items():
        if name in done or (options.only and name not in options.only):
            continue
        gpu = options.device == "cuda"
        found = on_gpu(name, options.size or "cuda") if gpu else on_cpu(case, size, not done)
        done.append(name)
        every.append({"case": name, **found, **about})
        print({key: value for key, value in every[-1].items() if key not in about}, file=sys.stderr, flush=True)
        text = json.dumps({"benchmark": "hard_cap", "cases": every}, indent=1)
        options.out.write_text(text + "\n", encoding="utf-8")
    mine = [case for case in every if case["device"] == options.device]
    return int(any(case["code"] or case["halved"] for case in mine))


if __name__ == "__main__":
    raise SystemExit(main())
