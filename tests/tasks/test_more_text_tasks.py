"""Sequence to sequence, question answering and masked language modelling: rows, metrics, losses, whole runs."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForQuestionAnswering,
    BertModel,
    EvalPrediction,
    T5Config,
    T5ForConditionalGeneration,
)

from reltune.data.rows import Row
from reltune.errors import InputError
from reltune.losses import LOSSES
from reltune.runs.evaluation import evaluate
from reltune.tasks.causal_lm import CausalLM
from reltune.tasks.masked_lm import MaskedLM
from reltune.tasks.question_answering import QuestionAnswering, best_span, shared_words
from reltune.tasks.seq2seq import Seq2Seq, rouge
from task_cases import OFTEN, check_reload, run_task
from tiny_models import WORDS, save_tiny_bert, save_tiny_llama, save_tiny_masked, tiny_tokenizer

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
LEARNS = {**OFTEN, "learning_rate": 5e-3}


def save_tiny_t5(path: Path) -> None:
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = "[SEP]"
    tokenizer.save_pretrained(path)
    config = T5Config(
        vocab_size=len(tokenizer), d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, dropout_rate=0.0,
        pad_token_id=0, decoder_start_token_id=0, eos_token_id=3, tie_word_embeddings=False,
    )  # fmt: skip
    T5ForConditionalGeneration(config).save_pretrained(path)


# -- sequence to sequence -------------------------------------------------------------------------------------------


def subsequence(a: list[str], b: list[str]) -> int:
    if not a or not b:
        return 0
    if a[-1] == b[-1]:
        return 1 + subsequence(a[:-1], b[:-1])
    return max(subsequence(a[:-1], b), subsequence(a, b[:-1]))


WORD_LISTS = st.lists(st.sampled_from(["good", "Bad", "film"]), max_size=5)


@given(WORD_LISTS, WORD_LISTS)
@settings(deadline=None)
def test_rouge(text: list[str], target: list[str]) -> None:
    """Against its definition: F1 of shared n-grams, and of the longest common subsequence."""
    found = rouge([" ".join(text)], [", ".join(target) + "!"])
    text, target = [w.lower() for w in text], [w.lower() for w in target]

    def f1(shared: int, one: int, other: int) -> float:
        return 2 * shared / (one + other) if shared else 0.0

    for n in (1, 2):
        grams = [[tuple(words[i : i + n]) for i in range(len(words) - n + 1)] for words in (text, target)]
        shared = sum(min(grams[0].count(gram), grams[1].count(gram)) for gram in set(grams[0]))
        assert found[f"rouge{n}"] == pytest.approx(f1(shared, *map(len, grams)))
    assert found["rougeL"] == pytest.approx(f1(subsequence(text, target), len(text), len(target)))


def test_rouge_of_texts_without_spaces() -> None:
    assert rouge(["很好的电影"], ["好电影"])["rouge1"] == pytest.approx(2 * 3 / 8)
    assert rouge(["очень хорошо"], ["хорошо"])["rouge1"] == pytest.approx(2 / 3)


def test_the_loss_of_a_translation_is_the_models(tmp_path: Path) -> None:
    save_tiny_t5(tmp_path)
    task = Seq2Seq()
    model, missing = task.load_model(tmp_path)
    assert missing == []
    tokenizer = task.load_tokenizer(tmp_path)
    rows = [Row({"source": "good film", "target": "bad"}, 1), Row({"source": "fine", "target": "poor"}, 2)]
    examples = task.encode(rows, tokenizer, 8)
    assert examples[0]["labels"] == tokenizer("bad")["input_ids"] and examples.sources == [
        ("good film", "bad"),
        ("fine", "poor"),
    ]
    batch = task.collator(tokenizer)([examples[0], examples[1]])
    outputs = model.eval()(**batch)
    assert LOSSES[task.loss].per_example(outputs, batch).mean().item() == pytest.approx(outputs.loss.item())
    assert task.encode([Row({"source": "good", "target": "bad " * 20}, 1)], tokenizer, 8).n_truncated == 1
    assert "empty 'target'" in str(task.problem(Row({"source": "x", "target": ""}, 1)))


def save_tiny_bart(path: Path) -> None:
    """Its texts stand between [CLS] and [SEP], and its decoder starts with the latter."""
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = "[SEP]"
    tokenizer.save_pretrained(path)
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = BartConfig(
        vocab_size=len(tokenizer), d_model=32, encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=32,
        pad_token_id=0, bos_token_id=2, eos_token_id=3, decoder_start_token_id=3, tie_word_embeddings=False, **sizes,
    )  # fmt: skip
    BartForConditionalGeneration(config).save_pretrained(path)


@pytest.mark.parametrize(("save", "eos"), [(save_tiny_t5, 3), (save_tiny_t5, 7), (save_tiny_bart, 3)])
def test_targets_end_where_the_model_stops(save: Any, eos: int, tmp_path: Path) -> None:
    """Whatever generation_config.json says: against a loop that takes the likeliest token, from the decoder's first input in
    training up to the token that ends the targets of training."""
    save(tmp_path)
    task = Seq2Seq(max_new_tokens=5)
    (model, _), tokenizer = task.load_model(tmp_path), task.load_tokenizer(tmp_path)
    for parameter in model.parameters():
        parameter.data.mul_(6)
    model.generation_config.update(
        do_sample=True, temperature=5.0, min_length=4, eos_token_id=eos, forced_eos_token_id=None
    )
    rows = [Row({"source": f"{word} film", "target": "poor book"}, 1) for word in WORDS[:8]]
    examples = task.encode(rows, tokenizer, 16)
    labels = torch.tensor([examples[0]["labels"]])
    start = model.prepare_decoder_input_ids_from_labels(labels)[0, 0].item()
    assert labels[0, -1] == tokenizer.eos_token_id == 3
    arguments = {"use_cpu": True, "per_device_eval_batch_size": 8}
    written = evaluate(model, {"test": examples}, task, tokenizer, **arguments).written["test"]
    for item, one in zip(examples.items, written, strict=True):
        ids = [start]
        while len(ids) < 6 and (len(ids) == 1 or ids[-1] not in (3, eos)):
            with torch.no_grad():
                logits = model.eval()(
                    input_ids=torch.tensor([item["input_ids"]]), decoder_input_ids=torch.tensor([ids])
                ).logits
            ids.append(int(logits[0, -1].argmax()))
        assert one.text == tokenizer.decode(ids[1:], skip_special_tokens=True)
    assert len({one.text for one in written}) > 2


def test_models_that_are_of_the_other_kind(tmp_path: Path) -> None:
    save_tiny_t5(tmp_path / "t5")
    save_tiny_llama(tmp_path / "llama")
    with pytest.raises(InputError, match="source and target"):
        CausalLM().load_model(tmp_path / "t5")
    with pytest.raises(InputError, match="prompt and completion"):
        Seq2Seq().load_model(tmp_path / "llama")


def test_a_run_of_translation(tmp_path: Path) -> None:
    save_tiny_t5(tmp_path / "model")
    other = dict(zip(WORDS, WORDS[1:] + WORDS[:1], strict=True))
    draw = random.Random(0)
    sources = [draw.choices(WORDS[:6], k=draw.randint(1, 3)) for _ in range(240)]
    rows = [
        {"source": f"{i % 7} " + " ".join(s), "target": " ".join(other[w] for w in s[:1])}
        for i, s in enumerate(sources)
    ]
    results = run_task(tmp_path, rows, {**LEARNS, "learning_rate": 1e-2}, max_new_tokens=8)
    assert results["test_rougeL"] > 0.5 and results["test_exact_match"] > 0.5, results
    outputs = [
        json.loads(line) for line in (tmp_path / "run" / "outputs.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    wanted = {row["source"]: row["target"] for row in rows}
    assert len(outputs) == results["test_samples"]
    assert all(output["reference"] == wanted[output["prompt"]] for output in outputs)
    for key, name in (("base", "test_before_exact_match"), ("tuned", "test_exact_match")):
        right = [output[key].strip() == output["reference"] for output in outputs]
        assert results[name] == pytest.approx(sum(right) / len(right))
    assert results["test_before_rougeL"] < results["test_rougeL"]
    check_reload(tmp_path)


# -- question answering ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tokenizers import processors

    path = tmp_path_factory.mktemp("reader")
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer([*WORDS, "what", "is", "?", "the"])
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.save_pretrained(path)
    config = BertConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **SIZES)
    BertForQuestionAnswering(config).save_pretrained(path)
    return path


def question(context: str, *answers: tuple[str, int], asked: str = "what is good ?") -> Row:
    found = {"text": [text for text, _ in answers], "answer_start": [start for _, start in answers]}
    return Row({"question": asked, "context": context, "answers": found}, 1)


def test_answers_that_are_none() -> None:
    task = QuestionAnswering()
    good = question("the film is good", ("film", 4))
    assert task.problem(good) is None and task.problem(question("the film")) is None
    assert task.problem(Row({**good.values, "answers": "film"}, 1)) is None
    assert task.answers(Row({**good.values, "answers": "film"}, 1)) == [("film", 4)]
    for answers, words in (
        ("book", "does not hold"), (3, "neither"), ({"text": ["film"]}, "equally many"),
        ({"text": ["film"], "answer_start": [5]}, "does not stand"), ({"text": [""], "answer_start": [0]}, "empty text"),
        ({"text": ["film"], "answer_start": [-1]}, "wrong answer_start"),
    ):  # fmt: skip
        assert words in str(task.problem(Row({**good.values, "answers": answers}, 1)))
    for answers in (None, ""):
        assert "an empty 'answers' (where the context has no answer, write an empty list)" in str(
            task.problem(Row({**good.values, "answers": answers}, 1))
        )
    several = Row({**good.values, "answers": ["film", "good"]}, 1)
    assert task.problem(several) is None and task.answers(several) == [("film", 4), ("good", 12)]
    with pytest.raises(InputError, match="No training row has an answer in 'answers'"):
        task.fitted([question("the film")])
    assert not task.fitted([good]).unanswerable and task.fitted([good, question("the film")]).unanswerable


def test_long_contexts_are_read_in_windows(reader: Path) -> None:
    """Every window holds the question, all of them together the context, and the answer's tokens are labelled there."""
    task, tokenizer = QuestionAnswering(), QuestionAnswering().load_tokenizer(reader)
    words = ["film", "book"] * 15
    words[17] = "great"
    context = " ".join(words)
    examples = task.encode([question(context, ("great", context.index("great")))], tokenizer, 20)
    assert len(examples) > 2
    covered = set()
    for item, window in zip(examples.items, examples.sources or (), strict=True):
        assert len(item["input_ids"]) <= 20
        assert tokenizer.decode(item["input_ids"]).startswith("[CLS] what is good ? [SEP]")
        covered |= {at for at in window.offsets if at is not None}
        first, last = item["labels"]
        held = [at for at in window.offsets if at is not None and context[slice(*at)] == "great"]
        assert (tokenizer.convert_ids_to_tokens(item["input_ids"][first : last + 1]) == ["great"]) == bool(held)
        if not held:
            assert (first, last) == (0, 0)
    assert len(covered) == len(words)
    assert any(item["labels"] != [0, 0] for item in examples.items)
    cut = task.encode([question("good film", ("film", 5), asked="what is " * 20)], tokenizer, 20)
    assert cut.n_truncated == 1 and len(cut[0]["input_ids"]) <= 20


