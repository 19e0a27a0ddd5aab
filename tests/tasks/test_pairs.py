"""Two texts that are read together: as a pair, of which the longer one is cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from command_line import write_csv
from reltune.config.run_config import RunConfig
from reltune.data.rows import Row
from reltune.notes import collecting
from reltune.runs.materials import prepare
from reltune.tasks.multilabel_classification import MultilabelClassification
from reltune.tasks.regression import Regression
from reltune.tasks.sequence_classification import SequenceClassification
from tiny_models import save_tiny_bert, tiny_decoder_tokenizer, tiny_tokenizer

COLUMNS = {"text": "premise", "text_pair": "hypothesis", "label": "label"}
ROW = Row({"premise": "good film", "hypothesis": "bad book very", "label": 1}, 4)
TASKS = [
    SequenceClassification(["0", "1"], COLUMNS),
    MultilabelClassification(["0", "1"], COLUMNS),
    Regression(COLUMNS),
]


def pair_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return tokenizer


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_both_texts_are_read(task: Any) -> None:
    tokenizer = pair_tokenizer()
    values = {**ROW.values, "label": ["1"]} if task.name == "multilabel_classification" else ROW.values
    examples = task.encode([Row(values, 4)], tokenizer, 20)
    assert tokenizer.decode(examples[0]["input_ids"]) == "[CLS] good film [SEP] bad book very [SEP]"
    assert examples[0]["token_type_ids"] == [0] * 4 + [1] * 4 and examples.n_truncated == 0
    assert task.content(ROW) == "good film bad book very"
    for column in ("premise", "hypothesis"):
        assert task.problem(Row({**values, column: " "}, 4)) == f"an empty {column!r}"
    batch = task.collator(tokenizer)([examples[0], examples[0]])
    assert batch["token_type_ids"].shape == (2, 8)


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        (("good " * 9, "bad"), "[CLS] good good good [SEP] bad [SEP]"),
        (("good", "bad " * 9), "[CLS] good [SEP] bad bad bad [SEP]"),
        (("good " * 9, "bad " * 9), "[CLS] good good [SEP] bad bad [SEP]"),
    ],
)
def test_the_longer_text_is_cut(texts: tuple[str, str], words: str) -> None:
    tokenizer = pair_tokenizer()
    row = Row({"premise": texts[0], "hypothesis": texts[1], "label": 1}, 1)
    examples = TASKS[0].encode([row], tokenizer, 7)
    assert tokenizer.decode(examples[0]["input_ids"]) == words and examples.n_truncated == 1


def test_a_tokenizer_that_puts_nothing_between() -> None:
    tokenizer = tiny_decoder_tokenizer(["good", "film", "bad", "book", "very"])
    with collecting() as notes:
        examples = TASKS[0].encode([ROW, ROW], tokenizer, 20)
    assert tokenizer.decode(examples[0]["input_ids"]) == "good film bad book very"
    assert len(notes) == 1 and "nothing between the two texts" in notes[0]


def test_a_run_reads_pairs(tmp_path: Path) -> None:
    save_tiny_bert(tmp_path / "model")
    pair_tokenizer().save_pretrained(tmp_path / "model")
    words = ("good", "bad", "fine", "dull", "film", "book")
    rows: Any = [(f"{a} {b} very", f"{b} not", "ab"[a == b]) for a in words for b in words]
    write_csv(tmp_path / "pairs.csv", rows, ("premise", "hypothesis", "label"))
    materials = prepare(
        RunConfig(str(tmp_path / "model"), str(tmp_path / "run"), train_file=str(tmp_path / "pairs.csv"))
    )
    assert materials.task.columns == COLUMNS
    for examples in (materials.train, materials.validation, materials.test):
        assert all(item["input_ids"].count(3) == 2 and 1 in item["token_type_ids"] for item in examples.items)
