"""How a sign probe goes: its steps, when it ends, how it goes on after an interruption, and what stops it."""

from __future__ import annotations

import signal
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from measured_models import MODELS, tiny_bert, tiny_gpt2
from relevance_cases import data_for, labels_of, measure, own_loss, split
from reltune.errors import AnalysisError, InputError
from reltune.relevance.probe.moving_weights import weights_that_move
from reltune.relevance.probe.sign_probe import SignProbe
from reltune.relevance.probe.stability import WatchedSample
from reltune.relevance.probe.steps import no_larger, share_of, steps_of
from reltune.relevance.scores import RelevanceScores

MINE = ["movement"]
RATE = 0.01
HOW = {"step_size": RATE, "relative": True, "move": "allowed", "training": False}


def probe(model, batches, loss=None, elements=True, resume=None, seed=42, **options) -> RelevanceScores:
    options = {"movement": {**HOW, "steps": 6, **options}}
    return measure(model, batches, loss, MINE, elements=elements, options=options, resume_directory=resume, seed=seed)


def assert_equal(found: RelevanceScores, wanted: RelevanceScores, votes_only: bool = False) -> None:
    for name, parts in wanted.parts["movement"].items():
        for part, value in parts.items():
            own = found.parts["movement"][name][part]
            if name.endswith(("key", "k_proj", "c_attn")) and (part in ("bias", "element_bias")):
                continue  # rounding errors
            assert torch.equal(own.floor(), value.floor()) if votes_only else torch.equal(own, value), (name, part)


# -- which examples a step takes --------------------------------------------------------------------------------------


@given(
    st.lists(st.integers(0, 7), max_size=6),
    st.one_of(st.none(), st.integers(1, 9)),
    st.integers(1, 4),
    st.integers(1, 5),
)
@example([3, 4, 2], 9, 3, 2)  # shares that begin and end within a batch behind another one
def test_every_example_is_taken_once_in_order(sizes, examples, processes, most):
    steps = steps_of(sizes, examples)
    everything = [(batch, row) for batch, size in enumerate(sizes) for row in range(size)]

    def rows(pieces):
        return [(piece.batch, row) for piece in pieces for row in range(piece.start, piece.stop)]

    assert [row for pieces in steps for row in rows(pieces)] == everything
    if examples is not None:
        assert all(len(rows(pieces)) == examples for pieces in steps[:-1])
    for pieces in steps:
        shares = [share_of(pieces, rank, processes) for rank in range(processes)]
        assert [row for share in shares for row in rows(share)] == rows(pieces)
        assert max(len(rows(share)) for share in shares) - min(len(rows(share)) for share in shares) <= 1
        assert rows(no_larger(pieces, most)) == rows(pieces) and rows(no_larger(pieces, None)) == rows(pieces)
        assert all(0 < piece.examples <= most for piece in no_larger(pieces, most))


@pytest.mark.parametrize("name", ["bert", "vit", "sequential"])
def test_gradients_of_several_batches_are_added_up_before_their_sign_is_taken(name):
    model = MODELS[name]()
    batch = data_for(model, lengths=(5,) * 12)
    whole = probe(model, split(batch, 6))
    assert_equal(probe(model, split(batch, 2), batch_size=6), whole, votes_only=True)
    assert_equal(probe(model, split(batch, 12), batch_size=6), whole, votes_only=True)
    other = probe(model, split(batch, 2))
    with pytest.raises(AssertionError):
        assert_equal(other, whole, votes_only=True)


def test_padding_changes_nothing():
    model = MODELS["bert"]()
    batches = split(data_for(model), 3)
    wider = [{key: F.pad(v, (0, 5)) if v.ndim == 2 else v for key, v in batch.items()} for batch in batches]
    assert_equal(probe(model, wider), probe(model, batches), votes_only=True)


# -- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_step_that_does_not_fit_is_taken_in_halves(where):
    model = MODELS["bert"]()
    batches = split(data_for(model, lengths=(5,) * 8), 4)
    wanted = probe(model, batches)
    tried = []

    def too_small(x):
        tried.append(len(x))
        if len(x) > 2 and len(tried) > 3:  # not at once: votes have been cast by then
            raise torch.OutOfMemoryError("no memory")

    def hook(module, args, output):
        if where == "forward":
            too_small(output)
        else:
            output.register_hook(too_small)

    handle = model.bert.encoder.layer[0].output.dense.register_forward_hook(hook)
    with pytest.warns(UserWarning, match="out of memory with 4 examples; the probe starts anew with 2 at a time"):
        found = probe(model, batches)
    handle.remove()
    assert tried == [4] * 4 + [2] * 12
    assert_equal(found, wanted, votes_only=True)


