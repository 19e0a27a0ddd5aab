"""Selection under a budget, against exhaustive and slow independent implementations."""

import dataclasses
import itertools
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from measured_models import tiny_bert, tiny_sequential
from relevance_cases import data_for, measure
from reltune.errors import InputError
from reltune.layers.head_group import HeadGroup
from reltune.layers.inventory import Inventory
from reltune.layers.registry import layer_type
from reltune.layers.units import ModuleInfo
from reltune.names import SPREADS
from reltune.plan.plan import ModulePlan, Plan
from reltune.plan.selection import SPREAD_OUT, select
from reltune.relevance.scores import RelevanceScores

LARGER = ["layer", "module", "head", "column", "row", "bias", "norm"]  # all granularities but elements
EVERYWHERE = {"target_modules": ".*"}  # modules outside the layers compete only when they are named


def linear(name, out, in_features, bias=True, layer=None):
    return ModuleInfo(name, "linear", layer or name, 0, (out, in_features), bias)


def norm(name, features, bias=True, layer=None):
    return ModuleInfo(name, "norm", layer or name, 0, (features,), bias)


def scores_of(modules, parts, more_parameters=0):
    """An artefact made by hand: ``parts[module][part]`` as lists or numbers, on a model of these modules."""
    total = sum(info.weight_parameters + info.bias_parameters for info in modules) + more_parameters
    tensors = {
        name: {part: torch.tensor(values, dtype=torch.float32) for part, values in found.items()}
        for name, found in parts.items()
    }
    return RelevanceScores({"fisher": tensors}, Inventory(modules, {}, total, 0), [], "f", {"model": "m"})


def chosen(plan):
    return {name: (m.columns, m.rows, m.weight, m.bias) for name, m in plan.modules.items()}


def random_scores(seed):
    """One to five small modules in and outside of two blocks; small whole scores, so that ties are common."""
    rng = random.Random(seed)
    modules, parts = [], {}
    for i in range(rng.randint(1, 5)):
        layer = rng.choice(["b.0", "b.1", None])
        name = f"{layer}.m{i}" if layer else f"m{i}"
        bias = rng.random() < 0.7
        if rng.random() < 0.3:
            info = norm(name, rng.randint(1, 4), bias, layer)
            parts[name] = {"norm": rng.randint(0, 9)}
        else:
            out, in_features = rng.randint(1, 4), rng.randint(1, 4)
            info = linear(name, out, in_features, bias, layer)
            parts[name] = {
                "column": [rng.randint(0, 9) for _ in range(in_features)],
                "row": [rng.randint(0, 9) for _ in range(out)],
                "weight": rng.randint(0, 9 * in_features),
            }
            if bias:
                parts[name]["bias"] = rng.randint(0, 9)
        modules.append(info)
    heads = []
    if rng.random() < 0.5:
        heads.append(HeadGroup("b.0.attn", "b.0", 2, rng.randint(1, 2), "b.0.attn.o", {"b.0.attn.q": [0]}))
        if rng.random() < 0.5:
            heads[0].projections["b.0.attn.kv"] = [0, 2 * heads[0].head_size]
        wide = 2 * heads[0].head_size
        for name, out, in_features in [("q", wide, 2), ("kv", 2 * wide, 2), ("o", 3, wide)]:
            modules.append(linear(f"b.0.attn.{name}", out, in_features, rng.random() < 0.5, "b.0"))
            parts[modules[-1].name] = {
                "column": [rng.randint(0, 9) for _ in range(in_features)],
                "row": [rng.randint(0, 9) for _ in range(out)],
                "weight": rng.randint(0, 9 * in_features),
                **({"bias": rng.randint(0, 9)} if modules[-1].bias else {}),
            }
    scores = scores_of(modules, parts, more_parameters=rng.randint(0, 10))
    scores.inventory.attention_heads = heads
    return scores


