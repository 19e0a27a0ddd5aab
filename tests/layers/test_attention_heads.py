"""Attention heads: where they lie, what they are worth, and that choosing one trains its weights and no others."""

from __future__ import annotations

import json

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import (
    BartConfig,
    BartModel,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXModel,
    GptOssConfig,
    GptOssModel,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.pytorch_utils import Conv1D

from measured_models import (
    CLASSIFIER,
    LABELS,
    LANGUAGE_MODEL,
    VOCAB,
    made,
    tiny_bert,
    tiny_gpt2,
    tiny_llama,
    tiny_mixtral,
    tiny_qwen2,
    tiny_roberta,
    tiny_vit,
)
from oracles.heads import head_relevance
from oracles.per_example_gradients import examples
from relevance_cases import data_for, measure, split, text_batch
from reltune.errors import InputError
from reltune.layers.inventory import take_inventory
from reltune.plan.selection import select
from reltune.relevance.scores import RelevanceScores
from reltune.tuner import ReltuneConfig

CRITERIA = ["fisher", "gradient", "taylor", "relative_gradient", "gradient_snr", "magnitude"]


def tiny_distilbert():
    config = DistilBertConfig(
        vocab_size=VOCAB, dim=16, hidden_dim=24, n_layers=2, n_heads=2, max_position_embeddings=32, num_labels=LABELS
    )
    return made(DistilBertForSequenceClassification, config)


def llama_of_wide_heads():
    """Two heads of 12 numbers each, which is not the hidden size over the heads."""
    return tiny_llama(head_dim=12, num_key_value_heads=2)


def tiny_shared_llama():
    return tiny_llama(num_attention_heads=4, num_key_value_heads=2, head_dim=4)


def mixtral_of_shared_heads():
    return tiny_mixtral(num_attention_heads=4, num_key_value_heads=2)


def tiny_t5():
    sizes = {"vocab_size": VOCAB, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 3}
    config = T5Config(**sizes, decoder_start_token_id=0, tie_word_embeddings=False)
    return made(T5ForConditionalGeneration, config)


# Model, names of the projections, and whether the heads share keys and values.
QKV, LLAMA = ("query", "key", "value"), ("q_proj", "k_proj", "v_proj", "o_proj")
MODELS = {
    "bert": (tiny_bert, (*QKV, "dense"), False),
    "roberta": (tiny_roberta, (*QKV, "dense"), False),
    "distilbert": (tiny_distilbert, ("q_lin", "k_lin", "v_lin", "out_lin"), False),
    "gpt2": (tiny_gpt2, ("c_attn", "c_attn", "c_attn", "c_proj"), False),
    "llama": (llama_of_wide_heads, LLAMA, False),
    "shared_llama": (tiny_shared_llama, LLAMA, True),
    "qwen2": (tiny_qwen2, LLAMA, True),
    "t5": (tiny_t5, ("q", "k", "v", "o"), False),
    "vit": (tiny_vit, LLAMA, False),
    "mixtral": (mixtral_of_shared_heads, LLAMA, True),
}


def batch_for(model):
    batch = data_for(model, (3, 11, 6, 2, 9))
    if isinstance(model, GPT2LMHeadModel | MixtralForCausalLM | T5ForConditionalGeneration):
        batch["labels"] = torch.where(batch["attention_mask"].bool(), batch["input_ids"], -100)
    if isinstance(model, T5ForConditionalGeneration):
        batch["decoder_input_ids"] = batch["input_ids"].roll(1, 1)
    return batch


def loss_for(model):
    if isinstance(model, T5ForConditionalGeneration):
        return "seq2seq"
    return "causal_lm" if isinstance(model, GPT2LMHeadModel | MixtralForCausalLM) else "sequence_classification"


def loss_of_one(model, outputs, labels):
    logits = outputs.logits
    if loss_for(model) == "causal_lm":
        logits, labels = logits[:, :-1], labels[:, 1:]
    return nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1))


def run(model, batch):
    return model(**{key: value for key, value in batch.items() if key != "labels"})


