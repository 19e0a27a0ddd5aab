"""Relevance against plain autograd, one example at a time, and against the formulas of the criteria."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from measured_models import MODELS, tiny_bert, tiny_sequential
from oracles.per_example_gradients import gradient_sums
from relevance_cases import (
    assert_parts_equal,
    by_module,
    cross_entropy_of_one,
    data_for,
    measure,
    parts_by_formula,
    split,
    text_batch,
)
from reltune.ops import squared_gradient

BOTH = ["fisher", "gradient"]


def wanted_parts(model, batches, names, loss_of=cross_entropy_of_one):
    """Fisher and mean-gradient relevance of the named modules, from the oracle."""
    squares, sums, count = gradient_sums(model, batches, loss_of)
    fisher = {name: total / count for name, total in squares.items()}
    gradient = {name: (total / count).abs() for name, total in sums.items()}
    return {
        "fisher": parts_by_formula(by_module(fisher, names)),
        "gradient": parts_by_formula(by_module(gradient, names)),
    }


def assert_agrees(model, batches, loss_fn=None, loss_of=cross_entropy_of_one, relative=1e-9, **options):
    found = measure(model, batches, loss_fn, BOTH, **options)
    wanted = wanted_parts(model, batches, [info.name for info in found.inventory.modules], loss_of)
    for criterion in BOTH:
        assert_parts_equal(found.parts[criterion], wanted[criterion], relative)
    return found


@pytest.fixture(scope="module", params=MODELS)
def case(request):
    """A model, a batch of unequal lengths, and the oracle's relevance of every layer with units in it."""
    model = MODELS[request.param]()
    batch = data_for(model)
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Embedding | nn.Conv2d) or "Norm" in type(module).__name__
    ]
    return model, batch, wanted_parts(model, [batch], names)


@pytest.mark.parametrize("size", [1, 3, 7])
@pytest.mark.parametrize("gram", [True, False])
def test_every_unit_agrees_with_the_oracle(case, size, gram, monkeypatch):
    model, batch, wanted = case
    monkeypatch.setattr(squared_gradient, "gram_is_cheaper", lambda *_: gram)
    found = measure(model, split(batch, size, order=[4, 2, 6, 0, 5, 1, 3]), None, BOTH)
    assert found.provenance["examples"] == 7
    for criterion in BOTH:
        assert_parts_equal(found.parts[criterion], wanted[criterion])


def test_the_branch_is_chosen_by_length(monkeypatch):
    taken = []
    rule = squared_gradient.gram_is_cheaper
    monkeypatch.setattr(squared_gradient, "gram_is_cheaper", lambda *shape: taken.append(rule(*shape)) or taken[-1])
    assert_agrees(tiny_bert(), [text_batch([2, 3]), text_batch([20, 17])], always_trained=["classifier"])
    assert set(taken) == {True, False}


def test_blocks_of_examples_add_up(monkeypatch):
    monkeypatch.setattr(squared_gradient, "BLOCK_NUMBERS", 700)  # one to three examples a block
    assert_agrees(tiny_bert(), [data_for(tiny_bert())])


def test_magnitude_is_the_sum_of_squared_weights(case):
    model, _, wanted = case
    found = measure(model, criteria=["magnitude"])
    squares = {name: p.detach().square() for name, p in model.named_parameters()}
    assert_parts_equal(found.parts["magnitude"], parts_by_formula(by_module(squares, list(wanted["fisher"]))))


def test_depth_counts_from_the_input():
    found = measure(tiny_bert(), criteria=["depth"], always_trained=["classifier"])
    # Before the layers stand the three embeddings and their norm: places 1 to 4.
    parts = found.parts["depth"]
    assert parts["bert.embeddings.LayerNorm"]["norm"] == 4 * (16 + 16)
    for layer, place in (("bert.encoder.layer.0", 5), ("bert.encoder.layer.1", 6)):
        module = parts[f"{layer}.intermediate.dense"]
        assert module["column"].tolist() == [place * 40.0] * 16
        assert module["row"].tolist() == [place * 16.0] * 40
        assert (module["weight"], module["bias"]) == (place * 640, place * 40)
        assert parts[f"{layer}.output.LayerNorm"]["norm"] == place * 32


