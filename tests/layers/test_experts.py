"""Experts and routers of mixture-of-experts models, against plain autograd one example at a time."""

from __future__ import annotations

import copy
import signal
import types

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.integrations import use_experts_implementation
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from measured_models import LANGUAGE_MODEL, made, tiny_mixtral
from oracles.criteria import expected
from oracles.per_example_gradients import examples
from relevance_cases import assert_parts_equal, measure, of_expert, split, text_batch
from reltune.errors import AnalysisError, InputError
from reltune.layers import experts
from reltune.layers.inventory import take_inventory
from reltune.layers.protocol import Observer
from reltune.layers.registry import layer_type
from reltune.ops import squared_gradient
from reltune.plan.selection import select
from reltune.relevance.scores import RelevanceScores

EXPERTS, ROUTER = layer_type("experts"), layer_type("router")
CRITERIA = ["fisher", "gradient", "taylor", "relative_gradient", "magnitude"]


def tiny_qwen3_moe(**changes):
    """One layer without experts, and one with more of them than most examples have tokens."""
    sizes = {
        **LANGUAGE_MODEL,
        "num_key_value_heads": 1,
        "moe_intermediate_size": 8,
        "num_experts": 8,
        "num_experts_per_tok": 3,
    }
    more = {"mlp_only_layers": [0], "norm_topk_prob": True, "experts_implementation": "eager"}
    return made(Qwen3MoeForCausalLM, Qwen3MoeConfig(**{**sizes, **more, **changes}))


def tiny_gpt_oss(**changes):
    """Transposed weights with biases, a router with a bias."""
    sizes = {
        **LANGUAGE_MODEL,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    }
    return made(GptOssForCausalLM, GptOssConfig(**{**sizes, "experts_implementation": "eager", **changes}))


MODELS = {"mixtral": tiny_mixtral, "qwen3_moe": tiny_qwen3_moe, "gpt_oss": tiny_gpt_oss}


def lm_batch(lengths=(3, 11, 6, 2, 9)):
    batch = text_batch(lengths)
    batch["labels"] = torch.where(batch["attention_mask"].bool(), batch["input_ids"], -100)
    return batch


def gradients_one_by_one(model, batch):
    """Every parameter's gradient of every example, alone and without its padding."""
    model.eval()
    found = {name: [] for name, _ in model.named_parameters()}
    for example in examples(batch):
        logits = model(**{key: value for key, value in example.items() if key != "labels"}).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), example["labels"][:, 1:].flatten())
        gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        for (name, p), g in zip(model.named_parameters(), gradients, strict=True):
            found[name].append(torch.zeros_like(p) if g is None else g)
    return found


def wanted_parts(model, batch, criterion):
    """By the formulas, of every expert's matrices and every router; ``gradients`` are computed once per model."""
    gradients = gradients_one_by_one(model, batch)
    count = len(batch["labels"])
    wanted = {}
    for name, module in model.named_modules():
        own = {key: p.detach() for key, p in module.named_parameters(recurse=False)}
        by_example = [{key: gradients[f"{name}.{key}"][s] for key in own} for s in range(count)]
        if type(module).__name__.endswith("Router"):
            wanted[name] = expected(criterion, module, by_example, own)
        if not type(module).__name__.endswith("Experts"):
            continue
        for projection in ("gate_up_proj", "down_proj"):
            for expert in range(len(own[projection])):
                weights = of_expert(module, projection, expert, own)
                like = nn.Linear(*weights["weight"].shape[::-1], bias="bias" in weights)
                ones = [of_expert(module, projection, expert, g) for g in by_example]
                wanted[f"{name}.{projection}.{expert}"] = expected(criterion, like, ones, weights)
    return wanted


def parts_of(found, criterion, names):
    keep = ("column", "row", "weight", "bias")
    return {
        name: {part: found.parts[criterion][name][part] for part in keep if part in found.parts[criterion][name]}
        for name in names
    }


