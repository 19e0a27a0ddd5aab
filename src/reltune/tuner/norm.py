"""LayerNorm and the RMSNorm family: the gain and the bias."""

from __future__ import annotations

from reltune.tuner.layer import ReltuneLayer


class ReltuneNorm(ReltuneLayer):
    """Has no columns or rows: gain and bias are trained as tensors of their own."""
