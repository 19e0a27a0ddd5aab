"""What the cost model predicts of a training step beside what the step takes: memory and time, over many combinations.

Everything is kept in one record, benchmarks/results/cost_sweep.json, and every command goes on from what it holds. On a CPU memory and
time are measured apart, since times mean something on an idle machine alone:

    python benchmarks/cost_sweep.py measure --device cpu --what memory
    python benchmarks/cost_sweep.py measure --device cpu --what time --threads 2

On a GPU both are measured together, without a network, from the repository's root (under 5 minutes for the listed cases):

    PYTHONPATH=src:LIGER python3 benchmarks/cost_sweep.py measure --device cuda --commit COMMIT --record DIR/cost_sweep.json

Then, on any machine, write the predictions beside what was measured, with the table, and docs/cost_sweep.svg. What is counted is the code of
the installed transformers: with another version than was measured, tell each device apart (``--cuda``, ``--no-cuda``):

    python benchmarks/cost_sweep.py predict

A case is an architecture with random weights, a batch, a length, a type of numbers, checkpointing or not, Liger's kernels or
not, a method and how much it trains (sweep_cases.py). ``--drawn SEED N`` measures N cases that are drawn from all combinations in the
place of the listed ones; they are drawn when the model is finished (``drawn_at`` in the record: the commit), and are never fitted. What is
predicted of them first stays in the record as ``unseen``, whatever becomes of the model. A case that is ``replaced`` took another step than the code
of today takes, and keeps what was predicted with the code of that time.

Other guests of the same host slow a machine down for seconds to minutes. So a pulse, a little work that is always the same, is taken before
and after each step: steps count where both are within 15% of the best pulse that was seen before the calibration, and where they are not, the
next one waits. The calibration is taken so too. ``pace`` in the record is by how much the worse pulse of each counted step was above the best.

A measured step is forward, backward, AdamW (fused) and clearing the gradients. Of a GPU: the peak of what torch's allocator handed out
and of what it reserved, in steps after the first; seconds by events. Of a CPU each case is a process of its own, forked from one that has
imported everything and computed nothing. Its memory is by how much its anonymous pages grow from before the model is made to their
peak, in two steps, under MALLOC_MMAP_THRESHOLD_, with which glibc gives back what is freed. Times are measured with malloc as it is, and
the growth with it too.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cost_picture import picture
from harness import commit, described, hardware, versions
from reltune.cost.memory import CONTEXT, MAPPED
from sweep_cases import CPU, GPU, MODELS, Case, drawn, make

GIB = 2**30
STEPS = 4
CALM, TRIES = 1.15, 16  # of the best pulse; steps of a case at most
RECORD = Path(__file__).parent / "results" / "cost_sweep.json"
PICTURE = Path(__file__).parents[1] / "docs" / "cost_sweep.svg"
TINY = [Case("llama-tiny", "columns", 2, 16, "float32"), Case("bert-tiny", "weights", 2, 16, "float32")]


# -- the record --------------------------------------------------------------------------------------------------------


def read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {"benchmark": "cost_sweep", "sweeps": []}
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def write(path: Path, record: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def sweep_of(record: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """The part of the record that is of this machine's device; a new one if there is none."""
    here = hardware(torch.device(options.device))
    name = here.get("gpu", here["cpu"])
    for sweep in record["sweeps"]:
        if sweep["device"] == name:
            return sweep
    sweep: dict[str, Any] = {"device": name, "cuda": "gpu" in here, "calibration": None, "cases": []}
    record["sweeps"].append(sweep)
    return sweep


def entry_of(sweep: dict[str, Any], case: Case, held_out: bool) -> dict[str, Any]:
    """What the sweep has of a case: ``memory``, ``time``, and later ``predicted``."""
    values = dataclasses.asdict(case)
    for entry in sweep["cases"]:
        if entry["case"] == values:
            return entry
    entry: dict[str, Any] = {"case": values, "held_out": held_out}
    sweep["cases"].append(entry)
    return entry


# -- measuring ---------------------------------------------------------------------------------------------------------


