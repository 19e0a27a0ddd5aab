"""What lies below the first changed unit is not computed again, and scores are those of passes over the whole model."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import nn
from transformers import AlbertConfig, AlbertForSequenceClassification, T5Config, T5ForConditionalGeneration

from measured_models import CLASSIFIER, LABELS, MODELS, made, tiny_bert, tiny_gpt2
from oracles.ablated import mean_metric, without_layer, without_module
from oracles.per_example_gradients import examples
from oracles.perturbed import metrics_one_by_one, with_perturbed
from relevance_cases import cross_entropy_of_one, data_for, measure, own_loss, split, text_batch
from reltune.relevance.behaviour import kept_outputs
from reltune.relevance.behaviour.kept_outputs import KeptOutputs
from reltune.relevance.criteria.correlation import drawn

MODULES = {"ablation": {"kinds": ["module"]}}


def minus_loss(*of):
    return -cross_entropy_of_one(*of)


@contextlib.contextmanager
def calls(model, names):
    """How often each of these modules' own computation runs: counted at its first linear map."""
    counts = dict.fromkeys(names, 0)

    def count(name):
        def hook(*_):
            counts[name] += 1

        return hook

    handles = []
    for name in names:
        inside = [m for m in model.get_submodule(name).modules() if isinstance(m, nn.Linear | nn.Embedding)]
        handles.append(inside[0].register_forward_hook(count(name)))
    yield counts
    for handle in handles:
        handle.remove()


@pytest.fixture(scope="module")
def deep():
    return tiny_bert(num_hidden_layers=4)


@pytest.fixture
def kept(monkeypatch):
    """The ``KeptOutputs`` that analyses make, in a list."""
    found, make = [], KeptOutputs.__init__

    def init(self, *arguments):
        make(self, *arguments)
        found.append(self)

    monkeypatch.setattr(KeptOutputs, "__init__", init)
    return found


def test_blocks_below_are_not_computed_again(deep, kept):
    batches = split(data_for(deep), 4)
    blocks = [f"bert.encoder.layer.{number}" for number in range(4)]
    with calls(deep, ["bert.embeddings", *blocks]) as counts:
        found = measure(deep, batches, own_loss, ["ablation"], options={"ablation": {"kinds": ["layer", "module"]}})
    modules = len(found.inventory.modules)
    in_block, in_embeddings = (
        sum(info.name.startswith(place) for info in found.inventory.modules) for place in (blocks[0], "bert.embeddings")
    )
    assert in_block == 8 and in_embeddings == 4 and modules == 4 * 8 + 4 + 2
    # One plain pass; then a block is computed where a module in it or below it is out, or a layer below it.
    assert counts.pop("bert.embeddings") == len(batches) * (1 + in_embeddings)
    for number, block in enumerate(blocks):
        assert counts[block] == len(batches) * (1 + in_embeddings + 8 * (number + 1) + number), block
    assert not kept[0].off and kept[0].checked


def correlation_by_hand(model, batch, kind, names, trials, strength, share):
    masks = torch.stack([drawn(42, kind, trial, len(names), share) for trial in range(trials)])
    metrics = []
    for mask in masks.tolist():
        perturbed = with_perturbed(model, kind, [n for n, out in zip(names, mask, strict=True) if out], strength)
        found = metrics_one_by_one(perturbed, examples(batch), minus_loss)
        metrics.append(sum(found) / len(found))
    both = torch.stack([masks.double().T, torch.tensor(metrics, dtype=torch.float64).expand(len(names), -1)], 1)
    return torch.stack([-torch.corrcoef(pair)[0, 1] for pair in both]).nan_to_num(
        0
    )  # 0 where a unit was never perturbed


@pytest.mark.filterwarnings("ignore:the ranking of")
@pytest.mark.parametrize("kind", ["layer", "module"])
def test_correlation_is_that_of_the_plain_loop(deep, kind):
    batch = data_for(deep)
    settings = {"kinds": [kind], "max_trials": 12, "min_trials": 12, "strength": 0.5, "share": 0.3}
    found = measure(deep, split(batch, 3), own_loss, ["correlation"], options={"correlation": settings})
    scores = found.by(kind)
    wanted = correlation_by_hand(deep, batch, kind, list(scores), 12, 0.5, 0.3)
    torch.testing.assert_close(torch.stack(list(scores.values())), wanted, rtol=1e-8, atol=1e-10)


