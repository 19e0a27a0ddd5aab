"""The pages against the program: the real parser reads every command, every import and link leads somewhere.

The commands of docs/getting_started.md are run here, those of docs/serving.md in ``test_serving_page.py``.
"""

from __future__ import annotations

import ast
import importlib.util
import itertools
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main

import reltune
from command_line import reltune as reltune_program
from reltune.cli.commands import app
from reltune.config.comparison import COMPARISON_FIELDS
from reltune.config.fields import assignments, checked
from reltune.config.run_config import FIELDS
from reltune.config.training_fields import named_training_fields, parse_training_fields
from tiny_models import save_tiny_bert

ROOT = Path(__file__).parents[1]
PAGES = [
    *("README.md", "README.zh.md", "CONTRIBUTING.md", "examples/snip_criterion/README.md"),
    *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")),
]
NOTEBOOKS = sorted((ROOT / "docs" / "tutorials").glob("*.ipynb"))
LAUNCHERS = ("torchrun", "accelerate")
LINK = re.compile(r"\]\((?!\w+:|#)([^)#\s]+)")


def blocks(page: str, languages: str) -> list[str]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"^```(?:{languages})\n(.*?)^```$", text, flags=re.M | re.S)


def calls(block: str) -> Iterator[list[str]]:
    """The words of every program that a block of shell starts."""
    for line in block.replace("\\\n", " ").splitlines():
        reader = shlex.shlex(line, posix=True, punctuation_chars=";&|")
        reader.whitespace_split = True
        for joined, words in itertools.groupby(reader, lambda word: set(word) <= set(";&|")):
            if not joined:
                yield list(words)


def commands(page: str) -> Iterator[list[str]]:
    """The words after ``reltune`` of every call on a page, whatever starts it."""
    for words in itertools.chain.from_iterable(map(calls, blocks(page, "sh|bash"))):
        if words[0] in LAUNCHERS and "reltune" in words:
            words = words[words.index("reltune") :]
        if words[0] == "reltune":
            yield [word for word in words[1:] if word != "…"]  # the rest is the reader's


def check(words: list[str]) -> None:
    """Read a command line as the program does before it looks at any file."""
    program: Any = typer.main.get_command(app)
    context = program.make_context("reltune", list(words), resilient_parsing=words[0].startswith("--"))
    if context.resilient_parsing:
        return
    name, command, rest = program.resolve_command(context, list(words))
    context = command.make_context(name, rest)
    own = [option for parameter in command.params for option in parameter.opts if option.startswith("--")]
    if named_training_fields(context.args, own):
        parse_training_fields(context.args)
    for field in COMPARISON_FIELDS if name == "compare" else FIELDS:
        source = context.get_parameter_source(field.name)
        if source is not None and source.name == "COMMANDLINE":
            value = context.params[field.name]
            checked(field, assignments(value) if field.name == "sweep" else value)


@pytest.mark.parametrize("page", PAGES)
def test_every_command_can_be_read(page: str) -> None:
    for words in commands(page):
        try:
            check(words)
        except (Exception, SystemExit) as error:
            raise AssertionError(f"reltune {' '.join(words)}: {error!r}") from error


@pytest.mark.parametrize(
    "line",
    [
        *("run --model_name_or_path m --no_such_flag 1", "select run --buget 1%", "measure run", "evaluate"),
        *(
            "tune run --num_train_epoch 3",
            "tune run --num_train_epochs few",
            "run --max_length long",
            "export run --to lora",
        ),
    ],
)
def test_a_command_that_cannot_be_read_is_noticed(line: str) -> None:
    with pytest.raises(Exception):  # noqa: B017 - of the parser, or InputError
        check(line.split())


def test_pages_have_commands_to_check() -> None:
    found = {page: len(list(commands(page))) for page in PAGES}
    assert found["docs/tasks.md"] >= 13 and found["docs/distributed.md"] >= 5 and sum(found.values()) > 50


