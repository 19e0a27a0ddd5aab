"""Sweeps: training once for each value of some fields, and keeping what is best on validation data.

Each trial is ``tune`` in a directory of its own, so that the adapter that is kept is the one that ``tune`` with the best
values gives. Optuna keeps the study (``sweep/study.jsonl``, a journal) and draws from ranges by
TPE (Bergstra et al. 2011). Trainer.hyperparameter_search does not fit: it sets values on finished TrainingArguments,
which nothing checks again, wants a model_init, which TRL's trainers do not take, and knows no budget.
"""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import itertools
import math
import os
import re
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from reltune.config.run_config import RunConfig
from reltune.config.training import TrainingConfig
from reltune.config.training_fields import NOT_FOR_RUNS, checked_training_fields, training_field_names
from reltune.errors import InputError, nearest
from reltune.files import discard, read_json, write_json
from reltune.processes import Processes
from reltune.relevance.scores import RelevanceScores
from reltune.runs import training
from reltune.runs.directory import RunDirectory
from reltune.runs.evaluation import evaluate as measure_metrics
from reltune.runs.materials import Materials, placement
from reltune.runs.stages import choose, load_tuned, select, tune

if TYPE_CHECKING:
    import optuna

OWN = ("budget",)  # fields of the run that need no new analysis
COMPARE = ("metric_for_best_model", "greater_is_better")  # what trials are compared by is the same for all
RANGED_TRIALS = 20  # where a range is swept and sweep_trials says nothing: Trainer.hyperparameter_search's default


def space(config: TrainingConfig) -> dict[str, Any]:
    """The swept fields with Optuna's distribution of each: categorical for values, float or int for a range.

    Ranges are drawn from on a log scale, unless they begin at 0 or below. Raises InputError for fields that cannot be swept
    (naming the nearest that can) and for values that they cannot have.
    """
    _optuna()
    own = {field.name for field in dataclasses.fields(RunConfig)}
    known = [*OWN, *(name for name in training_field_names() if name not in (*NOT_FOR_RUNS, *COMPARE))]
    distributions = {}
    for name, words in config.sweep.items():
        if name not in known:
            why = (
                "fields of training and the budget can be."
                if name in own or name in (*NOT_FOR_RUNS, *COMPARE)
                else nearest(name, known)
            )
            raise InputError(f"sweep: {name!r} cannot be swept; {why}")
        distributions[name] = _distribution(name, words)
    if config.sweep_trials is not None and _is_grid(distributions):
        raise InputError("sweep_trials is for ranges; of values every combination is tried once, so leave it out.")
    return distributions


def _distribution(name: str, words: list[str]) -> optuna.distributions.BaseDistribution:
    distributions = _optuna().distributions
    ends = re.fullmatch(r"(.+?)\.\.(.+)", words[0]) if len(words) == 1 else None
    if ends is None:
        values = list(dict.fromkeys(_typed(name, word) for word in words))
        if len(values) < 2:
            raise InputError(
                f"sweep: {name} has one value only; write several with commas between, or a range like 1..3."
            )
        return distributions.CategoricalDistribution(values)
    low, high = (_typed(name, end) for end in ends.groups())
    if isinstance(low, bool) or not isinstance(low, int | float):
        raise InputError(f"sweep: {name} holds no numbers, so it has no range; write values with commas between.")
    if not low < high:
        raise InputError(f"sweep: the range of {name} is {words[0]}; its first end must be the smaller one.")
    kind = distributions.IntDistribution if isinstance(low, int) else distributions.FloatDistribution
    return kind(low, high, log=low > 0)


def _typed(name: str, word: str) -> Any:
    """The word as a value of the field."""
    if name in OWN:
        return word
    try:
        value = checked_training_fields({name: word})[name]
    except InputError as error:
        raise InputError(f"sweep: {error}") from error
    if not isinstance(value, str | int | float) or (isinstance(value, float) and not math.isfinite(value)):
        raise InputError(f"sweep: {name} cannot be {word!r}; write numbers, words, or true and false.")
    return value