def assert_as_by_hand(model, batch, found, kind="module"):
    whole = mean_metric(model, examples(batch), minus_loss)
    without = without_module if kind == "module" else without_layer
    for name, score in found.by(kind).items():
        wanted = whole - mean_metric(without(model, name), examples(batch), minus_loss)
        assert float(score) == pytest.approx(wanted, rel=1e-8, abs=1e-11), name


def test_groups_where_memory_is_short(deep, kept, monkeypatch):
    """Room for one batch: each batch is passed over anew, with all units, before the next one is kept."""
    batch = data_for(deep)
    monkeypatch.setattr(kept_outputs, "LEAST_ROOM", 1)
    monkeypatch.setattr(kept_outputs, "_room", lambda device: kept_outputs.LEAST_ROOM)
    with calls(deep, ["bert.embeddings", "bert.encoder.layer.0"]) as counts:
        found = measure(deep, split(batch, 3), own_loss, ["ablation"], options=MODULES)
    assert counts["bert.embeddings"] == 3 * (1 + 4) + 2  # two batches of three are kept in passes of their own
    assert counts["bert.encoder.layer.0"] == 3 * (1 + 4 + 8) + 2
    assert len(kept[0].passes) == 1
    assert_as_by_hand(deep, batch, found)


def test_batches_that_memory_does_not_hold(deep):
    """Halves of a batch are passed over whole."""
    batch = data_for(deep)

    def hook(module, args, output):
        if len(output) > 4:
            raise MemoryError

    handle = deep.bert.encoder.layer[1].output.dense.register_forward_hook(hook)
    found = measure(deep, [batch], own_loss, ["ablation"], options=MODULES)
    handle.remove()
    assert_as_by_hand(deep, batch, found)


def test_hooks_of_others_work_as_before():
    """Someone's hook changes what a block gives: what is kept is what the block itself gives."""
    model = tiny_bert()
    batch = data_for(model)

    def doubled(module, args, output):
        return output * 2 if isinstance(output, torch.Tensor) else (output[0] * 2, *output[1:])

    handle = model.bert.encoder.layer[0].register_forward_hook(doubled)
    found = measure(model, split(batch, 4), own_loss, ["ablation"], options=MODULES)
    assert_as_by_hand(model, batch, found)
    handle.remove()


def test_forwards_are_put_back_after_an_exception(deep):
    seen = []

    def hook(*_):
        seen.append(1)
        if len(seen) == 6:
            raise RuntimeError("enough")

    handle = deep.classifier.register_forward_hook(hook)
    with pytest.raises(RuntimeError, match="enough"):
        measure(deep, split(data_for(deep), 4), own_loss, ["ablation"])
    handle.remove()
    assert not any("forward" in vars(module) for module in deep.modules())


# -- where nothing can be kept, or only something -------------------------------------------------------------------


class Chain(nn.Module):
    """Three blocks, which may scale what they are given in place, draw numbers, or be one and the same."""

    def __init__(self, how):
        super().__init__()
        torch.manual_seed(0)
        self.how, blocks = how, [nn.Linear(6, 6) for _ in range(3)]
        self.blocks = nn.ModuleList([blocks[0], blocks[0], blocks[1]] if how == "shared" else blocks)
        self.head = nn.Linear(6, LABELS)

    def forward(self, x):
        sizes = []
        for block in self.blocks:
            x = block(x)
            if self.how == "random":
                x = x * (1 + 0 * torch.rand(()))
            sizes.append(x.abs().mean(1))
            if self.how == "in place":
                x.tanh_()
            else:
                x = torch.tanh(x)
        return self.head(x)


@pytest.mark.parametrize(
    "how, off",
    [("plain", ""), ("shared", ""), ("random", "draws random numbers"), ("in place", "is overwritten later")],
)
def test_models_that_are_no_plain_chain(how, off, kept):
    model = Chain(how).double()
    torch.manual_seed(1)
    batch = torch.randn(8, 6).double(), torch.randint(LABELS, (8,))
    found = measure(model, split(batch, 3), own_loss, ["ablation"], options=MODULES)
    assert off in kept[0].off and bool(off) == bool(kept[0].off)
    assert_as_by_hand(model, batch, found)