def step(model: Any, batch: Mapping[str, Tensor], optimizer: Any, autocast: bool, device: str) -> None:
    with torch.autocast(device, torch.bfloat16) if autocast else nullcontext():
        loss = model(**batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def pulse() -> float:
    """Seconds of a little work of the host that is always the same: calls from Python, and logarithms on all threads."""
    x, y = torch.ones(1), torch.ones(1 << 18)

    def once() -> float:
        started = time.perf_counter()
        for _ in range(300):
            x + x
        torch.special.entr(y)
        return time.perf_counter() - started

    return min(once() for _ in range(5))


def best_pulse(seconds: float = 15) -> float:
    ends, found = time.monotonic() + seconds, [pulse()]
    while time.monotonic() < ends:
        time.sleep(0.05)
        found.append(pulse())
    return min(found)


def calm_steps(run: Callable[[], float], best: float, wanted: int, patience: float) -> dict[str, list[float]]:
    """What ``run`` gives, in seconds, of as many calm steps as are wanted; of all steps, where ``patience`` seconds bring none."""
    seconds, paces = [], []
    waited = 0.0
    while len(seconds) < TRIES and sum(pace <= CALM for pace in paces) < wanted:
        before = pulse()
        while before > CALM * best and waited < patience:
            time.sleep(0.1)
            waited += 0.1
            before = pulse()
        seconds.append(run())
        paces.append(max(before, pulse()) / best)
        if waited >= patience and len(seconds) >= 2 * wanted:
            break
    counted = [place for place, pace in enumerate(paces) if pace <= CALM] or list(range(len(paces)))
    return {"seconds": [seconds[place] for place in counted], "pace": [round(paces[place], 3) for place in counted]}


def measure_on_gpu(case: Case, workspace: int, best: float, patience: float) -> dict[str, Any]:
    """``workspace``: bytes of products, which are there before and belong to the case as to any."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() - workspace
    model, batch = make(case, "cuda")
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)
    autocast = case.dtype == "autocast"
    for _ in range(2):
        step(model, batch, optimizer, autocast, "cuda")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()

    def timed() -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step(model, batch, optimizer, autocast, "cuda")
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000

    found = calm_steps(timed, best, STEPS, patience)
    return {
        "memory": {
            "trained": sum(p.numel() for p in trained),
            "peak_bytes": torch.cuda.max_memory_allocated() - before,
            "reserved_bytes": torch.cuda.max_memory_reserved(),
        },
        "time": found,
    }


def pages() -> dict[str, int]:
    """This process's pages in bytes: the most there were, and by kind."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    found = {name: value for name, _, value in (line.partition(":") for line in lines)}
    return {name: 1024 * int(found[name].split()[0]) for name in ("VmHWM", "RssAnon", "RssFile")}


def measure_on_cpu(case: Case, what: str, best: float, patience: float) -> dict[str, Any]:
    """In a process of its own that has computed nothing so far."""
    gc.collect()
    before = pages()
    model, batch = make(case, "cpu")
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)
    made = pages()
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the most there were is counted anew

    def timed() -> float:
        started = time.perf_counter()
        step(model, batch, optimizer, case.dtype == "autocast", "cpu")
        return time.perf_counter() - started

    timed()  # makes the optimizer's states
    steps = calm_steps(timed, best, STEPS - 1, patience) if what == "time" else {"seconds": [timed()]}
    after = pages()
    found = {
        "trained": sum(p.numel() for p in trained),
        "peak_bytes": after["VmHWM"] - after["RssFile"] - before["RssAnon"],  # files' pages stay once they are read
        "making_bytes": made["VmHWM"] - made["RssFile"] - before["RssAnon"],
        "files_bytes": after["RssFile"] - before["RssFile"],
    }
    return {"memory": found} if what == "memory" else {"time": {**steps, **found}}


