"""Ablation: each score against a model that was changed by hand; what is left behind; what can be done with the scores."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from torch import nn

from measured_models import LABELS, MODELS, tiny_bert, tiny_gpt2, tiny_mixtral
from oracles.ablated import mean_metric, means, without_head, without_layer, without_module
from oracles.per_example_gradients import examples
from relevance_cases import causal_of_one, cross_entropy_of_one, data_for, labels_of, lm_batch, measure, own_loss, split
from reltune.errors import AnalysisError, InputError
from reltune.plan.selection import select
from reltune.relevance.artefact import PARTIAL
from reltune.relevance.scores import RelevanceScores
from reltune.report.record import RunRecord

MINE = ["ablation"]


def causal_loss(outputs, batch):
    labels = batch["labels"][:, 1:]
    losses = nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels.flatten(), reduction="none")
    return losses.view(labels.shape).sum(1) / (labels != -100).sum(1)


def accuracy_of_one(outputs, example):
    return (getattr(outputs, "logits", outputs).argmax(-1) == labels_of(example)).double()


def case(name):
    """Model, batch, loss, and the metric of one example."""
    if name == "gpt2":
        return tiny_gpt2(), lm_batch(), causal_loss, lambda *of: -causal_of_one(*of)
    model = MODELS[name]()
    return model, data_for(model), own_loss, lambda *of: -cross_entropy_of_one(*of)


def changed(kind, model, found, name, head, **mean):
    if kind == "layer":
        return without_layer(model, name, **mean)
    if kind == "module":
        return without_module(model, name, **mean)
    group = next(group for group in found.inventory.attention_heads if group.name == name)
    return without_head(model, group.output, group.output_columns(head), **mean)


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "vit", "sequential"])
def test_is_the_drop_of_the_metric_in_a_model_changed_by_hand(name):
    model, batch, loss, metric_of = case(name)
    found = measure(model, split(batch, 3), loss, MINE)
    whole = mean_metric(model, examples(batch), metric_of)
    assert found.provenance["ablation"]["of_the_model"] == pytest.approx(whole, rel=1e-9)
    assert found.provenance["ablation"]["metric"] == "negative loss"
    kinds = ["module"] if name == "sequential" else ["layer", "module", "head"]
    for kind in kinds:
        scores = found.by(kind)
        got, wanted = [], []
        for unit, score in scores.items():
            for head, value in enumerate(score.reshape(-1).tolist()):
                got.append(value)
                without = changed(kind, model, found, unit, head)
                wanted.append(whole - mean_metric(without, examples(batch), metric_of))
        assert len(got) == {"layer": 2, "head": 4}.get(kind, len(found.inventory.modules))
        most = max(map(abs, wanted))
        assert max(abs(a - b) for a, b in zip(got, wanted, strict=True)) <= 1e-9 * most, kind
        if kind != "head":
            assert most > 1e-3


def test_experts_and_routers():
    """One expert's projection, and one router's weight, overwritten with zeros in a copy."""
    model, batch = tiny_mixtral(), lm_batch()
    found = measure(model, split(batch, 3), causal_loss, MINE, options={"ablation": {"kinds": ["module"]}})
    whole = mean_metric(model, examples(batch), lambda *of: -causal_of_one(*of))
    scores, seen = found.by("module"), 0
    for info in found.inventory.modules:
        if info.layer_type not in ("experts", "router"):
            continue
        changed_model = copy.deepcopy(model)
        owner = changed_model.get_submodule(info.owner)
        with torch.no_grad():
            if info.layer_type == "router":
                owner.weight.zero_()
            else:
                projection, expert = info.name.split(".")[-2:]
                owner.get_parameter(projection)[int(expert)] = 0
        wanted = whole - mean_metric(changed_model, examples(batch), lambda *of: -causal_of_one(*of))
        assert float(scores[info.name]) == pytest.approx(wanted, rel=1e-8, abs=1e-11), info.name
        seen += 1
    assert seen == 2 * (1 + 2 * 4)
    means = measure(
        model, [batch], causal_loss, MINE, options={"ablation": {"kinds": ["module"], "replace_by": "mean"}}
    )
    assert set(means.by("module")) == set(scores)
    for module in model.modules():
        assert "forward" not in vars(module) and not module._forward_hooks


def test_with_the_mean_in_place_of_zero():
    model, batch, loss, metric_of = case("bert")
    found = measure(model, split(batch, 2), loss, MINE, options={"ablation": {"replace_by": "mean"}})
    whole = mean_metric(model, examples(batch), metric_of)
    outputs = {
        "layer": (list(found.by("layer")), lambda args, kwargs, output: output - args[0]),
        "module": (
            [info.name for info in found.inventory.modules if info.layer_type != "norm"],
            lambda args, kwargs, output: output,
        ),
        "head": ([group.output for group in found.inventory.attention_heads], lambda args, kwargs, output: args[0]),
    }
    for kind, (names, what) in outputs.items():
        mean = means(model, names, examples(batch), what)
        for unit, score in found.by(kind).items():
            if kind == "module" and unit not in mean:
                continue  # norms, as with zero
            for head, value in enumerate(score.reshape(-1).tolist()):
                place = (
                    next(g.output for g in found.inventory.attention_heads if g.name == unit)
                    if kind == "head"
                    else unit
                )
                key = "added" if kind == "layer" else "mean"
                without = changed(kind, model, found, unit, head, **{key: mean[place]})
                wanted = whole - mean_metric(without, examples(batch), metric_of)
                assert value == pytest.approx(wanted, rel=1e-8, abs=1e-11), (kind, unit)


def test_by_the_tasks_metric():
    model = MODELS["bert"]()
    batch = data_for(model, lengths=[5] * 24)
    found = measure(
        model, split(batch, 10), "sequence_classification", MINE, options={"ablation": {"kinds": ["layer"]}}
    )
    assert found.provenance["ablation"]["metric"] == "accuracy"
    whole = mean_metric(model, examples(batch), accuracy_of_one)
    for name, score in found.by("layer").items():
        wanted = whole - mean_metric(without_layer(model, name), examples(batch), accuracy_of_one)
        assert float(score) == pytest.approx(wanted, abs=1e-12)
    assert found.by("module") == {} and found.by("head") == {} and found.by("column") == {}


class Funnel(nn.Module):
    """The first block keeps its input's width, the second does not; one module is never called."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.ModuleDict({"map": nn.Linear(6, 6)}), nn.ModuleDict({"map": nn.Linear(6, 4)})])
        for block in self.blocks:
            block.forward = lambda x, block=block: torch.tanh(block["map"](x))
        self.unused = nn.Linear(6, 6)
        self.head = nn.Linear(4, LABELS)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def test_what_cannot_be_taken_out_is_named_and_has_no_score():
    torch.manual_seed(0)
    model = Funnel().double()
    batch = torch.randn(6, 6).double(), torch.randint(LABELS, (6,))
    with pytest.warns(RuntimeWarning) as warned:
        found = measure(model, [batch], own_loss, MINE)
    said = [str(warning.message) for warning in warned]
    assert "layer blocks.1 not scored by ablation: its output has not the shape of its input" in said[0]
    assert "module unused not scored by ablation: the model never calls it." in said[1]
    assert list(found.by("layer")) == ["blocks.0"]
    assert list(found.by("module")) == ["blocks.0.map", "blocks.1.map", "head"]