def slow_greedy(scores, limit, kinds, everywhere):
    """The rule of the docstring on plain sets, everything counted anew at every step.

    None where there is no candidate or none that fits.
    """
    infos = {info.name: info for info in scores.inventory.modules}
    if not everywhere and any(info.layer != info.name for info in infos.values()):
        infos = {name: info for name, info in infos.items() if info.layer != name}
    relevance = scores.parts["fisher"]

    def size(name):
        shape = infos[name].shape
        return shape[0] * (shape[1] if len(shape) == 2 else 1)

    def count(state):
        """Parameters of what is held: 'w' whole weight, 'b' bias, ('c', i) a column, ('r', i) a row."""
        total = 0
        for name, held in state.items():
            out, in_features = infos[name].shape[0], infos[name].shape[-1]
            prices = {"w": size(name), "b": out, "c": out, "r": in_features}
            total += sum(prices[unit[0]] for unit in held)
        return total

    def with_unit(state, units):
        """The state with the units added: a whole weight swallows its columns and rows, and takes no more."""
        state = {name: set(held) for name, held in state.items()}
        for name, added in units:
            held = state.setdefault(name, set())
            held |= {unit for unit in added if not ("w" in held and unit[0] in "cr")}
            if "w" in held:
                held -= {unit for unit in held if unit[0] in "cr"}
            if not held:
                del state[name]
        return state

    everything = {name: {"w", "b"} if info.bias else {"w"} for name, info in infos.items()}
    candidates = []  # (relevance, units)
    for kind in kinds:
        if kind == "layer":
            for layer in dict.fromkeys(info.layer for info in infos.values() if info.layer != info.name):
                names = [name for name, info in infos.items() if info.layer == layer]
                total = sum(
                    float(v) for n in names for part, v in relevance[n].items() if part in ("weight", "bias", "norm")
                )
                candidates.append((total, [(name, everything[name]) for name in names]))
        for name in infos:
            found = relevance[name]
            if kind == "module":
                total = sum(float(v) for part, v in found.items() if part in ("weight", "bias", "norm"))
                candidates.append((total, [(name, everything[name])]))
            elif kind == "norm" and "norm" in found:
                candidates.append((float(found["norm"]), [(name, everything[name])]))
            elif kind == "bias" and "bias" in found:
                candidates.append((float(found["bias"]), [(name, {"b"})]))
            elif kind in ("column", "row") and kind in found:
                for i, value in enumerate(found[kind].tolist()):
                    candidates.append((value, [(name, {(kind[0], i)})]))

        for group, head in itertools.product(scores.inventory.attention_heads if kind == "head" else (), range(2)):
            own = range(head * group.head_size, (head + 1) * group.head_size)
            units = {name: {("r", s + i) for s in starts for i in own} for name, starts in group.projections.items()}
            total = sum(float(relevance[n]["row"][i]) for n, of in units.items() for _, i in of)
            units[group.output] = {("c", i) for i in own}
            total += sum(float(relevance[group.output]["column"][i]) for i in own)
            candidates.append((total, list(units.items())))

    if not candidates or min(count(with_unit({}, units)) for _, units in candidates) > limit:
        return None
    state = {}
    for _, units in sorted(candidates, key=lambda c: -(c[0] / count(with_unit({}, c[1])))):  # stable
        following = with_unit(state, units)
        if following != state and count(following) <= limit:
            state = following
    plan = {}
    for name in infos:
        if name in state:
            held = state[name]
            indices = {side: sorted(unit[1] for unit in held if unit[0] == side) for side in "cr"}
            plan[name] = (indices["c"], indices["r"], "w" in held, "b" in held)
    return plan


KINDS = st.permutations(LARGER).flatmap(lambda p: st.integers(1, 6).map(lambda n: p[:n]))