def forked(work: Any, *args: Any) -> Any:
    """What a function gives in a process of its own, as JSON. Raises RuntimeError where it fails or is ended."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        code = 1
        try:
            os.close(reading)
            with os.fdopen(writing, "w") as file:
                try:
                    json.dump({"found": work(*args)}, file)
                except Exception as error:  # whatever it is: it belongs into the record, and the others go on
                    json.dump({"error": described(error)}, file)
            code = 0
        finally:
            os._exit(code)
    os.close(writing)
    with os.fdopen(reading) as file:
        text = file.read()
    _, status = os.waitpid(child, 0)
    if not text or status:
        raise RuntimeError(f"the process ended with status {status}")
    answer = json.loads(text)
    if "error" in answer:
        raise RuntimeError(answer["error"])
    return answer["found"]


def _on_threads(threads: int, work: Any, *args: Any) -> Any:
    torch.set_num_threads(threads)
    return work(*args)


def calibrate(device: str) -> dict[str, Any]:
    """A calibration whose figures are each measured while the machine is calm, and the best pulse."""
    from reltune.cost import calibration

    best, measured = best_pulse(), {name: getattr(calibration, name) for name in ("_seconds", "_on_device")}

    def calmly(name: str, run: Callable[[], Any], device: torch.device) -> float:
        found = []
        for _ in range(8):
            ends = time.monotonic() + 1
            while (before := pulse()) > CALM * best and time.monotonic() < ends:
                time.sleep(0.02)
            found.append(measured[name](run, device))
            if max(before, pulse()) <= CALM * best:
                break
        return min(found)

    for name in measured:
        setattr(calibration, name, functools.partial(calmly, name))
    try:
        return {"calibration": calibration.measure(torch.device(device)).to_dict(), "pulse": best}
    finally:
        for name, function in measured.items():
            setattr(calibration, name, function)


def with_malloc(what: str) -> None:
    """Begin this process anew where malloc is not as ``what`` wants it: it is set up before Python begins."""
    wanted = str(MAPPED) if what == "memory" else None
    if os.environ.get("MALLOC_MMAP_THRESHOLD_") != wanted:
        others = {name: value for name, value in os.environ.items() if name != "MALLOC_MMAP_THRESHOLD_"}
        own = {} if wanted is None else {"MALLOC_MMAP_THRESHOLD_": wanted}
        sys.stdout.flush()
        os.execve(sys.executable, [sys.executable, *sys.argv], {**others, **own})


def imported() -> None:
    """Import what any case needs, and compute nothing: threads would not survive a fork."""
    import peft  # noqa: F401
    import transformers

    import reltune.tuner.model  # noqa: F401

    for name in ("CausalLM", "SequenceClassification", "Seq2SeqLM", "ImageClassification"):
        getattr(transformers, f"AutoModelFor{name}")
    for kind in ("bert", "distilbert", "llama", "gpt2", "qwen2", "t5", "bart", "vit", "mixtral", "qwen2_moe"):
        __import__(f"transformers.models.{kind}.modeling_{kind}")


def measure(options: argparse.Namespace) -> int:
    gpu = options.device != "cpu"
    if not gpu:
        with_malloc(options.what)
    kinds = ("memory", "time") if gpu else (options.what,)
    cases: Sequence[Case] = TINY if options.tiny else GPU if gpu else CPU
    if options.drawn:
        cases = drawn(*options.drawn, gpu=gpu, liger=gpu)
    path = Path(options.record)
    record = read(path)
    sweep = sweep_of(record, options)
    done = {"commit": commit(options.commit), "hardware": hardware(torch.device(options.device))}
    sweep.setdefault("measured", {}).update(dict.fromkeys(kinds, done))
    sweep["versions"] = versions(["liger-kernel"])
    if options.drawn:
        if sweep.get("drawn") not in (None, options.drawn):  # an earlier draw has been seen
            for entry in sweep["cases"]:
                entry["held_out"] = False
        sweep["drawn"] = options.drawn
        cases = [case for case in cases if entry_of(sweep, case, True)["held_out"]]
    if options.again:
        cases = [Case(**entry["case"]) for entry in sweep["cases"] if not entry["held_out"]]
    if gpu:
        prepare_gpu(sweep)
    else:
        imported()
    if "time" in kinds and (gpu or not options.keep_calibration):
        sweep.update(calibrate("cuda") if gpu else forked(_on_threads, options.threads, calibrate, "cpu"))
        write(path, record)
    elif "time" in kinds and "pulse" not in sweep:
        sweep["pulse"] = forked(_on_threads, options.threads, best_pulse)
    ends = time.monotonic() + options.seconds
    for case in cases:
        entry = entry_of(sweep, case, bool(options.drawn))
        if not options.again and all(kind in entry and "error" not in entry[kind] for kind in kinds):
            continue
        if time.monotonic() > ends:
            print("out of time; the same command goes on", file=sys.stderr)
            break
        try:
            found = (
                measure_on_gpu(case, sweep["workspace_bytes"], sweep["pulse"], options.patience)
                if gpu
                else forked(
                    *(_on_threads, options.threads, measure_on_cpu, case, options.what),
                    *(sweep.get("pulse", 0.0), options.patience),
                )
            )
        except Exception as error:  # whatever it is: it belongs into the record, and the others go on
            found = {kind: {"error": described(error) if gpu else str(error)} for kind in kinds}
        entry.update(found)
        print(f"{case}: {shown(found)}", file=sys.stderr, flush=True)
        write(path, record)
    print(path)
    return 0


def prepare_gpu(sweep: dict[str, Any]) -> None:
    """The workspaces of products are there before the first case, and what they and the context take is known."""
    warm = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    (warm @ warm).sum().backward()
    torch.cuda.synchronize()
    del warm
    sweep["workspace_bytes"] = torch.cuda.memory_allocated()
    free, total = torch.cuda.mem_get_info()
    # Of this process, where it has the device alone.
    sweep["context_bytes"] = total - free - torch.cuda.memory_reserved()


def shown(found: Mapping[str, Any]) -> str:
    parts = []
    for kind, values in found.items():
        if "error" in values:
            parts.append(str(values["error"]))
        elif kind == "memory":
            parts.append(f"{values['peak_bytes'] / GIB:.3f} GiB")
        else:
            parts.append(f"{statistics.median(values['seconds']):.4f} s")
    return ", ".join(parts)


# -- predicting --------------------------------------------------------------------------------------------------------


def count(case: Case, cuda: bool) -> Any:
    from reltune.cost.step import Conditions, count_step, counting

    conditions = Conditions(cuda=cuda, autocast=torch.bfloat16 if case.dtype == "autocast" else None, liger=case.liger)
    with counting(conditions):
        model, batch = make(case, "meta")
        return count_step(model, batch, conditions)


def predicted(case: Case, cuda: bool, calibration: Any) -> dict[str, Any]:
    from reltune.cost.memory import allocated, reserved, resident_on_cpu
    from reltune.cost.timing import step_time

    counted = count(case, cuda)
    return {
        "trained": counted.trained,
        "peak_bytes": allocated(counted) if cuda else resident_on_cpu(counted),
        "reserved_bytes": reserved(counted) if cuda else None,
        "by_area": counted.peak,
        "by_fitcheck": by_fitcheck(case, cuda),
        "seconds": None if calibration is None else dataclasses.asdict(step_time(counted, calibration)),
    }


def predict(options: argparse.Namespace) -> int:
    """Write predictions beside what was measured, and print how near they are."""
    from reltune.cost.calibration import Calibration

    path = Path(options.record)
    record = read(path)
    for sweep in record["sweeps"]:
        told = options.cuda is None or sweep["cuda"] == options.cuda
        if told:
            sweep["predicted_with"] = versions()
        calibration = None if sweep["calibration"] is None else Calibration.from_dict(sweep["calibration"])
        for entry in sweep["cases"]:
            if all("error" in entry.get(kind, {"error": ""}) for kind in ("memory", "time")):
                continue
            case = Case(**entry["case"])
            # What code that is replaced took is told by what was there with it.
            if told and options.held_out in (None, entry["held_out"]) and not entry.get("replaced"):
                entry["predicted"] = predicted(case, sweep["cuda"], calibration)
                if entry["held_out"]:  # stays as it is when the model is changed
                    entry.setdefault("unseen", {key: entry["predicted"][key] for key in ("peak_bytes", "seconds")})
            memory, seconds = (errors(entry).get(kind) for kind in ("memory", "time"))
            print(
                f"{case!s:52} {entry.get('memory', {}).get('peak_bytes', 0) / GIB:7.3f} GiB {_percent(memory):>8}   "
                f"{1000 * seconds_of(entry):8.1f} ms {_percent(seconds):>8}",
                flush=True,
            )
    write(path, record)
    for line in table(record):
        print(line)
    if options.picture:
        Path(options.picture).write_text(picture(record, errors), encoding="utf-8")
    return 0


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:+.2%}"


def seconds_of(entry: Mapping[str, Any]) -> float:
    """The least of the measured steps: what else a machine does makes steps longer, and none shorter."""
    return min(entry.get("time", {}).get("seconds") or [0.0])


def errors(entry: Mapping[str, Any]) -> dict[str, float]:
    """Predicted over measured, less one: of memory and of time, as far as both are there."""
    found: dict[str, float] = {}
    values = entry.get("predicted")
    if values is None:
        return found
    if "peak_bytes" in entry.get("memory", {}):
        found["memory"] = values["peak_bytes"] / entry["memory"]["peak_bytes"] - 1
    if values["seconds"] is not None and seconds_of(entry):
        found["time"] = sum(values["seconds"].values()) / seconds_of(entry) - 1
    return found


def by_fitcheck(case: Case, cuda: bool) -> int | None:
    """What fitcheck-llm says of the same case, in bytes, where it knows such cases and is installed; on a CPU without what it adds for the
    card's context."""
    try:
        from fitcheck.config_parser import ModelConfig, _count_params, _parse_fields
        from fitcheck.estimator import TrainingConfig, estimate
        from fitcheck.gpu_db import get_gpu
    except ImportError:
        return None
    known = case.model.startswith(("llama", "qwen2-small")) and case.layers == "all"
    if not known or case.method not in ("lora", "lora_bf16", "full") or case.liger or case.dtype == "autocast":
        return None
    fields = _parse_fields(MODELS[case.model][1]().to_dict())
    model = ModelConfig(name=case.model, num_params=_count_params(fields), **dataclasses.asdict(fields))
    precision = "bf16" if case.dtype == "bfloat16" else "fp32"
    training = TrainingConfig(
        precision=precision,
        optimizer_dtype="bf16" if case.method == "full" and precision == "bf16" else "fp32",
        batch_size=case.batch,
        seq_len=case.length,
        lora_rank=None if case.method == "full" else case.rank,
        lora_targets=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        grad_checkpoint=case.checkpointing,
        flash_attn=True,
    )
    found = estimate(model, training, get_gpu("h200"))
    return int((found.total_mib - (0.0 if cuda else found.overhead_mib)) * 2**20)


