"""Everything that decides a run: the fields of all subjects, side by side in one dataclass."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import field
from pathlib import Path
from typing import Any

import yaml

from reltune.config.analysis import AnalysisConfig
from reltune.config.data import DataConfig
from reltune.config.evaluation import EvaluationConfig
from reltune.config.export import ExportConfig
from reltune.config.fields import about, checked_fields
from reltune.config.method import CHOSEN, MEASURED, METHODS, RANKS, MethodConfig
from reltune.config.model import ModelConfig
from reltune.config.recipes import CHOICE, completed
from reltune.config.selection import SelectionConfig
from reltune.config.training import TrainingConfig
from reltune.errors import InputError, nearest
from reltune.files import write_text
from reltune.names import CRITERIA, IN_A_LORA_FILE, IN_GGUF, WITHOUT_DATA, WRITING
from reltune.reading import Damaged, read_json, read_yaml
from reltune.relevance.entry_points import criterion_of_package, known_criteria

# The order in which flags, YAML files and the schema show the fields. A new field of a subject is entered here too.
ORDER = """
    model_name_or_path output_dir
    train_file dataset_name dataset_config dataset_path validation_file test_file
    task text_column text_pair_column label_column encoding on_bad_rows on_leak streaming max_length chat_template completion_only_loss packing
    max_new_tokens generation_examples report_examples sample_prompts beta loss_type forgetting_file
    lm_eval_tasks lm_eval_num_fewshot lm_eval_limit lm_eval_batch_size lm_eval_apply_chat_template
    load_in_4bit load_in_8bit method lora_r lora_alpha lora_dropout rank_by activation_offloading cuda_graphs cache_frozen_prefix cache_size
    early_stopping_patience sweep sweep_trials
    budget fixed criteria granularity spread target_modules exclude_modules
    head_epochs analysis_examples analysis_batch_size max_trials probe_steps probe_step_size probe_directions elements frozen_dtype
    export seed training
