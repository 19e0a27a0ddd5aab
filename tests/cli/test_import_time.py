"""`reltune --help` must answer at once, so neither the package nor the command line loads a heavy library."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from command_line import contents
from reltune.config.run_config import RunConfig

HEAVY = {
    "accelerate",
    "datasets",
    "pandas",
    "peft",
    "plotly",
    "scipy",
    "sentence_transformers",
    "sklearn",
    "torch",
    "transformers",
}


def loaded_after(statement: str) -> set[str]:
    """Top-level names in ``sys.modules`` of a new interpreter that ran the statement."""
    code = f"{statement}\nimport sys\nprint('loaded:', *{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.rpartition("loaded:")[2].split())


@pytest.mark.parametrize("module", ["reltune", "reltune.config.run_config", "reltune.cli.commands"])
def test_import_loads_nothing_heavy(module: str) -> None:
    loaded = loaded_after(f"import {module}")
    assert "reltune" in loaded
    assert loaded & HEAVY == set()


def test_heavy_imports_would_be_seen() -> None:
    assert {"sklearn", "scipy"} <= loaded_after("import sklearn")


def test_python_m_is_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "reltune", "nonsense"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("reltune: error: No such command 'nonsense'"), done.stderr


# -- bad input ------------------------------------------------------------------------------------------------------

GOOD = {"model_name_or_path": "model", "train_file": "train.csv", "output_dir": "new"}
GOOD_WORDS = [word for name, value in GOOD.items() for word in (f"--{name}", value)]
REFUSED = [
    ({"model_name_or_path": "no-such-model"}, "HF_HUB_OFFLINE is set"),
    *[({name: "absent.csv"}, "absent.csv does not exist") for name in ("validation_file", "test_file", "train_file")],
    ({"forgetting_file": "absent.jsonl"}, "absent.jsonl does not exist"),
    ({"train_file": "absent.parquet"}, "absent.parquet does not exist"),
    ({"train_file": "table.xls"}, "'.xls'"),
    ({"train_file": "foreign"}, "foreign is a directory with neither a data set"),
    ({"model_name_or_path": "./absent"}, "./absent does not exist"),
    ({"model_name_or_path": "train.csv"}, "train.csv is a file"),
    ({"model_name_or_path": "empty"}, "empty has no config.json"),
    ({"model_name_or_path": "adapter"}, "adapter is an adapter"),
    ({"output_dir": "empty/../train.csv"}, "is a file"),
    ({"output_dir": "foreign"}, "foreign is not empty and holds no run"),
    ({"output_dir": "done"}, "already holds a run"),
    ({"task": "regresion"}, "did you mean 'regression'"),
    ({"criteria": "fishr"}, "did you mean 'fisher'"),
    ({"granularity": "colum"}, "did you mean 'column'"),
    ({"budget": "much"}, "'much' is no number"),
    ({"budget": "101%"}, "above 100%"),
    ({"budget": "1.5"}, "no whole number of parameters"),
    ({"budget": "memory=1GiB memory=2GiB"}, "says twice how much memory"),
    ({"sweep": "budget=1%,nothing"}, "'nothing' is no number"),
    ({"max_length": "0"}, "max_length is 0"),
    ({"learnig_rate": "1e-3"}, "unknown flag --learnig_rate; did you mean '--learning_rate'"),
    ({"seeed": "1"}, "did you mean '--seed'"),
    ({"learning_rate": "fast"}, "learning_rate is 'fast'; it must be a number"),
    ({"max_steps": "1e2"}, "max_steps is '1e2'; it must be a whole number"),
    ({"num_train_epochs": "0"}, "num_train_epochs is 0, so that nothing would be trained"),
    ({"per_device_train_batch_size": "0"}, "per_device_train_batch_size is 0; write 1 or more"),
    ({"eval_strategy": "epochs"}, "--eval_strategy 'epochs' is unknown"),
    ({"text_column": "body"}, "train.csv line 1 has no column 'body'"),
    ({"train_file": "reviews.csv"}, "Name yours with --text_column"),
    ({"test_file": "torn.jsonl"}, "torn.jsonl"),
    ({"config": "absent.yaml"}, "absent.yaml does not exist"),
    ({"config": "broken.yaml"}, "line 2 gives 'seed' a second time"),
    ({"config": "unknown.yaml"}, "'learnig_rate' is no field; did you mean 'learning_rate'"),
    ({"config": "inside.yaml"}, "'max_step' is no field of transformers.TrainingArguments"),
    ({"config": "empty.yaml"}, "max_length is 0"),
]
OTHERS = [
    (["data", "--dataset_name", "bbc_new"], "did you mean 'bbc_news'?"),
    (["tune", "done", "--learning_rate", "1e-3"], "already holds adapter"),
    (["tune", "nowhere"], "holds no run"),
    (["data", "--train_file", "reviews.csv"], "with --text_column"),
    (["compare", *GOOD_WORDS, "--text_column", "body"], "has no column 'body'"),
    (["select", "done"], "already holds plan"),
    (["select", "done", "--overwrite_output_dir", "--budget", "0"], "allows nothing"),
    (["evaluate", "untuned"], "holds no adapter"),
    (["predict", "tuned", "--input_file", "reviews.csv", "--output_file", "new.csv"], "did you mean 'review'?"),
    (["predict", "tuned", "--input_file", "empty", "--output_file", "new.csv"], "empty is a directory with neither"),
    (["export", "done", "--to", "onnx", "--output_dir", "new"], "'onnx'"),
    (["export", "done", "--to", "lora", "--output_dir", "foreign"], "holds files"),
]
SCRIPT = """
import contextlib, io, json, sys
from reltune.cli.commands import main