def table(record: Mapping[str, Any]) -> Iterator[str]:
    for sweep in record["sweeps"]:
        for held_out in (False, True):
            own = [each for each in sweep["cases"] if each["held_out"] == held_out and {"memory", "time"} & each.keys()]
            if not own:
                continue
            failed = sum("error" in entry.get(kind, {}) for entry in own for kind in ("memory", "time"))
            yield f"\n{sweep['device']}, {len(own)} cases, {'held out' if held_out else 'fitted'}; {failed} failed"
            yield from _shares([errors(entry) for entry in own], "")
            before = [errors({**entry, "predicted": entry["unseen"]}) for entry in own if "unseen" in entry]
            yield from _shares(before, ", as told before they were seen,")
        yield from _beside_fitcheck(sweep)


def _shares(found: Sequence[Mapping[str, float]], how: str) -> Iterator[str]:
    for kind, limit in (("memory", 0.05), ("time", 0.15)):
        some = [each[kind] for each in found if kind in each]
        if some:
            yield (
                f"  {kind} of {len(some)}{how} within {limit:.0%}: {share(some, limit):.0%}; "
                f"lowest {min(some):+.1%}, highest {max(some):+.1%}"
            )


def _beside_fitcheck(sweep: Mapping[str, Any]) -> Iterator[str]:
    """Predictions of what is reserved with the context on a GPU, of what tensors take on a CPU."""
    own = [
        entry
        for entry in sweep["cases"]
        if entry.get("predicted", {}).get("by_fitcheck") and "peak_bytes" in entry.get("memory", {})
    ]
    if not own:
        return
    if sweep["cuda"]:
        context = sweep["context_bytes"]
        truth = [entry["memory"]["reserved_bytes"] + context for entry in own]
        ours = [entry["predicted"]["reserved_bytes"] + CONTEXT for entry in own]
    else:
        truth = [entry["memory"]["peak_bytes"] for entry in own]
        ours = [entry["predicted"]["peak_bytes"] for entry in own]
    theirs = [entry["predicted"]["by_fitcheck"] for entry in own]
    for name, said in (("here", ours), ("fitcheck-llm", theirs)):
        off = [value / true - 1 for value, true in zip(said, truth, strict=True)]
        mean = statistics.mean(map(abs, off))
        yield f"  memory of {len(own)} LoRA and full cases, {name}: mean {mean:.1%}, {min(off):+.1%} to {max(off):+.1%}"


