"""What continuous integration cannot run: the commands on one, two and four GPUs, against one process on a CPU or one GPU.

    PYTHONPATH=src:tests python3 benchmarks/on_gpus.py --gpus 1 2 4 --commit COMMIT

needs the packages of the command line, and bitsandbytes, deepspeed, liger-kernel, lm-eval and optuna for the cases that name
them; in a minute, to see that the script runs: --tiny --gpus 0, which writes no record.

The record, benchmarks/results/on_gpus.json, has each case's latest result, under the run that it is from, with that run's commit and
hardware. A case that passed is not run again, unless --again asks for it. --merge FILE takes over what was found elsewhere, and runs
nothing.

Every case is a few commands on tiny models with random weights, drawn by code. Its numbers are compared with those of its
reference, the same commands elsewhere: the loss on the test part, and the trained tensors (norm of the difference over
norm). ``limit`` bounds both. Bounds are wide where types or roundings differ: they find what is wrong, not what is inexact.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import datetime
import json
import os
import queue
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from harness import commit, hardware, versions

RECORD = Path(__file__).parent / "results" / "on_gpus.json"
SEVERAL = (2, 4)
TINY = ("method weights", "resumed", "lm-evaluation-harness", "GGUF base")
LLAMA, BERT = "llama", "bert"
TRAIN = ("--max_steps", "8", "--seed", "7", "--eval_strategy", "no")
EXACT, ROUNDED, COARSE = 1e-3, 0.05, 0.3  # float32 elsewhere; bfloat16 or float16; other kernels in few bits
# Of the trained units, where votes of signs choose them: sums in another order turn the sign of the smallest gradients, and all weights
# move on from there. Of the Llama here, noise of 1e-7 of each gradient's root mean square left 86% of the units the same, of 1e-3 78%;
# votes by half of each batch, as if processes did not add up their gradients, 12%; a head that was trained on batches of half the size
# left 29% of the BERT's. The loss of other units is another one: it keeps to ROUNDED.
ALIKE = 0.7


@dataclasses.dataclass(frozen=True)
class Case:
    """One thing that is to work on GPUs.

    Attributes:
        model: which model and data ("llama", "bert", "preference", "gguf").
        words: flags of ``reltune run``.
        then: further commands on the finished run, each a tuple of words; "RUN" stands for its directory.
        reference: flags of the reference's run, where they differ; its device is ``beside``.
        beside: "cpu", or "gpu" for one process on one GPU.
        limit: how far loss and trained tensors may be from the reference's; None: that it ends well is enough.
        removed: files and directories of the run that are removed before ``then``, to resume from what was before them.
        launched: by torchrun on one GPU too.
        refused: words of the error with which the run is to end before it has written anything; it has no reference then.
    """

    name: str
    model: str
    words: tuple[str, ...] = ()
    gpus: int = 1
    then: tuple[tuple[str, ...], ...] = ()
    reference: tuple[str, ...] | None = None
    beside: str = "cpu"
    limit: float | None = EXACT
    removed: tuple[str, ...] = ()
    launched: bool = False
    refused: str = ""


def methods() -> list[Case]:
    names = ("weights", "columns", "rows", "directions", "lora", "rslora", "dora", "shira", "bitfit", "layers", "full")
    budget = {"directions": ("--budget", "10%")}
    cases = [
        # Directions of nearly equal weight turn with the last bits of the movement.
        Case(
            f"method {name}{of}",
            model,
            ("--method", name, *budget.get(name, ())),
            limit=ROUNDED if name == "directions" else EXACT,
        )
        for model, of in ((BERT, ""), (LLAMA, ", language model"))
        for name in names
        if (model, name) != (LLAMA, "bitfit")  # a Llama has no biases
    ]
    return [*cases, Case("method head", BERT, ("--method", "head"))]


FSDP = ("--fsdp", "--fsdp_config", "fsdp.json")
IN_HOST_MEMORY = ("--fsdp", "--fsdp_config", "in_host_memory.json")
CHECKPOINTS = ("--save_strategy", "steps", "--save_steps", "4", "--save_total_limit", "2")
RESUMED = ("checkpoint-8", "adapter", "all_results.json", "trainer_state.json")


def spread(gpus: int) -> list[Case]:
    """On several GPUs, a batch of 16 in all, against one process on one GPU."""
    each = ("--per_device_train_batch_size", str(16 // gpus))
    one = ("--per_device_train_batch_size", "16")
    tune = ("tune", "RUN")
    zero = {stage: ("--deepspeed", f"zero{stage}.json") for stage in (1, 2)}

    def case(
        name: str,
        *words: str,
        model: str = LLAMA,
        limit: float | None = EXACT,
        plain: tuple[str, ...] = (),
        **more: Any,
    ) -> Case:
        return Case(
            f"{name}, {gpus} GPUs",
            model,
            (*each, *plain, *words),
            gpus,
            reference=(*one, *plain),
            beside="gpu",
            limit=limit,
            **more,
        )

    return [
        case("run", model=BERT),
        case("run, language model"),
        case("run in bfloat16", plain=("--bf16",), limit=ROUNDED),
        case("run in float16", plain=("--fp16",), limit=ROUNDED),
        case("FSDP2", *FSDP),
        case("FSDP2, columns", *FSDP, plain=("--method", "columns")),
        case("FSDP2 in bfloat16", *FSDP, plain=("--bf16",), limit=ROUNDED),
        case("FSDP2, weights in host memory", *IN_HOST_MEMORY),
        case("FSDP2, weights in host memory, columns", *IN_HOST_MEMORY, plain=("--method", "columns")),
        case("FSDP2 of a 4-bit base", *FSDP, plain=("--load_in_4bit", "--method", "columns"), limit=ROUNDED),
        case(
            "FSDP2 of an 8-bit base",
            *FSDP,
            plain=("--load_in_8bit", "--method", "columns"),
            refused="fsdp cannot spread a base held in 8 bits",
        ),
        case("8-bit base", plain=("--load_in_8bit", "--method", "columns"), limit=ROUNDED),
        case(
            "FSDP2, resumed",
            *(*FSDP, *CHECKPOINTS),
            then=((*tune, *FSDP, "--resume_from_checkpoint", "true"), ("evaluate", "RUN")),
            removed=RESUMED,
        ),
        case("ZeRO 1", *zero[1]),
        case("ZeRO 2", *zero[2]),
        case("ZeRO 2 in bfloat16", *zero[2], plain=("--bf16",), limit=ROUNDED),
        case("preference in bfloat16", model="preference", plain=("--bf16",), limit=ROUNDED),
    ]


def alone() -> list[Case]:
    """On one GPU, against one process on a CPU."""
    lm_eval = ("evaluate", "RUN", "--lm_eval_tasks", "tasks")
    return [
        *methods(),
        Case("bfloat16", LLAMA, ("--bf16",), limit=ROUNDED, reference=()),
        Case("float16 and its scaler", LLAMA, ("--fp16",), limit=ROUNDED, reference=()),
        Case("float16, classifier", BERT, ("--fp16",), limit=ROUNDED, reference=()),
        Case("Liger kernels", LLAMA, ("--use_liger_kernel",), reference=(), limit=EXACT),
        Case("Liger kernels in bfloat16", LLAMA, ("--use_liger_kernel", "--bf16"), reference=(), limit=ROUNDED),
        Case("4-bit base", LLAMA, ("--load_in_4bit",), limit=ROUNDED),
        Case("4-bit base, LoRA", LLAMA, ("--load_in_4bit", "--method", "lora"), limit=ROUNDED),
        Case("4-bit base, classifier", BERT, ("--load_in_4bit",), limit=ROUNDED),
        Case(
            "4-bit base in bfloat16, checkpointing",
            LLAMA,
            ("--load_in_4bit", "--bf16", "--gradient_checkpointing"),
            limit=ROUNDED,
            reference=(),
        ),
        Case("8-bit base", LLAMA, ("--load_in_8bit",), limit=COARSE, reference=()),
        Case("8-bit base in bfloat16", LLAMA, ("--load_in_8bit", "--bf16"), limit=COARSE, reference=()),
        Case("float8 base", LLAMA, ("--frozen_dtype", "float8_e4m3fn"), limit=ROUNDED),
        Case("GGUF base", "gguf", ("--method", "columns", "--budget", "20%")),
        Case("preference", "preference"),
        Case("preference in bfloat16", "preference", ("--bf16",), limit=ROUNDED, reference=()),
        *(
            Case(
                f"CUDA graphs, {name}",
                BERT,
                ("--method", name, "--cuda_graphs", *budget),
                reference=("--method", name, *budget),
                limit=ROUNDED if name == "directions" else EXACT,
            )
            for name, *budget in (
                *(
                    ("weights",),
                    ("columns",),
                    ("rows",),
                    ("directions", "--budget", "10%"),
                    ("lora",),
                    ("dora",),
                    ("shira",),
                ),
                *(("bitfit",), ("layers",), ("head",), ("full",)),
            )
        ),
        Case(
            "CUDA graphs in bfloat16, accumulation",
            BERT,
            ("--cuda_graphs", "--bf16", "--gradient_accumulation_steps", "2"),
            reference=("--gradient_accumulation_steps", "2"),
            limit=ROUNDED,
        ),
        Case("checkpointing", LLAMA, ("--gradient_checkpointing",)),
        Case("FSDP2, weights in host memory", LLAMA, IN_HOST_MEMORY, reference=(), launched=True),
        Case("packing in bfloat16", LLAMA, ("--packing", "--bf16"), limit=ROUNDED, reference=("--packing",)),
        Case("sweep", LLAMA, ("--sweep", "learning_rate=1e-3,1e-2")),
        Case("lm-evaluation-harness", LLAMA, then=(lm_eval,)),
        Case(
            "exported and merged",
            LLAMA,
            ("--method", "columns"),
            then=tuple(("export", "RUN", "--to", form, "--output_dir", f"RUN-{form}") for form in ("lora", "merged")),
        ),
        Case(
            "resumed",
            LLAMA,
            CHECKPOINTS,
            then=(("tune", "RUN", "--resume_from_checkpoint", "true"), ("evaluate", "RUN")),
            removed=RESUMED,
            reference=(),
        ),
        Case(
            "every criterion of gradients",
            BERT,
            ("--criteria", "fisher,gradient,gradient_snr,movement", "--method", "columns"),
        ),
        Case(
            "ablation and correlation",
            BERT,
            ("--criteria", "ablation,correlation", "--granularity", "module", "--budget", "30%", "--max_trials", "20"),
            limit=COARSE,  # attention's key biases have no gradient but rounding errors, of which AdamW makes steps
        ),
    ]


def every() -> list[Case]:
    return [*alone(), *(case for gpus in SEVERAL for case in spread(gpus))]


# ---- models and data


def prepare(place: Path) -> None:
    """Models, data and settings in ``place``: drawn, tiny, and the same each time."""
    from command_line import review_rows, write_csv
    from task_cases import write_rows
    from test_pretrained_gguf import write_tiny
    from tiny_models import CHAT, save_tiny_bert, save_tiny_llama

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
    save_tiny_llama(place / "llama", chat_template=CHAT, **sizes)
    save_tiny_bert(place / "bert", num_layers=4, hidden=64, intermediate=128)
    config = json.loads((place / "bert" / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # devices draw different numbers
    (place / "bert" / "config.json").write_text(json.dumps(config))
    write_tiny(place / "tiny.gguf")
    for part, count, seed in (("train", 256, 0), ("validation", 64, 1), ("test", 64, 2)):
        rows = review_rows(count, seed=seed)
        write_csv(place / f"bert_{part}.csv", rows)
        words = {"neg": "bad film", "pos": "good film"}
        write_rows(
            place / f"llama_{part}.jsonl", [{"prompt": text, "completion": f" {words[label]}"} for text, label in rows]
        )
        other = {"neg": "pos", "pos": "neg"}
        pairs = [
            {"prompt": text, "chosen": f" {words[label]}", "rejected": f" {words[other[label]]}"}
            for text, label in rows
        ]
        write_rows(place / f"preference_{part}.jsonl", pairs)
        write_rows(
            place / f"gguf_{part}.jsonl", [{"prompt": "abcd" * (1 + i % 3), "completion": "cdab"} for i in range(count)]
        )
    layers = {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
    (place / "fsdp.json").write_text(json.dumps(layers))
    (place / "in_host_memory.json").write_text(json.dumps({**layers, "cpu_offload": True}))
    auto = dict.fromkeys(("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"), "auto")
    for stage in (1, 2):
        types = {"bf16": {"enabled": "auto"}, "fp16": {"enabled": "auto"}}
        (place / f"zero{stage}.json").write_text(json.dumps({"zero_optimization": {"stage": stage}, **auto, **types}))
    (place / "tasks").mkdir()
    questions = [
        {"question": "not good", "choices": ["bad", "film"], "gold": 0},
        {"question": "not bad", "choices": ["book", "good"], "gold": 1},
    ]
    write_rows(place / "questions.jsonl", questions)
    (place / "tasks" / "choose.yaml").write_text(LM_EVAL.format(data=place / "questions.jsonl", cache=place / "cache"))


LM_EVAL = """\
task: choose
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {cache}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: gold
metadata: {{version: 1}}
"""


# ---- running


def run_case(case: Case, place: Path, number: int, devices: list[int]) -> dict[str, Any]:
    """What the case's numbers are, and its reference's, and how far they are apart."""
    facts: dict[str, Any] = {"case": case.name, "gpus": case.gpus, "flags": list(case.words)}
    began = time.perf_counter()
    run = place / f"run-{number}"
    try:
        found = _outcome(case, place, run, case.words, devices)
        if case.refused:
            facts["error"] = "was not refused"
        elif case.limit is not None:
            words = case.words if case.reference is None else case.reference
            beside = devices[:1] if case.beside == "gpu" else []
            plain = dataclasses.replace(case, then=(), removed=(), launched=False)
            wanted = _outcome(plain, place, place / f"reference-{number}", words, beside)
            facts |= _apart(found, wanted)
    except subprocess.CalledProcessError as error:
        errors = error.stderr or ""
        if case.refused and case.refused in errors and not run.exists():
            facts["refused"] = case.refused
        else:
            facts["error"] = _last_lines(errors) or f"exit code {error.returncode}"
    except subprocess.TimeoutExpired as error:
        facts["error"] = f"not done after {error.timeout:.0f} s"
    facts["seconds"] = round(time.perf_counter() - began, 1)
    return judged(case, facts)


def judged(case: Case, facts: dict[str, Any]) -> dict[str, Any]:
    """The facts with the case's limit, and whether they keep to it."""
    apart = [facts[name] for name in ("loss", "tensors") if facts.get(name) is not None]
    others = "tensors" in facts and facts["tensors"] is None
    limit = None if case.limit is None or case.refused else max(case.limit, ROUNDED) if others else case.limit
    close = limit is None or (bool(apart) and max(apart) <= limit)
    right = facts.get("refused") == case.refused if case.refused else close and facts.get("alike", 1) >= ALIKE
    return {**facts, "limit": limit, "passed": "error" not in facts and right}


