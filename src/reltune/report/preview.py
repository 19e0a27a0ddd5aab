"""What a run would work with, as lines of at most 80 columns without colour."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.cells import cell_len, chop_cells

from reltune.report.terminal import CONTROL, WIDTH

UNKNOWN = 0.001  # of the tokens, from where on it is said that the tokenizer does not know them
CLASSES = 12  # are shown, at most
NAME = 28  # columns of a name
HEAD, TAIL = 160, 80  # tokens of a long sequence that are shown
FEW = 48  # the same in the first lines of a run
SPLITS = {"train": "training", "validation": "validation", "test": "test", "forgetting": "forgetting"}


def preview_lines(values: Mapping[str, Any]) -> list[str]:
    """All of it (``Preview.to_dict``)."""
    lines = [*_wrapped(f"Task: {values['task']}{_of_classes(values)}. Data: {values['source']}."), ""]
    lines += _table(["column", "used for"], [[name, _use(name, values)] for name in values["columns"]], numbers=False)
    lines += ["", *_rows(values)]
    lines += ["", *_wrapped(lengths_sentence(values))] if values["lengths"] else []
    if values["example"] or values["wanted"]:
        lines += ["", *_example(values, HEAD, TAIL)]
    return lines


def short_lines(values: Mapping[str, Any]) -> list[str]:
    """The first lines of a run, below the line that has the numbers of rows."""
    unused = [name for name, use in values["columns"].items() if not use]
    used = [f"{_named(name)} ({_use(name, values)})" for name, use in values["columns"].items() if use]
    lines = _wrapped(
        f"Columns: {', '.join(used)}" + (f"; not used: {', '.join(map(_named, unused))}." if unused else ".")
    )
    if values["classes"]:
        counts = {label: of.get("train", 0) for label, of in values["classes"].items()}
        shown = sorted(counts.items(), key=lambda pair: -pair[1])
        some = [
            f"{_named(label)} ({count:,})" for label, count in (shown if len(shown) <= 8 else [*shown[:5], shown[-1]])
        ]
        if len(shown) > 8:
            some.insert(5, "…")
        lines += _wrapped(f"Classes in training: {', '.join(some)}.")
    lines += _wrapped(lengths_sentence(values)) if values["lengths"] else []
    return lines + (_example(values, FEW, FEW // 2) if values["example"] else [])


def lengths_sentence(values: Mapping[str, Any]) -> str:
    """How long examples are, and how many of them are cut."""
    own = values["lengths"]
    counted = f"{own['examples']:,} training {values['unit']}s"
    said = f"Tokens ({counted}{'' if own['whole'] or not own['cut'] else ', cut'}): median {own['median']:,}, 95% up to {own['nearly_all']:,}, longest "
    said += f"{own['most']:,}."
    if own["unknown"] > UNKNOWN:
        said += f" {own['unknown']:.1%} of them are unknown to the tokenizer."
    if own["windows"]:
        return said + f" What is longer than {own['limit']:,} is read in several windows."
    if not own["cut"]:
        return said + f" None is cut ({_limit(own)})."
    return said + f" {own['cut']:,} ({own['share_cut']:.1%}) {'is' if own['cut'] == 1 else 'are'} cut ({_limit(own)})."


def _limit(lengths: Mapping[str, Any]) -> str:
    where = f"max_length {lengths['limit']:,}"
    return where if lengths["limit_of"] == "max_length" else f"the model takes {lengths['limit']:,}"


def _of_classes(values: Mapping[str, Any]) -> str:
    return f", {len(values['classes'])} classes" if values["classes"] else ""


def _use(name: str, values: Mapping[str, Any]) -> str:
    use = values["columns"][name]
    return (f"{use}, to be learned" if name in values["learned"] else use) or "nothing"


def _rows(values: Mapping[str, Any]) -> list[str]:
    """Rows of each split, and of each class in it."""
    splits = list(values["rows"])
    rows = [["rows", *("streamed" if values["rows"][one] is None else f"{values['rows'][one]:,}" for one in splits)]]
    if any(values["skipped"].values()):
        rows.append(["bad rows, left out", *(f"{values['skipped'][one]:,}" for one in splits)])
    for place, what in enumerate(("least number", "mean", "largest")) if values["numbers"] else ():
        rows.append([what, *(f"{values['numbers'][one][place]:.4g}" for one in splits)])
    classes = sorted(values["classes"].items(), key=lambda pair: -pair[1].get("train", 0))
    left = classes[CLASSES - 1 : -1] if len(classes) > CLASSES else []
    for label, of in classes:
        if (label, of) in left:
            if (label, of) == left[0]:
                most, least = (one[1].get("train", 0) for one in (left[0], left[-1]))
                rows.append([f"… {len(left)} more", f"{least:,}–{most:,}" if least != most else f"{most:,} each"])
            continue
        rows.append([f"  {label}", *(f"{of.get(one, 0):,}" for one in splits)])
    return _table(["split", *(SPLITS[one] for one in splits)], rows)


def _example(values: Mapping[str, Any], head: int, tail: int) -> list[str]:
    """A training example as the model sees it, with a line of marks below each line of tokens."""
    sequences = values["example"]
    learned = any(token["learned"] for tokens in sequences.values() for token in tokens)
    marks = "^ the loss is taken of" if learned and values["unit"] != "window" else "^ the answer"
    lines = _wrapped(
        f"Training {values['unit']} {values['number']:,} as the model sees it"
        + (f" ({marks}; · a space in a token):" if learned else ":")
    )
    for name, tokens in sequences.items():
        title = f"{name}, " if len(sequences) > 1 else ""
        lines.append(
            f"  {title}{len(tokens):,} tokens"
            + (f", {sum(token['learned'] for token in tokens):,} learned" if learned else "")
        )
        if len(tokens) <= head + tail:
            lines += _marked(tokens)
        else:
            lines += [*_marked(tokens[:head]), f"  … {len(tokens) - head - tail:,} tokens …", *_marked(tokens[-tail:])]
    return lines + ([f"  to be learned: {_named(values['wanted'], WIDTH - 18)}"] if values["wanted"] else [])


def _marked(tokens: Sequence[Mapping[str, Any]]) -> list[str]:
    """Tokens with a blank between them, and below them marks."""
    lines, above, below = [], "", ""
    for token in tokens:
        text = visible(token["text"]) + (f"={token['tag']}" if token["tag"] else "")
        for part in chop_cells(text, WIDTH - 3) if text else ():
            if cell_len(above) + 1 + cell_len(part) > WIDTH - 2:
                lines += [above, below]
                above = below = ""
            above += f" {part}"
            below += " " + ("^" if token["learned"] else " ") * cell_len(part)
    lines += [above, below]
    return [f" {line.rstrip()}" for line in lines if line.strip()]


def visible(text: str) -> str:
    """A token's text with what cannot be seen: spaces as ``·``, line ends as ``\\n``."""
    for sign, name in (("\\", r"\\"), ("\n", r"\n"), ("\t", r"\t"), ("\r", r"\r"), (" ", "·")):
        text = text.replace(sign, name)
    return CONTROL.sub("\ufffd", text)


def _named(name: str, width: int = NAME) -> str:
    name = CONTROL.sub("\ufffd", name).replace("\n", " ")
    return name if cell_len(name) <= width else f"{chop_cells(name, width - 1)[0]}…"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], numbers: bool = True) -> list[str]:
    """Columns side by side, the first one's words to the left; numbers to the right."""
    cells = [list(heads), *([_named(row[0]), *row[1:]] for row in rows)]
    widths = [max(cell_len(row[place]) for row in cells if place < len(row)) for place in range(len(heads))]
    lines = []
    for row in cells:
        words = [
            " " * (width - cell_len(cell)) + cell if numbers and place else cell + " " * (width - cell_len(cell))
            for place, (cell, width) in enumerate(zip(row, widths, strict=False))
        ]
        lines.append("  ".join(words).rstrip())
    return lines


def _wrapped(sentence: str) -> list[str]:
    lines = [""]
    for word in CONTROL.sub("\ufffd", sentence).split():
        for part in chop_cells(word, WIDTH):
            room = cell_len(lines[-1]) + 1 + cell_len(part) <= WIDTH
            if not lines[-1]:
                lines[-1] = part
            elif room:
                lines[-1] += f" {part}"
            else:
                lines.append(part)
    return lines