answers = []
for words in json.loads(sys.argv[1]):
    sys.argv = ["reltune", *words]
    with contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            main()
        except SystemExit as end:
            answers.append([end.code, err.getvalue(), sorted(name.partition(".")[0] for name in sys.modules)])
print(json.dumps(answers))
"""


def test_bad_input_is_refused_before_anything_heavy_is_loaded(tmp_path: Path) -> None:
    """With training flags that are right, of which only transformers knows all types."""
    for name in (
        "model",
        "empty",
        "adapter",
        "foreign",
        "done/adapter",
        "done/plan",
        "done/relevance",
        "untuned",
        "tuned",
    ):
        (tmp_path / name).mkdir(parents=True)
    files = {
        "model/config.json": "{}",
        "adapter/adapter_config.json": "{}",
        "done/adapter/adapter_config.json": "{}",
        "done/relevance/scores.json": "{}",
        "foreign/notes.txt": "mine",
        "tuned/adapter_config.json": "{}",
        "tuned/task.json": '{"name": "regression", "columns": {"text": "reviews", "label": "price"}}',
        "train.csv": "text,label\na,b\n",
        "reviews.csv": "review,stars\na,1\n",
        "torn.jsonl": '{"text": ',
        "table.xls": "",
        "broken.yaml": "seed: 1\nseed: [",
        "unknown.yaml": "learnig_rate: 1e-3",
        "inside.yaml": "training: {max_step: 1}",
        "empty.yaml": "max_length: 0\nlearning_rate: 1e-3",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    for run in ("done", "untuned"):
        RunConfig("model", run, train_file="train.csv").save(tmp_path / run / "config.yaml")
    before = contents(tmp_path)
    calls, expected = [], []
    for changed, named in REFUSED:
        changed = {"num_train_epochs": "1", "bf16": "false", **GOOD, **changed}
        calls.append(["run", *(word for name, value in changed.items() for word in (f"--{name}", value))])
        expected.append(named)
    for words, named in OTHERS:
        calls.append(words)
        expected.append(named)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(calls)], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    for words, named, (code, message, loaded) in zip(calls, expected, json.loads(done.stdout), strict=True):
        assert code == 2 and named in message, (words, message)
        assert not HEAVY & set(loaded), (words, HEAVY & set(loaded))
    assert contents(tmp_path) == before


@pytest.mark.parametrize("what", ["--defaults", "--schema"])
def test_what_a_config_can_say_is_printed_without_anything_heavy(what: str) -> None:
    shown = f"import sys; sys.argv = ['reltune', 'config', '{what}']\nfrom reltune.cli.commands import main"
    assert loaded_after(f"{shown}\ntry: main()\nexcept SystemExit as end: assert not end.code") & HEAVY == set()


@pytest.mark.slow
def test_what_libraries_remark_on_themselves_is_not_shown(tmp_path: Path) -> None:
    """Of those that transformers and PEFT import because they are installed, too."""
    shutil.copytree(Path(__file__).parents[1] / "artefacts" / "v0_1" / "columns", tmp_path / "columns")
    words = ["select", "columns", "--overwrite_output_dir"]
    script = f"import sys; sys.argv = ['reltune', *{words}]\nfrom reltune.cli.commands import main\ntry: main()\n"
    script += "except SystemExit as end: assert not end.code\nassert {'transformers', 'peft'} <= {*sys.modules}"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and "Next: " in done.stdout and done.stderr == "", done.stderr
