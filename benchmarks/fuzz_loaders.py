"""Whether any file makes a reader of reltune fail in another way than by its own errors, hang, or take memory.

    PYTHONPATH=src python benchmarks/fuzz_loaders.py --inputs 100000 --out benchmarks/results/fuzz_loaders.json
    PYTHONPATH=src python benchmarks/fuzz_loaders.py --coverage --seconds 600 --loader plan   # guided by coverage: pip install atheris

Each loader begins from valid files. A seeded mutation flips bits, cuts, splices and repeats bytes, puts in words that are known to
hurt, or edits the tree of JSON, YAML and of safetensors' headers; a part of the inputs has several mutations. Errors that may come are
InputError and StorageError. A call goes on from its record, and adds to it until it has --inputs. The record has, for each loader: inputs,
seconds, the errors by the function that raised them, the unexpected ones (there must be none) with the seed that makes them again, the
slowest input in CPU seconds, and the most memory that one input took. Exit code 1 if anything was unexpected, ended the process, took
more than 2 s, or more memory than twice its size and 64 MiB.

Inputs that fail are kept in --findings. Linux only.
"""

from __future__ import annotations

import argparse
import base64
import collections
import contextlib
import copy
import functools
import hashlib
import importlib.util
import json
import marshal
import multiprocessing
import os
import platform
import random
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

Files = dict[str, bytes]
HURTING = [
    *(
        b"\0",
        b"\xff\xfe",
        b"\xef\xbb\xbf",
        b"\xf0\x9f\x99\x82",
        b"\n",
        b"\r",
        b"\t",
        b'"',
        b"'",
        b"\\",
        b",",
        b":",
        b"\xe2\x80\xa8",
    ),
    *(
        b"[" * 2000,
        b'{"a":' * 2000,
        b"- " * 300,
        b"&a ",
        b"*a",
        b"<<: *a",
        b"!!python/object:os.system ",
        b"!!binary ",
        b"? ",
        b"---\n",
    ),
    *(b"NaN", b"-Infinity", b"1e999", b".inf", b"2001-99-99", b"0x", b"-1", b"0", b"true", b"null", b"~", b"[]", b"{}"),
    *(str(n).encode() for n in (2**31, 2**53, 2**63 - 1, 2**63, 2**64, 10**30)),
    b"9" * 5000,
    b"x" * 200_000,
    b"../../../etc/passwd",
]
VALUES: list[Any] = [
    *(
        None,
        True,
        False,
        0,
        1,
        -1,
        2,
        2**31,
        2**63 - 1,
        2**63,
        2**70,
        10**30,
        0.5,
        -0.0,
        1e308,
        float("nan"),
        float("inf"),
    ),
    *(
        "",
        "x",
        "\0",
        "a" * 10_000,
        "../x",
        "1",
        "é\u2028",
        "__class__",
        [],
        {},
        [[]],
        [None],
        [0, 0],
        ["a", "a"],
        {"": None},
        {"x": [1]},
    ),
]
LONGEST, ALARM = 2.0, 60  # CPU seconds that an input may take, and after which its process is ended
MEMORY = 64 * 2**20
SLICE = 5000  # inputs of one process
SOURCE = os.path.dirname(importlib.util.find_spec("reltune").origin)  # type: ignore[union-attr,type-var]
SHARED = Path("/dev/shm")
CACHE = (SHARED if SHARED.is_dir() else Path(tempfile.gettempdir())) / f"fuzz-{os.getpid()}"  # of datasets


# -- mutations ------------------------------------------------------------------------------------------------------


def mutated_bytes(data: bytes, other: bytes, rng: random.Random) -> bytes:
    held = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        at = rng.randrange(len(held) + 1)
        size = min(rng.choice((1, 2, 4, 8, 64, 1024)), len(held) - at)
        kind = rng.randrange(8)
        if kind == 0 and size:
            held[at] ^= 1 << rng.randrange(8)
        elif kind == 1 and size:
            held[at] = rng.randrange(256)
        elif kind == 2:
            del held[at : at + size]
        elif kind == 3:
            held[at:at] = held[at : at + size] * rng.choice((1, 2, 50))
        elif kind == 4:
            held[at : at + rng.choice((0, size))] = rng.choice(HURTING)
        elif kind == 5:
            start = rng.randrange(len(other) + 1)
            held[at : at + size] = other[start : start + rng.choice((1, 8, 64, 1024))]
        elif kind == 6:
            del held[at:]
        elif size:
            held[at : at + size] = rng.randbytes(size)
    return bytes(held)


