"""Every criterion that uses gradients, on every layer type and architecture, against its formula."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)

from measured_models import MODELS, Convolutions, made, tiny_gpt2, tiny_mixtral
from oracles.criteria import expected
from oracles.per_example_gradients import examples
from relevance_cases import assert_parts_equal, canonical, causal_of_one, data_for, lm_batch, measure, split, text_batch
from reltune.errors import InputError

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GRADIENT_CRITERIA = ["fisher", "gradient", "taylor", "relative_gradient", "gradient_snr", "magnitude"]


def tiny_t5():
    config = T5Config(
        vocab_size=20,
        d_model=16,
        d_kv=8,
        d_ff=24,
        num_layers=2,
        num_heads=2,
        decoder_start_token_id=0,
        tie_word_embeddings=False,
    )
    return made(T5ForConditionalGeneration, config)


def tiny_bart():
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = BartConfig(vocab_size=20, d_model=8, max_position_embeddings=32, pad_token_id=1, **sizes, **heads)
    return made(BartForConditionalGeneration, config)


def seq2seq_of_one(outputs, example):
    return nn.functional.cross_entropy(outputs.logits.flatten(0, 1), example["labels"].flatten())


def one_by_one(model, batch, loss_of):
    """Per module, a list of its gradients example by example, by plain autograd."""
    model.eval()
    owners = {name: module for name, module in model.named_modules() if list(module.parameters(recurse=False))}
    found = {name: [] for name in owners}
    for example in examples(batch):
        if isinstance(example, dict):
            outputs = model(**{key: value for key, value in example.items() if key != "labels"})
        else:
            outputs = model(example[0])
        named = dict(model.named_parameters())
        gradients = torch.autograd.grad(loss_of(outputs, example), list(named.values()), allow_unused=True)
        by_name = {
            name: torch.zeros_like(p) if g is None else g for (name, p), g in zip(named.items(), gradients, strict=True)
        }
        for name, module in owners.items():
            own = {
                key: by_name[f"{name}.{key}"]
                for key, _ in module.named_parameters(recurse=False)
                if f"{name}.{key}" in by_name
            }
            found[name].append(canonical(module, own))
    return found


def assert_agrees(model, batches, whole, loss, loss_of, criteria=tuple(GRADIENT_CRITERIA), relative=1e-9):
    found = measure(model, batches, loss, list(criteria))
    gradients = one_by_one(model, whole, loss_of)
    for criterion in criteria:
        errors, scale = {}, {}
        for info in found.inventory.modules:
            if info.layer_type == "experts":  # slices of a module's parameters: tests/test_experts.py
                continue
            module = model.get_submodule(info.name)
            weights = canonical(module, {k: p.detach() for k, p in module.named_parameters(recurse=False)})
            wanted = expected(criterion, module, gradients[info.name], weights)
            for part, value in wanted.items():
                got = found.parts[criterion][info.name][part]
                assert got.shape == value.shape, (criterion, info.name, part)
                errors[part] = max(errors.get(part, 0.0), float((got - value).abs().max()))
                scale[part] = max(scale.get(part, 0.0), float(value.abs().max()))
        for part in errors:
            assert errors[part] <= relative * scale[part], (criterion, part, errors[part], scale[part])
    return found


def cross_entropy(outputs, example):
    labels = example["labels"] if isinstance(example, dict) else example[1]
    return nn.functional.cross_entropy(getattr(outputs, "logits", outputs), labels)


# Key biases have no gradient in exact arithmetic, so their signal to noise is that of rounding errors.
WITHOUT_SNR = [name for name in GRADIENT_CRITERIA if name != "gradient_snr"]


@pytest.mark.parametrize("size", [3, 7])
@pytest.mark.parametrize("name", MODELS)
def test_classifiers(name, size):
    model = MODELS[name]()
    batch = data_for(model)
    assert_agrees(model, split(batch, size), batch, None, cross_entropy, WITHOUT_SNR)


def test_signal_to_noise():
    model = MODELS["sequential"]()
    batch = data_for(model)
    assert_agrees(model, split(batch, 3), batch, None, cross_entropy, ["gradient_snr"])
    with pytest.raises(InputError, match="more data"):
        measure(model, split(batch, 1)[:1], None, ["gradient_snr"])


@pytest.mark.parametrize("size", [2, 5])
def test_gpt2(size):
    model, batch = tiny_gpt2(), lm_batch()
    found = assert_agrees(model, split(batch, size), batch, "causal_lm", causal_of_one, WITHOUT_SNR)
    kinds = {info.layer_type for info in found.inventory.modules}
    assert kinds == {"conv1d", "embedding", "norm", "linear"}


def test_t5():
    """Its table of relative positions is looked up once for the whole batch: left out, or measured one by one."""
    model, batch = tiny_t5(), lm_batch()
    batch["decoder_input_ids"] = batch["input_ids"].roll(1, 1)
    one = split(batch, 1)
    found = assert_agrees(model, one, batch, "seq2seq", seq2seq_of_one, WITHOUT_SNR)
    tables = [info.name for info in found.inventory.modules if "relative_attention_bias" in info.name]
    assert len(tables) == 2
    for size in (2, 5):
        with pytest.warns(RuntimeWarning, match="relative_attention_bias and 1 more not measured"):
            found = assert_agrees(model, split(batch, size), batch, "seq2seq", seq2seq_of_one, ["fisher", "taylor"])
        assert not set(tables) & set(found.parts["fisher"])


@pytest.mark.parametrize("make", [tiny_t5, tiny_bart])
def test_a_decoder_reads_the_shifted_labels_where_the_batch_has_nothing_for_it(make):
    """As the model itself makes its input of labels that it is given."""
    model, batch = make().eval(), lm_batch()
    batch["labels"] = torch.where(batch["labels"] == -100, -100, 20 - batch["input_ids"])  # BART takes its input else
    found = measure(model, split(batch, 1), "seq2seq", ["fisher"])
    squares = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for one in split(batch, 1):
        model.zero_grad()
        seq2seq_of_one(model(**one), one).backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                squares[name] += parameter.grad.square() / len(batch["labels"])
    kinds = [info.name for info in found.inventory.modules if info.layer_type == "linear"]
    assert len(kinds) > 10
    for name in kinds:
        wanted = squares[f"{name}.weight"]
        for part, axis in (("column", 0), ("row", 1)):
            sums = wanted.sum(axis)
            assert (found.parts["fisher"][name][part] - sums).abs().max() <= 1e-9 * sums.abs().max(), (name, part)


def test_as_many_examples_as_positions():
    """The shape of T5's table of positions is then that of one row per example."""
    model, batch = tiny_t5(), lm_batch((5, 5, 5, 5, 5))
    batch["decoder_input_ids"] = batch["input_ids"].roll(1, 1)
    with pytest.warns(RuntimeWarning, match="relative_attention_bias"):
        assert_agrees(model, [batch], batch, "seq2seq", seq2seq_of_one, ["fisher"])


