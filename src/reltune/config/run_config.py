"""Everything that decides a run, as one dataclass; its fields' metadata is all that flags, YAML and the schema know."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from dataclasses import field
from pathlib import Path
from typing import Any

import yaml

from reltune.config.parsing import checked_kinds
from reltune.errors import InputError, nearest
from reltune.files import write_text
from reltune.names import (
    CRITERIA,
    DATASETS,
    FROZEN_DTYPES,
    GRANULARITIES,
    ON_BAD_ROWS,
    PREFERENCE_LOSSES,
    SPREADS,
    TASKS,
    WITHOUT_DATA,
)
from reltune.relevance.entry_points import criterion_of_package, known_criteria


def _about(help: str, metavar: str = "", choices: Sequence[str] = (), **more: Any) -> dict[str, Any]:
    """What a field's flag, the commented defaults and the JSON Schema say of it.

    Args:
        help: one line.
        metavar: what stands for the value in a flag's help.
        choices: the words that it can be, or that a list can hold.
        more: ``least`` of a number, ``most`` of a number, ``above`` which it must be.
    """
    return {"help": help, "metavar": metavar, "choices": tuple(choices), **more}


@dataclasses.dataclass
class RunConfig:
    """Everything that decides a run; saved as ``config.yaml`` in the run directory.

    Field names follow transformers and TRL where they have them. ``training`` holds fields of
    ``transformers.TrainingArguments`` as the user gave them. The metadata of a field is all that its flag, the commented
    defaults and the JSON Schema know of it.
    """

    model_name_or_path: str = field(metadata=_about("Model directory or hub id.", "MODEL"))
    output_dir: str = field(metadata=_about("Directory of the run; new or empty.", "DIR"))
    train_file: str | None = field(
        default=None,
        metadata=_about(
            "CSV, TSV, JSONL, JSON, Parquet, a directory that datasets saved, or a folder of images. Not needed where all "
            f"criteria are of {', '.join(WITHOUT_DATA)}: these are measured from the model's files, never loaded whole.",
            "PATH",
        ),
    )
    dataset_name: str | None = field(
        default=None,
        metadata=_about(
            f"In place of a file, a data set in an installed package ({', '.join(DATASETS)}) or of the Hugging Face Hub.",
            "NAME",
        ),
    )
    dataset_config: str | None = field(
        default=None, metadata=_about("Which variant of dataset_name; for reasoning_gym its task.", "NAME")
    )
    dataset_path: str | None = field(
        default=None, metadata=_about("Where dataset_name lies, if pip does not install its files.", "PATH")
    )
    validation_file: str | None = field(
        default=None, metadata=_about("Split off the training data when not given.", "PATH")
    )
    test_file: str | None = field(default=None, metadata=_about("Split off the training data when not given.", "PATH"))
    task: str | None = field(
        default=None, metadata=_about(f"One of {', '.join(TASKS)}; read off the columns when not given.", "TASK", TASKS)
    )
    text_column: str = field(default="text", metadata=_about("What your data call the text.", "NAME"))
    label_column: str = field(default="label", metadata=_about("What your data call the label.", "NAME"))
    encoding: str = field(default="utf-8", metadata=_about("Of text files; a BOM is understood.", "NAME"))
    on_bad_rows: str = field(
        default="error",
        metadata=_about("error: refuse data with bad rows; skip: leave them out and say so.", "HOW", ON_BAD_ROWS),
    )
    streaming: bool = field(
        default=False, metadata=_about("Read training rows when they are needed and keep none; asks for max_steps.")
    )
    max_length: int = field(default=128, metadata=_about("Tokens per example; longer ones are cut.", "N", least=1))
    completion_only_loss: bool | None = field(
        default=None,
        metadata=_about("Of causal_lm: leave prompts out of the loss; by default where rows have some."),
    )
    packing: bool = field(default=False, metadata=_about("Of causal_lm: join examples to full sequences for training."))
    max_new_tokens: int = field(
        default=64, metadata=_about("Tokens that a language model may write per example, in evaluation.", "N", least=1)
    )
    generation_examples: int = field(
        default=64,
        metadata=_about("Of causal_lm: examples per held-out set for which it writes, at most.", "N", least=0),
    )
    report_examples: int = field(
        default=8,
        metadata=_about("Of causal_lm and seq2seq: outputs that the report shows side by side, at most.", "N", least=0),
    )
    beta: float = field(
        default=0.1,
        metadata=_about("Of preference: how much of a reward a change of log probability is.", "N", above=0),
    )
    loss_type: str = field(
        default="sigmoid",
        metadata=_about("Of preference: the loss of a pair, under TRL's names.", "NAME", PREFERENCE_LOSSES),
    )
    forgetting_file: str | None = field(
        default=None,
        metadata=_about("A second, untouched set for the same task: measured before training and after it.", "PATH"),
    )
    lm_eval_tasks: list[str] = field(
        default_factory=list,
        metadata=_about(
            "Tasks of lm-evaluation-harness (names, YAML files, directories of them) that evaluation measures the base and the "
            "tuned language model on too.",
            "NAMES",
        ),
    )
    lm_eval_num_fewshot: int | None = field(
        default=None, metadata=_about("Of lm_eval_tasks: examples in a prompt, in place of a task's own.", "N", least=0)
    )
    lm_eval_limit: int | None = field(
        default=None, metadata=_about("Of lm_eval_tasks: examples per task, at most.", "N", least=1)
    )
    lm_eval_batch_size: int = field(
        default=8, metadata=_about("Of lm_eval_tasks: requests per forward pass.", "N", least=1)
    )
    lm_eval_apply_chat_template: bool = field(
        default=False, metadata=_about("Of lm_eval_tasks: give prompts as turns of a chat.")
    )
    load_in_4bit: bool = field(
        default=False, metadata=_about("Hold the base model's linear maps in 4 bits (NF4), by bitsandbytes.")
    )
    load_in_8bit: bool = field(default=False, metadata=_about("Likewise, in 8 bits."))
    early_stopping_patience: int | None = field(
        default=None,
        metadata=_about(
            "End training after so many evaluations without a better one, and keep the best.", "N", least=1
        ),
    )
    sweep: dict[str, list[str]] = field(
        default_factory=dict,
        metadata=_about(
            "Train once per value of a field of training (or of budget) and keep the best on validation data: values with "
            "commas between, or a range to draw from. Again for another field: all combinations. docs/sweeps.md.",
            "FIELD=1e-4,1e-3 or FIELD=1e-4..1e-2",
        ),
    )
    sweep_trials: int | None = field(
        default=None,
        metadata=_about("Where ranges are swept: how often to draw and train; 20 by default.", "N", least=1),
    )
    budget: str = field(
        default="0.5%",
        metadata=_about("Trainable parameters: a share of the base model (0.5%) or a count (100k).", "BUDGET"),
    )
    criteria: list[str] = field(
        default_factory=lambda: ["fisher"],
        metadata=_about(
            f"One or several of {', '.join(CRITERIA)}, or an installed package's; the first selects.", "NAMES"
        ),
    )
    granularity: list[str] = field(
        default_factory=lambda: ["column"],
        metadata=_about(
            f"One or several of {', '.join(GRANULARITIES)} (element: with bias and norm only).", "NAMES", GRANULARITIES
        ),
    )
    spread: str = field(
        default="global",
        metadata=_about(
            f"{SPREADS[0]}: the best units of the whole model; {SPREADS[1]}: the same share of every module.",
            "HOW",
            SPREADS,
        ),
    )
    target_modules: list[str] = field(
        default_factory=list, metadata=_about("Parts of module names (query, layer.5) or a regex.", "NAMES")
    )
    exclude_modules: list[str] = field(default_factory=list, metadata=_about("Likewise, to leave out.", "NAMES"))
    head_epochs: float = field(
        default=1.0, metadata=_about("Epochs that a new head is trained for before the analysis.", "N", least=0)
    )
    analysis_examples: int = field(
        default=1024, metadata=_about("Examples that relevance is measured on, at most.", "N", least=1)
    )
    analysis_batch_size: int = field(default=32, metadata=_about("Examples per batch of the analysis.", "N", least=1))
    max_trials: int = field(
        default=400, metadata=_about("Of criterion correlation: passes per kind of unit, at most.", "N", least=4)
    )
    probe_steps: int = field(
        default=50, metadata=_about("Of criterion movement: steps of full tuning, rewound.", "N", least=1)
    )
    elements: bool = field(
        default=False,
        metadata=_about(
            "Score every single weight too, for `select --granularity element`: one number per weight and criterion."
        ),
    )
    frozen_dtype: str | None = field(
        default=None,
        metadata=_about(
            f"What the frozen linear maps are held in while training: {FROZEN_DTYPES[0]}. docs/float8.md has what it costs.",
            "TYPE",
            FROZEN_DTYPES,
        ),
    )
    seed: int = field(default=42, metadata=_about("Of splits, heads and training.", "N", least=0, most=2**32 - 1))
    training: dict[str, Any] = field(
        default_factory=dict,
        metadata=_about("Fields of transformers.TrainingArguments; they may stand outside it too."),
    )

    @property
    def scores_elements(self) -> bool:
        """Whether the analysis scores single weights: when told to, and when they are to be chosen."""
        return self.elements or "element" in self.granularity

    @property
    def has_data(self) -> bool:
        """Whether it names data to train on; without, only criteria that look at the weights alone can be measured."""
        return self.train_file is not None or self.dataset_name is not None

    def check_data(self) -> None:
        """Raise InputError unless the config says what to train on."""
        if (self.train_file is None) == (self.dataset_name is None):
            raise InputError("exactly one of train_file and dataset_name says what to train on; give one of them.")

    def check(self) -> None:
        """Raise InputError for values that no later stage could use. Of files it reads the run's own scores at most."""
        for about in dataclasses.fields(self):
            name, value = about.name, getattr(self, about.name)
            for word in value if isinstance(value, list) else [] if value is None else [value]:
                if about.metadata["choices"] and word not in about.metadata["choices"]:
                    raise InputError(f"{name} {word!r} is unknown; {nearest(str(word), about.metadata['choices'])}")
            if "least" in about.metadata and value is not None and value < about.metadata["least"]:
                raise InputError(f"{name} is {value}; it must be at least {about.metadata['least']}.")
            if "above" in about.metadata and not value > about.metadata["above"]:
                raise InputError(f"{name} is {value}; it must be above {about.metadata['above']}.")
        for name, known in (("criteria", CRITERIA), ("granularity", GRANULARITIES)):
            if not getattr(self, name):
                raise InputError(f"{name} is empty; name at least one of {', '.join(known)}.")
        for value in self.criteria:
            if criterion_of_package(value) is None and value not in CRITERIA and value not in self._measured():
                raise InputError(f"criteria {value!r} is unknown; {nearest(value, known_criteria())}")
        held_out = self.validation_file is not None or self.test_file is not None
        if self.has_data or held_out or not set(self.criteria) <= set(WITHOUT_DATA):
            self.check_data()
        if self.load_in_4bit and self.load_in_8bit:
            raise InputError("load_in_4bit and load_in_8bit are both given; choose one.")
        if not isinstance(self.training, dict):
            raise InputError(
                f"training holds no mapping but {self.training!r}; write fields of transformers.TrainingArguments."
            )

        if self.sweep_trials is not None and not self.sweep:
            raise InputError(
                "sweep_trials says how often to draw from a range, and nothing is swept; give a sweep too."
            )
        if twice := [name for name in self.sweep if name in self.training]:
            raise InputError(f"{twice[0]} has a value and is swept too; keep one of them.")
        steps = "max_steps" in self.sweep or float(self.training.get("max_steps") or 0) > 0
        if self.streaming and not steps:
            raise InputError("streaming has no epochs, because the number of rows is not known; give --max_steps.")
        if self.streaming and self.packing:
            raise InputError("packing needs all examples at once; leave --packing or --streaming out.")

    def _measured(self) -> list[str]:
        """Criteria of the run's saved scores, which need no package of theirs any more."""
        try:
            scores = json.loads((Path(self.output_dir) / "relevance" / "scores.json").read_text(encoding="utf-8"))
            return [str(name) for name in scores["criteria"]]
        except (OSError, ValueError, KeyError, TypeError):
            return []

    def save(self, path: str | os.PathLike) -> None:
        write_text(path, yaml.safe_dump(dataclasses.asdict(self), sort_keys=False, allow_unicode=True))

    @classmethod
    def load(cls, path: str | os.PathLike) -> RunConfig:
        try:
            values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise InputError(f"{path} cannot be read as a run's config.yaml: {error}") from error
        if not isinstance(values, dict):
            raise InputError(f"{path} is not a run's config.yaml: it holds no mapping of fields.")
        try:
            config = cls(**checked_kinds(values, dataclasses.fields(cls)))
            config.check()
        except TypeError as error:  # of a required field that is missing
            raise InputError(f"{path} lacks a field: {error}") from error
        except InputError as error:
            raise InputError(f"{path}: {error}") from error
        return config