def places(tree: Any) -> list[tuple[Any, Any]]:
    """Every (holder, key) of a tree of lists and mappings."""
    found: list[tuple[Any, Any]] = []
    waiting = [tree]
    while waiting and len(found) < 5000:
        holder = waiting.pop()
        keys = list(holder) if isinstance(holder, dict) else range(len(holder)) if isinstance(holder, list) else ()
        found += [(holder, key) for key in keys]
        waiting += [holder[key] for key in keys]
    return found


@functools.lru_cache(maxsize=256)
def parsed(data: bytes) -> bytes:
    """A tree of JSON or YAML, as what makes a copy of it soonest."""
    import yaml

    return marshal.dumps(yaml.load(data, yaml.CSafeLoader) if data[:1] not in b"{[" else json.loads(data))


def mutated_tree(tree: bytes, rng: random.Random) -> Any:
    root = [marshal.loads(tree)]
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        holder, key = rng.choice(places(root))
        kind, value = rng.randrange(8), holder[key]
        if kind <= 2:
            holder[key] = copy.deepcopy(rng.choice(VALUES))
        elif (kind == 3 and isinstance(holder, dict)) or (kind == 3 and holder is not root):
            del holder[key]
        elif kind == 4:
            other, name = rng.choice(places(root))
            holder[key] = copy.deepcopy(other[name])
        elif kind == 5 and isinstance(holder, dict):
            holder[rng.choice(("x", "", f"{key}x", "0", "__metadata__"))] = copy.deepcopy(value)
        elif kind == 5:
            holder.insert(rng.randrange(len(holder) + 1), copy.deepcopy(value)) if holder is not root else None
        elif kind == 6 and isinstance(value, int | float):
            holder[key] = rng.choice(
                (value + 1, value - 1, -value, value * 2, value * 10**9, float(value), str(value), [value])
            )
        else:
            for _ in range(rng.choice((1, 3, 100))):
                value = [value] if rng.random() < 0.5 else {"x": value}
            holder[key] = value
    return root[0]


def mutated(name: str, data: bytes, other: bytes, rng: random.Random) -> bytes:
    """One file, mutated by its form as often as by its bytes."""
    import yaml

    if rng.random() < 0.5:
        with contextlib.suppress(
            ValueError, LookupError, struct.error, RecursionError, yaml.YAMLError, TypeError, OverflowError
        ):
            if name.endswith(".safetensors"):
                length = struct.unpack("<Q", data[:8])[0]
                header = mutated_tree(parsed(data[8 : 8 + length]), rng)
                held = json.dumps(header).encode()
                if rng.random() < 0.2:
                    held = mutated_bytes(held, other, rng)
                numbers = data[8 + length :]
                if rng.random() < 0.2:
                    numbers = mutated_bytes(numbers, other, rng)
                wrong = rng.choice((len(held),) * 8 + (0, 1, len(held) + 1, 2**32, 2**63, 2**64 - 1))
                return struct.pack("<Q", wrong) + held + numbers
            if name.endswith(".jsonl"):
                lines = data.splitlines()
                at = rng.randrange(len(lines))
                lines[at] = json.dumps(mutated_tree(parsed(lines[at]), rng)).encode()
                return b"\n".join(lines)
            if name.endswith(".json"):
                return json.dumps(mutated_tree(parsed(data), rng)).encode()
            if name.endswith(".yaml"):
                tree = mutated_tree(parsed(data), rng)
                if rng.random() < 0.7:  # which is YAML too, and written in a tenth of the time
                    return json.dumps(tree).encode()
                return yaml.dump(tree, Dumper=yaml.CSafeDumper).encode()
    if name.endswith(".safetensors") and len(data) > 8 and rng.random() < 0.5:  # numbers alone: indices, values
        length = struct.unpack("<Q", data[:8])[0]
        return data[: 8 + length] + mutated_numbers(data[8 + length :], rng)
    return mutated_bytes(data, other, rng)


