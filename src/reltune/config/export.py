"""The export: in which form a run hands its result to programs without reltune."""

from __future__ import annotations

import dataclasses
from dataclasses import field

from reltune.config.fields import Subject, about
from reltune.names import EXPORT_FORMS


@dataclasses.dataclass(kw_only=True)
class ExportConfig(Subject):
    """The export: in which form a run hands its result to programs without reltune."""

    export: str | None = field(
        default=None,
        metadata=about(
            "At the end of `reltune run`, also write the tuned model for programs without reltune, into a directory of this name "
            "in the run's: lora, a standard PEFT adapter (of directions, columns, rows and attention heads); merged, a plain model; gguf, one "
            "file for llama.cpp; or ollama, that file with a Modelfile.",
            "FORM",
            tuple(EXPORT_FORMS),
        ),
    )
