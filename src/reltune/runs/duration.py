"""How long a whole run takes, from the counts of single steps: analysis, training, evaluation with what the model writes.

Training steps above frozen layers whose results are kept (prefix_cache.py) go without these layers from the second pass on.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from statistics import median
from typing import TYPE_CHECKING, Any

from reltune.cost.calibration import Calibration, rate
from reltune.cost.step import StepCount
from reltune.cost.timing import step_time, work_seconds
from reltune.files import parse_size
from reltune.names import WITHOUT_DATA
from reltune.tuner.frozen_prefix import Unsuited, known_blocks

if TYPE_CHECKING:
    from reltune.runs.estimate import Subject

BY_TRIAL = ("ablation", "correlation")  # criteria that try out so many changes as the model and the data ask for
OTHER_INPUTS = (
    "masked_lm",
    "preference",
)  # tasks whose examples are not the same in every pass, or are put together elsewhere
# Assumed, not measured: seconds to find an example and its states again, and bytes a second of a file in the system's cache.
FINDING = 4e-5
READING = WRITING = 1e9


@dataclasses.dataclass(frozen=True)
class Prefix:
    """What it does to keep what the frozen layers give (``--cache_frozen_prefix``).

    Attributes:
        layers: that are frozen from the bottom, of ``of``.
        bytes: of all examples; None where their number is not known.
        seconds: of a step of a later pass, with all its batches; ``median`` of the run's steps, None where it keeps nothing or has no
            number of steps.
        pays: whether training is done earlier by it; None where the number of passes is not known.
        kept: whether this run keeps it.
        why: why not, as a phrase.
    """

    layers: int
    of: int
    bytes: int | None
    seconds: float
    pays: bool | None
    kept: bool
    why: str = ""
    median: float | None = None


@dataclasses.dataclass(frozen=True)
class Course:
    """Seconds of a run by part; only those that are known and take any. ``left_out``: what is not known, as a phrase."""

    parts: Mapping[str, float]
    prefix: Prefix | None = None
    left_out: str = ""

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())


def course(subject: Subject, method: str, calibration: Calibration, analysed: bool) -> Course:
    """The seconds of a run by a method. Of unknown rows only training that has a number of steps takes time.

    ``analysed``: whether there is nothing to analyse, or that was done.
    """
    parts: dict[str, float] = {}
    examples, steps, count = subject.sizes.train, subject.steps, subject.counted(method, subject.usual)
    prefix = prefix_of(subject, count, calibration)
    if steps is None:
        return Course(parts, prefix)
    left_out = ""
    if not analysed:
        seconds = analysis_seconds(subject, calibration)
        if seconds is None:
            left_out = f"the analysis by {', '.join(subject.config.criteria)}"
        else:
            parts["analysis"] = seconds
    step = subject.seconds(count, calibration)
    parts["training"] = steps * step
    if prefix is not None and prefix.kept and examples is not None:
        later = max(0, steps - _pass(subject, examples))
        first = step + _writing(subject)
        parts["training"] = (steps - later) * first + later * prefix.seconds
        if steps:
            prefix = dataclasses.replace(prefix, median=median([prefix.seconds] * later + [first] * (steps - later)))
    parts |= evaluation_seconds(subject, method, calibration, steps)
    return Course({name: seconds for name, seconds in parts.items() if seconds}, prefix, left_out)


def _pass(subject: Subject, examples: int) -> int:
    """Steps of one pass over the data."""
    return math.ceil(examples / subject.batch_size / subject.accumulation)


# -- analysis ----------------------------------------------------------------------------------------------------------


def analysis_seconds(subject: Subject, calibration: Calibration) -> float | None:
    """Of measuring relevance by the config's criteria, with the training of new heads before; None where that cannot be told."""
    config, rows = subject.config, subject.sizes.train
    by_data = [name for name in config.criteria if name not in WITHOUT_DATA]
    if not by_data:
        return 0.0
    if set(by_data) & set(BY_TRIAL) or (whole := subject.counted_or_none("full")) is None:
        return None
    time = step_time(whole, calibration)
    example = (time.forward + time.backward) / subject.batch_size
    of = config.analysis_batch_size
    total = 0.0
    if subject.head_parameters and rows is not None:
        total += config.head_epochs * rows * time.forward / subject.batch_size
    if "movement" in by_data:
        steps = config.probe_steps if isinstance(config.probe_steps, int) else 100
        moved = (
            whole.trained_bytes + 2 * whole.trained
        )  # gradients are read, and a byte of votes for each is read and written
        vote = moved / rate(calibration.bandwidth, moved / max(1, whole.tensors))
        total += steps * (of * example + vote)
    if others := set(by_data) - {"movement"}:
        examples = min(config.analysis_examples, rows or config.analysis_examples)
        passes = len({"fisher_true"} & others) + bool(others - {"fisher_true"})
        total += passes * examples * example
    return total


# -- evaluation --------------------------------------------------------------------------------------------------------


