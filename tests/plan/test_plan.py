"""The plan file: written, read, edited by hand, and held against a model."""

import dataclasses

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import nn

from measured_models import tiny_bert, tiny_llama, tiny_sequential
from relevance_cases import data_for, measure
from reltune.errors import InputError
from reltune.layers.inventory import take_inventory
from reltune.plan import plan as plan_file
from reltune.plan.plan import ModulePlan, Plan
from reltune.plan.selection import select


@pytest.fixture(scope="module")
def scores():
    return measure(tiny_bert(), [data_for(tiny_bert())], always_trained=["classifier"])


@pytest.fixture(scope="module")
def plan(scores):
    return select(scores, "10%", ["column", "row", "module", "bias", "norm"], task_type="SEQ_CLS")


KEY = "bert.encoder.layer.1.attention.self.key"
VALUE = "bert.encoder.layer.1.attention.self.value"
INTERMEDIATE = "bert.encoder.layer.0.intermediate.dense"
NORM = "bert.encoder.layer.1.output.LayerNorm"


@pytest.fixture
def by_hand(scores):
    """A small plan with one of everything."""
    modules = {
        INTERMEDIATE: ModulePlan((40, 16), columns=[1, 3], rows=[39], bias=True),
        KEY: ModulePlan((16, 16), weight=True, bias=True),
        VALUE: ModulePlan((16, 16), columns=[1], rows=[15], elements=[7, 255 - 16, 0]),
        NORM: ModulePlan((16,), weight=True, bias=True),
    }
    parameters = 2 * 40 + 16 + 40 + 16 * 16 + 16 + 2 * 16 + 3 + 32
    return Plan(modules, str(parameters), parameters, 10**6, scores.fingerprint, always_trained=["classifier"])


@pytest.mark.parametrize("inline", [20_000, 0])
def test_save_and_load_give_the_same(plan, tmp_path, inline, monkeypatch):
    monkeypatch.setattr(plan_file, "INLINE_INDICES", inline)
    assert {(bool(m.columns), bool(m.rows), m.weight, m.bias) for m in plan.modules.values()} >= {
        (True, False, False, False),
        (False, False, True, True),
    }
    plan.save(tmp_path)
    names = {"plan.yaml"} if inline else {"plan.yaml", "indices.safetensors"}
    assert {path.name for path in tmp_path.iterdir()} == names
    for path in (tmp_path, tmp_path / "plan.yaml", str(tmp_path)):
        assert dataclasses.asdict(Plan.load(path)) == dataclasses.asdict(plan)
    monkeypatch.setattr(plan_file, "INLINE_INDICES", 20_000)
    plan.save(tmp_path)  # written again with fewer indices, it leaves no file of old ones
    assert {path.name for path in tmp_path.iterdir()} == {"plan.yaml"}
    assert Plan.load(tmp_path) == plan


def test_the_file_is_readable(by_hand, tmp_path):
    by_hand.save(tmp_path)
    text = (tmp_path / "plan.yaml").read_text()
    assert text.startswith("# What reltune will train.")
    assert f"  {INTERMEDIATE}:\n    shape: [40, 16]\n    columns: [1, 3]\n    rows: [39]\n    bias: true\n" in text
    assert yaml.safe_load(text)["predicted"]["backward_ends_at"] == INTERMEDIATE


def test_parameters_are_counted_by_hand(by_hand):
    assert by_hand.modules[INTERMEDIATE].parameters == 2 * 40 + 16 + 40
    assert by_hand.modules[KEY].parameters == 16 * 16 + 16
    assert by_hand.modules[NORM].parameters == 32
    assert by_hand.modules[VALUE].parameters == 2 * 16 + 3
    assert by_hand.parameters == 136 + 272 + 35 + 32 and by_hand.indices == 8
    assert by_hand.adapter_bytes() == 4 * 475 + 8 * 5 + 4 * 3
    chosen = "3 columns, 2 rows, 3 single weights, 1 whole matrices, 1 norms, 2 biases in 4 modules, by hand"
    assert by_hand.describe()[0] == chosen
    by_hand.modules[NORM] = ModulePlan((16,), bias=True)
    assert "1 norms" in by_hand.describe()[0], "one of its two vectors is enough"
    by_hand.check()