@pytest.mark.parametrize("name", MODELS)
def test_experts_and_routers_agree_with_autograd(name, monkeypatch):
    model, batch = MODELS[name](), lm_batch()
    cached = gradients_one_by_one(model, batch)
    monkeypatch.setitem(globals(), "gradients_one_by_one", lambda *_: cached)
    for size, block in ((1, 1 << 26), (3, 1 << 26), (5, 1 << 26), (5, 1)):
        monkeypatch.setattr(squared_gradient, "BLOCK_NUMBERS", block)  # 1: one expert at a time
        found = measure(model, split(batch, size), "causal_lm", CRITERIA)
        assert not [key for key in found.inventory.left_out if "expert" in key or "gate" in key]
        for criterion in CRITERIA:
            wanted = wanted_parts(model, batch, criterion)
            assert wanted and {info.name for info in found.inventory.modules} >= set(wanted)
            assert_parts_equal(parts_of(found, criterion, wanted), wanted)


def test_layer_totals_and_heads_beside_the_experts():
    model, batch = tiny_mixtral(), lm_batch()
    found = measure(model, [batch], "causal_lm", ["fisher"])
    gradients = gradients_one_by_one(model, batch)
    for layer, relevance in found.by("layer").items():
        total = sum(
            torch.stack(of).square().mean(0).sum() for key, of in gradients.items() if key.startswith(layer + ".")
        )
        assert float(relevance) == pytest.approx(float(total), rel=1e-9)
    assert len(found.by("layer")) == 2 and len(found.by("head")) == 2
    infos = [info for info in found.inventory.modules if info.layer_type == "experts"]
    assert len(infos) == 2 * 2 * 4 and {info.shape for info in infos} == {(80, 16), (16, 40)}
    counted = sum(info.weight_parameters + info.bias_parameters for info in found.inventory.modules)
    assert counted == found.inventory.base_parameters


def test_single_weights_of_experts():
    model, batch = tiny_gpt_oss(), lm_batch((3, 6, 2))
    found = measure(model, split(batch, 2), "causal_lm", ["fisher", "gradient", "taylor"], elements=True)
    gradients = {key: torch.stack(of) for key, of in gradients_one_by_one(model, batch).items()}
    name = "model.layers.1.mlp.experts"
    weight = model.get_parameter(f"{name}.down_proj").detach()
    for expert in range(4):
        g = gradients[f"{name}.down_proj"][:, expert]
        wanted = {
            "fisher": g.square().mean(0),
            "gradient": g.mean(0).abs(),
            "taylor": (g * weight[expert]).abs().mean(0),
        }
        for criterion, value in wanted.items():
            got = found.parts[criterion][f"{name}.down_proj.{expert}"]["element"]
            assert got.shape == value.mT.shape
            assert (got - value.mT).abs().max() <= 1e-9 * wanted[criterion].abs().max().clamp(min=1e-12)


