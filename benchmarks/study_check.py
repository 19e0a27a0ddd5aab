"""Whether the study's trainings are those of Transformers and PEFT, and its captured steps on a GPU those of a plain loop on the CPU.

    python benchmarks/study_check.py --eager             on a CPU in seconds: tiny models, every kind of method
    python benchmarks/study_check.py [decoder | image]   on a GPU, the study's own models, and how long a step takes

The first trains a tiny BERT and a tiny Llama by torch.optim.AdamW with masked gradients, or by PEFT's LoRA, and compares every trained
number, the choice of every kind of place with a loop over weights, and the loss on plain text with Transformers' own.
"""

from __future__ import annotations

import re
import sys
import time
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import study_data
import study_training as st
from selection_study import HEADS_OF, PHASES, batches

STEPS, SEEDS, RATE, HEAD_RATE = 4, 2, 3e-3, 1e-2


# ---- tiny models, by Transformers


def tiny(kind: str) -> tuple[nn.Module, st.Base, st.Data, st.Data]:
    """A model, the same for the engine, a task and plain text."""
    torch.manual_seed(0)
    draw = np.random.default_rng(0)
    n, width, vocabulary = 40, 12, 97
    ids = draw.integers(5, vocabulary, (n, width))
    if kind == "encoder":
        from transformers import BertConfig, BertForMaskedLM
        from transformers.models.bert.modeling_bert import BertPooler

        config = BertConfig(
            vocab_size=vocabulary,
            hidden_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=48,
            max_position_embeddings=width,
            tie_word_embeddings=False,
        )
        model = BertForMaskedLM(config).eval()
        model.bert.pooler = BertPooler(config)
        head = model.cls.predictions
        with torch.no_grad():
            head.decoder.weight.copy_(model.bert.embeddings.word_embeddings.weight)
            head.decoder.bias.normal_()
        ids[:, 9:][draw.random((n, 3)) < 0.5] = 0
        task = {"ids": ids, "labels": draw.integers(0, 3, n), "kind": np.array("class")}
        places = np.sort(draw.random((n, 8)).argsort(1)[:, :2], 1)
        parts = {"dense": head.transform.dense.weight, "dense_bias": head.transform.dense.bias}
        parts |= {"norm": head.transform.LayerNorm.weight, "norm_bias": head.transform.LayerNorm.bias}
        parts |= {"bias": head.decoder.bias}
        plain = {
            "ids": ids,
            "places": places,
            "labels": draw.integers(5, vocabulary, (n, 2)),
            "kind": np.array("masked"),
        }
        weights, sizes = dict(model.bert.state_dict()), {"heads": 2, "eps": config.layer_norm_eps}
    else:
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=24,
            num_hidden_layers=2,
            num_attention_heads=3,
            num_key_value_heads=1,
            intermediate_size=48,
            rms_norm_eps=1e-5,
            rope_theta=100000.0,
            tie_word_embeddings=True,
        )
        model = LlamaForCausalLM(config).eval()
        spans = np.stack([draw.integers(4, 7, n), draw.integers(8, width + 1, n)], 1)
        task = {"ids": ids, "labels": spans, "kind": np.array("completion")}
        plain = {"ids": ids, "labels": np.tile([1, width], (n, 1)), "kind": np.array("completion")}
        weights, sizes = dict(model.model.state_dict()), {"heads": 3, "kv_heads": 1, "eps": 1e-5}
    weights = {name: tensor.clone() for name, tensor in weights.items() if tensor.is_floating_point()}
    cpu = torch.device("cpu")
    text = st.Data(plain, cpu)
    if kind == "encoder":
        text.head = {name: tensor.detach() for name, tensor in parts.items()}
    return model, st.Base(weights, kind, cpu, **sizes), st.Data(task, cpu), text  # type: ignore[arg-type]


