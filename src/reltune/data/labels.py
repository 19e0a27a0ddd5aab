"""What the labels of a column are for, and their values as a task wants them: a class, several, or a number."""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from reltune.data.cells import Unreadable, looks_structured, structure_in
from reltune.data.rows import Row
from reltune.data.tagged_words import entity_tags
from reltune.errors import InputError
from reltune.notes import note

MULTILABEL = "multilabel_classification"
LABELLED = (
    "sequence_classification",
    "multilabel_classification",
    "regression",
)  # tasks that the labels decide between
CLASSES = 20  # integers of more values than this are classes only where they repeat
REPEATS = 5  # rows per value, on average
MANY = 10  # integers of more values than this may be quantities
SEPARATORS = ("|", ",", ";")  # between the labels of one text, the usual one first

NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?")
WHOLE = re.compile(r"([+-]?\d+)(\.0*)?")
WITH_COMMA = re.compile(r"[+-]?\d+,\d+")
THOUSANDS = re.compile(r"[+-]?[1-9]\d{0,2},\d{3}")
MISSING = (
    "nan",
    "none",
    "null",
    "n/a",
    "<na>",
    "#n/a",
    "#name?",
    "#ref!",
    "#value!",
)  # what programs write in place of a value
MARKS_OF_NONE = frozenset(
    (*MISSING, "-1", "?", "-", "unlabeled", "unlabelled")
)  # what stands for no label in data sets
SIGN = re.compile(r"(?P<before>[$€£¥₹]?) ?(?P<number>[+-]?\d[\d.,]*) ?(?P<behind>[%$€£¥₹]?)")  # of money, and percent
DATE = re.compile(r"\d{4}[-/.]\d{1,2}[-/.]\d{1,2}([T ].*)?|\d{1,2}[-/.]\d{1,2}[-/.]\d{4}")
GROUPED = re.compile(r"[+-]?[1-9]\d{0,2}(?:,\d{3})+\.\d+|[+-]?[1-9]\d{0,2}(?:,\d{3}){2,}")  # 1,234.50 and 1,234,567
GROUPED_BY_POINTS = re.compile(r"[+-]?[1-9]\d{0,2}(?:\.\d{3})+,\d+|[+-]?[1-9]\d{0,2}(?:\.\d{3}){2,}")
SWITCHES = re.compile(r"[01](?:(?P<mark>[ ,;|])[01])(?:(?P=mark)[01])*")
DIGITS = re.compile(r"[01]{3,}")
MINUS = "\N{MINUS SIGN}"
AROUND = f"0123456789.,+-{MINUS} "  # what is left of a number without them is its sign
TYPOGRAPHIC = "“”„‟«»‘’"
TRUTH = {"true": "True", "false": "False"}


# -- which task -----------------------------------------------------------------------------------------------------


def task_of_labels(rows: Iterable[Row], column: str) -> str:
    """Which of LABELLED the labels are made for; empty ones say nothing.

    Raises:
        InputError: labels that could be for several of them, or are for none.
    """
    filled = [
        (row.line, label)
        for row in rows
        if not is_empty(label := _parsed(row.values.get(column))) and not isinstance(label, Unreadable)
    ]
    if any(isinstance(label, list | Mapping) for _, label in filled):  # other texts in brackets are bad rows
        filled = [(line, label) for line, label in filled if not (isinstance(label, str) and looks_structured(label))]
    labels = [label for _, label in filled]
    if any(isinstance(label, list | Mapping) for label in labels):
        _check_lists(labels, column)
        return "multilabel_classification"
    texts = [label.strip() for label in labels if isinstance(label, str)]
    if len(texts) == len(labels):
        if _switches_in(texts):
            return "multilabel_classification"
        _check_texts(texts, column)
    if several := next((text for text in texts if "|" in text.strip("|")), None):
        note(f"Labels such as {several!r} in {column!r} are read as several labels of one text.")
        return "multilabel_classification"
    _check_commas(texts, len(labels), column)
    numbers = [_number(label) for label in labels]
    fractional = any(number != int(number) for number in numbers if number is not None)
    words = [(line, label) for (line, label), number in zip(filled, numbers, strict=True) if number is None]
    if words and fractional:  # scores with a slip of the pen, or version numbers among other names
        raise InputError(
            f"The labels in {column!r} are fractions and other things, such as {words[0][1]!r} on line {words[0][0]}; say with "
            "--task regression that they are numbers (rows with others are then bad rows), or with --task sequence_classification "
            "that they are classes."
        )
    if not labels or words:
        return "sequence_classification"
    if fractional:
        return "regression"
    values = set(numbers)
    with_point = any(isinstance(label, float) or (isinstance(label, str) and "." in label) for label in labels)
    if (with_point and not values <= {0, 1}) or (len(values) > CLASSES and len(numbers) < REPEATS * len(values)):
        raise InputError(
            f"The labels in {column!r} are whole numbers, {len(values)} different ones in {len(numbers)} rows, and could be "
            "classes or quantities; say which with --task sequence_classification or --task regression."
        )
    return "sequence_classification"