def test_a_plan_in_words(by_hand):
    by_hand.head_parameters, by_hand.spread, by_hand.criterion = 51, "even", "fisher"
    by_hand.modules[NORM] = ModulePlan((16, 16), directions=[1, 0])
    assert (
        by_hand.describe()
        == str(by_hand).split("\n")
        == [
            "3 columns, 2 rows, 3 single weights, 2 input directions, 1 whole matrices, 2 biases in 4 modules, by fisher, "
            "the same share of every module",
            "475 trainable parameters of 1,000,000 (0.05%), budget 475 = 475",
            "32 numbers of the directions are fixed: part of the adapter's file and not trained",
            "51 parameters of new heads are always trained and counted apart",
            # float32 of 475 and 51 numbers and of two vectors, int64 of three columns and two rows, int32 of three single weights
            f"adapter on disk about {4 * (475 + 51 + 32) + 8 * 5 + 4 * 3:,} bytes, AdamW states {8 * 526:,} bytes",
            f"the backward pass ends at {INTERMEDIATE}: nothing below it is differentiated or kept",
        ]
    )
    by_hand.head_parameters = 0
    assert not any("new heads" in line for line in by_hand.describe())
    by_hand.granularity = ["direction"]
    assert by_hand.describe()[0].endswith(", the same number of every module")
    by_hand.spread = "global"
    assert by_hand.describe()[0].endswith("by fisher")
    layers = {INTERMEDIATE: "0", "unchosen": "2", KEY: "1", VALUE: "1"}
    assert by_hand.by_layer(layers) == {"0": 136, "2": 0, "1": 272 + 35, NORM: 32}


def test_a_notebook_shows_the_largest_modules(by_hand):
    by_hand.modules |= {f"layer.{i}": ModulePlan((100, 10), rows=list(range(i))) for i in range(1, 12)}
    shown = by_hand._repr_html_()
    order = [shown.index(f">{name}</th>") for name in (KEY, INTERMEDIATE, *(f"layer.{i}" for i in range(11, 3, -1)))]
    assert order == sorted(order) and all(f">{name}</th>" not in shown for name in (NORM, VALUE, "layer.3"))
    assert "106.25%" in shown and "11.00%" in shown  # 272 of 256, with the bias; 110 of 1000
    assert "5 others" in shown and f">{35 + 32 + 10 + 20 + 30}</td>" in shown


def test_a_convolution_has_its_columns_in_groups(tmp_path):
    """Six filters in two groups see two of four channels each: a column is a channel in the three filters of its group."""
    model = nn.Sequential(nn.Conv2d(4, 6, (3, 5), groups=2))
    module = ModulePlan((6, 2, 3, 5), columns=[3], rows=[0, 5], groups=2)
    assert module.column_count == 4 and module.parameters == 3 * 15 + 2 * 30
    plan = Plan({"0": module}, "105", 105, 186, "")
    plan.save(tmp_path)
    assert Plan.load(tmp_path) == plan
    plan.check_model(take_inventory(model, []), "")
    with pytest.raises(InputError, match="0 has 4 columns, counted from 0; 4 is none"):
        edited(plan, tmp_path, set_in("modules", "0", "columns", value=[4]))
    for groups in (4, 0, "2"):
        with pytest.raises(InputError, match="groups of 0 must be a divisor of its 6 filters"):
            edited(plan, tmp_path, set_in("modules", "0", "groups", value=groups))
    with pytest.raises(InputError, match="shape of 0 must be"):
        edited(plan, tmp_path, set_in("modules", "0", "shape", value=[6, 2, 3, 0]))
    deeper = edited(plan, tmp_path, set_in("modules", "0", "shape", value=[6, 2, 3, 5, 1]))
    with pytest.raises(InputError, match=r"0 has shape \[6, 2, 3, 5\] in this model and \[6, 2, 3, 5, 1\]"):
        deeper.check_model(take_inventory(model, []), "")
    with pytest.raises(InputError, match="groups of 0 has no meaning, because only convolutions have groups"):
        edited(plan, tmp_path, set_in("modules", "0", "shape", value=[6, 2]))
    plan.modules["0"] = ModulePlan((6, 2, 3, 5), rows=[0], groups=1)
    with pytest.raises(InputError, match="0 has 2 groups in this model and 1 in the plan"):
        plan.check_model(take_inventory(model, []), "")


def edited(plan, folder, change):
    """Save the plan, change its YAML as by hand, and load it again."""
    plan.save(folder)
    path = folder / "plan.yaml"
    values = yaml.safe_load(path.read_text())
    change(values)
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return Plan.load(folder)


