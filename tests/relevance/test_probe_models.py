"""The sign probe of models that read their weights in unusual ways, and of bases in half precision."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from measured_models import MODELS
from oracles.sign_probe import sign_probe, steps_by_rule
from relevance_cases import causal_of_one, data_for, lm_batch, measure, own_loss, split
from reltune.errors import AnalysisError, InputError
from reltune.relevance.probe.moving_weights import MovingWeight, Readings, moving, weights_that_move

MINE = ["movement"]
RATE = 0.01
HOW = {"step_size": RATE, "relative": True, "move": "allowed", "training": False}


def mean_loss(model, batch):
    inputs, labels = batch
    return F.cross_entropy(model(inputs), labels)


def vectors(count=8, features=6, classes=3):
    torch.manual_seed(0)
    return torch.randn(count, features).double(), torch.randint(classes, (count,))


class Tied(nn.Module):
    """An embedding whose weight is also the head's, twice over the same tokens."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(11, 5)
        self.middle = nn.Linear(5, 5)
        self.head = nn.Linear(5, 11, bias=False)
        self.head.weight = self.words.weight

    def forward(self, tokens):
        return self.head(torch.tanh(self.middle(self.words(tokens))).mean(1))


class Twice(nn.Module):
    """One module used three times, another whose weight only its parent reads, and a parameter of the model's own."""

    def __init__(self):
        super().__init__()
        self.shared = nn.Linear(6, 6)
        self.read_by_parent = nn.Linear(6, 3)
        self.scale = nn.Parameter(torch.ones(6) * 1.5)

    def forward(self, x):
        for _ in range(3):
            x = torch.tanh(self.shared(x) * self.scale)
        return F.linear(x, self.read_by_parent.weight, self.read_by_parent.bias)


class Slices(nn.Module):
    """Views of a weight, and an operation of its own that saves it."""

    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight):
            ctx.save_for_backward(x, weight)
            return x @ weight

        @staticmethod
        def backward(ctx, g):
            x, weight = ctx.saved_tensors
            return g @ weight.T, x.T @ g

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 6, 6))
        self.strided = nn.Parameter(torch.randn(3, 6).T)  # not contiguous

    def forward(self, x):
        for part in self.weight:
            x = torch.tanh(x @ part.T)
        x = self.Product.apply(x, self.weight[1, :, 1:5])
        return x @ self.strided[2:]


def made(kind):
    torch.manual_seed(0)
    return kind().double()


CASES = {
    "tied": (Tied, lambda: (torch.randint(11, (8, 4), generator=torch.Generator().manual_seed(0)), torch.arange(8))),
    "twice": (Twice, vectors),
    "slices": (Slices, vectors),
}


def votes_of(model, options, batches, loss=None):
    """The votes of all weights by name, from the probe itself, whatever has units and what has none."""
    found = {}
    from reltune.relevance.probe.sign_probe import SignProbe

    run = SignProbe.run

    def watched(self):
        result = run(self)
        found.update({weight.name: weight.votes for weight in self.weights})
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SignProbe, "run", watched)
        measure(model, batches, loss, MINE, options={"movement": {**HOW, **options}}, always_trained=())
    return found


@pytest.mark.parametrize("name", CASES)
def test_a_weight_votes_once_however_often_it_is_read(name):
    kind, batch = CASES[name]
    model, batches = made(kind), split(batch(), 3)
    if name == "slices":
        model.linear = nn.Linear(1, 1).double()  # for there must be something with units
    votes = votes_of(model, {"steps": 6, "move": "all"}, batches)
    rates = steps_by_rule(model, RATE)
    wanted, _ = sign_probe(model, batches, mean_loss, rates, 6)
    assert votes.keys() == wanted.keys()
    for key, own in wanted.items():
        assert torch.equal(votes[key].double(), own), key
        assert own.abs().max() >= 4 or key.startswith("linear"), key


def test_of_an_embedding_with_sparse_gradients():
    class Bag(nn.Module):
        def __init__(self, sparse=False):
            super().__init__()
            self.words, self.linear = nn.Embedding(11, 4, sparse=sparse), nn.Linear(4, 3)

        def forward(self, ids):
            return self.linear(self.words(ids).mean(1))

    batches = split(CASES["tied"][1](), 3)
    batches = [(ids, labels % 3) for ids, labels in batches]
    wanted = votes_of(made(Bag), {"steps": 6, "move": "all"}, batches)
    found = votes_of(made(lambda: Bag(sparse=True)), {"steps": 6, "move": "all"}, batches)
    assert all(torch.equal(found[name], votes) for name, votes in wanted.items()) and wanted["words.weight"].any()