def _parsed(label: Any) -> Any:
    """A label with a list or object in place of the text that spells it."""
    structure = structure_in(label) if isinstance(label, str) else None
    return label if structure is None else structure


def is_empty(label: Any) -> bool:
    """Whether there is no label: nothing, an empty text, NaN."""
    return label is None or (isinstance(label, str) and not label.strip()) or label != label


def mark_of_none(label: Any) -> str | None:
    """The mark of ``MARKS_OF_NONE`` that a label is, or that all of a list are; None for others."""
    if isinstance(label, list):
        marks = set(map(mark_of_none, label))
        return marks.pop() if len(marks) == 1 else None
    if is_empty(label):
        return None
    text = str(label).strip().lower()
    text = "-1" if text == "-1.0" else text
    return text if text in MARKS_OF_NONE else None


def _check_texts(texts: Sequence[str], column: str) -> None:
    """Raise InputError for texts that are quantities, tags of words, or zeros and ones that could be several labels."""
    either = "say with --task sequence_classification that they are classes"
    if len(set(texts)) > 2 and all(_quantity(text) is not None for text in texts):
        raise InputError(
            f"Labels such as {texts[0]!r} in {column!r} could be classes or quantities; say which with "
            "--task sequence_classification or --task regression."
        )
    if len(set(texts)) > 2 and all(DATE.fullmatch(text) for text in texts):
        raise InputError(
            f"Labels such as {texts[0]!r} in {column!r} are dates; {either}, or name another --label_column."
        )
    digits = all(DIGITS.fullmatch(text) for text in texts) and len({len(text) for text in texts}) == 1
    if digits and len(set(texts)) > 2 and any(text.startswith("0") for text in texts):
        raise InputError(
            f"Labels such as {texts[0]!r} in {column!r} could be classes or a zero or one for each of several labels; {either}, or "
            f"write lists: [{', '.join(texts[0])}]."
        )
    _check_tags([text.split() for text in texts], column)


def _check_tags(labels: Sequence[Sequence[Any]], column: str) -> None:
    """Raise InputError where the parts of labels are tags of words, O among them."""
    parts = {part for label in labels for part in label}
    strings = all(isinstance(part, str) for part in parts)
    if strings and "O" in parts and any(len(label) > 1 for label in labels) and entity_tags(parts):
        raise InputError(
            f"The labels in {column!r} are tags of words, such as {max(parts - {'O'})!r}; for token_classification call the column "
            "ner_tags, and give the words in a column tokens (a list, or a text with spaces between)."
        )


def _quantity(text: str) -> str | None:
    """The plain number in a text with a sign of money or percent, or with marks between thousands; None for other texts."""
    sign = SIGN.fullmatch(text.replace(MINUS, "-"))
    if sign is None or (sign["before"] and sign["behind"]):
        return None
    number = sign["number"]
    if GROUPED.fullmatch(number):
        return number.replace(",", "")
    if GROUPED_BY_POINTS.fullmatch(number):
        return number.replace(".", "").replace(",", ".")
    return number if number != text and NUMBER.fullmatch(number) else None