class Trained(nn.Module):
    """The tiny model with the study's loss, as Transformers computes it."""

    def __init__(self, model: Any, data: st.Data, head: Tensor | None):
        super().__init__()
        self.kind, self.data = ("encoder" if head is not None else "decoder"), data
        self.inner = model.bert if head is not None else model
        if head is not None:
            hidden = 24
            self.head = nn.Linear(hidden, data.outputs)
            with torch.no_grad():
                self.head.weight.copy_(head[: data.outputs * hidden].view(data.outputs, hidden))
                self.head.bias.copy_(head[data.outputs * hidden :])

    def forward(self, rows: Tensor) -> Tensor:
        ids = self.data.ids[rows].long()
        if self.kind == "encoder":
            pooled = self.inner(input_ids=ids, attention_mask=(ids != 0).long()).pooler_output
            return F.cross_entropy(self.head(pooled), self.data.labels[rows])
        at = torch.arange(ids.shape[1])
        start, end = self.data.labels[rows].unbind(1)
        there = (at >= start.unsqueeze(1)) & (at < end.unsqueeze(1))
        return self.inner(input_ids=ids, labels=ids.masked_fill(~there, -100)).loss


def by_hand(model: Trained, trained: dict[nn.Parameter, Tensor | None], order: Tensor) -> None:
    """AdamW on the parameters, where a mask says which of their numbers are trained."""
    groups = [{"params": list(trained), "lr": RATE}]
    if model.kind == "encoder":
        groups.append({"params": list(model.head.parameters()), "lr": HEAD_RATE})
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / len(order))
    for rows in order:
        optimizer.zero_grad()
        model(rows).backward()
        for parameter, mask in trained.items():
            if mask is not None and parameter.grad is not None:
                parameter.grad *= mask
        nn.utils.clip_grad_norm_([p for group in groups for p in group["params"]], 1.0)  # type: ignore[union-attr]
        optimizer.step()
        schedule.step()


# ---- the checks


def eager(kind: str) -> list[str]:
    """The names of what was compared; an AssertionError where the engine is wrong."""
    model, base, _, _ = tiny(kind)
    linear = base.size["linear"]
    score = torch.rand(linear, generator=torch.Generator().manual_seed(1))
    chosen = {
        "NeuroAda": st.by_weights(base, "magnitude", "rows", 0.05),
        "SHiRA-WM": st.by_weights(base, "magnitude", "even", 0.05),
        "SMT": st.blocks(base, score, 0.1, 4, "global"),
        "Spectrum": st.by_weights(base, "spectrum", "kinds", 0.5),
        "Spectrum, fit": st.by_weights(base, "spectrum", "fit", 0.3),
        "top layer": st.by_weights(base, "top", "layer", 1),
        "biases, norms": torch.arange(linear, base.size["layers"]),
    }
    looped = {
        "NeuroAda": largest_of_each_row(base, 0.05),
        "SHiRA-WM": largest_of_each_matrix(base, 0.05),
        "SMT": best_tiles(base, score, 0.1, 4),
        "top layer": [i for name in base.place if f".{base.n_layers - 1}." in name for i in places(base, name)],
    }
    for name, expected in looped.items():
        assert chosen[name].tolist() == sorted(expected), name
    for name in ("Spectrum", "Spectrum, fit"):
        whole = [n for n in base.maps if base.place[n][0] in set(chosen[name].tolist())]
        assert chosen[name].tolist() == sorted(i for n in whole for i in places(base, n)), name
    assert len(chosen["Spectrum"]) == linear // 2 and len(chosen["Spectrum, fit"]) <= 0.3 * linear
    names = []
    for name, where in chosen.items():
        _compare(kind, name, where)
        names.append(name)
    maps = st.well_conditioned(base, 0.3)
    from peft.helpers import find_kappa_target_modules

    inside = model.bert.encoder if kind == "encoder" else model.model.layers  # type: ignore[union-attr]
    found = find_kappa_target_modules(inside, top_p=0.3, show_progress=False)["target_modules"] or []
    assert {re.sub(r"^(encoder\.|layers\.)", "", m.removesuffix(".weight")) for m in maps} == set(found), (maps, found)
    for name, some, fixed in (
        ("KappaTune LoRA", maps, False),
        ("LoRA", base.maps, False),
        ("directions", base.maps, True),
    ):
        _compare_lora(kind, name, some, fixed)
        names.append(name)
    return names


def places(base: st.Base, name: str) -> range:
    at, shape = base.place[name]
    return range(at, at + shape.numel())


def largest_of_each_matrix(base: st.Base, share: float) -> list[int]:
    found: list[int] = []
    for name in base.maps:
        every = sorted(places(base, name), key=lambda i: -abs(base.flat[i].item()))
        found += every[: round(share * len(every))]
    return found


