"""Criteria that look at weights alone, against full decompositions; what they make of noise and of planted signals."""

from __future__ import annotations

import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from measured_models import MODELS, Convolutions, tiny_gpt2
from oracles.singular_values import marchenko_pastur_median, parts_of_spectrum, published_parts, reduced
from relevance_cases import measure
from reltune.errors import InputError
from reltune.layers.inventory import take_inventory
from reltune.names import CRITERIA as NAMES
from reltune.names import WITH_DIRECTIONS, WITHOUT_DATA
from reltune.ops.singular_vectors import Decompositions, singular_vectors
from reltune.relevance.criteria import principal, spectral_snr
from reltune.relevance.criteria.contract import granularities_of
from reltune.relevance.criteria.registry import CRITERIA

MODELS = {**MODELS, "gpt2": tiny_gpt2, "convolutions": lambda: Convolutions().double()}


def canonical(module: nn.Module) -> torch.Tensor:
    weight = module.weight.detach()
    return weight.mT if type(module).__name__ == "Conv1D" else weight


def matrices(module: nn.Module) -> list[torch.Tensor]:
    """The module's weight as the matrices that are decomposed."""
    weight = canonical(module)
    if weight.ndim == 4:
        return list(weight.flatten(1).unflatten(0, (module.groups, -1)))
    return [weight]


def by_column(module: nn.Module, features: torch.Tensor) -> torch.Tensor:
    """Numbers per input feature of all groups, added up over a convolution's places in the patch."""
    return features.unflatten(0, (module.in_channels, -1)).sum(1) if isinstance(module, nn.Conv2d) else features


def assert_near(found: torch.Tensor, wanted: torch.Tensor, what: object) -> None:
    assert found.shape == wanted.shape and found.dtype == wanted.dtype, what
    assert (found - wanted).abs().max() <= 1e-9 * wanted.abs().max(), what


def test_the_lists_of_names_agree():
    assert set(NAMES) == set(CRITERIA)
    assert set(WITHOUT_DATA) == {
        name for name, of in CRITERIA.items() if not getattr(of, "NEEDS", True) and not getattr(of, "ELEMENT_NEEDS", ())
    }
    assert set(WITH_DIRECTIONS) == {name for name, of in CRITERIA.items() if "direction" in granularities_of(of)}


@pytest.mark.parametrize("name", MODELS)
def test_spectral_snr_on_every_layer_type(name):
    model = MODELS[name]()
    with torch.no_grad():  # so that signals are seen in matrices this small
        for p in model.parameters():
            if p.ndim > 1:
                flat = p.flatten(1)
                flat += 2 * flat.norm() / min(flat.shape) ** 0.5 * torch.ones_like(flat) / flat.numel() ** 0.5
    found = measure(model, criteria="spectral_snr")
    layers: dict[str, list[float]] = {}
    seen = 0
    for info in found.inventory.modules:
        parts = found.parts["spectral_snr"][info.name]
        if info.layer_type == "norm":
            assert parts == {}
            continue
        module = model.get_submodule(info.name)
        cut = [parts_of_spectrum(matrix) for matrix in matrices(module)]
        signal, noise = (sum(float(group[i].sum()) for group in cut) for i in (0, 1))
        seen += signal > 0
        for part in ("weight", "module"):
            assert float(parts[part]) == pytest.approx(signal / noise, rel=1e-9)
        rows = torch.cat([a.norm(dim=1) / b.norm(dim=1) for *_, a, b in cut])
        squares = [torch.cat([group[i].square().sum(0) for group in cut]) for i in (2, 3)]
        columns = (by_column(module, squares[0]) / by_column(module, squares[1])).sqrt()
        if not all(len(matrix) == 1 for matrix in matrices(module)):  # one row: nothing but noise
            assert_near(parts["row"], rows, info.name)
            assert_near(parts["column"], columns, info.name)
        assert set(parts) == {"weight", "module", "row", "column"}
        if info.in_block:
            sums = layers.setdefault(info.layer, [0.0, 0.0])
            sums[0] += signal
            sums[1] += noise
    assert seen > 2
    for layer, relevance in found.by("layer").items():
        assert float(relevance) == pytest.approx(layers[layer][0] / layers[layer][1], rel=1e-9)
    assert not found.by("bias") and not found.by("norm")