def test_the_loss_of_an_answer_leaves_padding_out(reader: Path) -> None:
    """Alone and in a padded batch the loss is that of log softmax over the example's own tokens."""
    task, tokenizer = QuestionAnswering(), QuestionAnswering().load_tokenizer(reader)
    model = task.load_model(reader)[0].double().eval()
    rows = [
        question("the film is good", ("film", 4)),
        question("good film book the great film book", ("great film", 19)),
    ]
    examples = task.encode(rows, tokenizer, 30)
    batch = task.collator(tokenizer)([examples[0], examples[1]])
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    together = LOSSES[task.loss].per_example(model(**inputs), batch)
    for item, loss in zip(examples.items, together, strict=True):
        one = model(**{key: torch.tensor([item[key]]) for key in inputs})
        first, last = item["labels"]
        wanted = -(F.log_softmax(one.start_logits[0], 0)[first] + F.log_softmax(one.end_logits[0], 0)[last]) / 2
        assert loss.item() == pytest.approx(wanted.item(), rel=1e-6)
    loss = LOSSES[task.loss]
    drawn = torch.stack([loss.sample_labels(model(**inputs), batch, None) for _ in range(300)])
    real = batch["attention_mask"].sum(1)
    assert drawn.shape == (300, 2, 2) and (drawn < real[None, :, None]).all()
    share = (drawn[:, 1, 0] == 3).double().mean().item()
    assert share == pytest.approx(F.softmax(model(**inputs).start_logits[1], 0)[3].item(), abs=0.08)
    shut = batch["attention_mask"] == 0
    ends = (model(**inputs).start_logits, model(**inputs).end_logits)
    best = torch.stack([logits.masked_fill(shut, -1e9).argmax(-1) for logits in ends], 1)
    assert loss.metric(model(**inputs), {**batch, "labels": best}).tolist() == [1, 1]
    with pytest.raises(InputError, match="start_logits"):
        loss.per_example(torch.zeros(2, 3), batch)


