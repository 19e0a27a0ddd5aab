"""Whether a training that was planned for so much memory does with it: ten architectures under a hard limit of the process.

    python benchmarks/hard_cap.py

Models of six blocks with random weights, texts or images at random, 64 to a batch. Of what training is predicted to take, a share is given
as ``--budget memory=…``, to ``reltune run`` with methods that need no analysis. The whole command, with loading and evaluation, runs under
Linux's RLIMIT_DATA of what the process held after a small run of the same kind, and the budget: memory that the process may write to,
whether it was written or not. Each case is a process of its own. Kept is whether training came to its end, and the peak that was
predicted and measured. A case without the budget, under the same limit, is the control.
"""

from __future__ import annotations

import json
import random
import resource
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from capped_worker import held  # noqa: E402
from command_line import reltune  # noqa: E402
from cost_sweep import forked  # noqa: E402
from harness import commit, hardware, versions  # noqa: E402
from tiny_models import tiny_tokenizer  # noqa: E402

MIB = 1 << 20
RECORD = Path(__file__).parent / "results" / "hard_cap.json"
WORDS = [f"w{number}" for number in range(2000)]
WIDE, BLOCKS, LENGTH, IMAGE = 256, 6, 64, 32
BERT = {"hidden_size": WIDE, "num_hidden_layers": BLOCKS, "num_attention_heads": 4, "intermediate_size": 4 * WIDE}
LLAMA = {**BERT, "num_key_value_heads": 4, "max_position_embeddings": 128}
T5 = {
    "d_model": WIDE,
    "d_kv": 64,
    "d_ff": 4 * WIDE,
    "num_layers": BLOCKS // 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
BART = {
    "d_model": WIDE, "encoder_layers": 3, "decoder_layers": 3, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 4 * WIDE, "decoder_ffn_dim": 4 * WIDE, "decoder_start_token_id": 3, "max_position_embeddings": 128,
}  # fmt: skip
EXPERTS = {**LLAMA, "intermediate_size": 2 * WIDE}
# name -> class of the config, its sizes, the task, the method, what of the predicted memory is given
CASES: dict[str, tuple[str, Mapping[str, Any], str, str, float]] = {
    "BERT, LoRA": ("BertConfig", BERT, "sequence_classification", "lora", 0.5),
    "BERT, all weights": ("BertConfig", BERT, "sequence_classification", "full", 0.6),
    "DistilBERT, biases": ("DistilBertConfig", {"dim": WIDE, "n_layers": BLOCKS, "n_heads": 4, "hidden_dim": 4 * WIDE},
                           "sequence_classification", "bitfit", 0.6),
    "Llama, LoRA": ("LlamaConfig", LLAMA, "causal_lm", "lora", 0.5),
    "Qwen2, all weights": ("Qwen2Config", LLAMA, "causal_lm", "full", 0.6),
    "Mixtral, all weights": ("MixtralConfig", {**EXPERTS, "num_local_experts": 4}, "causal_lm", "full", 0.6),
    "T5, LoRA": ("T5Config", T5, "seq2seq", "lora", 0.6),
    "BART, all weights": ("BartConfig", BART, "seq2seq", "full", 0.7),
    "ViT, LoRA": ("ViTConfig", {**BERT, "image_size": IMAGE, "patch_size": 4}, "image_classification", "lora", 0.5),
    "ViT, all weights": ("ViTConfig", {**BERT, "image_size": IMAGE, "patch_size": 4}, "image_classification", "full", 0.6),
}  # fmt: skip
HEADS = {
    "sequence_classification": "SequenceClassification", "causal_lm": "CausalLM", "seq2seq": "Seq2SeqLM",
    "image_classification": "ImageClassification",
}  # fmt: skip


def prepare(place: Path, kind: str, sizes: Mapping[str, Any], task: str) -> None:
    """Save the model with its tokenizer or processor, and 160 rows."""
    import torch
    import transformers

    torch.manual_seed(0)
    generator = random.Random(0)

    def words(count: int) -> str:
        return " ".join(generator.choices(WORDS, k=count))

    rows: list[dict[str, Any]] = []
    more: dict[str, Any] = {}
    if task == "image_classification":
        from PIL import Image
        from transformers import ViTImageProcessorPil

        ViTImageProcessorPil(size={"height": IMAGE, "width": IMAGE}).save_pretrained(place / "model")
        for number in range(160):
            path = place / f"{number}.png"
            Image.effect_noise((IMAGE, IMAGE), 90).convert("RGB").save(path)
            rows.append({"image": str(path), "label": "ab"[number % 2]})
    else:
        tokenizer = tiny_tokenizer(WORDS)
        tokenizer.eos_token = "[SEP]"
        tokenizer.save_pretrained(place / "model")
        more = {"vocab_size": len(tokenizer), "pad_token_id": 0, "eos_token_id": 3, "bos_token_id": 2}
        for number in range(160):
            if task == "sequence_classification":
                rows.append({"text": words(LENGTH - 2), "label": "ab"[number % 2]})
            elif task == "causal_lm":
                rows.append({"text": words(LENGTH - 2)})
            else:
                rows.append({"source": words(LENGTH - 2), "target": words(20)})
    config = getattr(transformers, kind)(**{**sizes, **more})
    getattr(transformers, f"AutoModelFor{HEADS[task]}").from_config(config).save_pretrained(place / "model")
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def command(place: Path, task: str, method: str, name: str, *more: object) -> list[object]:
    length: list[object] = [] if task == "image_classification" else ["--max_length", LENGTH]
    length += {
        "seq2seq": ["--max_new_tokens", 2],
        "causal_lm": ["--max_new_tokens", 2, "--generation_examples", 4],
    }.get(task, [])
    return [
        "run", "--model_name_or_path", place / "model", "--train_file", place / "rows.jsonl", "--task", task, "--method", method,
        "--output_dir", place / name, "--eval_strategy", "no", "--save_strategy", "no", *length, *more,
    ]  # fmt: skip


def predicted(place: Path, task: str, method: str) -> int:
    """Bytes that training takes without a limit of memory."""
    import reltune as library

    fields: dict[str, Any] = {"per_device_train_batch_size": 64, "device": "cpu", "task": task, "method": method}
    if task != "image_classification":
        fields["max_length"] = LENGTH
    estimate = library.estimate(str(place / "model"), **fields)
    return sum(next(row for row in estimate.rows if row.method == method).memory.values())


def capped(place: Path, task: str, method: str, budget: int, limited: bool) -> dict[str, Any]:
    """In a process of its own."""
    from reltune.runs.summary import predicted_and_measured

    small = reltune(
        *command(place, task, method, f"small {limited}", "--per_device_train_batch_size", 2, "--max_steps", 2)
    )
    assert small.code in (None, 0), small.err[-2000:]
    most = held() + budget
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    words = [
        "--per_device_train_batch_size",
        64,
        "--max_steps",
        4,
        *(["--budget", f"memory={budget // MIB}MiB"] if limited else []),
    ]
    answer = reltune(*command(place, task, method, f"run {limited}", *words))
    found: dict[str, Any] = {"code": answer.code or 0, "said": "" if not answer.code else answer.err[-300:]}
    if not answer.code and limited:
        prediction, cost = (
            json.loads((place / f"run {limited}" / name).read_text(encoding="utf-8"))
            for name in ("prediction.json", "training_cost.json")
        )
        memory = predicted_and_measured(prediction, cost)[0]
        found |= {"predicted_bytes": memory.predicted, "measured_bytes": memory.measured}
    return found


def main() -> int:
    import peft  # noqa: F401
    import torch

    import reltune.tuner.model  # noqa: F401

    cases = json.loads(RECORD.read_text(encoding="utf-8"))["cases"] if RECORD.is_file() else []  # it goes on
    about = {"benchmark": "hard_cap", **commit(""), "hardware": hardware(torch.device("cpu")), "versions": versions()}
    for name, (kind, sizes, task, method, given) in CASES.items():
        if any(case["case"] == name for case in cases):
            continue
        with tempfile.TemporaryDirectory() as directory:
            place = Path(directory)
            forked(prepare, place, kind, sizes, task)
            whole = forked(predicted, place, task, method)
            budget = int(given * whole) // MIB * MIB
            found = forked(capped, place, task, method, budget, True)
            control = forked(capped, place, task, method, budget, False)["code"] if not cases else None
        cases.append({"case": name, "without_limit_bytes": whole, "budget_bytes": budget, **found, "control": control})
        print(cases[-1], file=sys.stderr, flush=True)
        RECORD.write_text(json.dumps({**about, "cases": cases}, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