def test_random_depends_on_seed_and_name_alone():
    model = tiny_bert()
    everything = measure(model, criteria=["random"], seed=1).parts["random"]
    some = measure(tiny_bert(hidden_act="relu"), criteria=["random"], seed=1, target_modules=["query"])
    other = measure(model, criteria=["random"], seed=2).parts["random"]
    assert set(some.parts["random"]) == {f"bert.encoder.layer.{i}.attention.self.query" for i in (0, 1)}
    for name, parts in some.parts["random"].items():
        for part, values in parts.items():
            assert torch.equal(values, everything[name][part])
            assert not torch.equal(values, other[name][part])
    first, second = (everything[f"bert.encoder.layer.{i}.output.dense"] for i in (0, 1))
    assert not torch.equal(first["column"], second["column"])
    # Uniform per weight: between 0 and 1 for each of a unit's weights, and spread over that range.
    per_weight = torch.cat([parts["column"] / len(parts["row"]) for parts in everything.values() if "row" in parts])
    assert 0 <= per_weight.min() < 0.1 and 0.9 < per_weight.max() <= 1
    assert abs(per_weight.mean() - 0.5) < 0.1


def test_several_criteria_in_one_pass_are_those_of_one_pass_each():
    model, batches = tiny_bert(), split(data_for(tiny_bert()), 3)
    together = measure(model, batches, None, [*BOTH, "magnitude", "random", "depth"], seed=3)
    assert together.criteria == [*BOTH, "magnitude", "random", "depth"]
    for criterion in together.criteria:
        alone = measure(model, batches, None, criterion, seed=3)
        assert_parts_equal(together.parts[criterion], alone.parts[criterion], relative=0)


def test_examples_are_not_averaged_before_squaring():
    """Two examples with opposite gradients: Fisher sees them, the mean gradient does not."""
    model = nn.Sequential(nn.Linear(2, 1, bias=False)).double()
    inputs = torch.tensor([[1.0, 2.0], [-1.0, -2.0]], dtype=torch.float64)
    found = measure(model, [(inputs, torch.zeros(2))], lambda outputs, batch: outputs[:, 0], BOTH)
    assert found.parts["fisher"]["0"]["column"].tolist() == [1.0, 4.0]
    assert found.parts["gradient"]["0"]["column"].tolist() == [0.0, 0.0]


class Looped(nn.Module):
    """One map and one norm used several times in a pass, a map that the loss does not reach, and one never called."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(6, 6)
        self.norm = nn.LayerNorm(6)
        self.outer = nn.Linear(6, 3)
        self.unused = nn.Linear(6, 4)
        self.uncalled = nn.Linear(6, 4)

    def forward(self, x):
        h = self.norm(torch.tanh(self.inner(x)))
        h = self.norm(h + self.inner(h[:, :1]))  # another number of positions
        self.unused(h)
        self.inner(x)  # reached by no loss
        return self.outer(h.mean(1))


def looped_batch(examples=5):
    torch.manual_seed(0)
    return torch.randn(examples, 4, 6, dtype=torch.float64), torch.randint(3, (examples,))


def test_a_module_used_several_times_has_one_gradient():
    torch.manual_seed(0)
    found = assert_agrees(Looped().double(), [looped_batch()])
    assert found.parts["fisher"]["inner"]["weight"] > 0
    for name in ("unused", "uncalled"):
        assert all(not part.any() for part in found.parts["fisher"][name].values())


def test_repeated_use_across_batches_and_losses_that_run_the_model_again():
    model = tiny_sequential()
    batches = split(data_for(model), 3)

    def two_passes(outputs, batch):
        return F.cross_entropy(outputs + model(-batch[0]), batch[1], reduction="none")

    assert_agrees(model, batches, two_passes, lambda outputs, batch: two_passes(outputs, batch)[0])


class InPlace(nn.Module):
    """In-place operations on outputs of measured maps: whole, on a slice, through a view, and by a residual."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.norm = nn.LayerNorm(6)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        h = self.relu(self.a(x))
        h = self.norm(h)
        h += x
        g = self.b(h)
        g[..., 0].mul_(3)
        g.view(-1).add_(0.5)
        g += 1
        return self.c(g).mean(1)


