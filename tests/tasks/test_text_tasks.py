"""Regression, multi-label and token classification: rows, metrics against plain computations, and whole runs."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import EvalPrediction

from reltune.data.rows import Row
from reltune.errors import InputError
from reltune.losses import LOSSES
from reltune.notes import collecting
from reltune.tasks.multilabel_classification import MultilabelClassification
from reltune.tasks.regression import Regression
from reltune.tasks.task import Task
from reltune.tasks.texts import as_read
from reltune.tasks.token_classification import TokenClassification
from task_cases import OFTEN, check_reload, run_task
from tiny_models import save_tiny_bert, save_tiny_gpt2, tiny_decoder_tokenizer, tiny_tokenizer

WEIGHTS = {"good": 1.0, "great": 2.0, "bad": -1.0, "poor": -2.0}
LEARNS = {**OFTEN, "learning_rate": 3e-3}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("bert")
    save_tiny_bert(place / "model")
    return place / "model"


def place_with(model: Path, tmp_path: Path) -> Path:
    shutil.copytree(model, tmp_path / "model")
    return tmp_path


def texts(count: int, seed: int = 0) -> list[list[str]]:
    draw = random.Random(seed)
    return [
        [*draw.sample(list(WEIGHTS), k=draw.randint(0, 3)), *draw.choices(["film", "book"], k=draw.randint(1, 4))]
        for _ in range(count)
    ]


def check_loss(task: Task, model: Path, rows: list[Row]) -> None:
    """The loss that relevance is measured by is, in the mean, the one that the model trains by."""
    network, _ = task.load_model(model)
    tokenizer = task.load_tokenizer(model)
    examples = task.encode(rows, tokenizer, 32)
    batch = task.collator(tokenizer)([examples[i] for i in range(len(examples))])
    outputs = network.eval()(**batch)
    assert LOSSES[task.loss].per_example(outputs, batch).mean().item() == pytest.approx(outputs.loss.item(), rel=1e-5)


# -- regression -----------------------------------------------------------------------------------------------------


def test_what_the_tokenizer_does_not_know_is_seen_in_a_report() -> None:
    tokenizer = tiny_tokenizer()
    ids = tokenizer(["good 很好", "很好"], padding=True)["input_ids"]
    assert [as_read(tokenizer, each) for each in ids] == ["good [UNK]", "[UNK]"]
    decoder = tiny_decoder_tokenizer()  # whose token for it ends texts, too
    assert as_read(decoder, [*decoder("good film")["input_ids"], decoder.eos_token_id]) == "good film"


def test_regression_rows(model: Path) -> None:
    task = Regression()
    for value, found in (
        ("3.5", None), (2, None), (-1e3, None), (" 7 ", None),
        ("many", "no number"), ("nan", "no number"), (float("inf"), "no number"), (True, "no number"), ("", "empty"), (None, "empty"),
    ):  # fmt: skip
        problem = task.problem(Row({"text": "good", "label": value}, 1))
        assert problem is None if found is None else found in str(problem), value
    check_loss(task, model, [Row({"text": "good film", "label": "1.5"}, 1), Row({"text": "bad", "label": -2}, 2)])


def test_numbers_that_teach_nothing_or_slowly() -> None:
    def fit(*labels: float) -> list[str]:
        with collecting() as notes:
            Regression().fitted([Row({"text": "good", "label": label}, 1) for label in labels])
        return notes

    assert fit(1, 5) == [] and "lie between 0 and 100" in fit(0, 100)[0]
    with pytest.raises(InputError, match=r"All training rows have the label 0\.5"):
        fit(0.5, 0.5)


def test_a_head_of_one_number_is_kept(tmp_path: Path) -> None:
    save_tiny_bert(tmp_path / "one", labels=["LABEL_0"])
    save_tiny_bert(tmp_path / "two", labels=["a", "b"])
    assert Regression().load_model(tmp_path / "one")[1] == []
    assert Regression().load_model(tmp_path / "two")[1] == ["classifier.bias", "classifier.weight"]


@given(st.lists(st.tuples(st.integers(-5, 5), st.integers(-5, 5)), min_size=2, max_size=30))
@settings(deadline=None, max_examples=50)
def test_regression_metrics(pairs: list[tuple[int, int]]) -> None:
    predicted, labels = (np.array(side, float) for side in zip(*pairs, strict=True))
    found = Regression().compute_metrics(EvalPrediction(predicted[:, None], labels))

    def correlation(a: np.ndarray, b: np.ndarray) -> float:
        a, b = a - a.mean(), b - b.mean()
        scale = np.sqrt((a @ a) * (b @ b))
        return float(a @ b / scale) if scale else 0.0

    def ranks(values: np.ndarray) -> np.ndarray:
        return np.array([(values < v).sum() + ((values == v).sum() + 1) / 2 for v in values])

    assert found["pearson"] == pytest.approx(correlation(predicted, labels), abs=1e-9)
    assert found["spearman"] == pytest.approx(correlation(ranks(predicted), ranks(labels)), abs=1e-9)
    assert found["mse"] == pytest.approx(sum((p - y) ** 2 for p, y in pairs) / len(pairs))


def test_a_run_of_regression(model: Path, tmp_path: Path) -> None:
    rows = [{"text": " ".join(words), "label": 0.25 + sum(WEIGHTS.get(w, 0) for w in words)} for words in texts(160)]
    results = run_task(place_with(model, tmp_path), rows, LEARNS)
    assert results["test_pearson"] > 0.9 and results["test_spearman"] > 0.85, results
    assert results["test_mse"] == pytest.approx(results["test_loss"], rel=1e-4)
    check_reload(tmp_path)


# -- several labels -------------------------------------------------------------------------------------------------


def test_multilabel_rows(model: Path) -> None:
    task = MultilabelClassification()
    for value, found in (
        (["a", "b"], None), ([], None), ("a|b", None), ("", None), ([1, 2], None),
        (None, "empty"), ([0.5], "no list"), (["a", " "], "empty label"), ({"a": 1}, "no list"),
    ):  # fmt: skip
        problem = task.problem(Row({"text": "good", "label": value}, 1))
        assert problem is None if found is None else found in str(problem), value
    rows = [Row({"text": "good", "label": label}, i) for i, label in enumerate(["差评|b", ["b", 10], [], [2]])]
    fitted = task.fitted(rows)
    assert fitted.labels == ["2", "10", "b", "差评"]
    assert [fitted.labels_of(row) for row in rows] == [["差评", "b"], ["b", "10"], [], ["2"]]
    assert "'c'" in str(fitted.misfit(Row({"text": "x", "label": ["b", "c"]}, 1))) and fitted.misfit(rows[0]) is None
    with pytest.raises(InputError, match="No training row has a label"):
        task.fitted([rows[2]])
    check_loss(fitted, model, rows)


def test_a_head_for_one_label_of_several_is_learned_anew(tmp_path: Path) -> None:
    save_tiny_bert(tmp_path, labels=["a", "b"])
    task = MultilabelClassification(labels=["a", "b"])
    model, missing = task.load_model(tmp_path)
    assert missing == ["classifier.bias", "classifier.weight"]
    model.save_pretrained(tmp_path)
    assert task.load_model(tmp_path)[1] == []


def test_multilabel_metrics() -> None:
    truth = np.array([[1, 0, 0], [1, 1, 0], [0, 0, 0], [0, 1, 0]], float)
    logits = np.array([[2, -1, -1], [1, -1, -3], [-1, -1, -1], [3, 2, -1]], float)
    found = MultilabelClassification(labels=list("abc")).compute_metrics(EvalPrediction(logits, truth))
    # a: 2 right, 1 too many; b: 1 right, 1 missed; c: never
    assert found == pytest.approx({"f1_micro": 6 / 8, "f1_macro": (4 / 5 + 2 / 3 + 0) / 3, "subset_accuracy": 2 / 4})


def test_a_single_label_is_one_and_not_two_classes() -> None:
    """Found 3 times, of which 2 rightly, where 4 texts have it: F1 by hand. Where nothing is found it is 0."""
    labels = np.array([[1.0], [1], [1], [1], [0], [0]])
    found = MultilabelClassification(["x"]).compute_metrics(
        EvalPrediction(np.array([[1.0], [1], [-1], [-1], [1], [-1]]), labels)
    )
    assert found == pytest.approx({"f1_micro": 4 / 7, "f1_macro": 4 / 7, "subset_accuracy": 1 / 2})
    nothing = MultilabelClassification(["x"]).compute_metrics(EvalPrediction(-np.ones((6, 1)), labels))
    assert nothing["f1_micro"] == nothing["f1_macro"] == 0


def test_a_run_of_several_labels(model: Path, tmp_path: Path) -> None:
    rows = [{"text": " ".join(words), "label": sorted(set(words) & set(WEIGHTS))} for words in texts(160)]
    results = run_task(place_with(model, tmp_path), rows, {**LEARNS, "num_train_epochs": 40})
    assert results["test_f1_micro"] > 0.7, results  # all labels everywhere would have 0.55
    check_reload(tmp_path)


# -- tags -----------------------------------------------------------------------------------------------------------


def test_tag_rows() -> None:
    task = TokenClassification()
    for words, tags, found in (
        (["a", "b"], ["O", "B-X"], None), ("a b", "O O", None), (["a"], [3], None),
        ([], [], "empty"), (["a"], None, "empty"), (["a", "b"], ["O"], "another number"), (["a", 3], ["O", "O"], "empty word"),
        (["a"], [0.5], "neither"), (["a", " "], ["O", "O"], "empty word"),
    ):  # fmt: skip
        problem = task.problem(Row({"tokens": words, "ner_tags": tags}, 1))
        assert problem is None if found is None else found in str(problem), (words, tags)
    row = Row({"tokens": "a b c d", "ner_tags": "I-PER B-PER O B-LOC"}, 1)
    assert task.fitted([row]).labels == ["O", "B-LOC", "B-PER", "I-PER"]
    assert "'B-ORG'" in str(task.fitted([row]).misfit(Row({"tokens": ["a"], "ner_tags": ["B-ORG"]}, 1)))


def test_a_tag_stands_at_the_first_token_of_its_word(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertForTokenClassification, PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "good", "##ness", "film"])}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]")
    tokenizer.save_pretrained(tmp_path)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertForTokenClassification(BertConfig(vocab_size=7, max_position_embeddings=16, **sizes)).save_pretrained(tmp_path)
    task = TokenClassification(labels=["O", "B-X", "I-X"])
    rows = [Row({"tokens": ["goodness", "film", "goodness"], "ner_tags": ["B-X", "I-X", "O"]}, 1)]
    tokenizer = task.load_tokenizer(tmp_path)
    examples = task.encode(rows, tokenizer, 16)
    assert (
        tokenizer.convert_ids_to_tokens(examples[0]["input_ids"]) == "[CLS] good ##ness film good ##ness [SEP]".split()
    )
    assert examples[0]["labels"] == [-100, 1, -100, 2, 0, -100, -100]
    assert task.encode(rows, tokenizer, 5).n_truncated == 1
    assert task.encode(rows, tokenizer, 5)[0]["labels"] == [-100, 1, -100, 2, -100]
    check_loss(task, tmp_path, rows * 2)


def spans(tags: list[str]) -> set[tuple[int, int, str]]:
    """Entities of IOB2 tags: from each B-X as far as I-X follow; an I-X that follows nothing of its kind begins one."""
    found, start, kind = set(), None, ""
    for i, tag in enumerate([*tags, "O"]):
        if start is not None and tag != f"I-{kind}":
            found.add((start, i, kind))
            start = None
        if tag != "O" and start is None:
            start, kind = i, tag[2:]
    return found


TAGS = ["O", "B-X", "I-X", "B-Y", "I-Y"]


@given(
    st.lists(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=6), min_size=1, max_size=4)
)
@settings(deadline=None, max_examples=100)
def test_entities_are_counted_whole(rows: list[list[tuple[int, int]]]) -> None:
    """Against sets of (start, end, kind); padding and sub-tokens (label -100) count nowhere."""
    width = 2 * max(map(len, rows)) + 1
    labels, predicted = np.full((2, len(rows), width), -100)
    predicted[:] = 1
    right = found = there = same = total = 0
    for i, pairs in enumerate(rows):
        labels[i, 1 : 2 * len(pairs) : 2], predicted[i, 1 : 2 * len(pairs) : 2] = zip(*pairs, strict=True)
        truth, guess = (spans([TAGS[one] for one in side]) for side in zip(*pairs, strict=True))
        right, found, there = right + len(truth & guess), found + len(guess), there + len(truth)
        same, total = same + sum(a == b for a, b in pairs), total + len(pairs)
    metrics = TokenClassification(labels=TAGS).compute_metrics(EvalPrediction(predicted, labels))
    expected = {
        "precision": right / found if found else 0,
        "recall": right / there if there else 0,
        "f1": 2 * right / (found + there) if found + there else 0,
        "token_accuracy": same / total,
    }
    assert metrics == pytest.approx(expected)


def test_parts_of_speech_are_no_entities() -> None:
    task = TokenClassification(labels=["ADJ", "NOUN"])
    assert task.best == "token_accuracy"
    assert task.compute_metrics(EvalPrediction(np.array([[0, 1]]), np.array([[0, 0]]))) == {"token_accuracy": 0.5}


@pytest.mark.parametrize("tags", ["O B-X E-X S-X", "O B-X L-X U-X", "O X_B X_E X_S"])
def test_entities_of_other_schemes_are_counted_whole(tags: str) -> None:
    """Two words that are an entity each, of which one is found; and one of two words that is found."""
    truth, found = np.array([[3, 3, 0, 1, 2]]), np.array([[3, 0, 0, 1, 2]])
    metrics = TokenClassification(labels=tags.split()).compute_metrics(EvalPrediction(found, truth))
    assert (metrics["precision"], metrics["recall"]) == (1, pytest.approx(2 / 3))


def test_tags_that_do_not_mark_entities_are_said() -> None:
    def notes(*tags: str) -> list[str]:
        with collecting() as made:
            TokenClassification().fitted([Row({"tokens": ["a"] * len(tags), "ner_tags": list(tags)}, 1)])
        return made

    assert notes("O", "B-X") == notes("NOUN", "VERB") == []
    assert "not whole entities" in notes("O", "X")[0] and "not whole entities" in notes("0", "3")[0]
    problem = TokenClassification().problem(Row({"tokens": ["a"], "ner_tags": [-100]}, 1))
    assert problem == "a 'ner_tags' with -100, which stands for no tag"


def test_a_run_of_tags(model: Path, tmp_path: Path) -> None:
    rows = []
    for words in texts(120):
        tags = ["B-OPINION" if word in WEIGHTS else "O" for word in words]
        tags = [f"I{tag[1:]}" if tag != "O" and i and tags[i - 1] != "O" else tag for i, tag in enumerate(tags)]
        rows.append({"tokens": words, "ner_tags": tags})
    results = run_task(place_with(model, tmp_path), rows, LEARNS)
    assert results["test_f1"] > 0.9 and results["test_token_accuracy"] > 0.9, results
    check_reload(tmp_path)


def test_models_without_such_a_head(tmp_path: Path) -> None:
    from transformers import ViTConfig

    save_tiny_gpt2(tmp_path)
    ViTConfig().save_pretrained(tmp_path)
    for task in (Regression(), MultilabelClassification(labels=["a"]), TokenClassification(labels=["a", "b"])):
        with pytest.raises(InputError, match=r"has no .* head"):
            task.load_model(tmp_path)
