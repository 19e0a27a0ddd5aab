"""A tuned model as it is kept, ready to be used: in a run's directory, or in one that was exported."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from reltune.config.run_config import RunConfig
from reltune.errors import InputError, first_line
from reltune.files import read_json
from reltune.methods.adapter import load_adapter
from reltune.runs import stages
from reltune.runs.directory import ADAPTER_CONFIG, TASK, RunDirectory
from reltune.runs.materials import noting, placement, prepare_export, task_of_run
from reltune.runs.preflight import kept_as
from reltune.tasks.registry import task_of_record
from reltune.tasks.task import Task


@dataclasses.dataclass
class Tuned:
    """A tuned model that is not loaded yet.

    Attributes:
        path: the directory that holds it.
        kept_as: "run"; of exports "adapter", on its base, or "model".
        config: the run's config; of an export what its ``task.json`` says of it.
        asked_in: of an export, how a model that writes was asked in training (``asking.asked_in``).
    """

    path: Path
    kept_as: str
    config: RunConfig
    task: Task
    asked_in: str | None = None

    @classmethod
    def open(cls, path: str | Path) -> Tuned:
        """The model of a run, of a LoRA adapter or merged model that ``reltune export`` wrote.

        Raises InputError for a directory that holds none.
        """
        kind, folder = kept_as(path)
        if kind == "run":
            directory, config = RunDirectory.open(folder)
            return cls(folder, kind, config, task_of_run(config, directory))
        record = read_json(folder / TASK)
        base = str(folder)
        if kind == "adapter":
            base = str(read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path"))
        try:
            config = RunConfig(base, output_dir=str(folder), **record.get("settings", {}))
            task = task_of_record(record, **vars(config))
        except (AttributeError, InputError, TypeError) as error:
            raise InputError(f"{folder / TASK} cannot be used ({first_line(error)}); export the run again.") from error
        return cls(folder, kind, config, task, record.get("asked_in"))

    def load(self, beside_base: bool = False) -> tuple[Any, Any]:
        """The model in evaluation mode on the device that training would use, with its tokenizer.

        Args:
            beside_base: of a run, whether the base model that ``disable_adapter`` gives back has the new heads that relevance was
                measured with, as in an evaluation.
        """
        with noting():
            if self.kept_as == "run":
                directory = RunDirectory(self.path)
                materials = prepare_export(self.config, directory)
                base = stages.model_with_new_heads(materials, directory) if beside_base else None
                model, tokenizer = stages.load_tuned(materials, directory, base), materials.tokenizer
            else:
                tokenizer = self.task.load_tokenizer(self.config.model_name_or_path)
                model, _ = self.task.load_model(self.config.model_name_or_path)
                if self.kept_as == "adapter":
                    model = load_adapter(model, self.path)
        if not getattr(model, "is_quantized", False):  # else it is where it has to be
            model.to(TrainingArguments(output_dir=str(self.path), **placement(self.config)).device)
        return model.eval(), tokenizer
