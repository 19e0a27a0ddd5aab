"""reltune: measure which parameters matter for a task, choose them under a budget, train only those, evaluate.

    relevance = reltune.analyze(model, loader, loss_fn)
    plan = reltune.select(relevance, budget="0.5%", granularity="column")
    model = peft.get_peft_model(model, reltune.ReltuneConfig(plan=plan))

Importing reltune makes PEFT know its adapters; nothing heavy is loaded until it is used.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "analyze": "reltune.relevance.measure",
    "analyze_checkpoint": "reltune.relevance.weights.scan",
    "compare": "reltune.runs.comparison.flow",
    "AnalysisError": "reltune.relevance.measure",
    "RelevanceScores": "reltune.relevance.scores",
    "select": "reltune.plan.selection",
    "Plan": "reltune.plan.plan",
    "lora_config": "reltune.plan.lora",
    "estimate": "reltune.runs.estimate",
    "profile": "reltune.runs.estimate",
    "ReltuneConfig": "reltune.tuner.config",
    "InputError": "reltune.errors",
}
__all__ = [
    "AnalysisError",
    "InputError",
    "Plan",
    "RelevanceScores",
    "ReltuneConfig",
    "__version__",
    "analyze",
    "analyze_checkpoint",
    "compare",
    "estimate",
    "lora_config",
    "profile",
    "select",
]

if TYPE_CHECKING:
    from reltune.errors import AnalysisError, InputError
    from reltune.plan.lora import lora_config
    from reltune.plan.plan import Plan
    from reltune.plan.selection import select
    from reltune.relevance.measure import analyze
    from reltune.relevance.scores import RelevanceScores
    from reltune.relevance.weights.scan import analyze_checkpoint
    from reltune.runs.comparison.flow import compare
    from reltune.runs.estimate import estimate, profile
    from reltune.tuner.config import ReltuneConfig


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'reltune' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


class _RegisterWithPeft(importlib.abc.MetaPathFinder):
    """Registers reltune's adapters at the end of ``import peft``, whenever that happens.

    Importing PEFT here would cost seconds that ``reltune --help`` does not have; not importing it would make
    ``PeftModel.from_pretrained`` fail on a reltune adapter after ``import reltune``.
    """

    looking = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        # Stays in place until PEFT is imported: others only look whether it could be, Transformers among them.
        if fullname != "peft" or self.looking:
            return None
        self.looking = True
        try:
            spec = importlib.util.find_spec("peft")
        finally:
            self.looking = False
        if spec is None or spec.loader is None:
            return spec
        loader, execute = spec.loader, spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            importlib.import_module("reltune.tuner")

        loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if "peft" in sys.modules:
    importlib.import_module("reltune.tuner")
else:
    sys.meta_path.insert(0, _RegisterWithPeft())
