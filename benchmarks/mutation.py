"""How many small faults in units, plan, probe and tuner the tests find: benchmarks/results/mutation.json.

    pip install coverage cosmic-ray
    PYTHONPATH=src python benchmarks/core_coverage.py --keep DIR
    PYTHONPATH=src python benchmarks/mutation.py --keep DIR --sample 150 --seed 0       # --area plan for one of them; goes on where it was

The mutants are those of cosmic-ray's operators without arguments, in the files of AREAS, but for those that no test could tell from
the code itself (NO_FAULT). Of each area a sample is drawn with the seed. A mutant is run against the tests that run its line,
those about the fewest lines first, until one fails or their usual times add up to --most seconds; of those left out none is said to have
killed it.

One process loads the packages that the tests need and forks for each mutant: the child runs pytest on a copy of the source with the
mutant in it, which processes that tests start see too. A mutant is killed if a test fails, if the source cannot be loaded, or if the child
takes more of the processor than LIMIT or stands still. Tests that are gone since DIR was made stop it with an error, as does whatever else
pytest says. All seconds but those of STILL are the processor's.
"""

from __future__ import annotations

import argparse
import ast
import compileall
import contextlib
import dataclasses
import difflib
import gc
import hashlib
import importlib
import itertools
import json
import math
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Collection, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
SOURCE = ROOT / "src"
RECORD = HERE / "results" / "mutation.json"
SAME_RESULT = HERE / "mutants_without_effect.json"  # read by hand: file, what becomes of what, why no result differs
AREAS = {
    "units": ["layers/units.py", "layers/inventory.py"],
    "plan": ["plan/*.py"],
    "probe": ["relevance/probe/*.py"],
    "tuner": ["tuner/*.py"],
}
SAME = ("Eq_Is", "Is_Eq", "NotEq_IsNot", "IsNot_NotEq")
GUARDS = {"frozen", "slots", "kw_only", "strict"}  # keywords: of dataclasses and of zip
NO_FAULT = {
    "annotations": "a change inside a type annotation, which is never evaluated",
    "identity": "== for is, != for is not, and the other way round, which differ only for equal objects that are not one",
    "guards": "True or False of strict= in zip and of frozen=, slots= and kw_only= in a dataclass: they forbid what the code never does",
}
MEMORY = 8 << 30  # bytes of data that a child may hold
LIMIT = (
    60.0,
    5.0,
)  # seconds of the processor that a child may take: so many, and so many times what its tests usually take
DEAR = 12.0  # seconds: files in which a test took longer are left out, since what its tests share would be made for every mutant
# What the exit codes of pytest's process mean here. The signals are those of code that breaks the interpreter.
EXITS = {0: "passed", 1: "failed", 2: "none ran", 4: "none ran", -signal.SIGSEGV: "failed", -signal.SIGABRT: "failed"}
NOT_LOADED = (
    "ERROR collecting",
    "ImportError while loading conftest",
)  # what pytest writes where a file raises on import
STILL = 60.0  # seconds without any work, after which a child is said to hang


@dataclasses.dataclass(frozen=True)
class Mutant:
    file: str  # below src/reltune
    operator: str
    occurrence: int
    line: int
    column: int


def mutants(file: str) -> Iterator[tuple[Mutant, str | None]]:
    """All mutants of a file, each with the reason in NO_FAULT for which it counts as no fault."""
    from cosmic_ray.commands.init import _all_work_items

    text = (SOURCE / "reltune" / file).read_text(encoding="utf-8")
    tree = ast.parse(text)
    annotations, guards = _spans(tree)
    for item in _all_work_items([SOURCE / "reltune" / file], {}):
        spec = item.mutations[0]
        operator = spec.operator_name.removeprefix("core/")
        mutant = Mutant(file, operator, spec.occurrence, *spec.start_pos)
        reason = None
        if any(start <= spec.start_pos < end for start, end in annotations):
            reason = "annotations"
        elif operator.removeprefix("ReplaceComparisonOperator_") in SAME:
            reason = "identity"
        elif any(start <= spec.start_pos < end for start, end in guards):
            reason = "guards"
        yield mutant, reason


Span = tuple[tuple[int, int], tuple[int, int]]


def _spans(tree: ast.AST) -> tuple[list[Span], list[Span]]:
    """Where the annotations stand, and the values of the keywords in GUARDS. Columns are of characters: the source is ASCII there."""
    annotations: list[Span] = []
    guards: list[Span] = []
    for node in ast.walk(tree):
        for name in ("annotation", "returns"):
            if isinstance(inner := getattr(node, name, None), ast.expr):
                annotations.append(_span(inner))
        if isinstance(node, ast.keyword) and node.arg in GUARDS and isinstance(node.value, ast.Constant):
            guards.append(_span(node.value))
    return annotations, guards


