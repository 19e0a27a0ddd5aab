"""What a run writes down of how it was made, and what its report says of that."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from command_line import assert_refused, contents, reltune, review_rows, write_csv
from reltune import __version__
from reltune.data.rows import Rows
from reltune.runs.data_record import fingerprint
from reltune.runs.directory import RunDirectory
from reltune.tasks.registry import TASKS
from report_cases import Page
from tiny_models import save_tiny_bert


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("place")
    save_tiny_bert(place / "model")
    write_csv(place / "train.csv", review_rows(40))
    return place


def words(place: Path, name: str, *more: object) -> list[object]:
    return [
        *("--model_name_or_path", place / "model", "--train_file", place / "train.csv", "--output_dir", place / name),
        *("--use_cpu", "--max_steps", 2, "--budget", "2%", "--granularity", "column", "--criteria", "fisher"),
        *more,
    ]


@pytest.fixture(scope="module")
def run(place: Path) -> Path:
    answer = reltune("run", *words(place, "run", "--hub_token", "secret", "--hub-token=secret"))
    assert answer.code == 0, answer.err
    return place / "run"


def test_the_report_says_how_it_was_made(place: Path, run: Path) -> None:
    text = run.joinpath("report.html").read_text(encoding="utf-8")
    assert "secret" not in text and "secret" not in (run / "commands.json").read_text(encoding="utf-8")
    page = " ".join(Page(text).text)
    command = read(run / "commands.json")["run"]["command"]
    assert command.startswith("reltune run --model_name_or_path ") and "--hub_token TOKEN --hub-token=TOKEN" in command
    for said in (
        command,
        read(run / "relevance" / "scores.json")["fingerprint"],
        *(record["fingerprint"] for record in read(run / "data.json").values()),
        f"{place / 'train.csv'}: 28 rows",
        f"reltune {__version__}; ",
    ):
        assert said in page, said
    assert read(run / "training_cost.json")["fingerprint"] == read(run / "relevance" / "scores.json")["fingerprint"]


def test_commands_that_go_on_are_added_and_later_ones_forgotten(place: Path, run: Path) -> None:
    again = Path(shutil.copytree(run, place / "again"))
    for name, more in (("tune", ["--max_steps", 1]), ("evaluate", [])):
        overwrite = ["--overwrite_output_dir"] if name == "tune" else []
        assert reltune(name, again, *more, *overwrite).code == 0
    commands = read(again / "commands.json")
    assert list(commands) == ["run", "tune", "evaluate"]
    assert commands["tune"]["command"] == f"reltune tune {again} --max_steps 1 --overwrite_output_dir"
    assert reltune("select", again, "--budget", "1%", "--overwrite_output_dir").code == 0
    assert list(read(again / "commands.json")) == ["run", "select"]
    before = contents(again)
    assert_refused(reltune("select", again, "--budget", "2%"))
    assert contents(again) == before


def test_a_method_without_analysis_has_the_base_models_fingerprint(place: Path, run: Path) -> None:
    plain = [
        word
        for word in words(place, "lora")
        if word not in ("--granularity", "column", "--criteria", "fisher", "--budget", "2%")
    ]
    answer = reltune("run", *plain, "--method", "lora")
    assert answer.code == 0, answer.err
    for name in ("data.json", "training_cost.json"):
        assert (place / "lora" / name).is_file()
    assert read(place / "lora" / "data.json") == read(run / "data.json")
    assert read(place / "lora" / "training_cost.json")["fingerprint"] == read(run / "training_cost.json")["fingerprint"]


def rows_of(records: list[dict[str, Any]]) -> Rows:
    return Rows(records, "somewhere")


def test_data_are_the_same_whatever_file_they_are_from() -> None:
    task = TASKS["sequence_classification"](columns={"text": "text", "label": "label"})
    records = [{"text": text, "label": label} for text, label in review_rows(6)]
    known = fingerprint(rows_of(records), task)
    assert known == fingerprint(rows_of([{"more": 1, **dict(reversed(one.items()))} for one in records]), task)
    assert known != fingerprint(rows_of(records[::-1]), task)
    assert known != fingerprint(rows_of(records[:-1]), task)
    assert known != fingerprint(rows_of([*records[:-1], {**records[-1], "label": "other"}]), task)


def test_a_picture_is_what_is_in_its_file(tmp_path: Path) -> None:
    task = TASKS["image_classification"](columns={"image": "image", "label": "label"})
    for name, data in (("a.png", b"one"), ("b.png", b"one"), ("c.png", b"two")):
        (tmp_path / name).write_bytes(data)
    of_path, same, other = (
        fingerprint(rows_of([{"image": image, "label": "x"}]), task)
        for image in (
            str(tmp_path / "a.png"),
            {"path": str(tmp_path / "b.png"), "bytes": None},
            str(tmp_path / "c.png"),
        )
    )
    assert of_path == same == fingerprint(rows_of([{"image": {"path": None, "bytes": b"one"}, "label": "x"}]), task)
    assert of_path != other


def test_damaged_commands_are_named(place: Path, run: Path) -> None:
    torn = RunDirectory(shutil.copytree(run, place / "torn"))
    torn.commands.write_text("{", encoding="utf-8")
    answer = reltune("report", torn.path)
    assert_refused(answer, "commands.json")