def _is_grid(distributions: dict[str, Any]) -> bool:
    return all(hasattr(one, "choices") for one in distributions.values())


def _combinations(distributions: dict[str, Any]) -> list[dict[str, Any]]:
    """All combinations of values in the order given, the last field's changing fastest; of ranges both ends."""
    sides = [one.choices if hasattr(one, "choices") else (one.low, one.high) for one in distributions.values()]
    return [dict(zip(distributions, values, strict=True)) for values in itertools.product(*sides)]


def with_values(config: RunConfig, values: dict[str, Any]) -> RunConfig:
    """The config of one training with these values, which sweeps nothing."""
    own = {name: value for name, value in values.items() if name in OWN}
    rest = {name: value for name, value in values.items() if name not in OWN}
    return dataclasses.replace(config, sweep={}, sweep_trials=None, training={**config.training, **rest}, **own)


def adopted(config: RunConfig, run: RunDirectory) -> RunConfig:
    """The config with the best values of the sweep that was finished in the run."""
    return with_values(config, _read(run)["best"]["values"]) if config.sweep else config


def in_words(values: dict[str, Any]) -> str:
    return ", ".join(
        f"{name}={value:.6g}" if isinstance(value, float) else f"{name}={value}" for name, value in values.items()
    )


def check(materials: Materials, relevance: RelevanceScores | None = None) -> None:
    """Raise InputError for values that cannot be trained with, before anything is; budgets only if there is relevance."""
    name = _compared_by(materials)[0]
    if name not in (known := ["loss", *materials.task.metrics]):
        raise InputError(
            f"metric_for_best_model {name!r} is no metric of {materials.task.name}; {nearest(name, known)}"
        )
    for values in _combinations(space(materials.config)):
        config = with_values(materials.config, values)
        try:
            config.check()
            dataclasses.replace(materials, config=config).check_training()
            if relevance is not None and "budget" in values:
                choose(config, relevance, config.criteria[0])
        except InputError as error:
            raise InputError(f"sweep, {in_words(values)}: {error}") from error


def _compared_by(materials: Materials) -> tuple[str, bool]:
    """The metric without a prefix, and whether the best is the largest."""
    name, largest = training.compared_by(materials.config.training, materials.task)
    return name.removeprefix("eval_"), largest


def sweep(materials: Materials, run: RunDirectory, anew: bool = False) -> Materials:
    """Train for each combination of the swept values (of ranges, ``sweep_trials`` draws) and keep the best as the run's.

    An interrupted sweep goes on, unless told to begin ``anew``: finished trials are not repeated, the one that was cut
    short goes on from its last checkpoint. A training that diverges, or does not fit in the accelerator's memory, is a
    failed trial. Of several processes the first one keeps the study and writes.

    Returns:
        The materials with the best values in their config, which is the run's from then on.

    Raises:
        ArithmeticError: every trial failed.
    """
    config, processes = materials.config, Processes.joined()
    distributions = space(config)
    study = None
    with processes.together():
        if processes.first:
            if anew or not run.sweeping(config):
                run.clear("select" if "budget" in distributions else "tune")
                config.save(run.config_file)
            study = _study(run, _compared_by(materials)[1])
            _record(study, materials, run)  # it may have been interrupted just before that
            if "budget" not in distributions and config.needs_plan:
                _check_plan(study, run)
    while True:
        asked = None
        with processes.together():
            if study is not None:
                asked = _ask(study, distributions, config)
        asked = processes.gather(asked)[0]
        if asked is None:
            break
        number, values = asked
        metric, reason = _trial(materials, run, number, values)
        with processes.together():
            if study is not None:
                _tell(study, number, metric, reason)
                _record(study, materials, run)
                for trial in study.get_trials():
                    if trial.state.is_finished() and trial.number != _best(study):
                        _make_light(run.trial(trial.number, "budget" in values))
    with processes.together():
        best = None
        if study is not None and (number := _best(study)) is not None:
            best = study.trials[number].params
            _adopt(run.trial(number, "budget" in best), run, with_values(config, best))
    best = processes.gather(best)[0]
    if best is None:
        raise ArithmeticError(
            f"all {len(_read(run)['trials'])} trials of the sweep failed; {run.trials} has the reasons."
        )
    return dataclasses.replace(materials, config=with_values(config, best))


