"""Kills reltune at random moments, gives the same command again, and compares the result with an uninterrupted one, bit for bit.

    python benchmarks/interruption.py --moments 64 --commit HASH --output_dir benchmarks/results

A moment is a SIGKILL: after a random time, or before a random change of a file (it is opened for writing, renamed or
removed; a directory is made). Each trial is killed once to five times, and then left to end. Compared are relevance, plan,
adapter, metrics, what the model wrote, the records of the sweep and of the comparison, and the export; nothing half-written may be left. Every process
is a fork of one that has imported everything, on a CPU, with one thread. Intermediate results of the analysis are saved five times a
second instead of every few minutes, so that going on from them is tried too.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from argparse import ArgumentParser
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.numpy import load_file
from tqdm import tqdm

from harness import Benchmark, arguments, benchmark
from reltune.cli.commands import main as reltune
from reltune.errors import InputError
from reltune.files import PARTIAL, REMOVED
from reltune.relevance import resumption
from reltune.runs import flow  # noqa: F401  everything is imported before the first fork
from reltune.runs.directory import RunDirectory
from reltune.runs.lock import LOCK

WORDS = {"pos": ("good", "great", "fine"), "neg": ("bad", "poor", "dull"), "": ("film", "book", "very", "not")}
TIMES = ("train_seconds_per_step", "train_peak_memory_bytes", "test_perplexity_seconds")
TIMES += ("seconds", "seconds_per_step", "peak_memory_bytes", "analysis_seconds")
KINDS = ("time", "change")


def cases(place: Path) -> dict[str, list[list[str]]]:
    """The commands of each case; RUN stands for the run's directory, OUT for a directory to export to."""
    model = ["--model_name_or_path", str(place / "model")]
    files = [*model, "--train_file", str(place / "train.csv"), "--output_dir", "RUN"]
    held_out = ["--validation_file", str(place / "held.csv"), "--test_file", str(place / "held.csv")]
    often = ["--save_strategy", "steps", "--save_steps", "2", "--eval_strategy", "steps", "--eval_steps", "2"]
    short = ["--per_device_train_batch_size", "8", "--max_steps", "9", *often]
    columns = ["--granularity", "column", "--budget", "5%"]
    probe = ["--probe_steps", "12", "--analysis_batch_size", "8", "--budget", "2%"]
    few = ["--sizes", "usual", "--seeds", "1", "--rate_trials", "1", "--head_epochs", "1"]
    return {
        "run": [["run", *files, *probe, *short, "--load_best_model_at_end", "--export", "merged"]],
        "run, streamed": [
            ["run", *files, *held_out, "--streaming", *columns, *short, "--per_device_train_batch_size", "16"]
        ],
        "run, method full": [["run", *files, "--method", "full", *short]],
        "sweep": [["run", *files, *columns, "--sweep", "learning_rate=1e-3,1e-2", *short, "--max_steps", "5"]],
        "comparison": [
            ["compare", *files, *probe[:4], "--methods", "weights,lora", *few, *short[:2], "--max_steps", "3"]
        ],
        "stages": [
            ["analyze", *files, "--criteria", "movement,fisher", *probe[:4]],
            ["select", "RUN", "--granularity", "direction", "--budget", "2%"],
            ["tune", "RUN", *short],
            ["evaluate", "RUN"],
            ["export", "RUN", "--to", "lora", "--output_dir", "OUT"],
        ],
    }