def _switches_in(texts: Sequence[str]) -> int:
    """The number of labels if all texts are a zero or one for each, with marks between (``0 1 0``); else 0.

    Names of labels do not come twice in a text, so that one text at least must have a zero or a one twice.
    """
    found = [SWITCHES.fullmatch(text) for text in texts]
    lengths, marks = {len(text) for text in texts}, {match and match["mark"] for match in found}
    if not texts or not all(found) or len(lengths) != 1 or len(marks) != 1:
        return 0
    parts = [text[::2] for text in texts]
    if lengths == {3} and marks == {","}:  # 1,0 may be a number
        return 0
    return len(parts[0]) if any(len(set(one)) < len(one) for one in parts) else 0


def _check_lists(labels: Sequence[Any], column: str) -> None:
    """Raise InputError unless all labels are lists of classes, or lists or objects of 0 and 1."""
    if _places(labels) or all(_is_switches(label) for label in labels):
        return
    elements = [one for label in labels if isinstance(label, list) for one in label]
    if any(isinstance(one, list | tuple | Mapping) for one in elements):
        raise InputError(
            f"The labels in {column!r} are lists of lists or of objects, as annotation programs mark parts of a text; for "
            "token_classification give each row its words (tokens) and a tag for each (ner_tags)."
        )
    _check_tags([label for label in labels if isinstance(label, list)], column)
    if any(isinstance(label, Mapping) for label in labels):
        raise InputError(
            f"The labels in {column!r} are objects; multilabel_classification wants a list of classes in every row, or an object "
            "of 0 and 1 (for one class per text write its name alone)."
        )
    if any(isinstance(label, Mapping | str | int | float) for label in labels) or any(
        isinstance(one, float) for one in elements
    ):
        raise InputError(
            f"The labels in {column!r} are lists with numbers, or lists and other things; multilabel_classification wants "
            "a list of classes in every row."
        )
    if all(len(label) == 1 for label in labels):
        note(
            f"Each row has exactly one label in {column!r}, in a list: read as multilabel_classification; for one class per "
            "text pass --task sequence_classification."
        )


def _places(labels: Sequence[Any]) -> int:
    """The length of the lists, or of most, if they are all lists of 0 and 1, a place for each label; else 0."""
    lists = [label for label in labels if isinstance(label, list)]
    if len(lists) < len(labels) or not all(_is_switch(one) for label in lists for one in label):
        return 0
    lengths = Counter(map(len, lists))
    length = max(lengths, key=lambda one: lengths[one], default=0)
    # of several lengths only where names would come twice: then the lists of other lengths are bad rows
    twice = len(lengths) > 1 and any(len(set(label)) < len(label) for label in lists)
    return length if length > 1 and (len(lengths) == 1 or twice) else 0


def _is_switch(value: Any) -> bool:
    return isinstance(value, bool | int | float) and value in (0, 1)


def _is_switches(label: Any) -> bool:
    return isinstance(label, Mapping) and bool(label) and all(map(_is_switch, label.values()))


def _check_commas(texts: Sequence[str], count: int, column: str) -> None:
    """Raise InputError for labels with commas between digits, or between words that are labels themselves."""
    with_comma = [text for text in texts if WITH_COMMA.fullmatch(text)]
    if with_comma and len(with_comma) + sum(bool(NUMBER.fullmatch(text)) for text in texts) == count:
        raise InputError(
            f"Labels such as {with_comma[0]!r} in {column!r} could be numbers with a decimal comma or several labels; say which "
            "with --task regression or --task multilabel_classification."
        )
    for mark in SEPARATORS[1:]:
        parts = {text: _parts(text, mark) for text in set(texts)}
        shared = Counter(part for own in parts.values() for part in set(own))
        several = next(
            (text for text, own in parts.items() if len(own) > 1 and all(shared[part] > 1 for part in own)), ""
        )
        if several:
            raise InputError(
                f"Labels such as {several!r} in {column!r} could be several labels of one text or one class; say which with "
                "--task multilabel_classification or --task sequence_classification."
            )


def _parts(text: str, mark: str) -> list[str]:
    return [part.strip() for part in text.split(mark) if part.strip()]


def _number(label: Any) -> float | None:
    """The number that a label is or spells; None for words and booleans."""
    if isinstance(label, bool):
        return None
    if isinstance(label, int | float):
        return float(label) if abs(label) != float("inf") else None
    text = label.strip().replace(MINUS, "-") if isinstance(label, str) else ""
    return float(text) if NUMBER.fullmatch(text) else None