def test_the_best_span_is_in_the_context_in_order_and_short() -> None:
    draw = np.random.default_rng(0)
    for _ in range(50):
        length = 40
        scores = draw.normal(size=(length + 3, 2))
        offsets = [(2 * i, 2 * i + 1) if 4 <= i < 38 else None for i in range(length)]
        pairs = [(i, j) for i in range(4, 38) for j in range(i, min(i + 30, 38))]
        i, j = max(pairs, key=lambda pair: scores[pair[0], 0] + scores[pair[1], 1])
        assert best_span(scores, offsets) == (pytest.approx(scores[i, 0] + scores[j, 1]), 2 * i, 2 * j + 1)
    scores = np.zeros((40, 2))
    scores[4, 0], scores[33, 1], scores[34, 1] = 9, 8, 9  # up to the last it would be 31 tokens
    assert best_span(scores, offsets)[1:] == (8, 67)
    assert best_span(np.zeros((3, 2)), [None, None]) is None


def test_squad_metrics(reader: Path) -> None:
    assert shared_words("The great film!", "a great book") == 0.5
    assert shared_words("the film", "Film.") == 1 and shared_words("", "the") == 1 and shared_words("", "film") == 0
    task, tokenizer = QuestionAnswering(), QuestionAnswering().load_tokenizer(reader)
    rows = [
        question("the great film", ("great film", 4), ("film", 10)),
        question("good book", ("book", 5)),
        question("good book"),
    ]
    examples = task.encode(rows, tokenizer, 30)
    scores = np.full((3, 12, 2), -1.0)
    scores[0, [8, 8], [0, 1]] = 5  # film
    scores[1, [6, 7], [0, 1]] = 5  # good book
    scores[2, [6, 7], [0, 1]] = 5
    scores[2, 0] = 6  # none
    prediction = EvalPrediction(scores, np.zeros((3, 2)))
    found = task.compute_metrics(prediction, examples, tokenizer)
    assert found == pytest.approx({"exact_match": 1 / 3, "f1": (1 + 2 / 3 + 0) / 3})
    found = task.fitted(rows).compute_metrics(prediction, examples, tokenizer)
    assert found == pytest.approx({"exact_match": 2 / 3, "f1": (1 + 2 / 3 + 1) / 3})


