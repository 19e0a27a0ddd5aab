"""An interrupted analysis goes on where it stopped, with the result of one that was not."""

from __future__ import annotations

import dataclasses
import signal

import pytest
import torch

from measured_models import MODELS
from relevance_cases import assert_parts_equal, data_for, measure, split
from reltune.config.run_config import RunConfig
from reltune.errors import InputError
from reltune.relevance.artefact import PARTIAL
from reltune.runs.directory import RunDirectory

CRITERIA = ["fisher", "fisher_true", "gradient", "activation"]


def interrupted(batches, after, number=signal.SIGINT):
    for index, batch in enumerate(batches):
        if index == after:
            signal.raise_signal(number)  # in the middle of the analysis: this batch is still counted
        yield batch


@pytest.mark.parametrize("after", [0, 2, 5])
def test_goes_on_with_the_same_result(tmp_path, after):
    model = MODELS["bert"]()
    batches = split(data_for(model), 1) + split(data_for(model, seed=1), 3)
    wanted = measure(model, batches, None, CRITERIA)
    with pytest.raises(KeyboardInterrupt):
        measure(model, interrupted(batches, after), None, CRITERIA, resume_directory=tmp_path)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert (tmp_path / PARTIAL).is_file()
    assert not model.bert.pooler.dense._forward_hooks and model.training
    seen = []
    handle = model.register_forward_hook(lambda *_: seen.append(1))
    found = measure(model, batches, None, CRITERIA, resume_directory=tmp_path)
    handle.remove()
    # two passes a batch, and one to tell examples apart where batches have several
    assert len(seen) == 2 * (len(batches) - after - 1) + 1
    assert found.provenance == wanted.provenance
    for criterion in CRITERIA:
        assert_parts_equal(found.parts[criterion], wanted.parts[criterion], relative=0)
    assert not list(tmp_path.iterdir())


def test_a_second_signal_takes_effect_at_once(tmp_path):
    model = MODELS["sequential"]()

    def twice():
        yield data_for(model)
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("the second signal was held back")

    with pytest.raises(KeyboardInterrupt):
        measure(model, twice(), resume_directory=tmp_path)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_sums_of_something_else_are_not_continued(tmp_path):
    model = MODELS["sequential"]()
    batches = split(data_for(model), 2)
    with pytest.raises(KeyboardInterrupt):
        measure(model, interrupted(batches, 1), resume_directory=tmp_path)
    with pytest.raises(InputError, match="not what the interrupted analysis"):
        measure(model, split(data_for(model, seed=5), 2), resume_directory=tmp_path)
    with torch.no_grad():
        model[0].weight += 1
    found = measure(model, batches, resume_directory=tmp_path)
    wanted = measure(model, batches)
    assert_parts_equal(found.parts["fisher"], wanted.parts["fisher"], relative=0)


def test_a_damaged_file_is_begun_again(tmp_path):
    model = MODELS["sequential"]()
    batches = split(data_for(model), 2)
    (tmp_path / PARTIAL).write_bytes(b"{")
    found = measure(model, batches, resume_directory=tmp_path)
    assert_parts_equal(found.parts["fisher"], measure(model, batches).parts["fisher"], relative=0)


def test_how_far_a_run_has_come(tmp_path):
    run = RunDirectory(tmp_path)
    config = RunConfig("model", str(tmp_path), train_file="train.csv")
    assert run.check_start(config) is None, "a new run"
    run.create(config)
    assert run.check_start(config) == "analysis", "interrupted while the head was trained"
    with pytest.raises(InputError, match=r"another configuration \(seed was 42 and is 1\)"):
        run.check_start(dataclasses.replace(config, seed=1))
    with pytest.raises(InputError, match=r"\(bf16 was not given and is True\)"):
        run.check_start(dataclasses.replace(config, training={"bf16": True}))  # a flag without a value
    assert run.check_start(dataclasses.replace(config, seed=1), overwrite=True) is None
    written = ["relevance/scores.json", "plan/plan.yaml", "adapter/adapter_config.json", "all_results.json"]
    later = ["selection", "training", "evaluation", "report"]
    for name, stage in zip(written, later, strict=True):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
        if name.startswith("relevance"):
            (run.relevance / PARTIAL).touch()
            assert run.check_start(config) == "analysis"
            (run.relevance / PARTIAL).unlink()
        assert run.check_start(config) == stage
    run.report.touch()
    with pytest.raises(InputError, match=r"this run is finished, see .*report\.html"):
        run.check_start(config)
    with pytest.raises(InputError, match="this analysis is finished"):
        run.check_start(config, goal="analysis")
    assert run.check_start(dataclasses.replace(config, export="merged")) == "export"
    assert run.check_start(config, goal="comparison") == "comparison"
