"""Models and tokenizers that do not fit one another: mended, or refused by name before anything is trained."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import (
    AutoTokenizer,
    BartConfig,
    BartForSequenceClassification,
    FNetConfig,
    FNetForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
    XLNetConfig,
    XLNetForSequenceClassification,
)

from reltune.data.rows import Row
from reltune.errors import InputError
from reltune.losses import LOSSES
from reltune.notes import collecting
from reltune.tasks import fit
from reltune.tasks.causal_lm import CausalLM
from reltune.tasks.fit import check_tokens, settle_padding
from reltune.tasks.masked_lm import MaskedLM
from reltune.tasks.registry import TASKS
from reltune.tasks.sequence_classification import SequenceClassification
from reltune.tasks.task import Task
from tiny_models import (
    save_tiny_bert,
    save_tiny_gpt2,
    save_tiny_llama,
    save_tiny_masked,
    tiny_decoder_tokenizer,
    tiny_tokenizer,
)

SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXTS = ("good", "bad film very dull", "fine book", "not good not bad very great film")


def rows(values: list[dict[str, Any]]) -> list[Row]:
    return [Row(value, line) for line, value in enumerate(values, start=2)]


def labelled(texts: tuple[str, ...] = TEXTS) -> list[Row]:
    return rows([{"text": text, "label": "ab"[i % 2]} for i, text in enumerate(texts)])


def save(path: Path, model: Any, tokenizer: Any) -> Path:
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


# -- tokens without a row in the embedding --------------------------------------------------------------------------


def add_padding_token(path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(path)


@pytest.mark.parametrize("make", [save_tiny_gpt2, save_tiny_llama])
@pytest.mark.parametrize("name", ["causal_lm", "sequence_classification"])
def test_an_added_padding_token(make: Any, name: str, tmp_path: Path) -> None:
    make(tmp_path)
    add_padding_token(tmp_path)
    task: Any = CausalLM() if name == "causal_lm" else SequenceClassification(["a", "b"])
    with collecting() as notes:
        tokenizer = task.load_tokenizer(tmp_path)
    assert len(notes) == 1 and "'[PAD]'" in notes[0] and "'<|endoftext|>'" in notes[0]
    model, _ = task.load_model(tmp_path)
    examples = task.encode(labelled(), tokenizer, 16)
    batch = task.collator(tokenizer)([examples[i] for i in range(4)])
    assert batch["input_ids"].max() < model.get_input_embeddings().num_embeddings
    assert model.eval()(**batch).loss.isfinite()
    check_tokens(task, model, tokenizer, [examples])
    settle_padding(task, model, tokenizer, examples)


def test_no_token_to_pad_with(tmp_path: Path) -> None:
    save_tiny_bert(tmp_path)
    tokenizer = tiny_decoder_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "[PAD]"})
    config = LlamaConfig(vocab_size=len(tokenizer) - 3, **SMALL)
    save(tmp_path, LlamaForCausalLM(config), tokenizer)
    with pytest.raises(InputError, match=r"pads with '\[PAD\]'"):
        CausalLM().load_tokenizer(tmp_path)


def test_other_added_tokens_are_refused_where_they_stand_in_the_data(tmp_path: Path) -> None:
    save_tiny_llama(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.add_tokens(["<tool>", "<never>"])
    tokenizer.save_pretrained(tmp_path)
    task = CausalLM()
    tokenizer, (model, _) = task.load_tokenizer(tmp_path), task.load_model(tmp_path)
    plain, special = (task.encode(rows([{"text": text}]), tokenizer, 16) for text in ("good film", "good <tool> film"))
    check_tokens(task, model, tokenizer, [plain])
    with pytest.raises(InputError, match=r"'<tool>'.*resize_token_embeddings"):
        check_tokens(task, model, tokenizer, [plain, special])


def test_masking_draws_from_all_tokens(tmp_path: Path) -> None:
    save_tiny_masked(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.add_tokens(["<never>"])
    tokenizer.save_pretrained(tmp_path)
    task = MaskedLM()
    tokenizer, (model, _) = task.load_tokenizer(tmp_path), task.load_model(tmp_path)
    with pytest.raises(InputError, match="'<never>'"):
        check_tokens(task, model, tokenizer, [task.encode(labelled(), tokenizer, 16)])


# -- positions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_length", [62, 63, 64, 10_000])
@pytest.mark.parametrize(("config_pad", "tokenizer_pad"), [(1, 1), (0, 0), (3, 3), (1, 0), (1, 3), (3, 1)])
def test_positions_of_roberta(max_length: int, config_pad: int, tokenizer_pad: int, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(tokenizer_pad)
    tokenizer.model_max_length = max_length
    config = RobertaConfig(vocab_size=len(tokenizer), max_position_embeddings=64, pad_token_id=config_pad, **SMALL)
    save(tmp_path, RobertaForSequenceClassification(config), tokenizer)
    task = SequenceClassification(["a", "b"])
    tokenizer, (model, _) = task.load_tokenizer(tmp_path), task.load_model(tmp_path)
    assert tokenizer.model_max_length == min(max_length, 64 - config_pad - 1)
    examples = task.encode(labelled(("fine " * 100, "good " * 80, "bad")), tokenizer, 512)
    assert len(examples[0]["input_ids"]) == tokenizer.model_max_length and examples.n_truncated == 2
    settle_padding(task, model, tokenizer, examples)
    batch = task.collator(tokenizer)([examples[i] for i in range(3)])
    assert model(**{key: value for key, value in batch.items() if key != "token_type_ids"}).loss.isfinite()
    model.save_pretrained(tmp_path / "saved")
    again = RobertaForSequenceClassification.from_pretrained(tmp_path / "saved")
    assert again.config.pad_token_id == config_pad  # positions count from it


# -- padding --------------------------------------------------------------------------------------------------------


def left_padding_gpt2(path: Path) -> Path:
    torch.manual_seed(0)
    tokenizer = tiny_decoder_tokenizer()
    tokenizer.padding_side = "left"
    config = GPT2Config(
        vocab_size=len(tokenizer), n_embd=16, n_layer=2, n_head=2, n_positions=32, initializer_range=0.3
    )
    return save(path, GPT2ForSequenceClassification(config), tokenizer)


def test_a_decoder_whose_tokenizer_pads_on_the_left(tmp_path: Path) -> None:
    """GPT-2 counts positions from the first token, padding or not: on the left each text would move with its batch."""
    left_padding_gpt2(tmp_path)
    task = SequenceClassification(["LABEL_0", "LABEL_1"])
    tokenizer, (model, _) = task.load_tokenizer(tmp_path), task.load_model(tmp_path)
    data = [Row({"text": text, "label": f"LABEL_{i % 2}"}, i) for i, text in enumerate(TEXTS)]
    examples = task.encode(data, tokenizer, 16)
    settle_padding(task, model, tokenizer, examples)
    assert task.padding_side == "right"
    assert_the_same_alone_and_together(task, model, tokenizer, examples)
    tokenizer.padding_side = "left"
    with pytest.raises(AssertionError):
        assert_the_same_alone_and_together(task, model, tokenizer, examples)


def assert_the_same_alone_and_together(task: Task, model: Any, tokenizer: Any, examples: Any) -> None:
    collate, loss = task.collator(tokenizer), LOSSES[task.name]
    items = [examples[i] for i in range(len(examples))]
    with torch.no_grad():
        batch = collate(items)
        together = loss.per_example(model.eval()(**batch), batch)
        alone = [loss.per_example(model(**collate([item])), collate([item])) for item in items]
    torch.testing.assert_close(together, torch.cat(alone))


def test_a_model_that_wants_its_padding_on_the_left(tmp_path: Path) -> None:
    """XLNet reads the last position, and counts positions from one another."""
    torch.manual_seed(0)
    tokenizer = tiny_decoder_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    config = XLNetConfig(vocab_size=len(tokenizer), d_model=16, n_layer=1, n_head=2, d_inner=16, initializer_range=0.3)
    save(tmp_path, XLNetForSequenceClassification(config), tokenizer)
    task = SequenceClassification(["a", "b"])
    tokenizer, (model, _) = task.load_tokenizer(tmp_path), task.load_model(tmp_path)
    examples = task.encode(labelled(), tokenizer, 16)
    settle_padding(task, model, tokenizer, examples)
    assert task.padding_side == tokenizer.padding_side == "left"
    assert task.record()["padding_side"] == "left"
    assert_the_same_alone_and_together(task, model, tokenizer, examples)


def test_a_model_that_sees_padding_is_refused(tmp_path: Path) -> None:
    """FNet mixes all positions and has no attention mask."""
    torch.manual_seed(0)
    config = FNetConfig(vocab_size=17, max_position_embeddings=32, initializer_range=0.3, **SMALL)
    save(tmp_path, FNetForSequenceClassification(config), tiny_tokenizer())
    task = SequenceClassification(["a", "b"])
    tokenizer, (model, _) = task.load_tokenizer(tmp_path), task.load_model(tmp_path)
    tokenizer.model_input_names = ["input_ids"]
    with pytest.raises(InputError, match="'fnet' model reads an example otherwise when its batch is padded"):
        settle_padding(task, model, tokenizer, task.encode(labelled(), tokenizer, 16))


class Lengths:
    """A task whose examples are numbers of tokens. Notes which examples were tried, in batches on each side."""

    padding_side = ""

    def __init__(self, loss: Any = lambda outputs, batch: outputs, sides: tuple[str, ...] = ("right", "left")) -> None:
        self.relevance_loss, self.padding_sides, self.tried = loss, sides, []

    def token_ids(self, length: int) -> list[range]:
        return [range(length)]

    def collator(self, processor: Any) -> Any:
        def collate(lengths: list[int]) -> dict[str, torch.Tensor]:
            self.tried.append(lengths)
            return {"input_ids": torch.ones(len(lengths), max(lengths))}

        return collate


class Told(torch.nn.Module):
    """Gives one value for an example alone, and another where it is in a batch with others."""

    def __init__(self, alone: float, together: float, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones((), dtype=dtype))
        self.values = alone, together

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return torch.full((len(input_ids),), self.values[len(input_ids) > 1], dtype=torch.float64)


@pytest.mark.parametrize(
    ("lengths", "tried"),
    [
        ([5, 3, 700, 512, 4, 3, 513], [3, 512]),  # the shortest, and the longest that is not too long
        ([3, 900, 600], [3, 600]),  # or the shortest of those that are
        ([4, 4, 4], [4]),  # one will do where all are alike
        ([4, 4, 4, 4, 9], [4]),  # the fifth is not looked at
    ],
)
def test_which_two_examples_are_tried(lengths: list[int], tried: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit, "LOOKED_AT", 4 if len(lengths) == 5 else 2000)
    task: Any = Lengths()
    settle_padding(task, Told(1.0, 1.0), SimpleNamespace(), lengths)  # type: ignore[arg-type]
    assert task.tried == [tried[:1], tried][: len(tried)]


def test_a_task_that_never_pads_is_not_tried() -> None:
    task: Any = Lengths(sides=())
    task.token_ids = None
    settle_padding(task, Told(1.0, 2.0), SimpleNamespace(), [3, 5])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("dtype", "alone", "together", "same"),
    [
        (torch.float32, 1.0, 1.00009, True),
        (torch.float32, 1.0, 1.0002, False),
        (torch.float32, 1e-6, 5e-5, True),  # of losses below 1 the absolute difference counts
        (torch.float32, 1000.0, 1000.09, True),
        (torch.float32, 1000.0, 1000.2, False),
        (torch.bfloat16, 1.0, 1.04, True),
        (torch.bfloat16, 1.0, 1.06, False),
        (torch.float32, float("nan"), 1.0, True),  # no matter of padding
    ],
)
@pytest.mark.parametrize("of_untouched", [False, True])
def test_how_far_losses_may_differ(
    dtype: torch.dtype, alone: float, together: float, same: bool, of_untouched: bool
) -> None:
    same_for_all = dataclasses.replace(  # a loss that is the same for every untouched model
        LOSSES["preference"],
        rows_per_example=1,
        per_example=lambda outputs, batch: torch.zeros_like(outputs),
        of_untouched=lambda outputs, batch: {"reference": outputs},
    )
    task: Any = Lengths(same_for_all) if of_untouched else Lengths()
    if same:
        settle_padding(task, Told(alone, together, dtype), SimpleNamespace(), [3, 5])  # type: ignore[arg-type]
        assert task.padding_side == "right"
    else:
        with pytest.raises(InputError, match="'Told' model reads an example otherwise when its batch is padded"):
            settle_padding(task, Told(alone, together, dtype), SimpleNamespace(), [3, 5])  # type: ignore[arg-type]
        assert task.padding_side == "left"  # tried last


def test_a_model_that_cannot_read_the_data(tmp_path: Path) -> None:
    """BART classifies by the token that ends a text, of which every text must have equally many."""
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = BartConfig(vocab_size=17, d_model=16, encoder_ffn_dim=16, decoder_ffn_dim=16, eos_token_id=3, **sizes)
    save(tmp_path, BartForSequenceClassification(config), tiny_tokenizer())
    task = SequenceClassification(["a", "b"])
    tokenizer, (model, _) = task.load_tokenizer(tmp_path), task.load_model(tmp_path)
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    settle_padding(task, model, tokenizer, task.encode(labelled(), tokenizer, 16))
    with pytest.raises(InputError, match=r"cannot read an example of 6 tokens.*<eos>"):
        settle_padding(task, model, tokenizer, task.encode(labelled(("good", "bad [SEP] very dull")), tokenizer, 16))


def test_examples_of_one_length_are_tried_too(tmp_path: Path) -> None:
    """An error of the model's own code is refused before the run's directory is made."""
    save_tiny_bert(tmp_path)
    task = SequenceClassification(["a", "b"])
    tokenizer, (model, _) = task.load_tokenizer(tmp_path), task.load_model(tmp_path)
    model.forward = lambda **_: (_ for _ in ()).throw(ValueError("no start"))
    with pytest.raises(InputError, match=r"cannot read an example of 3 tokens \(ValueError: no start"):
        settle_padding(task, model, tokenizer, task.encode(labelled(("good", "bad")), tokenizer, 16))


def test_weights_that_are_no_numbers(tmp_path: Path) -> None:
    save_tiny_llama(tmp_path)
    task = CausalLM()
    tokenizer, (model, _) = task.load_tokenizer(tmp_path), task.load_model(tmp_path)
    model.model.layers[1].mlp.up_proj.weight.data[0, :2] = torch.tensor([torch.nan, torch.inf])
    with pytest.raises(InputError, match=r"model.layers.1.mlp.up_proj.weight has 2 that are infinite or not a number"):
        settle_padding(task, model, tokenizer, task.encode(labelled(), tokenizer, 16))


def test_every_task_says_where_it_pads() -> None:
    for name, task in TASKS.items():
        assert set(task.padding_sides) <= {"left", "right"}, name
        assert bool(task.padding_sides) == (name != "image_classification")
