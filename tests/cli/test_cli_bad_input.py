"""Bad input: exit code 2, one short message that names the thing, and not a byte on disk moved."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from command_line import assert_refused, contents, reltune, review_rows, write_csv
from reltune.config.fields import checked_fields
from reltune.config.run_config import FIELDS, RunConfig
from reltune.errors import InputError
from reltune.runs.preflight import check_selection
from tiny_models import save_tiny_bert


@dataclass(frozen=True)
class Place:
    """A folder with two models, a training file, a finished run ``done`` and one that was only analyzed."""

    folder: Path

    def __truediv__(self, name: str) -> Path:
        return self.folder / name


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    place = Place(tmp_path_factory.mktemp("place"))
    save_tiny_bert(place / "model")
    save_tiny_bert(place / "wider", hidden=48)
    save_tiny_bert(place / "other_seed", seed=1)
    write_csv(place / "train.csv", review_rows(60))
    new_run = new_run_words(place)
    assert reltune("run", *new_run, "--output_dir", place / "done", "--num_train_epochs", 1).code == 0
    assert reltune("analyze", *new_run[:4], "--criteria", "fisher", "--output_dir", place / "analyzed").code == 0
    return place


@pytest.fixture(autouse=True)
def nothing_moves(place: Place) -> Iterator[None]:
    """Whatever a test of this file does with ``place``: afterwards it is what it was."""
    before = contents(place.folder)
    yield
    assert contents(place.folder) == before


def new_run_words(place: Place, **changed: object) -> list[object]:
    """Flags of a good run, without its output directory; ``None`` leaves one out."""
    words: dict[str, object] = {
        "model_name_or_path": place / "model",
        "train_file": place / "train.csv",
        "granularity": "column",
        "budget": "5%",
        **changed,
    }
    return [word for name, value in words.items() if value is not None for word in (f"--{name}", value)]


def refuse(place: Place, *named: str, **changed: object) -> None:
    """A new run with these flags is refused and leaves no directory."""
    words = new_run_words(place, **changed)
    assert_refused(reltune("run", *words, "--output_dir", place / "new"), *named)
    assert not (place / "new").exists()


# -- data -----------------------------------------------------------------------------------------------------------


def test_missing_files(place: Place) -> None:
    for flag in ("train_file", "validation_file", "test_file"):
        refuse(place, "absent.csv", "does not exist", **{flag: place / "absent.csv"})


def test_missing_columns(place: Place) -> None:
    refuse(place, "'body'", "'text', 'label'", "--text_column", text_column="body")
    refuse(place, "'topic'", "--label_column", label_column="topic")
    refuse(place, "'text'", text_column="text", label_column="text")


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"", "empty"),
        (b"text,label\n", "no rows"),
        (b"text,label\ngood film,pos\nbad film\n", "line 3"),
        (b"text,label\ngood film,pos\n,neg\n", "line 3"),
        (b'text,label\n"good film,pos\nbad film,neg\n', "not valid CSV"),
        (b"text,label\ngood \xb5\xe7\xd3\xb0,pos\nbad film,neg\n", "line 2"),
        (b"\x89PNG\r\n\x1a\n\x00\x00\x00", "binary"),
        ("text,label\n好,pos\n坏,neg\n".encode("utf-16-le"), "utf-16"),
        (b"text;label\ngood film\nbad film\n", "separator seems to be ';'"),
        (b"text\tlabel\ngood film;pos\nbad film;neg\n", "separator seems to be"),
        (b"PK\x03\x04\x14\x00", "spreadsheet"),
        (b"text,label\ngood film,pos\nbad \x00film,neg\n" + b"a film,pos\n" * 20, "line 3"),
    ],
)
def test_files_that_hold_no_labelled_texts(place: Place, tmp_path: Path, content: bytes, named: str) -> None:
    path = tmp_path / "data.csv"
    path.write_bytes(content)
    refuse(place, "data.csv", named, train_file=path)
    refuse(place, "data.csv", named, test_file=path)


def test_jsonl(place: Place, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "good film", "label": "pos"}\nbad film\n')
    refuse(place, "data.jsonl", "line 2", train_file=path)
    path.write_text('{"body": "good film", "label": "pos"}\n')
    refuse(place, "data.jsonl", "'body', 'label'", "text, label", train_file=path)
    refuse(place, "'.xls'", train_file=place / "train.csv", test_file=write_csv(tmp_path / "t.xls", review_rows(4)))


def test_labels_unseen_in_training(place: Place, tmp_path: Path) -> None:
    strange = write_csv(tmp_path / "strange.csv", [*review_rows(4), ("fine film", "neutral")])
    refuse(place, "'neutral'", "strange.csv", "does not occur in training", "line 6", test_file=strange)
    refuse(place, "'neutral'", "strange.csv", "does not occur in training", validation_file=strange)


def test_one_class_only(place: Place, tmp_path: Path) -> None:
    alone = write_csv(tmp_path / "alone.csv", review_rows(30, labels=("pos", "pos")))
    refuse(place, "'pos'", "two classes", train_file=alone)


def test_too_few_rows_to_split(place: Place, tmp_path: Path) -> None:
    refuse(place, "few.csv", "too few", train_file=write_csv(tmp_path / "few.csv", review_rows(2)))
    alone = write_csv(tmp_path / "alone.csv", [(text, f"name {i}") for i, (text, _) in enumerate(review_rows(30))])
    refuse(place, "30 of which are the only one of their label", train_file=alone)


def test_a_lora_file_of_what_has_none(place: Path) -> None:
    answer = reltune(
        "run", *new_run_words(place, granularity=None, budget=None), "--method", "bitfit", "--export", "lora",
        "--output_dir", place / "new",
    )  # fmt: skip
    assert_refused(answer, "the method bitfit", "use --export merged")


def test_nothing_or_two_things_to_train_on(place: Place) -> None:
    refuse(place, "train_file", "dataset_name", train_file=None)
    refuse(place, "train_file", "dataset_name", dataset_name="bbc_news")
    refuse(place, "'bbc'", "'bbc_news'", train_file=None, dataset_name="bbc")


def test_unknown_encoding(place: Place) -> None:
    refuse(place, "'utf-9'", "'utf-8'", encoding="utf-9")


# -- budget, criteria, granularity, names ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("budget", "named"),
    [
        ("0", "allows nothing"),
        ("0%", "allows nothing"),
        ("-5%", "allows nothing"),
        ("101%", "above 100%"),
        ("1G", "is no number"),
        ("much", "is no number"),
        ("0,5%", "is no number"),
        ("nan", "is no number"),
        ("1000000", "more than the 20,864 parameters"),
        ("31", "smallest column has 32"),
        ("0.001%", "less than one"),
    ],
)
def test_budget(place: Place, budget: str, named: str) -> None:
    refuse(place, budget, named, budget=budget)
    assert_refused(reltune("select", place / "analyzed", "--budget", budget), budget, named)


def test_unknown_criterion_and_granularity(place: Place) -> None:
    refuse(place, "'fishr'", "'fisher'", criteria="magnitude,fishr")
    refuse(place, "'columns'", "'column'", granularity="columns")
    refuse(place, "criteria has an empty word", criteria=",")
    assert_refused(reltune("select", place / "analyzed", "--criteria", "Fisher"), "'Fisher'", "'fisher'")
    assert_refused(reltune("select", place / "analyzed", "--granularity", "colum"), "'colum'", "'column'")


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"granularity": "direction,bias"}, "direction cannot compete with bias"),
        ({"granularity": "element,column"}, "element cannot compete with column"),
        ({"granularity": "column", "spread": "columns"}, "for granularity element alone"),
        ({"granularity": "direction", "probe_directions": 0}, "probe_directions is 0"),
        ({"granularity": "direction", "criteria": "fisher"}, "fisher scores no direction; leave --criteria out"),
        ({"granularity": "direction", "criteria": "depth,movement"}, "depth scores no direction"),
    ],
)
def test_units_that_cannot_be_chosen_are_refused_before_a_model_is_looked_at(changed: dict, named: str) -> None:
    config = RunConfig(
        model_name_or_path="org/model", dataset_name="bbc_news", output_dir="new", **checked_fields(changed, FIELDS)
    )
    with pytest.raises(InputError, match=named):
        check_selection(config)


def test_a_criterion_that_was_not_measured(place: Place) -> None:
    assert_refused(reltune("select", place / "analyzed", "--criteria", "magnitude"), "magnitude", "fisher")


@pytest.mark.parametrize("flag", ["target_modules", "exclude_modules"])
@pytest.mark.parametrize("pattern", ["qerry", r"layer\.7\..*", "((", "query,nothing"])
def test_names_that_match_nothing(place: Place, flag: str, pattern: str) -> None:
    wrong = pattern.rpartition(",")[2]
    refuse(place, flag, repr(wrong), **{flag: pattern})
    assert_refused(reltune("select", place / "analyzed", f"--{flag}", pattern), flag, repr(wrong))
    words = new_run_words(place, granularity=None, budget=None, **{flag: pattern})
    assert_refused(reltune("analyze", *words, "--output_dir", place / "new"), flag, repr(wrong))


def test_the_nearest_module_is_named(place: Place) -> None:
    refuse(place, "did you mean 'query'", target_modules="qerry")


def test_nothing_left_to_choose(place: Place) -> None:
    refuse(place, "exclude_modules", exclude_modules=".*")
    refuse(place, "column", target_modules="LayerNorm")


# -- flags ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--text_colum", "body"], "'--text_column'"),
        (["--learnig_rate", "1e-3"], "'--learning_rate'"),
        (["--num-train-epoch", "1"], "'--num_train_epochs'"),
        (["--evaluation_strategy", "no"], "'--eval_strategy'"),
        (["--no_learning_rate"], "'--learning_rate'"),
        (["--learning_rate", "fast"], "learning_rate is 'fast'; it must be a number"),
        (["--learning_rate"], "--learning_rate"),
        (["--num_train_epochs", "two"], "num_train_epochs is 'two'; it must be a number"),
        (["--max_steps", "2.5"], "max_steps is '2.5'; it must be a whole number"),
        (["--bf16", "maybe"], "bf16 is 'maybe'"),
        (["--lr_scheduler_type", "linea"], "'linear'"),
        (["--optim", "adam_w"], "--optim 'adam_w' is unknown"),
        (["--max_length", "long"], "max_length is 'long'; it must be a whole number"),
        (["--max_length", "0"], "max_length is 0"),
        (["--max_length", "2"], "max_length 2"),
        (["--seed", "-1"], "seed is -1"),
        (["--seed", "4294967296"], "seed is 4294967296"),
        (["--text_column", ""], "text_column is empty"),
        (["--target_modules", ""], "target_modules is empty"),
        (["stray"], "'stray'"),
        (["--learning_rate", "1e-3", "stray"], "'stray'"),
        (["-x"], "'-x'"),
        (["--resume_from_checkpoint", "true"], "reltune tune"),
    ],
)
def test_flags(place: Place, words: list[str], named: str) -> None:
    answer = reltune("run", *new_run_words(place), *words, "--output_dir", place / "new")
    assert_refused(answer, named)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--num_train_epochs", "0"], "num_train_epochs is 0"),
        (["--max_steps", "0"], "max_steps is 0"),
        (["--per_device_train_batch_size", "0"], "per_device_train_batch_size is 0"),
        (["--gradient_accumulation_steps", "-1"], "gradient_accumulation_steps is -1"),
        (["--per_device_train_batch_size", "512", "--dataloader_drop_last"], "nothing to train on"),
        (["--fp16", "--use_cpu"], "fp16 has no effect on a CPU"),
        (["--learning_rate", "nan"], "learning_rate is nan"),
        (["--lr_scheduler_kwargs", '{"warmth": 1}'], "'warmth'"),
        (["--report_to", "a_friend"], "a_friend is not supported"),
        (["--save_strategy", "steps", "--load_best_model_at_end", "true"], "load_best_model_at_end"),
        (["--early_stopping_patience", "1", "--eval_strategy", "no"], "eval_strategy is no"),
        (["--load_best_model_at_end", "true", "--metric_for_best_model", "acuracy"], "did you mean 'accuracy'"),
    ],
)
def test_training_fields_that_cannot_work(place: Place, words: list[str], named: str) -> None:
    answer = reltune("run", *new_run_words(place), *words, "--output_dir", place / "new")
    assert_refused(answer, named)
    answer = reltune("tune", place / "done", "--overwrite_output_dir", *words)
    assert_refused(answer, named)


def test_missing_and_unknown_words(place: Place) -> None:
    assert_refused(reltune("run"), "--model_name_or_path")
    assert_refused(reltune("run", "--model_name_or_path", place / "model"), "--output_dir")
    assert_refused(reltune("evaluate"), "RUN")
    assert_refused(reltune("evaluate", place / "done", "more"), "more")
    assert_refused(reltune("selct", place / "done"), "'selct'", "'select'")
    assert_refused(reltune("select", place / "analyzed", "--bugdet", "5%"), "--bugdet", "--budget")
    assert_refused(reltune("tune", place / "done", "--overwrite_output_dir", "--seed", 3), "--seed", "config.yaml")


# -- models ---------------------------------------------------------------------------------------------------------


def test_models(place: Place) -> None:
    refuse(place, "nowhere", "does not exist", model_name_or_path=place / "nowhere")
    refuse(place, "done", "config.json", model_name_or_path=place / "done")
    refuse(place, "adapter", "base model", model_name_or_path=place / "done" / "adapter")
    refuse(place, "train.csv", "file", model_name_or_path=place / "train.csv")
    refuse(place, "'no-such-model'", "HF_HUB_OFFLINE", model_name_or_path="no-such-model")


@pytest.mark.parametrize(
    ("missing", "named"),
    [("model.safetensors", "weights"), ("config.json", "config.json"), ("tokenizer.json", "tokenizer")],
)
def test_incomplete_models(place: Place, tmp_path: Path, missing: str, named: str) -> None:
    shutil.copytree(place / "model", tmp_path / "copy")
    (tmp_path / "copy" / missing).unlink()
    refuse(place, "copy", named, model_name_or_path=tmp_path / "copy")


def test_damaged_weights(place: Place, tmp_path: Path) -> None:
    shutil.copytree(place / "model", tmp_path / "copy")
    weights = tmp_path / "copy" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    refuse(place, "weights", "copy", model_name_or_path=tmp_path / "copy")


# -- output directories ---------------------------------------------------------------------------------------------


def test_output_directories_that_cannot_be_written(place: Place, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "notes.txt").write_text("mine")
    before = contents(tmp_path)
    for name, named in {
        str(tmp_path / "file"): "is a file",
        str(tmp_path / "file" / "run"): "file is a file",
        "/proc/reltune/run": "cannot be written",
        str(tmp_path / ("long" * 65)): "too long",
        str(tmp_path / "foreign"): "is not empty",
        str(place / "done"): "--overwrite_output_dir",
        "": "output_dir is empty",
    }.items():
        for command in ("run", "analyze"):
            select = {"granularity": None, "budget": None} if command == "analyze" else {}
            words = new_run_words(place, **select)
            assert_refused(reltune(command, *words, "--output_dir", name), "output_dir", named)
        if named != "--overwrite_output_dir":
            words = ["export", place / "done", "--to", "merged", "--output_dir", name]
            assert_refused(reltune(*words), "output_dir")
    assert contents(tmp_path) == before


def test_overwriting_takes_nothing_but_a_run(place: Place, tmp_path: Path) -> None:
    """Others name their files config.yaml, adapter and checkpoint-500 too."""
    (tmp_path / "checkpoint-500").mkdir()
    (tmp_path / "checkpoint-500" / "model.safetensors").write_text("weeks of work")
    (tmp_path / "adapter").mkdir()
    words = [*new_run_words(place), "--output_dir", tmp_path, "--overwrite_output_dir"]
    for config in (None, "defaults: [model, data]\n", "- a list\n", "no: [yaml"):
        if config is not None:
            (tmp_path / "config.yaml").write_text(config)
        before = contents(tmp_path)
        assert_refused(reltune("run", *words), str(tmp_path), "holds no run")
        assert contents(tmp_path) == before


def test_a_run_outlives_bad_input_with_overwrite(place: Place) -> None:
    """nothing_moves compares the run before and after."""
    words = ["--output_dir", place / "done", "--overwrite_output_dir"]
    for changed in ({"budget": "0"}, {"train_file": place / "absent.csv"}, {"target_modules": "nothing"}):
        assert_refused(reltune("run", *new_run_words(place, **changed), *words))
    assert_refused(reltune("run", *new_run_words(place), *words, "--learning_rate", "fast"))
    assert_refused(reltune("select", place / "done", "--budget", "0", "--overwrite_output_dir"))


# -- stages ---------------------------------------------------------------------------------------------------------

STAGES: dict[str, Callable[[Path], list[object]]] = {
    "select": lambda run: ["select", run, "--overwrite_output_dir"],
    "tune": lambda run: ["tune", run, "--overwrite_output_dir"],
    "evaluate": lambda run: ["evaluate", run],
    "export": lambda run: ["export", run, "--to", "lora", "--output_dir", run.parent / "exported"],
    "report": lambda run: ["report", run],
}


@pytest.mark.parametrize("stage", STAGES)
def test_stages_on_what_is_no_run(place: Place, tmp_path: Path, stage: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.yaml").write_text("model_name_or_path: [\n")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.yaml").write_text("defaults: {}\n")
    before = contents(tmp_path)
    for name in ("absent", "empty", "broken", "other"):
        assert_refused(reltune(*STAGES[stage](tmp_path / name)), name)
    assert_refused(reltune(*STAGES[stage](place / "train.csv")), "train.csv")
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("stage", "missing", "named"),
    [
        ("select", "relevance", "reltune analyze"),
        ("tune", "plan", "reltune select"),
        ("tune", "relevance/head.safetensors", "reltune analyze"),
        ("evaluate", "adapter", "reltune tune"),
        ("evaluate", "training_cost.json", "training_cost.json"),
        ("export", "adapter", "reltune tune"),
        ("report", "relevance", "reltune analyze"),
        ("report", "plan", "reltune select"),
    ],
)
def test_stages_without_the_artefact_before(place: Place, tmp_path: Path, stage: str, missing: str, named: str) -> None:
    run = tmp_path / "run"
    shutil.copytree(place / "done", run)
    shutil.rmtree(run / missing) if (run / missing).is_dir() else (run / missing).unlink()
    before = contents(tmp_path)
    assert_refused(reltune(*STAGES[stage](run)), named)
    assert contents(tmp_path) == before


def test_stages_that_were_done(place: Place) -> None:
    assert_refused(reltune("select", place / "done"), "plan", "--overwrite_output_dir")
    assert_refused(reltune("tune", place / "done"), "adapter", "--overwrite_output_dir")


def test_exports(place: Place) -> None:
    done = place / "done"
    assert_refused(
        reltune("export", done, "--to", "onnx", "--output_dir", place / "new"),
        "'onnx'",
        "lora or merged or gguf or ollama",
    )
    assert_refused(reltune("export", done, "--output_dir", place / "new"), "--to")
    assert_refused(reltune("export", done, "--to", "lora"), "--output_dir")
    assert_refused(reltune("export", done, "--to", "lora", "--output_dir", place / "model"), "model", "holds files")


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("format: reltune-plan-1", "format: reltune-plan-9", "format"),
        ("modules:", "moduls:", "'modules'"),
        ("columns: [", "columns: [99, ", "99"),
        ("columns: [", "columns: [-1, ", "-1"),
        ("columns: [", "columns: [first, ", "whole numbers"),
        ("columns: [", "colums: [", "'columns'"),
        ("columns: [", "weight: true\n    columns: [", "keep one"),
        ("columns: [", "weight: perhaps\n    columns: [", "weight"),
        ("shape: [", "shape: [0, ", "shape"),
        ("shape: [", "shape: [5, ", "above its budget"),
        ("attention.self.value:", "attention.self.worth:", "attention.self.worth"),
        ("\nmodules:", "\n\tmodules:", "plan.yaml"),
        ("always_trained:\n- classifier", "always_trained: []", "classifier"),
        ("always_trained:\n- classifier", "always_trained:\n- klassifier", "classifier"),
        ("  parameters: 1043", "  parameters: 10", "above its budget"),
    ],
)
def test_plans_broken_by_hand(place: Place, tmp_path: Path, old: str, new: str, named: str) -> None:
    run = tmp_path / "run"
    shutil.copytree(place / "done", run)
    plan = run / "plan" / "plan.yaml"
    assert old in plan.read_text()
    plan.write_text(plan.read_text().replace(old, new, 1))
    before = contents(tmp_path)
    assert_refused(reltune(*STAGES["tune"](run)), named)
    assert contents(tmp_path) == before


def test_a_plan_for_another_model(place: Place, tmp_path: Path) -> None:
    """Of another shape, or of the same shape with other weights; the run keeps its adapter and results."""
    for other, named in (("wider", "shape"), ("other_seed", "the weights differ")):
        run = tmp_path / other
        shutil.copytree(place / "done", run)
        config = run / "config.yaml"
        config.write_text(config.read_text().replace(str(place / "model"), str(place / other)))
        (run / "relevance" / "head.safetensors").unlink()
        shutil.copy(head_of(place, other, tmp_path), run / "relevance" / "head.safetensors")
        before = contents(run)
        assert_refused(reltune(*STAGES["tune"](run)), "plan", named)
        assert contents(run) == before


def head_of(place: Place, model: str, tmp_path: Path) -> Path:
    run = tmp_path / f"{model}_analyzed"
    words = new_run_words(place, granularity=None, budget=None, criteria="fisher", model_name_or_path=place / model)
    assert reltune("analyze", *words, "--output_dir", run).code == 0
    return run / "relevance" / "head.safetensors"


def test_an_adapter_for_another_model(place: Place, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(place / "done", run)
    config = run / "config.yaml"
    config.write_text(config.read_text().replace(str(place / "model"), str(place / "other_seed")))
    assert_refused(reltune("evaluate", run), "the weights differ", "--force")
    assert_refused(reltune("export", run, "--to", "lora", "--output_dir", tmp_path / "new"), "the weights differ")
    assert not (tmp_path / "new").exists()


def test_resuming_from_what_is_no_checkpoint(place: Place, tmp_path: Path) -> None:
    (tmp_path / "checkpoint-3").mkdir()
    run = place / "done"
    for wanted in ("checkpoint-99", str(tmp_path / "checkpoint-3"), str(place / "train.csv")):
        words = [*STAGES["tune"](run), "--resume_from_checkpoint", wanted]
        assert_refused(reltune(*words), wanted, "checkpoint-N")
    other = shutil.copytree(run, tmp_path / "other")
    (other / "checkpoint-3").mkdir(exist_ok=True)
    (other / "checkpoint-3" / "trainer_state.json").write_text("{}")
    answer = reltune(*STAGES["tune"](run), "--resume_from_checkpoint", str(other / "checkpoint-3"))
    assert_refused(answer, "a checkpoint of another run", f"name one in {run}")


def test_scores_that_do_not_fit_together(place: Place, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(place / "analyzed", run)
    scores = run / "relevance" / "scores.json"
    values = json.loads(scores.read_text())
    scores.write_text(json.dumps({**values, "criteria": ["fisher", "gradient"]}))
    assert_refused(reltune("select", run, "--budget", "5%"), "analyze")
    scores.write_text("{")
    assert_refused(reltune("select", run, "--budget", "5%"), "relevance")
    assert not (run / "plan").exists()
