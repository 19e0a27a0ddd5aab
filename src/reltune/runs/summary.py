"""What a run's artefacts say of it: the record that its report shows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from reltune.config.data import DataConfig
from reltune.config.run_config import RunConfig
from reltune.cost.devices import LIBRARIES
from reltune.data.packages import CORPORA
from reltune.errors import InputError
from reltune.files import read_json
from reltune.metrics import METRICS
from reltune.plan.plan import Plan
from reltune.reading import Damaged, typed
from reltune.relevance.artefact import Overview, read_overview
from reltune.relevance.profiles import read_profiles
from reltune.report.forms import write_run, write_runs
from reltune.report.numbers import measured, metric, tokens
from reltune.report.record import ComparisonRecord, LMEvalRecord, Predicted, RunRecord, WayResult, WayTable
from reltune.report.several import NamedRun
from reltune.runs.bad_rows import in_words
from reltune.runs.directory import RunDirectory

Made = TypeVar("Made")


def read_record(config: RunConfig, run: RunDirectory) -> RunRecord:
    """The record of a run, from its artefacts. Needs relevance and a plan, or what a method trained without them; shows what
    else is there. Raises InputError for artefacts that do not fit together."""
    try:
        return _assembled(config, run)
    except (KeyError, TypeError, AttributeError, IndexError, Damaged) as error:
        raise InputError(
            f"{run.path} holds records that do not fit together ({type(error).__name__}: {error}); run the stages that write them again."
        ) from error


def _assembled(config: RunConfig, run: RunDirectory) -> RunRecord:
    relevance = _read_relevance(run) if config.needs_plan else None

    def read(name: str, default: Any) -> Any:
        path = run.path / name
        return read_json(path) if path.is_file() else default

    cost, commands = read("training_cost.json", {}), read(run.commands.name, {})
    notes = [machine_note(relevance, cost)]
    if config.dataset_name in CORPORA:
        notes.append(CORPORA[config.dataset_name].note)
    notes += read("notes.json", {"notes": []})["notes"]
    notes += in_words(read("bad_rows.json", {}))
    results = read("all_results.json", {})
    if relevance is not None:
        notes += behaviour_notes(relevance)
    notes += forgetting_notes(config, results)
    if relevance is not None and relevance.left_out:
        reasons = sorted(set(relevance.left_out.values()))
        notes.append(f"Not measured: {len(relevance.left_out)} parameter tensors ({'; '.join(reasons)}).")
    method, lines, by_layer = read(run.method.name, {}), [], {}
    if relevance is not None:
        plan = Plan.load(run.plan)
        lines, by_layer = plan.describe(), plan.by_layer(relevance.layers)
    if method:
        lines, by_layer = [*lines, *method["lines"]], method["by_layer"]
    elif relevance is None:
        raise InputError(
            f"{run.path} was not tuned yet, and nothing was measured; run `reltune tune {run.path}` first."
        )
    architecture = method["architecture"] if relevance is None else relevance.provenance["architecture"]
    data = f" on {config.dataset_name or Path(str(config.train_file)).name}" if config.has_data else ", weights alone"
    return RunRecord(
        title=f"reltune: {architecture}{data}",
        config=_shown(config),
        heatmaps=relevance.heatmaps if relevance is not None else [],
        depth_sentence=relevance.depth_sentence if relevance is not None else "",
        plan_lines=lines,
        selected_by_layer=by_layer,
        metrics=results,
        history=read("trainer_state.json", {}).get("log_history", []),
        notes=notes,
        facts=_facts(
            f"{config.model_name_or_path} ({architecture})", relevance, read(run.data.name, {}), cost, commands
        ),
        commands=[made["command"] for made in commands.values()],
        outputs=run.read_outputs(config.report_examples),
        profiles=[] if relevance is None else read_profiles(run.relevance, relevance.heatmaps, relevance.layers),
        samples=run.read_samples(),
        sweep=read("sweep.json", None),
        lm_eval=read_lm_eval(run),
        held_in=config.held_in,
        predicted=predicted_and_measured(read("prediction.json", {}), cost),
        ways=_read_ways(run),
    )


def _shown(config: RunConfig) -> dict[str, Any]:
    """The config without what would let others in."""
    values = config.values()
    if values["training"].get("hub_token"):
        values["training"] = {**values["training"], "hub_token": "…"}
    return values


def _facts(
    model: str,
    relevance: Overview | None,
    data: Mapping[str, Mapping[str, Any]],
    cost: Mapping[str, Any],
    commands: Mapping[str, Mapping[str, str]],
) -> list[tuple[str, str]]:
    """What model, data and versions made the run, by what each is; as far as it was written down."""
    measured = relevance.provenance if relevance is not None else {}
    fingerprint = cost.get("fingerprint") or (relevance.fingerprint if relevance is not None else "")
    facts = [("base model", model)]
    facts += [("its fingerprint", fingerprint)] if fingerprint else []
    facts += [("digest of all its weights", measured["weights"])] if measured.get("weights") else []
    for split, record in data.items():
        size = f"{record['rows']:,} rows, fingerprint {record['fingerprint']}" if "rows" in record else "streamed"
        facts.append((f"{split} data", f"{record['source']}: {size}"))
    if measured.get("data"):
        facts.append(("analyzed examples", f"{measured['examples']:,}, fingerprint {measured['data']}"))
    libraries = [f"{name} {version}" for name, version in measured.get("versions", {}).items()]
    versions = [f"reltune {version}" for version in dict.fromkeys(made["reltune"] for made in commands.values())]
    versions += [cost["machine"]] if "machine" in cost else [", ".join(libraries)] if libraries else []
    return [*facts, ("versions", "; ".join(versions))] if versions else facts


def predicted_and_measured(prediction: Mapping[str, Any], cost: Mapping[str, Any]) -> list[Predicted]:
    """Peak memory and the time of a step as they were predicted, beside what training took. On a CPU the process's memory is measured,
    whose prediction begins at what it held when the model was loaded."""
    if not prediction or not cost:
        return []
    memory = prediction["allocated_bytes"]
    if (before := cost.get("memory_before_bytes")) is not None:
        memory = before + memory + LIBRARIES - prediction["held_before_bytes"] + prediction.get("holes_bytes", 0)
    padded = prediction.get("padded") or {}
    longest, usual = (
        f", batches of {tokens(padded[name])} tokens" if name in padded else "" for name in ("longest", "training")
    )
    return [
        Predicted(f"peak memory{longest}", memory, cost["peak_memory_bytes"]),
        Predicted(f"seconds per step{usual}", prediction["seconds_per_step"], cost["seconds_per_step"]),
    ]


def _read_ways(run: RunDirectory) -> ComparisonRecord | None:
    """Other methods that were trained beside the run, if any were."""
    if run.comparison.is_file():
        return _record_in(run.comparison, ComparisonRecord.from_json)
    old = run.path / "comparison.json"  # of reltune 0.1
    if not old.is_file():
        return None
    return _record_in(old, _of_old_ways)


def _of_old_ways(values: dict[str, Any]) -> ComparisonRecord:
    rows = [_read_old_way(method) for method in values["methods"]]
    metric = next(iter(rows[0].metrics), "loss")
    table = WayTable("usual", "Scores on test data", rows)
    return ComparisonRecord(metric, metric, [], [table], typed(list[str], values["notes"]))


def _record_in(path: Path, make: Callable[[Any], Made]) -> Made:
    """What ``make`` makes of a JSON file. Raises InputError where it is no such record."""
    try:
        return make(read_json(path))
    except InputError:
        raise
    except (KeyError, TypeError, AttributeError, IndexError, Damaged) as error:
        raise InputError(f"{path} is no record of this kind ({error}); run the stage that writes it again.") from error


def _read_old_way(values: dict[str, Any]) -> WayResult:
    same = (
        "method",
        "trainable_parameters",
        "head_parameters",
        "learning_rate",
        "seconds_per_step",
        "peak_memory_bytes",
    )
    own = {name: values[name] for name in same}
    own |= {"label": values["method"], "seeds": 1, "adapter_bytes": values["disk_bytes"]}
    return typed(WayResult, {**own, "metrics": {**values["metrics"], "loss": values["loss"]}})


def _read_relevance(run: RunDirectory) -> Overview:
    overview = read_overview(run.relevance)
    if overview is None:
        from reltune.relevance.scores import RelevanceScores  # needs torch, which the report does not else

        overview = RelevanceScores.load(run.relevance).overview()
    return overview


def report(config: RunConfig, run: RunDirectory, path: Path | None = None, form: str = "html") -> RunRecord:
    """Assemble the record of a run from its artefacts and write its report, ``report.html`` unless told otherwise. Needs neither
    torch nor transformers."""
    record = read_record(config, run)
    write_run(path or run.report, record, form)
    return record


def report_side_by_side(places: Sequence[str], path: Path, form: str) -> list[NamedRun]:
    """Write a report of several runs. Their names are those of their directories, or the whole paths where these are alike."""
    short = [Path(place).resolve().name for place in places]
    names = short if len(set(short)) == len(short) else [str(Path(place)) for place in places]
    runs = []
    for name, place in zip(names, places, strict=True):
        directory, config = RunDirectory.open(place)
        runs.append(NamedRun(name, read_record(config, directory)))
    write_runs(path, runs, form)
    return runs


def read_lm_eval(run: RunDirectory) -> LMEvalRecord | None:
    """What lm-evaluation-harness measured, if it did."""
    return _record_in(run.lm_eval, LMEvalRecord.from_json) if run.lm_eval.is_file() else None


def forgetting_notes(config: DataConfig, results: dict[str, Any]) -> list[str]:
    """How the second set fared, metric by metric."""
    prefix = "forgetting_before_"
    changes = [
        f"{METRICS[name].label} {metric(name, results[prefix + name])} before training, "
        f"{metric(name, results[f'forgetting_after_{name}'])} after"
        for name in measured([results], prefix)
    ]
    return [f"Forgetting, on {Path(str(config.forgetting_file)).name}: {'; '.join(changes)}."] if changes else []


def behaviour_notes(relevance: Overview) -> list[str]:
    """Of each criterion that tries units out: by which metric it scores them, and in how many trials."""
    notes = []
    for criterion in relevance.criteria:
        facts = relevance.provenance.get(criterion, {})
        if "metric" in facts:
            note = (
                f"{criterion} is measured by the {facts['metric']}, {facts['of_the_model']:.4g} for the untouched model"
            )
            trials = [
                f"{own['trials']} trials of {kind}s, ranking {'stable' if own['stable'] else 'not yet stable'}"
                for kind, own in facts.items()
                if isinstance(own, dict) and "trials" in own
            ]
            total = relevance.provenance.get("examples", 0)
            samples = [
                f"{kind}s on {own['examples']} of {total} examples"
                for kind, own in facts.items()
                if isinstance(own, dict) and own.get("examples", total) < total
            ]
            notes.append("; ".join([note, *trials, *samples]) + ".")
    return notes


def machine_note(relevance: Overview | None, cost: Mapping[str, Any]) -> str:
    """Where the run was trained and with which versions; of a run that was not, those that it was analyzed with."""
    if "machine" in cost:
        return f"Run on {cost['machine']}."
    versions = relevance.provenance.get("versions", {}) if relevance is not None else {}
    return f"Analyzed with {', '.join(f'{name} {version}' for name, version in versions.items())}."