def _outcome(case: Case, place: Path, run: Path, words: tuple[str, ...], devices: list[int]) -> dict[str, Any]:
    """Run the case's commands; the loss on the test part and the trained tensors."""
    suffix = "csv" if case.model == BERT else "jsonl"
    model = place / ("tiny.gguf" if case.model == "gguf" else BERT if case.model == BERT else LLAMA)
    files = [
        word for part in ("train", "validation", "test") for word in (f"--{part}_file", f"{case.model}_{part}.{suffix}")
    ]
    command = ("run", "--model_name_or_path", str(model), *files, *TRAIN, *words, "--output_dir", str(run))
    _command(command, place, devices, case.launched)
    for name in case.removed:
        shutil.rmtree(run / name) if (run / name).is_dir() else (run / name).unlink(missing_ok=True)
    for command in case.then:
        spreading = devices if command[0] in ("run", "tune", "analyze", "evaluate") else devices[:1]
        _command(tuple(word.replace("RUN", str(run)) for word in command), place, spreading)
    results = json.loads((run / "all_results.json").read_text())
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted((run / "adapter").glob("*.safetensors")):
        tensors |= load_file(file)
    return {"loss": results.get("test_loss"), "tensors": tensors}


def _command(words: tuple[str, ...], place: Path, devices: list[int], launched: bool = False) -> None:
    """One reltune command on the GPUs ``devices``, or on the CPU where there are none."""
    launcher = [sys.executable, "-m"]
    if len(devices) > 1 or launched:
        launcher += ["torch.distributed.run", "--standalone", f"--nproc_per_node={len(devices)}", "-m"]
    seen = {"CUDA_VISIBLE_DEVICES": ",".join(map(str, devices)), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "2"}
    subprocess.run(
        [*launcher, "reltune", *words],
        cwd=place,
        env={**os.environ, **seen, "TOKENIZERS_PARALLELISM": "false"},
        check=True,
        capture_output=True,
        text=True,
        timeout=240,
    )