def mutated_numbers(data: bytes, rng: random.Random) -> bytes:
    held = bytearray(data)
    for _ in range(rng.choice((1, 2, 8))):
        if len(held) >= 8:
            at = rng.randrange(len(held) // 8) * 8
            held[at : at + 8] = struct.pack(
                "<q", rng.choice((-1, 0, 1, 2, 3, 2**31, 2**62, -(2**63), 0x7FC000007FC00000))
            )
    return bytes(held)


# -- loaders --------------------------------------------------------------------------------------------------------


class Loader:
    """A name, valid files by their names in a directory, and what reads the directory. ``errors`` may come."""

    def __init__(self, name: str, files: Files, read: Callable[[Path], Any]) -> None:
        self.name, self.files, self.read = name, files, read


def contents(folder: Path) -> Files:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def configs() -> Iterator[Loader]:
    from reltune.config.comparison import ComparisonConfig
    from reltune.config.file import read_config
    from reltune.config.run_config import RunConfig

    text = b"# a run\nmodel_name_or_path: some/model\ntrain_file: train.csv\nbudget: 1%\ngranularity: [column, row]\nmax_length: 64\n"
    text += b"criteria: [fisher]\nseed: 3\ntraining: {learning_rate: 1.0e-3, max_steps: 5, bf16: false}\nsweep: {learning_rate: [1e-3, 1e-4]}\n"
    yield Loader("config", {"run.yaml": text}, lambda folder: read_config(folder / "run.yaml"))
    with tempfile.TemporaryDirectory() as place:
        RunConfig("some/model", train_file="train.csv", output_dir="out").save(Path(place) / "config.yaml")
        saved = contents(Path(place))
    yield Loader("run config", saved, lambda folder: RunConfig.load(folder / "config.yaml"))
    text = b"model_name_or_path: some/model\ntrain_file: train.csv\noutput_dir: out\nmethods: [columns, lora, full]\nseeds: 2\n"
    yield Loader(
        "comparison config", {"config.yaml": text}, lambda folder: ComparisonConfig.load(folder / "config.yaml")
    )


def plans() -> Iterator[Loader]:
    import numpy as np

    from reltune.plan import plan as module
    from reltune.plan.plan import ModulePlan, Plan

    vectors = np.random.default_rng(0).normal(size=(3, 8)).astype(np.float32)
    modules = {
        "a.linear": ModulePlan((6, 8), columns=[1, 3], rows=[5], elements=[0, 2, 47 - 8], bias=True),
        "a.conv": ModulePlan((6, 2, 3, 5), columns=[3], rows=[0], groups=2),
        "a.norm": ModulePlan((8,), weight=True),
        "a.along": ModulePlan((6, 8), directions=[0, 2], vectors=vectors),
    }
    plan = Plan(
        modules, "1%", 1000, 5000, "f" * 32, "fisher", ["column", "row"], always_trained=["head"], head_parameters=9
    )
    for name, most in (("plan", 20_000), ("plan with index file", 0)):
        with tempfile.TemporaryDirectory() as place:
            before, module.INLINE_INDICES = module.INLINE_INDICES, most
            plan.save(place)
            module.INLINE_INDICES = before
            saved = contents(Path(place))
        yield Loader(name, saved, lambda folder: "\n".join(Plan.load(folder).describe()))


def small_model() -> Any:
    import torch
    from torch import nn

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.inner, self.norm = nn.Linear(5, 7), nn.LayerNorm(7)
            self.conv = nn.Conv2d(4, 6, 2, groups=2)

        def forward(self, x: Any) -> Any:
            return self.norm(self.inner(x))

    return Net()


def tensor_files() -> Iterator[Loader]:
    import numpy as np
    import torch
    from peft import LoraConfig, get_peft_model

    from reltune.layers.fingerprint import Base
    from reltune.layers.inventory import take_inventory
    from reltune.methods.adapter import load_adapter, save_adapter
    from reltune.methods.registry import METHODS
    from reltune.plan.plan import ModulePlan, Plan
    from reltune.relevance.artefact import read_overview
    from reltune.relevance.resumption import Partial, nested
    from reltune.relevance.scores import RelevanceScores
    from reltune.tuner import ReltuneConfig

    model = small_model()
    inventory = take_inventory(model)
    parts: dict[str, Any] = {}
    for info in inventory.modules:
        if info.is_vector:
            parts[info.name] = {"norm": torch.tensor(0.5)}
        else:
            parts[info.name] = {
                "column": torch.rand(info.columns),
                "row": torch.rand(info.rows),
                "weight": torch.tensor(1.0),
            }
    facts = {"model": "m", "architecture": "Net", "examples": 4, "data": "d", "seed": 1, "weights": "w"}
    with tempfile.TemporaryDirectory() as place:
        RelevanceScores({"fisher": parts}, inventory, [], "f" * 32, facts).save(place)
        saved = contents(Path(place))

    def relevance(folder: Path) -> None:
        read_overview(folder)
        RelevanceScores.load(folder).overview()

    yield Loader("relevance", saved, relevance)

    vectors = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
    chosen = {
        "inner": ModulePlan((7, 5), columns=[1, 3], rows=[6], elements=[0, 2], bias=True),
        "norm": ModulePlan((7,), weight=True, bias=True),
        "conv": ModulePlan((6, 2, 2, 2), columns=[3], rows=[0], groups=2),
    }
    base = Base.of(model)
    plan = Plan(
        chosen, "all", 10**6, base.parameters, base.fingerprint, architecture=base.architecture, weights=base.weights
    )
    with tempfile.TemporaryDirectory() as place:
        save_adapter(get_peft_model(small_model(), ReltuneConfig(plan=plan)), Path(place), None)
        saved = {name: data for name, data in contents(Path(place)).items() if name != "README.md"}
    yield Loader("adapter", saved, lambda folder: load_adapter(small_model(), folder).merge_and_unload())
    along = Plan({"inner": ModulePlan((7, 5), directions=[0, 2], vectors=vectors)}, "all", 10**6, 10**6, "")
    with tempfile.TemporaryDirectory() as place:
        save_adapter(get_peft_model(small_model(), ReltuneConfig(plan=along)), Path(place), None)
        saved = {name: data for name, data in contents(Path(place)).items() if name != "README.md"}
    yield Loader("adapter of directions", saved, lambda folder: load_adapter(small_model(), folder).merge_and_unload())

    lora = LoraConfig(r=2, target_modules=["inner"], rank_pattern={"inner": 3}, modules_to_save=["norm"])
    with tempfile.TemporaryDirectory() as place:
        save_adapter(get_peft_model(small_model(), lora), Path(place), None)
        saved = {name: data for name, data in contents(Path(place)).items() if name != "README.md"}
    yield Loader("LoRA adapter", saved, lambda folder: load_adapter(small_model(), folder).merge_and_unload())

    bitfit = METHODS["bitfit"]
    trained = small_model()
    for name, parameter in trained.named_parameters():
        parameter.requires_grad_(name.endswith("bias"))
    with tempfile.TemporaryDirectory() as place:
        bitfit.save(trained, Path(place))
        saved = contents(Path(place))
    yield Loader("trained tensors", saved, lambda folder: bitfit.load(small_model(), folder))

    def state(folder: Path) -> None:
        partial = Partial(folder, "key")
        partial.of_something_else()
        if (found := partial.load()) is not None:
            with contextlib.suppress(ValueError):
                nested(found[1], torch.device("cpu"), set())

    with tempfile.TemporaryDirectory() as place:
        Partial(Path(place), "key").save(
            {"batches": 3}, {"votes/weight/inner": torch.rand(7, 5), "n/bias/inner": torch.rand(7)}
        )
        saved = contents(Path(place))
    yield Loader("probe state", saved, state)


def records() -> Iterator[Loader]:
    from reltune.files import read_json
    from reltune.report.record import ComparisonRecord
    from reltune.runs.directory import RunDirectory
    from reltune.runs.kept_rows import kept
    from reltune.runs.summary import _read_ways as read_ways
    from reltune.runs.summary import read_lm_eval

    way = {
        "label": "LoRA",
        "method": "lora",
        "trainable_parameters": 10,
        "head_parameters": 2,
        "metrics": {"accuracy": 0.5},
        "seeds": 2,
    }
    table = {"name": "usual", "title": "Scores", "rows": [way]}
    del way["seeds"], table
    lines = [{"prompt": "a", "reference": "b", "base": "c", "tuned": "d"}] * 3
    score = {
        "task": "t",
        "version": "1",
        "metric": "acc",
        "filter": "none",
        "higher_is_better": True,
        "num_fewshot": 0,
        "samples": 3,
    }
    score |= {"base": 0.5, "base_stderr": 0.1, "tuned": 0.6, "tuned_stderr": None}
    lm_eval = {"lm_eval_version": "1", "limit": None, "batch_size": 1, "apply_chat_template": False, "scores": [score]}
    yield Loader(
        "outputs",
        {"outputs.jsonl": "\n".join(map(json.dumps, lines)).encode()},
        lambda folder: RunDirectory(folder).read_outputs(10),
    )
    yield Loader(
        "lm_eval record",
        {"lm_eval.json": json.dumps(lm_eval).encode()},
        lambda folder: read_lm_eval(RunDirectory(folder)),
    )
    kept_lines = [{"line": n, "values": {"text": "word", "label": n}} for n in range(3)]
    yield Loader(
        "held-out rows",
        {"rows.jsonl": "\n".join(map(json.dumps, kept_lines)).encode()},
        lambda folder: kept(folder / "rows.jsonl", "train.csv"),
    )
    old = {
        "methods": [
            {
                **{
                    "method": "lora",
                    "trainable_parameters": 1,
                    "head_parameters": 1,
                    "metrics": {"accuracy": 1.0},
                    "loss": 0.1,
                },
                **{"learning_rate": 1e-3, "seconds_per_step": 0.1, "peak_memory_bytes": 1, "disk_bytes": 1},
            }
        ],
        "notes": ["a"],
    }
    yield Loader(
        "comparison of reltune 0.1",
        {"comparison.json": json.dumps(old).encode()},
        lambda folder: read_ways(RunDirectory(folder)),
    )
    yield Loader(
        "any JSON record",
        {"record.json": json.dumps(lm_eval).encode()},
        lambda folder: read_json(folder / "record.json"),
    )
    del ComparisonRecord


def data_files() -> Iterator[Loader]:
    from reltune.data.text_files import read_text_file, stream_text_file

    def both(name: str) -> Callable[[Path], None]:
        def read(folder: Path) -> None:
            from reltune.errors import InputError

            with contextlib.suppress(InputError):
                for _ in stream_text_file(folder / name)():
                    pass
            for rows in read_text_file(folder / name).values():
                list(rows)

        return read

    rows = [{"text": f"some {n} words", "label": "ab"[n % 2], "more": {"a": [1, None]}} for n in range(4)]
    samples: Files = {
        "rows.csv": b'text,label\n"a, ""b""",x\nc,y\n"two\nlines",x\nd,y\n',
        "rows.tsv": b'text\tlabel\na\tx\n"b\tc"\ty\nd "e"\tx\n',
        "rows.jsonl": "\n".join(map(json.dumps, rows)).encode(),
        "rows.json": json.dumps(rows, indent=1).encode(),
        "words.conll": b"-DOCSTART- O\n\nA B-PER\nb I-PER\n\nC O\n",
    }
    for name, data in samples.items():
        yield Loader(f"data {Path(name).suffix}", {name: data}, both(name))


def parquet() -> Iterator[Loader]:
    import pyarrow as pa
    from pyarrow import parquet as pq

    columns = {"text": ["a", "b"] * 4, "label": [0, 1] * 4, "score": [0.5, None] * 4, "words": [["a"], []] * 4}
    packed = {"text": "snappy", "label": "none", "score": "zstd", "words.list.element": "gzip"}
    with tempfile.TemporaryDirectory() as place:
        pq.write_table(pa.table(columns), Path(place) / "rows.parquet", compression=packed)
        saved = contents(Path(place))

    def read(folder: Path) -> None:
        from reltune.data.arrow import read_parquet

        try:
            for rows in read_parquet(folder / "rows.parquet").values():
                list(rows)
        finally:
            shutil.rmtree(CACHE, ignore_errors=True)

    yield Loader("data .parquet", saved, read)


def packages() -> Iterator[Loader]:
    import io
    import zipfile

    from reltune.data.packages import CORPORA

    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("vader/tweets_GroundTruth.txt", "1\t1.5\tgood\n2\t-2.0\tbad\n" * 20)
    yield Loader(
        "archive",
        {"vader.zip": inner.getvalue()},
        lambda folder: CORPORA["tweets"].read(None, str(folder / "vader.zip")),
    )


GROUPS = (configs, plans, tensor_files, records, data_files, packages, parquet)


# -- running --------------------------------------------------------------------------------------------------------


def gauge(word: bytes) -> int:
    """A figure of /proc/self/status in bytes."""
    with open("/proc/self/status", "rb", buffering=0) as file:
        text = file.read(4096)
    return int(text[text.index(word) + len(word) + 1 :].split(None, 1)[0]) * 1024


def forget_peak() -> None:
    """From here on VmHWM is the most memory since now."""
    with open("/proc/self/clear_refs", "wb", buffering=0) as file:
        file.write(b"5")


def raised_at(error: BaseException) -> str:
    """The function of reltune that raised: a kind of error."""
    at, trace = "elsewhere", error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        if code.co_filename.startswith(SOURCE):
            at = f"{os.path.basename(code.co_filename)}: {code.co_name}"
        trace = trace.tb_next
    return at


class Run:
    """What one loader did with its inputs."""

    def __init__(self, loader: Loader, findings: Path | None) -> None:
        self.loader, self.findings = loader, findings
        self.inputs, self.accepted, self.began = 0, 0, time.perf_counter()
        self.errors: collections.Counter[str] = collections.Counter()
        self.unexpected: dict[str, dict[str, Any]] = {}
        self.slowest, self.slowest_input = 0.0, ""
        self.most_memory, self.largest = 0, 0
        self.written: Files = {}
        self.place = Path(tempfile.mkdtemp(dir=SHARED if SHARED.is_dir() else None))

    def one(self, files: Files, label: str) -> None:
        from reltune.errors import InputError, StorageError

        for name, data in files.items():
            if self.written.get(name) is not data:
                (self.place / name).write_bytes(data)
        self.written = files
        size = max(map(len, files.values()))
        self.largest = max(self.largest, size)
        signal.setitimer(signal.ITIMER_PROF, ALARM)
        forget_peak()
        held, began = gauge(b"VmRSS:"), time.process_time()
        try:
            self.loader.read(self.place)
            self.accepted += 1
        except (InputError, StorageError) as error:
            self.errors[raised_at(error)] += 1
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            where = traceback.extract_tb(error.__traceback__)[-1]
            self.found(
                f"{type(error).__name__} in {Path(where.filename).name}:{where.name}",
                files,
                label,
                "".join(traceback.format_exception(error))[-1500:],
            )
        took, memory = time.process_time() - began, gauge(b"VmHWM:") - held
        signal.setitimer(signal.ITIMER_PROF, 0)
        if took > self.slowest:
            self.slowest, self.slowest_input = took, label
        if took > LONGEST:
            self.found("an input that takes more than 2 s", files, label, f"{took:.2f} s")
        self.most_memory = max(self.most_memory, memory)
        if memory > 2 * size + MEMORY:
            self.found("an input that takes more memory than twice its size and 64 MiB", files, label, f"{memory:,}")
        self.inputs += 1

    def found(self, kind: str, files: Files, label: str, text: str) -> None:
        found = self.unexpected.setdefault(kind, {"count": 0, "seed": label, "text": text})
        found["count"] += 1
        if found["count"] == 1 and self.findings:
            folder = self.findings / hashlib.sha256((self.loader.name + kind).encode()).hexdigest()[:12]
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "finding.txt").write_text(f"{self.loader.name}\n{kind}\n{label}\n{text}\n")
            for name, data in files.items():
                (folder / name).write_bytes(data)

    def record(self) -> dict[str, Any]:
        return {
            "inputs": self.inputs,
            "seconds": round(time.perf_counter() - self.began, 1),
            "accepted": self.accepted,
            "errors": dict(self.errors.most_common()),
            "unexpected": self.unexpected,
            "slowest_cpu_seconds": round(self.slowest, 4),
            "slowest_input": self.slowest_input,
            "most_memory_bytes": self.most_memory,
            "largest_file_bytes": self.largest,
        }

    def close(self) -> None:
        shutil.rmtree(self.place, ignore_errors=True)


