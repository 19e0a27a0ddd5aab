"""What a run makes of data as people have them: the task, the values that reach it, and what is said of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import datasets
import pytest

from reltune.config.run_config import RunConfig
from reltune.errors import InputError
from reltune.notes import collecting
from reltune.runs.bad_rows import bad_rows
from reltune.runs.splits import Splits, read_data, read_held_out
from reltune.tasks.task import Task

TEXTS = [f"text {number}" for number in range(20)]
HI, YES = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


class Read:
    """A file of rows as a run reads it."""

    def __init__(self, path: Path, **fields: Any) -> None:
        with collecting() as self.notes:
            self.task: Task
            self.task, self.splits = read_data(RunConfig("model", "run", train_file=str(path), **fields))

    splits: Splits

    @property
    def values(self) -> list[dict[str, Any]]:
        """The values by role of all rows, in the order of the file."""
        rows = [*self.splits.train, *self.splits.validation, *self.splits.test]
        return [
            {role: row.values.get(column) for role, column in self.task.columns.items()}
            for row in sorted(rows, key=lambda row: row.line)
        ]


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def jsonl(tmp_path: Path) -> Callable[..., Path]:
    """Writes a row for each text."""

    def write(row: Callable[[int, str], Mapping[str, Any]], name: str = "data.jsonl") -> Path:
        return write_jsonl(tmp_path / name, [row(number, text) for number, text in enumerate(TEXTS)])

    return write


@pytest.fixture
def csv(tmp_path: Path) -> Callable[..., Path]:
    """Writes a header and a line for each text."""

    def write(header: str, line: Callable[[int, str], str], name: str = "data.csv") -> Path:
        path = tmp_path / name
        path.write_text("\n".join([header, *(line(number, text) for number, text in enumerate(TEXTS))]) + "\n")
        return path

    return write


Jsonl = Csv = Callable[..., Path]

# -- lists written as text ------------------------------------------------------------------------------------------


def test_zeros_and_ones_are_labels_by_place(jsonl: Jsonl) -> None:
    read = Read(jsonl(lambda number, text: {"text": text, "label": [number % 2, number // 2 % 2, 0]}))
    assert (read.task.name, read.task.labels) == ("multilabel_classification", ["0", "1", "2"])  # type: ignore[attr-defined]
    assert [row["label"] for row in read.values[:4]] == [[], ["0"], ["1"], ["0", "1"]]
    assert read.notes == [
        "The lists of 3 zeros and ones in 'label' are read as 3 labels, a place for each.",
        "No row of training has the label '2'.",
    ]


@pytest.mark.parametrize("cell", ["['a', 'b']", '["a", "b"]', "['a' 'b']", "a|b"])
def test_lists_in_cells_are_labels(csv: Csv, cell: str) -> None:
    quoted = '"' + cell.replace('"', '""') + '"'
    other = "c" if "|" in cell else "['c']"
    read = Read(csv("text,label", lambda number, text: f"{text},{quoted if number % 2 else other}"))
    assert (read.task.name, read.task.labels) == ("multilabel_classification", ["a", "b", "c"])  # type: ignore[attr-defined]
    assert [row["label"] for row in read.values[:2]] == [["c"], ["a", "b"]]
    assert bool(read.notes) == ("|" in cell)  # said where it is no list


@pytest.mark.parametrize("write", [repr, json.dumps])
def test_lists_in_cells_are_words_and_tags(csv: Csv, write: Callable[[Any], str]) -> None:
    def cell(value: list[str]) -> str:
        return '"' + write(value).replace('"', '""') + '"'

    words = [["Ann", "sings", text] for text in TEXTS]
    read = Read(csv("tokens,ner_tags", lambda number, text: f"{cell(words[number])},['B-PER' 'O' 'O']"))
    assert [row["tokens"] for row in read.values] == words and read.values[0]["tags"] == ["B-PER", "O", "O"]
    path = csv("tokens,ner_tags", lambda number, text: f"{cell(words[number])},{'[O O O]' if number == 3 else 'O O O'}")
    with pytest.raises(InputError, match="a 'ner_tags' that is no list on line 5"):
        Read(path)
    path = csv(
        "tokens,ner_tags", lambda number, text: "\"['Ann', 'sings'\",O O" if number == 3 else f"['{text}'],['O']"
    )
    with pytest.raises(InputError, match="a 'tokens' that is no list on line 5"):
        Read(path)


@pytest.mark.parametrize("seed", range(4))
def test_splits_leave_no_label_out_of_training(jsonl: Jsonl, seed: int) -> None:
    path = jsonl(lambda number, text: {"tokens": [text, "b"], "ner_tags": ["O", f"B-{number}" if number < 8 else "O"]})
    read = Read(path, seed=seed)
    assert len(read.task.labels) == 9  # type: ignore[attr-defined]
    path = jsonl(lambda number, text: {"text": text, "label": ["a", f"b{number}"] if number < 8 else ["a"]})
    assert len(Read(path, seed=seed).task.labels) == 9  # type: ignore[attr-defined]


def test_flags_of_other_tasks_are_refused(csv: Csv) -> None:
    path = csv("text,label", lambda number, text: f"{text},{'ab'[number % 2]}")
    with pytest.raises(
        InputError, match=r"does not use --beta, --packing \(--beta is for preference\); leave them out"
    ):
        Read(path, packing=True, beta=0.3)


def test_conversations_in_cells(csv: Csv) -> None:
    cell = '"' + json.dumps([HI, YES]).replace('"', '""') + '"'
    read = Read(csv("messages,id", lambda number, text: f"{cell.replace('hi', text)},{number}"))
    assert (read.task.name, read.values[5]["messages"]) == ("causal_lm", [{**HI, "content": "text 5"}, YES])


def test_answers_in_cells(csv: Csv) -> None:
    cell = "\"{'text': array(['text'], dtype=object), 'answer_start': array([0])}\""
    read = Read(csv("question,context,answers", lambda number, text: f"what,{text},{cell}"))
    assert read.task.name == "question_answering"
    assert read.values[3]["answers"] == {"text": ["text"], "answer_start": [0]}


def test_answers_as_objects(jsonl: Jsonl) -> None:
    read = Read(
        jsonl(lambda _, text: {"question": "q", "context": text, "answers": [{"text": "text", "answer_start": 0}]})
    )
    assert read.values[3]["answers"] == {"text": ["text"], "answer_start": [0]}


def test_contents_in_parts(jsonl: Jsonl) -> None:
    parts = {"role": "user", "content": [{"type": "text", "text": "hi"}, {"type": "text", "text": " there"}]}
    read = Read(jsonl(lambda _, text: {"messages": [parts, {**YES, "content": text}]}))
    assert read.values[0]["messages"] == [{**HI, "content": "hi there"}, {**YES, "content": "text 0"}]
    image = {"role": "user", "content": [{"type": "image", "url": "x"}]}
    path = jsonl(lambda number, text: {"messages": [image if number == 2 else HI, {**YES, "content": text}]})
    with pytest.raises(InputError, match="'messages' with a message that holds more than text on line 3"):
        Read(path)
    read = Read(path, on_bad_rows="skip")
    assert list(bad_rows(read.splits)["train"]["skipped"]) == ["a 'messages' with a message that holds more than text"]


# -- a column for each label ----------------------------------------------------------------------------------------


def toxic(number: int, text: str) -> str:
    return f"{number:x},{text},{number % 2},{number // 2 % 2},0"


TOXIC = "id,comment_text,toxic,obscene,threat"


def test_columns_of_labels_are_named(csv: Csv) -> None:
    read = Read(csv(TOXIC, toxic), text_column="comment_text", label_column="toxic,obscene")
    assert (read.task.name, read.task.labels) == ("multilabel_classification", ["obscene", "toxic"])  # type: ignore[attr-defined]
    assert [row["label"] for row in read.values[:4]] == [[], ["toxic"], ["obscene"], ["toxic", "obscene"]]
    assert read.notes == ["data.csv: not used: columns 'id', 'threat'."]
    with pytest.raises(InputError, match=r"no column 'obscen',.*--label_column; did you mean 'obscene'"):
        Read(csv(TOXIC, toxic), text_column="comment_text", label_column="toxic,obscen")


def test_columns_of_labels_are_recognised(csv: Csv) -> None:
    read = Read(csv(TOXIC, toxic))
    assert read.task.labels == ["obscene", "threat", "toxic"] and read.values[3]["text"] == "text 3"  # type: ignore[attr-defined]
    assert read.notes == [
        "The columns 'toxic', 'obscene', 'threat' hold 0 and 1 alone: read as 3 labels of 'comment_text'.",
        "data.csv: not used: column 'id'.",
        "No row of training has the label 'threat'.",
    ]
    for row in (lambda number, text: f"{text},{number % 3},1,0", lambda number, text: f"{text},1,0,a"):
        with pytest.raises(InputError, match="of no layout"):
            Read(csv("comment_text,toxic,obscene,threat", row))


def test_columns_of_labels_without_labels(csv: Csv) -> None:
    train = csv(TOXIC, toxic)
    test = csv(TOXIC, lambda number, text: f"{number},other {text},-1,-1,-1", "test.csv")
    read = Read(train, test_file=str(test))
    assert len(read.splits.test) == 3 and "test.csv: no row of the test split has a label" in " ".join(read.notes)
    with pytest.raises(
        InputError, match=r"test\.csv has no column 'toxic', and nothing can be measured without labels"
    ):
        Read(train, test_file=str(csv("id,comment_text", lambda number, text: f"{number},other {text}", "test.csv")))
    mixed = csv(TOXIC, lambda number, text: f"{number},other {text},{-(number % 2)},0,0", "test.csv")
    with pytest.raises(InputError, match="a 'toxic' that is neither 0 nor 1 on 10 lines"):
        Read(train, test_file=str(mixed))


# -- columns that mean something ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "turns",
    [
        [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}],
        [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}],
    ],
)
def test_conversations(jsonl: Jsonl, turns: list[dict[str, str]]) -> None:
    read = Read(jsonl(lambda number, text: {"conversations": [*turns, {**HI, "content": text}, YES], "id": number}))
    assert read.task.name == "causal_lm" and read.values[1] == {"messages": [HI, YES, {**HI, "content": "text 1"}, YES]}
    assert read.notes == ["data.jsonl: not used: column 'id'."]
    system = Read(jsonl(lambda _, text: {"conversations": turns, "system": text, "tools": '[{"name": "f"}]'}))
    assert system.values[1] == {
        "messages": [{"role": "system", "content": "text 1"}, HI, YES],
        "tools": [{"name": "f"}],
    }
    assert system.notes == []


def test_history_and_system(jsonl: Jsonl) -> None:
    row = {"output": "yes", "system": "be kind", "history": [["a", "b"]]}
    read = Read(jsonl(lambda _, text: {"instruction": text, "input": "", **row}))
    roles = ("instruction", "output", "input", "system", "history")
    assert read.notes == [] and tuple(read.task.columns) == roles
    assert read.values[0] == {"instruction": "text 0", "input": "", **row}
    path = jsonl(lambda number, text: {"instruction": text, "output": "yes", "history": None if number else [["a"]]})
    with pytest.raises(InputError, match="a 'history' that is no list of questions and answers on line 1"):
        Read(path)


@pytest.mark.parametrize(("good", "bad"), [(True, False), (1, 0), ("true", "false")])
def test_answers_that_are_marked_as_bad(jsonl: Jsonl, good: Any, bad: Any) -> None:
    path = jsonl(lambda number, text: {"prompt": text, "completion": "yes", "label": bad if number in (3, 5) else good})
    with pytest.raises(InputError, match=r"'completion' that 'label' marks as bad .* on 2 lines \(4, 6\)"):
        Read(path)
    assert len(Read(path, on_bad_rows="skip").values) == 18
    kinds = Read(jsonl(lambda _, text: {"prompt": text, "completion": "yes", "label": "sums"}))
    assert kinds.notes == ["data.jsonl: not used: column 'label'."]


PAIRS = [
    ("sentence1", "sentence2", "label"),
    ("premise", "hypothesis", "label"),
    ("question1", "question2", "is_duplicate"),
    ("text1", "text2", "labels"),
    ("query", "document", "label"),
    ("question", "sentence", "label"),
]


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("columns", PAIRS)
def test_pairs_of_texts(jsonl: Jsonl, columns: tuple[str, str, str], named: bool) -> None:
    first, second, label = columns
    path = jsonl(lambda number, text: {first: text, second: f"{text} b", label: number % 2, "idx": number})
    read = Read(path, **({"text_column": first} if named else {}))
    assert read.task.name == "sequence_classification"
    assert read.values[1] == {"text": "text 1", "text_pair": "text 1 b", "label": "1"}
    assert read.notes == ["data.jsonl: not used: column 'idx'."]


def test_pairs_by_other_names(jsonl: Jsonl) -> None:
    path = jsonl(lambda number, text: {"a": text, "b": f"{text} b", "c": number / 2})
    read = Read(path, text_column="a", text_pair_column="b", label_column="c")
    assert read.task.name == "regression" and read.values[1] == {
        "text": "text 1",
        "text_pair": "text 1 b",
        "label": 0.5,
    }
    read = Read(path, text_column="a", label_column="c")
    assert read.notes == ["data.jsonl: not used: column 'b'."]
    with pytest.raises(InputError, match=r"no column 'd'.*--text_pair_column"):
        Read(path, text_column="a", text_pair_column="d", label_column="c")


def test_questions_of_yes_and_no(jsonl: Jsonl) -> None:
    read = Read(jsonl(lambda number, text: {"question": text, "passage": "p", "answer": number % 2 == 0}))
    assert read.task.labels == ["False", "True"] and read.values[0]["text_pair"] == "p"  # type: ignore[attr-defined]
    with pytest.raises(InputError, match="of no layout"):  # answers in words are no classes
        Read(jsonl(lambda _, text: {"question": text, "passage": "p", "answer": f"because {text}"}))


def test_pairs_of_answers_as_llama_factory_has_them(jsonl: Jsonl) -> None:
    chosen, rejected = {"from": "gpt", "value": "yes"}, {"from": "gpt", "value": "no"}
    asked = [{"from": "human", "value": "hi"}]
    read = Read(
        jsonl(lambda _, text: {"conversations": asked, "chosen": chosen, "rejected": {**rejected, "value": text}})
    )
    assert read.task.name == "preference"
    assert read.values[0] == {"prompt": [HI], "chosen": [YES], "rejected": [{**YES, "content": "text 0"}]}
    read = Read(jsonl(lambda _, text: {"instruction": "do", "input": text, "chosen": "yes", "rejected": "no"}))
    assert read.values[0]["prompt"] == "do\ntext 0" and read.notes == []


def test_annotations_that_were_rejected(jsonl: Jsonl) -> None:
    path = jsonl(
        lambda number, text: {"text": text, "label": "ab"[number % 2], "answer": "accept" if number else "reject"}
    )
    with pytest.raises(InputError, match="an 'answer' other than 'accept' on line 1"):
        Read(path)


# -- labels ---------------------------------------------------------------------------------------------------------


def test_spellings_of_a_label_across_splits(csv: Csv, jsonl: Jsonl) -> None:
    for train, test in ((("1", "0"), (1.0, 0.0)), (("TRUE", "FALSE"), (True, False))):
        held = jsonl(lambda number, text, test=test: {"text": f"held {text}", "label": test[number % 2]}, "test.jsonl")
        path = csv("text,label", lambda number, text, train=train: f"{text},{train[number % 2]}")
        read = Read(path, test_file=str(held))
        assert len(read.splits.test) == 20 and len(read.task.labels) == 2  # type: ignore[attr-defined]
        (note,) = read.notes  # one line, however many classes
        assert "are read as one class" in note and note.endswith("; so are those of 1 more.")


def test_whole_numbers_with_a_point(jsonl: Jsonl) -> None:
    path = jsonl(lambda number, text: {"text": text, "label": number % 3 + 1.0})
    with pytest.raises(InputError, match="--task sequence_classification or --task regression"):
        Read(path)
    assert Read(path, task="sequence_classification").task.labels == ["1", "2", "3"]  # type: ignore[attr-defined]
    assert Read(path, task="regression").values[1]["label"] == 2.0


def test_decimal_commas(csv: Csv) -> None:
    path = csv("text,label", lambda number, text: f'{text},"{number % 4},5"')
    with pytest.raises(InputError, match="'0,5' in 'label' could be numbers with a decimal comma or several labels"):
        Read(path)
    read = Read(path, task="regression")
    assert [float(row["label"]) for row in read.values[:3]] == [0.5, 1.5, 2.5]
    assert read.notes == ["Labels such as '0,5' in 'label' are read as numbers with a decimal comma."]


def test_rare_classes_are_counted(csv: Csv) -> None:
    read = Read(csv("text,label", lambda number, text: f"{text},{number if number < 10 else number % 2}"))
    assert read.notes == [
        "data.csv: 10 classes, of which 8 have one example ('2', '3', '4', …); if the labels are quantities, pass --task regression."
    ]
    with pytest.raises(
        InputError, match=r"only one of their label \(are the labels quantities\? pass --task regression\)"
    ):
        Read(csv("text,label", lambda number, text: f"{text},{number}"))


@pytest.mark.parametrize("nothing", [-1, None])
def test_a_test_split_without_labels(tmp_path: Path, nothing: Any) -> None:
    rows = [{"text": text, "label": number % 2} for number, text in enumerate(TEXTS)]
    unlabelled = [{**row, "label": nothing} for row in rows]
    splits = {"train": datasets.Dataset.from_list(rows), "test": datasets.Dataset.from_list(unlabelled)}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    read = Read(tmp_path / "saved")
    assert (len(read.splits.train), len(read.splits.test)) == (14, 3)
    sentence = "saved: no row of the test split has a label; the split is left out, and a part of the training data takes its place."
    assert read.notes == [sentence]


def test_minus_one_can_be_a_class(jsonl: Jsonl) -> None:
    train = jsonl(lambda number, text: {"text": text, "label": number % 2 * 2 - 1})
    test = jsonl(lambda _, text: {"text": f"held {text}", "label": -1}, "test.jsonl")
    read = Read(train, test_file=str(test))
    assert len(read.splits.test) == 20 and len(read.notes) == 1
    assert "All 20 rows of the test split have the label '-1'" in read.notes[0]


@pytest.mark.parametrize("name", ["Unnamed: 0", "__index_level_0__", ""])
def test_an_index_beside_a_text_alone(csv: Csv, name: str) -> None:
    read = Read(csv(f"{name},text", lambda number, text: f"{number},{text}"))
    assert read.task.name == "causal_lm" and read.values[3] == {"text": "text 3"}
    assert read.notes == [f"data.csv: not used: column {name or 'an unnamed one'!r}."]


def test_streamed_rows_are_read_alike(csv: Csv) -> None:
    path = csv("text,label", lambda number, text: f"{text},{'a|b' if number % 2 else 'c'}")
    held = {"validation_file": str(path), "test_file": str(path), "training": {"max_steps": 1}}
    read = Read(path, streaming=True, **held)
    assert [row.values["label"] for row in read.splits.train][:2] == [["c"], ["a", "b"]]


@pytest.mark.parametrize(
    ("header", "train", "held", "values"),
    [
        ("text,label", ("['a', 'b']", "['c']"), ("a|b", "['c']"), [["a", "b"], ["c"]]),
        ("text,label", ("[1 0 1]", "[0 0 0]"), ("[0 1 0]", "[1 0 0]"), [["1"], ["0"]]),
        ("text,label", ("1", "0"), ("1.0", "0.0"), ["1", "0"]),
        ("text,label", ("TRUE", "FALSE"), ("true", "False"), ["True", "False"]),
        ("text,toxic,obscene", ("0,1", "1,1"), ("1,0", "0,0"), [["toxic"], []]),
    ],
)
def test_an_existing_run_reads_held_out_rows_alike(
    csv: Csv, tmp_path: Path, header: str, train: Any, held: Any, values: list[Any]
) -> None:
    """Without the training file: the task's own labels say in which form the rows' are."""

    def cell(value: str) -> str:
        return f'"{value}"' if "[" in value else value

    path = csv(header, lambda number, text: f"{text},{cell(train[number % 2])}")
    task = Read(path).task
    test = csv(header, lambda number, text: f"held {text},{cell(held[number % 2])}", "test.csv")
    path.unlink()
    config = RunConfig("model", "run", train_file=str(path), validation_file=str(test), test_file=str(test))
    with collecting() as notes:
        rows = read_held_out(config, task, tmp_path / "kept").test
    assert [row.values[task.columns["label"]] for row in rows][:2] == values and notes == []


def test_texts_that_are_values_of_a_program(csv: Csv, jsonl: Jsonl) -> None:
    for cell, words in (
        ("\"['good', 'film']\"", "lists or objects written as text"),
        ("b'good film'", "bytes as Python"),
    ):
        read = Read(csv("text,label", lambda number, text, cell=cell: f"{cell.replace('film', text)},{number % 2}"))
        assert len(read.notes) == 1 and words in read.notes[0]
    mixed = Read(csv("text,label", lambda number, text: f"{'[' if number else ''}{text}],{number % 2}"))
    assert mixed.notes == []


def test_held_out_rows_of_training(csv: Csv) -> None:
    path = csv("text,label", lambda number, text: f"{text},{number % 2}")
    read = Read(path, test_file=str(path), validation_file=str(path))
    assert [note.partition(", the first")[0] for note in read.notes] == [
        "data.csv: 20 of 20 test rows are in the training data too",
        "data.csv: 20 of 20 validation rows are in the training data too",
        "data.csv: 20 of 20 test rows are in the validation data too",
    ]
    with pytest.raises(InputError, match=r"20 of 20 test rows are in the training data too.* --on_leak warn"):
        Read(path, test_file=str(path), on_leak="error")
    assert Read(path).notes == []


def test_columns_of_held_out_rows_in_other_case(csv: Csv) -> None:
    train = csv("text,label", lambda number, text: f"{text},{number % 2}")
    held = csv("Text,LABEL", lambda number, text: f"held {text},{number % 2}", "test.csv")
    assert Read(train, test_file=str(held)).splits.test[3].values == {"text": "held text 3", "label": "1"}
    with pytest.raises(InputError, match=r"no column 'text', only 'words', 'label'.* Rename the right one"):
        Read(train, test_file=str(csv("words,label", lambda number, text: f"{text},{number % 2}", "test.csv")))


@pytest.mark.parametrize("mark", ["?", "N/A", "-"])
def test_marks_of_no_label(csv: Csv, mark: str) -> None:
    train = csv("text,label", lambda number, text: f"{text},{'ab'[number % 2]}")
    held = csv("text,label", lambda number, text: f"held {text},{mark}", "test.csv")
    assert "test.csv: no row of the test split has a label" in Read(train, test_file=str(held)).notes[0]
    train = csv("text,label", lambda number, text: f"{text},{['a', mark][number % 2]}")
    assert len(Read(train, test_file=str(held)).splits.test) == 20  # a class of training


def test_texts_with_several_labels(csv: Csv) -> None:
    read = Read(csv("text,label", lambda number, text: f"text {number // 2},{'ab'[number % 2]}"))
    assert read.notes == [
        "data.csv: 10 texts stand in several rows with different labels (lines 2 and 3); if a text may have several, write them in one row (a|b)."
    ]


def test_words_in_place_of_texts(csv: Csv) -> None:
    read = Read(csv("text,label", lambda number, text: f"{'nan' if number == 2 else text},{number % 2}"))
    assert len(read.notes) == 1 and "Texts such as 'nan' in 'text' (line 4) are read as they are" in read.notes[0]


def test_answers_beside_their_places(csv: Csv, jsonl: Jsonl) -> None:
    path = csv("question,context,answer,answer_start", lambda _, text: f"what,text {text},text,5")
    read = Read(path)
    assert read.values[0]["answers"] == {"text": ["text"], "answer_start": [5]} and read.notes == []
    for start in ("5", 5.0):
        answers = {"text": ["text"], "answer_start": [start]}
        read = Read(jsonl(lambda _, text, own=answers: {"question": "q", "context": f"text {text}", "answers": own}))
        assert read.values[0]["answers"]["answer_start"] == [5]
    read = Read(jsonl(lambda _, text: {"question": "q", "context": f"text {text}", "answers": ["text", text]}))
    assert read.values[0]["answers"] == ["text", "text 0"]
    assert "14 of 14 answers stand in their contexts several times; the first place is learned" in read.notes[0]