def _apart(found: dict[str, Any], wanted: dict[str, Any]) -> dict[str, float | None]:
    """How far the loss and the trained tensors are apart, and where units are chosen, how many of them both have. The tensors of
    other units are not compared."""
    facts: dict[str, float | None] = {"loss": None, "tensors": None}
    if found["loss"] is not None and wanted["loss"] is not None:
        facts["loss"] = abs(found["loss"] - wanted["loss"]) / abs(wanted["loss"])
    a, b = found["tensors"], wanted["tensors"]
    whole = [name for name in a | b if not (a | b)[name].is_floating_point()]
    same = a.keys() == b.keys() and all(a[name].shape == b[name].shape for name in a)
    if whole:
        facts["alike"] = _alike(a, b)
    if same and all(torch.equal(a[name], b[name]) for name in whole):
        numbers = [name for name in a if name not in whole]
        difference = sum(float((a[name].double() - b[name].double()).square().sum()) for name in numbers) ** 0.5
        size = sum(float(b[name].double().square().sum()) for name in numbers) ** 0.5
        facts["tensors"] = difference / max(size, 1e-12)
    return facts


def _alike(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """The share of the chosen units that both have: those of both, over those of either."""
    both = either = 0
    for name in a.keys() | b.keys():
        units = [set(of[name].flatten().tolist()) if name in of else set() for of in (a, b)]
        if not any(name in of and of[name].is_floating_point() for of in (a, b)):
            both += len(units[0] & units[1])
            either += len(units[0] | units[1])
    return both / max(either, 1)


def _last_lines(text: str, count: int = 4) -> str:
    lines = [
        line for line in text.splitlines() if line.strip() and "warn" not in line.lower() and ": note: " not in line
    ]
    named = [line for line in lines if re.search(r"(Error|error): ", line)]  # before what a launcher adds
    lines = named or lines
    return " | ".join(lines[-count:])[-700:]


# ---- the record


def merged(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The runs with the latest result of each case that there is today, judged by today's limit."""
    cases = {case.name: case for case in every()}
    latest: dict[str, tuple[int, dict[str, Any]]] = {}
    runs = sorted(runs, key=lambda run: run["started"])
    for number, run in enumerate(runs):
        for row in run["cases"]:
            case = cases.get(row["case"])
            if case is not None and row.get("flags") == list(case.words):  # a case that was not begun has no flags
                latest[case.name] = number, judged(case, row)
    parts = [
        {**run, "cases": [latest[name][1] for name in cases if name in latest and latest[name][0] == number]}
        for number, run in enumerate(runs)
    ]
    return [part for part in parts if part["cases"]]


def read(file: Path) -> list[dict[str, Any]]:
    """The runs in a file: in a record several, and of one run alone that one."""
    record = json.loads(file.read_text(encoding="utf-8"))
    return record.get("runs", [record])  # type: ignore[no-any-return]


def write(file: Path, runs: list[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".json.partial")
    partial.write_text(json.dumps({"benchmark": "on_gpus", "runs": merged(runs)}, indent=1) + "\n", encoding="utf-8")
    partial.replace(file)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, nargs="+", default=[1], help="how many a case may take; 0: all on the CPU")
    parser.add_argument("--only", nargs="+", default=[""], help="cases whose name holds one of these words")
    parser.add_argument("--again", action="store_true", help="also what the record says has passed")
    parser.add_argument("--merge", type=Path, nargs="+", default=[], help="files to take results from, and run nothing")
    parser.add_argument("--jobs", type=int, default=6, help="cases side by side")
    parser.add_argument("--minutes", type=float, default=8, help="no case begins after")
    parser.add_argument("--tiny", action="store_true", help="a few cases")
    parser.add_argument("--commit", default="")
    parser.add_argument("--output_dir", type=Path, default=RECORD.parent, help="where the record is written")
    options = parser.parse_args()
    written = options.output_dir / RECORD.name
    runs = [run for file in {RECORD, written} if file.is_file() for run in read(file)]
    if options.merge:
        write(written, [*runs, *(run for file in options.merge for run in read(file))])
        return 0
    there = max(options.gpus)
    passed = {row["case"] for run in merged(runs) for row in run["cases"] if row["passed"]}
    cases = [case for n in options.gpus for case in (alone() if n <= 1 else spread(n))]
    cases = [case for case in cases if any(word in case.name for word in options.only)]
    if options.tiny:
        cases = [case for case in cases if case.name in TINY]
    if there and not options.again:
        cases = [case for case in cases if case.name not in passed]
    began = datetime.datetime.now(datetime.UTC)
    rows = _run(cases, there, options.jobs, options.minutes)
    if there:
        run = {
            **commit(options.commit),
            "started": began.isoformat(timespec="seconds"),
            "hardware": {**hardware(torch.device("cuda")), "gpus": torch.cuda.device_count()},
            "versions": versions(
                ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "deepspeed", "trl", "optuna")
            ),
            "cases": rows,
        }
        write(written, [*runs, run])
    print(f"\n{sum(row['passed'] for row in rows)} of {len(cases)} passed, {len(cases) - len(rows)} not begun")
    for row in rows:
        if not row["passed"]:
            print(_line(row))
    return 0


def _run(cases: list[Case], there: int, jobs: int, minutes: float) -> list[dict[str, Any]]:
    """The results of the cases that were begun in time, on so many GPUs."""
    place = Path(os.environ.get("TMPDIR", "/tmp")) / f"on_gpus-{os.getpid()}"
    place.mkdir()
    prepare(place)
    end = time.perf_counter() + 60 * minutes
    free: queue.Queue[int] = queue.Queue()
    for number in range(jobs):
        free.put(number)

    def one(number: int, case: Case) -> dict[str, Any] | None:
        slot = free.get()
        try:
            if time.perf_counter() > end:
                return None
            devices = [(slot + i) % there for i in range(case.gpus)] if there else []
            return run_case(case, place, number, devices)
        finally:
            free.put(slot)

    rows = []
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        for done in concurrent.futures.as_completed([pool.submit(one, *numbered) for numbered in enumerate(cases)]):
            if (row := done.result()) is not None:
                rows.append(row)
                print(_line(row), flush=True)
    shutil.rmtree(place)
    return rows


def _line(row: dict[str, Any]) -> str:
    figures = "  ".join(f"{name} {row[name]:.1e}" for name in ("loss", "tensors") if row.get(name) is not None)
    figures += f"  the same units: {row['alike']:.1%}" if "alike" in row else ""
    said = row.get("error") or row.get("refused", "")
    return f"{'ok  ' if row['passed'] else 'MISS'} {row['case']:45s} {row['seconds']:5.0f} s  {figures}  {said}"


if __name__ == "__main__":
    raise SystemExit(main())