def set_in(*keys, value):
    def change(values):
        for key in keys[:-1]:
            values = values[key]
        values[keys[-1]] = value

    return change


def removed(*keys):
    def change(values):
        for key in keys[:-1]:
            values = values[key]
        del values[keys[-1]]

    return change


def test_edits_that_make_sense_are_taken(by_hand, tmp_path):
    edit = set_in("modules", INTERMEDIATE, value={"shape": [40, 16], "columns": [0], "rows": []})
    loaded = edited(by_hand, tmp_path, edit)
    assert loaded.modules[INTERMEDIATE] == ModulePlan((40, 16), columns=[0])
    assert loaded.parameters == 40 + 272 + 35 + 32
    assert NORM not in edited(by_hand, tmp_path, removed("modules", NORM)).modules
    loaded = edited(by_hand, tmp_path, set_in("modules", VALUE, "elements", value=[9, 3, 4]))
    assert list(loaded.modules[VALUE].elements) == [3, 4, 9]
    loaded = edited(by_hand, tmp_path, set_in("budget", "parameters", value=5000))
    assert loaded.budget_parameters == 5000
    loaded = edited(by_hand, tmp_path, removed("always_trained"))
    assert loaded.always_trained == []


@pytest.mark.parametrize(
    ("edit", "why"),
    [
        (set_in("colour", value="red"), "unknown field 'colour'"),
        (set_in("model", "fingerprnt", value="x"), "model has an unknown field 'fingerprnt'.*'fingerprint'"),
        (set_in("budget", "percent", value=1), "budget has an unknown field 'percent'"),
        (set_in("modules", KEY, "column", value=[1]), f"{KEY} has an unknown field 'column'.*'columns'"),
        (set_in("modules", KEY, value=None), f"{KEY} must be a mapping"),
        (set_in("modules", KEY, value=[1, 2]), f"{KEY} must be a mapping"),
        (set_in("modules", INTERMEDIATE, "columns", value=[0, 16]), f"{INTERMEDIATE} has 16 columns.*16 is none"),
        (set_in("modules", INTERMEDIATE, "rows", value=[40]), f"{INTERMEDIATE} has 40 rows.*40 is none"),
        (set_in("modules", INTERMEDIATE, "rows", value=[-1]), f"{INTERMEDIATE} has 40 rows.*-1 is none"),
        (set_in("modules", INTERMEDIATE, "columns", value=[3, 1, 3]), f"columns of {INTERMEDIATE} name 3 twice"),
        (set_in("modules", INTERMEDIATE, "columns", value=[1.0]), f"columns of {INTERMEDIATE} must be.*whole"),
        (set_in("modules", INTERMEDIATE, "columns", value=["1"]), f"columns of {INTERMEDIATE} must be.*whole"),
        (set_in("modules", INTERMEDIATE, "columns", value=[True]), f"columns of {INTERMEDIATE} must be.*whole"),
        (set_in("modules", INTERMEDIATE, "columns", value=3), f"columns of {INTERMEDIATE} must be a list"),
        (set_in("modules", INTERMEDIATE, "rows", value={0: 1}), f"rows of {INTERMEDIATE} must be a list"),
        (set_in("modules", INTERMEDIATE, "bias", value="yes please"), f"bias of {INTERMEDIATE} must be true"),
        (set_in("modules", INTERMEDIATE, "weight", value=0), f"weight of {INTERMEDIATE} must be true or false"),
        (set_in("modules", KEY, "columns", value=[1]), f"{KEY} trains the whole weight and columns or rows"),
        (set_in("modules", NORM, value={"shape": [16], "columns": [1]}), f"{NORM} is a norm and has no columns"),
        (set_in("modules", NORM, value={"shape": [16], "elements": [1]}), f"{NORM} is a norm and has no .*elements"),
        (set_in("modules", KEY, "elements", value=[1]), f"{KEY} trains the whole weight and .*elements of it"),
        (
            set_in("modules", VALUE, "elements", value=[0, 256]),
            f"{VALUE} has 256 elements, counted from 0; 256 is none",
        ),
        (set_in("modules", VALUE, "elements", value=[-1, 3]), f"{VALUE} has 256 elements.*-1 is none"),
        (set_in("modules", VALUE, "elements", value=[5, 3, 5]), f"elements of {VALUE} name 5 twice"),
        (
            set_in("modules", VALUE, "elements", value=[0, 33]),
            f"element 33 of {VALUE} lies in one of its chosen columns",
        ),
        (set_in("modules", VALUE, "elements", value=[242]), f"element 242 of {VALUE} lies in one of its chosen rows"),
        (set_in("modules", VALUE, "elements", value=[1.0]), f"elements of {VALUE} must be a list of whole numbers"),
        (set_in("modules", VALUE, "elements", value=[10**30]), f"elements of {VALUE} must be a list of whole numbers"),
        (set_in("modules", VALUE, "elements", value=None), f"elements of {VALUE} must be a list of whole numbers"),
        (set_in("modules", KEY, value={"shape": [16, 16]}), f"{KEY} trains nothing"),
        (removed("modules", KEY, "shape"), f"{KEY} lacks its shape"),
        (set_in("modules", KEY, "shape", value=[]), f"shape of {KEY} must be"),
        (set_in("modules", KEY, "shape", value=[16, 0]), f"shape of {KEY} must be"),
        (set_in("modules", KEY, "shape", value=["16", "16"]), f"shape of {KEY} must be"),
        (set_in("modules", KEY, "shape", value=[-16, 16]), f"shape of {KEY} must be"),
        (set_in("modules", KEY, "shape", value=[1] * 9), f"shape of {KEY} must be"),
        (set_in("modules", KEY, "shape", value=[2**32, 2**31]), f"shape of {KEY} must be"),
        (set_in("modules", KEY, "shape", value=16), "field of the wrong kind"),
        (set_in("modules", INTERMEDIATE, "weight", value=None), f"weight of {INTERMEDIATE} must be true or false"),
        (set_in("budget", "parameters", value=474), "trains 475 parameters, above its budget of 474"),
        (set_in("budget", "parameters", value="many"), "wrong kind"),
        (set_in("budget", "parameters", value=float("inf")), "no finite number"),
        (set_in("budget", value=475), "budget must be a mapping"),
        (set_in("model", value=None), "model must be a mapping"),
        (set_in("model", "head_parameters", value="none"), "wrong kind"),
        (set_in("modules", value={}), "chooses no module"),
        (set_in("modules", value=None), "modules must map"),
        (set_in("modules", value=[KEY]), "modules must map"),
        (set_in("always_trained", value="classifier"), "always_trained must be a list of names"),
        (set_in("always_trained", value=[1]), "always_trained must be a list of names"),
        (set_in("granularity", value="column"), "granularity must be a list of names"),
        (removed("modules"), "lacks the field 'modules'"),
        (removed("budget"), "lacks the field 'budget'"),
        (removed("budget", "asked"), "lacks the field 'asked'"),
        (removed("budget", "parameters"), "lacks the field 'parameters'"),
        (removed("model"), "lacks the field 'model'"),
        (removed("model", "fingerprint"), "lacks the field 'fingerprint'"),
        (removed("format"), "no plan of format 'reltune-plan-1'"),
        (set_in("format", value="reltune-plan-2"), "no plan of format 'reltune-plan-1'"),
    ],
)
def test_edits_that_make_none_are_refused(by_hand, tmp_path, edit, why):
    with pytest.raises(InputError, match=why) as caught:
        edited(by_hand, tmp_path, edit)
    assert str(tmp_path / "plan.yaml") in str(caught.value)