def test_mixture_of_experts_keeps_its_other_layers():
    model, batch = tiny_mixtral(), lm_batch()
    found = assert_agrees(model, split(batch, 3), batch, "causal_lm", causal_of_one, WITHOUT_SNR)
    assert {"experts", "router", "linear", "norm", "embedding"} == {info.layer_type for info in found.inventory.modules}


def test_convolutions():
    torch.manual_seed(0)
    model = Convolutions().double()
    batch = torch.randn(6, 2, 9, 8).double(), torch.randint(3, (6,))
    found = assert_agrees(model, split(batch, 4), batch, None, cross_entropy)
    assert found.parts["fisher"]["layers.2"]["column"].shape == (6,)


def test_elements():
    """Single weights, of a criterion of each kind, on layers of each kind."""
    torch.manual_seed(0)
    for model, batch, loss, loss_of in (
        (tiny_gpt2(), lm_batch(), "causal_lm", causal_of_one),
        (Convolutions().double(), (torch.randn(6, 2, 9, 8).double(), torch.randint(3, (6,))), None, cross_entropy),
    ):
        found = measure(model, split(batch, 2), loss, WITHOUT_SNR, elements=True)
        gradients = one_by_one(model, batch, loss_of)
        for info in found.inventory.modules:
            of = gradients[info.name]
            weight = canonical(None, dict(model.get_submodule(info.name).named_parameters(recurse=False)))[
                "weight"
            ].detach()
            weight = weight.mT if info.layer_type == "conv1d" else weight
            stacked = torch.stack([g["weight"] for g in of])
            wanted = {
                "fisher": stacked.square().mean(0),
                "gradient": stacked.mean(0).abs(),
                "taylor": (stacked * weight).abs().mean(0),
                "relative_gradient": torch.where(weight != 0, stacked.mean(0).abs() / weight.abs(), 0),
                "magnitude": weight.square(),
            }
            for criterion, value in wanted.items():
                got = found.parts[criterion][info.name]["element"]
                assert got.shape == value.shape == info.shape
                assert (got - value).abs().max() <= 1e-9 * value.abs().max().clamp(min=1e-12), (criterion, info.name)