def test_of_a_tied_weight_in_a_language_model():
    """GPT-2 whose head is its embedding; both are left out of the units, and move all the same where all may."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=20, n_embd=16, n_layer=1, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config).double()
    batches = split(lm_batch(), 5)
    votes = votes_of(model, {"steps": 4, "move": "all"}, batches, "causal_lm")

    def loss_of(model, batch):
        rows = [
            {key: value[i : i + 1, : int(m.sum())] for key, value in batch.items()}
            for i, m in enumerate(batch["attention_mask"])
        ]
        outputs = [model(input_ids=row["input_ids"]) for row in rows]
        return torch.stack([causal_of_one(out, row) for out, row in zip(outputs, rows, strict=True)]).mean()

    wanted, _ = sign_probe(model.eval(), batches, loss_of, steps_by_rule(model, RATE), 4)
    for key, own in wanted.items():
        if not key.endswith("c_attn.bias"):  # of which the keys' part is noise
            assert torch.equal(votes[key].double(), own), key


class ReadsItself(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight, self.bias)


def test_no_moved_weight_is_kept_for_the_backward_pass():
    """While the graph lives, none of the tensors that were read is alive; they are computed once more."""
    model = nn.Sequential(*[ReadsItself(7, 7) for _ in range(5)])
    weights = weights_that_move(model, None, RATE, torch.int8)
    readings, arrived = Readings(), []
    with moving(weights, arrived.append, readings):
        kept = model(torch.randn(2, 7)).sum()
        assert len(readings.standing) == 4  # as autograd keeps them by itself: all that lead on to another weight
        del kept
        assert not readings.standing
        with readings.not_kept():
            loss = model(torch.randn(2, 7)).sum()
        assert not readings.standing
        loss.backward()
    assert {weight.name for weight in arrived} == {name for name, _ in model.named_parameters()}
    order = [weight.name for weight in arrived if weight.name.endswith("weight")]
    assert order == [f"{number}.weight" for number in reversed(range(5))]


@pytest.mark.parametrize("checkpointed", [False, True])
def test_of_a_linear_map_neither_the_moved_weight_nor_its_gradient_waits_for_the_other(checkpointed, monkeypatch):
    model = nn.Sequential(*[nn.Linear(7, 7) for _ in range(5)])
    moved, beside = [], []
    now = MovingWeight.now

    def noted(weight):
        found = now(weight)
        if found.ndim == 2:
            moved.append(weakref.ref(found))
        return found

    class Watched(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            found = operation(*args, **(kwargs or {}))
            if operation is torch.ops.aten.mm.default and found.shape == (7, 7):
                beside.append(sum(of() is not None for of in moved))
            return found

    monkeypatch.setattr(MovingWeight, "now", noted)
    weights, readings, arrived = weights_that_move(model, None, RATE, torch.int8), Readings(), []
    x = torch.randn(2, 7, requires_grad=True)
    with moving(weights, arrived.append, readings), Watched():
        with readings.not_kept():
            loss = (checkpoint(model, x, use_reentrant=False) if checkpointed else model(x)).sum()
        assert len(readings.order) == 10
        loss.backward()
    assert beside == [0] * 5 and len(arrived) == 10


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_steps_below_the_resolution_of_the_weights_are_not_lost(dtype):
    """The moved weight is W₀ − η V rounded once. Step by step, bfloat16 would lose each step of η."""
    model = MODELS["bert"]().to(dtype).eval()
    batches = split(data_for(model), 4)
    rate = 3e-4
    found = measure(
        model, batches, own_loss, MINE, elements=True, options={"movement": {**HOW, "steps": 12, "step_size": rate}}
    )

    own = dict(model.named_parameters())
    before = {name: p.detach().clone() for name, p in own.items()}
    votes = {name: torch.zeros(p.shape) for name, p in own.items()}
    steps = steps_by_rule(model, rate)
    moved = 0.0
    for step in range(12):
        batch = batches[step % len(batches)]
        losses = own_loss(model(**{k: v for k, v in batch.items() if k != "labels"}), batch)
        gradients = torch.autograd.grad(losses.sum() / len(losses), list(own.values()))
        with torch.no_grad():
            for (name, p), gradient in zip(own.items(), gradients, strict=True):
                votes[name] += gradient.sign().float()
                p.copy_(before[name].float() - steps[name] * votes[name])
    name = "bert.encoder.layer.0.output.dense"
    single = found.parts["movement"][name]["element"].floor()
    # as float32 adds up in another order here and there, a few of the smallest gradients have other signs
    assert (single != votes[f"{name}.weight"].abs()).float().mean() < (1e-3 if dtype == torch.float32 else 0.05)
    moved = (own[f"{name}.weight"].detach().float() - before[f"{name}.weight"].float()).abs().mean()
    assert moved > 0.5 * steps[f"{name}.weight"] * votes[f"{name}.weight"].abs().mean()


def test_a_step_is_scaled_to_the_weights():
    model = nn.ModuleDict({"linear": nn.Linear(40, 30), "zero": nn.Linear(40, 30), "norm": nn.LayerNorm(40)})
    with torch.no_grad():
        model["linear"].weight.mul_(7)
        model["zero"].weight.zero_()
    steps = {weight.name: weight.step for weight in weights_that_move(model, None, 0.01, torch.int8)}
    size = float(model["linear"].weight.detach().square().mean().sqrt())
    assert steps["linear.weight"] == pytest.approx(0.01 * size)
    assert steps["linear.bias"] == pytest.approx(0.01 * size)  # its own is nothing to go by
    assert steps["norm.weight"] == steps["norm.bias"] == pytest.approx(0.01)
    assert steps["zero.weight"] == pytest.approx(steps["zero.bias"]) and steps["zero.weight"] > 0


def test_a_base_that_is_not_finite_is_named():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    with torch.no_grad():
        model[1].weight[0, 0] = torch.inf
    with pytest.raises(AnalysisError, match=r"1\.weight holds numbers that are not finite"):
        measure(model, [(torch.randn(2, 4), torch.tensor([0, 1]))], None, MINE)


def test_a_loss_that_no_weight_may_change():
    model = MODELS["bert"]()
    with pytest.raises(InputError, match="does not depend on any weight that may move"):
        measure(model, [data_for(model)], lambda outputs, batch: outputs.logits.detach()[:, 0], MINE)