def share(found: Sequence[float], limit: float) -> float:
    return sum(abs(error) <= limit for error in found) / len(found)


# -- records that were there before ------------------------------------------------------------------------------------

# Methods of tuner_step.py on the 8B model, 4 × 2048 tokens, and the same as cases here. The tuner was another one then, PEFT's LoRA was not.
RECORDED = {
    "LoRA, r = 16, bf16": Case("llama-8b", "lora_bf16", 4, 2048),
    "LoRA, r = 16": Case("llama-8b", "lora", 4, 2048),
}


def of_records(options: argparse.Namespace) -> int:
    """Predict what an earlier record holds, on a card by its data sheet."""
    from reltune.cost.devices import calibration_of, card
    from reltune.cost.memory import allocated
    from reltune.cost.timing import step_time

    calibration = calibration_of(card("h200"))
    assert calibration is not None
    rows = []
    for path in options.files:
        record = json.loads(Path(path).read_text(encoding="utf-8"))
        for measured in (m | {"case": c["case"]} for c in record["cases"] for m in c["methods"]):
            case = RECORDED.get(measured["method"])
            if (
                case is None
                or measured["case"].startswith("fp8")
                or measured["error"]
                or not measured.get("peak_bytes")
            ):
                continue
            case = dataclasses.replace(case, liger="liger" in measured["case"])
            # What the process held before, of earlier methods, is not the method's.
            held = min(
                m["held_bytes"][0]
                for c in record["cases"]
                for m in c["methods"]
                if c["case"] == measured["case"] and m["method"] == "floor"
            )
            counted = count(case, cuda=True)
            peak = measured["peak_bytes"][0] - max(0, held - WEIGHTS_8B)
            row = {
                "record": Path(path).name,
                "method": measured["method"],
                "case": dataclasses.asdict(case),
                "measured": {"peak_bytes": peak, "seconds": statistics.median(measured["seconds"])},
                "predicted": {"peak_bytes": allocated(counted), "seconds": step_time(counted, calibration).seconds},
            }
            rows.append(row)
            memory, seconds = (row["predicted"][key] / row["measured"][key] - 1 for key in ("peak_bytes", "seconds"))
            print(
                f"{row['record']:26} {case!s:44} {peak / GIB:7.3f} GiB {memory:+7.2%}  {row['measured']['seconds']:.3f} s {seconds:+6.1%}",
                flush=True,
            )
    target = Path(options.output_dir) / "cost_records.json"
    about = {"benchmark": "cost_records", **commit(options.commit), "versions": versions(), "rows": rows}
    target.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    print(target)
    return 0