# -- values ---------------------------------------------------------------------------------------------------------


class ClassNames:
    """One class per row: numbers by value (1, "1", 1.0 and "1.0" are one class), true and false in any case, words as they are.

    Args:
        labels: the first labels, which decide whether all are numbers, or truth values.
        column: where they stand, for messages.
        known: the classes, where training has defined them: they decide then.
    """

    def __init__(self, labels: Sequence[Any], column: str, known: Sequence[str] = ()) -> None:
        texts = [str(one).strip() for one in known or labels if not is_empty(one) and not isinstance(one, list)]
        self.column = column
        self.labels: Sequence[str] = ()
        self.whole = all(WHOLE.fullmatch(text) for text in texts)
        self.truth = all(text.lower() in TRUTH for text in texts)
        self.spellings: dict[str, set[str]] = defaultdict(set)

    def __call__(self, label: Any) -> Any:
        parsed = _parsed(label)
        if isinstance(parsed, list):
            if len(parsed) > 1 or any(isinstance(one, list | Mapping) for one in parsed):
                return Unreadable(f"a {self.column!r} that is a list of several labels")
            return self(parsed[0]) if parsed else None
        if isinstance(label, str) and looks_structured(label):
            return Unreadable(f"a {self.column!r} in brackets that is no list (words in a list stand in quotes)")
        if is_empty(label) or not isinstance(label, str | int | float) or label in (float("inf"), -float("inf")):
            return None if is_empty(label) else label
        spelling = name = str(label).strip()
        number = WHOLE.fullmatch(name)
        if number and (self.whole or isinstance(label, float)):
            name = number.group(1)
        elif self.truth:
            name = TRUTH.get(name.lower(), name)
        elif isinstance(label, float):
            return label  # a fraction, which is no class
        self.spellings[name].add(spelling)
        return name

    def note_spellings(self) -> None:
        """Say which labels are one class in several spellings."""
        found = [(name, spellings) for name, spellings in self.spellings.items() if len(spellings) > 1]
        if found:
            name, spellings = found[0]
            shown = ", ".join(map(repr, sorted(spellings)))
            more = f"; so are those of {len(found) - 1} more" if len(found) > 1 else ""
            note(f"The labels {shown} in {self.column!r} are read as one class, {name!r}{more}.")


class LabelSets:
    """Any number of labels per row, as a list of their names.

    Read are lists of names, lists of 0 and 1 with a place for each label, objects of 0 and 1, and texts with marks
    between. ``labels`` are the names of all labels where they are known from the form: places, or keys.

    Args:
        labels, column, known: as for ``ClassNames``.
    """

    def __init__(self, labels: Sequence[Any], column: str, known: Sequence[str] = ()) -> None:
        filled = [parsed for label in labels if not is_empty(parsed := _parsed(label))]
        self.column = column
        self.places = _places(filled)
        texts = [label.strip() for label in filled if isinstance(label, str)]
        self.spelled = len(texts) == len(filled) and _switches_in(texts) > 0
        if self.spelled:
            filled = [[int(one) for one in text[::2]] for text in texts]
            self.places, texts = len(filled[0]), []
        if known and set(known) != {str(place) for place in range(self.places)}:
            self.places = 0
        self.labels: Sequence[str] = [str(place) for place in range(self.places)]
        if filled and all(map(_is_switches, filled)):
            self.labels = list(dict.fromkeys(str(name) for label in filled for name in label))
        marks = [mark for mark in SEPARATORS if any(mark in text for text in texts)]
        if known:
            marks = [
                mark
                for mark in marks
                if any(len(own) > 1 and {*own} <= {*known} for own in (_parts(text, mark) for text in texts))
            ]
        self.mark = next(iter(marks), SEPARATORS[0])
        if self.places and not known:
            alone = all(sum(label) == 1 for label in filled)
            note(
                f"The lists of {self.places} zeros and ones in {column!r} are read as {self.places} labels, a place for each"
                + ("; each row has exactly one." if alone else ".")
            )
        if self.mark != SEPARATORS[0] and not known:
            example = next(text for text in texts if self.mark in text)
            note(f"Labels such as {example!r} in {column!r} are read as several, with {self.mark!r} between them.")

    def __call__(self, label: Any) -> Any:
        if label is None or label != label:
            return None
        if isinstance(label, str) and self.spelled and SWITCHES.fullmatch(label.strip()):
            label = [int(one) for one in label.strip()[::2]]
        if isinstance(label, str) and not looks_structured(label):
            if self.places:
                return Unreadable(f"a {self.column!r} that is no list of {self.places} zeros and ones")
            return _parts(label, self.mark)
        label = _parsed(label) if isinstance(label, str) else label
        if self.places:
            if not isinstance(label, list) or len(label) != self.places or not all(map(_is_switch, label)):
                return Unreadable(f"a {self.column!r} that is no list of {self.places} zeros and ones")
            return [str(place) for place, switch in enumerate(label) if switch]
        if _is_switches(label):
            return [str(name) for name, switch in label.items() if switch]
        if isinstance(label, str):
            return Unreadable(f"a {self.column!r} in brackets that is no list (words in a list stand in quotes)")
        if isinstance(label, list):
            return [int(one) if isinstance(one, float) and one == one and one == int(one) else one for one in label]
        return label


