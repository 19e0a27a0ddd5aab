"""A run through all stages for any task, on a tiny model and rows written to a file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from reltune.config.run_config import RunConfig
from reltune.metrics import METRICS
from reltune.runs import stages
from reltune.runs.directory import RunDirectory
from reltune.runs.materials import prepare
from reltune.runs.summary import report


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


OFTEN: dict[str, Any] = {
    "num_train_epochs": 20,
    "per_device_train_batch_size": 8,
    "eval_strategy": "steps",
    "eval_steps": 0.25,  # of all; every epoch would take longer than training
    "save_strategy": "no",
}


def run_task(place: Path, rows: Iterable[Mapping[str, Any]], training: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """All stages on the rows with the model in ``place``/model; the results that they wrote to ``place``/run."""
    config = RunConfig(
        model_name_or_path=str(place / "model"),
        output_dir=str(place / "run"),
        train_file=str(write_rows(place / "train.jsonl", rows)),
        training=training,
        **{"granularity": ["module"], "budget": "100%", **fields},
    )
    materials, run = prepare(config), RunDirectory(config.output_dir)
    stages.check_choice(materials)
    materials.check_training()
    run.create(config)
    stages.analyze(materials, run)
    stages.select(config, run)
    stages.tune(materials, run)
    results = stages.evaluate(materials, run)
    report(config, run)
    assert results == json.loads(run.results.read_text(encoding="utf-8"))
    main = materials.task.metrics[0]
    assert {f"eval_{main}", f"test_{main}"} <= set(results)
    page = run.report.read_text(encoding="utf-8")
    assert METRICS[main].label in page
    log = [json.loads(line) for line in run.log.read_text(encoding="utf-8").splitlines()]
    assert any("loss" in entry for entry in log) and any("eval_loss" in entry for entry in log)
    assert [entry["step"] for entry in log] == sorted(entry["step"] for entry in log)
    return results


def check_reload(place: Path) -> None:
    """Tuning again gives the adapter that is on disk, and loading it the outputs of the model that was trained."""
    config = RunConfig.load(place / "run" / "config.yaml")
    run = RunDirectory(shutil.copytree(place / "run", place / "again"))
    config.output_dir = str(run.path)
    materials = prepare(config)
    trained = stages.tune(materials, run).cpu().eval()
    loaded = stages.load_tuned(prepare(config), run).eval()
    some = [materials.test[i] for i in range(min(4, len(materials.test)))]
    batch = {key: value for key, value in materials.collator(some).items() if key != "labels"}
    if hasattr(loaded.get_base_model(), "prepare_decoder_input_ids_from_labels"):
        batch["decoder_input_ids"] = torch.zeros(len(some), 1, dtype=torch.long)
    with torch.no_grad():
        there, back = trained(**batch), loaded(**batch)
        with loaded.disable_adapter():
            base = loaded(**batch)
    names = [name for name in ("logits", "start_logits", "end_logits") if getattr(back, name, None) is not None]
    assert names
    for name in names:
        assert torch.equal(there[name], back[name]), name
        assert not torch.equal(base[name], back[name]), name