def added(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """What two runs of a loader found together."""
    if not one:
        return other
    slowest = max(one, other, key=lambda record: record["slowest_cpu_seconds"])
    unexpected = {**other["unexpected"], **one["unexpected"]}
    for kind, found in unexpected.items():
        found["count"] = sum(record["unexpected"].get(kind, {"count": 0})["count"] for record in (one, other))
    return {
        **{key: one[key] + other[key] for key in ("inputs", "accepted")},
        "seconds": round(one["seconds"] + other["seconds"], 1),
        "errors": dict((collections.Counter(one["errors"]) + collections.Counter(other["errors"])).most_common()),
        "unexpected": unexpected,
        **{key: slowest[key] for key in ("slowest_cpu_seconds", "slowest_input")},
        **{key: max(one[key], other[key]) for key in ("most_memory_bytes", "largest_file_bytes")},
    }


def input_of(loader: Loader, label: str) -> Files:
    """The files that a label makes: SEED/LOADER/NUMBER, of which number 0 is the valid ones."""
    if label.endswith("/0"):
        return loader.files
    rng = random.Random(label)
    names, others = sorted(loader.files), list(loader.files.values())
    files = dict(loader.files)
    for _ in range(rng.choice((1, 1, 1, 2))):
        name = rng.choice(names)
        files[name] = mutated(name, files[name], rng.choice(others), rng)
    return files


def warm_up(loader: Loader) -> None:
    """Read the valid files, which has to work: imports are not what is measured."""
    with tempfile.TemporaryDirectory() as place:
        for name, data in loader.files.items():
            (Path(place) / name).write_bytes(data)
        loader.read(Path(place))


def fuzz(
    loader: Loader, inputs: int, seed: int, first: int = 0, findings: Path | None = None, at: Any = None
) -> dict[str, Any]:
    """What became of so many inputs from the ``first`` on; ``at[0]`` is the number of the one that is being read."""
    warm_up(loader)
    run = Run(loader, findings)
    for number in range(first, first + inputs):
        if at is not None:
            at[0] = number
        label = f"{seed}/{loader.name}/{number}"
        run.one(input_of(loader, label), label)
    run.close()
    return run.record()


def fuzz_apart(loader: Loader, inputs: int, seed: int, first: int, findings: Path | None) -> dict[str, Any]:
    """The same in a fork. An input that ends it, by a fault of a library or as it hangs, is a finding."""
    at = multiprocessing.RawArray("q", [first])
    pipe, end = multiprocessing.Pipe(duplex=False)

    def work() -> None:
        end.send(fuzz(loader, inputs, seed, first, findings, at))

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    end.close()
    try:
        record = pipe.recv()
    except EOFError:
        record = None
    process.join()
    if record is not None:
        return record
    if not process.exitcode or process.exitcode > 0:
        raise SystemExit(f"{loader.name}: the process that reads ended with {process.exitcode}")
    label = f"{seed}/{loader.name}/{at[0]}"
    run = Run(loader, findings)
    run.found(f"the process ends by signal {-process.exitcode}", input_of(loader, label), label, "")
    run.inputs = 1
    run.close()
    before = fuzz_apart(loader, at[0] - first, seed, first, findings) if at[0] > first else {}
    return added(before, run.record())


def go_on(
    loader: Loader,
    inputs: int,
    seed: int,
    seconds: float = float("inf"),
    out: Path | None = None,
    findings: Path | None = None,
) -> dict[str, Any]:
    """Add to the record until it has so many inputs, or for about so many seconds; what it has then."""
    record, began = recorded(out, loader.name), time.perf_counter()
    if record.get("seed", seed) != seed:
        raise SystemExit(f"{out} has {loader.name} of --seed {record['seed']}, and goes on with that one alone")
    while (done := record.get("inputs", 0)) < inputs and (not record or time.perf_counter() - began < seconds):
        later = fuzz_apart(loader, min(SLICE, inputs - done), seed, done, findings)
        record = {**added(record, later), "seed": seed}
        if out is not None:
            write(out, loader.name, record)
    return record


def fuzz_by_coverage(name: str, seconds: int, findings: Path | None, out: Path | None) -> None:
    """The first byte of an input says which file the rest is; the other files are valid. Does not return."""
    import atheris

    with atheris.instrument_imports(include=["reltune"]):
        loader = next(one for one in every_loader([name]) if one.name == name)
    warm_up(loader)
    run = Run(loader, findings)
    names = sorted(loader.files)
    corpus = Path(tempfile.mkdtemp())
    for number, file in enumerate(names):
        (corpus / str(number)).write_bytes(bytes([number]) + loader.files[file])
    before = recorded(out, f"{loader.name}, by coverage")

    def one(data: bytes) -> None:
        files = dict(loader.files)
        if data:
            files[names[data[0] % len(names)]] = data[1:]
        run.one(files, base64.b64encode(data[:200]).decode())
        if out is not None and run.inputs % 1000 == 0:
            write(out, f"{loader.name}, by coverage", added(before, run.record()))

    atheris.Setup([sys.argv[0], f"-max_total_time={seconds}", "-max_len=20000", "-verbosity=0", str(corpus)], one)
    atheris.Fuzz()


def every_loader(wanted: list[str]) -> Iterator[Loader]:
    for group in GROUPS:
        for loader in group():
            if not wanted or loader.name in wanted:
                yield loader


def recorded(out: Path | None, name: str) -> dict[str, Any]:
    """What a record has of a loader, if anything."""
    return {} if out is None or not out.is_file() else json.loads(out.read_text())["loaders"].get(name, {})


def write(out: Path, name: str, record: dict[str, Any]) -> None:
    values = json.loads(out.read_text()) if out.is_file() else {"loaders": {}}
    values["python"], values["processor"] = platform.python_version(), platform.machine()
    values["versions"] = {
        name: metadata.version(name) for name in ("torch", "transformers", "peft", "safetensors", "pyyaml", "pyarrow")
    }
    values["loaders"][name] = record
    out.write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loader", action="append", default=[])
    parser.add_argument("--inputs", type=int, default=100_000, help="that the record is to have of each loader")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="about, per loader")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--coverage", action="store_true")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--findings", type=Path)
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    os.environ["HF_DATASETS_CACHE"] = str(CACHE)
    if asked.coverage:
        fuzz_by_coverage(asked.loader[0], int(asked.seconds), asked.findings, asked.out)
    bad = False
    for loader in every_loader(asked.loader):
        warm_up(loader)  # so that every process has what is imported
        record = go_on(loader, asked.inputs, asked.seed, asked.seconds, asked.out, asked.findings)
        bad = bad or bool(record["unexpected"])
        print(
            f"{loader.name}: {record['inputs']:,} inputs in {record['seconds']:.0f} s, {record['accepted']:,} accepted, "
            f"{len(record['errors'])} kinds of errors, slowest {record['slowest_cpu_seconds']:.2f} s, most memory "
            f"{record['most_memory_bytes'] / 2**20:.0f} MiB, unexpected: {list(record['unexpected']) or 'none'}",
            flush=True,
        )
    sys.exit(int(bad))


if __name__ == "__main__":
    main()