def test_activation_counts_the_tokens_that_an_expert_got():
    model, batch = tiny_mixtral(), lm_batch()
    found = measure(model, split(batch, 3), "causal_lm", ["activation"])
    module = model.model.layers[0].mlp
    seen = []
    handle = module.experts.register_forward_pre_hook(lambda _, args: seen.append(args))
    model.eval()
    for example in examples(batch):
        model(**{key: value for key, value in example.items() if key != "labels"})
    handle.remove()
    for expert in range(4):
        rows = torch.cat([x[(index == expert).any(1)] for x, index, _ in seen]).detach()
        wanted = module.experts.gate_up_proj[expert].detach().abs() * rows.norm(dim=0)
        got = found.parts["activation"][f"model.layers.0.mlp.experts.gate_up_proj.{expert}"]
        torch.testing.assert_close(got["column"], wanted.sum(0), rtol=1e-9, atol=0)
        torch.testing.assert_close(got["row"], wanted.sum(1), rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_the_forward_is_that_of_transformers(name, implementation):
    """Whatever implementation the model runs by; in float32, because grouped_mm takes no float64."""
    model, batch = MODELS[name](experts_implementation=implementation).float().eval(), lm_batch()
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    with torch.no_grad():
        plain = model(**inputs).logits
        modules = [m for m in model.modules() if EXPERTS.matches(m)]
        handles = [handle for module in modules for handle in observed(module, lambda stack, x, y, route: y)]
        watched = model(**inputs).logits
        for handle in handles:
            handle.remove()
        torch.testing.assert_close(watched, plain, rtol=1e-4, atol=1e-5)
        assert torch.equal(model(**inputs).logits, plain)
    assert modules


def observed(module, see):
    return EXPERTS.observe(module, EXPERTS.infos("", module, "", 0), Observer(see, refuse=lambda name, reason: None))


def state(model):
    return [
        (name, id(getattr(module, "config", None)), dict(vars(module)).get("forward"), len(module._forward_hooks))
        for name, module in model.named_modules()
    ]


def test_everything_is_undone_after_an_analysis_and_after_an_exception():
    model, batch = tiny_mixtral(), lm_batch()
    before, known, config = state(model), list(ALL_EXPERTS_FUNCTIONS), copy.deepcopy(model.config.to_dict())

    def check():
        assert state(model) == before and list(ALL_EXPERTS_FUNCTIONS) == known
        assert model.config.to_dict() == config and model.config._experts_implementation == "eager"

    measure(model, [batch], "causal_lm", ["fisher", "activation"])
    check()

    def fail(*_):
        raise ZeroDivisionError

    for place in (model.model.layers[1].mlp.experts.act_fn, model.model.layers[0].mlp.gate, model.lm_head):
        handle = place.register_forward_pre_hook(fail)
        with pytest.raises(ZeroDivisionError):
            measure(model, [batch], "causal_lm")
        handle.remove()
        check()
    with pytest.raises(ZeroDivisionError):
        measure(model, [batch], fail)
    check()
    measure(model, [batch], "causal_lm")
    check()


class Layers(nn.Module):
    """A mixture of experts used twice, with an output per example; perhaps under a checkpoint."""

    def __init__(self, block, checkpointed=None):
        super().__init__()
        self.first, self.block, self.last = nn.Linear(5, 16), block, nn.Linear(16, 3)
        self.checkpointed = checkpointed

    def twice(self, x):
        return self.block(self.block(x) + x)

    def forward(self, x):
        x = self.first(x)
        x = self.twice(x) if self.checkpointed is None else checkpoint(self.twice, x, use_reentrant=self.checkpointed)
        return self.last(x.mean(1))


@pytest.mark.parametrize("checkpointed", [None, False, True])
def test_experts_that_are_used_twice_and_under_a_checkpoint(checkpointed):
    torch.manual_seed(0)
    model = Layers(tiny_mixtral().model.layers[0].mlp, checkpointed).double()
    inputs, labels = torch.randn(5, 4, 5).double(), torch.randint(3, (5,))
    found = measure(model, split((inputs, labels), 3), None, ["fisher", "taylor"])
    own = dict(model.block.experts.named_parameters())
    own["gate"] = model.block.gate.weight
    plain = Layers(model.block)
    plain.first, plain.last = model.first, model.last
    stacked = []
    for s in range(5):
        loss = F.cross_entropy(plain.double()(inputs[s : s + 1]), labels[s : s + 1])
        stacked.append(dict(zip(own, torch.autograd.grad(loss, list(own.values())), strict=True)))
    for criterion in ("fisher", "taylor"):
        wanted = {
            "block.gate": expected(
                criterion, model.block.gate, [{"weight": g["gate"]} for g in stacked], {"weight": own["gate"].detach()}
            )
        }
        for projection in ("gate_up_proj", "down_proj"):
            for expert in range(4):
                weights = {"weight": own[projection][expert].detach()}
                like = nn.Linear(*weights["weight"].shape[::-1], bias=False)
                ones = [{"weight": g[projection][expert]} for g in stacked]
                wanted[f"block.experts.{projection}.{expert}"] = expected(criterion, like, ones, weights)
        assert_parts_equal(parts_of(found, criterion, wanted), wanted)


def test_scores_are_saved_and_loaded_and_experts_are_not_trained_yet(tmp_path):
    model, batch = tiny_gpt_oss(), lm_batch((3, 6, 2))
    found = measure(model, [batch], "causal_lm", ["fisher", "relative_gradient"])
    found.save(tmp_path)
    again = RelevanceScores.load(tmp_path)
    assert again.inventory == found.inventory
    for kind in ("module", "column", "row", "bias", "layer"):
        for name, value in found.by(kind).items():
            assert torch.equal(again.by(kind)[name], value)
    assert again.compare(found, "column")[0]["spearman"] == pytest.approx(1)
    assert not any("experts" in name or "router" in name for name in select(found, "20%", ["column", "row"]).modules)
    for target, kind in (("experts", "experts"), ("router", "router")):
        with pytest.raises(InputError, match=rf"\({kind}\) can be measured and not trained"):
            select(found, "20%", "column", target_modules=[target])


def test_experts_of_a_projection_share_a_cell_of_the_heatmap():
    found = measure(tiny_mixtral(), [lm_batch()], "causal_lm", ["fisher", "relative_gradient"])
    for criterion in found.criteria:
        heatmap = found.heatmap(criterion)
        assert len(heatmap.columns) == 4 + 1 + 2 + 2 + 1  # attention, router, experts, norms, outside
        own = [found.by("module", criterion)[f"model.layers.1.mlp.experts.down_proj.{expert}"] for expert in range(4)]
        value = heatmap.values[heatmap.rows.index("model.layers.1")][heatmap.columns.index("mlp.experts.down_proj")]
        wanted = sum(own) if criterion == "fisher" else sum(own) / 4
        assert value == pytest.approx(float(wanted), rel=1e-12)
    layer = tiny_mixtral().model.layers[0].mlp
    infos = EXPERTS.infos("experts", layer.experts, "experts", 0)
    assert not any(info.in_block for info in infos) and {info.owner for info in infos} == {"experts"}


def test_some_experts_alone():
    model, batch = tiny_mixtral(), lm_batch()
    everything = measure(model, [batch], "causal_lm")
    some = measure(model, [batch], "causal_lm", target_modules=["gate_up_proj.1", r".*layers\.1.*down_proj\.\d"])
    assert len(some.parts["fisher"]) == 2 + 4
    for name, parts in some.parts["fisher"].items():
        for part, value in parts.items():
            torch.testing.assert_close(value, everything.parts["fisher"][name][part], rtol=1e-12, atol=0)


def test_an_interrupted_analysis_goes_on(tmp_path):
    model, batches = tiny_gpt_oss(), split(lm_batch(), 2)
    criteria = ["fisher", "fisher_true", "gradient", "activation"]
    wanted = measure(model, batches, "causal_lm", criteria)

    def interrupted():
        yield batches[0]
        signal.raise_signal(signal.SIGINT)  # in the middle of the analysis: this batch is still counted
        yield batches[1]

    with pytest.raises(KeyboardInterrupt):
        measure(model, interrupted(), "causal_lm", criteria, resume_directory=tmp_path)
    found = measure(model, batches, "causal_lm", criteria, resume_directory=tmp_path)
    for criterion in criteria:
        assert_parts_equal(found.parts[criterion], wanted.parts[criterion], relative=0)


def test_a_batch_that_does_not_fit_is_halved():
    model, batch = tiny_mixtral(), lm_batch()
    wanted = measure(model, [batch], "causal_lm", ["fisher", "gradient"])
    full = [2]  # so many gradients of a batch with more than two examples arrive before memory is full

    def count(gradient):
        if len(gradient) > 2:
            full[0] -= 1
            if not full[0]:
                raise torch.OutOfMemoryError

    for layer in model.model.layers:
        layer.mlp.register_forward_hook(lambda module, args, output: output.register_hook(count) and None)
    with pytest.warns(UserWarning, match="out of memory with 5 examples"):
        found = measure(model, [batch], "causal_lm", ["fisher", "gradient"])
    for criterion in ("fisher", "gradient"):
        assert_parts_equal(found.parts[criterion], wanted.parts[criterion])


class AcrossExamples(nn.Module):
    """Hands the tokens on position by position, so that rows do not follow each other by example."""

    def __init__(self, block):
        super().__init__()
        self.first, self.block, self.last = nn.Linear(5, 16), block, nn.Linear(16, 3)

    def forward(self, x):
        x = self.block(self.first(x).transpose(0, 1).contiguous()).transpose(0, 1)
        return self.last(x.mean(1))


def test_tokens_in_another_order_are_found_out():
    torch.manual_seed(0)
    model = AcrossExamples(tiny_mixtral().model.layers[0].mlp).double()
    batch = torch.randn(4, 6, 5).double(), torch.randint(3, (4,))
    with pytest.warns(RuntimeWarning, match="not measured: an example's loss depends on rows that belong to another"):
        found = measure(model, [batch], None, ["fisher"])
    assert set(found.parts["fisher"]) == {"first", "last"}
    one = measure(model, split(batch, 1), None, ["fisher"])
    assert len(one.parts["fisher"]) == 2 + 1 + 2 * 4
    with pytest.raises(
        AnalysisError, match=r"gradients of block\.experts\.gate_up_proj\.0 and 3 more cannot be told apart"
    ):
        measure(model, [batch], None, ["fisher"], target_modules=["gate_up_proj"])


def test_experts_that_other_code_replaces_are_left_out_by_name():
    model, batch = tiny_mixtral(), lm_batch()
    block = model.model.layers[0].mlp
    block.forward = lambda x: x @ block.experts.down_proj[0, :, :16]
    for criterion in ("fisher", "activation"):
        with pytest.warns(RuntimeWarning, match=r"layers\.0\.mlp\.experts\.gate_up_proj\.0 and 7 more not measured"):
            found = measure(model, [batch], "causal_lm", [criterion])
        assert sum(info.layer_type == "experts" for info in found.inventory.modules) == 8


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_is_near_float64(autocast):
    model, batch = tiny_qwen3_moe(), lm_batch()
    wanted = measure(model, [batch], "causal_lm")
    model = model.float() if autocast else model.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        found = measure(model, [batch], "causal_lm")
    names = [name for name in wanted.parts["fisher"] if "experts" in name]
    a, b = (torch.cat([of.parts["fisher"][name]["column"].double() for name in names]) for of in (found, wanted))
    assert all(found.parts["fisher"][name]["column"].dtype == torch.float32 for name in names)
    # A token near the border between two experts may go to another one.
    assert (a >= 0).all() and torch.corrcoef(torch.stack([a, b]))[0, 1] > 0.98


@pytest.mark.parametrize("limit", [1, 600, 1 << 26])
def test_blocks_hold_every_row_once_and_bound_the_workspace(limit, monkeypatch):
    monkeypatch.setattr(squared_gradient, "BLOCK_NUMBERS", limit)
    generator = torch.Generator().manual_seed(0)
    expert = torch.randint(7, (60,), generator=generator).square() // 6  # some without rows, unequal loads
    example = torch.randint(3, (60,), generator=generator)
    x, g = torch.randn(60, 4, generator=generator), torch.randn(60, 2, generator=generator)
    wanted = {(e, s): x[(expert == e) & (example == s)] for e in range(7) for s in range(3)}
    seen, blocks = [], 0
    for numbers, xs, gs in experts._blocks(experts.ExpertInputs(x, expert, example, 3), g, 7):
        blocks += 1
        n, examples, load, _ = xs.shape
        assert (n, examples) == (len(numbers), 3) and gs.shape == (n, 3, load, 2)
        assert n == 1 or n * 3 * load * (load + 6) <= limit
        for at, e in enumerate(numbers):
            seen.append(e)
            for s in range(3):
                own = wanted[e, s]
                assert torch.equal(xs[at, s, : len(own)], own) and not xs[at, s, len(own) :].any()
                assert torch.equal(gs[at, s, : len(own)], g[(expert == e) & (example == s)])
    assert sorted(seen) == expert.unique().tolist()
    assert blocks == len(seen) if limit == 1 else blocks < len(seen)


def test_an_expert_without_tokens_has_no_relevance():
    model, batch = tiny_qwen3_moe(num_experts=24, num_experts_per_tok=1), lm_batch((2, 1))
    found = measure(model, [batch], "causal_lm", ["fisher", "gradient"])
    relevance = [float(v) for name, v in found.by("module").items() if "gate_up_proj" in name]
    assert len(relevance) == 24 and relevance.count(0.0) >= 20 and any(relevance)


class OddRouter(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.weight, self.how = nn.Parameter(torch.randn(3, 4)), how

    def forward(self, x):
        if self.how == "product":
            return x @ self.weight.T
        if self.how == "normalised":
            return F.linear(x, F.normalize(self.weight, dim=1))
        if self.how == "cast":
            return F.linear(x.type(torch.float64), weight=self.weight.type(torch.float64)).to(x.dtype)
        if self.how == "also":
            return F.linear(x, self.weight) + self.weight.sum()
        if self.how == "joined":
            return F.linear(x, self.weight) + torch.cat([self.weight, self.weight], 1).sum()
        return F.linear(x, self.weight)


@pytest.mark.parametrize("how", ["product", "normalised", "also", "joined", "cast", "plain"])
def test_a_router_is_measured_if_it_is_a_linear_map_and_else_refused_by_name(how):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), OddRouter(how))
    batch = torch.randn(6, 5), torch.randint(3, (6,))
    if how in ("cast", "plain"):
        found = measure(model, [batch], None, ["fisher"]).parts["fisher"]["1"]
        wanted = 0
        for s in range(6):
            loss = F.cross_entropy(model(batch[0][s : s + 1]), batch[1][s : s + 1])
            wanted += torch.autograd.grad(loss, model[1].weight)[0].square() / 6
        # both in float32, in which a sum of 6 · 3 products is right to some 1e-7 of itself
        torch.testing.assert_close(found["column"].float(), wanted.sum(0))
        return
    with pytest.warns(RuntimeWarning, match="1 not measured: its weight is used otherwise"):
        found = measure(model, [batch], None, ["fisher"])
    assert "1" not in found.parts["fisher"]
    with pytest.raises(AnalysisError, match=r"gradients of 1 cannot be told apart.*used otherwise"):
        measure(model, [batch], None, ["fisher"], target_modules=["1"])


