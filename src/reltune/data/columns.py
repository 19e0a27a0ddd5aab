"""The task that rows are for, told by the names of their columns and the kind of their labels."""

from __future__ import annotations

import dataclasses
import itertools
import re
import shlex
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

from reltune.data.labels import CLASSES, LABELLED, REPEATS, switch_of, task_of_labels
from reltune.data.rows import Row, Rows
from reltune.data.streams import StreamedRows
from reltune.errors import InputError, nearest
from reltune.notes import note

LOOKED_AT = 1000  # rows whose labels decide between classes, numbers and lists


@dataclasses.dataclass(frozen=True)
class Convention:
    """A usual layout of columns, and the tasks that it can be for.

    Attributes:
        tasks: where there are several, the labels decide.
        roles: what a column is to the task -> the names that such a column has, the usual one first. A ``text_pair`` is a
            second text that the model reads with the first.
        optional: roles that may be missing.
    """

    tasks: tuple[str, ...]
    roles: dict[str, tuple[str, ...]]
    optional: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)

    def columns(self, present: Sequence[str]) -> dict[str, str] | None:
        """role -> column, of the columns that are there; None if one is missing."""
        chosen: dict[str, str] = {}
        for role, names in (self.roles | self.optional).items():
            column = _called(names, present)
            if column is not None:
                chosen[role] = column
            elif role in self.roles:
                return None
        return chosen

    def __str__(self) -> str:
        names = [names[0] for names in self.roles.values()] + [f"({names[0]})" for names in self.optional.values()]
        return ", ".join(names)


def _called(names: Iterable[str], columns: Sequence[str]) -> str | None:
    """The column with one of these names, if need be in other case or with space around."""
    exact = next((name for name in names if name in columns), None)
    if exact is not None:
        return exact
    folded = [column.strip().casefold() for column in columns]
    wanted = next((name.casefold() for name in names if folded.count(name.casefold()) == 1), None)
    return None if wanted is None else columns[folded.index(wanted)]


LABEL = ("label", "labels")
TEXT = ("text", "sentence")
IMAGES = ("image", "image_path", "img_path", "file_name", "filename", "filepath", "file_path")
IMAGE_FILE = re.compile(r".+\.(png|jpe?g|webp|bmp|gif|tiff?)", re.I)
LIKELY_LABELS = (  # names that columns of labels have without being called so
    *(
        "sentiment",
        "category",
        "class",
        "target",
        "stars",
        "rating",
        "score",
        "gold_label",
        "polarity",
        "intent",
        "emotion",
    ),
    *("topic", "airline_sentiment", "is_spam", "toxic", "v1", "y"),
)
MARKED_PARTS = (
    "entities",
    "spans",
    "annotations",
)  # parts of a text by their places, as annotation programs write them
PAIRS = (  # two texts that are read together -> the names of their label, if they have one of their own
    (("sentence1", "sentence2"), ("score", "similarity_score")),
    (("sentence_a", "sentence_b"), ("relatedness_score",)),
    (("premise", "hypothesis"), ()),
    (("question1", "question2"), ("is_duplicate",)),
    (("question", "passage"), ("answer",)),
    (("question", "sentence"), ()),
    (("query", "document"), ()),
    (("query", "passage"), ()),
    (("text1", "text2"), ()),
    (("text_a", "text_b"), ()),
    (("text", "text_pair"), ()),
)
CONVENTIONS = (
    Convention(
        ("preference",),
        {"chosen": ("chosen",), "rejected": ("rejected",)},
        {"prompt": ("prompt", "question", "instruction", "conversations")},
    ),
    Convention(
        ("question_answering",),
        {"question": ("question",), "context": ("context",), "answers": ("answers", "answer", "answer_text")},
    ),
    Convention(
        ("token_classification",),
        {
            "tokens": ("tokens", "words", "word"),
            "tags": ("ner_tags", "tags", "pos_tags", "chunk_tags", "labels", "tag", "ner_tag"),
        },
    ),
    Convention(("causal_lm",), {"messages": ("messages", "conversations", "conversation")}, {"tools": ("tools",)}),
    Convention(
        ("causal_lm",), {"prompt": ("prompt",), "completion": ("completion", "response")}, {"tools": ("tools",)}
    ),
    Convention(
        ("causal_lm",),
        {"instruction": ("instruction", "query", "question"), "output": ("output", "response", "answer")},
        {"input": ("input", "context"), "system": ("system",), "history": ("history",)},
    ),
    Convention(("seq2seq",), {"source": ("source",), "target": ("target",)}),
    Convention(("seq2seq",), {"source": ("document", "dialogue"), "target": ("summary",)}),
    Convention(("seq2seq",), {"source": ("article",), "target": ("highlights", "summary")}),
    Convention(("image_classification",), {"image": IMAGES, "label": LABEL}),
    Convention(LABELLED, {"text": TEXT, "label": LABEL}),
    *(
        Convention(LABELLED, {"text": (first,), "text_pair": (second,), "label": (*LABEL, *own)})
        for (first, second), own in PAIRS
    ),
)
# Columns that say nothing of a text alone beside them: numbers of rows, as programs write them, and where a text is from.
BESIDE = re.compile(r"|id|idx|index|url|title|date|timestamp|meta|metadata|Unnamed: ?\d+|__index_level_\d+__|_c0", re.I)
TEXT_ALONE = Convention(("causal_lm", "masked_lm"), {"text": ("text",)})