def _span(node: ast.expr) -> Span:
    assert node.end_lineno is not None and node.end_col_offset is not None
    return (node.lineno, node.col_offset), (node.end_lineno, node.end_col_offset)


def mutated(mutant: Mutant) -> tuple[str, str]:
    """The file's text with the mutant, and the lines that differ."""
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator

    text = (SOURCE / "reltune" / mutant.file).read_text(encoding="utf-8")
    changed = mutate_code(text, get_operator(f"core/{mutant.operator}")(), mutant.occurrence)
    assert changed is not None, mutant
    lines = difflib.unified_diff(text.splitlines(), changed.splitlines(), n=0, lineterm="")
    return changed, "\n".join(line for line in lines if line[:3] not in ("---", "+++") and line[:2] != "@@")


class Tests:
    """Which tests run a line, and how long each usually takes."""

    def __init__(self, folder: Path) -> None:
        import coverage

        self.data = coverage.CoverageData(str(folder / "all"))
        self.data.read()
        pieces = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("tests-*.json")]
        every = {test: s for piece in pieces for test, s in piece["seconds"].items()}
        dear = {test.partition("::")[0] for test, s in every.items() if s > DEAR}
        self.seconds: dict[str, float] = {test: s for test, s in every.items() if test.partition("::")[0] not in dear}
        self.modules: set[str] = {name for piece in pieces for name in piece["modules"]}
        files = {path.rpartition("/reltune/")[2]: path for path in self.data.measured_files()}
        self.lines = {file: self.data.contexts_by_lineno(path) for file, path in files.items()}
        self.reach = Counter(test for lines in self.lines.values() for tests in lines.values() for test in tests)
        self.statements: dict[str, dict[int, range]] = {}

    def of(self, mutant: Mutant) -> list[str]:
        """The tests that run the mutant's statement; of one that is run on import, those that run the file. Of each
        file those that run the fewest lines of the core come first, which are about these lines; the files take turns, behind
        those with the module's name."""
        file = mutant.file
        if file not in self.statements:
            self.statements[file] = _statements((SOURCE / "reltune" / file).read_text(encoding="utf-8"))
        lines = self.statements[file][mutant.line]
        found = {test for line in lines for test in self.lines[file].get(line, [])}
        if not lines or "" in found:  # run on import, too
            found = {test for tests in self.lines[file].values() for test in tests}
        by_file: dict[str, list[str]] = {}
        for test in sorted(found & set(self.seconds), key=lambda test: (self.reach[test], test)):
            by_file.setdefault(test.partition("::")[0], []).append(test)
        named = [name for name in by_file if Path(name).stem.startswith(f"test_{Path(file).stem}")]
        first = [test for name in named for test in by_file.pop(name)]
        turns = itertools.zip_longest(*by_file.values())
        return first + [test for turn in turns for test in turn if test is not None]


def _statements(text: str) -> dict[int, range]:
    """By line of a function's body the lines of its smallest statement, of a compound one its head's; of a function's head its first
    statement; an empty range of all other lines."""
    found: dict[int, range] = {}
    inside: set[int] = set()
    heads: dict[int, range] = {}
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.stmt):
            body = getattr(node, "body", None)
            end = (body[0].lineno - 1 if body else node.end_lineno) or node.lineno
            lines = range(node.lineno, max(end, node.lineno) + 1)
            for line in lines:
                if line not in found or len(lines) <= len(found[line]):
                    found[line] = lines
        if isinstance(node, ast.FunctionDef):
            inside.update(range(node.body[0].lineno, (node.end_lineno or 0) + 1))
            first = node.body[-1 if len(node.body) == 1 else int(ast.get_docstring(node) is not None)]
            heads.update(dict.fromkeys(range(node.lineno, node.body[0].lineno), range(first.lineno, first.lineno + 1)))
    return heads | {
        line: found.get(line, range(line, line + 1)) if line in inside else range(0)
        for line in range(1, len(text.splitlines()) + 1)
        if line in inside or line not in heads
    }


