import json
import logging
import math
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BertForSequenceClassification,
    ByT5Tokenizer,
    EvalPrediction,
    RobertaConfig,
    ViTConfig,
)
from transformers.utils import logging as transformers_logging

from reltune.data.rows import Row
from reltune.errors import InputError
from reltune.losses import LOSSES
from reltune.tasks.sequence_classification import SequenceClassification
from tiny_models import save_tiny_bert, save_tiny_gpt2, tiny_decoder_tokenizer, tiny_tokenizer


def row(text, label, line):
    return Row({"text": text, "label": label}, line)


TASK = SequenceClassification(["差评", "好评", "neutral"])
ROWS = [row("good film", "好评", 2), row("电影 坏 " * 40, "差评", 3), row("fine", "neutral", 4)]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    save_tiny_bert(folder / "bert")
    save_tiny_bert(folder / "two", labels=["no", "yes"])
    save_tiny_bert(folder / "three", labels=TASK.labels)
    save_tiny_gpt2(folder / "gpt2")
    return folder


@pytest.fixture
def bert(models, tmp_path):
    """A copy of the tiny BERT to damage."""
    return shutil.copytree(models / "bert", tmp_path / "bert")


@pytest.fixture
def logged():
    """What transformers logs; its root logger passes nothing on, so caplog sees nothing."""
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    transformers_logging.add_handler(handler)
    yield records
    transformers_logging.remove_handler(handler)


def change_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    save_file(change(weights), folder / "model.safetensors", metadata={"format": "pt"})


def change_config(folder, **values):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


def error_of(call, *arguments):
    with pytest.raises(InputError) as caught:
        call(*arguments)
    message = str(caught.value)
    assert "\n" not in message and "Traceback" not in message
    return message


@pytest.mark.parametrize(
    ("labels", "order"),
    [
        (["b", "a", "b", "B"], ["B", "a", "b"]),
        (["10", "9", "-1", "2.5"], ["-1", "2.5", "9", "10"]),
        (["x", "10", "9"], ["9", "10", "x"]),
        (["差评", "好评"], ["好评", "差评"]),  # U+597D, U+5DEE
        (["nan", "inf", "1_0", "1"], ["1", "1_0", "inf", "nan"]),
    ],
)
def test_labels_are_sorted(labels, order):
    task = SequenceClassification().fitted([row("t", label, 1) for label in labels])
    assert task.labels == order
    assert (task.name, task.peft_task_type) == ("sequence_classification", "SEQ_CLS")


def test_missing_head_is_named_and_nothing_else_is_logged(models, logged, capfd):
    model, missing = TASK.load_model(models / "bert")
    assert missing == ["classifier.bias", "classifier.weight"]
    assert model.classifier.weight.shape == (3, 32)
    assert model.config.id2label == {0: "差评", 1: "好评", 2: "neutral"}
    assert model.config.label2id == {"差评": 0, "好评": 1, "neutral": 2}
    saved = load_file(models / "bert" / "model.safetensors")
    for name, value in saved.items():
        assert torch.equal(model.get_parameter(f"bert.{name}"), value)
    assert logged == []
    assert capfd.readouterr().err == ""
    assert transformers_logging.is_progress_bar_enabled()


def test_pooler_of_a_masked_language_model_is_missing_too(bert, logged):
    change_weights(bert, lambda weights: {k: v for k, v in weights.items() if "pooler" not in k})
    _, missing = TASK.load_model(bert)
    assert missing == [
        "bert.pooler.dense.bias",
        "bert.pooler.dense.weight",
        "classifier.bias",
        "classifier.weight",
    ]
    assert logged == []


def test_a_layer_without_weights_is_logged(bert, logged):
    change_config(bert, num_hidden_layers=3)
    _, missing = TASK.load_model(bert)
    assert "bert.encoder.layer.2.output.dense.weight" in missing and len(missing) == 16 + 2
    assert len(logged) == 1 and "LOAD REPORT" in logged[0]


def test_other_warnings_pass(bert, logged, monkeypatch):
    logger = logging.getLogger("transformers.modeling_utils")
    tie_weights = BertForSequenceClassification.tie_weights

    def warn(self, *arguments, **options):
        logger.warning("a real warning")
        return tie_weights(self, *arguments, **options)

    monkeypatch.setattr(BertForSequenceClassification, "tie_weights", warn)
    TASK.load_model(bert)
    assert set(logged) == {"a real warning"}


