import pytest

from reltune.data.columns import CONVENTIONS, TEXT_ALONE, columns_of, guess_task
from reltune.data.labels import READERS
from reltune.data.rows import Row
from reltune.errors import InputError
from reltune.names import TASKS


def labelled(labels):
    return [Row({"text": "t", "label": label}, line) for line, label in enumerate(labels, start=1)]


@pytest.mark.parametrize(
    ("columns", "task", "roles"),
    [
        ("chosen rejected", "preference", "chosen=chosen rejected=rejected"),
        ("prompt chosen rejected score", "preference", "chosen=chosen rejected=rejected prompt=prompt"),
        (
            "id title context question answers",
            "question_answering",
            "question=question context=context answers=answers",
        ),
        ("id tokens pos_tags chunk_tags ner_tags", "token_classification", "tokens=tokens tags=ner_tags"),
        ("tokens pos_tags", "token_classification", "tokens=tokens tags=pos_tags"),
        ("messages", "causal_lm", "messages=messages"),
        ("prompt completion", "causal_lm", "prompt=prompt completion=completion"),
        ("instruction input output", "causal_lm", "instruction=instruction output=output input=input"),
        ("instruction output text", "causal_lm", "instruction=instruction output=output"),
        ("source target", "seq2seq", "source=source target=target"),
        ("document summary id", "seq2seq", "source=document target=summary"),
        ("article highlights", "seq2seq", "source=article target=highlights"),
        ("image label", "image_classification", "image=image label=label"),
        ("text", "causal_lm", "text=text"),
        ("id text url", "causal_lm", "text=text"),
        ("ID Text __index_level_0__", "causal_lm", "text=Text"),
        ("Unnamed:0 Text Label", "sequence_classification", "text=Text label=Label"),
        ("Sentence1 SENTENCE2 Label", "sequence_classification", "text=Sentence1 text_pair=SENTENCE2 label=Label"),
        ("conversations tools", "causal_lm", "messages=conversations tools=tools"),
        ("prompt completion tools", "causal_lm", "prompt=prompt completion=completion tools=tools"),
        ("query response history", "causal_lm", "instruction=query output=response history=history"),
        ("instruction context response category", "causal_lm", "instruction=instruction output=response input=context"),
        ("id question answer", "causal_lm", "instruction=question output=answer"),
        ("prompt response", "causal_lm", "prompt=prompt completion=response"),
        ("question chosen rejected", "preference", "chosen=chosen rejected=rejected prompt=question"),
    ],
)
def test_layouts(columns, task, roles):
    roles = dict(pair.split("=") for pair in roles.split())
    assert guess_task(columns.split(), []) == (task, roles)
    assert columns_of(task, columns.split()) == roles


@pytest.mark.parametrize(
    ("labels", "task"),
    [
        (["good", "bad"], "sequence_classification"),
        (["好", "1"], "sequence_classification"),
        (["0", "1", "1"], "sequence_classification"),
        ([0, 1, 4], "sequence_classification"),
        ([True, False], "sequence_classification"),
        ([*range(77)] * 5, "sequence_classification"),
        ([None, "", "a"], "sequence_classification"),
        ([], "sequence_classification"),
        (["0.5", "1", "-2e-1"], "regression"),
        ([0.5, 1, 2], "regression"),
        ([0.5, 2, float("nan")], "regression"),  # a label is missing: a bad row
        ([["a"], [], ["a", "b"]], "multilabel_classification"),
        ([[0, 1], [1, 1]], "multilabel_classification"),
    ],
)
def test_labels_decide(labels, task):
    assert guess_task(["text", "label"], labelled(labels)) == (task, {"text": "text", "label": "label"})


@pytest.mark.parametrize("labels", [["1.0", "2.0"], [1.0, 2.0], [*range(50)], ["nan", "1.0", 2.0][1:]])
def test_labels_that_could_be_both(labels):
    with pytest.raises(InputError, match="--task sequence_classification or --task regression"):
        guess_task(["text", "label"], labelled(labels))