class Numbers:
    """One number per row; texts may have a decimal comma where training's have one, marks between thousands where there is no
    other way to read them, and one sign of money or percent that all have.

    Raises:
        InputError: "1,000" could be a thousand or one.
    """

    def __init__(self, labels: Sequence[Any], column: str, known: Sequence[str] = ()) -> None:
        self.labels: Sequence[str] = ()
        texts = [label.strip() for label in labels if isinstance(label, str) and WITH_COMMA.fullmatch(label.strip())]
        # beside points, a comma stands between thousands or is a slip
        self.comma = bool(texts) and not any(isinstance(label, float) or "." in str(label) for label in labels)
        if self.comma and all(THOUSANDS.fullmatch(text) for text in texts):
            raise InputError(
                f"Labels such as {texts[0]!r} in {column!r} could have a decimal comma or a comma between thousands; write them "
                "with a decimal point or none."
            )
        if self.comma:
            note(f"Labels such as {texts[0]!r} in {column!r} are read as numbers with a decimal comma.")
        spelled = [label.strip() for label in labels if isinstance(label, str) and label.strip()]
        signs = {label.strip(AROUND) for label in spelled}
        self.sign = signs.pop() if len(signs) == 1 else ""
        self.grouped = any(GROUPED.fullmatch(label) for label in spelled)
        if example := next((label for label in spelled if self._plain(label)), ""):
            note(f"Labels such as {example!r} in {column!r} are read as the number {self._plain(example)}.")

    def _plain(self, label: str) -> str | None:
        """The number that a text with signs or marks between thousands means; None for others."""
        if self.grouped and THOUSANDS.fullmatch(label):
            return label.replace(",", "")
        return _quantity(label) if label.strip(AROUND) in ("", self.sign) else None

    def __call__(self, label: Any) -> Any:
        label = _parsed(label)
        if isinstance(label, list) and len(label) == 1:
            label = label[0]
        if isinstance(label, str) and self.comma and WITH_COMMA.fullmatch(label.strip()):
            return label.replace(",", ".")
        if isinstance(label, str) and (plain := self._plain(label.strip())) is not None:
            return plain
        return None if is_empty(label) else label


class LabelColumns:
    """Adds a column with a list of the names of those columns that are 1, of columns of 0 and 1."""

    def __init__(self, names: Sequence[str], column: str) -> None:
        self.names, self.column = names, column

    def __call__(self, values: Mapping[str, Any]) -> dict[str, Any]:
        switches = {name: switch_of(values.get(name)) for name in self.names}
        wrong = next((name for name, switch in switches.items() if switch is None), None)
        if wrong is not None:
            return {**values, self.column: Unreadable(f"a {wrong!r} that is neither 0 nor 1")}
        return {**values, self.column: [name for name, switch in switches.items() if switch]}


def switch_of(value: Any) -> bool | None:
    """Whether a cell of 0 and 1, or of false and true, is on; None for others."""
    if isinstance(value, str):
        text = value.strip().lower()
        return {"0": False, "1": True, "0.0": False, "1.0": True, "false": False, "true": True}.get(text)
    return bool(value) if _is_switch(value) else None