WEIGHTS_8B = 16127780864  # bytes that the model alone holds on the device, with the workspaces


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    measuring = commands.add_parser("measure")
    measuring.add_argument("--device", default="cpu")
    measuring.add_argument("--what", choices=("memory", "time"), default="memory", help="on a CPU")
    measuring.add_argument("--threads", type=int, default=2)
    measuring.add_argument("--commit", default="")
    measuring.add_argument("--drawn", type=int, nargs=2, metavar=("SEED", "N"))
    measuring.add_argument("--seconds", type=float, default=3600, help="no case begins later")
    measuring.add_argument("--patience", type=float, default=30, help="seconds that a case may wait for calm")
    measuring.add_argument("--keep_calibration", action="store_true", help="go by the one that the record has")
    measuring.add_argument("--again", action="store_true", help="what the record has and is not held out, anew")
    measuring.add_argument("--tiny", action="store_true")
    predicting = commands.add_parser("predict")
    predicting.add_argument(
        "--held_out", action=argparse.BooleanOptionalAction, help="of these cases alone, or of the others"
    )
    predicting.add_argument(
        "--cuda",
        action=argparse.BooleanOptionalAction,
        help="of GPUs alone, or of CPUs: with the transformers that was measured",
    )
    predicting.add_argument("--picture", default=str(PICTURE))
    for each in (measuring, predicting):
        each.add_argument("--record", default=str(RECORD))
    records = commands.add_parser("records")
    records.add_argument("files", nargs="+", metavar="FILE")
    records.add_argument("--commit", default="")
    records.add_argument("--output_dir", default=str(Path(__file__).parent / "results"))
    options = parser.parse_args()
    if options.command == "records":
        return of_records(options)
    return measure(options) if options.command == "measure" else predict(options)


if __name__ == "__main__":
    raise SystemExit(main())