def guess_task(
    columns: Sequence[str],
    rows: Iterable[Row],
    text_column: str = "text",
    label_column: str = "label",
    text_pair_column: str | None = None,
) -> tuple[str, dict[str, str]]:
    """The task that rows are laid out for.

    Args:
        columns: the columns' names.
        rows: where labels decide, the first of these rows are looked at: lists mean several labels, numbers with a
            fraction are predicted as numbers, words and few whole numbers are classes.
        text_column: what the user calls the column ``text``.
        label_column: what the user calls the column ``label``.
        text_pair_column: what the user calls a second text that is read with the first.

    Returns:
        The task's name and its columns by role, for example ``("causal_lm", {"prompt": "prompt", "completion": "completion"})``.
        A text column alone is taken for causal language modelling.

    Raises:
        InputError: no layout fits, or several do, or labels that could be classes as well as numbers.
    """
    rows = list(itertools.islice(rows, LOOKED_AT))
    fitting = [
        (convention, chosen)
        for convention in _named(text_column, label_column, text_pair_column)
        if (chosen := convention.columns(columns)) is not None and _is_meant(chosen, columns, rows)
    ]
    wider = [
        (convention, chosen)
        for convention, chosen in fitting
        if not any(set(chosen.values()) < set(other.values()) for _, other in fitting)
    ]
    if len(wider) > 1:
        tasks = " or ".join(dict.fromkeys(convention.tasks[0] for convention, _ in wider))
        raise InputError(f"The columns {_shown(columns)} could be for {tasks}; say which with --task.")
    if wider:
        convention, chosen = wider[0]
        return task_of_labels(rows, chosen["label"]) if convention.tasks == LABELLED else convention.tasks[0], chosen
    text = _called([text_column], columns)
    if text is not None and label_column in LABEL and all(name == text or BESIDE.fullmatch(name) for name in columns):
        return TEXT_ALONE.tasks[0], {"text": text}
    if any(len(name.split()) > 3 or any(row.values.get(name) == name for row in rows) for name in columns):
        raise InputError(
            f"The columns {_shown(columns)} look like data; put a line above them that names the columns (text,label)."
        )
    raise InputError(_no_layout(columns, rows, text_column, label_column))