@pytest.mark.parametrize("name", MODELS)
def test_principal_on_every_layer_type(name, monkeypatch):
    monkeypatch.setattr(principal, "SHARE", 5)  # ranks above 1 in matrices this small
    model = MODELS[name]()
    found = measure(model, criteria="principal", elements=True)
    for info in found.inventory.modules:
        parts = found.parts["principal"][info.name]
        if info.layer_type == "norm":
            assert parts == {}
            continue
        module = model.get_submodule(info.name)
        wanted = [reduced(m, max(1, min(m.shape) // 5)).abs() for m in matrices(module)]
        rows = torch.cat([w.sum(1) for w in wanted])
        assert set(parts) == {"weight", "row", "column", "element"}
        assert_near(parts["element"], torch.cat(wanted).reshape(info.shape), info.name)
        assert_near(parts["row"], rows, info.name)
        assert_near(parts["column"], by_column(module, torch.cat([w.sum(0) for w in wanted])), info.name)
        assert_near(parts["weight"], rows.sum(), info.name)


def test_rank_of_principal():
    ranks = [principal.rank(torch.empty(shape)) for shape in [(4096, 14336), (2048, 2048), (384, 1536), (8, 100)]]
    assert ranks == [128, 128, 24, 1]


@given(st.integers(1, 30), st.integers(1, 30), st.integers(0, 2**16))
@settings(max_examples=50, deadline=None)
def test_singular_vectors(rows, columns, seed):
    a = torch.randn(max(rows, columns), min(rows, columns), generator=torch.Generator().manual_seed(seed)).double()
    values, vectors = singular_vectors(a)
    wanted = torch.linalg.svdvals(a)
    assert (values.flip(0) - wanted).abs().max() <= 1e-9 * wanted[0]
    torch.testing.assert_close((a @ vectors).norm(dim=0), values, rtol=0, atol=1e-9 * float(wanted[0]))


@pytest.mark.parametrize(
    ("criteria", "elements"), [(["spectral_snr", "principal"], False), (["principal", "magnitude"], True)]
)
def test_one_decomposition_per_matrix(criteria, elements, monkeypatch):
    made: list[weakref.ref] = []

    def counted(a):
        assert sum(of() is not None for of in made) < most, "vectors of another module are kept"
        found = singular_vectors(a)
        made.append(weakref.ref(found[1]))
        return found

    monkeypatch.setattr("reltune.ops.singular_vectors.singular_vectors", counted)
    model = Convolutions().double()
    decomposed = [info for info in take_inventory(model).modules if info.layer_type != "norm"]
    most = max(info.groups for info in decomposed)
    assert most > 1
    measure(model, criteria=criteria, elements=elements)
    assert len(made) == sum(info.groups for info in decomposed)
    assert not any(of() is not None for of in made)


def test_vectors_go_with_the_weight():
    decompositions = Decompositions()
    weight = torch.eye(3)
    vectors = [weakref.ref(found[2]) for found in decompositions.of(weight, [weight])]
    assert vectors[0]() is not None
    del weight
    assert vectors[0]() is None


@pytest.mark.parametrize("beta", [1.0, 0.7, 0.25, 0.01])
def test_median_of_the_law(beta):
    assert spectral_snr.marchenko_pastur_median(beta) == pytest.approx(marchenko_pastur_median(beta), rel=1e-4)


NOISE = [(1000, 1000), (500, 1000), (300, 3000)]


@pytest.mark.parametrize(("n", "m"), NOISE)
def test_noise_has_no_signal_and_the_published_edge_sees_some(n, m):
    generator = torch.Generator().manual_seed(0)
    noise = 0.02 * torch.randn(n, m, generator=generator, dtype=torch.float64)
    values = torch.linalg.svdvals(noise)
    assert int((values > spectral_snr.edge(values, n, m)).sum()) <= 1
    # the edge is where it belongs, not just far off
    assert values[0] == pytest.approx(spectral_snr.edge(values, n, m), rel=0.02)
    published = published_parts(noise)[0]
    assert len(published) / n == pytest.approx({1000: 0.24, 500: 0.65, 300: 1.0}[n], abs=0.03)


def test_planted_signals_are_found():
    n, m = 300, 3000
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(n, m, generator=generator, dtype=torch.float64)
    left = torch.linalg.qr(torch.randn(n, 5, generator=generator, dtype=torch.float64))[0]
    right = torch.linalg.qr(torch.randn(m, 5, generator=generator, dtype=torch.float64))[0]
    size = 3 * (n**0.5 + m**0.5)
    matrix = noise + size * left @ right.mT
    model = nn.Sequential(nn.Linear(m, n, bias=False)).double()
    model[0].weight.data.copy_(matrix)
    relevance = float(measure(model, criteria="spectral_snr").parts["spectral_snr"]["0"]["weight"])
    values = torch.linalg.svdvals(matrix)
    assert relevance == pytest.approx(float(values[:5].sum() / values[5:].sum()), rel=1e-9)
    assert len(published_parts(matrix)[0]) == n
    model[0].weight.data.mul_(100)
    assert float(measure(model, criteria="spectral_snr").parts["spectral_snr"]["0"]["weight"]) == pytest.approx(
        relevance
    )


def test_no_noise_and_nothing_at_all():
    model = nn.Sequential(nn.Linear(20, 10), nn.Linear(20, 10))
    with torch.no_grad():
        model[0].weight.zero_()[0, 0] = 3.0
        model[1].weight.zero_()
    parts = measure(model, criteria=["spectral_snr", "principal"]).parts
    assert float(parts["spectral_snr"]["0"]["weight"]) == pytest.approx(1 / torch.finfo(torch.float32).eps)
    assert float(parts["principal"]["0"]["weight"]) == pytest.approx(3)
    for criterion in parts:
        assert all(torch.equal(v, torch.zeros_like(v)) for v in parts[criterion]["1"].values())
        assert all(torch.isfinite(v).all() for of in parts[criterion].values() for v in of.values())


def test_half_precision_and_blocks_of_rows(monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 40), nn.Linear(40, 24)).bfloat16()
    wide = nn.Sequential(nn.Linear(24, 40), nn.Linear(40, 24)).double()
    wide.load_state_dict(model.state_dict())
    monkeypatch.setattr("reltune.ops.row_blocks.NUMBERS", 100)
    found = measure(model, criteria=["magnitude", "spectral_snr", "principal"])
    monkeypatch.undo()
    wanted = measure(wide, criteria=["magnitude", "spectral_snr", "principal"])
    for criterion, modules in wanted.parts.items():
        for name, parts in modules.items():
            for part, value in parts.items():
                got = found.parts[criterion][name][part]
                assert got.dtype == torch.float32
                torch.testing.assert_close(got.double(), value, rtol=1e-5, atol=1e-7)


def test_single_weights_have_no_spectrum():
    with pytest.raises(InputError, match=r"spectral_snr.*single weights"):
        measure(nn.Linear(3, 3), criteria=["magnitude", "spectral_snr"], elements=True)