def load(modules: set[str]) -> None:
    """Load what the tests load besides reltune, so that a child has it."""
    warnings.simplefilter("ignore")
    sys.path.insert(0, str(ROOT / "tests"))
    importlib.import_module("conftest")
    sys.modules.pop("conftest")
    own = {path.stem for folder in (ROOT / "tests", HERE) for path in folder.rglob("*.py")} | {
        "sitecustomize",
        "coverage",
    }
    for name in sorted(modules):
        if name.partition(".")[0] not in own:
            with contextlib.suppress(BaseException):  # some stand for others, or are no longer there
                importlib.import_module(name)
    assert "reltune" not in sys.modules, "it has to come from the copy"
    gc.collect()
    gc.freeze()


class Watch:
    """Whether a process and those that it has started have used more than ``limit`` seconds of the processor, or stand still."""

    def __init__(self, pid: int, limit: float) -> None:
        self.process, self.limit = psutil.Process(pid), limit
        self.looked = self.moved = time.monotonic()
        self.used = 0.0

    def is_over(self) -> bool:
        now = time.monotonic()
        if now - self.looked < 1:
            return False
        self.looked, used = now, 0.0
        with contextlib.suppress(psutil.Error):
            for process in [self.process, *self.process.children(recursive=True)]:
                used += sum(process.cpu_times()[:4])
        if used != self.used:
            self.used, self.moved = used, now
        return used > self.limit or now - self.moved > STILL


class Child:
    """Runs tests on a copy of the source, in a forked process."""

    def __init__(self, folder: Path) -> None:
        self.copy = folder / "src"
        shutil.copytree(SOURCE, self.copy, ignore=shutil.ignore_patterns("__pycache__"))
        compileall.compile_dir(self.copy, quiet=2)

    def run(self, tests: list[str], limit: float, change: tuple[str, str] | None = None) -> tuple[str, str]:
        """ "passed", "failed", "timed out", or "none ran" where pytest came to no test; and what it wrote.

        ``change`` is a file and its text.
        """
        if change is None:
            return self._fork(tests, limit)
        path = self.copy / "reltune" / change[0]
        before, stamp = path.read_text(encoding="utf-8"), path.stat()
        path.write_text(change[1], encoding="utf-8")
        try:
            return self._fork(tests, limit)
        finally:
            path.write_text(before, encoding="utf-8")
            os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))

    def _fork(self, tests: list[str], limit: float) -> tuple[str, str]:
        with tempfile.TemporaryDirectory() as scratch:
            child = os.fork()
            if child == 0:
                os.setsid()
                self._be_pytest(tests, Path(scratch))
            done, status, watch = 0, 0, Watch(child, limit)
            while not done and not watch.is_over():
                time.sleep(0.05)
                done, status = os.waitpid(child, os.WNOHANG)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)  # and what it has started
            if not done:
                os.waitpid(child, 0)
            output = (Path(scratch) / "output").read_text(encoding="utf-8", errors="replace")
        if not done:
            return "timed out", output
        code = os.waitstatus_to_exitcode(status)
        if code not in EXITS:
            raise SystemExit(f"pytest ended with {code}, which says nothing of the code:\n{output[-2000:]}")
        return EXITS[code], output

    def check(self, tests: Collection[str]) -> None:
        """Raise SystemExit unless all of the tests are there."""
        _, output = self.run(["--collect-only", "-v", *sorted({test.partition("::")[0] for test in tests})], math.inf)
        if gone := sorted(set(tests) - set(output.splitlines())):
            raise SystemExit(
                f"{len(gone)} tests are gone, such as {gone[0]}; run core_coverage.py anew.\n{output[-500:]}"
            )

    def _be_pytest(self, tests: list[str], scratch: Path) -> None:
        code = 3
        try:
            output = os.open(scratch / "output", os.O_WRONLY | os.O_CREAT)
            for stream in (1, 2):
                os.dup2(output, stream)
            resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
            sys.dont_write_bytecode = True
            sys.path.insert(0, str(self.copy))
            paths = [str(self.copy), *(p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p)]
            os.environ |= {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": os.pathsep.join(paths)}
            os.environ |= {"TMPDIR": str(scratch), "HYPOTHESIS_STORAGE_DIRECTORY": str(scratch / "hypothesis")}
            tempfile.tempdir = str(scratch)
            os.chdir(ROOT)
            import pytest

            plain = ["-p", "no:cacheprovider", "-p", "no:xdist", "--no-header", "--tb=line", "--hypothesis-seed=0"]
            code = int(pytest.main(["-x", "-q", *plain, f"--basetemp={scratch}/pytest", *tests]))
        finally:
            sys.stdout.flush()
            os._exit(code)


def within(tests: list[str], seconds: dict[str, float], most: float) -> list[str]:
    """As many of the tests as take so long together; the first in any case."""
    total, taken = 0.0, []
    for test in tests:
        total += seconds[test]
        if taken and total > most:
            break
        taken.append(test)
    return taken


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path, required=True, metavar="DIR", help="as of core_coverage.py")
    parser.add_argument("--area", nargs="*", choices=AREAS, default=list(AREAS))
    parser.add_argument("--sample", type=int, default=150, help="mutants of each area")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--most", type=float, default=8.0, help="seconds that a mutant's tests usually take together")
    parser.add_argument("--most_at_first", type=float, help="what --most was before --again, for the record")
    parser.add_argument("--until", type=float, default=math.inf, help="seconds after which no further mutant is begun")
    parser.add_argument(
        "--again",
        choices=("tests", "written"),
        help="run anew what survived: by more tests, or by some that were written for it",
    )
    parser.add_argument("--record", action="store_true", help="write the record of what is there, and run nothing")
    parser.add_argument("--commit", default="")
    arguments = parser.parse_args()
    folder, begun = arguments.keep.resolve(), time.monotonic()
    counts, drawn = draw(arguments)
    results = folder / f"mutants-{arguments.seed}.json"
    found: dict[str, dict[str, Any]] = json.loads(results.read_text("utf-8")) if results.exists() else {}
    if arguments.record:
        record(arguments, counts, [found[key(m)] for m in drawn if key(m) in found])
        return 0
    tests = Tests(folder)
    load(tests.modules)
    with tempfile.TemporaryDirectory() as scratch:
        child = Child(Path(scratch))
        child.check(tests.seconds)
        checked = Checked(child, folder, tests)
        again = arguments.again
        while True:
            for mutant in drawn:
                old = found.get(key(mutant))
                if time.monotonic() - begun > arguments.until:
                    break
                if old is None or (again and old["outcome"] in ("survived", "no test")):
                    found[key(mutant)] = one(child, mutant, tests, checked.failing, arguments.most)
                    if old is not None and arguments.again == "written":
                        found[key(mutant)]["at_first"] = old.get("at_first", old["outcome"])
                    results.write_text(json.dumps(found, indent=1), encoding="utf-8")
                    print(json.dumps(found[key(mutant)]), flush=True)
            again = None
            failing = checked.failing_of({r["by"] for r in found.values() if r["by"] not in (None, "loading")})
            wrong = [name for name, r in found.items() if r["by"] in failing]
            if not wrong:
                return 0
            for name in wrong:  # killed by tests that fail without them, too
                del found[name]
            results.write_text(json.dumps(found, indent=1), encoding="utf-8")


