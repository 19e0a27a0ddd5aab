"""What the studio finds in a directory of runs, and that nothing outside of it is reached."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from reltune.config.run_config import RunConfig
from reltune.errors import InputError
from reltune.runs.directory import RunDirectory
from reltune.studio.places import Place, history_of

EVIL = "<script>alert(1)</script>"


def save_run(path: Path, **fields: object) -> RunDirectory:
    """A run that has a config and nothing else."""
    run = RunDirectory(path)
    run.create(RunConfig("model", str(path), train_file="rows.csv", **fields))
    return run


@pytest.fixture
def place(tmp_path: Path) -> Place:
    (tmp_path / "runs").mkdir()
    return Place(tmp_path / "runs")


def test_runs_are_found_with_the_stage_they_came_to(place: Place) -> None:
    assert place.found() == []
    save_run(place.path / "new")
    done = save_run(place.path / "deeper" / "done", method="full")
    (done.adapter).mkdir()
    (done.adapter / "adapter_config.json").write_text("{}")
    done.results.write_text(json.dumps({"test_accuracy": 0.5, "test_samples": 4, "trainable_parameters": 1234}))
    found = {one.name: one for one in place.found()}
    assert list(found) == ["deeper/done", "new"]
    assert (found["new"].kind, found["new"].stage, found["new"].result) == ("run", "analysis", "")
    assert (found["deeper/done"].stage, found["deeper/done"].trained) == ("", "1,234")
    assert found["deeper/done"].result == "accuracy (test) 50.00 %"


def torn_yaml(run: RunDirectory) -> None:
    run.config_file.write_text("a: [")


def no_config(run: RunDirectory) -> None:
    run.config_file.unlink()
    run.plan.mkdir()


def of_tomorrow(run: RunDirectory) -> None:
    values = yaml.safe_load(run.config_file.read_text())
    run.config_file.write_text(yaml.safe_dump({**values, "field_of_tomorrow": 1}))


def no_text(run: RunDirectory) -> None:
    run.config_file.write_bytes(b"\xff\xfe\x00")


def torn_results(run: RunDirectory) -> None:
    run.results.write_text('{"test_acc')


def odd_results(run: RunDirectory) -> None:
    run.results.write_text("[1]")


DAMAGES = {
    torn_yaml: "config.yaml",
    no_config: "no config.yaml",
    of_tomorrow: "field_of_tomorrow",
    no_text: "config.yaml",
    torn_results: "all_results.json",
    odd_results: "all_results.json",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_run_is_listed_with_a_sentence_beside_the_others(place: Place, damage: object) -> None:
    save_run(place.path / "whole")
    damage(save_run(place.path / "worse"))  # type: ignore[operator]
    whole, worse = place.found()
    assert (whole.kind, worse.kind) == ("run", "damaged")
    assert DAMAGES[damage] in worse.problem and worse.problem.rstrip("^ ").strip()  # type: ignore[index]


def test_a_comparison_that_did_not_come_to_its_end_is_found(place: Place) -> None:
    folder = place.path / "ways"
    folder.mkdir()
    (folder / "comparison.yaml").write_text("model_name_or_path: m\noutput_dir: o\ntrain_file: rows.csv\n")
    assert [(one.kind, one.stage, one.model) for one in place.found()] == [("comparison", "comparison", "m")]
    (folder / "comparison.json").write_text("{}")
    assert place.found()[0].kind == "damaged"


@pytest.mark.parametrize(
    "name", ["..", "../other", "a/../../other", "/etc/passwd", "", ".", "link", "link/x", "a\0b", "loop"]
)
def test_no_name_leads_out_of_the_directory(place: Place, tmp_path: Path, name: str) -> None:
    (tmp_path / "other").mkdir()
    (place.path / "link").symlink_to(tmp_path / "other")
    (place.path / "loop").symlink_to(place.path / "loop")
    with pytest.raises(InputError):
        place.inside(name)
    assert place.inside("a/../b") == place.path / "a/../b"


def test_links_to_runs_elsewhere_are_not_followed(place: Place, tmp_path: Path) -> None:
    save_run(tmp_path / "elsewhere")
    (place.path / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "secret.csv").write_text("text,label\n")
    (place.path / "rows.csv").symlink_to(tmp_path / "secret.csv")
    (place.path / "own.csv").write_text("text,label\n")
    assert place.found() == [] and place.data() == ["own.csv"]


@pytest.mark.parametrize("name", ["", "-x", "../x", "a b", "/x", "x/../../y", ".x", "a" * 200])
def test_names_of_new_runs(place: Place, name: str) -> None:
    with pytest.raises(InputError):
        place.new(name)
    assert place.new("series/first-2.b") == place.path / "series/first-2.b"


def test_models_are_known_ones_those_here_or_ids(place: Place, tmp_path: Path) -> None:
    for folder in (tmp_path / "outside", place.path / "here"):
        folder.mkdir()
        (folder / "config.json").write_text("{}")
    save_run(place.path / "run")
    assert place.models() == [str(place.path / "here"), "model"]
    assert place.model("org/name", []) == "org/name"
    assert place.model(str(place.path / "here"), []) == str(place.path / "here")
    assert place.model(str(tmp_path / "outside"), [str(tmp_path / "outside")])
    for name in (str(tmp_path / "outside"), "../outside", "/nowhere", ""):
        with pytest.raises(InputError):
            place.model(name, [])


def test_a_dropped_file_is_kept_once_and_replaces_nothing(place: Place, tmp_path: Path) -> None:
    for text in ("one", "one", "two"):
        (tmp_path / "my rows.CSV").write_text(text)
        place.keep(tmp_path / "my rows.CSV")
    assert place.data() == ["data/my_rows-2.csv", "data/my_rows.csv"]
    assert (place.path / "data/my_rows.csv").read_text() == "one"
    (tmp_path / "a.exe").write_text("x")
    with pytest.raises(InputError, match=r"\.exe"):
        place.keep(tmp_path / "a.exe")
    shutil.rmtree(place.path / "data")
    (place.path / "data").symlink_to(tmp_path)
    with pytest.raises(InputError, match="leads out"):
        place.keep(tmp_path / "my rows.CSV")


def test_a_log_that_is_being_written_is_read_up_to_its_last_whole_line(place: Place) -> None:
    run = save_run(place.path / "run")
    run.log.write_text('{"loss": 1.0, "step": 1}\n{"loss": 0.5, "st')
    assert history_of(run) == [{"loss": 1.0, "step": 1}]
    run.log.unlink()
    (run.path / "trainer_state.json").write_text('{"log_history": [{"loss": 2.0, "step": 1}]}')
    assert history_of(run) == [{"loss": 2.0, "step": 1}]
