"""Correlation of being perturbed with the metric: planted units are found, intervals cover, interruption changes nothing."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from measured_models import MODELS
from relevance_cases import data_for, measure, own_loss, split
from reltune.errors import InputError
from reltune.relevance.artefact import PARTIAL
from reltune.relevance.criteria.correlation import EVERY, STRENGTHS, Options, correlations, drawn, reliability, stable
from reltune.relevance.scores import RelevanceScores

MINE = ["correlation"]
QUIET = pytest.mark.filterwarnings("ignore:the ranking of")


# -- the statistics, on a linear response whose true correlations are known -----------------------------------------


def linear_response(which: Tensor, drops: Tensor, noise: float, generator: torch.Generator) -> float:
    return 1 - float(which.to(drops) @ drops) + noise * float(torch.randn((), generator=generator))


def trials(seed: int, drops: Tensor, noise: float, options: Options) -> tuple[Tensor, Tensor, bool]:
    """The loop that measure() has, for a response that needs no model."""
    generator, values = torch.Generator().manual_seed(seed), []
    masks: list[Tensor] = []
    while len(values) < options.max_trials and not stable(lambda count: torch.stack(masks[:count]), values, options):
        masks.append(drawn(seed, "unit", len(masks), len(drops), options.share))
        values.append(linear_response(masks[-1], drops, noise, generator))
    settled = stable(lambda count: torch.stack(masks[:count]), values, options)
    return torch.stack(masks), torch.tensor(values, dtype=torch.float64), settled


@pytest.mark.parametrize("lumpy", [False, True])
def test_intervals_cover_at_their_level(lumpy):
    """Trials that end by the rule, each with other draws: the true correlation is inside in 95% of the intervals."""
    drops = torch.linspace(0, 1, 12, dtype=torch.float64).square()
    drops[3] = -0.3
    if lumpy:
        drops[-1] = 6  # one unit decides nearly everything
    noise, options = 0.2, Options(min_trials=40, max_trials=80)
    spread = options.share * (1 - options.share)
    true = math.sqrt(spread) * drops / math.sqrt(spread * float(drops.square().sum()) + noise**2)
    assert true.max() > (0.9 if lumpy else 0.5)
    inside = torch.zeros(len(drops))
    repetitions = 300
    for seed in range(repetitions):
        perturbed, metrics, _ = trials(seed, drops, noise, options)
        relevance, low, high = correlations(perturbed, metrics)
        assert (low <= relevance).all() and (relevance <= high).all()
        inside += (low <= true) & (true <= high)
    coverage = inside / repetitions
    # 3 standard errors of one unit's coverage: 3 √(0.95 · 0.05 / 300) = 0.038.
    assert abs(coverage.mean() - 0.95) < 0.015 and coverage.min() > 0.95 - 0.038, coverage


def test_is_minus_pearsons_correlation_with_fishers_interval():
    torch.manual_seed(0)
    perturbed = torch.rand(30, 4) < 0.4
    metrics = torch.randn(30, dtype=torch.float64) - 2 * perturbed[:, 1]
    relevance, low, high = correlations(perturbed, metrics)
    for unit in range(4):
        pair = torch.stack([perturbed[:, unit].double(), metrics])
        r = -float(torch.corrcoef(pair)[0, 1])
        assert float(relevance[unit]) == pytest.approx(r, abs=1e-12)
        for end, side in ((low, -1), (high, 1)):
            assert float(end[unit]) == pytest.approx(
                math.tanh(math.atanh(r) + side * 1.959963985 / math.sqrt(27)), abs=1e-9
            )
    assert relevance.argmax() == 1 and low[1] > 0


def test_what_says_nothing_has_the_widest_interval():
    perturbed = torch.tensor([[1, 0], [0, 0], [1, 0], [0, 0], [1, 0]], dtype=torch.bool)
    for metrics, known in ((torch.full((5,), 0.1), False), (torch.arange(5.0), True)):
        relevance, low, high = correlations(perturbed, metrics.double())
        assert relevance[1] == 0 and low[1] == -1 and high[1] == 1  # never perturbed
        assert (low[0] > -1) == known and not relevance.isnan().any()
    exact = torch.where(perturbed[:, 0], 0.0, 1.0).double()
    relevance, low, high = correlations(perturbed, exact)
    for value in (relevance[0], low[0], high[0]):
        assert float(value) == pytest.approx(1, abs=1e-6)  # atanh makes much of a last digit


def test_draws_depend_on_seed_purpose_and_number_alone():
    assert torch.equal(drawn(1, "layer", 5, 9, 0.5), drawn(1, "layer", 5, 9, 0.5))
    some = [drawn(*of, 64, 0.5) for of in ((1, "layer", 5), (2, "layer", 5), (1, "module", 5), (1, "layer", 6))]
    assert all(not torch.equal(some[0], other) for other in some[1:])
    share = torch.stack([drawn(0, "layer", trial, 50, 0.25) for trial in range(200)]).double().mean()
    assert float(share) == pytest.approx(0.25, abs=0.02)


def test_trials_end_when_the_ranking_is_stable():
    clear = torch.tensor([0.0, 2.0, 4.0, 8.0], dtype=torch.float64)
    options = Options(min_trials=40, max_trials=1000)
    perturbed, metrics, settled = trials(0, clear, 0.05, options)
    assert settled and 40 + 2 * EVERY <= len(metrics) < 300 and (len(metrics) - 40) % EVERY == 0
    assert reliability(perturbed, metrics) >= 0.9
    _, metrics, settled = trials(0, clear, 0.05, Options(min_trials=40, max_trials=50))
    assert not settled and len(metrics) == 50
    _, metrics, settled = trials(0, 0 * clear, 1.0, Options(min_trials=40, max_trials=120))
    assert not settled and len(metrics) == 120  # all units alike: there is no ranking


def test_reliability_by_hand():
    """Ranks of the halves 0 1 2 3 and 1 0 2 3: ρ = 1 − 6 · 2 / (4 · 15) = 0.8, stepped up 1.6 / 1.8."""
    even = torch.eye(4, dtype=torch.bool).repeat(3, 1)
    perturbed = torch.stack([even, even], 1).flatten(0, 1)
    metrics = torch.stack(
        [-torch.tensor([0.0, 1, 2, 3]).repeat(3), -torch.tensor([1.0, 0, 2, 3]).repeat(3)], 1
    ).flatten()
    assert reliability(perturbed, metrics.double()) == pytest.approx(1.6 / 1.8)
    assert reliability(perturbed[:, :1], metrics.double()) == 1


# -- in models ------------------------------------------------------------------------------------------------------


class Residual(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.map = nn.Linear(4, 4)
        with torch.no_grad():
            self.map.weight.copy_(size * torch.eye(4))
            self.map.bias.zero_()

    def forward(self, x):
        return x + self.map(x)


class Planted(nn.Module):
    """Residual blocks that add their share of the signal: most of it comes from the blocks 2 and 5."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Residual(size) for size in (0.01, 0.02, 1.5, 0.01, 0.03, 1.0, 0.02, 0.01)])

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