def key(mutant: Mutant) -> str:
    return f"{mutant.file}/{mutant.operator}/{mutant.occurrence}"


def draw(arguments: argparse.Namespace) -> tuple[dict[str, dict[str, int]], list[Mutant]]:
    """By area how many mutants there are and how many count as no fault; and the sample, of all areas in turn."""
    counts: dict[str, dict[str, int]] = {}
    samples = []
    for area in arguments.area:
        every = _of_area(area, arguments.keep)
        real = [mutant for mutant, reason in every if reason is None]
        counts[area] = {"mutants": len(real)}
        counts[area] |= {name: sum(reason == name for _, reason in every) for name in NO_FAULT}
        samples.append(random.Random(f"{arguments.seed} {area}").sample(real, min(arguments.sample, len(real))))
    most = max(map(len, samples))
    return counts, [sample[i] for i in range(most) for sample in samples if i < len(sample)]


def _of_area(area: str, folder: Path) -> list[tuple[Mutant, str | None]]:
    """All mutants of an area, kept in the folder for as long as its files stay as they are: finding them takes long."""
    paths = sorted(path for pattern in AREAS[area] for path in (SOURCE / "reltune").glob(pattern))
    state = hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()[:16]
    kept = folder / f"all-{area}-{state}.json"
    if kept.exists():
        return [(Mutant(*fields), reason) for fields, reason in json.loads(kept.read_text(encoding="utf-8"))]
    every = [found for path in paths for found in mutants(path.relative_to(SOURCE / "reltune").as_posix())]
    kept.write_text(json.dumps([[dataclasses.astuple(m), reason] for m, reason in every]), encoding="utf-8")
    return every