def test_one_example_that_does_not_fit_is_an_error():
    model = MODELS["sequential"]()

    def too_small(module, args):
        raise torch.OutOfMemoryError("no memory at all")

    model[0].register_forward_pre_hook(too_small)
    with pytest.warns(UserWarning), pytest.raises(torch.OutOfMemoryError, match="no memory at all"):
        probe(model, split(data_for(model), 2))


@pytest.mark.parametrize("make", [tiny_bert, tiny_gpt2])
@pytest.mark.parametrize("training", [False, True])
def test_gradient_checkpointing_takes_effect_and_changes_nothing(make, training):
    model = make()
    name = "bert" if make is tiny_bert else "gpt2"
    batch = data_for(MODELS["bert"]())
    batches = split(batch, 4)

    def loss(outputs, batch):
        return own_loss(outputs.logits[:, -1] if name == "gpt2" else outputs, batch)

    wanted = probe(model, batches, loss, steps=4, training=training)
    model.gradient_checkpointing_enable()
    block = model.bert.encoder.layer[0] if name == "bert" else model.transformer.h[0]
    inside = block.intermediate.dense if name == "bert" else block.mlp.c_fc
    runs, modes = [], set()
    inside.register_forward_hook(lambda module, args, output: runs.append(1) or modes.add(block.training))
    assert_equal(probe(model, batches, loss, steps=4, training=training), wanted)
    assert len(runs) == 8 and modes == {training}  # once forward, once again


# -- the options ------------------------------------------------------------------------------------------------------


def by_hand(model, batches, steps, direction):
    """Votes and gradients, with ``direction(name, gradients so far)`` voting."""
    from oracles.sign_probe import steps_by_rule

    own, rates = dict(model.named_parameters()), steps_by_rule(model, RATE)
    before = {name: p.detach().clone() for name, p in own.items()}
    votes = {name: torch.zeros_like(p) for name, p in before.items()}
    gradients = {name: [] for name in own}
    for step in range(steps):
        batch = batches[step % len(batches)]
        for (name, p), g in zip(
            own.items(), torch.autograd.grad(own_loss(model(batch[0]), batch).mean(), list(own.values())), strict=True
        ):
            gradients[name].append(g)
            votes[name] += direction(gradients[name]).sign()
            p.data = before[name] - rates[name] * votes[name]
    for name, p in own.items():
        p.data = before[name]
    return votes, gradients


def test_momentum_votes_with_the_sign_of_adams_step():
    model = MODELS["sequential"]().eval()
    batches = split(data_for(model), 2)
    found = probe(model, batches, update="momentum")

    def of_adam(gradients):
        """The first moment by torch's own optimizer."""
        p = nn.Parameter(torch.zeros_like(gradients[0]))
        optimizer = torch.optim.Adam([p], lr=1.0, betas=(0.9, 0.999))
        for gradient in gradients:
            before = p.detach().clone()
            p.grad = gradient.clone()
            optimizer.step()
        return before - p.detach()

    votes, _ = by_hand(model, batches, 6, of_adam)
    plain, _ = by_hand(model, batches, 6, lambda gradients: gradients[-1])
    assert any(not torch.equal(votes[name], plain[name]) for name in votes)
    for name in ("0", "3"):
        assert torch.equal(found.parts["movement"][name]["element"].floor().double(), votes[f"{name}.weight"].abs())


def test_equal_votes_in_the_order_of_the_summed_gradient():
    model = MODELS["sequential"]().eval()
    batches = split(data_for(model), 2)
    votes, gradients = by_hand(model, batches, 6, lambda gradients: gradients[-1])
    for ties, of in (("sum", lambda g: sum(g)), ("last", lambda g: g[-1])):
        found = probe(model, batches, ties=ties).parts["movement"]["0"]["element"].flatten()
        size = of(gradients["0.weight"]).abs().flatten()
        for level in votes["0.weight"].abs().unique():
            own = (votes["0.weight"].abs() == level).flatten()
            order = found[own].argsort()
            assert (size[own][order].diff() >= -1e-3 * size[own][order][1:]).all()