@pytest.fixture(scope="module")
def planted():
    torch.manual_seed(0)
    labels = torch.randint(4, (32,))
    return Planted().double(), [(0.5 * nn.functional.one_hot(labels, 4).double(), labels)]


@QUIET
@pytest.mark.parametrize("strength", ["auto", 1.0, 0.5])
def test_planted_units_are_found(planted, strength, tmp_path):
    model, batches = planted
    options = {"correlation": {"strength": strength, "max_trials": 100}}
    found = measure(model, batches, own_loss, MINE, options=options)
    for kind, name in (("layer", "blocks.{}"), ("module", "blocks.{}.map")):
        scores = {key: float(value) for key, value in found.by(kind).items()}
        ranking = sorted(scores, key=scores.__getitem__, reverse=True)
        assert set(ranking[:2]) == {name.format(2), name.format(5)}
        intervals = found.interval(kind)
        assert all(float(intervals[key][0]) > 0.3 for key in ranking[:2])
        others = [float(intervals[key][0]) < 0 for key in ranking[2:]]
        assert sum(others) >= 5  # of six units that hardly matter
        for key, (low, high) in intervals.items():
            assert low <= found.by(kind)[key] <= high
    facts = found.provenance["correlation"]
    assert facts["level"] == 0.95 and facts["layer"]["trials"] <= 100
    assert facts["layer"]["strength"] == strength or (strength == "auto" and facts["layer"]["strength"] in STRENGTHS)
    found.save(tmp_path)
    loaded = RelevanceScores.load(tmp_path)
    assert set(loaded.interval("module")) == set(found.interval("module"))
    for key, ends in loaded.interval("module").items():
        assert all(torch.equal(a, b) for a, b in zip(ends, found.interval("module")[key], strict=True))
    with pytest.raises(InputError, match="no intervals for granularity 'head'"):
        loaded.interval("head")
    assert loaded.provenance["correlation"]["layer"] == facts["layer"]


def test_perturbing_is_moving_towards_what_stands_for_the_unit(planted):
    """One layer perturbed at strength s adds (1 − s) of what it adds."""
    model, batches = planted
    options = {"correlation": {"strength": 0.25, "share": 0.9, "max_trials": 4, "min_trials": 4, "kinds": ["layer"]}}
    with pytest.warns(RuntimeWarning, match="the ranking of layers by correlation is not stable after 4 trials"):
        found = measure(model, batches, own_loss, MINE, options=options)
    metrics, masks = [], torch.stack([drawn(42, "layer", trial, 8, 0.9) for trial in range(4)])
    (x, labels) = batches[0]
    for mask in masks:
        y = x
        for perturbed, block in zip(mask.tolist(), model.blocks, strict=True):
            y = y + (0.75 if perturbed else 1.0) * block.map(y)
        metrics.append(-float(nn.functional.cross_entropy(y, labels).detach()))
    wanted, _, _ = correlations(masks, torch.tensor(metrics, dtype=torch.float64))
    got = torch.stack(list(found.by("layer").values()))
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


