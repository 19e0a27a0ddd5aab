"""Kernels of the operators. Importing one in Triton imports Triton, which only installations for a GPU have."""

from __future__ import annotations

import importlib.util


def can_be_imported() -> bool:
    """Whether Triton is installed. Ask before importing a kernel."""
    return importlib.util.find_spec("triton") is not None