""".split()


OF_SOME_METHODS = tuple(dict.fromkeys(name for way in METHODS.values() for name in (*way.defaults, *way.takes)))


@dataclasses.dataclass
class RunConfig(
    ModelConfig,
    DataConfig,
    MethodConfig,
    AnalysisConfig,
    SelectionConfig,
    TrainingConfig,
    EvaluationConfig,
    ExportConfig,
):
    """Everything that decides a run; saved as ``config.yaml`` in the run directory.

    Each subject's fields, and the rules among them, are in the file of that name. Here are the fields that belong to none
    and the rules between subjects. Field names follow transformers and TRL where they have them.
    """

    output_dir: str = field(
        metadata=about(
            "Directory to write the run to: new, empty, or that of the same command, which then goes on.", "DIR"
        )
    )
    _: dataclasses.KW_ONLY
    seed: int = field(
        default=42,
        metadata=about(
            "Random seed of the splits, of new heads and of training: 0 to 4294967295.", "N", least=0, most=2**32 - 1
        ),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.fill()
        if not self.needs_plan:  # the choice stays None: nothing is chosen
            return
        given = {name: getattr(self, name) for name in CHOICE}
        if self.way.granularity and given["granularity"] is None:
            given["granularity"] = [self.way.granularity]
        for name, value in completed(given, ranks=self.rank_by is not None).items():
            setattr(self, name, value)

    @property
    def scores_elements(self) -> bool:
        """Whether the analysis scores single weights: when told to, and when they are to be chosen."""
        return self.elements or "element" in (self.granularity or ())

    @property
    def is_spread(self) -> bool:
        """Whether training spreads the model over processes, as TrainingArguments understands its field."""
        return bool(self.training.get("fsdp"))

    def check(self) -> None:
        """Raise InputError for values that no later stage could use. Of files it reads the run's own scores at most."""
        super().check()
        self.check_method()
        for value in self.criteria or ():
            if criterion_of_package(value) is None and value not in CRITERIA and value not in self._measured():
                raise InputError(f"criterion {value!r} is unknown; {nearest(value, known_criteria())}")
        if not self.needs_plan or not set(self.criteria) <= set(WITHOUT_DATA):
            self.check_data()
        steps = "max_steps" in self.sweep or _above_zero(self.training.get("max_steps"))
        if self.streaming and not steps:
            raise InputError("streaming has no epochs, because the number of rows is not known; give --max_steps.")
        self._check_prefix()
        self._check_samples()
        self._check_export()
        if self.load_in_8bit and self.is_spread:
            raise InputError(
                "fsdp cannot spread a base held in 8 bits, whose product fails in bitsandbytes once its weights are spread; write "
                "load_in_4bit, or leave fsdp out, and every process trains with a whole copy of the base."
            )

    def _check_prefix(self) -> None:
        if self.cache_frozen_prefix != "on":
            return
        if self.streaming:
            why = "streamed rows are not known to come again"
        elif self.method in ("full", "bitfit"):
            why = f"the method {self.method} trains the lowest layer"
        elif self.cuda_graphs:
            why = "cuda_graphs record steps that begin at the lowest layer"
        else:
            return
        raise InputError(f"cache_frozen_prefix on: {why}; write auto, which then keeps nothing, or off.")

    def _check_samples(self) -> None:
        if not self.sample_prompts:
            return
        if self.task is not None and self.task not in WRITING:
            raise InputError(writes_nothing(self.task))
        if str(self.training.get("eval_strategy", "")).lower() in ("no", "false"):
            raise InputError(
                "sample_prompts are answered at each evaluation while it trains, and eval_strategy is no; write epoch or steps."
            )
        if self.is_spread:
            raise InputError(
                "sample_prompts want a whole model in each process, and fsdp spreads it over them; leave one of the two out."
            )

    def _check_export(self) -> None:
        other = next((word for word in self.granularity or () if word not in IN_A_LORA_FILE), None)
        if self.rank_by is not None:
            other = None
        if self.export == "lora" and other is not None:
            what = "single weights" if other == "element" else "biases, norms or whole matrices"
            raise InputError(
                f"export lora: a LoRA file cannot hold what granularity {other} trains, {what}; add --granularity direction, or take "
                "--export merged."
            )
        if self.export in ("merged", *IN_GGUF) and (self.load_in_4bit or self.load_in_8bit):
            raise InputError(
                f"export {self.export}: an adapter cannot be merged into a base in 4 or 8 bits, which would round what was trained; leave "
                "--export out and run the adapter unmerged, or load the base whole."
            )

    def check_method(self) -> None:
        """Raise InputError for fields that the method does not take: they would be ignored."""
        for each in FIELDS:
            name = each.name
            if name not in OF_SOME_METHODS or name in self.taken:
                continue
            default = each.default if each.default_factory is dataclasses.MISSING else each.default_factory()
            if getattr(self, name) == default and name not in self.sweep:
                continue
            if self.rank_by is not None and name in RANKS:
                raise InputError(f"{name} is given, and rank_by gives each module its own rank; leave one of them out.")
            if name in (*CHOSEN, *MEASURED) and name != "budget" and "rank_by" in self.way.defaults:
                raise InputError(
                    f"{name} is given, and {self.method} chooses nothing unless told to; add --rank_by relevance, or leave {name} out."
                )
            takers = [method for method, way in METHODS.items() if name in (*way.defaults, *way.takes)]
            raise InputError(
                f"{name} is given, and the method {self.method} does not use it; leave it out, or choose one of {', '.join(takers)}."
            )
        self._check_size()
        own = self.way.granularity
        if own and self.granularity != [own]:
            raise InputError(
                f"the method {self.method} trains {own}s and granularity is {', '.join(self.granularity)}; leave one of them out."
            )
        low_rank = {"column", "row", "element", "module", "layer", "head"}
        if self.rank_by is not None and (wrong := [word for word in self.granularity if word not in low_rank]):
            raise InputError(f"granularity {wrong[0]} cannot be turned into ranks, as rank_by says; leave it out.")

    def _check_size(self) -> None:
        """Raise InputError for a budget of parameters that the method, or another field, leaves no choice."""
        if "budget" in self.sweep and not self.needs_plan:
            raise InputError(
                f"sweep: the method {self.method} has no budget that could be swept; sweep fields of training."
            )
        if not self.rank_from_budget:
            return
        if not {"lora_r", "target_modules"} & set(self.taken):
            takers = [
                method for method, way in METHODS.items() if {"lora_r", "target_modules"} & {*way.defaults, *way.takes}
            ]
            raise InputError(
                f"budget says how many parameters, and the method {self.method} does not use it, because it has one size; leave it out, or "
                f"choose one of {', '.join(takers)}."
            )
        name = "lora_r" if "lora_r" in self.taken else "target_modules"
        if getattr(self, name):
            raise InputError(f"{name} is given, and budget says how many parameters; leave one of them out.")

    def _measured(self) -> list[str]:
        """Criteria of the run's saved scores. They can be chosen by even if their package is no longer installed."""
        try:
            scores = read_json(Path(self.output_dir) / "relevance" / "scores.json")
            return [str(name) for name in scores["criteria"]]
        except (OSError, ValueError, KeyError, TypeError):
            return []

    def values(self) -> dict[str, Any]:
        """A copy of all values by the names of their fields, in the order of ``ORDER``."""
        held = dataclasses.asdict(self)
        return {name: held[name] for name in ORDER}

    def save(self, path: str | os.PathLike) -> None:
        write_text(path, yaml.safe_dump(self.values(), sort_keys=False, allow_unicode=True))

    @classmethod
    def load(cls, path: str | os.PathLike) -> RunConfig:
        try:
            values = read_yaml(path)
        except (OSError, Damaged) as error:
            raise InputError(f"{path} cannot be read as a run's config.yaml: {error}") from error
        if not isinstance(values, dict):
            raise InputError(f"{path} is not a run's config.yaml: it must be a mapping of fields.")
        try:
            config = cls(**checked_fields(values, FIELDS))
            config.check()
        except TypeError as error:  # a required field is missing
            raise InputError(f"{path} lacks a field: {error}") from error
        except InputError as error:
            raise InputError(f"{path}: {error}") from error
        return config


def writes_nothing(task: str) -> str:
    """The sentence that refuses prompts to be answered for a task."""
    return f"--sample_prompts: a model for {task} writes no texts; leave it out (it is for {', '.join(WRITING)})."


def _above_zero(value: Any) -> bool:
    try:
        return float(value) > 0
    except (TypeError, ValueError):
        return False


FIELDS = tuple(sorted(dataclasses.fields(RunConfig), key=lambda field: ORDER.index(field.name)))