class Ungated(nn.Module):
    """Without a gate and with biases; transformers' own classes of this kind come with large models."""

    def __init__(self, config):
        super().__init__()
        self.num_experts = 3
        self.up_proj = nn.Parameter(torch.randn(3, 6, 4))
        self.down_proj = nn.Parameter(torch.randn(3, 4, 6))
        self.up_proj_bias = nn.Parameter(torch.randn(3, 6))
        self.down_proj_bias = nn.Parameter(torch.randn(3, 4))
        self.act_fn = nn.Tanh()

    def forward(self, hidden_states, top_k_index, top_k_weights):
        total = torch.zeros_like(hidden_states)
        for token, k in torch.cartesian_prod(*map(torch.arange, top_k_index.shape)).tolist():
            e = int(top_k_index[token, k])
            if e < self.num_experts:
                inner = self.act_fn(self.up_proj[e] @ hidden_states[token] + self.up_proj_bias[e])
                out = self.down_proj[e] @ inner + self.down_proj_bias[e]
                total = total.index_add(0, torch.tensor([token]), (top_k_weights[token, k] * out)[None])
        return total


def test_experts_without_a_gate_and_choices_of_no_expert():
    torch.manual_seed(0)
    module = use_experts_implementation(Ungated, has_gate=False, has_bias=True)(
        types.SimpleNamespace(_experts_implementation="eager")
    )
    x, probability = torch.randn(5, 4), torch.rand(5, 2)
    index = torch.tensor([[0, 3], [3, 3], [2, 0], [3, 2], [0, 2]])  # expert 1 is chosen by none, 3 is none
    plain = module(x, index, probability)
    assert [info.name for info in EXPERTS.infos("", module, "", 0)][2:4] == ["up_proj.2", "down_proj.0"]
    seen = {}
    (handle,) = observed(module, lambda stack, x, y, route: (seen.setdefault(stack, (x, route)), y)[1])
    torch.testing.assert_close(module(x, index, probability), plain)
    nothing = module(x, torch.full_like(index, 3), probability)
    handle.remove()
    assert not nothing.any()
    rows, route = seen["up_proj"]
    assert (route.counts, route.tokens.tolist(), route.total) == ([3, 0, 3], [0, 2, 4, 2, 3, 4], 5)
    assert torch.equal(rows, x[route.tokens])


def test_structures_that_are_not_known_are_left_out_by_name():
    model = tiny_mixtral()
    module = model.model.layers[0].mlp.experts
    module.register_parameter("scale", nn.Parameter(torch.ones(4)))
    assert not EXPERTS.matches(module)
    left_out = take_inventory(model).left_out
    assert left_out["model.layers.0.mlp.experts.down_proj"] == "layer type MixtralExperts has no units yet"
    model = tiny_mixtral()
    model.model.layers[0].mlp.experts.has_post_expert_norm = True
    assert not EXPERTS.matches(model.model.layers[0].mlp.experts)
    gate = model.model.layers[0].mlp.gate
    assert ROUTER.matches(gate)
    gate.scale = nn.Parameter(torch.ones(4))
    assert not ROUTER.matches(gate)