@settings(max_examples=400, deadline=None)
@given(st.integers(0, 10**9), st.integers(1, 100), KINDS, st.booleans())
def test_the_plan_is_that_of_the_slow_rule(seed, percent, kinds, everywhere):
    scores = random_scores(seed)
    limit = max(1, scores.inventory.base_parameters * percent // 100)
    wanted = slow_greedy(scores, limit, kinds, everywhere)
    targets = EVERYWHERE if everywhere else {}
    if wanted is None:
        with pytest.raises(InputError, match=r"has a unit of granularity|raise the budget"):
            select(scores, limit, kinds, **targets)
        return
    plan = select(scores, limit, kinds, **targets)
    assert chosen(plan) == wanted
    assert 0 < plan.parameters <= limit == plan.budget_parameters
    assert chosen(select(scores, limit, kinds, **targets)) == wanted


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10**9), st.integers(1, 16), st.sampled_from(["column", "row", "bias", "module"]))
def test_units_of_one_price_are_the_exact_best(seed, count, kind):
    """Four square maps of one size: the k that fit are the k with the highest scores."""
    rng = random.Random(seed)
    modules = [linear(f"m{i}", 4, 4) for i in range(4)]
    parts = {
        info.name: {
            "column": [rng.random() for _ in range(4)],
            "row": [rng.random() for _ in range(4)],
            "weight": rng.random(),
            "bias": rng.random(),
        }
        for info in modules
    }
    scores = scores_of(modules, parts)
    price = 20 if kind == "module" else 4
    budget = min(count * price + rng.randint(0, price - 1), 80)
    plan = select(scores, budget, kind)
    values = torch.cat([v.reshape(-1) for v in scores.by(kind).values()]).tolist()
    best = sorted(values, reverse=True)[: budget // price]
    taken = []
    for name, module in plan.modules.items():
        found = scores.by(kind)[name].reshape(-1).tolist()
        indices = {"column": module.columns, "row": module.rows}.get(kind, [0])
        taken += [found[i] for i in indices]
    assert sorted(taken, reverse=True) == best
    assert plan.parameters == len(best) * price


def test_price_counts_relevance_per_parameter_decides():
    """A column of 8 weights and relevance 8 comes after a column of 2 weights and relevance 3."""
    modules = [linear("wide", 8, 1, bias=False), linear("small", 2, 2, bias=False)]
    parts = {
        "wide": {"column": [8.0], "row": [1.0] * 8, "weight": 8.0},
        "small": {"column": [3.0, 1.0], "row": [2.0, 2.0], "weight": 4.0},
    }
    scores = scores_of(modules, parts)
    assert chosen(select(scores, 8)) == {"small": ([0, 1], [], False, False)}  # passed over: 8 > 8 - 2
    assert chosen(select(scores, 10)) == {"wide": ([0], [], False, False), "small": ([0], [], False, False)}


def test_ties_go_to_the_earlier_kind_module_and_index():
    modules = [linear("a", 2, 3, bias=False), linear("b", 2, 3, bias=False)]
    parts = {name: {"column": [1.0] * 3, "row": [1.5] * 2, "weight": 3.0} for name in "ab"}
    scores = scores_of(modules, parts)
    assert chosen(select(scores, 4)) == {"a": ([0, 1], [], False, False)}
    assert chosen(select(scores, 8)) == {"a": ([0, 1, 2], [], False, False), "b": ([0], [], False, False)}
    assert chosen(select(scores, 3, ["column", "row"])) == {"a": ([0], [], False, False)}
    assert chosen(select(scores, 3, ["row", "column"])) == {"a": ([], [0], False, False)}


BLOCK = [linear("h.0.a", 2, 2, layer="h.0"), norm("h.0.n", 2, layer="h.0"), linear("last", 2, 2)]


def block_scores(a, n=0.0, last=0.0):
    zeros = {"column": [0.0, 0.0], "row": [0.0, 0.0], "weight": 0.0, "bias": 0.0}
    return scores_of(BLOCK, {"h.0.a": {**zeros, **a}, "h.0.n": {"norm": n}, "last": {**zeros, "weight": last}})


def test_a_whole_module_takes_the_place_of_its_parts_at_no_double_price():
    # Column 0 (8 per weight), then the bias (6), then the module (5), which costs 6 in all.
    scores = block_scores({"column": [16.0, 0.0], "bias": 12.0, "weight": 18.0}, last=12.0)
    kinds = ["column", "bias", "module"]
    assert chosen(select(scores, 2, kinds)) == {"h.0.a": ([0], [], False, False)}
    assert chosen(select(scores, 4, kinds)) == {"h.0.a": ([0], [], False, True)}
    plan = select(scores, 6, kinds)
    assert chosen(plan) == {"h.0.a": ([], [], True, True)} and plan.parameters == 6
    # What the module gave back pays for the next: the second whole module fits in 12.
    assert chosen(select(scores, 12, kinds, **EVERYWHERE)) == {
        "h.0.a": ([], [], True, True),
        "last": ([], [], True, True),
    }


def test_a_layer_takes_the_place_of_columns_rows_and_norms():
    scores = block_scores({"column": [16.0, 15.0], "row": [14.0, 0.0], "weight": 20.0}, n=20.0)
    kinds = ["column", "row", "norm", "layer"]
    # After both columns and a row 1 parameter of 7 is left: neither norm nor layer fit.
    assert chosen(select(scores, 7, kinds)) == {"h.0.a": ([0, 1], [0], False, False)}
    plan = select(scores, 10, kinds)
    assert chosen(plan) == {"h.0.a": ([], [], True, True), "h.0.n": ([], [], True, True)}
    assert plan.parameters == 10


def test_double_held_cells_give_way_to_the_whole_weight_at_the_same_price():
    """One column and one row of a 2 × 2 map without bias cost as much as the map: the map covers more."""
    modules = [linear("a", 2, 2, bias=False)]
    scores = scores_of(modules, {"a": {"column": [9.0, 0.0], "row": [9.0, 0.0], "weight": 9.0}})
    plan = select(scores, 4, ["column", "row", "module"])
    assert chosen(plan) == {"a": ([], [], True, False)} and plan.parameters == 4


def test_a_bias_in_a_chosen_module_costs_nothing_more():
    scores = block_scores({"weight": 60.0, "bias": 1.0}, last=6.0)
    plan = select(scores, 8, ["module", "bias"], **EVERYWHERE)
    # The module for 6 holds its bias; the 2 that are left go to the other module's bias.
    assert chosen(plan) == {"h.0.a": ([], [], True, True), "last": ([], [], False, True)}


@pytest.mark.parametrize("kinds", [["module"], ["layer", "module"], ["column", "bias", "norm"], LARGER])
def test_all_of_the_budget_trains_all_units(kinds):
    scores = measure(tiny_sequential(), [data_for(tiny_sequential())])
    assert select(scores, "100%", [*kinds, "module"]).parameters == scores.inventory.base_parameters
    scores = measure(tiny_bert(), [data_for(tiny_bert())])
    plan = select(scores, "100%", kinds, **EVERYWHERE)
    assert plan.parameters == scores.inventory.base_parameters
    assert list(plan.modules) == [info.name for info in scores.inventory.modules]


def test_too_small_a_budget_names_the_smallest_unit():
    scores = block_scores({})
    with pytest.raises(InputError, match=r"allows 1 parameters.*smallest column has 2"):
        select(scores, 1)
    with pytest.raises(InputError, match=r"smallest layer or module has 4"):
        select(scores, 3, ["layer", "module"])


def test_unknown_and_absent_granularities_and_criteria():
    scores = block_scores({})
    with pytest.raises(InputError, match=r"'columns' is unknown; did you mean 'column'"):
        select(scores, 4, "columns")
    with pytest.raises(InputError, match="no granularity"):
        select(scores, 4, [])
    with pytest.raises(InputError, match="'gradient' was not measured"):
        select(scores, 4, criterion="gradient")
    with pytest.raises(InputError, match="has a unit of granularity norm"):
        select(scores, 4, "norm", exclude_modules=["h.0.n"])
    with pytest.raises(InputError, match="'abc' is no number"):
        select(scores, "abc")


def test_targets_and_exclusions():
    scores = measure(tiny_bert(), [data_for(tiny_bert())])
    plan = select(scores, "50%", target_modules=["query", "intermediate"], exclude_modules=["layer.0"])
    assert list(plan.modules) == [
        f"bert.encoder.layer.1.{place}" for place in ("attention.self.query", "intermediate.dense")
    ]
    # A layer is chosen whole or not at all.
    plan = select(scores, "100%", ["layer"], exclude_modules=[r".*layer\.1\..*key"])
    assert all(name.startswith("bert.encoder.layer.0.") for name in plan.modules)
    with pytest.raises(InputError, match=r"'quary' matches no module.*'query'"):
        select(scores, "50%", target_modules=["quary"])
    assert select(scores, "5%", target_modules="query").parameters > 0


def test_the_criterion_decides():
    model = tiny_bert()
    scores = measure(model, [data_for(model)], None, ["depth", "fisher"])
    fields = {**EVERYWHERE, "exclude_modules": ["embeddings"]}
    by_default = select(scores, "5%", **fields)
    by_fisher = select(scores, "5%", criterion="fisher", **fields)
    assert (by_default.criterion, by_fisher.criterion) == ("depth", "fisher")
    # The deepest modules go first, and Fisher's order is another.
    assert list(by_default.modules) == ["bert.pooler.dense", "classifier"]
    assert list(by_fisher.modules) != list(by_default.modules)


def test_modules_outside_the_layers_compete_only_when_named():
    scores = measure(tiny_bert(), [data_for(tiny_bert())], criteria=["depth"])
    embeddings = [f"bert.embeddings.{name}_embeddings" for name in ("word", "position", "token_type")]
    outside = [*embeddings, "bert.embeddings.LayerNorm", "bert.pooler.dense", "classifier"]
    kinds = ["column", "norm"]
    assert not set(outside) & set(select(scores, "100%", kinds).modules)
    assert not set(outside) & set(select(scores, "100%", kinds, exclude_modules=["query"]).modules)
    assert list(select(scores, "100%", kinds, target_modules=["pooler", "query"]).modules)[-1] == outside[-2]
    # Where nothing else may be chosen, they may.
    assert set(select(scores, "100%", kinds, exclude_modules=["encoder"]).modules) == set(outside)


def test_what_a_plan_says_of_itself():
    scores = measure(tiny_bert(), [data_for(tiny_bert())], always_trained=["classifier"])
    plan = select(scores, "1%", ["column", "bias", "norm"], task_type="SEQ_CLS")
    assert isinstance(plan, Plan) and all(isinstance(m, ModulePlan) for m in plan.modules.values())
    assert (plan.budget, plan.granularity) == ("1%", ["column", "bias", "norm"])
    assert plan.budget_parameters == scores.inventory.base_parameters // 100
    assert plan.fingerprint == scores.fingerprint and plan.always_trained == ["classifier"]
    assert plan.head_parameters == 3 * 16 + 3
    assert (plan.model_name_or_path, plan.task_type) == ("BertForSequenceClassification", "SEQ_CLS")
    by_layer = plan.by_layer({info.name: info.layer for info in scores.inventory.modules})
    assert sum(by_layer.values()) == plan.parameters
    assert list(by_layer) == list(dict.fromkeys(info.layer for info in scores.inventory.modules))
    assert str(plan) == "\n".join(plan.describe())
    lines = " ".join(plan.describe())
    assert f"{plan.parameters:,} trainable parameters" in lines
    assert f"the backward pass ends at {next(iter(plan.modules))}" in lines
    assert plan.adapter_bytes() == 4 * (plan.parameters + 51) + 8 * plan.indices


def test_a_saved_artefact_selects_the_same(tmp_path):
    scores = measure(tiny_bert(), [data_for(tiny_bert())])
    scores.save(tmp_path)
    kinds = ["row", "module", "column"]
    first = select(scores, "20%", kinds)
    assert dataclasses.asdict(first) == dataclasses.asdict(select(RelevanceScores.load(tmp_path), "20%", kinds))


def test_units_that_harm_are_never_taken():
    modules = [linear("b.0.m", 2, 4, layer="b.0"), linear("b.1.m", 2, 1, layer="b.1")]
    parts = {"b.0.m": {"column": [3, -1, 0, -8]}, "b.1.m": {"column": [-2]}}
    plan = select(scores_of(modules, parts), 12, "column")
    assert chosen(plan) == {"b.0.m": ([0, 2], [], False, False)}
    parts = {"b.0.m": {"column": [-3, -1, -2, -8]}, "b.1.m": {"column": [-2]}}
    with pytest.raises(InputError, match="fisher gives every column a negative score; select by another"):
        select(scores_of(modules, parts), 12, "column")


def test_a_unit_of_which_a_part_cannot_be_trained_is_not_chosen(monkeypatch):
    """Of a head, whose rows and columns lie in several modules, too."""
    monkeypatch.setattr(type(layer_type("embedding")), "trains", frozenset({"row"}))
    embedding = dataclasses.replace(linear("b.0.e", 4, 2, False, "b.0"), layer_type="embedding")
    modules = [embedding, linear("b.0.q", 2, 2, False, "b.0"), linear("b.0.o", 2, 2, False, "b.0")]
    parts = {info.name: {"column": [5.0, 5.0], "row": [5.0] * info.rows} for info in modules}
    scores = scores_of(modules, parts)
    assert list(select(scores, "100%", "column").modules) == ["b.0.q", "b.0.o"]
    assert list(select(scores, "100%", "row").modules) == ["b.0.e", "b.0.q", "b.0.o"]
    heads = {output: HeadGroup("b.0.attn", "b.0", 2, 1, output, {"b.0.q": [0]}) for output in ("b.0.o", "b.0.e")}
    for output, can in (("b.0.o", True), ("b.0.e", False)):
        scores.inventory.attention_heads = [heads[output]]
        if can:
            assert list(select(scores, "100%", "head").modules) == ["b.0.q", "b.0.o"]
        else:
            with pytest.raises(InputError, match="has a unit of granularity head"):
                select(scores, "100%", "head")


@pytest.mark.parametrize("kind", ["column", "element"])
def test_scores_of_zero_are_scores(kind):
    scores = scores_of([linear("a", 2, 2, bias=False)], {"a": {"column": [0.0, -1.0], "element": [[0, -1], [0, -1]]}})
    plan = select(scores, 4, kind)
    assert (plan.modules["a"].columns or list(plan.modules["a"].elements)) == ([0] if kind == "column" else [0, 2])


# Single weights


def element_scores(seed, dtype=torch.float32):
    """Two to five small maps and norms with whole scores for every weight, negative ones among them."""
    rng = random.Random(seed)
    modules, parts = [], {}
    for i in range(rng.randint(2, 5)):
        bias = rng.random() < 0.7
        if rng.random() < 0.3:
            modules.append(norm(f"m{i}", rng.randint(1, 4), bias))
            parts[f"m{i}"] = {"norm": rng.randint(-2, 9), "element": [0.0] * modules[-1].shape[0]}
        else:
            out, wide = rng.randint(1, 4), rng.randint(1, 4)
            modules.append(linear(f"m{i}", out, wide, bias))
            parts[f"m{i}"] = {"element": [[rng.randint(-2, 9) for _ in range(wide)] for _ in range(out)]}
            parts[f"m{i}"] |= {"bias": rng.randint(-9, 20)} if bias else {}
    scores = scores_of(modules, parts, 100)
    for found in scores.parts["fisher"].values():
        found["element"] = found["element"].to(dtype)
    return scores


@settings(max_examples=200, deadline=None)
@given(
    st.integers(0, 10**9),
    st.integers(1, 40),
    st.permutations(["element", "bias", "norm"]),
    st.integers(1, 3),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_elements_are_taken_by_the_same_rule(seed, limit, kinds, count, dtype):
    scores = element_scores(seed, dtype)
    kinds = (
        ["element", *(k for k in kinds if k != "element")][:count] if "element" not in kinds[:count] else kinds[:count]
    )
    units = []  # (worth per parameter, price, module, what)
    for kind in kinds:
        for info in scores.inventory.modules:
            found = scores.parts["fisher"][info.name]
            if kind == "element" and info.layer_type == "linear":
                units += [(v, 1, info.name, i) for i, v in enumerate(found["element"].flatten().tolist())]
            elif kind == "bias" and "bias" in found:
                units.append((float(found["bias"]) / info.shape[0], info.shape[0], info.name, kind))
            elif kind == "norm" and "norm" in found:
                price = info.shape[0] * (2 if info.bias else 1)
                units.append((float(found["norm"]) / price, price, info.name, kind))
    wanted, used = {}, 0
    for worth, price, name, what in sorted(units, key=lambda unit: -unit[0]):
        if worth >= 0 and used + price <= limit:
            wanted.setdefault(name, []).append(what)
            used += price
    if not wanted:
        with pytest.raises(InputError, match=r"unit of granularity|negative score|raise the budget"):
            select(scores, limit, kinds)
        return
    plan = select(scores, limit, kinds)
    found = {
        name: [*m.elements, *(["norm"] if m.weight else ["bias"] if m.bias else [])] for name, m in plan.modules.items()
    }
    assert found == {
        name: sorted(w for w in of if isinstance(w, int)) + [w for w in of if isinstance(w, str)]
        for name, of in wanted.items()
    }
    assert plan.parameters == used


def test_elements_do_not_go_with_larger_units_or_without_scores():
    scores = element_scores(0)
    for kind in ("column", "row", "head", "module", "layer"):
        with pytest.raises(InputError, match=f"element cannot compete with {kind}"):
            select(scores, 5, ["element", kind])
    for found in scores.parts["fisher"].values():
        del found["element"]
    with pytest.raises(InputError, match="measured without single weights here; analyze again with elements"):
        select(scores, 5, "element")
    scores.parts["spectral_snr"] = scores.parts.pop("fisher")
    with pytest.raises(InputError, match=r"spectral_snr scores no element, only layer, .*choose that granularity"):
        select(scores, 5, "element")


def test_a_plan_of_elements_from_measured_scores_is_the_best_that_fits(tmp_path):
    scores = measure(tiny_bert(), [data_for(tiny_bert())], elements=True)
    scores.save(tmp_path)
    plan = select(RelevanceScores.load(tmp_path), "1%", "element")
    assert plan.parameters == plan.budget_parameters == plan.indices
    kept, left = [], []
    for info in scores.inventory.modules:
        if info.layer_type == "linear" and info.in_block:
            chosen = torch.zeros(info.weight_parameters, dtype=torch.bool)
            chosen[list(plan.modules[info.name].elements) if info.name in plan.modules else []] = True
            values = scores.by("element")[info.name].flatten()
            kept, left = [*kept, *values[chosen].tolist()], [*left, *values[~chosen].tolist()]
    assert min(kept) >= max(left) and len(kept) == plan.parameters
    assert f"{plan.parameters:,} single weights in" in plan.describe()[0]
    plan.save(tmp_path)
    assert Plan.load(tmp_path) == plan


def test_elements_are_of_linear_maps_however_they_are_stored():
    modules = [
        ModuleInfo(kind, kind, kind, 0, (2, 3), False)
        for kind in ("embedding", "linear", "conv1d", "router", "experts")
    ]
    scores = scores_of(modules, {info.name: {"element": [[1, 2, 9], [4, 5, 6]]} for info in modules})
    plan = select(scores, 4, "element")
    assert {name: list(m.elements) for name, m in plan.modules.items()} == {"linear": [2, 5], "conv1d": [2, 5]}
    with pytest.raises(InputError, match="has a unit of granularity element"):
        select(scores, 4, "element", target_modules=["embedding"])


# Spread


@pytest.mark.parametrize("kind", ["column", "row", "element", ["column", "row"]])
def test_spread_evenly_every_module_keeps_its_own_share(kind):
    scores = measure(tiny_bert(), [data_for(tiny_bert())], elements=True)
    plan = select(scores, "30%", kind, spread="even")
    maps = [info for info in scores.inventory.modules if info.layer_type == "linear" and info.in_block]
    assert list(plan.modules) == [info.name for info in maps] and plan.spread == "even"
    assert "the same share of every module" in plan.describe()[0]
    total = sum(info.weight_parameters for info in maps)
    for info in maps:
        share = plan.budget_parameters * info.weight_parameters // total
        alone = select(scores, share, kind, target_modules=[info.name])
        assert plan.modules[info.name] == alone.modules[info.name]
    assert plan.parameters <= plan.budget_parameters
    assert select(scores, "30%", kind).modules != plan.modules


def test_every_spread_has_its_rule():
    assert list(SPREADS) == list(SPREAD_OUT)


def test_spread_names_what_it_cannot_spread():
    scores = measure(tiny_bert(), [data_for(tiny_bert())])
    with pytest.raises(InputError, match=r"spread even is for column, row, element.*granularity module"):
        select(scores, "30%", ["column", "module"], spread="even")
    with pytest.raises(InputError, match="'evenly' is unknown; did you mean 'even'"):
        select(scores, "30%", spread="evenly")
    with pytest.raises(InputError, match="spread evenly allows less than one column in each of 12 modules"):
        select(scores, 100, "column", spread="even")


def test_spread_over_columns_no_column_has_a_second_weight_before_every_one_has_its_first():
    scores = measure(tiny_bert(), [data_for(tiny_bert())], elements=True)
    plan = select(scores, "8%", "element", spread="columns")
    maps = [info for info in scores.inventory.modules if info.layer_type == "linear" and info.in_block]
    assert list(plan.modules) == [info.name for info in maps] and plan.spread == "columns"
    assert "the same share of every module, the best of each column first" in plan.describe()[0]
    total = sum(info.weight_parameters for info in maps)
    for info in maps:
        elements = list(plan.modules[info.name].elements)
        assert len(elements) == plan.budget_parameters * info.weight_parameters // total
        own = (
            torch.zeros(info.shape, dtype=torch.bool)
            .view(-1)
            .index_fill(0, torch.tensor(elements), True)
            .view(info.shape)
        )
        counts = own.sum(0)
        assert counts.max() - counts.min() <= 1 and counts.max() > 0
        values = scores.by("element")[info.name]
        for column, chosen_of, count in zip(values.T, own.T, counts.tolist(), strict=True):
            assert sorted(column[chosen_of].tolist()) == sorted(column.tolist())[len(column) - count :]
        last = [float(values[:, j][own[:, j]].min()) for j in range(info.columns) if counts[j] == counts.max()]
        following = [float(values[:, j][~own[:, j]].max()) for j in range(info.columns) if counts[j] < counts.max()]
        assert not following or min(last) >= max(following)
    assert select(scores, "8%", "element", spread="even").modules != plan.modules
    for kinds in ("column", ["element", "bias"]):
        with pytest.raises(InputError, match="spread columns is for granularity element alone"):
            select(scores, "8%", kinds, spread="columns")
    with pytest.raises(InputError, match="spread evenly allows less than one single weight in each of 12 modules"):
        select(scores, 1, "element", spread="columns")


# Directions


def direction_scores(seed=0, kept=3):
    """Three maps, one outside the blocks, with so many directions each; singular values descend."""
    g = torch.Generator().manual_seed(seed)
    modules = [linear("b.0.wide", 8, 5, layer="b.0"), linear("b.0.tall", 4, 6, layer="b.0"), linear("pooler", 3, 5)]
    parts = {}
    for info in modules:
        values = torch.rand(kept, generator=g).sort(descending=True).values
        parts[info.name] = {
            "direction": values.tolist(),
            "direction_vectors": torch.rand(kept, info.columns, generator=g).tolist(),
        }
    scores = scores_of(modules, parts, 1000)
    scores.parts["movement"] = scores.parts.pop("fisher")
    return scores


def test_directions_cost_their_outputs_and_come_by_singular_value_per_number():
    scores = direction_scores()
    values = {name: parts["direction"] for name, parts in scores.parts["movement"].items()}
    for limit in range(4, 40):
        plan = select(scores, limit, "direction")
        units = sorted(
            (
                (-float(v) / rows, rows, name, i)
                for name, rows in (("b.0.wide", 8), ("b.0.tall", 4))
                for i, v in enumerate(values[name])
            ),
            key=lambda unit: unit[0],
        )
        wanted, used = {}, 0
        for _, price, name, i in units:
            if used + price <= limit:
                wanted.setdefault(name, []).append(i)
                used += price
        assert {name: m.directions for name, m in plan.modules.items()} == {n: sorted(i) for n, i in wanted.items()}
        assert plan.parameters == used == sum(m.shape[0] * len(m.directions) for m in plan.modules.values())
        for name, module in plan.modules.items():
            vectors = scores.directions("movement")[name]
            assert torch.equal(torch.from_numpy(module.chosen_vectors()), vectors[module.directions])
    assert set(select(scores, 40, "direction", target_modules=["pooler"]).modules) == {"pooler"}
    assert plan.fixed == 3 * 5 + 3 * 6 and plan.adapter_bytes() == 4 * (plan.parameters + plan.fixed)
    words = " ".join(plan.describe())
    assert "6 input directions in 2 modules" in words and "33 numbers of the directions are fixed" in words


def test_directions_spread_evenly_are_the_same_number_of_every_module():
    scores = direction_scores()
    for limit, count in ((12, 1), (23, 1), (24, 2), (36, 3)):
        plan = select(scores, limit, "direction", spread="even")
        assert {name: m.directions for name, m in plan.modules.items()} == {
            name: list(range(count)) for name in ("b.0.wide", "b.0.tall")
        }
    assert "the same number of every module" in plan.describe()[0]
    with pytest.raises(InputError, match=r"allows 4 directions of every module, .* kept 3 .*--probe_directions 4"):
        select(scores, 48, "direction", spread="even")
    with pytest.raises(InputError, match="allows less than one direction in each of 2 modules"):
        select(scores, 11, "direction", spread="even")
    with pytest.raises(InputError, match="the smallest direction has 4"):
        select(scores, 3, "direction")


def test_directions_go_with_nothing_else_and_need_their_criterion():
    scores = direction_scores()
    for kind in ("column", "bias", "element"):
        with pytest.raises(InputError, match=f"direction cannot compete with {kind}"):
            select(scores, 20, ["direction", kind])
    scores.parts["fisher"] = {name: {} for name in scores.parts["movement"]}
    with pytest.raises(InputError, match="fisher scores no direction, only"):
        select(scores, 20, "direction", criterion="fisher")
    for parts in scores.parts["movement"].values():
        parts.clear()
    with pytest.raises(InputError, match="has a unit of granularity direction scored by movement"):
        select(scores, 20, "direction")


def test_measured_directions_are_selected_from_the_saved_artefact(tmp_path):
    scores = measure(tiny_bert(), [data_for(tiny_bert())], criteria=["movement"], options={"movement": {"steps": 3}})
    scores.save(tmp_path)
    again = RelevanceScores.load(tmp_path)
    plan = select(again, "10%", "direction", spread="even")
    assert plan == select(scores, "10%", "direction", spread="even")
    plan.save(tmp_path)
    loaded = Plan.load(tmp_path)
    assert loaded == plan and len({len(m.directions) for m in plan.modules.values()}) == 1
    for name, module in loaded.modules.items():
        assert torch.equal(torch.from_numpy(module.vectors), scores.directions()[name])