@pytest.mark.parametrize("name", MODELS)
def test_a_heads_rows_reach_its_output_columns_alone(name):
    """Scaling a head's query, key and value rows changes what the output projection reads from that head, and no more."""
    make, _, shared = MODELS[name]
    model = make().eval()
    batch = split(batch_for(model), 2)[0]
    groups = take_inventory(model).attention_heads
    expected = 6 if name == "t5" else 2
    assert (
        len(groups) == expected and [group.heads for group in groups] == [model.config.num_attention_heads] * expected
    )
    for group in groups:
        seen = []
        output = model.get_submodule(group.output)
        handle = output.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0].detach()))
        run(model, batch)
        for head in range(group.heads):
            assert len(group.rows(head)) == (1 if shared or name == "gpt2" else 3)
            for module, rows in group.rows(head).items():
                weight = model.get_submodule(module).weight
                with torch.no_grad():
                    at = (slice(None), rows) if name == "gpt2" else (rows,)
                    before = weight[at].clone()
                    weight[at] *= -1.7
                    run(model, batch)
                    weight[at] = before
                changed = (seen.pop() - seen[0]).flatten(0, -2).abs().amax(0) > 1e-9
                assert changed[list(group.output_columns(head))].all(), (group.name, head)
                assert int(changed.sum()) == group.head_size
        handle.remove()


def pieces_of(model, gradients, attention, names, shared, head):
    """What the head holds, from the configuration alone: gradients (examples, units, n) and weights (units, n)."""
    config = model.config
    heads = config.num_attention_heads
    size = getattr(config, "d_kv", None) or getattr(config, "head_dim", None) or config.hidden_size // heads
    own = slice(head * size, (head + 1) * size)

    def matrices(name):
        return gradients[name + ".weight"], model.get_parameter(name + ".weight").detach()

    parent = attention.removesuffix(".self") + ".output" if attention.endswith(".self") else attention
    g, w = matrices(f"{parent}.{names[3]}")
    if names[3] == "c_proj":
        pieces = [(g[:, own], w[own])]  # Conv1D: (in, out)
        g, w = matrices(f"{attention}.c_attn")
        for third in range(3):
            at = slice(third * heads * size + own.start, third * heads * size + own.stop)
            pieces.append((g[:, :, at].mT, w[:, at].mT))
        return pieces
    pieces = [(g[:, :, own].mT, w[:, own].mT)]
    for name in names[:1] if shared else names[:3]:
        g, w = matrices(f"{attention}.{name}")
        pieces.append((g[:, own], w[own]))
    return pieces


@pytest.mark.parametrize("name", MODELS)
def test_heads_agree_with_the_sum_over_their_weights(name):
    make, names, shared = MODELS[name]
    model = make().eval()
    batch = batch_for(model)
    found = measure(model, split(batch, 1 if name == "t5" else 3), loss_for(model), CRITERIA)
    stacked = {key: [] for key, _ in model.named_parameters()}
    for example in examples(batch):
        loss = loss_of_one(model, run(model, example), example["labels"])
        for key, g in zip(stacked, torch.autograd.grad(loss, list(model.parameters()), allow_unused=True), strict=True):
            stacked[key].append(torch.zeros_like(model.get_parameter(key)) if g is None else g)
    gradients = {key: torch.stack(of) for key, of in stacked.items()}
    for criterion in CRITERIA:
        relevance = found.by("head", criterion)
        assert len(relevance) == (6 if name == "t5" else 2)
        wanted = {
            attention: torch.tensor(
                [
                    head_relevance(criterion, pieces_of(model, gradients, attention, names, shared, head))
                    for head in range(len(of))
                ],
                dtype=torch.float64,
            )
            for attention, of in relevance.items()
        }
        a, b = torch.cat(list(relevance.values())), torch.cat(list(wanted.values()))
        assert a.dtype == torch.float64 and (a - b).abs().max() <= 1e-9 * b.abs().max(), criterion


def test_structures_that_are_not_known_have_no_heads():
    fused = made(GPTNeoXModel, GPTNeoXConfig(**LANGUAGE_MODEL, bos_token_id=1, eos_token_id=1))
    inventory = take_inventory(fused)
    assert inventory.attention_heads == []
    assert inventory.without_attention_heads == {
        f"layers.{i}.attention": "the projections of GPTNeoXAttention are not known" for i in range(2)
    }

    def reasons(model):
        return list(take_inventory(model).without_attention_heads.values())

    model = tiny_bert()
    attention = model.bert.encoder.layer[0].attention.self
    attention.mixing = nn.Linear(2, 2)
    assert reasons(model) == ["BertSelfAttention has mixing, whose part in the heads is not known"]
    model = tiny_bert()
    model.bert.encoder.layer[0].attention.self.num_attention_heads = 4
    assert reasons(model) == ["the sizes of its projections do not fit 4 heads of size 8"]
    model = tiny_bert()
    model.bert.encoder.layer[0].attention.self.key = nn.Linear(16, 12)
    assert reasons(model) == ["the sizes of its projections do not fit 2 heads of size 8"]
    model = tiny_bert()
    del model.bert.encoder.layer[0].attention.self.attention_head_size
    assert reasons(model) == ["BertSelfAttention does not say how many heads of what size it has"]
    model = tiny_bert()
    layers = model.bert.encoder.layer
    layers[0].attention.self.query.weight = layers[1].attention.self.query.weight
    assert len(reasons(model)) == 2 and all(reason.startswith("shares its weight") for reason in reasons(model))

    # GPTBigCode lays the rows of a c_attn out head by head, and makes it an nn.Linear.
    model = tiny_gpt2()
    model.transformer.h[0].attn.c_attn = nn.Linear(16, 48).double()
    assert reasons(model) == ["transformer.h.0.attn.c_attn is of layer type linear"]