def note_odd_labels(labels: Sequence[str], column: str) -> None:
    """Say which of a task's labels may be none, or the same as another."""
    numbers = all(WHOLE.fullmatch(label) for label in labels)
    none = [label for label in labels if label.lower() in (*MISSING, "-", "?")]
    if numbers and {"-1", "2"} <= set(labels):  # with 0 and 1 alone mostly a class
        none.append("-1")
    if len(none) == 1:
        note(f"The label {none[0]!r} in {column!r} is read as a class; if it marks rows without a label, delete them.")
    elif none:
        shown = ", ".join(map(repr, none))
        note(f"The labels {shown} in {column!r} are read as classes; if they mark rows without a label, delete them.")
    around = [
        label for label in labels if len(label) > 2 and label[0] in f"'{TYPOGRAPHIC}" and label[-1] in f"'{TYPOGRAPHIC}"
    ]
    if quoted := next(iter(around), ""):
        note(f'Labels such as {quoted!r} in {column!r} keep their quotes, which are no marks of CSV; write them as ".')
    alike = defaultdict(list)
    for label in labels:
        shown = "".join(one for one in unicodedata.normalize("NFKC", label) if unicodedata.category(one) != "Cf")
        alike[" ".join(shown.strip(f"\"'{TYPOGRAPHIC}").lower().split())].append(label)
    if groups := [names for names in alike.values() if len(names) > 1]:
        names = groups[0]
        look = repr if len({unicodedata.normalize("NFC", name) for name in names}) == len(names) else ascii
        shown = " and ".join(map(look, sorted(names)))
        more = f"; so are {len(groups) - 1} more such groups" if len(groups) > 1 else ""
        note(f"The labels {shown} in {column!r} are different ones, although they look alike{more}.")


def note_one_class(split: str, labels: Iterable[str]) -> None:
    """Say that all rows of a split that is held out have one label, as tests have whose labels are kept back."""
    found = Counter(labels)
    if len(found) == 1 and found.total() > 1:
        note(
            f"All {found.total()} rows of the {split} split have the label {next(iter(found))!r}; if its labels are not real, leave the "
            "file out: then a part of the training data is split off."
        )


def note_rare_classes(counts: Mapping[str, int], source: str, guessed: bool) -> None:
    """Say how many classes were made of the labels, where there may be too many.

    Args:
        counts: class -> rows of training.
        guessed: whether the user did not say that they are classes.
    """
    alone = [name for name, count in counts.items() if count == 1]
    numbers = all(NUMBER.fullmatch(name) for name in counts)
    # whole numbers that the user calls classes may well be some, as long as they come again
    quantities = numbers and (guessed or "." in "".join(counts) or 2 * len(alone) > len(counts))
    if not alone and not (quantities and len(counts) > MANY):
        return
    said = f"{Path(source).name}: {len(counts)} classes"
    if alone:
        often = [name for name, count in counts.items() if count > 1]
        named = ", ".join(_with_likeness(name, often) for name in sorted(alone)[:3]) + (", …" if len(alone) > 3 else "")
        said += f", of which {len(alone)} {'has' if len(alone) == 1 else 'have'} one example ({named})"
    if quantities:
        said += "; if the labels are quantities, pass --task regression"
    elif all(DATE.fullmatch(name) for name in counts):
        said += "; the labels are dates: is another column meant (--label_column)?"
    elif 2 * len(alone) > sum(counts.values()):
        said += "; most rows have a class of their own: is another column meant (--label_column)?"
    note(said if said.endswith("?") else f"{said}.")


def _with_likeness(name: str, others: Sequence[str]) -> str:
    """A class in quotes, and the class of ``others`` that it may be a typing error of. Names with digits differ in little by right."""
    plain = {other.strip().lower(): other for other in others}
    close = difflib.get_close_matches(name.strip().lower(), plain, 1, cutoff=0.88) if not re.search(r"\d", name) else []
    return f"{name!r}, meant to be {plain[close[0]]!r}?" if close else repr(name)


READERS = {
    "sequence_classification": ClassNames,
    "image_classification": ClassNames,
    "multilabel_classification": LabelSets,
    "regression": Numbers,
}