def test_in_place_operations_on_outputs():
    torch.manual_seed(0)
    model = InPlace().double()
    assert_agrees(model, [looped_batch()])
    # Also when the measured map is the first of the graph, and when it is not measured itself.
    for names in (["a"], ["norm"], ["b"], ["b", "c"]):
        assert_agrees(model, [looped_batch()], target_modules=names)


@pytest.mark.parametrize("inplace", [True, False])
def test_dropout_is_off(inplace):
    model = tiny_sequential()
    model.insert(2, nn.Dropout(0.5, inplace=inplace))
    model.train()
    assert_agrees(model, [data_for(model)])


def test_hooks_of_others_change_no_gradient_of_the_map():
    model = tiny_sequential()
    model[0].register_forward_hook(lambda module, args, output: 2 * output)
    model[3].register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    assert_agrees(model, [data_for(model)])


def test_inputs_by_keyword_and_batches_as_lists():
    class Keyword(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(6, 3)

        def forward(self, x):
            return self.linear(input=x)

    torch.manual_seed(0)
    model = Keyword().double()
    x, labels = looped_batch()
    by_pair = assert_agrees(model, [(x[:, 0], labels)])
    as_list = measure(model, [[x[:, 0], labels]], None, BOTH)
    assert_parts_equal(as_list.parts["fisher"], by_pair.parts["fisher"], relative=0)


@pytest.mark.parametrize(
    "module",
    [
        nn.LayerNorm(6, bias=False),
        nn.LayerNorm(6),
        nn.RMSNorm(6),
        LlamaRMSNorm(6),
        GemmaRMSNorm(6),
    ],
    ids=lambda module: f"{type(module).__name__}-{len(list(module.parameters()))}",
)
@pytest.mark.parametrize("shape", [(5, 6), (5, 4, 6), (5, 2, 4, 6)])
def test_norms_of_every_make_and_rank(module, shape):
    """GemmaRMSNorm multiplies by 1 + gain and computes in float32, hence its wider tolerance."""
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    model = nn.Sequential(copy.deepcopy(module), nn.Linear(6, 3)).double()
    relative = 1e-6 if isinstance(module, GemmaRMSNorm) else 1e-9

    def mean_loss(outputs, batch):
        logits = outputs.reshape(len(outputs), -1, 3).mean(1)
        return F.cross_entropy(logits, batch[1], reduction="none")

    batch = torch.randn(shape, dtype=torch.float64), torch.randint(3, (5,))
    assert_agrees(model, [batch], mean_loss, lambda o, b: mean_loss(o, b)[0], relative)


@pytest.mark.parametrize(
    ("loss", "labels"),
    [
        (nn.CrossEntropyLoss(), None),
        (nn.CrossEntropyLoss(label_smoothing=0.2, reduction="sum"), None),
        (nn.CrossEntropyLoss(), torch.rand(7, 3, dtype=torch.float64)),
        (nn.BCEWithLogitsLoss(), torch.rand(7, 3, dtype=torch.float64)),
        (nn.MSELoss(), torch.rand(7, 3, dtype=torch.float64)),
    ],
)
def test_torch_losses_give_one_loss_per_example(loss, labels):
    model = tiny_sequential()
    inputs, classes = data_for(model)
    reduction = loss.reduction
    assert_agrees(
        model,
        split((inputs, classes if labels is None else labels), 3),
        loss,
        lambda outputs, example: loss(outputs, example[1]),
    )
    assert loss.reduction == reduction


class Tagger(nn.Module):
    """A class for every position: logits (B, classes, T)."""

    def __init__(self):
        super().__init__()
        self.embed, self.linear = nn.Embedding(20, 6), nn.Linear(6, 3)

    def forward(self, input_ids, attention_mask):
        return self.linear(self.embed(input_ids)).mT


def test_ignored_labels_are_no_part_of_an_examples_mean():
    """A loss over positions is the mean over the labelled ones, however far the batch is padded."""
    torch.manual_seed(0)
    model = Tagger().double()
    batch = text_batch([3, 8, 5, 1])
    batch["labels"] = torch.where(batch["attention_mask"] == 1, batch["input_ids"] % 3, -100)
    loss = nn.CrossEntropyLoss()
    found = assert_agrees(model, [batch], loss, lambda outputs, example: loss(outputs, example["labels"]))
    assert_parts_equal(measure(model, split(batch, 1), loss).parts["fisher"], found.parts["fisher"], relative=1e-9)