class Balanced(nn.Module):
    """The sum of what is computed inside the blocks is an output: it is missing where a block does not run."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(6, 6)) for _ in range(3)])
        self.head = nn.Linear(6, LABELS)

    def forward(self, x):
        inside, handles = [], []
        for block in self.blocks:
            handles.append(block[0].register_forward_hook(lambda m, a, y: inside.append(y.square().mean(1))))
        for block in self.blocks:
            x = torch.tanh(block(x))
        for handle in handles:
            handle.remove()
        return self.head(x) + sum(inside, torch.zeros(1))[:, None] * torch.arange(LABELS)


def test_outputs_that_blocks_give_on_the_side(kept):
    model = Balanced().double()
    batch = torch.randn(8, 6).double(), torch.randint(LABELS, (8,))
    found = measure(model, split(batch, 3), own_loss, ["ablation"], options=MODULES)
    assert "gives other outputs" in kept[0].off
    # By hand zero weights are seen by the model's own hook; here the hook sees the output before it is taken out.
    whole = mean_metric(model, examples(batch), minus_loss)
    assert found.provenance["ablation"]["of_the_model"] == pytest.approx(whole, rel=1e-9)
    score = float(found.by("module")["head"])
    assert score == pytest.approx(whole - mean_metric(without_module(model, "head"), examples(batch), minus_loss))


def test_a_layer_that_is_used_again_and_again(kept):
    """ALBERT runs one block several times: it is computed each time."""
    sizes = {key: value for key, value in CLASSIFIER.items() if key != "initializer_range"}
    config = AlbertConfig(**sizes, embedding_size=8, initializer_range=0.2)
    model = made(AlbertForSequenceClassification, config)
    batch = data_for(model)
    found = measure(model, split(batch, 3), own_loss, ["ablation"], options=MODULES)
    assert_as_by_hand(model, batch, found)


def test_encoder_and_decoder(kept):
    config = T5Config(
        vocab_size=20, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0, pad_token_id=0
    )
    model = made(T5ForConditionalGeneration, config)
    batch = text_batch((3, 7, 5, 2))
    batch["labels"] = torch.where(batch["attention_mask"].bool(), batch["input_ids"], -100)
    batch["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels=batch["labels"])

    def loss(outputs, batch):
        per_token = nn.functional.cross_entropy(outputs.logits.mT, batch["labels"], reduction="none")
        return per_token.sum(1) / (batch["labels"] != -100).sum(1)

    found = measure(model, split(batch, 2), loss, ["ablation"], options=MODULES)
    assert not kept[0].off and any("decoder.block" in name for name in kept[0].blocks)
    whole = mean_metric(model, examples(batch), lambda outputs, one: -loss(outputs, one)[0])
    for name in ("encoder.block.1.layer.0.SelfAttention.q", "decoder.block.1.layer.1.EncDecAttention.v", "lm_head"):
        if name in found.by("module"):
            without = without_module(model, name)
            wanted = whole - mean_metric(without, examples(batch), lambda outputs, one: -loss(outputs, one)[0])
            assert float(found.by("module")[name]) == pytest.approx(wanted, rel=1e-8, abs=1e-11)


def test_which_pieces_there_are():
    assert KeptOutputs(MODELS["llama"](), []).blocks == ["model.layers.0", "model.layers.1"]
    kept = KeptOutputs(MODELS["bert"](), [])
    assert kept.blocks == ["bert.encoder.layer.0", "bert.encoder.layer.1"]
    assert set(kept.pieces) - set(kept.blocks) == {"bert.embeddings", "bert.pooler", "dropout", "classifier"}


def test_a_cache_of_keys_and_values_changes_nothing(kept):
    model = tiny_gpt2(use_cache=True)
    batch = text_batch((3, 7, 5, 2))
    batch["labels"] = torch.where(batch["attention_mask"].bool(), batch["input_ids"], -100)
    found = measure(model, [batch], "causal_lm", ["ablation"], options=MODULES)
    assert not kept[0].off and len(found.by("module")) > 8
