"""lm-evaluation-harness on a run's base and tuned model: on local tasks, against log-likelihoods and decoding by hand."""

from __future__ import annotations

import copy
import functools
import importlib.util
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, T5Config, T5ForConditionalGeneration

import reltune
from command_line import reltune as command
from reltune.errors import InputError
from reltune.processes import Processes
from reltune.runs import lm_evaluation
from task_cases import write_rows
from tiny_models import CHAT, save_tiny_bert, save_tiny_llama

OPPOSITES = {"good": "bad", "great": "dull", "fine": "poor", "好": "坏"}
TASK = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}, train: {data}}}, cache_dir: {cache}}}
test_split: test
fewshot_split: train
output_type: {kind}
doc_to_text: "{{{{question}}}}"
metadata: {{version: {version}}}
"""
CHOOSE = 'doc_to_choice: "{{choices}}"\ndoc_to_target: gold\n'
WRITE = """\
doc_to_target: "{{answer}}"
generation_kwargs: {max_gen_toks: 3, until: [book]}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


def questions(count: int, seed: int) -> list[dict[str, Any]]:
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        word, *others = draw.sample(list(OPPOSITES), 3)
        choices = [OPPOSITES[w] for w in (word, *others)]
        choices[1] += " film"
        draw.shuffle(choices)
        rest = " ".join(draw.choices(["film", "book", "very"], k=draw.randint(1, 4)))
        rows.append(
            {
                "question": f"{rest} {word} not",
                "answer": OPPOSITES[word],
                "choices": choices,
                "gold": next(i for i, choice in enumerate(choices) if choice.startswith(OPPOSITES[word])),
            }
        )
    return rows