@QUIET
def test_auto_takes_the_first_strength_that_leaves_half_of_the_metric():
    model = MODELS["bert"]()
    batches = [data_for(model)]
    options = {"kinds": ["module"], "max_trials": 10, "min_trials": 10}
    for replace_by in ("zero", "mean"):
        found = measure(model, batches, own_loss, MINE, options={"correlation": {**options, "replace_by": replace_by}})
        assert found.provenance["correlation"]["module"]["strength"] in (1.0, 0.5, 0.25, 0.125, 0.0625)


class Even(nn.Module):
    """The mean of 96 maps that hand 1 on: what is left of it is 1 less the perturbed share times the strength."""

    def __init__(self):
        super().__init__()
        self.maps = nn.ModuleList(nn.Linear(1, 1, bias=False) for _ in range(96))
        for one in self.maps:
            nn.init.ones_(one.weight)

    def forward(self, x):
        return torch.stack([one(x) for one in self.maps]).mean(0)


@QUIET
@pytest.mark.parametrize(
    "drop, strength", [(1.1, 1.0), (1.4, 0.5), (2.2, 0.5), (2.8, 0.25), (9, 0.125), (11, 0.0625), (90, 0.0625)]
)
def test_auto_halves_the_strength_until_the_metric_is_no_nearer_to_that_of_nothing(drop, strength):
    """The metric falls from 0 by drop · share · strength, at most to −1, where it is when all maps are out: at a share of
    0.4 it is no nearer to −1 than to 0 where drop · strength ≤ 1.25."""

    def loss(outputs, batch):
        return (drop * (1 - outputs[:, 0])).clamp(max=1)

    options = {"kinds": ["module"], "share": 0.4, "min_trials": 4, "max_trials": 4}
    batches = [(torch.ones(2, 1, dtype=torch.float64), torch.zeros(2))]
    scores = measure(Even().double(), batches, loss, MINE, options={"correlation": options})
    assert scores.provenance["correlation"]["module"]["strength"] == strength


@QUIET
@pytest.mark.parametrize("name", ["llama", "vit"])
def test_other_models(name):
    model = MODELS[name]()
    options = {"correlation": {"max_trials": 12, "strength": 0.5}}
    found = measure(model, split(data_for(model), 4), own_loss, MINE, options=options)
    for kind in ("layer", "module", "head"):
        scores = torch.cat([value.reshape(-1) for value in found.by(kind).values()])
        assert scores.abs().max() <= 1 and scores.unique().numel() > 1
    assert "matters most" in found.depth_sentence() and found.heatmap().rows


@QUIET
@pytest.mark.parametrize("after", [4, 12, 30, 60])
def test_interruption_anywhere_gives_the_same_result(planted, tmp_path, after):
    model, batches = planted
    options = {"correlation": {"max_trials": 30, "min_trials": 10}}
    wanted = measure(model, batches, own_loss, MINE, options=options)
    passes = []

    def hook(*_):
        passes.append(1)
        if len(passes) == after:
            raise KeyboardInterrupt

    handle = model.register_forward_hook(hook)
    with pytest.raises(KeyboardInterrupt):
        measure(model, batches, own_loss, MINE, options=options, resume_directory=tmp_path)
    assert (tmp_path / f"correlation.{PARTIAL}").is_file()
    found = measure(model, batches, own_loss, MINE, options=options, resume_directory=tmp_path)
    handle.remove()
    assert not list(tmp_path.iterdir()) and found.provenance == wanted.provenance
    for name, parts in wanted.parts["correlation"].items():
        for part, value in parts.items():
            assert torch.equal(value, found.parts["correlation"][name][part])


@QUIET
def test_the_seed_decides(planted):
    model, batches = planted
    options = {"correlation": {"max_trials": 20, "kinds": ["layer"]}}
    a, b, c = (
        torch.stack(list(measure(model, batches, own_loss, MINE, options=options, seed=seed).by("layer").values()))
        for seed in (1, 1, 2)
    )
    assert torch.equal(a, b) and not torch.equal(a, c)


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"share": 0.05}, "share is 0.05; it must be from 0.1 to 0.9"),
        ({"strength": 0}, "strength is 0; it must be above 0"),
        ({"strength": "half"}, "strength is 'half'"),
        ({"max_trials": 3}, "max_trials is 3; it must be a whole number of at least 4"),
        ({"min_trials": 4.5}, "min_trials is 4.5"),
        ({"agreement": 1}, "agreement is 1; it must be between 0 and 1"),
        ({"max_trails": 9}, "correlation has no option 'max_trails'; did you mean 'max_trials'"),
    ],
)
def test_bad_options(planted, options, sentence):
    model, batches = planted
    with pytest.raises(InputError, match=sentence):
        measure(model, batches, own_loss, MINE, options={"correlation": options})