def prepare(place: Path) -> None:
    """A BERT with random weights and no classifier, and reviews that can be told apart by their words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", *(word for some in WORDS.values() for word in some)]
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(
        place / "model"
    )
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = BertConfig(vocab_size=len(words), num_attention_heads=2, max_position_embeddings=64, **sizes)
    BertModel(config).save_pretrained(place / "model")
    draw = random.Random(0)
    for name, count in (("train.csv", 60), ("held.csv", 20)):
        rows = [("pos", "neg")[number % 2] for number in range(count)]
        texts = [" ".join((*draw.choices(WORDS[label], k=2), *draw.choices(WORDS[""], k=4))) for label in rows]
        lines = [f"{text},{label}\n" for text, label in zip(texts, rows, strict=True)]
        (place / name).write_text("text,label\n" + "".join(lines), encoding="utf-8")


# -- one process ----------------------------------------------------------------------------------------------------


def changes(path: str, seen: Callable[[], None]) -> Callable[[str, tuple[Any, ...]], None]:
    """An audit hook that calls ``seen`` before each change of a file below the path."""

    def hook(event: str, found: tuple[Any, ...]) -> None:
        if event == "open":
            name, mode, flags = found
            writes = any(letter in str(mode or "") for letter in "wax+") or flags & (os.O_WRONLY | os.O_RDWR)
        else:
            name, writes = (found or (None,))[0], event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir")
        if writes and isinstance(name, str | os.PathLike) and os.fspath(name).startswith(path):
            seen()

    return hook


def child(words: list[str], run: Path, log: Path, before: int | None, told: int) -> None:
    """Run the command in this process, a fork, which kills itself before the change of that number; tell how many there were."""
    count = 0

    def seen() -> None:
        nonlocal count
        count += 1
        if count == before:
            os.kill(os.getpid(), signal.SIGKILL)

    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.addaudithook(changes(str(run.parent), seen))
    code: Any = 1
    try:
        with mock.patch.object(sys, "argv", ["reltune", *words]):
            reltune()
    except SystemExit as end:
        code = end.code
    finally:
        os.write(told, f"{count}".encode())
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


def called(words: list[str], run: Path, log: Path, before: int | None = None, after: float | None = None) -> Any:
    """Exit code (a negative signal's number where it was killed), changes and seconds of a command in a process of its own.

    It is killed ``before`` a change or ``after`` some seconds, if it lives as long.
    """
    read, write = os.pipe()
    began = time.perf_counter()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        child(words, run, log, before, write)
    os.close(write)
    while after is not None and time.perf_counter() - began < after:
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            break
        time.sleep(0.002)
    else:
        if after is not None:
            os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    seconds = time.perf_counter() - began
    told = os.read(read, 32)
    os.close(read)
    return os.waitstatus_to_exitcode(status), int(told or 0), seconds


# -- what is compared -----------------------------------------------------------------------------------------------


def timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: timeless(held) for key, held in value.items() if key not in TIMES}
    return [timeless(held) for held in value] if isinstance(value, list) else value


def contents(run: Path, out: Path) -> dict[str, Any]:
    """What a run came to, without the times that it took."""
    found: dict[str, Any] = {}
    files = {
        str(path.relative_to(place.parent)): path
        for place in (run, out)
        for path in place.rglob("*")
        if "checkpoint-" not in str(path.relative_to(place))
    }
    for name, path in files.items():
        if path.suffix == ".safetensors":
            found[name] = {key: (str(v.dtype), v.shape, v.tobytes()) for key, v in load_file(path).items()}
        elif path.name in ("plan.yaml", "outputs.jsonl", "sweep.json", "task.json", "bad_rows.json"):
            found[name] = path.read_text(encoding="utf-8")
        elif path.name in ("all_results.json", "scores.json", "comparison.json", "result.json", "test.json"):
            found |= {f"{name}: {key}": v for key, v in timeless(json.loads(path.read_text(encoding="utf-8"))).items()}
    return {**found, "files": sorted(files)}


def differing(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """The parts in which two runs differ, short ones with both values."""
    parts = sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))
    return [f"{part} ({one.get(part)}, {other.get(part)})" if len(str(one.get(part))) < 60 else part for part in parts]


def left_over(run: Path) -> list[str]:
    names = [path.name for place in (run.parent,) for path in place.rglob("*")]
    return [name for name in names if name == LOCK or name.endswith((PARTIAL, REMOVED))]


def stage(run: Path) -> str:
    """How far a run had come when it was killed."""
    try:
        directory, config = RunDirectory.open(run)
    except InputError:
        return "comparison, in part" if (run / "seeds").is_dir() else "start"
    found = directory.next_stage(config) or "end"
    if found == "analysis" and list(run.glob("relevance/*partial.safetensors")):
        return "analysis, in part"
    return "training, in part" if found in ("training", "sweep") and list(run.rglob("checkpoint-*")) else found


# -- trials ---------------------------------------------------------------------------------------------------------


class Harness:
    """Cases with what they come to uninterrupted, and how long each of their commands takes."""

    def __init__(self, place: Path, names: list[str]) -> None:
        self.place, self.commands = place, cases(place)
        self.commands = {name: self.commands[name] for name in names or self.commands}
        self.whole: dict[str, dict[str, Any]] = {}
        self.tried: Counter[str] = Counter()
        self.sizes: dict[str, list[tuple[int, float]]] = {}  # changes and seconds of each command
        for name in self.commands:
            run, out, log = self.fresh()
            sizes = []
            for words in self.commands[name]:
                code, changed, seconds = called(self.words(words, run, out), run, log)
                if code:
                    raise RuntimeError(f"{name} uninterrupted: {log.read_text()[-2000:]}")
                sizes.append((changed, seconds))
            self.sizes[name], self.whole[name] = sizes, contents(run, out)

    def fresh(self) -> tuple[Path, Path, Path]:
        folder = self.place / "trial"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        return folder / "run", folder / "out", self.place / "log.txt"

    @staticmethod
    def words(words: list[str], run: Path, out: Path) -> list[str]:
        return [{"RUN": str(run), "OUT": str(out)}.get(word, word) for word in words]

    def trial(self, name: str, draw: random.Random, kills: int) -> dict[str, Any]:
        """Kill one of the case's commands so many times, let everything end, and compare."""
        run, out, log = self.fresh()
        log.unlink(missing_ok=True)
        sizes = self.sizes[name]
        victim = self.tried[name] % len(sizes)  # the commands in turn
        self.tried[name] += 1
        moments, problems, done = [], [], False
        for number, words in enumerate(self.commands[name]):
            given = self.words(words, run, out)
            for _ in range(kills if number == victim else 0):
                kind, (changed, seconds) = draw.choice(KINDS), sizes[number]
                before = draw.randint(1, changed) if kind == "change" else None
                after = draw.uniform(0, seconds) if kind == "time" else None
                code, _, _ = called(given, run, log, before, after)
                if code == -signal.SIGKILL:
                    moments.append({"command": given[0], "kind": kind, "at": before or after, "stage": stage(run)})
                else:  # it had ended before that moment, or the time before
                    if code != 0 and not (code == 2 and self.finished(given, run, out)):
                        problems.append(f"{given[0]} ended with {code}")
                    break
            code, _, _ = called(given, run, log)
            if number == victim and code == 2:
                done = self.finished(given, run, out)
            if code != 0 and not (done and number == victim):
                problems.append(f"{given[0]} given again ended with {code}: {log.read_text()[-400:]}")
                break
        if not problems:
            if done:  # killed when all was done but for this
                (run / LOCK).unlink(missing_ok=True)
            problems += [f"{part} differs" for part in differing(self.whole[name], contents(run, out))]
            problems += [f"{part} is left" for part in left_over(run)]
        return {"case": name, "moments": moments, "problems": problems}

    @staticmethod
    def finished(given: list[str], run: Path, out: Path) -> bool:
        """Whether the command was killed when all was done, so that it says so."""
        results = {"analyze": run / "relevance" / "scores.json", "select": run / "plan" / "plan.yaml", "export": out}
        results |= {"tune": run / "adapter", "evaluate": run / "all_results.json"}
        return results.get(given[0], run / "report.html").exists()


def record(bench: Benchmark, trials: list[dict[str, Any]], wanted: int) -> None:
    """Write down the trials so far and what they show."""
    kills = [moment for trial in trials for moment in trial["moments"]]
    bench.result |= {"trials": trials, "checks": []}
    kills_of = {trial["case"]: 0 for trial in trials}
    for trial in trials:
        kills_of[trial["case"]] += len(trial["moments"])
    bench.value("moments by case", kills_of)
    for key in ("command", "kind", "stage"):
        bench.value(f"moments by {key}", dict(sorted(Counter(moment[key] for moment in kills).items())))
    bench.check("moments", len(kills), wanted, at_least=True)
    bench.check("trials that differ from an uninterrupted run", sum(bool(trial["problems"]) for trial in trials), 0)


def main() -> int:
    parser = ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--moments", type=int, default=64, help="at least so many kills")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--most", type=int, default=5, help="kills of one trial")
    parser.add_argument("--cases", nargs="*", default=[], help="the cases to try; all if none is named")
    options = arguments(parser, "interruption")
    torch.set_num_threads(1)
    # All forks would share tqdm's lock between processes, and one that is killed while it holds it would stop the others.
    tqdm.set_lock(threading.RLock())
    tqdm.monitor_interval = 0  # no thread that may hold the lock while this process forks
    resumption.EVERY = 0.2
    bench = benchmark(options)
    bench.result["memory"] = "not measured"
    draw = random.Random(options.seed)
    trials: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        prepare(place)
        harness = Harness(place, options.cases)
        count = 0
        while count < options.moments:
            names = list(harness.commands)
            trial = harness.trial(names[len(trials) % len(names)], draw, draw.randint(1, options.most))
            trials.append(trial)
            count += len(trial["moments"])
            record(bench, trials, options.moments)
            bench.save(options.output_dir, options.name)  # a run that is cut short keeps what it has
            print(f"{count}: {json.dumps(trial)[:600]}", file=sys.stderr, flush=True)
    return bench.finish(options.output_dir, options.name)


if __name__ == "__main__":
    raise SystemExit(main())