@pytest.mark.parametrize("page", PAGES)
def test_python_compiles_and_names_what_is_there(page: str) -> None:
    for block in blocks(page, "python"):
        check_names(block, page)


def check_names(code: str, source: str) -> None:
    """That the code compiles, and that what it names of reltune is there."""
    for node in ast.walk(ast.parse(code, source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "reltune":
            module = importlib.import_module(str(node.module))
            assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "reltune":
            assert hasattr(reltune, node.attr) or importlib.import_module(f"reltune.{node.attr}"), ast.unparse(node)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for link in LINK.findall(re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)):
        assert (ROOT / page).parent.joinpath(link).exists(), link


def test_the_page_of_the_commands_has_every_flag() -> None:
    source = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "hooks.py")
    assert source is not None and source.loader is not None
    hooks = importlib.util.module_from_spec(source)
    source.loader.exec_module(hooks)
    sections = re.split(r"^## reltune (\w+)$", hooks.commands_page(), flags=re.M)
    by_command = dict(zip(sections[1::2], sections[2::2], strict=True))
    listed = re.findall(r"^  (\w+) ", reltune_program("--help").out.partition("Commands:")[2], flags=re.M)
    assert list(by_command) == listed and len(listed) >= 13
    for name in listed:
        flags = re.findall(r"^  (--\w+)", reltune_program(name, "--help").out.partition("Options:")[2], flags=re.M)
        told = re.findall(r"^\| `(--\w+)", by_command[name], flags=re.M)
        assert told == flags[: flags.index("--help")], name  # an epilog may follow


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_call_what_is_there(path: Path) -> None:
    """`make notebooks` runs them, and stores what they show: all of it, and nothing of the machine."""
    text = path.read_text(encoding="utf-8")
    code = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    kinds = {output["output_type"] for cell in code for output in cell["outputs"]}
    assert {"stream", "execute_result"} <= kinds <= {"stream", "display_data", "execute_result"}  # and no error
    assert len(text) < 200_000 and str(Path.home()) not in text
    outputs = json.dumps([cell["outputs"] for cell in code])
    assert not re.search(r"/tmp/|site-packages|\\u001b|\\r|\d%\|", outputs)  # nor bars and colours of a terminal
    for cell in code:
        lines, shell = [], []
        for line in "".join(cell["source"]).replace("\\\n", " ").splitlines():
            (shell if line.startswith("!") else lines).append(line)
        check_names("\n".join(lines), path.name)
        for words in map(shlex.split, shell):
            assert words[0] == "!reltune"
            check([re.sub(r"^\{\w+\}$", "1", word) for word in words[1:]])


def test_the_notebook_on_language_models_says_what_a_gpu_wants() -> None:
    first = json.loads((ROOT / "docs/tutorials/instructions.ipynb").read_text(encoding="utf-8"))["cells"][0]
    assert "GPU notebook service" in "".join(first["source"])


@pytest.mark.slow
def test_getting_started_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every block in its order, on a small model in the place of the package's."""
    monkeypatch.chdir(tmp_path)
    save_tiny_bert("minilm")
    text = (ROOT / "docs/getting_started.md").read_text(encoding="utf-8")
    ran = []
    for language, block in re.findall(r"^```(bash|python)\n(.*?)^```$", text, flags=re.M | re.S):
        if language == "python":
            exec(compile(block, "getting_started.md", "exec"), {})
            continue
        for words in calls(block):
            if words[0] == "reltune":
                done = reltune_program(*words[1:])
                assert done.code == 0 and done.out, (words, done)
                ran.append(words[1])
            else:
                assert words[0] in ("pip", "python"), words
    assert {"run", "analyze", "select", "tune", "evaluate", "report", "predict", "export"} <= set(ran)
    assert Path("first/report.html").is_file() and Path("merged/model.safetensors").is_file()
    assert len(Path("answers.csv").read_text().splitlines()) == 401
