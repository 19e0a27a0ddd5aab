"""Every command of docs/serving.md runs, one after another, on a run of texts with labels and one of chats."""

from __future__ import annotations

import io
import re
import shlex
import sys
from pathlib import Path

import pytest

from command_line import reltune, review_rows, write_csv
from gguf_models import bytes_tokenizer, made
from reltune.names import EXPORT_FORMS
from reltune.tasks.registry import TASKS
from task_cases import write_rows
from tiny_models import save_tiny_bert

PAGE = (Path(__file__).parents[1] / "docs" / "serving.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, flags=re.M | re.S)


def test_every_command_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_tiny_bert("bert")
    train = write_csv(Path("train.csv"), review_rows(40))
    few = ("--max_steps", 1, "--granularity", "column", "--budget", "20%", "--criteria", "random")
    assert reltune("run", "--model_name_or_path", "bert", "--train_file", train, *few, "--output_dir", "run").code == 0
    write_csv(Path("ask.csv"), [("good film", "x"), ("bad book", "y")], header=("text", "id"))
    write_rows(Path("ask.jsonl"), [{"text": "good"}, {"text": ""}])
    tokenizer = bytes_tokenizer("qwen2")
    made("qwen2", len(tokenizer)).save_pretrained("qwen")
    tokenizer.save_pretrained("qwen")
    answer = [{"role": "assistant", "content": "good"}]
    rows = [{"messages": [{"role": "user", "content": f"how good is {i}?"}, *answer]} for i in range(24)]
    train = write_rows(Path("chats.jsonl"), rows)
    words = ("--generation_examples", 0, "--output_dir", "chats")
    assert reltune("run", "--model_name_or_path", "qwen", "--train_file", train, *few, *words).code == 0
    ran = []
    for line in "".join(blocks("sh")).splitlines():
        said, _, command = line.rpartition(" | ")
        program, *flags = shlex.split(command)
        assert program == "reltune", line
        monkeypatch.setattr(sys, "stdin", io.StringIO(" ".join(shlex.split(said)[1:]) if said else "Hello?\n/quit\n"))
        done = reltune(*flags)
        assert done.code == 0 and done.out, (line, done)
        ran.append(flags)
    assert {flags[0] for flags in ran} == {"predict", "chat", "export"}
    assert {flags[flags.index("--to") + 1] for flags in ran if "--to" in flags} == set(EXPORT_FORMS)
    for block in blocks("python"):
        exec(compile(block, "serving.md", "exec"), {})
    assert (
        Path("answers.csv").is_file()
        and Path("gguf/model-q8_0.gguf").is_file()
        and Path("for-ollama/Modelfile").is_file()
    )


def test_the_page_has_every_task() -> None:
    table = PAGE.partition("## Predictions")[2].partition("## A conversation")[0]
    for name, task in TASKS.items():
        (line,) = [line for line in table.splitlines() if f"`{name}`" in line]
        assert all(f"`{more}`" in line for more in task.predicts[1:]), name