def largest_of_each_row(base: st.Base, share: float) -> list[int]:
    """Each neuron's largest before any second one; among those of one rank the largest of the matrix."""
    found: list[int] = []
    for name in base.maps:
        at, (out, inn) = base.place[name]
        ranked = []
        for row in range(out):
            mine = sorted(range(at + row * inn, at + (row + 1) * inn), key=lambda i: -abs(base.flat[i].item()))
            ranked += [(rank, -abs(base.flat[i].item()), i) for rank, i in enumerate(mine)]
        found += [i for _, _, i in sorted(ranked)[: round(share * out * inn)]]
    return found


def best_tiles(base: st.Base, score: Tensor, share: float, side: int) -> list[int]:
    tiles = []
    for name in base.maps:
        at, (out, inn) = base.place[name]
        for row in range(0, out, side):
            for column in range(0, inn, side):
                inside = [at + (row + a) * inn + column + b for a in range(side) for b in range(side)]
                tiles.append((-sum(score[i].item() for i in inside), inside))
    return [i for _, inside in sorted(tiles)[: round(share * len(tiles))] for i in inside]


def _started(kind: str, **options: Any) -> tuple[st.Replicas, st.Data, st.Base, Tensor | None]:
    _, base, data, plain = tiny(kind)
    generator = torch.Generator().manual_seed(2)
    order = torch.randint(len(data.ids), (SEEDS, STEPS, 6), generator=generator)
    head = torch.randn(SEEDS, data.outputs * (base.hidden + 1), generator=generator) * 0.1 if data.outputs else None
    replicas = st.Replicas(base, data, order, head, dropout=0.0, **options)
    replicas.rates.fill_(RATE)
    replicas.head_rates.fill_(HEAD_RATE)
    replicas.run(STEPS)
    return replicas, plain, base, head


def _compare(kind: str, name: str, where: Tensor) -> None:
    replicas, plain, base, head = _started(kind, scope="layers", chosen=where.expand(SEEDS, -1).contiguous())
    after = st.evaluate(replicas, torch.arange(len(plain.ids)).expand(SEEDS, -1), plain)
    for seed in range(SEEDS):
        model, _, data, _ = tiny(kind)
        inner = model.bert if kind == "encoder" else model.model  # type: ignore[union-attr]
        mask = torch.zeros(base.size["all"])
        mask[where] = 1
        named = dict(inner.named_parameters())
        trained = {}
        for n in base.place:
            some = mask[list(places(base, n))].view(base.place[n][1])
            named[n].requires_grad_(bool(some.any()))
            if some.any():
                trained[named[n]] = some
        task = Trained(model, data, None if head is None else head[seed])
        by_hand(task, trained, replicas.order[seed])
        expected = torch.cat([named[n].detach().reshape(-1) for n in base.place])[: replicas.values.shape[1]]
        moved = (expected - base.flat[: len(expected)]).abs()
        assert moved[where].max() > RATE / 2, name
        torch.testing.assert_close(replicas.values[seed], expected, rtol=1e-4, atol=1e-5, msg=f"{kind} {name}")
        ids = plain.ids.long()
        if kind == "encoder":
            labels = torch.full_like(ids, -100).scatter(1, plain.places, plain.labels)
            loss = model(input_ids=ids, attention_mask=(ids != 0).long(), labels=labels).loss.item()
            expected_head = torch.cat([task.head.weight.reshape(-1), task.head.bias])
            torch.testing.assert_close(replicas.head[seed], expected_head.detach(), rtol=1e-4, atol=1e-5)
        else:
            loss = model(input_ids=ids, labels=ids).loss.item()
        assert abs(after[seed]["loss"] - loss) < 1e-4, (kind, name, after[seed], loss)


def _compare_lora(kind: str, name: str, maps: list[str], fixed: bool) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    rank = 2
    replicas, _, base, head = _started(kind, lora=rank, maps=maps, fixed_a=fixed)
    for seed in range(SEEDS):
        model, _, data, _ = tiny(kind)
        inner = model.bert if kind == "encoder" else model.model  # type: ignore[union-attr]
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=[m.removesuffix(".weight") for m in maps])
        inject_adapter_in_model(config, inner)
        trained: dict[nn.Parameter, Tensor | None] = {}
        at = 0
        for m in [m for m in base.maps if m in maps]:
            layer = inner.get_submodule(m.removesuffix(".weight"))
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            with torch.no_grad():
                a.copy_(replicas.factors_start[seed, at : at + a.numel()].view_as(a))
            trained |= {b: None} if fixed else {a: None, b: None}
            a.requires_grad_(not fixed)
            at += a.numel() + b.numel()
        assert replicas.factors.shape[1] == at and replicas.trained == sum(p.numel() for p in trained)
        by_hand(Trained(model, data, None if head is None else head[seed]), trained, replicas.order[seed])
        layers = [inner.get_submodule(m.removesuffix(".weight")) for m in base.maps if m in maps]
        pairs = [(layer.lora_A["default"].weight, layer.lora_B["default"].weight) for layer in layers]
        expected = torch.cat([part.detach().reshape(-1) for pair in pairs for part in pair])
        torch.testing.assert_close(replicas.factors[seed], expected, rtol=1e-4, atol=1e-5, msg=f"{kind} {name}")