# -- the study ------------------------------------------------------------------------------------------------------


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise InputError('a sweep needs optuna, which is not installed; run: pip install "reltune[sweep]"') from error
    return optuna


def _study(run: RunDirectory, largest: bool) -> optuna.Study:
    """The run's study, made if there is none."""
    optuna = _optuna()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    run.sweep.mkdir(parents=True, exist_ok=True)
    discard(run.study.with_name(f"{run.study.name}.lock"))  # Optuna's, of a process that was killed
    if run.study.is_file() and (cut := run.study.read_bytes().rpartition(b"\n"))[2]:  # a line that it was writing
        run.study.write_bytes(cut[0] + cut[1])
    try:
        return optuna.create_study(
            storage=optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(run.study))),
            study_name="sweep",
            direction="maximize" if largest else "minimize",
            load_if_exists=True,
        )
    except (ValueError, KeyError) as error:
        raise InputError(f"{run.study} cannot be read ({error}); begin anew with --overwrite_output_dir.") from error


def _check_plan(study: optuna.Study, run: RunDirectory) -> None:
    """Raise InputError unless all trials train by one plan, which may be edited by hand."""
    plan = hashlib.sha256((run.plan / "plan.yaml").read_bytes()).hexdigest()
    if study.user_attrs.get("plan", plan) != plan:
        raise InputError(f"{run.plan} has changed since the sweep began; pass --overwrite_output_dir to begin it anew.")
    study.set_user_attr("plan", plan)


def _ask(study: optuna.Study, distributions: dict[str, Any], config: RunConfig) -> tuple[int, dict[str, Any]] | None:
    """Number and values of the trial that is to be trained next; None when all are done.

    What a range gives depends on the seed, the trial's number and the results before it, however often the sweep was
    interrupted.
    """
    optuna = _optuna()
    states = optuna.trial.TrialState
    for trial in study.get_trials(states=(states.RUNNING,)):  # it was interrupted
        if trial.params.keys() == distributions.keys():
            return trial.number, trial.params
        study.tell(trial.number, state=states.FAIL)  # before it had all its values
    tried = [trial.params for trial in study.get_trials() if trial.params.keys() == distributions.keys()]
    if _is_grid(distributions):
        left = [values for values in _combinations(distributions) if values not in tried]
        if not left:
            return None
        if not study.get_trials(states=(states.WAITING,)):
            study.enqueue_trial(left[0])
    else:
        if len(tried) >= (config.sweep_trials or RANGED_TRIALS):
            return None
        study.sampler = optuna.samplers.TPESampler(seed=config.seed + len(study.get_trials()))
    asked = study.ask(distributions)
    return asked.number, asked.params


def _tell(study: optuna.Study, number: int, metric: float | None, reason: str) -> None:
    states = _optuna().trial.TrialState
    if metric is not None:
        study.tell(number, metric)
        return
    study.set_user_attr(f"trial {number}", reason)
    study.tell(number, state=states.FAIL)
    warnings.warn(f"trial {number} ({in_words(study.trials[number].params)}) failed: {reason}", stacklevel=2)


def _best(study: optuna.Study) -> int | None:
    """The first of the best trials."""
    try:
        return study.best_trial.number
    except ValueError:  # none is complete
        return None


