"""The base model: which one, and in how many bits it is held."""

from __future__ import annotations

import dataclasses
from dataclasses import field

from reltune.config.fields import Subject, about
from reltune.errors import InputError
from reltune.names import FROZEN_DTYPES


@dataclasses.dataclass
class ModelConfig(Subject):
    """The base model: which one, and in how many bits it is held."""

    model_name_or_path: str = field(
        metadata=about("The pretrained model: a local directory, or an id on the Hugging Face Hub.", "MODEL")
    )
    _: dataclasses.KW_ONLY
    load_in_4bit: bool = field(
        default=False, metadata=about("Load the base model's linear layers in 4 bits (NF4). Needs bitsandbytes.")
    )
    load_in_8bit: bool = field(
        default=False, metadata=about("Load the base model's linear layers in 8 bits. Needs bitsandbytes.")
    )
    frozen_dtype: str | None = field(
        default=None,
        metadata=about(
            f"While training, hold the frozen linear layers in this type: {FROZEN_DTYPES[0]}. docs/float8.md says what "
            "that saves and what it costs.",
            "TYPE",
            FROZEN_DTYPES,
        ),
    )

    @property
    def held_in(self) -> str:
        """In what the base's linear layers are held, in words; "" where it is as the checkpoint has it."""
        bits = "4 bits (NF4)" if self.load_in_4bit else "8 bits" if self.load_in_8bit else ""
        return bits or (f"{self.frozen_dtype} while training" if self.frozen_dtype else "")

    def check(self) -> None:
        super().check()
        if self.load_in_4bit and self.load_in_8bit:
            raise InputError("load_in_4bit and load_in_8bit are both given; choose one.")