def _no_layout(columns: Sequence[str], rows: Sequence[Row], text_column: str, label_column: str) -> str:
    """The message for columns that no task fits, with the flags that name what they seem to be."""
    subject = f"The columns {_shown(columns)} are" if len(columns) != 1 else f"The column {columns[0]!r} is"
    marked = next((name for name in columns if name.casefold() in MARKED_PARTS), "")
    if marked:
        return (
            f"{subject} of no layout that is known: parts of a text by their places ({marked!r}) are not read. For "
            "token_classification give each row its words (tokens) and a tag for each (ner_tags)."
        )
    if columns in (["image"], ["image", "image_id"]):
        return (
            f"{subject} without a label: put the images of each label into a folder of its own, two labels at least, or write a "
            "metadata.csv with the columns file_name and label beside them."
        )
    text = _called(TEXT if text_column == "text" else [text_column], columns)
    if flags := _flags(columns, rows, text if text_column == "text" else text_column, label_column):
        return f"{subject} of no layout that is known. If they are a text and its label, pass {flags}."
    if text is not None and label_column in LABEL:
        return (
            f"{subject} of no layout that is known, because {text!r} has no label beside it (text, label). "
            "Name the label with --label_column, or pass --task causal_lm to learn to write the texts."
        )
    known = (*CONVENTIONS[: 1 - len(PAIRS)], TEXT_ALONE)
    layouts = "; ".join(str(dataclasses.replace(convention, optional={})) for convention in known)
    return f"{subject} of no layout that is known ({layouts}). Name yours with --text_column and --label_column, or rename them."


