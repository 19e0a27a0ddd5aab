"""Splitting rows in two parts: copies of a text stay together, and classes keep their proportions."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence

from reltune.data.labels import NUMBER
from reltune.data.rows import Row, Rows
from reltune.errors import InputError, nearest

HELD_OUT = 0.15  # share of the data split off for each of validation and test, where there is none


def same(text: str) -> str:
    """The text with single spaces: the same for two copies that differ in whitespace only."""
    return " ".join(text.split())


def split_off(
    rows: Rows,
    fraction: float,
    seed: int,
    content: Callable[[Row], str],
    label: Callable[[Row], str] | None = None,
    labels_of: Callable[[Row], Iterable[str]] | None = None,
) -> tuple[Rows, Rows]:
    """Split rows into (rest, part). The part has about ``fraction`` of the different contents.

    Rows with the same content (whitespace aside) stay on one side. Both sides keep the order of ``rows``, and equal seeds
    give equal splits. With ``label``, classes keep their proportions: a class with one content stays in the rest. If the
    part is smaller than the number of classes, it is drawn without regard to them. ``labels_of`` gives all labels of a row
    (by default the one): contents whose labels the rest would lack stay there.
    """
    if not 0 < fraction < 1:
        raise InputError(f"The fraction to split off is {fraction}; it must lie between 0 and 1.")
    keys = []
    labels: dict[str, str] = {}
    every: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        keys.append(same(content(row)))
        labels.setdefault(keys[-1], label(row) if label else "")
        every[keys[-1]].update(labels_of(row) if labels_of else [labels[keys[-1]]])
    contents_per_class = Counter(labels.values())
    contents = [key for key, name in labels.items() if contents_per_class[name] > 1]
    size = max(1, round(fraction * len(labels)))
    if size >= len(contents):
        raise InputError(
            f"{rows.source}: {_few(labels, len(contents))} too few to split off {fraction:.0%}; add rows or name a validation "
            "file and a test file."
        )
    classes = [labels[key] for key in contents]
    enough = min(size, len(contents) - size) >= len(set(classes))
    from sklearn.model_selection import train_test_split  # takes a second, which not everybody has to wait for

    _, chosen = train_test_split(contents, test_size=size, random_state=seed, stratify=classes if enough else None)
    part = set(chosen)
    left = {name for key, names in every.items() if key not in part for name in names}
    for key in chosen:
        if not every[key] <= left:
            left |= every[key]
            part.remove(key)
    if not part:
        raise InputError(
            f"{rows.source}: nothing can be split off, because nearly every text has a label that no other has; name a validation "
            "file and a test file."
        )
    sides: tuple[list[int], list[int]] = ([], [])
    for index, key in enumerate(keys):
        sides[key in part].append(index)
    rest, held = rows.select(sides[0]), rows.select(sides[1])
    held.skipped = {}  # they stay on the record of the rest
    return rest, held


def _few(labels: Mapping[str, str], usable: int) -> str:
    """How many contents there are, in words, given the label of each and the number of those whose label is not theirs alone."""
    count, alone = len(labels), len(labels) - usable
    words = "1 different text is" if count == 1 else f"{count} different texts are"
    if not alone or len(set(labels.values())) == 1:
        return words
    numbers = all(NUMBER.fullmatch(name) for name in labels.values())
    hint = " (are the labels quantities? pass --task regression)" if numbers else ""
    hint = hint or (" (is that the column of labels? --label_column names it)" if alone == count else "")
    return f"{count} different texts, {alone} of which are the only one of their label{hint}, are"


def check_splits(
    train: Sequence[Row], validation: Sequence[Row], test: Sequence[Row], label: Callable[[Row], str] | None = None
) -> None:
    """Raise InputError unless every split has rows and, with ``label``, training has two classes and knows all labels."""
    splits = {"training": train, "validation": validation, "test": test}
    for split, rows in splits.items():
        if not rows:
            raise InputError(f"The {split} split has no rows; add rows to it.")
    if label is None:
        return
    known = {label(row) for row in train}
    if len(known) == 1:
        raise InputError(
            f"All {len(train)} training rows have the label {label(train[0])!r}; "
            "a classifier needs at least two classes, so check the label column."
        )
    for split, rows in splits.items():
        unseen = next((row for row in rows if label(row) not in known), None)
        if unseen:
            raise InputError(
                f"The label {label(unseen)!r} in the {split} split (line {unseen.line}) does not occur "
                f"in training; {nearest(label(unseen), sorted(known))} "
                "Correct it, or add training rows with it."
            )