def test_head_of_another_size_or_for_other_labels_must_be_learned(models):
    head = ["classifier.bias", "classifier.weight"]
    model, missing = TASK.load_model(models / "two")
    assert missing == head and model.classifier.weight.shape == (3, 32)
    model, missing = TASK.load_model(models / "three")
    assert missing == []
    saved = load_file(models / "three" / "model.safetensors")
    assert torch.equal(model.classifier.weight, saved["classifier.weight"])
    assert SequenceClassification(["x", "y", "z"]).load_model(models / "three")[1] == head
    assert SequenceClassification(TASK.labels[::-1]).load_model(models / "three")[1] == head


def test_head_that_contradicts_its_config_must_be_learned(models, tmp_path):
    folder = shutil.copytree(models / "three", tmp_path / "three")
    change_weights(folder, lambda weights: {**weights, "classifier.weight": torch.zeros(2, 32)})
    assert TASK.load_model(folder)[1] == ["classifier.weight"]


def test_dtype(models):
    assert TASK.load_model(models / "bert")[0].dtype == torch.float32
    assert {p.dtype for p in TASK.load_model(models / "bert", torch.bfloat16)[0].parameters()} == {torch.bfloat16}


def test_decoder_without_padding_token_classifies_padded_batches_as_single_texts(models):
    model, missing = TASK.load_model(models / "gpt2")
    tokenizer = TASK.load_tokenizer(models / "gpt2")
    assert missing == ["score.weight"]
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("<|endoftext|>", 0)
    assert model.config.pad_token_id == 0
    data = TASK.encode(ROWS, tokenizer, 16)
    collate = TASK.collator(tokenizer)
    batch = collate([data[i] for i in range(3)])
    assert batch["input_ids"].shape == (3, 16)
    with torch.no_grad():
        together = model(**batch).logits
        alone = torch.cat([model(**collate([data[i]])).logits for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)


def test_encode(models):
    tokenizer = TASK.load_tokenizer(models / "bert")
    data = TASK.encode(ROWS, tokenizer, 10)
    good, film, fine = (tokenizer.convert_tokens_to_ids(word) for word in ("good", "film", "fine"))
    assert len(data) == 3
    assert data[0] == {
        "input_ids": [2, good, film, 3],
        "token_type_ids": [0, 0, 0, 0],
        "attention_mask": [1, 1, 1, 1],
        "labels": 1,
    }
    assert len(data[1]["input_ids"]) == 10 and data[1]["input_ids"][-1] == 3  # [SEP] survives the cut
    assert [data[i]["labels"] for i in range(3)] == [1, 0, 2]
    assert data.n_truncated == 1
    # the model has 64 positions, so more is cut whatever max_length says
    data = TASK.encode([row("fine " * 62, "好评", 1), row("fine " * 63, "好评", 2)], tokenizer, 512)
    assert [len(data[i]["input_ids"]) for i in range(2)] == [64, 64]
    assert data[0]["input_ids"][1] == fine
    assert len(TASK.encode([], tokenizer, 10)) == 0


def test_long_texts_are_counted_and_not_logged(models, logged):
    rows = [row("fine " * 62, "好评", 1), row("fine " * 63, "好评", 2)]
    assert TASK.encode(rows, TASK.load_tokenizer(models / "bert"), 512).n_truncated == 1
    in_python = ByT5Tokenizer(model_max_length=64)  # a token for each byte, and one at the end
    rows = [row("x" * 63, "好评", 1), row("x" * 64, "好评", 2), row("好" * 22, "好评", 3)]
    assert TASK.encode(rows, in_python, 512).n_truncated == 2
    assert logged == []


def test_positions_that_roberta_counts_from_two(tmp_path):
    RobertaConfig(max_position_embeddings=34).save_pretrained(tmp_path)
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = "[UNK]"  # token 1, as in RoBERTa
    tokenizer.save_pretrained(tmp_path)
    assert TASK.load_tokenizer(tmp_path).model_max_length == 32
    tokenizer.model_max_length = 20
    tokenizer.save_pretrained(tmp_path)
    assert TASK.load_tokenizer(tmp_path).model_max_length == 20


def test_encode_refuses(models):
    tokenizer = TASK.load_tokenizer(models / "bert")
    assert "at least 3" in error_of(TASK.encode, ROWS, tokenizer, 2)
    message = error_of(TASK.encode, [row("good", "好", 9)], tokenizer, 8)
    assert "'好'" in message and "line 9" in message
    assert TASK.encode([row(" ", "好评", 5)], tiny_decoder_tokenizer(), 8).lost == {"a text that gives no tokens": [5]}


def test_loss_is_the_models_own(bert):
    change_config(bert, problem_type="multi_label_classification")  # what an earlier training may have left
    model, _ = TASK.load_model(bert)
    tokenizer = TASK.load_tokenizer(bert)
    data = TASK.encode(ROWS, tokenizer, 16)
    batch = TASK.collator(tokenizer)([data[i] for i in range(3)])
    outputs = model(**batch)
    assert LOSSES[TASK.name].per_example(outputs, batch).mean().item() == pytest.approx(outputs.loss.item())


def test_metrics():
    logits = np.array([[3.0, 1, 0, 0], [2, 5, 0, 0], [0, 1, 0, 0], [0, 9, 8, 0]])
    truth = np.array([0, 1, 0, 2])
    # class 0: precision 1, recall 1/2, F1 2/3; class 1: precision 1/3, recall 1, F1 1/2; classes 2 and 3: 0
    expected = {"accuracy": 0.5, "f1_macro": (2 / 3 + 1 / 2) / 4}
    # Matthews' coefficient for several classes (Gorodkin 2004): predicted 0, 1, 1, 1 against 0, 1, 0, 2
    right, count, predicted_as, are = 2, 4, np.array([1, 3, 0, 0]), np.array([2, 1, 1, 0])
    covariances = [count**2 - (of**2).sum() for of in (predicted_as, are)]
    expected["matthews"] = (right * count - predicted_as @ are) / math.sqrt(math.prod(covariances))
    assert TASK.compute_metrics(EvalPrediction(logits, truth)) == pytest.approx(expected)
    assert TASK.reduced((logits, logits * 0), truth) is logits


def test_paths_that_hold_no_model(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    for name, words in [
        (tmp_path / "none", "does not exist"),
        (tmp_path / "empty", "no config.json"),
        (tmp_path / "file", "is a file"),
        (adapter, "base model"),
        ("nobody/nothing", "Hugging Face Hub while HF_HUB_OFFLINE"),
        ("nothing", "Hugging Face Hub while HF_HUB_OFFLINE"),
    ]:
        for call in (TASK.load_model, TASK.load_tokenizer):
            message = error_of(call, name)
            assert str(name) in message and words in message


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("{", "config.json"),
        ("{}", "model_type"),
        ('{"model_type": "unheard-of"}', "unheard-of"),
        ('{"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}', "Python code of its own"),
        (ViTConfig().to_json_string(), "'vit'"),
    ],
)
def test_configs_that_cannot_be_used(bert, config, words, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked a question"))
    (bert / "config.json").write_text(config)
    message = error_of(TASK.load_model, bert)
    assert str(bert) in message and words in message


def test_weights_that_cannot_be_used(bert, models):
    weights = bert / "model.safetensors"
    whole = weights.read_bytes()
    for content in (b"", b"no safetensors" * 50, whole[: len(whole) // 2]):
        weights.write_bytes(content)
        message = error_of(TASK.load_model, bert)
        assert f"weights of {bert}" in message and "damaged" in message
    weights.unlink()
    assert "cannot be found or read" in error_of(TASK.load_model, bert)
    shutil.copy(models / "gpt2" / "model.safetensors", weights)
    assert "do not fit its config.json" in error_of(TASK.load_model, bert)


def test_weights_of_another_size_are_refused(bert):
    change_config(bert, intermediate_size=48)
    message = error_of(TASK.load_model, bert)
    assert "do not fit its config.json" in message and "intermediate.dense" in message


def test_tokenizers_that_cannot_be_used(bert):
    backend = bert / "tokenizer.json"
    backend.write_text("{}")
    assert str(bert) in error_of(TASK.load_tokenizer, bert)
    # without these files transformers returns an empty tokenizer instead of an error
    backend.unlink()
    (bert / "tokenizer_config.json").unlink()
    assert "no tokenizer files" in error_of(TASK.load_tokenizer, bert)
    tokenizer = tiny_decoder_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(bert)
    assert "pad_token" in error_of(TASK.load_tokenizer, bert)
