"""A stratified sample first, and more examples where they are needed: which examples come when, when they are enough, and
what is said of the rest."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from measured_models import tiny_bert
from oracles.ablated import without_layer, without_module
from oracles.per_example_gradients import examples
from oracles.perturbed import metrics_one_by_one
from relevance_cases import cross_entropy_of_one, data_for, measure, own_loss, split
from reltune.errors import InputError
from reltune.relevance.batches import batch_size
from reltune.relevance.behaviour.rounds import is_one_round, labels_of, one_round, rounds_of, stratified_order
from reltune.relevance.behaviour.trials import predicted_agreement
from reltune.relevance.criteria import ablation, correlation
from reltune.relevance.rank_correlation import spearman

LENGTHS = [3, 5, 4, 2, 6, 3, 1, 4] * 5
SAMPLE = 8
EXACT = {"sample": SAMPLE, "agreement": 1.0}


# -- which examples come when ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("examples", [1, 7, 64, 300])
def test_every_example_comes_once(examples):
    generator = torch.Generator().manual_seed(0)
    labels, losses = torch.randint(3, (examples,), generator=generator), torch.rand(examples, generator=generator)
    for of in (labels, None):
        order = stratified_order(of, losses, seed=5)
        assert sorted(order.tolist()) == list(range(examples))
    assert torch.equal(stratified_order(labels, losses, 5), stratified_order(labels, losses, 5))
    if examples > 7:
        assert not torch.equal(stratified_order(labels, losses, 5), stratified_order(labels, losses, 6))


def test_the_first_ones_are_spread_over_labels_and_losses():
    generator = torch.Generator().manual_seed(0)
    labels = torch.tensor([0] * 150 + [1] * 90 + [2] * 60)[torch.randperm(300, generator=generator)]
    losses = torch.rand(300, generator=generator)
    for seed in range(20):
        order = stratified_order(labels, losses, seed)
        for n in (30, 64, 128, 200):
            first = order[:n]
            for label, share in ((0, 0.5), (1, 0.3), (2, 0.2)):
                assert abs(int((labels[first] == label).sum()) - share * n) <= 2 + 0.03 * n
            own = first[labels[first] == 0]
            below = int((losses[own] < losses[labels == 0].median()).sum())
            assert abs(below - len(own) / 2) <= 2 + 0.05 * n
    # Of a sample drawn without strata the mean loss varies twice as much.
    systematic = torch.stack([losses[stratified_order(None, losses, seed)[:30]].mean() for seed in range(50)])
    simple = torch.stack([losses[torch.randperm(300, generator=generator)[:30]].mean() for _ in range(50)])
    assert systematic.std() < simple.std() / 2


def test_rounds_hold_each_example_with_what_belongs_to_it():
    model = tiny_bert()
    batches = split(data_for(model, LENGTHS), 7)
    whole = data_for(model, LENGTHS)
    order = torch.randperm(len(LENGTHS), generator=torch.Generator().manual_seed(1))
    rounds = rounds_of(batches, order, SAMPLE)
    assert [one.examples for one in rounds] == [8, 12, 18, 27, 40]
    seen = []
    for one, start in zip(rounds, (0, 8, 12, 18, 27), strict=True):
        assert sorted(torch.cat(one.places).tolist()) == list(range(start, one.examples))
        assert all(batch_size(batch) <= 7 for batch in one.batches)
        for batch, places in zip(one.batches, one.places, strict=True):
            for row, place in enumerate(places.tolist()):
                number = int(order[place])
                seen.append(number)
                width = batch["input_ids"].shape[1]
                assert torch.equal(batch["input_ids"][row], whole["input_ids"][number, :width])
                assert batch["labels"][row] == whole["labels"][number]
    assert sorted(seen) == list(range(len(LENGTHS)))


def test_batches_of_one_form_come_together():
    pairs = [(torch.randn(5, 4), torch.arange(5)) for _ in range(8)]
    rounds = rounds_of(pairs, torch.arange(40), SAMPLE)
    assert [[batch_size(batch) for batch in one.batches] for one in rounds] == [[5, 3], [4], [5, 1], [5, 4], [5, 5, 3]]
    apart = [{"x": torch.randn(5, 4), "labels": torch.arange(5), "temperature": 1.0} for _ in range(8)]
    rounds = rounds_of(apart, torch.arange(40), SAMPLE)
    assert [batch_size(batch) for batch in rounds[0].batches] == [5, 3]
    assert all(batch["temperature"] == 1.0 for one in rounds for batch in one.batches)


def test_few_examples_are_one_round_of_their_own_batches():
    assert is_one_round(12, 8) and not is_one_round(13, 8)
    pairs = [(torch.randn(5, 4), torch.arange(5)), (torch.randn(2, 4), torch.arange(2))]
    (one,) = one_round(pairs)
    assert one.batches == pairs and [places.tolist() for places in one.places] == [[0, 1, 2, 3, 4], [5, 6]]
    assert labels_of(pairs).tolist() == [0, 1, 2, 3, 4, 0, 1]
    assert labels_of([(torch.randn(5, 4), torch.rand(5))]) is None


# -- when they are enough -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", [1.0, 4.0])
def test_the_agreement_with_all_examples_is_foreseen(noise):
    """Scores of 40 units, each the mean over examples of a true score and noise."""
    foreseen, found = [], []
    for seed in range(30):
        generator = torch.Generator().manual_seed(seed)
        drops = torch.randn(40, 1, generator=generator) + noise * torch.randn(40, 200, generator=generator)
        foreseen.append(predicted_agreement(lambda some, drops=drops: drops[:, some].mean(1), 50, 200, seed))
        found.append(spearman(drops[:, :50].mean(1), drops.mean(1)))
    mean = sum(found) / len(found)
    assert mean - 0.12 < sum(foreseen) / len(foreseen) < mean + 0.01 and 0.7 < mean < 0.99


def test_agreement_at_the_ends():
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(40, 100, generator=generator)
    assert predicted_agreement(lambda some: noise[:, some].mean(1), 100, 100, 0) == 1
    assert predicted_agreement(lambda some: torch.arange(40.0), 50, 100, 0) == 1
    assert predicted_agreement(lambda some: torch.zeros(40), 50, 100, 0) == pytest.approx(0.5**0.5)
    assert predicted_agreement(lambda some: noise[:1, some].mean(1), 50, 100, 0) == 1


# -- what is said of the rest ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("flips", [0.0, 0.01, 0.1])
def test_intervals_of_a_sample_cover_the_mean_over_all(flips):
    """Drops of an accuracy, most of them zero: of 300 examples 100 are seen."""
    inside, repetitions = 0, 400
    generator = torch.Generator().manual_seed(0)
    for _ in range(repetitions):
        drops = (torch.rand(2, 300, generator=generator) < flips).double()
        drops[1, :200] = (torch.rand(200, generator=generator) < 0.5).double()  # a unit that matters
        drops = drops[:, torch.randperm(300, generator=generator)]
        half = ablation.half_width(drops[:, :100], 300)
        inside += int((drops[0, :100].mean() - drops[0].mean()).abs() <= half[0])
    assert inside / repetitions > 0.95 - 0.033  # three standard errors


def test_intervals_of_correlations_cover_what_all_examples_give():
    """A metric that is linear in what is perturbed, each unit with effects of its own on every example."""
    units, total, seen, repetitions = 6, 160, 40, 150
    inside = torch.zeros(units)
    for seed in range(repetitions):
        generator = torch.Generator().manual_seed(seed)
        effects = torch.linspace(0, 1, units).double()[:, None] + 1.5 * torch.randn(
            units, total, generator=generator, dtype=torch.float64
        )
        all_masks = torch.rand(4000, units, generator=generator, dtype=torch.float64) < 0.25
        true = correlation.correlations(all_masks, -(all_masks.double() @ effects).mean(1))[0]
        masks = all_masks[:60]
        metrics = -(masks.double() @ effects[:, :seen])
        variance = correlation._variance(masks, metrics, total)
        _, low, high = correlation.correlations(masks, metrics.mean(1), variance)
        inside += (low <= true) & (true <= high)
        assert correlation._variance(masks, metrics, seen) == 0
    coverage = inside / repetitions
    assert coverage.mean() > 0.93 and coverage.min() > 0.88, coverage


# -- in models ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def case():
    """A model, its data, and the drop of every example when each module or layer is taken out by hand."""
    model = tiny_bert()
    batch = data_for(model, LENGTHS)

    def minus_loss(*of):
        return -cross_entropy_of_one(*of)

    base = torch.tensor(metrics_one_by_one(model, examples(batch), minus_loss))
    layers = [f"bert.encoder.layer.{number}" for number in (0, 1)]
    modules = ["bert.encoder.layer.1.output.dense", "bert.embeddings.word_embeddings", "classifier"]
    drops = {}
    for name in [*layers, *modules]:
        changed = without_layer(model, name) if name in layers else without_module(model, name)
        drops[name] = base - torch.tensor(metrics_one_by_one(changed, examples(batch), minus_loss))
    return model, split(batch, 7), base, drops


def test_all_rounds_give_what_one_gives(case):
    model, batches, _, drops = case
    kinds = {"kinds": ["layer", "module"]}
    found = measure(model, batches, own_loss, ["ablation"], options={"ablation": {**kinds, **EXACT}})
    at_once = measure(model, batches, own_loss, ["ablation"], options={"ablation": kinds})
    for kind in ("layer", "module"):
        assert found.provenance["ablation"][kind]["examples"] == len(LENGTHS)
        for name, score in found.by(kind).items():
            torch.testing.assert_close(score, at_once.by(kind)[name], rtol=1e-9, atol=1e-12)
            if name in drops:
                assert float(score) == pytest.approx(float(drops[name].mean()), rel=1e-4, abs=1e-6)
        with pytest.raises(InputError, match="no intervals"):
            found.interval(kind)


def test_a_sample_gives_the_mean_over_itself_and_an_interval(case):
    model, batches, base, drops = case
    settings = {"kinds": ["layer", "module"], "sample": SAMPLE, "agreement": 0.01}
    found = measure(model, batches, own_loss, ["ablation"], options={"ablation": settings})
    labels = torch.cat([batch["labels"] for batch in batches])
    first = stratified_order(labels, -base.double(), 42)[:SAMPLE]
    for kind in ("layer", "module"):
        assert found.provenance["ablation"][kind]["examples"] == SAMPLE
        inside = 0
        for name, (low, high) in found.interval(kind).items():
            score = float(found.by(kind)[name])
            assert low < score < high
            if name in drops:
                assert score == pytest.approx(float(drops[name][first].mean()), rel=1e-4, abs=1e-6)
                inside += float(low) <= float(drops[name].mean()) <= float(high)
        assert inside >= 2
    assert found.provenance["ablation"]["of_the_model"] == pytest.approx(float(base.mean()), rel=1e-5)


@pytest.mark.filterwarnings("ignore:the ranking of")
def test_correlation_takes_more_examples_until_they_agree(case, monkeypatch):
    """But no more than trials that settle less themselves have a use for."""
    model, batches, _, _ = case
    trials_agree = [1.0]
    monkeypatch.setattr(correlation, "reliability", lambda perturbed, metrics: trials_agree[0])
    settings = {"kinds": ["layer", "module"], "max_trials": 12, "min_trials": 12, "strength": 0.5}
    options = {"correlation": {**settings, "sample": SAMPLE, "agreement": 0.999}}
    found = measure(model, batches, own_loss, ["correlation"], options=options)
    at_once = measure(model, batches, own_loss, ["correlation"], options={"correlation": settings})
    few = measure(
        model, batches, own_loss, ["correlation"], options={"correlation": {**options["correlation"], "agreement": 0.1}}
    )
    trials_agree[0] = 0.1
    unsettled = measure(model, batches, own_loss, ["correlation"], options=options)
    assert unsettled.provenance["correlation"]["module"]["examples"] == SAMPLE
    facts = [of.provenance["correlation"]["module"] for of in (few, found, at_once)]
    assert [of["examples"] for of in facts] == [SAMPLE, len(LENGTHS), len(LENGTHS)]
    for name, score in at_once.by("module").items():
        torch.testing.assert_close(score, found.by("module")[name], rtol=1e-8, atol=1e-10)
        low, high = few.interval("module")[name]
        alone, end = at_once.interval("module")[name]
        assert low <= few.by("module")[name] <= high and high - low > 0.7 * (end - alone)


@pytest.mark.filterwarnings("ignore:the ranking of")
@pytest.mark.parametrize("criterion", ["ablation", "correlation"])
def test_interruption_in_a_later_round_changes_nothing(case, criterion, tmp_path, monkeypatch):
    model, batches, _, _ = case
    monkeypatch.setattr(correlation, "reliability", lambda perturbed, metrics: 1.0)
    settings = {"kinds": ["layer"], **EXACT}
    if criterion == "correlation":
        settings |= {"max_trials": 8, "min_trials": 8, "strength": 0.5, "agreement": 0.999}
    options = {criterion: settings}
    calls = []
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    wanted = measure(model, batches, own_loss, [criterion], options=options)
    handle.remove()

    def stop(*_):
        calls.append(1)
        if len(calls) == stop_at:
            raise KeyboardInterrupt

    stop_at = len(calls) - 3  # in the last round
    calls.clear()
    handle = model.register_forward_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        measure(model, batches, own_loss, [criterion], options=options, resume_directory=tmp_path)
    before = len(calls)
    found = measure(model, batches, own_loss, [criterion], options=options, resume_directory=tmp_path)
    handle.remove()
    assert len(calls) - before < before and found.provenance == wanted.provenance
    for name, score in wanted.by("layer").items():
        assert torch.equal(score, found.by("layer")[name])


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"sample": 4}, "sample is 4; it must be a whole number of at least 8"),
        ({"agreement": 0}, "agreement is 0; it must be above 0 and at most 1"),
    ],
)
def test_bad_options(options, sentence):
    with pytest.raises(InputError, match=sentence):
        ablation.Options(**options)
    if "sample" in options:
        with pytest.raises(InputError, match=sentence):
            dataclasses.replace(correlation.Options(), **options)