def test_elements_beside_the_plan_take_four_bytes_each(by_hand, tmp_path, monkeypatch):
    monkeypatch.setattr(plan_file, "INLINE_INDICES", 0)
    wide = ModulePlan((65_536, 65_536), elements=[65_536**2 - 1, 2])  # more weights than int32 counts
    by_hand.modules["wide"] = wide
    by_hand.budget_parameters += 2
    by_hand.save(tmp_path)
    held = load_file(tmp_path / "indices.safetensors")
    assert held[f"{VALUE}/elements"].equal(torch.tensor([0, 7, 239], dtype=torch.int32))
    assert held["wide/elements"].equal(torch.tensor([2, 65_536**2 - 1]))
    assert wide.index_bytes == 16 and Plan.load(tmp_path) == by_hand
    tensors = dict(held)
    tensors[f"{VALUE}/elements"] = torch.tensor([239, 7])
    save_file(tensors, tmp_path / "indices.safetensors")
    assert list(Plan.load(tmp_path).modules[VALUE].elements) == [7, 239]


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"modules: {", "cannot be read as a plan"),
        (b"modules:\n\t- tab", "cannot be read as a plan"),
        (b"\xff\xfe\x00", "cannot be read as a plan"),
        (b"criterion: 2020-13-45", "cannot be read as a plan"),  # to YAML a date, and none
        (b"!!python/object/apply:os.getcwd []", "cannot be read as a plan"),
        (b"", "no plan of format"),
        (b"just words", "no plan of format"),
        (b"- a\n- list", "no plan of format"),
    ],
)
def test_files_that_are_no_plan(tmp_path, content, why):
    path = tmp_path / "plan.yaml"
    path.write_bytes(content)
    with pytest.raises(InputError, match=why) as caught:
        Plan.load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there(tmp_path):
    for path in (tmp_path, tmp_path / "other.yaml"):
        with pytest.raises(InputError, match="does not exist; run `reltune select`"):
            Plan.load(path)


