"""Causal language modelling: what the loss is taken of, metrics against plain computations, and whole runs."""

from __future__ import annotations

import math
import random
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers import models as models_of_tokens
from torch.nn import functional as F
from transformers import (
    BlenderbotSmallConfig,
    BlenderbotSmallForCausalLM,
    EvalPrediction,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
)

from command_line import reltune
from reltune.data.rows import Row
from reltune.errors import InputError
from reltune.notes import collecting
from reltune.runs.training import arguments
from reltune.tasks.causal_lm import CausalLM, token_metrics, token_sums
from reltune.tasks.generation import continuations
from reltune.tasks.texts import tokens_of
from task_cases import check_reload, run_task, write_rows
from tiny_models import CHAT, save_tiny_bert, save_tiny_gpt2, save_tiny_llama, tiny_decoder_tokenizer

MARKED = (
    "{% for m in messages %}<|{{ m['role'] }}|> {% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }} <|end|>{% endgeneration %}{% else %}{{ m['content'] }} <|end|>{% endif %} "
    "{% endfor %}{% if add_generation_prompt %}<|assistant|> {% endif %}"
)
OPPOSITES = {"good": "bad", "great": "dull", "fine": "poor", "好": "坏"}
COMPLETION = {"prompt": "prompt", "completion": "completion"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_tiny_llama(folder / "llama")
    save_tiny_llama(folder / "chat", chat_template=CHAT)
    save_tiny_gpt2(folder / "gpt2")
    return folder


def encoded(task: CausalLM, model: Path, max_length: int = 40, **values: object):
    """The words that go in, and those that the loss is taken of."""
    tokenizer = task.load_tokenizer(model)
    row = Row(values, 3)
    assert task.problem(row) is None
    examples = task.encode([row], tokenizer, max_length)
    if not len(examples):
        return examples
    item = examples[0]
    words = tokenizer.convert_ids_to_tokens(item["input_ids"])
    kept = [word for word, label in zip(words, item["labels"], strict=True) if label != -100]
    assert [label for label in item["labels"] if label != -100] == tokenizer.convert_tokens_to_ids(kept)
    return " ".join(words), " ".join(kept), examples.sources[0]


def test_the_loss_is_of_the_completion(models: Path) -> None:
    task = CausalLM(columns=COMPLETION)
    words, kept, source = encoded(task, models / "llama", prompt="good film", completion=" bad book")
    assert words == "good film bad book <|endoftext|>" and kept == "bad book <|endoftext|>"
    assert (source.text, source.reference) == ("good film", " bad book")
    whole = CausalLM(columns=COMPLETION, completion_only_loss=False)
    assert encoded(whole, models / "llama", prompt="good film", completion=" bad book")[1] == words
    text = encoded(CausalLM(columns={"text": "text"}), models / "llama", text="very good film")
    assert text == ("very good film <|endoftext|>", "very good film <|endoftext|>", None)


def test_chats_and_instructions_follow_the_template(models: Path) -> None:
    turns = [
        {"role": "user", "content": "good film"},
        {"role": "assistant", "content": "bad"},
        {"role": "user", "content": "fine"},
        {"role": "assistant", "content": "poor book"},
    ]
    task = CausalLM(columns={"messages": "messages"})
    words, kept, (prompt, shown, reference, *_) = encoded(task, models / "chat", messages=turns)
    assert (
        words
        == "<|user|> good film <|end|> <|assistant|> bad <|end|> <|user|> fine <|end|> <|assistant|> poor book <|end|>"
    )
    assert kept == "bad <|end|> poor book <|end|>"
    assert reference == "poor book <|end|>"  # what the model writes that learned it: this mark is no special token here
    assert shown == "user: good film\nassistant: bad\nuser: fine"
    tokenizer = task.load_tokenizer(models / "chat")
    assert tokenizer.decode(prompt) == words.removesuffix(" poor book <|end|>")
    # a template that marks what the assistant writes is taken at its word
    tokenizer.chat_template = MARKED
    item = task.encode([Row({"messages": turns}, 1)], tokenizer, 40)[0]
    assert item["labels"] == [
        -100 if i not in (5, 6, 11, 12, 13) else token for i, token in enumerate(item["input_ids"])
    ]
    assert tokenizer.decode([label for label in item["labels"] if label != -100]) == kept

    pair = CausalLM(columns=COMPLETION)
    assert encoded(pair, models / "chat", prompt=turns[:3], completion=turns[3:])[1] == "poor book <|end|>"
    instruction = CausalLM(columns={"instruction": "instruction", "input": "input", "output": "output"})
    given = {"instruction": "very good", "input": "film", "output": "bad"}
    words, kept, source = encoded(instruction, models / "chat", **given)
    assert source.text == "very good\n\nfilm"
    assert words == "<|user|> very good film <|end|> <|assistant|> bad <|end|>" and kept == "bad <|end|>"
    # without a template, Alpaca's headings, which this vocabulary has no words for
    assert encoded(instruction, models / "llama", **given)[1] == "bad <|endoftext|>"
    with pytest.raises(InputError, match="no chat template"):
        encoded(task, models / "llama", messages=turns)


def byte_tokenizer(template: str = "$A") -> PreTrainedTokenizerFast:
    """Letters, and of " p" and "qu" one token each; ``template`` says what stands around a text."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["</s>", "<s>", *letters, "Ġp", "qu"])}
    backend = Tokenizer(models_of_tokens.BPE(vocabulary, [("Ġ", "p"), ("q", "u")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("</s>", 0), ("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", bos_token="<s>", pad_token="</s>")


@pytest.mark.parametrize("template", ["$A", "$A </s>", "<s> $A", "<s> $A </s>"])
@pytest.mark.parametrize(
    ("prompt", "completion", "reference", "merged"),
    [
        ("a b", " paris", " paris", False),
        ("a b ", "paris", " paris", True),
        ("a q", "ua", "qua", True),
        ("a ", "b", "b", False),
    ],
)
def test_the_model_is_asked_to_go_on_from_what_training_has(
    template: str, prompt: str, completion: str, reference: str, merged: bool
) -> None:
    """No end of sequence before the answer, and no half of a token; special tokens once."""
    tokenizer = byte_tokenizer(template)
    with collecting() as notes:
        examples = CausalLM(columns=COMPLETION).encode(
            [Row({"prompt": prompt, "completion": completion}, 1)], tokenizer, 40
        )
    item, asked = examples[0], (examples.sources or [])[0]
    ids, labels = item["input_ids"], item["labels"]
    assert ids[: len(asked.ids)] == asked.ids
    assert labels == [-100] * len(asked.ids) + ids[len(asked.ids) :]
    assert tokenizer.decode(ids, skip_special_tokens=True) == prompt + completion
    assert asked.reference == reference == tokenizer.decode(ids[len(asked.ids) :], skip_special_tokens=True)
    assert asked.text + reference == prompt + completion
    assert ids.count(0) == 1 and ids[-1] == 0 and ids.count(1) == template.count("<s>")
    assert bool(notes) == merged and all("end within a token" in sentence for sentence in notes)


def test_special_tokens_that_texts_have_already_are_taken_once() -> None:
    tokenizer = byte_tokenizer("<s> $A </s>")
    task = CausalLM(columns={"text": "text"})
    with collecting() as notes:
        examples = task.encode([Row({"text": text}, 1) for text in ("<s>ab</s>", "ab", "<s>ab")], tokenizer, 40)
    assert examples[0] == examples[1] == examples[2]
    assert len(notes) == 2 and "'<s>'" in notes[0] and "'</s>'" in notes[1]


@pytest.mark.parametrize(
    ("prompt", "completion", "words"),
    [
        ("is", "paris", "nothing is put between"),
        ("is", " paris", None),
        ("2+2=", "a", None),
        ("人", "人", None),
        ("is", " paris<|im_end|>", "'<|im_end|>', with which other models end"),
        ("is", " paris</s>", None),
    ],
)
def test_texts_that_were_written_for_another_reader_are_said(prompt: str, completion: str, words: str | None) -> None:
    with collecting() as notes:
        CausalLM(columns=COMPLETION).encode(
            [Row({"prompt": prompt, "completion": completion}, line) for line in (1, 2)], byte_tokenizer(), 40
        )
    assert len(notes) == bool(words) and all(str(words) in sentence for sentence in notes)


def test_an_end_with_space_behind_it_is_an_end() -> None:
    tokenizer, task = byte_tokenizer(), CausalLM(columns={"text": "text"})
    examples = task.encode([Row({"text": text}, 1) for text in ("ab</s>\n", "ab\n")], tokenizer, 40)
    assert [item["input_ids"].count(0) for item in examples.items] == [1, 1]
    assert examples[0]["input_ids"][-1] != 0 and examples[1]["input_ids"][-1] == 0


def test_answers_that_the_model_cannot_write_are_said(models: Path) -> None:
    tokenizer, task = byte_tokenizer(), CausalLM(columns=COMPLETION, max_new_tokens=3)
    model, _ = CausalLM().load_model(models / "llama")
    rows = [Row({"prompt": "a", "completion": completion}, 1) for completion in (" bcd", " bc", " b")]
    (remark,) = task.remarks(model, tokenizer, task.encode(rows, tokenizer, 40))
    assert remark.startswith("1 of 3 answers are longer than the 3 tokens")
    words = task.load_tokenizer(models / "llama")
    rows = [Row({"prompt": "good", "completion": completion}, 1) for completion in (" {fine} book", " fine book")]
    (remark,) = task.remarks(model, words, task.encode(rows, words, 40))
    assert CausalLM().remarks(model, words, CausalLM().encode([Row({"text": "good"}, 1)], words, 40)) == []
    assert "cannot write 1 of 2 answers" in remark and "'{fine} book' becomes 'book'" in remark


def test_what_stands_behind_the_last_answer_is_none_of_it(models: Path) -> None:
    tokenizer = CausalLM().load_tokenizer(models / "llama")
    tokenizer.chat_template = CHAT
    task = CausalLM(columns={"messages": "messages"})
    said = [("user", "good film"), ("assistant", "very good"), ("user", "not bad")]
    row = Row({"messages": [{"role": role, "content": words} for role, words in said]}, 1)
    model, _ = task.load_model(models / "llama")
    assert not any(
        "cannot write" in remark for remark in task.remarks(model, tokenizer, task.encode([row], tokenizer, 40))
    )


def test_the_end_of_text_may_be_the_unknown_token() -> None:
    with collecting() as notes:
        assert tokens_of("good <|endoftext|>", tiny_decoder_tokenizer()) == [1, 0]
    assert notes == []


def test_a_tokenizer_without_an_end() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    with collecting() as notes:
        examples = CausalLM(columns={"text": "text"}).encode([Row({"text": "ab"}, 1)] * 2, tokenizer, 40)
    assert tokenizer.decode(examples[0]["input_ids"]) == "ab"
    assert len(notes) == 1 and "no end-of-sequence token" in notes[0]


def test_cut_rows_are_counted_and_those_without_a_label_named(models: Path) -> None:
    task = CausalLM(columns=COMPLETION)
    assert encoded(task, models / "llama", 3, prompt="good film", completion=" bad book")[1] == "bad"
    examples = encoded(task, models / "llama", 2, prompt="good film", completion=" bad book")
    assert (len(examples), examples.lost, examples.n_truncated) == (0, {"a prompt of 2 tokens or more": [3]}, 1)


@pytest.mark.parametrize(
    ("columns", "values", "words"),
    [
        ({"text": "text"}, {"text": " "}, "empty 'text'"),
        (COMPLETION, {"prompt": "good", "completion": None}, "empty 'completion'"),
        (COMPLETION, {"prompt": 3, "completion": "good"}, "no string"),
        (COMPLETION, {"prompt": "good", "completion": [{"role": "assistant", "content": "x"}]}, "one is a text"),
        ({"messages": "messages"}, {"messages": "good"}, "no list of messages"),
        ({"messages": "messages"}, {"messages": []}, "empty 'messages'"),
        ({"messages": "messages"}, {"messages": [{"content": "good"}]}, "no role"),
        ({"messages": "messages"}, {"messages": [{"role": "assistant"}]}, "no content"),
        ({"messages": "messages"}, {"messages": [{"role": "user", "content": "good"}]}, "assistant says nothing"),
        ({"instruction": "instruction", "output": "output"}, {"instruction": "do", "output": ["x"]}, "no string"),
    ],
)
def test_bad_rows(columns: dict[str, str], values: dict[str, object], words: str) -> None:
    found = CausalLM(columns=columns).problem(Row(values, 1))
    assert found is not None and words in found


def test_metrics_are_of_all_tokens_alike(models: Path) -> None:
    """Against one forward pass per example, without padding, in float64."""
    task = CausalLM(columns={"text": "text"})
    model, missing = task.load_model(models / "llama")
    assert missing == []
    tokenizer = task.load_tokenizer(models / "llama")
    texts = ["good film", "very bad book not fine", "电影", "dull dull dull dull"]
    examples = task.encode([Row({"text": text}, 1) for text in texts], tokenizer, 30)
    batch = task.collator(tokenizer)([examples[i] for i in range(4)])
    with torch.no_grad():
        sums = task.reduced(
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits, batch["labels"]
        )
        losses, right = [], []
        for item in examples.items:
            ids = torch.tensor([item["input_ids"]])
            logits = model(input_ids=ids).logits[0, :-1].double()
            losses += F.cross_entropy(logits, ids[0, 1:], reduction="none").tolist()
            right += (logits.argmax(-1) == ids[0, 1:]).tolist()
    found = task.compute_metrics(EvalPrediction(sums.numpy(), batch["labels"].numpy()), examples)
    assert found["perplexity"] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)
    assert found["token_accuracy"] == pytest.approx(sum(right) / len(right))
    assert token_metrics(torch.zeros(1, 3).numpy()) == {"perplexity": 1.0, "token_accuracy": 0.0}
    assert token_sums(torch.zeros(1, 2, 5), torch.tensor([[3, -100]])).tolist() == [[pytest.approx(math.log(5)), 1, 0]]


def test_continuations_are_those_of_single_prompts(models: Path, tmp_path: Path) -> None:
    """Padding and batches change nothing: against a loop that takes the likeliest token, one prompt at a time."""
    save_tiny_opt(models / "opt")
    save_tiny_blenderbot(models / "blenderbot")
    for name in ("llama", "gpt2", "opt", "blenderbot"):
        task = CausalLM(columns={"text": "text"})
        model, _ = task.load_model(models / name)
        model.eval()
        for parameter in model.parameters():
            parameter.data.mul_(20)  # else the same token is likeliest after any prompt
        tokenizer = task.load_tokenizer(models / name)
        drawn = torch.Generator().manual_seed(0)
        prompts = [torch.randint(1, 12, (n,), generator=drawn).tolist() for n in (1, 2, 3, 5, 8, 4, 1, 6)]
        expected = []
        for prompt in prompts:
            ids = list(prompt)
            for _ in range(6):
                with torch.no_grad():
                    ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
                if ids[-1] == tokenizer.eos_token_id:
                    break
            expected.append(tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True))
        assert len(set(expected)) > 3
        assert continuations(model, tokenizer, prompts, 6, batch_size=8) == expected


def test_packed_examples_do_not_see_each_other(models: Path, tmp_path: Path) -> None:
    """The loss of two packed examples is the mean over the tokens of both, each in a batch of its own."""
    task = CausalLM(columns={"text": "text"}, packing=True, max_length=9)
    model, _ = task.load_model(models / "llama")
    tokenizer = task.load_tokenizer(models / "llama")
    texts = ["good film very", "bad book not", "fine fine fine fine fine fine fine fine"]
    examples = task.encode([Row({"text": text}, 1) for text in texts], tokenizer, 30)
    args = arguments(str(tmp_path), "full", 0, {"use_cpu": True, "eval_strategy": "no"}, task)
    trainer = task.trainer(model.eval(), args, tokenizer, examples)
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["input_ids"].shape == (1, 17) and len(trainer.train_dataset) == 2  # 4 + 4 beside 9
    with torch.no_grad():
        packed = trainer.compute_loss(model, dict(batch))
        losses = []
        for item in examples.items:
            ids = torch.tensor([item["input_ids"]])
            losses += F.cross_entropy(model(input_ids=ids).logits[0, :-1], ids[0, 1:], reduction="none").tolist()
    assert float(packed) == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_packing_is_refused_where_packed_examples_see_each_other(models: Path, tmp_path: Path) -> None:
    packed = CausalLM(columns={"text": "text"}, packing=True)
    assert packed.misfit_of_model(packed.load_model(models / "llama")[0]) is None
    save_tiny_opt(tmp_path / "opt")
    opt = packed.load_model(tmp_path / "opt")[0].train()
    assert "'opt' model, in which packed examples see each other" in str(packed.misfit_of_model(opt))
    assert opt.training and CausalLM(columns={"text": "text"}).misfit_of_model(opt) is None
    rows = write_rows(tmp_path / "rows.jsonl", opposites(40))
    words = ["--train_file", rows, "--output_dir", tmp_path / "run", "--task", "causal_lm", "--packing"]
    answer = reltune("run", "--model_name_or_path", tmp_path / "opt", *words)
    assert answer.code == 2 and "leave --packing out" in answer.err and not (tmp_path / "run").exists()


def test_a_turn_that_the_cut_takes_is_not_asked_for(models: Path) -> None:
    """The model writes the last turn: not where the turns before it are cut, or where there are none."""
    task = CausalLM(columns={"messages": "messages"})
    tokenizer = task.load_tokenizer(models / "chat")
    first, last = (
        [{"role": "user", "content": "good"}, {"role": "assistant", "content": word}] for word in ("bad", "poor")
    )
    rows = [Row({"messages": turns}, 1) for turns in ([*first, *last], first, first[1:])]
    found = task.encode(rows, tokenizer, 8)
    assert [source and source.reference for source in found.sources or ()] == [None, "bad <|end|>", None]
    # of a turn with nothing before it, its own words are the answer, not the marks before them
    labels = found.items[2]["labels"]
    assert tokenizer.decode([of for of in labels if of != -100]).split() == ["bad", "<|end|>"]


def test_what_ends_a_chats_answers_ends_a_continuation(models: Path) -> None:
    task = CausalLM(columns={"text": "text"})
    (model, _), tokenizer = task.load_model(models / "llama"), task.load_tokenizer(models / "llama")
    for parameter in model.parameters():
        parameter.data.mul_(20)
    prompts = [[7, 8], [9, 12, 7]]
    whole = [text.split() for text in continuations(model, tokenizer, prompts, 6, 1)]
    stop = whole[0][1]
    found = continuations(model, tokenizer, prompts, 6, 1, stops=[tokenizer.convert_tokens_to_ids(stop)])
    assert [text.split() for text in found] == [
        words[: words.index(stop) + 1] if stop in words else words for words in whole
    ]
    assert found[0].split() != whole[0]
    # what the checkpoint says of chats changes nothing: sampling, penalties, least lengths
    model.generation_config.update(
        do_sample=True, temperature=5.0, repetition_penalty=9.0, min_new_tokens=6, no_repeat_ngram_size=1
    )
    assert [text.split() for text in continuations(model, tokenizer, prompts, 6, 1)] == whole
    assert continuations(model, tokenizer, [], 6, 1) == []


def save_tiny_blenderbot(path: Path) -> None:
    """Save a decoder that counts positions by itself, padding or not, with the tokenizer of a GPT-2."""
    save_tiny_gpt2(path)
    torch.manual_seed(0)
    sizes = {"decoder_layers": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 64, "max_position_embeddings": 32}
    config = BlenderbotSmallConfig(
        vocab_size=14,
        d_model=32,
        is_decoder=True,
        is_encoder_decoder=False,
        pad_token_id=0,
        eos_token_id=0,
        forced_eos_token_id=None,
        **sizes,
    )
    BlenderbotSmallForCausalLM(config).save_pretrained(path)


def save_tiny_opt(path: Path) -> None:
    """Save an OPT, which counts positions by itself, with the tokenizer of a GPT-2."""
    save_tiny_gpt2(path)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = OPTConfig(
        vocab_size=14,
        word_embed_proj_dim=32,
        max_position_embeddings=64,
        pad_token_id=0,
        eos_token_id=0,
        bos_token_id=0,
        **sizes,
    )
    OPTForCausalLM(config).save_pretrained(path)


def opposites(count: int, seed: int = 0) -> list[dict[str, str]]:
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        words = draw.choices(list(OPPOSITES), k=2)
        others = " ".join(draw.choices(["film", "book", "very"], k=draw.randint(1, 4)))
        rows.append(
            {"prompt": f"{others} {' '.join(words)} not", "completion": " " + " ".join(OPPOSITES[w] for w in words)}
        )
    return rows


@pytest.mark.parametrize("packing", [False, True])
def test_a_run_learns_to_complete(tmp_path: Path, packing: bool) -> None:
    save_tiny_llama(tmp_path / "model", hidden_size=64, intermediate_size=128)
    training = {
        "num_train_epochs": 20,
        "learning_rate": 1e-2,
        **({"per_device_train_batch_size": 4} if packing else {}),
    }
    results = run_task(tmp_path, opposites(160), training, packing=packing)
    # the frozen head keeps its small random weights, so that no token gets all the probability
    assert results["test_perplexity"] < 8 and results["test_exact_match"] > 0.8, results
    assert results["test_perplexity"] == pytest.approx(math.exp(results["test_loss"]), rel=0.05)
    assert results["test_generations"] == results["test_samples"]
    if not packing:
        check_reload(tmp_path)


def test_a_bert_is_no_decoder(tmp_path: Path) -> None:
    save_tiny_bert(tmp_path)
    with pytest.raises(InputError, match="masked_lm"):
        CausalLM().load_model(tmp_path)


def test_texts_to_go_on_from(models: Path) -> None:
    """As training has them before what follows: without the end that the tokenizer adds, with special tokens that stand there."""
    from tokenizers.processors import TemplateProcessing

    from reltune.tasks.causal_lm import _opened

    tokenizer = CausalLM().load_tokenizer(models / "llama")
    good, end = tokenizer("good")["input_ids"], tokenizer.eos_token
    assert _opened("good", tokenizer).ids == good
    assert _opened(f"good {end}", tokenizer).ids == [*good, tokenizer.eos_token_id]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"$A {end}", special_tokens=[(end, tokenizer.eos_token_id)]
    )
    assert _opened("good", tokenizer).ids == good