def test_training_mode_draws_by_the_seed_and_leaves_no_trace():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 24), nn.BatchNorm1d(24), nn.Dropout(0.5), nn.Linear(24, 3)).double()
    batches = split(data_for(MODELS["sequential"]()), 3)[:2]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    found = probe(model, batches, training=True)
    assert_equal(probe(model, batches, training=True), found)
    with pytest.raises(AssertionError):
        assert_equal(probe(model, batches, training=True, seed=7), found)
    with pytest.raises(AssertionError):
        assert_equal(probe(model, batches), found)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())


# -- when it ends -----------------------------------------------------------------------------------------------------


def sparse_task(count=64):
    """Of 40 inputs, two say everything; their weights get all the votes."""
    torch.manual_seed(0)
    inputs = torch.randn(count, 40).double()
    return inputs, (inputs[:, 3] + inputs[:, 17] > 0).long()


def test_a_probe_ends_when_the_choice_has_settled():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    batches = split(sparse_task(), 16)
    found = probe(model, batches, steps="auto")
    facts = found.provenance["movement"]
    assert facts["stable"] and facts["steps_taken"] % 10 == 1 and 21 <= facts["steps_taken"] < 120
    assert facts["loss_at_last"] < facts["loss_at_first"]
    assert_equal(probe(model, batches, steps=facts["steps_taken"]), found)  # the last step is one like the others
    with (
        mock.patch.object(WatchedSample, "check", return_value=0.5),
        pytest.warns(RuntimeWarning, match="not stable after 120 steps"),
    ):
        facts = probe(model, batches, steps="auto").provenance["movement"]
    assert not facts["stable"] and facts["steps_taken"] == 120