def save_indices(folder, change):
    tensors = load_file(folder / "indices.safetensors")
    change(tensors)
    save_file(tensors, folder / "indices.safetensors")


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda folder: (folder / "indices.safetensors").unlink(), "indices.safetensors cannot be read"),
        (lambda folder: (folder / "indices.safetensors").write_bytes(b"x"), "indices.safetensors cannot be read"),
        (
            lambda folder: save_indices(folder, lambda tensors: tensors.pop(f"{INTERMEDIATE}/rows")),
            f"indices.safetensors holds no rows of {INTERMEDIATE}",
        ),
        (
            lambda folder: save_indices(
                folder, lambda tensors: tensors.update({f"{INTERMEDIATE}/rows": torch.tensor([40])})
            ),
            f"{INTERMEDIATE} has 40 rows.*40 is none",
        ),
        (
            lambda folder: save_indices(
                folder, lambda tensors: tensors.update({f"{INTERMEDIATE}/rows": torch.tensor([1.0])})
            ),
            f"rows of {INTERMEDIATE} must be a list of whole numbers",
        ),
        (
            lambda folder: save_indices(
                folder, lambda tensors: tensors.update({f"{INTERMEDIATE}/rows": torch.tensor([[1]])})
            ),
            f"rows of {INTERMEDIATE} must be a list of whole numbers",
        ),
        (
            lambda folder: save_indices(
                folder, lambda tensors: tensors.update({f"{VALUE}/elements": torch.tensor([1.0])})
            ),
            f"elements of {VALUE} must be a list of whole numbers",
        ),
    ],
)
def test_a_damaged_index_file(by_hand, tmp_path, damage, why, monkeypatch):
    monkeypatch.setattr(plan_file, "INLINE_INDICES", 1)
    by_hand.save(tmp_path)
    damage(tmp_path)
    with pytest.raises(InputError, match=why) as caught:
        Plan.load(tmp_path)
    assert str(tmp_path) in str(caught.value)


# Against a model


def inventory_of(model):
    return take_inventory(model, ["classifier"] if hasattr(model, "classifier") else [])


def test_the_model_it_was_made_for(plan, by_hand, scores):
    for each in (plan, by_hand):
        each.check_model(inventory_of(tiny_bert()), scores.fingerprint)
        each.check_model(inventory_of(tiny_bert()), "")  # where no fingerprint can be taken


@pytest.mark.parametrize("model", [tiny_llama, tiny_sequential])
def test_another_model_has_no_such_module(by_hand, scores, model):
    with pytest.raises(InputError, match=f"no module '{INTERMEDIATE}'; "):
        by_hand.check_model(inventory_of(model()), scores.fingerprint)


def test_another_size_weight_or_kind_of_the_same_model(by_hand, scores):
    with pytest.raises(InputError, match=rf"{INTERMEDIATE} has shape \[24, 16\] in this model and \[40, 16\]"):
        by_hand.check_model(inventory_of(tiny_bert(intermediate_size=24)), scores.fingerprint)
    with pytest.raises(InputError, match=r"fingerprint is .*…, and this one's 0123456"):
        by_hand.check_model(inventory_of(tiny_bert()), "0123456789")
    model = tiny_bert()
    model.get_submodule(KEY).bias = None
    with pytest.raises(InputError, match=f"{KEY} has no bias in this model; set bias: false"):
        by_hand.check_model(inventory_of(model), scores.fingerprint)