def test_cross_attention_and_decoders_with_other_numbers_of_heads():
    model = tiny_gpt2(add_cross_attention=True)
    group = next(group for group in take_inventory(model).attention_heads if group.name.endswith("h.0.crossattention"))
    assert group.rows(1) == {
        "transformer.h.0.crossattention.q_attn": list(range(8, 16)),
        "transformer.h.0.crossattention.c_attn": [*range(8, 16), *range(24, 32)],
    }
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 4, "max_position_embeddings": 32}
    model = made(BartModel, BartConfig(vocab_size=VOCAB, **sizes, **heads, pad_token_id=0))
    heads = [(group.heads, group.head_size) for group in take_inventory(model).attention_heads]
    assert heads == [(2, 8), (4, 4), (4, 4)]
    config = GptOssConfig(
        **{**CLASSIFIER, "head_dim": 8, "num_key_value_heads": 1}, num_local_experts=2, eos_token_id=1
    )
    assert [group.heads for group in take_inventory(made(GptOssModel, config)).attention_heads] == [
        2,
        2,
    ]  # beside its sinks


def test_scores_of_heads_are_saved_loaded_and_compared(tmp_path):
    model = tiny_bert()
    scores = measure(model, [batch_for(model)], None, ["fisher", "relative_gradient", "random"])
    scores.save(tmp_path)
    again = RelevanceScores.load(tmp_path)
    assert again.inventory == scores.inventory
    for criterion in scores.criteria:
        for name, values in scores.by("head", criterion).items():
            assert torch.equal(again.by("head", criterion)[name], values) and values.shape == (2,)
    assert again.compare(scores, "head")[0]["units"] == 4
    stored = json.loads((tmp_path / "scores.json").read_text())
    stored["heads"][0]["heads"] = 3
    (tmp_path / "scores.json").write_text(json.dumps(stored))
    with pytest.raises(InputError, match="do not fit together"):
        RelevanceScores.load(tmp_path)


def test_heads_are_scored_where_all_of_them_is_measured():
    model = tiny_bert()
    scores = measure(
        model, [batch_for(model)], None, ["fisher", "relative_gradient"], exclude_modules=["layer.0.attention"]
    )
    for criterion in scores.criteria:
        assert list(scores.by("head", criterion)) == ["bert.encoder.layer.1.attention.self"]
    with pytest.raises(InputError, match="has a unit of granularity head"):
        select(scores, "50%", "head", exclude_modules=["layer.1.attention.self.value"])


