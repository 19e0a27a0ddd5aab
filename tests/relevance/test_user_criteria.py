"""Criteria of other packages: found by their entry point, checked before use, and not needed to read what they gave."""

from __future__ import annotations

import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

import reltune
from command_line import reltune as command
from command_line import review_rows, write_csv
from measured_models import MODELS
from oracles.per_example_gradients import gradient_sums
from relevance_cases import (
    assert_parts_equal,
    by_module,
    cross_entropy_of_one,
    data_for,
    measure,
    parts_by_formula,
    split,
)
from reltune.config.run_config import RunConfig
from reltune.errors import InputError
from reltune.relevance.criteria import fisher
from tiny_models import save_tiny_bert

EXAMPLE = Path(__file__).parents[2] / "examples" / "snip_criterion"


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The example, installed as pip installs it, into a directory of its own."""
    target = tmp_path_factory.mktemp("installed")
    source = tmp_path_factory.mktemp("source") / "snip"  # setuptools leaves build files beside its sources
    source.mkdir()
    for file in EXAMPLE.iterdir():
        if file.is_file():
            (source / file.name).write_bytes(file.read_bytes())
    options = "install --quiet --no-index --no-deps --no-build-isolation --disable-pip-version-check --target".split()
    done = subprocess.run([sys.executable, "-m", "pip", *options, target, source], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return target


OPTIONS_WITHOUT_DEFAULT = """
import dataclasses
SCORES = ("layer",)
@dataclasses.dataclass
class Options:
    steps: int