def test_units_that_the_model_has_and_a_plan_cannot_train(by_hand, scores):
    inventory = inventory_of(tiny_bert())
    inventory.by_name[KEY] = dataclasses.replace(inventory[KEY], layer_type="router")
    for name, why in (("classifier", "new head"), (KEY, "layer type router")):
        by_hand.modules = {name: ModulePlan((3, 16), columns=[0])}
        with pytest.raises(InputError, match=f"{name} cannot be trained by this plan: .*{why}"):
            by_hand.check_model(inventory, scores.fingerprint)


# Directions


@pytest.fixture
def along(scores, tmp_path):
    """A plan of directions on disk."""
    vectors = np.random.default_rng(0).normal(size=(4, 16)).astype(np.float32)
    modules = {KEY: ModulePlan((16, 16), directions=[0, 2], vectors=vectors)}
    Plan(modules, "32", 32, 10**6, scores.fingerprint, always_trained=["classifier"], spread="even").save(tmp_path)
    return tmp_path


def changed(folder, change):
    values = yaml.safe_load((folder / "plan.yaml").read_text())
    change(values["modules"][KEY], values)
    (folder / "plan.yaml").write_text(yaml.safe_dump(values))


def test_directions_have_their_vectors_beside_the_plan(along):
    assert {path.name for path in along.iterdir()} == {"plan.yaml", "directions.safetensors"}
    assert "directions: [0, 2]" in (along / "plan.yaml").read_text()
    assert yaml.safe_load((along / "plan.yaml").read_text())["predicted"]["fixed_numbers"] == 32
    held = load_file(along / "directions.safetensors")
    assert {name: tuple(t.shape) for name, t in held.items()} == {KEY: (4, 16)}
    changed(along, lambda module, plan: module.update(directions=[3]))  # any that was measured
    plan = Plan.load(along)
    assert plan.parameters == 16 and (plan.modules[KEY].chosen_vectors() == held[KEY].numpy()[[3]]).all()
    changed(along, lambda module, plan: (module.pop("directions"), module.update(columns=[1])))
    Plan.load(along).save(along)
    assert {path.name for path in along.iterdir()} == {"plan.yaml"}


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda module, plan: module.update(directions=[4]), "has 4 directions in its file, counted from 0; 4 is none"),
        (lambda module, plan: module.update(directions=[-1]), "-1 is none of them"),
        (lambda module, plan: module.update(directions=[1, 1]), "name 1 twice"),
        (lambda module, plan: module.update(directions=[1.5]), "must be a list of whole numbers"),
        (lambda module, plan: module.update(directions=True), "must be a list of whole numbers"),
        (lambda module, plan: module.update(weight=True), "trains the whole weight and directions of it"),
        (lambda module, plan: module.update(shape=[16]), "is a norm and has no directions"),
        (lambda module, plan: module.update(shape=[16, 1, 4, 4]), "is a convolution, which has no directions"),
        (lambda module, plan: module.update(shape=[16, 20]), "no float32 vectors of 20 finite numbers"),
        (lambda module, plan: module.update(directions=[0, 1, 2]), "above its budget"),
        (
            lambda module, plan: plan["modules"].update({VALUE: {"shape": [16, 16], "directions": [0]}}),
            f"the vectors of the directions of {VALUE} are missing|above its budget",
        ),
    ],
)
def test_edits_of_directions_that_make_no_sense(along, change, why):
    changed(along, change)
    with pytest.raises(InputError, match=why):
        Plan.load(along)


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda file: file.unlink(), "directions.safetensors cannot be read"),
        (lambda file: file.write_bytes(b"x"), "directions.safetensors cannot be read"),
        (lambda file: save_file({"other": torch.zeros(4, 16)}, file), "the vectors of the directions .* are missing"),
        (lambda file: save_file({KEY: torch.zeros(4, 15)}, file), "no float32 vectors of 16 finite numbers"),
        (lambda file: save_file({KEY: torch.zeros(4, 16).double()}, file), "no float32 vectors"),
        (lambda file: save_file({KEY: torch.full((4, 16), torch.nan)}, file), "no float32 vectors of 16 finite"),
        (lambda file: save_file({KEY: torch.zeros(2, 16)}, file), "has 2 directions in its file, counted from 0; 2"),
    ],
)
def test_a_damaged_file_of_vectors(along, damage, why):
    damage(along / "directions.safetensors")
    with pytest.raises(InputError, match=why) as caught:
        Plan.load(along)
    assert str(along) in str(caught.value)
