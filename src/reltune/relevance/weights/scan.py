"""Relevance from the weights alone, without the model in memory: each tensor is read, scored and dropped.

Memory beside the scores: the largest tensor in its own dtype, and what the criterion takes for it (``magnitude``: one block
of its rows in float32; ``spectral_snr``, ``principal``: ops/singular_vectors.py; ``elements``: one number per weight of
the whole model, because these are the result). A parameter that loading makes of several tensors (the experts of a mixture)
counts as the tensor that it becomes, and twice while it is made. The scores and the fingerprint are exactly those of the
loaded model.
"""

from __future__ import annotations

import copy
import itertools
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from reltune.errors import InputError
from reltune.layers.fingerprint import fingerprint_of, outside, samples
from reltune.layers.inventory import choose, new_head_modules, take_inventory
from reltune.layers.registry import canonical_weights, layer_type
from reltune.layers.units import ModuleInfo
from reltune.relevance.assembly import Assembly
from reltune.relevance.criteria.context import Context
from reltune.relevance.criteria.contract import Criterion, StatisticalCriterion, needs_data
from reltune.relevance.criteria.registry import check_scores, find_criteria
from reltune.relevance.scores import RelevanceScores, provenance
from reltune.relevance.weights.checkpoint import Checkpoint


def analyze_checkpoint(
    model_name_or_path: str | os.PathLike,
    criteria: str | Criterion | Sequence[str | Criterion] = ("magnitude",),
    *,
    model_class: Any = None,
    elements: bool = False,
    target_modules: str | Sequence[str] = (),
    exclude_modules: str | Sequence[str] = (),
    always_trained: str | Sequence[str] | None = None,
    seed: int = 42,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> RelevanceScores:
    """Measure relevance from the weights of a checkpoint that is never loaded, by criteria that look at no data.

    Args:
        model_name_or_path: a directory that ``save_pretrained`` wrote, or a hub id; safetensors, in one file or several.
        model_class: the transformers class, or Auto class, whose parameters are scored; None means the one in config.json.
            Modules that the checkpoint lacks (a new head) count as ``always_trained``.
        device: where the scores are computed; one tensor at a time is moved there.

    All other arguments are as in ``analyze``.

    Raises:
        InputError: a criterion that needs data, files that are missing or do not fit the config, quantised weights.
    """
    by_name: dict[str, StatisticalCriterion] = {}
    for name, criterion in find_criteria(criteria, elements).items():
        if needs_data(criterion) or not isinstance(criterion, StatisticalCriterion):
            raise InputError(f"criterion {name!r} needs data and so a loaded model; pass the model and a loader.")
        by_name[name] = criterion
    checkpoint = Checkpoint(model_name_or_path, model_class)
    model = checkpoint.model
    heads = checkpoint.heads if always_trained is None else new_head_modules(model, always_trained)
    inventory = take_inventory(model, heads)
    chosen = set(choose(inventory, target_modules, exclude_modules))
    inventory = inventory.only(chosen)

    parameters = dict(model.named_parameters())  # of tied ones the first name, as in the fingerprint
    stored = [name for name in outside(parameters, heads) if name not in checkpoint.missing]
    read: dict[str, tuple[tuple[int, ...], bytes]] = {}

    def take(name: str) -> torch.Tensor:
        tensor = checkpoint.read(name)
        read[name] = tuple(tensor.shape), samples(tensor)
        return tensor.to(device)

    context = Context(0, seed)
    assemblies = {
        name: Assembly(criterion, context, elements, inventory.attention_heads) for name, criterion in by_name.items()
    }
    bar = tqdm(inventory.modules, desc="analyze", unit="module", disable=not progress)
    for (owner, keys), infos in itertools.groupby(bar, lambda info: (info.owner, _parameters(model, info))):
        module = copy.copy(
            model.get_submodule(owner)
        )  # a copy takes the weights, so that the model itself never holds any
        module._parameters = {
            **module._parameters,
            **{key: nn.Parameter(take(f"{owner}.{key}" if owner else key), requires_grad=False) for key in keys},
        }
        for info in infos:
            weights = canonical_weights(info, module)
            for assembly in assemblies.values():
                assembly.add(info, weights, {})
        del module, weights
    for name in stored:
        if name not in read:
            take(name)

    scores = {name: assembly.finished() for name, assembly in assemblies.items()}
    check_scores(scores, inventory.modules)
    facts = provenance(model, checkpoint.name, 0, "", seed)
    return RelevanceScores(scores, inventory, heads, fingerprint_of(read), facts)


def _parameters(model: nn.Module, info: ModuleInfo) -> tuple[str, ...]:
    """The parameters of the module's owner that hold its weights."""
    return layer_type(info.layer_type).parameters(info, model.get_submodule(info.owner))