def test_together_they_give_what_each_gives_alone():
    """On an accelerator, statistics of single weights wait on the host and those of units do not."""
    criteria = [*GRADIENT_CRITERIA, "activation", "fisher_true"]
    model = MODELS["bert"]().to(DEVICE)
    batches = [{key: value.to(DEVICE) for key, value in batch.items()} for batch in split(data_for(model), 3)]
    for elements in (False, True):
        together = measure(model, batches, None, criteria, elements=elements)
        for criterion in criteria:
            alone = measure(model, batches, None, [criterion], elements=elements)
            assert_parts_equal(together.parts[criterion], alone.parts[criterion], 1e-12)


def test_ratios_of_layers_are_ratios_of_sums():
    model = MODELS["llama"]()
    batch = data_for(model)
    found = measure(model, [batch], None, ["relative_gradient"])
    gradients = one_by_one(model, batch, cross_entropy)
    for layer, relevance in found.by("layer").items():
        above = below = 0.0
        for info in found.inventory.modules:
            if info.layer == layer:
                for key, p in model.get_submodule(info.name).named_parameters(recurse=False):
                    above += float(torch.stack([g[key] for g in gradients[info.name]]).mean(0).square().sum())
                    below += float(p.detach().square().sum())
        assert float(relevance) == pytest.approx((above / below) ** 0.5, rel=1e-9)
    assert len(found.by("layer")) == 2


