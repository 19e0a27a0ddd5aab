"""The relevance artefact: what adds up to what, which modules are measured, and the file."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    GPT2Config,
    GPT2Model,
    RobertaForSequenceClassification,
    RobertaModel,
)

from measured_models import MODELS, tiny_bert, tiny_llama, tiny_roberta, tiny_sequential, tiny_vit
from relevance_cases import data_for, measure, text_batch
from reltune.errors import InputError
from reltune.layers.fingerprint import fingerprint
from reltune.layers.inventory import choose, matching, new_head_modules, take_inventory
from reltune.relevance.scores import RelevanceScores
from tiny_models import save_tiny_bert

ADDITIVE = ["fisher", "gradient", "magnitude", "depth"]
EVERY = [*ADDITIVE, "random"]


def assert_equal_scores(a, b):
    assert a.criteria == b.criteria
    assert a.inventory == b.inventory
    assert (a.always_trained, a.fingerprint, a.provenance) == (b.always_trained, b.fingerprint, b.provenance)
    for criterion in a.criteria:
        assert list(a.parts[criterion]) == list(b.parts[criterion])
        for name, parts in a.parts[criterion].items():
            assert list(parts) == list(b.parts[criterion][name])
            for part, values in parts.items():
                assert values.dtype == b.parts[criterion][name][part].dtype
                assert torch.equal(values, b.parts[criterion][name][part])


@pytest.fixture(scope="module", params=MODELS)
def scores(request):
    model = MODELS[request.param]()
    return measure(model, [data_for(model)], None, EVERY)


def close(a, b):
    return abs(float(a) - float(b)) <= 1e-5 * abs(float(b))


def test_what_adds_up(scores):
    for criterion in ADDITIVE:
        parts, modules = scores.parts[criterion], scores.by("module", criterion)
        assert list(modules) == [info.name for info in scores.inventory.modules]
        for name, found in parts.items():
            if "norm" in found:
                assert close(modules[name], found["norm"])
                continue
            assert close(modules[name], found["column"].sum() + found.get("bias", 0))
            assert close(modules[name], found["row"].sum() + found.get("bias", 0))
            assert close(found["weight"], found["column"].sum())
        for layer, relevance in scores.by("layer", criterion).items():
            assert close(relevance, sum(v for name, v in modules.items() if name.startswith(f"{layer}.")))


def test_scores_are_shown_in_a_line(scores):
    modules = len(scores.inventory.modules)
    assert (
        repr(scores) == f"<RelevanceScores of {modules} modules of {scores.provenance['model']}, by {', '.join(EVERY)}>"
    )


def test_heatmap_holds_every_module_once(scores):
    for criterion in EVERY:
        heatmap, modules = scores.heatmap(criterion), scores.by("module", criterion)
        assert heatmap.criterion == criterion
        cells = [value for row in heatmap.values for value in row if value is not None]
        assert sorted(cells) == sorted(float(value) for value in modules.values())
        assert all(len(row) == len(heatmap.columns) for row in heatmap.values)
        for name, relevance in modules.items():
            layer = next((layer for layer in heatmap.rows if name.startswith(f"{layer}.")), None)
            place = name.removeprefix(f"{layer}.") if layer else "(outside the layers)"
            cell = heatmap.values[heatmap.rows.index(layer or name)][heatmap.columns.index(place)]
            assert cell == float(relevance)
        assert close(sum(heatmap.share_by_layer), 1)
        for row, share in zip(heatmap.values, heatmap.share_by_layer, strict=True):
            assert abs(sum(v for v in row if v is not None) / sum(cells) - share) <= 1e-6


def test_layers_are_the_models_blocks():
    model = tiny_vit()
    scores = measure(model, criteria=["depth"])
    blocks = [name for name, module in model.named_modules() if type(module).__name__ == "ViTLayer"]
    assert len(blocks) == 2 and list(scores.by("layer")) == blocks
    # Modules of a plain nn.Sequential are no blocks: each stands for itself.
    scores = measure(tiny_sequential(), criteria=["depth"])
    assert scores.by("layer") == {} and scores.heatmap().rows == ["0", "1", "3", "4", "6"]
    assert "fewer than two layers" in scores.depth_sentence()


def test_depth_sentence_names_the_layer_that_matters_most():
    scores = measure(tiny_bert(num_hidden_layers=4), criteria=["depth"])
    top, half = 8 / 26, 15 / 26  # four layers at places 5 to 8
    assert scores.depth_sentence() == (
        f"By depth, layer 3 of 0–3 matters most ({top:.0%} of the layers' relevance); "
        f"the top layer holds {top:.0%}, the upper 2 of 4 layers together {half:.0%}."
    )


def test_unknown_criterion_and_granularity():
    scores = measure(tiny_sequential(), criteria=["magnitude", "depth"])
    assert scores.criterion() == "magnitude"
    with pytest.raises(InputError, match=r"'fisher' was not measured here; measured: magnitude, depth"):
        scores.by("column", "fisher")
    with pytest.raises(InputError, match=r"'colum' is unknown; did you mean 'column'"):
        scores.by("colum")


def test_save_and_load_give_the_same(scores, tmp_path):
    scores.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["scores.json", "scores.safetensors"]
    loaded = RelevanceScores.load(tmp_path)
    assert_equal_scores(loaded, scores)
    assert loaded.heatmap("fisher") == scores.heatmap("fisher")
    loaded.save(tmp_path)
    assert_equal_scores(RelevanceScores.load(tmp_path), scores)


def damaged(name, change):
    def damage(folder):
        path = folder / name
        if name.endswith(".json"):
            values = json.loads(path.read_text())
            change(values)
            path.write_text(json.dumps(values))
        else:
            tensors = load_file(path)
            change(tensors)
            save_file(tensors, path)

    return damage


def replaced(name, content):
    return lambda folder: (folder / name).write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "scores.json").unlink(),
        lambda folder: (folder / "scores.safetensors").unlink(),
        replaced("scores.json", b'{"format"'),
        replaced("scores.json", b"\xff\xfe"),
        replaced("scores.json", b"[]"),
        replaced("scores.json", b"{}"),
        replaced("scores.safetensors", b""),
        replaced("scores.safetensors", b"\x80\x04\x95 a pickle, say"),
        lambda folder: replaced("scores.safetensors", (folder / "scores.safetensors").read_bytes()[:-9])(folder),
        damaged("scores.json", lambda values: values.update(format="reltune-relevance-0")),
        damaged("scores.json", lambda values: values.pop("modules")),
        damaged("scores.json", lambda values: values.pop("provenance")),
        damaged("scores.json", lambda values: values.update(criteria=["fisher"])),
        damaged("scores.json", lambda values: values["modules"][0].pop("shape")),
        damaged("scores.json", lambda values: values["modules"][0].update(shape=[1, 2])),
        damaged("scores.json", lambda values: values["modules"][0].update(colour="red")),
        damaged("scores.json", lambda values: values.update(modules="all")),
        damaged("scores.safetensors", lambda tensors: tensors.pop("magnitude/column/0")),
        damaged("scores.safetensors", lambda tensors: tensors.update({"magnitude/row/0": torch.zeros(3)})),
    ],
)
def test_a_damaged_file_is_named(damage, tmp_path):
    measure(tiny_sequential(), criteria=["magnitude"]).save(tmp_path)
    damage(tmp_path)
    with pytest.raises(InputError, match=tmp_path.name):
        RelevanceScores.load(tmp_path)


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (damaged("scores.json", lambda values: values.update(criteria=[])), "names no criterion"),
        (damaged("scores.json", lambda values: values["criteria"].append("fisher")), "has nothing of fisher"),
        (damaged("scores.json", lambda values: values["modules"].append(values["modules"][0])), "name one twice"),
        (damaged("scores.json", lambda values: values["modules"][0].update(groups=5)), r"\] in 5 groups"),
        (damaged("scores.json", lambda values: values["modules"][0].update(groups=0)), r"\] in 0 groups"),
        (damaged("scores.json", lambda values: values["modules"][0].update(shape=[0, 6])), r"the shape \[0, 6\]"),
        (damaged("scores.json", lambda values: values["modules"][0].update(shape=[-6, 6])), r"the shape \[-6, 6\]"),
        (damaged("scores.json", lambda values: values["modules"][0].update(shape=[2**32, 2**32])), "the shape"),
        (damaged("scores.json", lambda values: values["modules"][0].update(shape=[1] * 9)), "the shape"),
        (damaged("scores.json", lambda values: values.update(tensors=1)), "tensors and not 1"),
        (
            damaged("scores.safetensors", lambda tensors: tensors.update({"magnitude/row/0": torch.zeros(3)})),
            r"magnitude/row/0 has shape \(3,\)",
        ),
        (
            damaged("scores.safetensors", lambda tensors: tensors["magnitude/row/0"].fill_(torch.nan)),
            "magnitude/row/0 holds numbers that are not finite",
        ),
        (
            damaged("scores.safetensors", lambda tensors: tensors.update({"other": tensors.pop("magnitude/row/0")})),
            "does not know other",
        ),
    ],
)
def test_what_is_wrong_with_a_file_is_said(damage, why, tmp_path):
    measure(tiny_sequential(), criteria=["magnitude"]).save(tmp_path)
    damage(tmp_path)
    with pytest.raises(InputError, match=why):
        RelevanceScores.load(tmp_path)


def test_provenance_says_on_what_it_was_measured():
    model = tiny_bert()
    batch = data_for(model)
    first, again, other = (measure(model, [b], seed=5).provenance for b in (batch, batch, data_for(model, seed=1)))
    assert first == again and first["data"] != other["data"]
    assert first["architecture"] == "BertForSequenceClassification"
    assert (first["dtype"], first["examples"], first["seed"]) == ("float64", 7, 5)
    assert first["versions"]["torch"] == torch.__version__


# Which modules are measured


def test_linear_maps_and_norms_are_measured_and_the_rest_is_left_out():
    inventory = take_inventory(tiny_bert())
    block = ["attention.self." + part for part in ("query", "key", "value")]
    block += ["attention.output.dense", "attention.output.LayerNorm", "intermediate.dense"]
    block += ["output.dense", "output.LayerNorm"]
    layers = [f"bert.encoder.layer.{i}.{place}" for i in (0, 1) for place in block]
    names = [info.name for info in inventory.modules]
    tables = [f"bert.embeddings.{kind}_embeddings" for kind in ("word", "position", "token_type")]
    assert sorted(names) == sorted([*tables, "bert.embeddings.LayerNorm", *layers, "bert.pooler.dense", "classifier"])
    assert inventory.left_out == {}
    assert inventory["bert.embeddings.word_embeddings"].shape == (20, 16)
    assert inventory["bert.encoder.layer.1.intermediate.dense"].shape == (40, 16)
    assert inventory.base_parameters == sum(p.numel() for p in tiny_bert().parameters())


def test_tied_and_foreign_weights_are_left_out_with_a_reason():
    config = BertConfig(vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    model = BertForMaskedLM(config)
    inventory = take_inventory(model)
    assert "cls.predictions.decoder" not in inventory
    reason = inventory.left_out["cls.predictions.decoder.weight"]
    assert reason == "shares its weight with bert.embeddings.word_embeddings.weight"
    assert inventory.base_parameters == sum(p.numel() for p in model.parameters())
    with pytest.raises(InputError, match=r"'decoder' matches no module.*shares its weight"):
        choose(inventory, ["decoder"])

    one = nn.Linear(4, 4)
    shared = nn.Sequential(one, nn.ReLU(), one, nn.Linear(4, 4))
    assert [info.name for info in take_inventory(shared).modules] == ["3"]

    gpt2 = take_inventory(GPT2Model(GPT2Config(vocab_size=9, n_embd=8, n_layer=1, n_head=2, n_positions=8)))
    assert gpt2["h.0.mlp.c_fc"].shape == (32, 8) and gpt2["h.0.mlp.c_fc"].layer_type == "conv1d"
    lstm = take_inventory(nn.Sequential(nn.LSTM(4, 4), nn.Linear(4, 4)))
    assert lstm.left_out["0.weight_ih_l0"] == "layer type LSTM has no units yet"


def test_a_reparametrised_map_is_not_taken_for_a_plain_one():
    with pytest.warns(FutureWarning):
        old = nn.utils.weight_norm(nn.Linear(3, 4))
    new = nn.utils.parametrizations.weight_norm(nn.Linear(3, 4))
    model = nn.Sequential(old, new, nn.Linear(4, 4))
    assert [info.name for info in take_inventory(model).modules] == ["2"]


QUERIES = [f"bert.encoder.layer.{i}.attention.self.query" for i in (0, 1)]


@pytest.mark.parametrize(
    ("target", "exclude", "wanted"),
    [
        (["query"], [], QUERIES),
        ("query", "layer.1", QUERIES[:1]),
        (["self"], ["key", "value"], QUERIES),
        (["attention.self.query"], [], QUERIES),
        ([QUERIES[1]], [], QUERIES[1:]),
        (["bert.encoder.layer.0"], ["attention", "dense"], ["bert.encoder.layer.0.output.LayerNorm"]),
        ([r".*\.layer\.1\..*\.(query|key)"], [r".*key"], QUERIES[1:]),
        ([], [r"bert\..*"], ["classifier"]),
        (["classifier", "bert.pooler"], [], ["bert.pooler.dense", "classifier"]),
    ],
)
def test_patterns(target, exclude, wanted):
    found = measure(tiny_bert(), criteria="depth", target_modules=target, exclude_modules=exclude)
    assert list(found.parts["depth"]) == wanted
    everything = measure(tiny_bert(), criteria="depth").inventory
    assert found.inventory.base_parameters == everything.base_parameters
    assert [everything[name] for name in wanted] == found.inventory.modules


def test_patterns_are_whole_parts_of_names():
    names = ["layer.1.query", "layer.10.query", "layer.1.query_norm", "player.1"]
    assert matching(names, "layer.1") == [names[0], names[2]]
    assert matching(names, "query") == names[:2]
    assert matching(names, "quer") == matching(names, "1.que") == matching(names, ".") == []
    assert matching(names, r"layer\.\d+\.query") == names[:2]


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        ({"target_modules": ["quary"]}, r"target_modules 'quary'.*did you mean 'query'"),
        ({"exclude_modules": ["pooller"]}, r"exclude_modules 'pooller' matches no module"),
        ({"target_modules": ["["]}, r"target_modules '\[' matches no module"),
        ({"exclude_modules": [".*"]}, r"exclude_modules leaves no module"),
        ({"target_modules": ["query"], "exclude_modules": ["query"]}, r"leaves no module"),
        ({"target_modules": ["classifier"], "always_trained": ["classifier"]}, r"new head, always trained"),
    ],
)
def test_patterns_that_match_nothing(patterns, message):
    with pytest.raises(InputError, match=message):
        measure(tiny_bert(), criteria=["depth"], **patterns)


# New heads


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    save_tiny_bert(folder / "bert")
    RobertaModel(tiny_roberta().config).save_pretrained(folder / "roberta")
    return folder


def test_heads_that_loading_did_not_find_are_always_trained(folder):
    model = BertForSequenceClassification.from_pretrained(folder / "bert", num_labels=3)
    scores = measure(model, [text_batch([3, 5])], criteria=["fisher"])
    assert scores.always_trained == ["classifier"]
    assert "classifier" not in scores.inventory and "bert.pooler.dense" in scores.inventory
    assert scores.inventory.left_out["classifier.weight"] == "new head, always trained"
    assert scores.inventory.head_parameters == 3 * 32 + 3
    total = sum(p.numel() for p in model.parameters())
    assert scores.inventory.base_parameters + scores.inventory.head_parameters == total

    model = RobertaForSequenceClassification.from_pretrained(folder / "roberta", num_labels=3)
    scores = measure(model, criteria=["depth"])
    assert scores.always_trained == ["classifier"]  # a dense layer and an output layer, saved as one
    assert scores.inventory.head_parameters == sum(p.numel() for p in model.classifier.parameters())

    # With all weights found, or none to be found, nothing is new.
    model.save_pretrained(folder / "whole")
    whole = RobertaForSequenceClassification.from_pretrained(folder / "whole")
    assert measure(whole, criteria=["depth"]).always_trained == []
    assert measure(tiny_roberta(), criteria=["depth"]).always_trained == []


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        (["classifier"], ["classifier"]),
        ("classifier", ["classifier"]),
        (["classifier.dense.weight", "classifier.dense.bias"], ["classifier.dense"]),
        (["classifier.dense.bias"], ["classifier.dense"]),
        (["classifier.dense.weight", "classifier.out_proj"], ["classifier"]),
        (["classifier", "classifier.out_proj.weight"], ["classifier"]),
        (["classifier.dense", "roberta.encoder.layer.1"], ["classifier.dense", "roberta.encoder.layer.1"]),
        (["roberta.encoder.layer.0", "roberta.encoder.layer.1"], ["roberta.encoder"]),
        ([], []),
    ],
)
def test_heads_are_named_as_high_up_as_they_are_new(names, wanted):
    assert new_head_modules(tiny_roberta(), names) == wanted
    scores = measure(tiny_roberta(), criteria=["depth"], always_trained=names)
    assert scores.always_trained == wanted
    assert not [i.name for i in scores.inventory.modules if i.name.startswith(tuple(f"{w}." for w in wanted))]


@pytest.mark.parametrize("name", ["clasifier", "classifier.dense.wait", "", "weight"])
def test_an_unknown_head_is_refused(name):
    with pytest.raises(InputError, match="always_trained names"):
        measure(tiny_roberta(), criteria=["depth"], always_trained=[name])


def test_a_head_is_not_measured_whatever_its_name_begins_with():
    """``head`` is new, ``header`` is not."""
    model = nn.ModuleDict({"head": nn.Linear(2, 2), "header": nn.Linear(2, 2)})
    inventory = take_inventory(model, ["head"])
    assert [info.name for info in inventory.modules] == ["header"]
    assert fingerprint(model, ["head"]) != fingerprint(nn.ModuleDict({"head": nn.Linear(2, 2)}), ["head"])


# Fingerprint


def test_fingerprint_is_one_for_float32_and_bfloat16(folder):
    loaded = {
        dtype: BertForSequenceClassification.from_pretrained(folder / "bert", num_labels=3, dtype=dtype)
        for dtype in (torch.float32, torch.bfloat16)
    }
    prints = {measure(model, criteria=["depth"]).fingerprint for model in loaded.values()}
    assert len(prints) == 1 and len(prints.pop()) == 32
    # The heads are random, and each load's own.
    assert len({fingerprint(model) for model in loaded.values()}) == 2


def test_fingerprint_differs_when_a_weight_does():
    model = tiny_llama()
    before = fingerprint(model, ["score"])
    assert fingerprint(copy.deepcopy(model), ["score"]) == before
    for name, _ in model.named_parameters():
        changed = copy.deepcopy(model)
        with torch.no_grad():
            changed.get_parameter(name).view(-1)[-1] += 0.5
        assert (fingerprint(changed, ["score"]) == before) == name.startswith("score."), name
    model.model.layers[0].self_attn.renamed_proj = model.model.layers[0].self_attn.q_proj
    del model.model.layers[0].self_attn.q_proj
    assert fingerprint(model, ["score"]) != before
    assert fingerprint(nn.Sequential(nn.Linear(4, 4)).to("meta")) == ""