class Checked:
    """Which tests pass in a child without a mutant; kept in the folder. Asked of those that have killed one."""

    def __init__(self, child: Child, folder: Path, tests: Tests) -> None:
        self.child, self.tests, self.kept = child, tests, folder / "checked.json"
        self.passing: set[str] = set()
        self.failing: set[str] = set()
        if self.kept.exists():
            self.passing, self.failing = map(set, json.loads(self.kept.read_text(encoding="utf-8")))

    def failing_of(self, names: set[str]) -> set[str]:
        """Those of the tests that fail, each tried once."""
        left = sorted(names - self.passing - self.failing)
        while left:
            piece = left[:100]
            outcome, output = self.child.run(piece, _limit(self.tests, piece))
            if outcome == "passed":
                self.passing.update(piece)
                left = left[len(piece) :]
            else:
                failed = failed_in(output, piece) or piece[0]
                print(f"fails without a mutant: {failed}\n{output[-2000:]}", flush=True)
                self.failing.add(failed)
                left.remove(failed)
            self.kept.write_text(json.dumps([sorted(self.passing), sorted(self.failing)]), encoding="utf-8")
        return self.failing & names


def failed_in(output: str, tests: list[str]) -> str | None:
    """Which of the tests failed, by what pytest wrote."""
    lines = output.splitlines()
    return next((t for t in tests for line in lines if line.startswith((f"FAILED {t}", f"ERROR {t}"))), None)


def missing_in(output: str, tests: list[str]) -> set[str]:
    """Which of the tests pytest did not find in files that it could read; it names their functions alone."""
    lines = set(output.splitlines())
    return {test for test in tests if f"ERROR: not found: {ROOT / test.partition('[')[0]}" in lines}


def _limit(tests: Tests, chosen: list[str]) -> float:
    return LIMIT[0] + LIMIT[1] * sum(tests.seconds[test] for test in chosen)


def one(child: Child, mutant: Mutant, tests: Tests, failing: set[str], most: float) -> dict[str, Any]:
    text, change = mutated(mutant)
    chosen = within([t for t in tests.of(mutant) if t not in failing], tests.seconds, most)
    start, outcome, by = time.monotonic(), "no test", None
    while chosen:
        result, output = child.run(chosen, _limit(tests, chosen), (mutant.file, text))
        if result == "none ran" and (gone := missing_in(output, chosen)):
            chosen = [test for test in chosen if test not in gone]  # a test's name holds what the mutant changes
            continue
        if result == "none ran" and not any(words in output for words in NOT_LOADED):
            raise SystemExit(f"{mutant}: no test ran, and not because of the source:\n{output[-2000:]}")
        outcome = {"passed": "survived", "timed out": "timed out"}.get(result, "killed")
        if outcome == "killed":
            by = "loading" if result == "none ran" else failed_in(output, chosen)
        break
    seconds = round(time.monotonic() - start, 1)
    figures = {"outcome": outcome, "by": by, "tests": len(chosen), "seconds": seconds}
    return {"file": mutant.file, "line": mutant.line, "operator": mutant.operator, "change": change, **figures}


def said(change: str) -> tuple[str, str]:
    """The lines that a mutant changes, and what they became; "nothing" where it takes them out."""
    old, new = (" ".join(line[1:].strip() for line in change.splitlines() if line[:1] == sign).strip() for sign in "-+")
    return old, new or "nothing"


def record(arguments: argparse.Namespace, counts: dict[str, dict[str, int]], results: list[dict[str, Any]]) -> None:
    """Write the record: by area its counts and its mutants' outcomes, with those that were not killed in full."""
    without_effect = json.loads(SAME_RESULT.read_text(encoding="utf-8"))
    areas = {}
    for area, numbers in counts.items():
        mine = [r for r in results if any(Path(r["file"]).match(pattern) for pattern in AREAS[area])]
        killed = sum(r["outcome"] in ("killed", "timed out") for r in mine)
        areas[area] = {
            "files": AREAS[area],
            **numbers,
            "run": len(mine),
            "killed": killed,
            "killed_at_first": sum(r.get("at_first", r["outcome"]) in ("killed", "timed out") for r in mine),
            "timed_out": sum(r["outcome"] == "timed out" for r in mine),
            "survivors": [
                {name: r[name] for name in ("file", "line", "operator", "change", "outcome", "tests")}
                | {"without_effect": without_effect.get(r["file"], {}).get(" → ".join(said(r["change"])), "")}
                for r in sorted(mine, key=lambda r: (r["file"], r["line"], r["operator"]))
                if r["outcome"] in ("survived", "no test")
            ],
        }
    head = {"commit": arguments.commit, "cosmic_ray": metadata.version("cosmic-ray"), "seed": arguments.seed}
    head["most_seconds_at_first"] = arguments.most_at_first or arguments.most
    head |= {"most_seconds": arguments.most, "dear_seconds": DEAR, "no_fault": NO_FAULT}
    RECORD.write_text(json.dumps({**head, "areas": areas}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