def test_a_probe_that_starts_anew_ends_by_its_own_choice():
    """Memory runs out in the closing step: the new start must not end there whether the choice has settled or not."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    agreements, sizes = iter([0.0, 1.0, *[0.0] * 11]), []

    def loss(outputs, batch):
        sizes.append(len(outputs))
        if len(sizes) == 21:
            raise MemoryError
        return own_loss(outputs, batch)

    with (
        mock.patch.object(WatchedSample, "check", side_effect=agreements),
        pytest.warns(RuntimeWarning, match="not stable after 120 steps"),
        pytest.warns(UserWarning, match="starts anew with 8"),
    ):
        facts = probe(model, split(sparse_task(), 16), loss, steps="auto").provenance["movement"]
    assert not facts["stable"] and facts["steps_taken"] == 120


def test_the_choice_is_of_the_most_votes_and_then_of_the_largest_summed_gradient():
    """Of 400 weights four are chosen: one by its votes against all, three of those with two votes either way."""
    (weight,) = weights_that_move(nn.Linear(20, 20, bias=False), None, RATE, torch.int8)
    sample = WatchedSample([weight], seed=0)
    votes, first, second = weight.votes.view(-1), torch.zeros(400), torch.zeros(400)
    votes[7] = -3
    for place, vote, a, b in ((50, 2, 1, -9), (60, -2, 5, 0), (70, 2, 1, 1), (80, 2, 0, 6), (90, -2, 9, -9)):
        votes[place], first[place], second[place] = vote, a, b
    sample.note(weight, first.view(20, 20))
    sample.note(weight, second.view(20, 20))
    assert sample.check() == 0 and sample.chosen.tolist() == [7, 50, 60, 80]  # sums of -8, 5 and 6
    votes[90] = 3
    assert sample.check() == 0.75 and sample.chosen.tolist() == [7, 50, 80, 90]


def test_many_steps_have_larger_votes():
    model = nn.Linear(3, 2).double()
    batch = torch.ones(4, 3).double(), torch.zeros(4).long()
    found = probe(model, [batch], steps=128, step_size=1e-4)
    assert (found.parts["movement"][""]["element"].floor() == 128).all()


# -- interruptions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"update": "momentum", "ties": "sum", "training": True},
        {"steps": "auto", "agreement": 0.2},
        {"steps": "auto", "agreement": 1.0},
    ],
    ids=str,
)
def test_an_interrupted_probe_goes_on_to_the_bit(options, tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 8), nn.Dropout(0.1), nn.Tanh(), nn.Linear(8, 2)).double()
    batches = split(sparse_task(), 16)
    options = {"steps": 9, **options}
    wanted = probe(model, batches, **options)
    steps = wanted.provenance["movement"]["steps_taken"]
    stops = steps - 1 if steps > 11 else 11  # of an automatic end: when the last check is done
    taken = []

    def interrupting(outputs, batch):
        taken.append(1)
        if len(taken) in (4, stops):
            signal.raise_signal(signal.SIGINT)  # Ctrl-C, in the middle of a step
        return F.cross_entropy(outputs, labels_of(batch), reduction="none")

    interruptions = 0
    while True:
        try:
            found = probe(model, batches, interrupting, resume=tmp_path, **options)
            break
        except KeyboardInterrupt:
            interruptions += 1
            assert (tmp_path / "movement.partial.safetensors").is_file()
    assert interruptions == (2 if steps > 11 else 1) and len(taken) == steps
    assert_equal(found, wanted)
    assert {**found.provenance["movement"]} == {**wanted.provenance["movement"]}
    assert not list(tmp_path.iterdir())


def test_an_interrupted_probe_without_sums_does_not_go_on_with_them(tmp_path):
    model = MODELS["sequential"]()
    batches = split(data_for(model), 3)

    def interrupting(outputs, batch):
        signal.raise_signal(signal.SIGINT)
        return own_loss(outputs, batch)

    with pytest.raises(KeyboardInterrupt):
        probe(model, batches, interrupting, elements=False, resume=tmp_path, ties="sum")
    with pytest.raises(InputError, match="holds an interrupted probe without single weights"):
        probe(model, batches, own_loss, resume=tmp_path, ties="sum")
    probe(model, batches, own_loss, elements=False, resume=tmp_path, ties="sum")


def test_an_interrupted_probe_goes_on_with_pieces_that_fit_in_memory(tmp_path):
    model, sizes = MODELS["sequential"](), []

    def loss(outputs, batch):
        sizes.append(len(outputs))
        if len(outputs) > 3:
            raise MemoryError
        if len(sizes) == 5:
            signal.raise_signal(signal.SIGINT)
        return own_loss(outputs, batch)

    batches = split(data_for(model), 6)[:1]
    with pytest.raises(KeyboardInterrupt), pytest.warns(UserWarning, match="out of memory with 6 examples"):
        probe(model, batches, loss, resume=tmp_path)
    probe(model, batches, loss, resume=tmp_path)
    assert sizes == [6, *[3] * 12]  # two pieces in each of six steps, none of them twice


def test_what_an_interrupted_probe_does_not_go_on_with(tmp_path):
    model = MODELS["sequential"]()
    batches = split(data_for(model), 3)
    taken = []

    def interrupting(outputs, batch):
        taken.append(1)
        if len(taken) == 2:
            signal.raise_signal(signal.SIGTERM)
        return own_loss(outputs, batch)

    stopped = []
    before = signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
    try:
        probe(model, batches, interrupting, resume=tmp_path)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert stopped  # the user's own handler heard of it once the step was whole

    taken.clear()
    with pytest.raises(KeyboardInterrupt):
        probe(model, batches, lambda o, b: signal.raise_signal(signal.SIGINT) or own_loss(o, b), resume=tmp_path)
    with pytest.raises(InputError, match="the data is not what the interrupted analysis"):
        probe(model, batches[::-1], own_loss, resume=tmp_path)
    with pytest.raises(InputError, match="of another model, with other modules or with other options"):
        probe(model, batches, own_loss, resume=tmp_path, steps=7)
    other = MODELS["sequential"]()
    with torch.no_grad():
        other[0].weight[0, 0] += 1
    with pytest.raises(InputError, match="of another model, with other modules or with other options"):
        probe(other, batches, own_loss, resume=tmp_path)
    assert_equal(probe(model, batches, own_loss, resume=tmp_path), probe(model, batches, own_loss))


# -- what stops it ----------------------------------------------------------------------------------------------------


def test_a_loss_that_rises_is_a_step_too_large():
    model = MODELS["sequential"]()
    batches = split(data_for(model), 3)
    told = r"the probe diverges: the mean loss of 10 steps rose from \S+ to \S+; lower its step_size, which is {} \(--probe_step_size\)"
    with pytest.raises(InputError, match=told.format(r"0\.5")):
        probe(model, batches, steps=60, step_size=0.5)
    with pytest.raises(InputError, match=told.format("20")):
        probe(model, [data_for(model, (3,) * 12)], steps=60, step_size=20)  # the first ones are as bad as the last
    probe(model, batches, steps=60, step_size=1e-3)
    with pytest.raises(InputError, match=r"rose from -\S+ to"):  # a loss may be negative, as of a density
        probe(model, batches, lambda outputs, batch: own_loss(outputs, batch) - 3, steps=60, step_size=2)
    probe(model, batches, lambda outputs, batch: own_loss(outputs, batch) - 3, steps=60, step_size=1e-3)


@pytest.mark.parametrize(
    ("losses", "unmoved", "rises"),
    [
        ([1.0] * 9 + [100.0] * 10, 1.0, False),
        ([1.0] * 10 + [2.0] * 10, 1.0, False),
        ([1.0] * 10 + [2.1] * 10, 1.0, True),
        ([1.0] * 10 + [2.1] * 10, 1.1, False),  # these examples are harder
        ([0.01] + [100.0] * 19, 1.0, True),
        ([-2.0] * 10 + [-1.9] * 10, -2.0, False),
        ([-2.0] * 10 + [0.1] * 10, -2.0, True),
    ],
)
def test_ten_losses_are_compared_with_those_of_the_same_examples_where_nothing_moved(losses, unmoved, rises):
    probe = SignProbe.__new__(SignProbe)
    probe.losses, probe.unmoved, probe.step = losses, {}, len(losses) - 1
    probe.options = SimpleNamespace(diverged=2.0, step_size=0.5)
    with mock.patch.object(SignProbe, "_loss_unmoved", return_value=unmoved) as asked:
        if rises:
            with pytest.raises(InputError, match=rf"rose from {unmoved:g} to"):
                probe._check_losses()
        else:
            probe._check_losses()
    assert asked.call_args_list in ([], [mock.call(step) for step in range(len(losses) - 10, len(losses))])


def test_a_model_that_gets_few_examples_wrong_does_not_diverge():
    """The first batch has none of them, so that any later one has a hundred times its loss."""
    inputs = torch.randn(96, 4, generator=torch.Generator().manual_seed(0)).double()
    labels = (inputs[:, 0] > 0).long()
    labels[12::5] = 1 - labels[12::5]
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)).double()
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(4) * 40), model[0].bias.zero_()
        model[1].weight.zero_(), model[1].bias.zero_()
        model[1].weight[:, 0] = torch.tensor([-1.0, 1.0])
    seen = []

    def loss(outputs, batch):
        seen.append(model[0].weight.detach().clone())
        return own_loss(outputs, batch)

    found = probe(model, split((inputs, labels), 12), loss, steps=24, step_size=1e-4, relative=False)
    assert found.provenance["movement"]["steps_taken"] == 24
    base = [torch.equal(weight, model[0].weight) for weight in seen]
    assert base[0] and 10 <= sum(base) - 1 == len(seen) - 24  # each step's examples once more, where nothing moves


def test_weights_of_zero_move_by_the_median_step():
    model = nn.Sequential(*[nn.Linear(4, 4, bias=i == 4) for i in range(5)])
    for layer, size in zip(model, (1.0, 8.0, 2.0, 2.5, 0.0), strict=True):
        nn.init.constant_(layer.weight, size)
    nn.init.zeros_(model[4].bias)
    steps = [weight.step for weight in weights_that_move(model, None, RATE, torch.int8)]
    assert steps == pytest.approx([RATE * size for size in (1, 8, 2, 2.5, 2.5, 2.5)])
    nothing = [weight.step for weight in weights_that_move(model[4], None, RATE, torch.int8)]
    assert nothing == [RATE, RATE]  # where all are zero


def test_gradients_that_are_not_finite_are_named():
    model = MODELS["bert"]()
    batches = split(data_for(model), 3)
    name = "bert.encoder.layer.1.intermediate.dense"
    calls = []

    def infinite(module, args, output):
        calls.append(1)
        if len(calls) == 3:
            output.register_hook(lambda g: g * torch.inf)

    model.get_submodule(name).register_forward_hook(infinite)
    with pytest.raises(AnalysisError, match=rf"the gradient of {name}\.(weight|bias) is not finite in step 2"):
        probe(model, batches)


def test_a_weight_without_a_gradient_keeps_no_votes():
    """The second part is reached by some batches alone."""
    model = nn.ModuleDict({"a": nn.Linear(3, 2), "b": nn.Linear(3, 2), "never": nn.Linear(3, 2)}).double()

    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = model

        def forward(self, x):
            return self.parts["a"](x) + (self.parts["b"](x) if x.sum() > 0 else 0)

    batches = [(sign * torch.rand(4, 3).double(), torch.tensor([0, 1, 1, 1])) for sign in (1, -1, -1)]
    found = probe(Branches(), batches, steps=6).parts["movement"]
    assert found["parts.a"]["weight"] > 0 and not found["parts.never"]["element"].any()
    assert found["parts.b"]["element"].max() == 2 and (found["parts.b"]["element"] % 1 == 0).all()
