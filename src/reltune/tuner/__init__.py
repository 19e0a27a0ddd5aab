"""A PEFT method, registered from outside PEFT: config, model and layers."""

from reltune.tuner.config import ReltuneConfig
from reltune.tuner.model import ReltuneModel
from reltune.tuner.registration import register

__all__ = ["ReltuneConfig", "ReltuneModel"]

register(ReltuneConfig, ReltuneModel)