def measure(experiment): ...
"""


def package(place: Path, name: str, points: str, code: str | None = None) -> Path:
    """A package with entry points, by the files an installation leaves."""
    info = place / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[reltune.criteria]\n{points}\n")
    if code is not None:
        (place / f"{name}.py").write_text(code)
    return place


@pytest.fixture
def on_path(monkeypatch):
    yield monkeypatch.syspath_prepend
    for name in ("snip_criterion", "broken", "other", "first", "second"):
        sys.modules.pop(name, None)


def snip_by_definition(model, batches):
    names = [info.name for info in measure(model, criteria=["magnitude"]).inventory.modules]
    _, sums, count = gradient_sums(model, batches, cross_entropy_of_one)
    return by_module({n: (total / count * model.get_parameter(n).detach()).abs() for n, total in sums.items()}, names)


@pytest.mark.parametrize("kind", ["bert", "llama", "sequential"])
def test_the_example_measures_by_its_name(kind, installed, on_path, tmp_path):
    on_path(installed)
    model = MODELS[kind]()
    batches = split(data_for(model), 3)
    found = measure(model, batches, None, ["snip", "fisher"], elements=True)
    assert found.criteria == ["snip", "fisher"]
    wanted = snip_by_definition(model, batches)
    parts = found.parts["snip"]
    units = {name: {k: v for k, v in of.items() if not k.startswith("element")} for name, of in parts.items()}
    assert_parts_equal(units, parts_by_formula(wanted))
    scale = max(float(of["weight"].max()) for of in wanted.values())
    for name, of in wanted.items():
        assert (parts[name]["element"] - of["weight"]).abs().max() <= 1e-9 * scale
    plan = reltune.select(found, budget="5%", granularity="column")
    assert plan.criterion == "snip"


def test_the_example_handed_over_as_a_module(on_path):
    on_path(EXAMPLE)
    import snip_criterion

    model = MODELS["sequential"]()
    batches = split(data_for(model), 3)
    found = measure(model, batches, None, snip_criterion)
    assert_parts_equal(found.parts["snip_criterion"], parts_by_formula(snip_by_definition(model, batches)))


def test_an_object_is_a_criterion(on_path):
    class Halved:
        NEEDS = fisher.NEEDS

        def quantities(self, *of):
            return ({part: value / 2 for part, value in fisher.quantities(*of)[0].items()},)

    model = MODELS["sequential"]()
    found = measure(model, [data_for(model)], None, ["fisher", Halved(), fisher])
    assert found.criteria == ["fisher", "Halved"]
    halves = {name: {k: v / 2 for k, v in of.items()} for name, of in found.parts["fisher"].items()}
    assert_parts_equal(found.parts["Halved"], halves)


def test_the_command_line_finds_it_and_reads_its_scores_without_it(installed, tmp_path, monkeypatch):
    """Once with the package on the path of a new process, then without it in this one."""
    save_tiny_bert(tmp_path / "model")
    write_csv(tmp_path / "train.csv", review_rows(40))
    run = tmp_path / "run"
    words = ["--criteria", "snip,fisher", "--model_name_or_path", tmp_path / "model", "--output_dir", run]
    words += ["--train_file", tmp_path / "train.csv", "--max_length", "16", "--use_cpu", "true"]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(installed), *filter(None, sys.path)]))
    done = subprocess.run(
        [sys.executable, "-c", "from reltune.cli.commands import main; main()", "analyze", *map(str, words)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "By snip" in done.stdout
    assert reltune.RelevanceScores.load(run / "relevance").criteria == ["snip", "fisher"]
    assert RunConfig.load(run / "config.yaml").criteria == ["snip", "fisher"]
    assert command("select", run, "--budget", "2%").code == 0
    assert command("report", run).code == 0
    again = command("analyze", *words, "--overwrite_output_dir")
    assert again.code == 2 and "criterion 'snip' is unknown" in again.err
    assert (run / "relevance" / "scores.json").is_file()


def test_an_unknown_name_is_compared_with_those_of_packages(on_path, tmp_path):
    on_path(package(tmp_path, "other", "sharpness = other", "raise RuntimeError('imported')"))
    with pytest.raises(InputError, match="did you mean 'sharpness'"):
        measure(MODELS["sequential"](), criteria=["sharpnes"])
    with pytest.raises(InputError, match="did you mean 'sharpness'"):
        RunConfig("model", "run", train_file="t.csv", criteria=["sharpnes"]).check()
    RunConfig("model", "run", train_file="t.csv", criteria=["sharpness"]).check()  # not imported


@pytest.mark.parametrize(
    ("points", "code", "sentence"),
    [
        (
            "mine = broken",
            "import torch_of_tomorrow",
            "package broken .broken. cannot be imported .ModuleNotFoundError",
        ),
        ("mine = broken", "raise ValueError('no luck')", "cannot be imported .ValueError: no luck"),
        ("mine = broken:Missing", "", "cannot be imported .AttributeError"),
        (
            "mine = broken",
            "NEEDS = ()",
            r"package broken .broken. has no function quantities\(info, weights, sums, context\); add",
        ),
        ("mine = broken", "NEEDS = ()\nquantities = 3", "has no function quantities"),
        ("mine = broken", "def quantities(*_): ...", "has no NEEDS"),
        ("mine = broken", "NEEDS = ()\ndef quantities(*_): ...\ndef elements(*_): ...", "has no ELEMENT_NEEDS"),
        ("mine = broken", "ELEMENT_NEEDS = ()", "has no NEEDS and no function quantities.* and no function elements"),
        ("mine = broken", "NEEDS = ()\ndef quantities(info): ...", "function quantities of .* must take the arguments"),
        ("mine = broken", "NEEDS = ()\ncombine = 3\ndef quantities(*_): ...", "combine of .* is no function"),
        ("mine = broken", "def measure(*_): ...", "has no SCORES"),
        ("mine = broken", "SCORES = ('layer',)", r"has no function measure\(experiment\)"),
        ("mine = broken", "SCORES = ('layers',)\ndef measure(*_): ...", "has 'layers'; did you mean 'layer'"),
        ("mine = broken", "SCORES = ('layer',)\nOptions = 3\ndef measure(*_): ...", "Options of .* is no dataclass"),
        ("mine = broken", OPTIONS_WITHOUT_DEFAULT, "Options of .* has no default for steps"),
        ("mine = broken", "NEEDS = ('square',)\ndef quantities(*_): ...", "has 'square'; did you mean 'squares'"),
        ("mine = broken", "NEEDS = 'squares'\ndef quantities(*_): ...", "it must be a tuple of names such as .inputs."),
        ("mi/ne = broken", "NEEDS = ()\ndef quantities(*_): ...", "a name that files cannot carry"),
    ],
)
def test_a_broken_package_is_bad_input(points, code, sentence, on_path, tmp_path):
    on_path(package(tmp_path, "broken", points, code))
    with pytest.raises(InputError, match=sentence):
        measure(MODELS["sequential"](), criteria=[points.partition(" ")[0]])


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ("{}", "scored nothing"),
        ("{'weight': torch.ones(3)}", "gave weight of shape .3,. for 0; it must be of shape"),
        ("{'colum': torch.ones(3)}", "gave colum of shape .3,. for 0; it must be one of column, row"),
        ("{'weight': torch.tensor(float('nan'))}", "weight of 0 that is not finite"),
        ("{'weight': torch.tensor(1)}", "not finite floating-point numbers"),
    ],
)
def test_scores_that_fit_no_unit_are_refused(body, sentence, on_path, tmp_path):
    code = f"import torch\nNEEDS = ()\ndef quantities(*_):\n    return ({body},)\n"
    on_path(package(tmp_path, "broken", "mine = broken", code))
    with pytest.raises(InputError, match=sentence):
        measure(MODELS["sequential"](), criteria=["mine"], target_modules="0")


def test_single_weights_need_their_functions(on_path, tmp_path):
    code = "import torch\nNEEDS = ()\ndef quantities(*_):\n    return ({'weight': torch.tensor(1.0)},)\n"
    on_path(package(tmp_path, "broken", "mine = broken", code))
    model = MODELS["sequential"]()
    measure(model, criteria=["mine"], target_modules="0")
    with pytest.raises(InputError, match="criterion 'mine' has no number for single weights"):
        measure(model, criteria=["mine"], elements=True)


def test_a_name_with_two_owners_is_refused(on_path, tmp_path):
    code = "NEEDS = ()\ndef quantities(*_): ..."
    package(tmp_path, "first", "mine = first\nfisher = first", code)
    on_path(package(tmp_path, "second", "mine = second", code))
    with pytest.raises(
        InputError, match=r"from the package first .first. and from the package second .second."
    ) as mine:
        measure(MODELS["sequential"](), criteria=["mine"])
    assert "'mine'" in str(mine.value)
    with pytest.raises(InputError, match="'fisher' comes from reltune itself and from the package first"):
        measure(MODELS["sequential"](), criteria=["fisher"])
    measure(MODELS["sequential"](), criteria=["magnitude"])  # nobody else's name


def test_an_object_called_like_one_of_reltunes_own_is_refused():
    mine = types.SimpleNamespace(__name__="fisher", NEEDS=(), quantities=lambda *_: ({},))
    with pytest.raises(InputError, match="a criterion called 'fisher' was passed"):
        measure(MODELS["sequential"](), criteria=[mine])
    other = types.SimpleNamespace(__name__="a.mine", NEEDS=(), quantities=lambda *_: ({},))
    third = types.SimpleNamespace(__name__="b.mine", NEEDS=(), quantities=lambda *_: ({},))
    with pytest.raises(InputError, match="two different criteria are called 'mine'"):
        measure(MODELS["sequential"](), criteria=[other, third])