def main() -> None:
    if "--eager" in sys.argv:
        for kind in ("encoder", "decoder"):
            print(f"{kind}: {', '.join(eager(kind))} are as by Transformers and PEFT")
        return
    kind = sys.argv[1] if len(sys.argv) > 1 else "encoder"
    gpu = torch.device("cuda")
    weights, tasks = study_data.load_model(kind), study_data.load_tasks(kind)
    task = tasks[PHASES[kind].tasks[0]]
    heads = {"heads": 9, "kv_heads": 3, "eps": 1e-5} if kind == "decoder" else {"heads": HEADS_OF[kind]}
    bases = {d: st.Base(weights, kind, torch.device(d), **heads) for d in ("cpu", "cuda")}  # type: ignore[arg-type]
    n = bases["cpu"].size["linear"]
    for name, steps in (("chosen", 4), ("LoRA", 4), ("all", 4)):
        results = {}
        for device, base in bases.items():
            options: dict[str, Any] = {"dropout": 0.0}
            generator = torch.Generator().manual_seed(0)
            if name == "chosen":
                options |= {
                    "scope": "linear",
                    "chosen": torch.randint(n, (1, n // 400), generator=generator).sort().values,
                }
                options["chosen"] = options["chosen"].unique(dim=1).to(device)
            elif name == "LoRA":
                options["lora"] = 4
            else:
                options["scope"] = "all"
            data = st.Data(task, torch.device(device))
            head = (
                torch.randn(1, data.outputs * (base.hidden + 1), generator=generator) * 0.02 if data.outputs else None
            )
            order = batches(task, 0, steps, 8, 2).unsqueeze(0)
            replicas = st.Replicas(base, data, order, head, **options)
            replicas.rates.fill_(1e-4 if name == "all" else 2e-3)
            replicas.head_rates.fill_(1e-3)
            replicas.capture()
            replicas.run(steps)
            with torch.no_grad():
                results[device] = replicas.loss(order[:, 0].to(device), False).item()
                start = replicas.base.flat[: replicas.values.shape[1]]
                moved = (
                    replicas.values[0] - start if name != "LoRA" else replicas.factors[0] - replicas.factors_start[0]
                )
                results[f"{device} moved"] = moved.cpu()
        a, b = results["cpu moved"], results["cuda moved"]
        print(
            f"{kind} {name}: loss after {steps} steps {results['cpu']:.5f} on the CPU, {results['cuda']:.5f} on the GPU; "
            f"cosine of what moved {torch.cosine_similarity(a, b, dim=0).item():.4f}",
            flush=True,
        )
        assert torch.cosine_similarity(a, b, dim=0) > 0.9
    data = st.Data(task, gpu)
    for count in (3, 6) if kind == "decoder" else (4, 12):
        order = batches(task, 0, 30, st.BATCH, 2).expand(count, -1, -1)
        head = torch.zeros(count, data.outputs * (bases["cuda"].hidden + 1)) if data.outputs else None
        replicas = st.Replicas(bases["cuda"], data, order, head, scope="linear", chosen=torch.arange(100, device=gpu).expand(count, -1), dropout=0.1 if kind == "encoder" else 0.0)  # fmt: skip
        replicas.capture()
        torch.cuda.synchronize()
        began = time.perf_counter()
        replicas.run(30)
        torch.cuda.synchronize()
        each = (time.perf_counter() - began) / 30
        memory = torch.cuda.max_memory_allocated() / 2**30
        print(f"{kind}: {count} trainings side by side, {1e3 * each:.1f} ms a step, peak {memory:.1f} GiB", flush=True)
        del replicas


if __name__ == "__main__":
    main()
