"""`reltune data`: columns, classes, lengths and an example token by token, for every task, without a model's weights."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len

from command_line import assert_refused, reltune
from reltune.report.preview import lengths_sentence, short_lines, visible
from reltune.runs.preview import shown
from reltune.tasks.task import Seen
from task_cases import write_rows
from tasks.test_image_classification import png
from tasks.test_image_classification import save_tiny as save_tiny_images
from tasks.test_more_text_tasks import save_tiny_t5
from tiny_models import CHAT, save_tiny_bert, save_tiny_llama, save_tiny_masked

Make = Callable[[int], dict[str, Any]]
WORDS = ("good", "bad", "fine", "poor")


def text(number: int) -> str:
    return " ".join([WORDS[number % 4], *("film book very not great dull".split()[: number % 6])])


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path


def seen(
    place: Path, rows: Iterable[Mapping[str, Any]], *flags: str, model: Callable[[Path], Any] = save_tiny_bert
) -> dict[str, Any]:
    """What `reltune data --format json` says of the rows, with a model that has no weights."""
    model(place / "model")
    for weights in (place / "model").glob("*.safetensors"):
        weights.unlink()
    file = write_rows(place / "rows.jsonl", rows)
    words = ("data", "--model_name_or_path", place / "model", "--train_file", file, *flags)
    table = reltune(*words)
    assert table.code == 0, table
    assert all(cell_len(line) <= 80 for line in table.out.splitlines()), table.out
    assert "\x1b" not in table.out
    answer = reltune(*words, "--format", "json")
    assert answer.code == 0, answer
    return {**json.loads(answer.out), "table": table.out, "said": table.err}


def learned(found: dict[str, Any], name: str = "input") -> list[str]:
    return [token["text"] for token in found["example"][name] if token["learned"]]


def texts(found: dict[str, Any], name: str = "input") -> list[str]:
    return [token["text"] for token in found["example"][name]]


def test_classification(place: Path) -> None:
    rows = [{"id": n, "text": text(n), "label": ["no", "yes", "rare"][0 if n % 3 else 1]} for n in range(60)]
    rows[7] = {"id": 7, "text": "good " * 40, "label": "rare"}
    found = seen(place, rows, "--max_length", "10", "--example", "2")
    assert found["columns"] == {"id": "", "text": "text", "label": "label"} and found["learned"] == ["label"]
    for split, count in found["rows"].items():
        assert sum(of.get(split, 0) for of in found["classes"].values()) == count
    assert (
        found["classes"]["rare"] == {"train": 1}
        and found["rows"]["train"] + found["rows"]["test"] + found["rows"]["validation"] == 60
    )
    lengths = found["lengths"]
    assert (lengths["most"], lengths["limit"], lengths["cut"], lengths["whole"]) == (42, 10, 1, True)
    assert lengths["share_cut"] == 1 / found["rows"]["train"] and lengths["unknown"] == 0
    assert texts(found)[0] == "[CLS]" and texts(found)[-1] == "[SEP]" and learned(found) == []
    assert [token["special"] for token in found["example"]["input"]] == [True, *[False] * (len(texts(found)) - 2), True]
    assert found["wanted"].startswith("class ") and found["number"] == 2
    assert "rare" in " ".join(found["notes"]) and "not used: column 'id'" in found["said"]
    for words in ("label   label, to be learned", "id      nothing", "longest 42. 1 (", ") is cut", "[CLS] "):
        assert words in found["table"], found["table"]


def test_unknown_tokens_are_counted(place: Path) -> None:
    rows = [{"text": f"{text(n)} unheard{n}", "label": n % 2} for n in range(40)]
    found = seen(place, rows)
    counted = [len(row["text"].split()) + 2 for row in rows]
    assert found["lengths"]["unknown"] == pytest.approx(40 / sum(counted), rel=0.1)
    assert "of them are unknown to the tokenizer" in " ".join(found["table"].split())


def test_classes_with_columns_of_their_own(place: Path) -> None:
    found = seen(place, [{"text": f"{text(n)} {n}", "toxic": n % 2, "rude": n % 3 % 2} for n in range(40)])
    assert found["columns"] == {"text": "text", "toxic": "label", "rude": "label"} and found["learned"] == [
        "toxic",
        "rude",
    ]
    assert found["task"] == "multilabel_classification" and found["wanted"].startswith(("labels ", "no label"))


def test_numbers(place: Path) -> None:
    found = seen(place, [{"text": f"{text(n)} {n}", "label": n / 8} for n in range(40)])
    least, mean, most = (f(row / 8 for row in range(40)) for f in (min, lambda all: sum(all) / 40, max))
    every = found["numbers"].values()
    assert min(of[0] for of in every) == least and max(of[2] for of in every) == most
    weighted = sum(of[1] * found["rows"][split] for split, of in found["numbers"].items())
    assert weighted / 40 == pytest.approx(mean) and found["wanted"].startswith("number ")
    assert found["columns"] == {"text": "text", "label": "label"} and found["learned"] == ["label"]


def test_tags(place: Path) -> None:
    rows = [{"tokens": ["good", "film", WORDS[n % 4]], "ner_tags": ["O", "B-WORK", "O"]} for n in range(40)]
    rows = [
        {**row, "tokens": [*row["tokens"], f"w{n}"], "ner_tags": [*row["ner_tags"], "O"]} for n, row in enumerate(rows)
    ]
    found = seen(place, rows)
    assert [token["tag"] for token in found["example"]["input"]] == ["", "O", "B-WORK", "O", "O", ""]
    assert [token["learned"] for token in found["example"]["input"]] == [False, True, True, True, True, False]
    assert found["classes"]["B-WORK"]["train"] == found["rows"]["train"] and "film=B-WORK" in found["table"]


def test_answers_in_contexts(place: Path) -> None:
    rows = [
        {
            "question": "good or bad",
            "context": f"the film was {WORDS[n % 4]} {n}",
            "answers": {"text": [WORDS[n % 4]], "answer_start": [13]},
        }
        for n in range(40)
    ]
    found = seen(place, rows)
    assert len(learned(found)) == 1 and learned(found)[0] in WORDS and "the answer from token" in found["wanted"]
    assert found["lengths"]["windows"] and "^ the answer" in found["table"]


def test_plain_texts(place: Path) -> None:
    found = seen(place, [{"text": f"good film {text(n)}"} for n in range(40)], model=save_tiny_llama)
    assert found["task"] == "causal_lm" and learned(found) == texts(found)[1:] and texts(found)[-1] == "<|endoftext|>"


def test_prompts(place: Path) -> None:
    rows = [{"prompt": f"very {text(n)}", "completion": " great book"} for n in range(40)]
    found = seen(place, rows, model=save_tiny_llama)
    assert learned(found) == ["great", "book", "<|endoftext|>"]
    assert found["columns"] == {"prompt": "prompt", "completion": "completion"} and found["learned"] == ["completion"]
    assert learned(seen(place, rows, "--no_completion_only_loss", model=save_tiny_llama)) == texts(found)[1:]


def test_chats(place: Path) -> None:
    turns = [("user", "good film"), ("assistant", "very good"), ("user", "bad book"), ("assistant", "not great")]
    rows = [
        {"messages": [{"role": role, "content": f"{said} {WORDS[n % 4]}"} for role, said in turns], "n": n}
        for n in range(40)
    ]
    for n, row in enumerate(rows):
        row["messages"][0]["content"] += " " + " ".join(WORDS[int(digit)] for digit in f"{n:b}")
    found = seen(place, rows, model=lambda path: save_tiny_llama(path, chat_template=CHAT))
    assert [word for word in learned(found) if word not in WORDS] == ["very", "<|end|>", "not", "great", "<|end|>"]
    lines = found["table"].splitlines()
    row, marks = next((line, below) for line, below in itertools.pairwise(lines) if "<|assistant|>" in line)
    assert marks[row.index("very")] == "^" and marks[row.index("<|user|>")] == " "


def test_hidden_tokens(place: Path) -> None:
    found = seen(
        place, [{"text": f"good film {text(n)}"} for n in range(40)], "--task", "masked_lm", model=save_tiny_masked
    )
    assert learned(found) and len(learned(found)) < len(texts(found))


def test_targets(place: Path) -> None:
    found = seen(place, [{"source": f"good {text(n)}", "target": "fine film"} for n in range(40)], model=save_tiny_t5)
    assert learned(found, "source") == [] and learned(found, "target") == texts(found, "target")
    assert "source, " in found["table"] and "target, " in found["table"]


def test_pairs_of_answers(place: Path) -> None:
    rows = [{"prompt": f"very {text(n)}", "chosen": " great book", "rejected": " poor book"} for n in range(40)]
    found = seen(place, rows, model=save_tiny_llama)
    assert learned(found, "chosen") == ["great", "book", "<|endoftext|>"]
    assert learned(found, "rejected") == ["poor", "book", "<|endoftext|>"]


def test_images(place: Path) -> None:
    for n in range(40):
        side = ("left", "right")[n % 2]
        folder = place / "images" / side
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{n}.png").write_bytes(png(side, n))
    save_tiny_images(place / "model", "vit")
    answer = reltune("data", "--model_name_or_path", place / "model", "--train_file", place / "images")
    assert answer.code == 0 and "becomes numbers 3 × 8 × 8" in answer.out and "left" in answer.out, answer


def test_without_a_model(place: Path) -> None:
    file = write_rows(place / "rows.jsonl", [{"text": text(n) + f" {n}", "label": n % 2} for n in range(40)])
    answer = reltune("data", "--train_file", file)
    assert answer.code == 0 and "rows" in answer.out and "Tokens" not in answer.out, answer
    found = json.loads(reltune("data", "--train_file", file, "--format", "json").out)
    assert found["lengths"] is None and found["example"] == {} and found["tokenizer"] is None


def test_many_classes_and_wide_names(place: Path) -> None:
    rows = [{"text": f"{text(n)} {n}", "label": f"{'很长的名字' * 8} {n % 15:02}"} for n in range(300)]
    found = seen(place, rows)
    assert "… 3 more" in found["table"] and len(found["classes"]) == 15


def test_classes_that_are_numbers_are_told_from_their_counts(place: Path) -> None:
    rows = [{"text": f"{text(n)} {n}", "label": 1 if n % 3 else 10} for n in range(60)]
    found = seen(place, rows)
    counts = {label: of["train"] for label, of in found["classes"].items()}
    assert f"Classes in training: 1 ({counts['1']}), 10 ({counts['10']})." in short_lines(found)


def test_lengths_after_the_cut_are_said_to_be_so_where_any_was_cut() -> None:
    lengths = {"examples": 9, "whole": False, "median": 3, "nearly_all": 4, "most": 5, "unknown": 0, "windows": False}
    lengths |= {"limit": 5, "limit_of": "max_length", "cut": 0, "share_cut": 0}
    assert "(9 training texts)" in lengths_sentence({"lengths": lengths, "unit": "text"})
    assert "(9 training texts, cut)" in lengths_sentence({"lengths": lengths | {"cut": 1}, "unit": "text"})


def test_streamed_rows(place: Path) -> None:
    rows = [{"text": text(n) + f" {n}", "label": n % 2} for n in range(40)]
    held = str(write_rows(place / "held.jsonl", [{**row, "text": "very " + row["text"]} for row in rows]))
    found = seen(place, rows, "--streaming", "--validation_file", held, "--test_file", held)
    assert found["rows"]["train"] is None and found["rows"]["test"] == 40 and "streamed" in found["table"]


def test_what_is_refused(place: Path) -> None:
    file = write_rows(place / "rows.jsonl", [{"text": text(n) + f" {n}", "label": n % 2} for n in range(40)])
    assert_refused(reltune("data"), "train_file")
    assert_refused(reltune("data", "--train_file", place / "none.csv"), "none.csv")
    assert_refused(reltune("data", "--train_file", file, "--format", "yaml"), "'yaml'")
    assert_refused(reltune("data", "--train_file", file, "--model_name_or_path", place / "none"), "none")
    save_tiny_bert(place / "model")
    assert_refused(
        reltune("data", "--train_file", file, "--model_name_or_path", place / "model", "--example", 99), "--example 99"
    )
    assert_refused(reltune("data", "--train_file", file, "--test_file", file, "--on_leak", "error"), "--on_leak warn")


def test_a_config_file(place: Path) -> None:
    file = write_rows(place / "rows.jsonl", [{"text": text(n) + f" {n}", "label": n % 2} for n in range(40)])
    (place / "run.yaml").write_text(f"train_file: {file}\nlearning_rate: 1e-3\nmax_length: 9\n")
    assert reltune("data", "--config", place / "run.yaml").code == 0


class Bytes:
    """A byte-level tokenizer of three tokens that make one character, and a word with its space."""

    all_special_ids = (0,)

    def __init__(self) -> None:
        from tokenizers import Tokenizer, decoders, models

        self.names = ["<s>", "å", "¥", "½", "Ġfilm", "å"]  # 好 is E5 A5 BD
        self.backend_tokenizer = Tokenizer(models.WordLevel({}, unk_token="?"))
        self.backend_tokenizer.decoder = decoders.ByteLevel()

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [self.names[id] for id in ids]


def test_tokens_that_are_parts_of_a_character() -> None:
    tokens = shown(Seen("input", [0, 1, 2, 3, 4, 5], [False] * 6), Bytes())
    assert [token.text for token in tokens] == ["<s>", "好", "", "", " film", "\ufffd"]
    assert [token.id for token in tokens] == [0, 1, 2, 3, 4, 5]


def test_what_cannot_be_seen() -> None:
    assert visible(" a\n\tb\\n\x1b[31m") == "·a\\n\\tb\\\\n\ufffd[31m"