@pytest.mark.parametrize("labels", [["0.5", "1.5", "n/a"], [0.5, 2, "n/a"], ["0.5", None, "1", "nan"]])
def test_a_slip_among_fractions_makes_no_classes_of_them(labels):
    with pytest.raises(InputError, match=f"such as {labels[-1]!r} on line {len(labels)}; say with --task regression"):
        guess_task(["text", "label"], labelled(labels))


def test_lists_that_are_no_classes():
    for labels in ([[0.5], [1.0]], [["a"], "b"]):
        with pytest.raises(InputError, match="multilabel_classification wants"):
            guess_task(["text", "label"], labelled(labels))


def test_columns_that_the_user_named():
    rows = [Row({"评论": "好", "得分": score}, 1) for score in ("0.5", "1.5")]
    assert guess_task(["评论", "得分"], rows, "评论", "得分") == ("regression", {"text": "评论", "label": "得分"})
    assert guess_task(["评论"], [], "评论") == ("causal_lm", {"text": "评论"})
    with pytest.raises(InputError, match="'text', 'label'"):
        guess_task(["text", "label"], rows, label_column="得分")


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ([], "none are of no layout"),
        (["text", "sentiment"], "'text', 'sentiment' are of no layout.*text, label.*--label_column"),
        (["query", "response", "label"], "are of no layout"),
        (["question", "choices", "answer"], "are of no layout"),
        (["source", "comment"], "are of no layout that is known .chosen, rejected; .*text, label; sentence1"),
        (["messages", "prompt", "chosen", "rejected"], "preference or causal_lm; say which with --task"),
        ([f"c{n}" for n in range(40)], "'c11', … are"),
    ],
)
def test_columns_that_say_nothing_or_too_much(columns, words):
    with pytest.raises(InputError, match=words) as caught:
        guess_task(columns, [])
    assert len(str(caught.value)) < 500


def test_columns_of_a_known_task():
    assert columns_of("masked_lm", ["text", "label"]) == {"text": "text"}
    assert columns_of("causal_lm", ["messages", "chosen", "rejected"]) == {"messages": "messages"}
    with pytest.raises(
        InputError,
        match=r"token_classification cannot use the columns 'text', 'tag'; it wants tokens, ner_tags\. Rename them\.$",
    ):
        columns_of("token_classification", ["text", "tag"])
    with pytest.raises(InputError, match=r"it wants image, label\. Rename them, or name them with --label_column\.$"):
        columns_of("image_classification", ["photo", "class"])


def test_every_task_has_columns_that_it_can_use():
    for task in TASKS:
        assert any(task in convention.tasks for convention in (*CONVENTIONS, TEXT_ALONE)), task
    labelled = {task for convention in CONVENTIONS if "label" in convention.roles for task in convention.tasks}
    assert labelled == set(READERS)


@pytest.mark.parametrize(
    ("columns", "flags"),
    [
        ("review sentiment", "--text_column review --label_column sentiment"),
        ("id review lang sentiment", "--text_column review --label_column sentiment"),
        ("text category", "--label_column category"),
        (
            "sentence1 sentence2 gold_label",
            "--text_column sentence1 --text_pair_column sentence2 --label_column gold_label",
        ),
    ],
)
def test_flags_for_what_columns_seem_to_be(columns, flags):
    def value(name, line):
        return f"a few words {line}" if name in ("review", "text", "sentence1", "sentence2") else "ab"[line % 2]

    rows = [Row({name: value(name, line) for name in columns.split()}, line) for line in range(20)]
    with pytest.raises(InputError, match=f"pass {flags}[.]"):
        guess_task(columns.split(), rows)


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        (["text", "entities"], "parts of a text by their places .'entities'. are not read"),
        (["image"], "without a label: put the images of each label into a folder"),
    ],
)
def test_columns_with_a_mend_of_their_own(columns, words):
    with pytest.raises(InputError, match=words):
        guess_task(columns, [])


def test_paths_of_images():
    rows = [Row({"file_name": f"{n}.JPG", "label": "a", "text": "b"}, n) for n in range(3)]
    assert guess_task(["file_name", "label"], rows)[0] == "image_classification"
    rows = [Row({"file_name": f"{n}.txt", "label": "a", "text": "b"}, n) for n in range(3)]
    assert guess_task(["file_name", "label", "text"], rows)[0] == "sequence_classification"
