"""What MkDocs is told beyond mkdocs.yml: pages made from other files, and links that leave this folder.

On GitHub a page's link to ``../benchmarks/results/demo.json`` opens the file; the site carries a copy of each file that is linked to.
"""

from __future__ import annotations

import json
import posixpath
import re
import sys
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files

ROOT = Path(__file__).parents[1]
PAGES = {"README.md": "index.md", "README.zh.md": "zh.md", "CHANGELOG.md": "changes.md"}
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)#\s]+)")

# What a browser would fetch by itself; a link that one may follow is none of it.
LOADED = {
    ".html": re.compile(r"<(?:script|img|iframe|source|link)\b[^>]*\b(?:src|href)=[\"']?(?:https?:)?//[^>]*>"),
    ".css": re.compile(r"(?:url\([\"']?|@import\s+[\"'])(?:https?:)?//[^)]*"),
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are not in the folder, and what any page links to outside it."""
    from mkdocs.structure.files import File

    pages = {f"docs/{file.src_uri}": Path(str(file.abs_src_path)) for file in files.documentation_pages()}
    pages |= {name: ROOT / name for name in PAGES}
    notebooks = sorted((ROOT / "docs" / "tutorials").glob("*.ipynb"))
    linked = set()
    for name, path in pages.items():
        text = path.read_text(encoding="utf-8")
        linked |= {_target(name, link) for link in LINK.findall(_without_code(text))}
        if name in PAGES:
            files.append(File.generated(config, PAGES[name], content=text))
    for target in sorted(linked):
        if not target.startswith("docs/") and target not in PAGES and (ROOT / target).is_file():
            files.append(File.generated(config, target, abs_src_path=str(ROOT / target)))
    files.append(File.generated(config, "commands.md", content=commands_page()))
    for notebook in notebooks:
        content = notebook_page(json.loads(notebook.read_text(encoding="utf-8")), notebook.name)
        files.append(File.generated(config, f"tutorials/{notebook.stem}.md", content=content))
    return files


def on_post_build(config: MkDocsConfig) -> None:
    """Whoever reads the site asks no other host for anything."""
    from mkdocs.exceptions import PluginError

    for path in Path(config.site_dir).rglob("*"):
        loaded = LOADED.get(path.suffix)
        if loaded and (found := loaded.search(path.read_text(encoding="utf-8"))):
            raise PluginError(f"{path} loads something from another host: {found[0]}")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Point links at where the site has the file, and leave out comments, which name the records that figures are from."""
    source = next((name for name, made in PAGES.items() if made == page.file.src_uri), f"docs/{page.file.src_uri}")

    def placed(match: re.Match[str]) -> str:
        target = _target(source, match[1])
        target = PAGES.get(target) or target.removeprefix("docs/")
        if target.endswith(".ipynb") and not page.file.src_uri.startswith("tutorials/"):
            target = target.removesuffix(".ipynb") + ".md"
        return posixpath.relpath(target, posixpath.dirname(page.file.src_uri) or ".")

    return LINK.sub(placed, re.sub(r"[ \t]*<!--.*?-->", "", markdown, flags=re.S))


def _target(source: str, link: str) -> str:
    """The file that a link means, as a path from the repository's root. A folder stands for its README."""
    target = posixpath.normpath(posixpath.join(posixpath.dirname(source), link))
    return f"{target}/README.md" if (ROOT / target / "README.md").is_file() else target


def _without_code(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)


def notebook_page(notebook: dict[str, Any], name: str) -> str:
    """A notebook's cells, and what it has stored of their outputs."""
    parts = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            data = output.get("data", {})
            if "text/html" in data:
                # one line: a blank one would end the block of HTML
                parts.append(f"<div>{' '.join(''.join(data['text/html']).split(chr(10)))}</div>")
            else:
                text = "".join(output.get("text", data.get("text/plain", "")))
                parts.append(f"```text\n{text.rstrip()}\n```")
    parts.insert(1, f"The notebook itself: [{name}]({name}).")
    return "\n\n".join(parts) + "\n"


def commands_page() -> str:
    """Every command with its arguments and flags, as ``--help`` says them."""
    sys.path.insert(0, str(ROOT / "src"))
    import typer.main

    from reltune.cli.commands import app

    program: Any = typer.main.get_command(app)
    lines = [
        "# Command line",
        program.help,
        "A flag may be written with dashes: `--text-column` is `--text_column`. Bad input ends a command with exit code 2.",
        _flags(program, "reltune"),
    ]
    for name, command in program.commands.items():
        words = [_plain(text) if text else "" for text in (command.help, command.epilog)]
        lines += [f"## reltune {name}", *words, _flags(command, f"reltune {name}")]
    return "\n\n".join(filter(None, lines)) + "\n"


def _flags(command: Any, name: str) -> str:
    """How a command is called, and a table of its arguments and flags."""
    context = command.make_context(name, [], resilient_parsing=True)
    arguments = [parameter.metavar for parameter in command.params if parameter.param_type_name == "argument"]
    rows = []
    for parameter in command.params:
        flag, meaning = parameter.get_help_record(context) or ("", "")
        flag = parameter.metavar if parameter.metavar in arguments else " ".join(flag.split()).replace("|", "\\|")
        rows.append(f"| `{flag}` | {_plain(' '.join(meaning.split()))} |" if flag else "")
    table = ["| flag | meaning |", "|---|---|", *filter(None, rows)]
    return "\n".join([f"`{' '.join([name, *arguments, '[OPTIONS]'])}`", "", *table])


def _plain(text: str) -> str:
    """Text whose characters stand for themselves in Markdown, in which HTML may stand."""
    return re.sub(r"([\\`*_{}\[\]|])", r"\\\1", escape(text, quote=False))