def test_choosing_a_head_takes_its_rows_and_columns():
    model = tiny_shared_llama()
    scores = measure(model, [batch_for(model)], None, ["fisher"])
    relevance = scores.by("head")
    price = 2 * 4 * 16  # rows of the query projection and columns of the output projection
    plan = select(scores, 3 * price + 1, "head")
    assert plan.parameters == 3 * price
    best = torch.cat(list(relevance.values())).argsort(descending=True)[:3].tolist()
    for layer, name in enumerate(relevance):
        heads = [head - 4 * layer for head in sorted(best) if head // 4 == layer]
        cells = [i for head in heads for i in range(4 * head, 4 * head + 4)]
        if not heads:
            assert not any(key.startswith(name) for key in plan.modules)
            continue
        assert (plan.modules[f"{name}.q_proj"].rows, plan.modules[f"{name}.q_proj"].columns) == (cells, [])
        assert (plan.modules[f"{name}.o_proj"].columns, plan.modules[f"{name}.o_proj"].rows) == (cells, [])
        assert f"{name}.k_proj" not in plan.modules


def test_heads_that_cannot_be_trained_are_refused_by_name():
    fused = made(GPTNeoXModel, GPTNeoXConfig(**LANGUAGE_MODEL, bos_token_id=1, eos_token_id=1))
    with pytest.raises(InputError, match="projections of GPTNeoXAttention are not known"):
        select(measure(fused, criteria=["magnitude"]), "50%", "head")


@pytest.mark.parametrize("make", [tiny_bert, tiny_shared_llama])
def test_tuning_a_head_changes_its_weights_and_no_others(make):
    model = make()
    batch = text_batch((3, 11, 6, 2))
    scores = measure(model, [batch], None, ["fisher"])
    plan = select(scores, max(1, min(map(len, scores.by("head").values()))) * 400, "head")
    before = {key: value.detach().clone() for key, value in model.named_parameters()}
    group_of = {group.name: group for group in scores.inventory.attention_heads}
    tuned = get_peft_model(model, ReltuneConfig(plan=plan))
    optimizer = torch.optim.Adam([p for p in tuned.parameters() if p.requires_grad], lr=0.01)
    for _ in range(4):
        outputs = tuned(**{key: value for key, value in batch.items() if key != "labels"})
        nn.functional.cross_entropy(outputs.logits, batch["labels"]).backward()
        optimizer.step()
        optimizer.zero_grad()
    merged = dict(tuned.merge_and_unload().named_parameters())
    changed = {key: (merged[key] != value).nonzero().tolist() for key, value in before.items()}
    expected: dict[str, set[tuple[int, int]]] = {}
    best = [(v, name, h) for name, values in scores.by("head").items() for h, v in enumerate(values.tolist())]
    cells = 0
    for _, name, head in sorted(best, reverse=True):
        group = group_of[name]
        own = {
            f"{module}.weight": {(row, i) for row in rows for i in range(before[f"{module}.weight"].shape[1])}
            for module, rows in group.rows(head).items()
        }
        out = before[f"{group.output}.weight"].shape[0]
        own[f"{group.output}.weight"] = {(o, column) for o in range(out) for column in group.output_columns(head)}
        cells += sum(map(len, own.values()))
        if cells > plan.budget_parameters:
            break
        for key, of in own.items():
            expected.setdefault(key, set()).update(of)
    assert expected and {key: {tuple(at) for at in of} for key, of in changed.items() if of} == expected


def test_conv1d_is_canonical():
    """The fused projection of GPT-2 stores (in, out); a head's rows are rows of (out, in)."""
    model = tiny_gpt2()
    group = take_inventory(model).attention_heads[0]
    module = model.get_submodule("transformer.h.0.attn.c_attn")
    assert isinstance(module, Conv1D) and module.weight.shape == (16, 48)
    assert group.rows(1) == {"transformer.h.0.attn.c_attn": [*range(8, 16), *range(24, 32), *range(40, 48)]}
    assert group.output_columns(1) == range(8, 16)


def test_heads_of_conv1d_are_rows_and_columns_of_the_canonical_weight():
    model = tiny_gpt2()
    batch = batch_for(model)
    scores = measure(model, [batch], "causal_lm", ["fisher"])
    plan = select(scores, 16 * 32 + 1, "head")  # 24 rows and 8 columns of 16
    name = max(scores.by("head"), key=lambda key: scores.by("head")[key].max().item())
    head = int(scores.by("head")[name].argmax())
    group = next(group for group in scores.inventory.attention_heads if group.name == name)
    assert {key: (m.rows, m.columns) for key, m in plan.modules.items()} == {
        **{key: (list(rows), []) for key, rows in group.rows(head).items()},
        group.output: ([], list(group.output_columns(head))),
    }
    before = {key: value.detach().clone() for key, value in model.named_parameters()}
    tuned = get_peft_model(model, ReltuneConfig(plan=plan, init_weights=False))
    moved = {key: value != before[key] for key, value in tuned.merge_and_unload().named_parameters()}
    for key, rows in group.rows(head).items():
        assert moved[f"{key}.weight"].all(0).nonzero().squeeze(1).tolist() == list(rows)  # stored as (in, out)
    assert moved[f"{group.output}.weight"].all(1).nonzero().squeeze(1).tolist() == list(group.output_columns(head))
    assert sum(int(where.sum()) for where in moved.values()) == plan.parameters


class OddlyGroupedAttention(nn.Module):
    """Four query heads and three of keys and values, which no query head could share evenly."""

    def __init__(self):
        super().__init__()
        self.num_heads, self.head_dim = 4, 8
        self.q_proj, self.o_proj = nn.Linear(32, 32), nn.Linear(32, 32)
        self.k_proj, self.v_proj = nn.Linear(32, 24), nn.Linear(32, 24)


def test_heads_that_keys_and_values_do_not_divide_are_none():
    inventory = take_inventory(nn.ModuleDict({"attention": OddlyGroupedAttention()}))
    assert inventory.attention_heads == []
    assert "do not fit 4 heads of size 8" in inventory.without_attention_heads["attention"]
