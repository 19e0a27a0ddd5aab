"""A language model through the program's own commands, and its exported LoRA in plain PEFT: benchmarks/results/smollm2.json.

    python benchmarks/smollm2.py --model MODEL.gguf --data PREFIX --output_dir benchmarks/results --budget 1.8% --spread even …

PREFIX_train.jsonl, PREFIX_validation.jsonl and PREFIX_test.jsonl hold rows of instruction and output; further flags are those of
`reltune run`. The exported adapter is loaded in a process without reltune, which writes for the same prompts as ``outputs.jsonl``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from harness import commit, hardware, versions

PLAIN_PEFT = """
import json, sys
from pathlib import Path
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.modules["reltune"] = None  # importing it fails from here on
source, lora, outputs, new_tokens = sys.argv[1:]
path = Path(source)
place = {"gguf_file": path.name} if path.is_file() else {}
base = AutoModelForCausalLM.from_pretrained(str(path.parent if place else path), dtype=torch.float32, **place)
tokenizer = AutoTokenizer.from_pretrained(lora)
model = PeftModel.from_pretrained(base, lora).to("cuda" if torch.cuda.is_available() else "cpu").eval()
rows = [json.loads(line) for line in open(outputs, encoding="utf-8")]
same = 0
for start in range(0, len(rows), 64):
    part = rows[start : start + 64]
    prompts = [row["prompt"] for row in part]
    if tokenizer.chat_template is not None:
        turns = [[{"role": "user", "content": prompt}] for prompt in prompts]
        prompts = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    batch = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
    batch = {key: value.to(model.device) for key, value in batch.items() if key != "token_type_ids"}
    with torch.no_grad():
        written = model.generate(**batch, max_new_tokens=int(new_tokens), do_sample=False,
                                 pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id)
    texts = tokenizer.batch_decode(written[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    same += sum(text == row["tuned"] for text, row in zip(texts, part))
print(json.dumps({"same_generations": same, "of": len(rows)}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a directory or a GGUF file")
    parser.add_argument("--data", required=True, help="PREFIX of the three files")
    parser.add_argument("--max_new_tokens", type=int, default=12)
    parser.add_argument("--commit", default="")
    parser.add_argument("--output_dir", required=True)
    options, further = parser.parse_known_args()

    with tempfile.TemporaryDirectory() as scratch:
        run, lora = Path(scratch) / "run", Path(scratch) / "lora"
        flags = ["--max_new_tokens", str(options.max_new_tokens), *further]
        if "--granularity" not in further:
            flags += ["--granularity", "column"]  # single weights have no LoRA file
        files = {"train_file": "train", "validation_file": "validation", "test_file": "test"}
        words = ["run", "--model_name_or_path", options.model, "--output_dir", str(run), *flags]
        for name, split in files.items():
            words += [f"--{name}", f"{options.data}_{split}.jsonl"]
        reltune = [sys.executable, "-m", "reltune"]
        subprocess.run([*reltune, *words], check=True)
        subprocess.run([*reltune, "export", str(run), "--to", "lora", "--output_dir", str(lora)], check=True)
        arguments = [options.model, str(lora), str(run / "outputs.jsonl"), str(options.max_new_tokens)]
        plain = subprocess.run(
            [sys.executable, "-c", PLAIN_PEFT, *arguments], check=True, stdout=subprocess.PIPE, text=True
        )
        results = json.loads((run / "all_results.json").read_text(encoding="utf-8"))
        outputs = [json.loads(line) for line in (run / "outputs.jsonl").read_text(encoding="utf-8").splitlines()]
    record = {
        "benchmark": "smollm2",
        "flags": flags,
        **commit(options.commit),
        "hardware": hardware(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
        "versions": versions(("trl", "accelerate")),
        "results": results,
        "exported_lora_in_plain_peft": json.loads(plain.stdout.splitlines()[-1]),
        "first_outputs": outputs[:8],
    }
    Path(options.output_dir).mkdir(parents=True, exist_ok=True)
    path = Path(options.output_dir) / "smollm2.json"
    path.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(json.dumps({**record["exported_lora_in_plain_peft"], "exact_match": results.get("test_exact_match")}))


if __name__ == "__main__":
    main()