def evaluation_seconds(subject: Subject, method: str, calibration: Calibration, steps: int) -> dict[str, float]:
    """Of loss and metrics on held-out data while training, before it and after it; and of what the model writes for that."""
    values, rows = subject.values, subject.sizes
    held_out = (rows.validation, rows.test)
    strategy = str(getattr(values.get("eval_strategy"), "value", values.get("eval_strategy")))
    while_training = 0
    if strategy == "epoch" and rows.train:
        while_training = math.ceil(steps / _pass(subject, rows.train))
    elif strategy == "steps":
        while_training = steps // int(values.get("eval_steps") or values["logging_steps"])
    read = while_training * rows.validation + 2 * sum(held_out)
    if not read:
        return {}
    forward = step_time(subject.counted(method, subject.evaluated), calibration).forward
    found = {"evaluation": read * forward / subject.batch_size}
    batch = subject.eval_batch_size
    if subject.task == "seq2seq":  # every evaluation has the model write
        batches = while_training * math.ceil(rows.validation / batch) + 2 * sum(math.ceil(n / batch) for n in held_out)
    elif subject.task == "causal_lm":
        batches = 2 * sum(math.ceil(min(n, subject.config.generation_examples) / batch) for n in held_out)
    else:
        return found
    each = _token_seconds(subject, calibration, batch)
    return {**found, "writing": batches * subject.config.max_new_tokens * each}


def _token_seconds(subject: Subject, calibration: Calibration, batch: int) -> float:
    """Of the next token of every text in a batch: a forward pass of one token, which reads the keys and values of those before."""
    forward = step_time(subject.counted(subject.config.method, (1,), batch), calibration).forward
    text = subject.settings.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or getattr(text, "num_attention_heads", None) or 0
    width = getattr(text, "head_dim", None) or getattr(text, "hidden_size", 0) // max(
        1, getattr(text, "num_attention_heads", 1)
    )
    before = 2 * heads * width * getattr(text, "num_hidden_layers", 0) * subject.itemsize * batch * subject.evaluated[0]
    return forward + before / rate(calibration.bandwidth, max(1, before))


# -- frozen layers -----------------------------------------------------------------------------------------------------


def prefix_of(subject: Subject, count: StepCount, calibration: Calibration) -> Prefix | None:
    """What keeping the results of frozen layers does; None where there are none, or where they cannot be kept."""
    config = subject.config
    if not count.frozen_blocks or config.packing or config.streaming or subject.task in OTHER_INPUTS:
        return None
    if config.cuda_graphs:  # whose recordings begin at the lowest layer
        return None
    try:
        known_blocks(subject.model())
    except Unsuited:
        return None
    step = subject.seconds(count, calibration)
    rest = count.work["forward"].copy()
    rest.subtract(count.frozen)
    saved = work_seconds(count.work["forward"], calibration) - work_seconds(+rest, calibration)
    later = step - subject.accumulation * (saved - _reading(subject))
    steps, examples = subject.steps, subject.sizes.train
    if examples is None or steps is None:
        return Prefix(count.frozen_blocks, count.blocks, None, later, None, False, "the number of passes is not known")
    needed = round(examples * _bytes(subject))
    first = min(steps, _pass(subject, examples))
    pays = (steps - first) * (step - later) > first * _writing(subject)
    kept, why = pays, "" if pays else "reading it again would take as long as computing it"
    if steps <= first:
        pays, kept, why = False, False, "there is no second pass over the data"
    elif _draws(subject.settings):
        kept, why = False, "the frozen layers have dropout, which --cache_frozen_prefix on turns off there"
    elif needed > parse_size(config.cache_size):
        kept, why = False, f"--cache_size is {config.cache_size}"
    if config.cache_frozen_prefix != "auto":
        kept = config.cache_frozen_prefix == "on"
        why = "" if kept else "--cache_frozen_prefix is off"
    return Prefix(count.frozen_blocks, count.blocks, needed, later, pays, kept, why)


def _tokens(subject: Subject) -> float:
    """Of an example in the mean."""
    if subject.lengths is not None:
        return subject.lengths.mean
    if subject.longest[0]:
        return subject.longest[0]
    image, patch = (getattr(subject.settings, name, None) or 1 for name in ("image_size", "patch_size"))
    (high, wide), (tall, broad) = (pair if isinstance(pair, list | tuple) else (pair, pair) for pair in (image, patch))
    return 1 + (high // tall) * (wide // broad)


def _bytes(subject: Subject) -> float:
    """Of an example's hidden states."""
    return _tokens(subject) * int(getattr(subject.settings.get_text_config(), "hidden_size", 0)) * subject.itemsize


def _reading(subject: Subject) -> float:
    """Seconds for the examples of one batch."""
    return subject.batch_size * (FINDING + _bytes(subject) / READING)


def _writing(subject: Subject) -> float:
    """Seconds for the examples of one step."""
    return subject.accumulation * subject.batch_size * (FINDING + _bytes(subject) / WRITING)


def _draws(settings: Any) -> bool:
    """Whether layers of a model with this config have dropout."""
    return any(
        isinstance(value, int | float)
        and value > 0
        and "drop" in name
        and not name.startswith(("classifier", "summary"))
        for name, value in settings.to_dict().items()
    )
