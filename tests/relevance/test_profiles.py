"""Columns in buckets, against plain loops over the scores."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from measured_models import MODELS, tiny_mixtral
from relevance_cases import data_for, lm_batch, measure
from reltune.errors import InputError
from reltune.relevance.profiles import BUCKETS, LEADING, profile, read_profiles


@pytest.mark.parametrize(("columns", "most"), [(1, 8), (7, 8), (8, 8), (9, 8), (100, 8), (37, 36), (5, 1)])
def test_buckets_hold_every_column_once(columns: int, most: int) -> None:
    scores = np.random.default_rng(0).normal(size=columns)
    found = profile(3, 4, scores, 1, most)
    assert (found.row, found.column, found.columns) == (3, 4, columns)
    count = min(columns, most)
    seen = []
    for b in range(count):
        own = range(b * columns // count, (b + 1) * columns // count)
        seen += own
        furthest = max(own, key=lambda i: abs(scores[i]))
        assert found.means[b] == np.float32(sum(scores[i] for i in own) / len(own))
        assert (own[0] + found.offsets[b], found.peaks[b]) == (furthest, np.float32(scores[furthest]))
    assert seen == list(range(columns)) and len(found.means) == count


def saved(tmp_path, model, batch, criteria, loss=None):
    relevance = measure(model, [batch], loss, criteria)
    relevance.save(tmp_path)
    layers = {info.name: info.layer for info in relevance.inventory.modules}
    return relevance, read_profiles(tmp_path, relevance.overview().heatmaps, layers)


def test_what_is_read_is_what_was_measured(tmp_path) -> None:
    model = MODELS["bert"]()
    relevance, profiles = saved(tmp_path, model, data_for(model), ["fisher", "gradient"])
    for criterion, found in zip(relevance.criteria, profiles, strict=True):
        h, by_name = relevance.heatmap(criterion), relevance.by("column", criterion)
        assert len(found.cells) == len(by_name)  # each column is a bucket in a model this small
        for cell in found.cells:
            row, column = h.rows[cell.row], h.columns[cell.column]
            name = row if "outside" in column else f"{row}.{column}"
            assert np.array_equal(cell.peaks, by_name[name].float().numpy()) and cell.modules == 1
            assert cell.means == cell.peaks and not any(cell.offsets)
        every = sorted((abs(float(v)) for scores in by_name.values() for v in scores), reverse=True)
        assert [abs(one.value) for one in found.leading] == pytest.approx(every[:LEADING])


def test_experts_share_a_cell(tmp_path) -> None:
    relevance, (found,) = saved(tmp_path, tiny_mixtral(), lm_batch(), ["fisher"], "causal_lm")
    shared = [cell for cell in found.cells if cell.modules == 4]
    assert shared
    h, by_name = relevance.heatmap("fisher"), relevance.by("column", "fisher")
    for cell in shared:
        place = f"{h.rows[cell.row]}.{h.columns[cell.column]}."
        total = sum(scores.double() for name, scores in by_name.items() if name.startswith(place))
        assert np.array_equal(cell.peaks, total.float().numpy())
        assert float(total.sum()) == pytest.approx(h.values[cell.row][cell.column])


def test_a_large_model_is_aggregated(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("reltune.relevance.profiles.BUCKETS", 60)
    monkeypatch.setattr("reltune.relevance.profiles.LEAST", 2)
    model = MODELS["bert"]()
    _, (found,) = saved(tmp_path, model, data_for(model), ["fisher"])
    assert BUCKETS > 60 and 2 * len(found.cells) <= sum(len(cell.means) for cell in found.cells) <= 60


def test_files_that_are_not_there_or_damaged(tmp_path) -> None:
    model = MODELS["bert"]()
    relevance, _ = saved(tmp_path, model, data_for(model), ["fisher"])
    layers = {info.name: info.layer for info in relevance.inventory.modules}
    heatmaps = relevance.overview().heatmaps
    path = tmp_path / "scores.safetensors"
    assert load_file(path)["fisher/column/bert.pooler.dense"].dtype in (torch.float32, torch.float64)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(InputError, match="cannot be read"):
        read_profiles(tmp_path, heatmaps, layers)
    path.unlink()
    (found,) = read_profiles(tmp_path, heatmaps, layers)
    assert found.cells == [] and found.leading == []