def task_file(place: Path, name: str, kind: str, more: str, version: int = 1) -> Path:
    """A task on place/questions.jsonl, in place/tasks."""
    path = place / "tasks" / f"{name}.yaml"
    path.parent.mkdir(exist_ok=True)
    facts = {"name": name, "data": place / "questions.jsonl", "cache": place / "cache", "kind": kind}
    path.write_text(TASK.format(version=version, **facts) + more)
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model tuned to answer questions, and two tasks that ask them."""
    place = tmp_path_factory.mktemp("lm_eval")
    save_tiny_llama(place / "model", chat_template=CHAT, hidden_size=64, intermediate_size=128)
    write_rows(place / "questions.jsonl", questions(20, seed=1))
    rows = [{"prompt": row["question"], "completion": f" {row['answer']}"} for row in questions(120, seed=2)]
    write_rows(place / "train.jsonl", rows)
    task_file(place, "choose", "multiple_choice", CHOOSE, version=3)
    task_file(place, "write", "generate_until", WRITE)
    answer = command(
        *("run", "--model_name_or_path", place / "model", "--train_file", place / "train.jsonl"),
        *("--output_dir", place / "run", "--granularity", "column,row,norm", "--budget", "70%"),
        *("--learning_rate", "1e-2", "--num_train_epochs", 20, "--eval_strategy", "no", "--analysis_examples", 32),
    )
    assert answer.code == 0, answer.err
    assert command("export", place / "run", "--to", "merged", "--output_dir", place / "merged").code == 0
    return place


@pytest.fixture(scope="module")
def measured(place: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """Rows of lm_eval.json by task and metric."""
    answer = command("evaluate", place / "run", "--lm_eval_tasks", place / "tasks", "--lm_eval_batch_size", 7)
    assert answer.code == 0, answer.err
    assert "lm-evaluation-harness" in answer.out and "exact_match ↑" in answer.out
    assert command("report", place / "run").code == 0
    return scores(place / "run")


def scores(run: Path) -> dict[tuple[str, str], dict[str, Any]]:
    record = json.loads((run / "lm_eval.json").read_text())
    return {(score["task"], score["metric"]): score for score in record["scores"]}


def log_likelihood(model: Any, tokenizer: Any, prompt: str, words: str) -> float:
    start = len(tokenizer(prompt)["input_ids"])
    ids = torch.tensor([tokenizer(prompt + words)["input_ids"]])
    with torch.no_grad():
        logs = model(ids).logits[0, :-1].double().log_softmax(-1)
    return float(logs.gather(1, ids[0, 1:, None])[start - 1 :].sum())


@functools.cache
def by_hand(place: Path, model: str, chat: bool = False) -> dict[str, list[bool]]:
    """Whether each question is answered rightly: by likelihood, by likelihood per character, by greedy decoding."""
    plain, tokenizer = (kind.from_pretrained(place / model) for kind in (AutoModelForCausalLM, AutoTokenizer))
    plain.eval()
    found: dict[str, list[bool]] = {"acc": [], "acc_norm": [], "exact_match": []}
    for row in map(json.loads, (place / "questions.jsonl").read_text().splitlines()):
        asked = row["question"]
        if chat:
            turns = [{"role": "user", "content": asked}]
            asked = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        logs = [log_likelihood(plain, tokenizer, asked, f" {choice}") for choice in row["choices"]]
        each = [value / len(choice) for value, choice in zip(logs, row["choices"], strict=True)]
        found["acc"].append(logs.index(max(logs)) == row["gold"])
        found["acc_norm"].append(each.index(max(each)) == row["gold"])
        ids = tokenizer(asked)["input_ids"]
        written: list[int] = []
        for _ in range(3):
            with torch.no_grad():
                written.append(int(plain(torch.tensor([ids + written])).logits[0, -1].argmax()))
            if written[-1] == tokenizer.eos_token_id or "book" in tokenizer.decode(written):
                break
        text = tokenizer.decode(written, skip_special_tokens=True).split("book")[0]
        found["exact_match"].append(text.strip() == row["answer"])
    return found


@pytest.mark.parametrize("metric", ["acc", "acc_norm", "exact_match"])
def test_scores_are_those_of_plain_models(place: Path, measured: dict, metric: str) -> None:
    row = measured["write" if metric == "exact_match" else "choose", metric]
    for key, model in (("base", "model"), ("tuned", "merged")):
        right = by_hand(place, model)[metric]
        share = sum(right) / len(right)
        assert row[key] == pytest.approx(share), (key, metric)
        error = (share * (1 - share) / (len(right) - 1)) ** 0.5
        assert row[f"{key}_stderr"] == pytest.approx(error)
    assert row["tuned"] > row["base"] + 0.2, "training is seen"
    assert (row["samples"], row["num_fewshot"], row["higher_is_better"]) == (20, 0, True)


def test_record_and_report(place: Path, measured: dict) -> None:
    record = json.loads((place / "run" / "lm_eval.json").read_text())
    assert record["lm_eval_version"] and record["batch_size"] == 7 and record["limit"] is None
    assert measured["choose", "acc"]["version"] == "3" and len(measured) == 3
    page = (place / "run" / "report.html").read_text()
    assert "lm-evaluation-harness" in page and "<th>choose</th>" in page and "acc_norm ↑" in page
    # what is measured of an adapter goes with it
    from reltune.runs.directory import RunDirectory

    other = shutil.copytree(place / "run", place / "copy")
    RunDirectory(other).clear("tune")
    assert not (other / "lm_eval.json").exists()


def test_limit_and_examples_in_the_prompt(place: Path, measured: dict) -> None:
    other = shutil.copytree(place / "run", place / "few")
    choose = place / "tasks" / "choose.yaml"
    answer = command(*("evaluate", other, "--lm_eval_tasks", choose, "--lm_eval_num_fewshot", 2, "--lm_eval_limit", 12))
    assert answer.code == 0, answer.err
    row = scores(other)["choose", "acc"]
    assert (row["samples"], row["num_fewshot"]) == (12, 2)
    assert json.loads((other / "all_results.json").read_text()) == json.loads(
        (place / "run" / "all_results.json").read_text()
    )
    assert row["base"] != measured["choose", "acc"]["base"] or row["tuned"] != measured["choose", "acc"]["tuned"]


def test_prompts_as_turns_of_a_chat(place: Path, measured: dict) -> None:
    other = shutil.copytree(place / "run", place / "chat")
    answer = command("evaluate", other, "--lm_eval_tasks", place / "tasks", "--lm_eval_apply_chat_template")
    assert answer.code == 0, answer.err
    for key, model in (("base", "model"), ("tuned", "merged")):
        right = by_hand(place, model, chat=True)
        for (_, metric), row in scores(other).items():
            assert row[key] == pytest.approx(sum(right[metric]) / 20), (key, metric)


def test_encoders_with_decoders(place: Path) -> None:
    """The question goes to the encoder, the choice to the decoder; columns and rows are chosen."""
    tokenizer = AutoTokenizer.from_pretrained(place / "model")
    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2}
    torch.manual_seed(0)
    marks = {"decoder_start_token_id": tokenizer.pad_token_id, "pad_token_id": tokenizer.pad_token_id}
    base = T5ForConditionalGeneration(T5Config(vocab_size=len(tokenizer), eos_token_id=0, **marks, **sizes)).eval()
    relevance = reltune.analyze(base, criteria=["magnitude"])
    plan = reltune.select(relevance, budget="30%", granularity=["column", "row"])
    tuned = get_peft_model(copy.deepcopy(base), reltune.ReltuneConfig(plan=plan, init_weights=False))
    tasks = lm_evaluation.load_tasks([str(place / "tasks" / "choose.yaml")])
    found = lm_evaluation.evaluate(tuned, tokenizer, tasks, "SEQ_2_SEQ_LM", batch_size=5)
    assert found is not None and [row.metric for row in found] == ["acc", "acc_norm"]
    for key, model in (("base", base), ("tuned", tuned.merge_and_unload().eval())):
        right = []
        for row in map(json.loads, (place / "questions.jsonl").read_text().splitlines()):
            logs = []
            for choice in row["choices"]:
                ids, labels = (tokenizer(text, return_tensors="pt")["input_ids"] for text in (row["question"], choice))
                with torch.no_grad():
                    of_words = model(input_ids=ids, labels=labels).logits.double().log_softmax(-1)
                logs.append(float(of_words.gather(2, labels[..., None]).sum()))
            right.append(logs.index(max(logs)) == row["gold"])
        assert getattr(found[0], key) == pytest.approx(sum(right) / len(right)), key
    assert found[0].base != found[0].tuned


def test_groups_and_files_beside_them(place: Path) -> None:
    """A directory with a group, its members and a task of its own; what others include is no task."""
    folder = place / "group"
    shutil.copytree(place / "tasks", folder)
    (folder / "_shared.yaml").write_text("doc_to_decontamination_query: question\n")
    (folder / "other.yaml").write_text("include: choose.yaml\ntask: other\n")
    (folder / "both.yaml").write_text(
        "group: both\ntask: [choose, other]\naggregate_metric_list: [{metric: acc, weight_by_size: true}]\n"
    )
    found = lm_evaluation.load_tasks([str(folder)])
    assert [getattr(task, "name", None) or task.task_name for task in found] == ["both", "write"]
    both = lm_evaluation.load_tasks([str(folder / "other.yaml"), str(folder / "choose.yaml")])
    assert [task.task_name for task in both] == ["other", "choose"]
    with pytest.raises(InputError, match="two tasks 'choose'"):
        lm_evaluation.load_tasks([str(folder / "choose.yaml"), str(place / "tasks")])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda text: "task: [", "cannot be read as a task file"),
        (lambda text: "group: all\ntask: [choose]\n", "name the directory that holds it"),
        (lambda text: "output_type: multiple_choice\n", "cannot be loaded"),
        (lambda text: text.replace("questions.jsonl", "nothing.jsonl"), "the paths of its data"),
        (lambda text: text.replace("dataset_path: json", "dataset_path: nobody/nothing"), "unset HF_HUB_OFFLINE"),
        (lambda text: text.replace("test_split: test", "training_split: train"), "must have valid or test docs"),
        (lambda text: text.replace("test_split: test", "test_split: rest"), "cannot be loaded"),
        (lambda text: text + "unsafe_code: true\n", "runs the code that the model writes"),
    ],
)
def test_tasks_that_cannot_be(place: Path, tmp_path: Path, change: Callable[[str], str], words: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(change((place / "tasks" / "choose.yaml").read_text()))
    answer = command("evaluate", place / "run", "--lm_eval_tasks", path)
    last = answer.err.strip().splitlines()[-1]
    assert answer.code == 2 and last.startswith("reltune: error: lm_eval_tasks") and words in last, answer.err
    assert "bad.yaml" in last or "'choose'" in last


def test_what_is_refused(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ("evaluate", place / "run", "--lm_eval_tasks")
    answer = command(*asked, tmp_path / "none.yaml")
    assert answer.code == 2 and "does not exist" in answer.err
    answer = command(*asked, place / "tasks", "--lm_eval_limit", 0)
    assert answer.code == 2 and "at least 1" in answer.err
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "lm_eval" else found(name, *a))
    answer = command(*asked, place / "tasks")
    assert answer.code == 2 and 'pip install "reltune[lm-eval]"' in answer.err
    monkeypatch.undo()
    with pytest.raises(InputError, match="no chat template"):
        lm_evaluation.check_model("CAUSAL_LM", object(), True)
    monkeypatch.setattr(Processes, "joined", lambda: Processes(0, 2))
    with pytest.raises(InputError, match="1 examples for 2 processes"):
        lm_evaluation.load_tasks([str(place / "tasks")], limit=1)


def test_a_classifier_is_refused_before_anything_is_made(place: Path, tmp_path: Path) -> None:
    save_tiny_bert(tmp_path / "model")
    write_rows(tmp_path / "train.jsonl", [{"text": f"good film {i}", "label": i % 2} for i in range(20)])
    answer = command(
        *("run", "--model_name_or_path", tmp_path / "model", "--train_file", tmp_path / "train.jsonl"),
        *("--output_dir", tmp_path / "run", "--lm_eval_tasks", place / "tasks"),
    )
    assert answer.code == 2 and "lm_eval_tasks are for language models" in answer.err
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_names_of_the_harness(place: Path) -> None:
    """Its index of thousands of files is read."""
    answer = command("evaluate", place / "run", "--lm_eval_tasks", "hellasweg")
    assert answer.code == 2 and "did you mean" in answer.err and "'hellaswag'" in answer.err
    answer = command("evaluate", place / "run", "--lm_eval_tasks", "hellaswag")
    assert answer.code == 2 and "unset HF_HUB_OFFLINE" in answer.err


@pytest.mark.slow
def test_two_processes_share_the_examples(place: Path, measured: dict) -> None:
    other = shutil.copytree(place / "run", place / "shared")
    words = [
        "--standalone",
        "--nproc_per_node=2",
        "-m",
        "reltune",
        "evaluate",
        other,
        "--lm_eval_tasks",
        place / "tasks",
    ]
    surroundings = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    line = [sys.executable, "-m", "torch.distributed.run", *map(str, words)]
    done = subprocess.run(line, env=surroundings, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("lm-evaluation-harness") == 1
    assert scores(other).keys() == measured.keys()
    for key, row in scores(other).items():
        assert row == pytest.approx(measured[key]), key