def _record(study: optuna.Study, materials: Materials, run: RunDirectory) -> None:
    """Write ``sweep.json``."""
    name, largest = _compared_by(materials)
    trials = [
        {
            "number": trial.number,
            "values": trial.params,
            "metric": trial.value,
            "failed": study.user_attrs.get(f"trial {trial.number}"),
        }
        for trial in study.get_trials()
        if trial.state.is_finished() and trial.params.keys() == materials.config.sweep.keys()
    ]
    best = next((trial for trial in trials if trial["number"] == _best(study)), None)
    record = {
        "metric": name,
        "greater_is_better": largest,
        "sweep": materials.config.sweep,
        "sweep_trials": materials.config.sweep_trials,
        "trials": trials,
        "best": best,
    }
    write_json(run.trials, record)


def _read(run: RunDirectory) -> Any:
    return read_json(run.trials)


# -- a trial --------------------------------------------------------------------------------------------------------


def _trial(materials: Materials, run: RunDirectory, number: int, values: dict[str, Any]) -> tuple[float | None, str]:
    """Train with the values, or go on with that; the adapter's metric on validation data, or None and what failed."""
    trial = run.trial(number, "budget" in values)
    config = dataclasses.replace(with_values(materials.config, values), output_dir=str(trial.path))
    own = dataclasses.replace(materials, config=config)
    name = _compared_by(materials)[0]
    try:
        if "budget" in values and not (trial.plan / "plan.yaml").is_file():
            select(config, trial, own.sizes)
        if not trial.has_adapter:
            tune(own, trial, description=f"trial {number}", goes_on=True)
        model = load_tuned(own, trial)
        metrics = measure_metrics(
            model, {"eval": own.validation}, own.task, own.tokenizer, generate=False, **placement(config)
        ).metrics
    except ArithmeticError as error:
        return None, str(error).partition(";")[0].rstrip(".") + "."  # the mend is for those who tune once
    except torch.OutOfMemoryError:
        if Processes.joined().count > 1:  # the others wait for this one
            raise
        return None, "it does not fit in the accelerator's memory."
    finally:
        gc.collect()  # a Trainer and its model hold each other
        if (wandb := sys.modules.get("wandb")) is not None and getattr(wandb, "run", None) is not None:
            wandb.finish()  # else the next trial would be logged as part of this one
    if f"eval_{name}" not in metrics:
        known = ", ".join(key.removeprefix("eval_") for key in metrics)
        raise InputError(
            f"metric_for_best_model {name!r} is not measured while training; trials can be compared by {known}."
        )
    metric = metrics[f"eval_{name}"]
    return (metric, "") if math.isfinite(metric) else (None, f"its {name} on validation data is {metric}.")


def _make_light(trial: RunDirectory) -> None:
    """Keep what a trial logged, but not what it trained."""
    for path in (trial.adapter, *trial.path.glob("checkpoint-*")):
        discard(path)


def _adopt(trial: RunDirectory, run: RunDirectory, config: RunConfig) -> None:
    """Make the trial's training the run's, the adapter last: until it is there, the sweep counts as interrupted."""
    names = [
        "trainer_state.json",
        "training_cost.json",
        trial.method.name,
        trial.prediction.name,
        trial.begun.name,
        trial.log.name,
        trial.samples.name,
        trial.task.name,
        trial.data.name,
        "bad_rows.json",
        "notes.json",
    ]
    names += [path.name for path in trial.path.glob("checkpoint-*")]
    names += [] if trial.plan == run.plan else [trial.plan.name]
    for name in names:
        if (trial.path / name).exists():
            os.replace(trial.path / name, run.path / name)
    for file in (run.path / "trainer_state.json", *run.path.glob("checkpoint-*/trainer_state.json")):
        state = read_json(file)
        if state.get("best_model_checkpoint"):
            state["best_model_checkpoint"] = str(run.path / Path(state["best_model_checkpoint"]).name)
            write_json(file, state)
    os.replace(trial.adapter, run.adapter)
    config.save(run.config_file)