def test_a_run_of_questions(reader: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(reader, tmp_path / "model")
    draw = random.Random(0)
    rows = []
    for i in range(160):
        words = draw.choices(["film", "book", "very", "not"], k=6)
        words[draw.randrange(6)] = draw.choice(["great", "dull"])
        text = next(word for word in words if word in ("great", "dull"))
        context = " ".join([*words, *["the"] * (i % 4)])
        answer = {"text": [text], "answer_start": [context.index(text)]}
        rows.append({"question": "what is ?", "context": context, "answers": answer})
    results = run_task(tmp_path, rows, {**LEARNS, "learning_rate": 3e-3})
    assert results["test_f1"] > 0.9 and results["test_exact_match"] > 0.9, results
    check_reload(tmp_path)


# -- masked tokens --------------------------------------------------------------------------------------------------


def test_held_out_masks_stay_and_others_move(tmp_path: Path) -> None:
    save_tiny_masked(tmp_path)
    task = MaskedLM()
    tokenizer = task.load_tokenizer(tmp_path)
    rows = [Row({"text": "good film very bad book " * 4}, 1), Row({"text": "fine"}, 2), Row({"text": "zzz"}, 3)]
    examples = task.encode(rows, tokenizer, 40)
    assert len(examples) == 2 and list(examples.lost.values()) == [[3]]
    held = task.held_out(examples, tokenizer)
    collate = task.collator(tokenizer)
    one, two = (collate([held[0], held[1]]) for _ in range(2))
    assert all(torch.equal(one[key], two[key]) for key in one)
    drawn = collate([examples[0]])["labels"]
    assert torch.equal(task.collator(tokenizer)([examples[0], examples[1]])["labels"][:1], drawn), "of the text alone"
    collate.epoch = 1
    assert not torch.equal(collate([examples[0]])["labels"], drawn)
    for batch in (one, collate([examples[0], examples[1]])):
        hidden = batch["labels"] != -100
        assert hidden.any(1).all()
        whole = batch["input_ids"].where(~hidden, batch["labels"])
        assert whole[0].tolist() == examples[0]["input_ids"]
        assert not hidden[:, 0].any()  # [CLS] is never hidden


def test_the_perplexity_of_hidden_tokens(tmp_path: Path) -> None:
    save_tiny_masked(tmp_path)
    task = MaskedLM()
    model, tokenizer = task.load_model(tmp_path)[0].eval(), task.load_tokenizer(tmp_path)
    rows = [Row({"text": "good film very bad book " * n}, 1) for n in (1, 2, 4)]
    held = task.held_out(task.encode(rows, tokenizer, 40), tokenizer)
    batch = task.collator(tokenizer)([held[i] for i in range(3)])
    with torch.no_grad():
        outputs = model(**batch)
    sums = task.reduced(outputs.logits, batch["labels"])
    found = task.compute_metrics(EvalPrediction(sums.numpy(), batch["labels"].numpy()))
    assert found["perplexity"] == pytest.approx(math.exp(outputs.loss.item()), rel=1e-5)


def test_models_that_hide_nothing(tmp_path: Path) -> None:
    save_tiny_bert(tmp_path / "bert")  # its tokenizer has no mask, its weights no such head
    with pytest.raises(InputError, match="no mask token"):
        MaskedLM().load_tokenizer(tmp_path / "bert")
    BertModel(BertConfig(vocab_size=17, **SIZES)).save_pretrained(tmp_path / "bert")
    with pytest.raises(InputError, match="no masked language modelling head"):
        MaskedLM().load_model(tmp_path / "bert")


def test_a_run_of_masked_tokens(tmp_path: Path) -> None:
    save_tiny_masked(tmp_path / "model")
    draw = random.Random(0)
    rows = [{"text": " ".join([w, w, w, w, w, w, str(i)])} for i, w in enumerate(draw.choices(WORDS, k=160))]
    results = run_task(tmp_path, rows, {**LEARNS, "num_train_epochs": 8}, task="masked_lm")
    assert results["test_perplexity"] < 14 and results["test_token_accuracy"] > 0.6, results  # of 18 words
    check_reload(tmp_path)