def fails_at(model, call, error):
    """Let the model's n-th forward pass from now on raise; gives the list of passes so far and the handle."""
    seen = []

    def hook(*_):
        seen.append(1)
        if len(seen) == call:
            raise error

    return seen, model.register_forward_hook(hook)


def assert_untouched(model, before, states):
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
    assert model.training and all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("criterion", ["ablation", "correlation"])
@pytest.mark.parametrize("call", [1, 3, 8])
def test_nothing_is_left_behind_after_an_exception(criterion, call):
    model = tiny_bert().train()
    batches = split(data_for(model), 3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    states = torch.get_rng_state(), random.getstate()
    _, handle = fails_at(model, call, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        measure(model, batches, own_loss, [criterion])
    handle.remove()
    assert_untouched(model, before, states)
    measure(model, batches, own_loss, MINE)
    assert_untouched(model, before, states)


@pytest.mark.parametrize("call", [2, 7, 12])
def test_goes_on_where_it_was_interrupted(tmp_path, call):
    model = MODELS["bert"]()
    batches = split(data_for(model), 4)
    criteria = ["ablation", "fisher"]
    wanted = measure(model, batches, own_loss, criteria)
    _, handle = fails_at(model, len(batches) * call, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        measure(model, batches, own_loss, criteria, resume_directory=tmp_path)
    handle.remove()
    assert (tmp_path / f"ablation.{PARTIAL}").is_file() == (call > 2)
    seen, handle = fails_at(model, -1, KeyboardInterrupt())
    found = measure(model, iter(batches), own_loss, criteria, resume_directory=tmp_path)
    handle.remove()
    # The untouched model first, then what is missing of 2 layers, 22 modules and 4 heads; then the pass of fisher with
    # its probe.
    assert len(seen) == len(batches) * (1 + 28 - (call - 2)) + len(batches) + 1
    assert found.provenance == wanted.provenance and not list(tmp_path.iterdir())
    for kind in ("layer", "module", "head"):
        for name, score in wanted.by(kind, "ablation").items():
            assert torch.equal(score, found.by(kind, "ablation")[name])
    with pytest.raises(KeyboardInterrupt):
        _, handle = fails_at(model, 8, KeyboardInterrupt())
        measure(model, batches, own_loss, criteria, resume_directory=tmp_path)
    handle.remove()
    with pytest.raises(InputError, match="not what the interrupted analysis"):
        measure(model, split(data_for(model, seed=3), 4), own_loss, criteria, resume_directory=tmp_path)


def test_batches_and_their_order_do_not_matter():
    model = MODELS["bert"]()
    batch = data_for(model)
    some = [
        measure(model, split(batch, size, order), own_loss, MINE)
        for size, order in ((7, None), (2, [6, 0, 3, 2, 1, 5, 4]))
    ]
    for kind in ("layer", "module", "head"):
        for name, score in some[0].by(kind).items():
            torch.testing.assert_close(score, some[1].by(kind)[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"ablatoin": {}}, "options are given for 'ablatoin'.*did you mean 'ablation'"),
        ({"fisher": {}}, "options are given for 'fisher', but no criterion of that name in this analysis has options"),
        ({"ablation": {"kind": ["layer"]}}, "ablation has no option 'kind'; did you mean 'kinds'"),
        ({"ablation": {"kinds": "layer"}}, "kinds is 'layer'; give a list"),
        ({"ablation": {"kinds": ["layers"]}}, "kinds 'layers' is unknown; did you mean 'layer'"),
        ({"ablation": {"replace_by": "noise"}}, "replace_by 'noise' is unknown"),
        ({"ablation": 3}, "options of ablation are of type int"),
    ],
)
def test_bad_options(options, sentence):
    model = MODELS["sequential"]()
    with pytest.raises(InputError, match=sentence):
        measure(model, [data_for(model)], None, ["ablation", "fisher"], options=options)


def test_bad_data_and_losses():
    model = MODELS["sequential"]()
    with pytest.raises(InputError, match="criterion 'ablation' needs data"):
        measure(model, None, None, MINE)
    with pytest.raises(InputError, match="no batch"):
        measure(model, [], None, MINE)
    with pytest.raises(InputError, match=r"metric has shape \(\) for 7 examples"):
        measure(model, [data_for(model)], lambda outputs, batch: own_loss(outputs, batch).mean(), MINE)
    with torch.no_grad():
        model[0].weight[0, 0] = torch.nan
    with pytest.raises(AnalysisError, match="metric of batch 0 is not finite"):
        measure(model, [data_for(model)], own_loss, MINE)


@pytest.fixture(scope="module")
def scored():
    model = MODELS["bert"]()
    return model, measure(model, [data_for(model)], own_loss, ["ablation", "fisher", "movement"])


def test_saved_scores_are_the_same(scored, tmp_path):
    _, found = scored
    found.save(tmp_path)
    loaded = RelevanceScores.load(tmp_path)
    for criterion in found.criteria:
        for kind in ("layer", "module", "head"):
            a, b = found.by(kind, criterion), loaded.by(kind, criterion)
            assert set(a) == set(b) and all(torch.equal(a[name], b[name]) for name in a)
        assert loaded.heatmap(criterion) == found.heatmap(criterion)
    assert loaded.depth_sentence() == found.depth_sentence()
    assert {(pair["first"], pair["second"]) for pair in loaded.compare(kind="head")} == {
        ("ablation", "fisher"),
        ("ablation", "movement"),
        ("fisher", "movement"),
    }


def test_negative_scores_are_shown_as_such(scored, tmp_path):
    from rich.console import Console

    from reltune.report import numbers
    from reltune.report.page import heatmap_figure, layers_figure, write_report
    from reltune.report.terminal import heatmap

    _, found = scored
    values = torch.stack(list(found.by("module").values()))
    assert values.min() < 0 < values.max()
    h = found.heatmap("ablation")
    assert not h.adds_up and found.heatmap("fisher").adds_up
    layers = {name: float(value) for name, value in found.by("layer").items()}
    total = sum(map(abs, layers.values()))
    for row, share in zip(h.rows, h.share_by_layer, strict=True):
        assert share == pytest.approx(layers.get(row, 0.0) / total)
    cells = [value for row in numbers.shares(h) for value in row if value is not None]
    assert sum(map(abs, cells)) == pytest.approx(1) and min(cells) == pytest.approx(
        float(values.min() / values.abs().sum())
    )
    figure = heatmap_figure(h)["data"][0]
    assert figure["zmin"] == -figure["zmax"] == -1
    positions = [place for place, _ in figure["colorscale"]]
    assert positions[0] == 0 and positions[-1] == 1 and positions == sorted(positions)
    axis = layers_figure(h.rows, [-0.6, *h.share_by_layer[1:]], {}, h.adds_up)["layout"]["xaxis"]
    assert axis["range"][0] < -60 and "own" in axis["title"]["text"]
    write_report(
        tmp_path / "report.html",
        RunRecord("t", {}, [h, found.heatmap("fisher")], found.depth_sentence(), [], {}, {}, [], [], []),
    )
    page = (tmp_path / "report.html").read_text()
    assert "the sum of absolute values" in page and "Shares are parts of all the relevance measured by fisher" in page
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(heatmap(h))
    text = console.export_text()
    assert "share of the sum of absolute values, %" in text and "all: the layer's own score" in text and "-" in text
    sentence = found.depth_sentence("ablation")
    best = max(layers.values())
    assert f"matters most ({best:.3g})" in sentence and "%" not in sentence


def test_tiny_negative_shares():
    from reltune.report import numbers

    assert [numbers.share(v) for v in (-0.0001, 0.0001, 0.0, -0.25)] == [">-0.1", "<0.1", "0.0", "-25.0"]


def test_selecting_by_it(scored):
    _, found = scored
    best = max(found.by("layer"), key=lambda name: float(found.by("layer")[name]))
    size = sum(info.weight_parameters + info.bias_parameters for info in found.inventory.modules if info.layer == best)
    plan = select(found, size, "layer")
    assert plan.criterion == "ablation" and all(name.startswith(best) for name in plan.modules)
    assert select(found, "30%", "module").modules
    heads = select(found, "10%", "head")
    assert all(module.rows or module.columns for module in heads.modules.values())
    with pytest.raises(InputError, match="ablation scores no column or row, only layer, module, head; choose"):
        select(found, "10%", ["column", "row", "layer"])
    assert select(found, "10%", "column", criterion="movement").modules