def test_fisher_true_is_the_expectation_over_the_models_own_labels():
    """With the labels' probabilities as weights the expectation is exact; many passes come near it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    inputs = torch.randn(2, 3).double()
    probabilities = model(inputs).softmax(1)
    exact = torch.zeros(4, dtype=torch.float64)
    for s in range(2):
        for label in range(2):
            gradient = torch.autograd.grad(
                nn.functional.cross_entropy(model(inputs[s][None]), torch.tensor([label])), model[0].weight
            )[0]
            exact += float(probabilities[s, label].detach()) * gradient.square().sum(1) / 2
    labels = torch.zeros(2, dtype=torch.long)
    many = measure(model, [(inputs, labels)] * 3000, None, ["fisher_true"]).parts["fisher_true"]["0"]["row"]
    assert (many - exact).abs().max() <= 0.08 * exact.max()
    again = [measure(model, [(inputs, labels)] * 3, None, ["fisher_true", "fisher"], seed=seed) for seed in (1, 1, 2)]
    rows = [of.parts["fisher_true"]["0"]["row"] for of in again]
    assert torch.equal(rows[0], rows[1]) and not torch.equal(rows[0], rows[2])
    observed = measure(model, [(inputs, labels)], None, ["fisher"]).parts["fisher"]
    torch.testing.assert_close(again[0].parts["fisher"]["0"]["row"], observed["0"]["row"])


def test_activation_weighs_magnitude_by_inputs_without_padding():
    model, batch = MODELS["bert"](), text_batch([3, 11, 6, 1])
    name = "bert.encoder.layer.0.intermediate.dense"
    module, seen = model.get_submodule(name), []
    handle = module.register_forward_hook(lambda module, args, output: seen.append(args[0].detach()))
    found = measure(model, split(batch, 2), None, ["activation"])
    seen.clear()
    model.eval()
    for example in examples(batch):
        model(**{key: value for key, value in example.items() if key != "labels"})
    handle.remove()
    x = torch.cat([part.flatten(0, 1) for part in seen])
    scores = module.weight.detach().abs() * x.norm(dim=0)
    torch.testing.assert_close(found.parts["activation"][name]["column"], scores.sum(0), rtol=1e-9, atol=0)
    torch.testing.assert_close(found.parts["activation"][name]["row"], scores.sum(1), rtol=1e-9, atol=0)
    bias = module.bias.detach().abs().sum() * len(x) ** 0.5
    torch.testing.assert_close(found.parts["activation"][name]["bias"], bias, rtol=1e-9, atol=0)
    words = "bert.embeddings.word_embeddings"
    ids = torch.cat([example["input_ids"].flatten() for example in examples(batch)])
    weight = model.get_submodule(words).weight.detach()
    wanted = weight.abs().sum(1) * torch.bincount(ids, minlength=len(weight)).double().sqrt()
    torch.testing.assert_close(found.parts["activation"][words]["row"], wanted, rtol=1e-9, atol=0)


class Checkpointed(nn.Module):
    """Two maps under a checkpoint, one of them used twice, between two that are not."""

    def __init__(self, reentrant):
        super().__init__()
        self.reentrant = reentrant
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)
        self.inner, self.twice = nn.Linear(8, 8), nn.Linear(8, 8)

    def block(self, x):
        return self.twice(torch.tanh(self.inner(torch.tanh(self.twice(x)))))

    def forward(self, x):
        x = torch.tanh(self.first(x))
        x = self.block(x) if self.reentrant is None else checkpoint(self.block, x, use_reentrant=self.reentrant)
        return self.last(torch.tanh(x))


def test_under_a_checkpoint():
    torch.manual_seed(0)
    model = Checkpointed(None).double()
    batch = torch.randn(6, 6).double(), torch.randint(3, (6,))
    plain = assert_agrees(model, split(batch, 4), batch, None, cross_entropy)
    for model.reentrant in (False, True):
        found = measure(model, split(batch, 4), None, GRADIENT_CRITERIA)
        for criterion in GRADIENT_CRITERIA:
            assert_parts_equal(found.parts[criterion], plain.parts[criterion])


def test_compare():
    model, batch = MODELS["bert"](), text_batch([3, 11, 6, 1])
    found = measure(model, [batch], None, ["fisher", "taylor", "random"])
    pairs = {(pair["first"], pair["second"]): pair for pair in found.compare(top=0.2)}
    assert set(pairs) == {("fisher", "taylor"), ("fisher", "random"), ("taylor", "random")}
    a = torch.stack(list(found.by("module", "fisher").values()))
    b = torch.stack(list(found.by("module", "taylor").values()))
    ranks = torch.stack([v.argsort().argsort().double() for v in (a, b)])
    pair = pairs["fisher", "taylor"]
    assert pair["units"] == len(a)
    assert pair["spearman"] == pytest.approx(float(torch.corrcoef(ranks)[0, 1]), abs=0.05)  # ties: mean ranks
    count = round(0.2 * len(a))
    best = [set(v.argsort(descending=True)[:count].tolist()) for v in (a, b)]
    assert pair["overlap"] == len(best[0] & best[1]) / count
    same = found.compare(found, kind="column")
    assert [p["spearman"] for p in same] == pytest.approx([1, 1, 1]) and all(p["overlap"] == 1 for p in same)
    with pytest.raises(InputError, match="top is 2"):
        found.compare(top=2)
