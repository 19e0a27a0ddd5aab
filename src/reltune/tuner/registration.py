"""Enter a config and a model among PEFT's methods. The only file that knows how.

PEFT has no way in for methods from outside: ``register_peft_method`` wants a member of its ``PeftType`` enum. A
member is made here the way the enum module makes its own, in memory, and nothing of PEFT is edited on disk.
"""

from __future__ import annotations

from typing import Any

from peft import PeftConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import register_peft_method

NAME = "RELTUNE"


def peft_type() -> Any:
    """``PeftType.RELTUNE``, made on the first call."""
    if NAME in PeftType.__members__:
        return PeftType[NAME]
    member = str.__new__(PeftType, NAME)
    member._name_ = NAME
    member._value_ = NAME
    member.__objclass__ = PeftType  # type: ignore[attr-defined]
    member._sort_order_ = len(PeftType.__members__)  # type: ignore[attr-defined]
    PeftType._member_names_.append(NAME)
    PeftType._member_map_[NAME] = member
    PeftType._value2member_map_[NAME] = member
    type.__setattr__(PeftType, NAME, member)
    return member


def register(config_class: type[PeftConfig], model_class: type[BaseTuner]) -> None:
    """Make PEFT know the method by these two classes; calling it again changes nothing."""
    if peft_type() not in PEFT_TYPE_TO_CONFIG_MAPPING:
        register_peft_method(name=NAME.lower(), config_cls=config_class, model_cls=model_class)
