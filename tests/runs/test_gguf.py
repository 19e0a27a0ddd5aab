"""Files for llama.cpp: read back by Transformers' own loader and by gguf's reader, and compared with the model that was written."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

from command_line import assert_refused, contents, reltune
from gguf_models import CHATML, SIZES, TEXTS, bytes_tokenizer, made
from reltune.errors import InputError
from reltune.pretrained import saved_tokenizer
from reltune.runs.gguf_file import check_architecture, check_tokenizer, neighbours, write_gguf
from task_cases import write_rows
from tiny_models import save_tiny_bert


def pieces_tokenizer() -> PreTrainedTokenizerFast:
    """One as SentencePiece makes them for Llama 2: pieces with ▁ for a space, and bytes where there is none."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=360, special_tokens=special, show_progress=False)
    backend.train_from_iterator(["▁" + text.replace(" ", "▁▁") for text in ("good film", "the bad book")] * 3, trainer)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    return tokenizer


def logits(model: Any, ids: Sequence[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0].float()


def read_back(file: Path) -> tuple[Any, Any]:
    """By Transformers' own loader, and the tokenizer as reltune reads it."""
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()
    return model, saved_tokenizer(str(file))


@pytest.mark.parametrize(
    ("kind", "way", "changes"),
    [
        ("llama", "smollm", {"tie_word_embeddings": True}),  # SmolLM2's shape
        ("llama", "llama-bpe", {"head_dim": 32}),
        ("mistral", "gpt-2", {"sliding_window": None}),
        ("qwen2", "qwen2", {"tie_word_embeddings": True}),
        ("qwen3", "qwen2", {"head_dim": 128}),  # Transformers reads no other from a file
    ],
)
def test_a_file_read_back_is_the_model_that_was_written(
    kind: str, way: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    tokenizer = bytes_tokenizer(way, begins=way == "llama-bpe")
    model = made(kind, len(tokenizer) + 5, **changes)  # embeddings are often padded to a round number of rows
    ids = tokenizer(TEXTS[0])["input_ids"]
    expected = logits(model, ids)
    for gguf_type, far in (("f32", 1e-4), ("f16", 0.02), ("bf16", 0.1), ("q8_0", 0.2)):
        file = write_gguf(model, tokenizer, tmp_path / f"{gguf_type}.gguf", gguf_type)
        again, tokenizer_again = read_back(file)
        found = logits(again, ids)
        assert (found - expected).abs().max() <= far * expected.std(), gguf_type
        assert again.config.tie_word_embeddings == model.config.tie_word_embeddings
    assert (found - expected).abs().max() > 0  # eight bits are seen
    assert tokenizer_again.get_vocab() == {
        **tokenizer.get_vocab(),
        **{f"[PAD{i}]": i for i in range(len(tokenizer), len(tokenizer) + 5)},
    }
    if way != "smollm":  # Transformers has no rule of this name, and does not split off single digits
        assert [tokenizer_again(text)["input_ids"] for text in TEXTS] == [
            tokenizer(text)["input_ids"] for text in TEXTS
        ]
    ends = {"bos": tokenizer_again.bos_token, "eos": tokenizer_again.eos_token, "pad": tokenizer_again.pad_token}
    assert ends == {"bos": "<s>", "eos": "<|im_end|>", "pad": "<|endoftext|>"}
    assert tokenizer_again.chat_template == CHATML
    assert not list(tmp_path.glob("*.partial"))


def test_what_the_file_says(tmp_path: Path) -> None:
    tokenizer = bytes_tokenizer("smollm")
    model = made("llama", len(tokenizer), hidden_size=40)  # 40 is no multiple of 32, the block of q8_0
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, 0]
    reader = gguf.GGUFReader(write_gguf(model, tokenizer, tmp_path / "model.gguf", "q8_0"))
    said = {name: field.contents() for name, field in reader.fields.items()}
    assert said["general.architecture"] == "llama" and said["llama.rope.freq_base"] == 5000
    assert (said["llama.attention.head_count"], said["llama.attention.head_count_kv"]) == (4, 2)
    assert said["tokenizer.ggml.model"] == "gpt2" and said["tokenizer.ggml.pre"] == "smollm"
    assert said["tokenizer.ggml.tokens"] == tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    special = [tokenizer.convert_tokens_to_ids(t) for t in ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>")]
    types = said["tokenizer.ggml.token_type"]
    assert [i for i, one in enumerate(types) if one == 3] == [i for i in special if i != 0] and types[0] == 2
    assert types[tokenizer.convert_tokens_to_ids("<think>")] == 4 and set(types) == {1, 2, 3, 4}
    assert said["tokenizer.ggml.add_bos_token"] is False and said["tokenizer.ggml.eot_token_id"] == 0
    held = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert held["blk.0.attn_norm.weight"] == "F32" and held["blk.1.ffn_down.weight"] == "Q8_0"  # 96 columns
    assert held["blk.0.attn_q.weight"] == "F16"
    merges = said["tokenizer.ggml.merges"]
    assert all(len(merge.split(" ")) == 2 for merge in merges) and len(merges) == 340 - 4 - 256


def test_pieces_with_scores_are_read_as_they_were(tmp_path: Path) -> None:
    """llama.cpp has no merges for this kind, and joins the pair with the best score."""
    tokenizer = pieces_tokenizer()
    assert check_tokenizer(tokenizer)[0] == "llama"
    file = write_gguf(made("llama", len(tokenizer)), tokenizer, tmp_path / "model.gguf")
    said = {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items()}
    scores = dict(zip(said["tokenizer.ggml.tokens"], said["tokenizer.ggml.scores"], strict=True))
    types = dict(zip(said["tokenizer.ggml.tokens"], said["tokenizer.ggml.token_type"], strict=True))
    assert types["<0x0A>"] == 6 and types["<unk>"] == 2 and types["<s>"] == 3 and said["tokenizer.ggml.add_bos_token"]

    def joined(text: str) -> list[str]:
        """Neighbours are joined while a pair of them is a piece, the best score first and the leftmost of equals."""
        pieces = list("▁" + text.replace(" ", "▁"))
        while pairs := [(scores[a + b], -i) for i, (a, b) in enumerate(pairwise(pieces)) if a + b in scores]:
            i = -max(pairs)[1]
            pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]
        return pieces

    for text in ("the good film", "bad book", "good  bad the book film"):
        assert joined(text) == tokenizer.tokenize(text)
    again = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    assert again("the good film")["input_ids"] == tokenizer("the good film")["input_ids"]


def test_a_file_keeps_the_tokenizer_of_the_file_that_it_was_made_from(tmp_path: Path) -> None:
    tokenizer = bytes_tokenizer("smollm")
    model = made("llama", len(tokenizer))
    first = write_gguf(model, tokenizer, tmp_path / "first.gguf")
    again, read = read_back(first)
    read.chat_template = CHATML.replace("\n{%", "{%")
    second = write_gguf(again, read, tmp_path / "second.gguf", tokenizer_file=str(first))
    a, b = (
        {
            name: field.contents()
            for name, field in gguf.GGUFReader(file).fields.items()
            if name.startswith("tokenizer.")
        }
        for file in (first, second)
    )
    assert b.pop("tokenizer.chat_template") == read.chat_template != a.pop("tokenizer.chat_template")
    assert a == b and a["tokenizer.ggml.pre"] == "smollm"


def test_rows_of_queries_are_pairs_of_neighbours() -> None:
    """Turned by the same angles, by halves in Transformers and by neighbours in llama.cpp, they are the same numbers."""
    heads, size = 3, 8
    weight, x = torch.randn(heads * size, 5, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    angle = torch.randn(size // 2, dtype=torch.float64)

    def turned(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()

    halves = (weight @ x).reshape(heads, 2, size // 2)
    pairs = (neighbours(weight, heads) @ x).reshape(heads, size // 2, 2)
    for one, other in zip(turned(halves[:, 0], halves[:, 1]), turned(pairs[..., 0], pairs[..., 1]), strict=True):
        assert torch.allclose(one, other)


def test_positions_of_llama_3_are_scaled_by_factors(tmp_path: Path) -> None:
    scaled = {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }  # fmt: skip
    tokenizer = bytes_tokenizer("llama-bpe")
    model = made("llama", len(tokenizer), rope_parameters=scaled)
    reader = gguf.GGUFReader(write_gguf(model, tokenizer, tmp_path / "model.gguf"))
    factors = next(tensor.data for tensor in reader.tensors if tensor.name == "rope_freqs.weight")
    base = 500000.0 ** (-np.arange(0, 16, 2) / 16)
    assert np.allclose(base / factors, model.model.rotary_emb.inv_freq.numpy(), rtol=1e-5)
    assert factors.min() == 1 and factors.max() == pytest.approx(8, rel=1e-5)


def test_what_the_format_cannot_hold_is_named(tmp_path: Path) -> None:
    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=20)
    with pytest.raises(InputError, match=r"is a 'gpt2' model.*llama, mistral, qwen2, qwen3"):
        check_architecture("some/model", config)
    yarn = LlamaConfig(**{**SIZES, "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}})
    with pytest.raises(InputError, match="'yarn'"):
        check_architecture("some/model", yarn)
    with pytest.raises(InputError, match="activation"):
        check_architecture("some/model", LlamaConfig(**SIZES, hidden_act="gelu"))
    tokenizer = bytes_tokenizer("gpt-2")
    model = made("llama", len(tokenizer))
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = 1e5
    with pytest.raises(InputError, match=r"blk\.1\.ffn_up\.weight lie beyond the range of f16"):
        write_gguf(model, tokenizer, tmp_path / "model.gguf")
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    with pytest.raises(InputError, match="splits texts in a way that reltune knows no name for"):
        write_gguf(model, tokenizer, tmp_path / "model.gguf", "bf16")
    assert contents(tmp_path) == {".": "empty directory"}


# -- from a run -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("place")
    tokenizer = bytes_tokenizer("qwen2")
    made("qwen2", len(tokenizer)).save_pretrained(place / "model")
    tokenizer.save_pretrained(place / "model")
    rows = [
        {"messages": [{"role": "user", "content": f"how good is {i}?"}, {"role": "assistant", "content": "good"}]}
        for i in range(24)
    ]
    file = write_rows(place / "train.jsonl", rows)
    words = ("--train_file", file, "--max_steps", 2, "--learning_rate", 1e-2, "--generation_examples", 0)
    budget = ("--granularity", "column", "--budget", "20%")
    answer = reltune("run", "--model_name_or_path", place / "model", *words, *budget, "--output_dir", place / "run")
    assert answer.code == 0, answer.err
    return place


def test_a_run_becomes_a_file(place: Path, tmp_path: Path) -> None:
    answer = reltune("export", place / "run", "--to", "gguf", "--gguf_type", "f32", "--output_dir", tmp_path / "file")
    assert answer.code == 0 and answer.out == f"Exported to {tmp_path / 'file' / 'model-f32.gguf'}\n", answer
    assert reltune("export", place / "run", "--to", "merged", "--output_dir", tmp_path / "merged").code == 0
    merged, base = (
        AutoModelForCausalLM.from_pretrained(path).eval() for path in (tmp_path / "merged", place / "model")
    )
    again, tokenizer = read_back(tmp_path / "file" / "model-f32.gguf")
    ids = AutoTokenizer.from_pretrained(tmp_path / "merged")(TEXTS[3])["input_ids"]
    assert tokenizer(TEXTS[3])["input_ids"] == ids
    assert (
        (logits(again, ids) - logits(merged, ids)).abs().max()
        < 1e-4
        < (logits(base, ids) - logits(merged, ids)).abs().max()
    )


def test_a_run_becomes_a_model_of_ollama(place: Path, tmp_path: Path) -> None:
    answer = reltune("export", place / "run", "--to", "ollama", "--gguf_type", "q8_0", "--output_dir", tmp_path / "new")
    assert answer.code == 0 and answer.out == f"Exported to {tmp_path / 'new'}\n" and "note" not in answer.err, answer
    assert contents(tmp_path / "new").keys() == {"Modelfile", "model-q8_0.gguf"}
    assert (tmp_path / "new" / "Modelfile").read_text(encoding="utf-8") == (
        "FROM ./model-q8_0.gguf\n"
        'TEMPLATE """{{ if .System }}<|im_start|>system\n{{ .System }}<|im_end|>\n{{ end }}'
        "{{ if .Prompt }}<|im_start|>user\n{{ .Prompt }}<|im_end|>\n<|im_start|>assistant\n{{ end }}"
        '{{ .Response }}<|im_end|>\n"""\n'
        'PARAMETER stop "<|im_end|>"\n'
    )


def test_exports_that_cannot_be_are_refused_before_the_model_is_loaded(place: Path, tmp_path: Path) -> None:
    words = ("export", place / "run", "--output_dir", tmp_path / "new")
    assert_refused(reltune(*words, "--to", "gguf", "--gguf_type", "q2_k"), "'q2_k' is unknown")
    assert_refused(reltune(*words, "--to", "merged", "--gguf_type", "f16"), "--gguf_type is about files for llama.cpp")
    save_tiny_bert(tmp_path / "bert")
    tokenizer = bytes_tokenizer("gpt-2")
    GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=len(tokenizer))).save_pretrained(
        tmp_path / "gpt2"
    )
    tokenizer.save_pretrained(tmp_path / "gpt2")
    for model, rows, named in (
        (
            "bert",
            [{"text": "good film", "label": i % 2} for i in range(24)],
            "this run's task is sequence_classification",
        ),
        ("gpt2", [{"text": f"good film {i}"} for i in range(24)], "is a 'gpt2' model, which reltune cannot write"),
    ):
        for row, i in zip(rows, range(24), strict=True):
            row["text"] = f"{row['text']} {'very ' * i}"
        file = write_rows(tmp_path / f"{model}.jsonl", rows)
        words = ("run", "--model_name_or_path", tmp_path / model, "--train_file", file, "--export", "gguf")
        assert_refused(reltune(*words, "--max_steps", 1, "--output_dir", tmp_path / "new"), named)
    assert not (tmp_path / "new").exists()