def _flags(columns: Sequence[str], rows: Sequence[Row], text: str | None, label_column: str) -> str:
    """The flags for columns of which one or two certainly hold texts, and one labels; else ""."""
    free = [name for name in columns if not BESIDE.fullmatch(name) and name != text]
    values = {name: [row.values.get(name) for row in rows if row.values.get(name) not in (None, "")] for name in free}
    words = {name: [len(one.split()) for one in own if isinstance(one, str)] for name, own in values.items()}
    texts = [name for name in free if values[name] and sum(words[name]) >= 3 * len(values[name])]
    labels = [
        name
        for name in free
        if name not in texts
        and 1 < len({str(one) for one in values[name]}) <= max(2, min(CLASSES, len(rows) // REPEATS))
    ]
    likely = [name for name in labels if name.casefold() in LIKELY_LABELS] or labels
    found = [name for name in (text, *texts) if name is not None]
    if label_column not in LABEL or not 1 <= len(found) <= 2 or len(likely) != 1 or (text and text not in columns):
        return ""
    given = [] if found[0] in TEXT else ["--text_column", found[0]]
    pair = ["--text_pair_column", found[1]] if len(found) == 2 else []
    return shlex.join([*given, *pair, "--label_column", likely[0]])


def columns_of(
    task: str,
    columns: Sequence[str],
    text_column: str = "text",
    label_column: str = "label",
    text_pair_column: str | None = None,
) -> dict[str, str]:
    """The columns of a known task by role, for example {"text": "text", "label": "label"}.

    Raises:
        InputError: a layout that the task does not know; the message has the columns found and those that it knows.
    """
    text_alone = dataclasses.replace(TEXT_ALONE, roles={"text": (text_column,)})
    mine = [c for c in (*_named(text_column, label_column, text_pair_column), text_alone) if task in c.tasks]
    fitting = [chosen for convention in mine if (chosen := convention.columns(columns)) is not None]
    if fitting:
        return max(fitting, key=len)
    known = " or ".join(map(str, mine if task not in LABELLED else mine[:2]))
    named = " and ".join(f"--{role}_column" for role in ("text", "label") if any(role in c.roles for c in mine))
    raise InputError(
        f"{task} cannot use the columns {_shown(columns)}; it wants {known}. "
        f"{'Rename them' if not named else f'Rename them, or name them with {named}'}."
    )


def label_columns(
    columns: Sequence[str], rows: Iterable[Row], text_column: str = "text", label_column: str = "label"
) -> tuple[str, list[str]] | None:
    """The text's column and those of its labels, where each label has a column of 0 and 1.

    They are told by commas in ``label_column``. Without, they are recognised where nothing else can be meant: two columns
    or more that hold 0 and 1 alone, and beside them the text and what programs add to tables.
    """
    if "," in label_column and label_column not in columns:
        return text_column, [name for part in label_column.split(",") if (name := part.strip())]
    if label_column not in LABEL or _called(LABEL, columns):
        return None
    rows = list(itertools.islice(rows, LOOKED_AT))
    rest = [name for name in columns if not BESIDE.fullmatch(name)]
    switches = [name for name in rest if rows and all(switch_of(row.values.get(name)) is not None for row in rows)]
    texts = [name for name in rest if name not in switches]
    if len(switches) < 2 or len(texts) != 1 or text_column not in ("text", texts[0]):
        return None
    return (texts[0], switches) if all(isinstance(row.values.get(texts[0]), str) for row in rows) else None


def aligned(rows: Rows, wanted: Iterable[str]) -> Rows:
    """The rows with these columns also where they differ in case or in space around their names."""
    names = {found: name for name in wanted if name not in rows.columns and (found := _called([name], rows.columns))}
    if not names:
        return rows
    renamed = rows.mapped(lambda values: {names.get(name, name): value for name, value in values.items()})
    renamed.columns = [names.get(name, name) for name in rows.columns]
    return renamed


def require_columns(rows: Rows | StreamedRows, wanted: Mapping[str, str]) -> None:
    """Raise InputError unless the rows have these columns, each once.

    Args:
        wanted: column name -> the flag that would name another one ("--text_column"), or "" where there is none.
    """
    place = rows.source if rows.header_line is None else f"{rows.source} line {rows.header_line}"
    for name, option in wanted.items():
        if name not in rows.columns:
            mend = other_separator(rows.columns)
            if not mend:
                close = nearest(name, rows.columns)
                mend = f"Name the right one with {option}" if option else "Rename the right one"
                mend += f"; {close}" if close.startswith("did") else "."
            raise InputError(f"{place} has no column {name!r}, only {_shown(rows.columns)}. {mend}")
        if name in rows.repeated:
            raise InputError(f"{place} names the column {name!r} twice; rename one of the two.")


def other_separator(columns: Sequence[str]) -> str:
    """The mend for a file that has one column because its separator is not the one that its suffix implies; else ""."""
    only = columns[0] if len(columns) == 1 else ""
    other = next((mark for mark in ";\t," if mark in only), None)
    return f"Its separator seems to be {other!r}: save it with commas (.csv) or tabs (.tsv)." if other else ""


def note_left_out(rows: Rows | StreamedRows, used: Collection[str]) -> None:
    """Name the columns that the task does not use."""
    unused = [name or "an unnamed one" for name in rows.columns if name not in used]
    if unused:
        note(f"{Path(rows.source).name}: not used: {'columns' if len(unused) > 1 else 'column'} {_shown(unused)}.")


def _shown(columns: Sequence[str]) -> str:
    return (", ".join(map(repr, columns[:12])) or "none") + (", …" if len(columns) > 12 else "")


def _named(text_column: str, label_column: str, text_pair_column: str | None) -> list[Convention]:
    """The conventions with the user's names for texts and label in place of the usual ones."""
    named: list[Convention] = []
    for convention in CONVENTIONS:
        roles = dict(convention.roles)
        if "text_pair" in roles:
            if text_pair_column is not None:
                roles |= {"text": TEXT if text_column == "text" else (text_column,), "text_pair": (text_pair_column,)}
            elif text_column != "text" and not _called(roles["text"], [text_column]):
                continue
        elif "text" in roles and text_column != "text":
            roles["text"] = (text_column,)
        if "label" in roles and label_column != "label":
            roles["label"] = (label_column,)
        if roles not in [other.roles for other in named]:
            named.append(dataclasses.replace(convention, roles=roles))
    return named


def _is_meant(chosen: Mapping[str, str], columns: Sequence[str], rows: Iterable[Row]) -> bool:
    """Whether names that serve several purposes mean this one: an answer is a label only where it is yes or no, a query with its
    response is to be learned only where no label says something else of the two, and an answer to a question only where nothing
    else stands beside them (choices, say)."""
    if chosen.get("label") == "answer":
        return all(switch_of(row.values.get("answer")) is not None for row in rows)
    if "image" in chosen and chosen["image"].casefold() != "image":  # names that other files have too
        paths = [row.values.get(chosen["image"]) for row in rows]
        return bool(paths) and all(
            isinstance(path, str) and IMAGE_FILE.fullmatch(path.strip()) for path in paths if path
        )
    if chosen.get("instruction") == "question" or chosen.get("output") == "answer":
        return all(name in chosen.values() or BESIDE.fullmatch(name) for name in columns)
    return chosen.get("instruction") != "query" or _called(LABEL, columns) is None
