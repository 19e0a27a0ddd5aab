"""How the single weights that a sign probe chooses crowd in some rows and columns of a matrix.

    python benchmarks/crowded_places.py --device cuda --output_dir benchmarks/results       (a minute; on 2 cores a quarter of an hour)

needs ``benchmarks/.study_data`` (study_data.py). The probe is written out here: the weights move by 1e-4 · sign(gradient) after each
batch, and of each matrix the share with the largest sum of signs is chosen. For rows and columns, the record has the share of
the places that the most crowded 1%, 10% and 50% hold, means over the matrices, and the same for places at random; and what
share lies in each hundredth of the rows and columns, most crowded first, from which sampled_product.py draws places of its own.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BertConfig, BertForSequenceClassification, LlamaConfig

import study_data
from harness import arguments, benchmark

SHARES = (0.0012, 0.005)


def encoder() -> tuple[nn.Module, list[str]]:
    weights = study_data.load_model("encoder")
    words = weights["embeddings.word_embeddings.weight"]
    sizes = {"hidden_size": 384, "intermediate_size": 1536, "num_attention_heads": 12, "num_hidden_layers": 6}
    model = BertForSequenceClassification(BertConfig(vocab_size=len(words), num_labels=2, **sizes))
    model.bert.load_state_dict(weights, strict=False)
    return model, ["query", "key", "value", "dense"]


def decoder() -> tuple[nn.Module, list[str]]:
    weights = study_data.load_model("decoder")
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64}
    config = LlamaConfig(
        vocab_size=len(weights["embed_tokens.weight"]),
        **sizes,
        **heads,
        tie_word_embeddings=True,
        rms_norm_eps=1e-5,
        max_position_embeddings=8192,
        rope_parameters={"rope_theta": 100000.0, "rope_type": "default"},
    )
    model = AutoModelForCausalLM.from_config(config)
    model.model.load_state_dict(weights)
    return model, ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def batch(task: dict[str, Any], rows: Tensor, is_encoder: bool) -> dict[str, Tensor]:
    """Padding has the id 0 in the encoder's tasks; a decoder's labels are where the completion begins and ends."""
    ids, labels = (torch.from_numpy(task[name])[rows].long() for name in ("ids", "labels"))
    if is_encoder:
        return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": labels}
    at = torch.arange(ids.shape[1])
    used, wanted = at < labels[:, 1:], (at >= labels[:, :1]) & (at < labels[:, 1:])
    return {"input_ids": ids, "attention_mask": used.long(), "labels": ids.masked_fill(~wanted, -100)}


def movement(
    model: nn.Module, weights: dict[str, Tensor], task: dict[str, Any], steps: int, size: int
) -> dict[str, Tensor]:
    """|Σ sign(gradient)| of each weight over the batches, with the gradient's sum for ties."""
    is_encoder = "bert" in type(model).__name__.lower()
    generator = torch.Generator().manual_seed(0)
    first = int(task["n_test"])
    votes = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    sums = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for step in range(steps):
        rows = torch.randint(first, len(task["ids"]), (size,), generator=generator)
        device = next(iter(weights.values())).device
        loss = model(**{key: value.to(device) for key, value in batch(task, rows, is_encoder).items()}).loss
        for (name, weight), gradient in zip(
            weights.items(), torch.autograd.grad(loss, list(weights.values())), strict=True
        ):
            votes[name] += gradient.sign()
            sums[name] += gradient
            weight.data -= 1e-4 * gradient.sign()
        if step % 10 == 9:
            print(f"  step {step + 1} of {steps}: loss {loss.item():.3f}", flush=True)
    return {name: votes[name].abs() + 0.5 * sums[name].abs() / sums[name].abs().max() for name in weights}


def crowding(places: Tensor, shape: tuple[int, int]) -> dict[str, list[float]]:
    """Share of the places in each hundredth of the rows and of the columns, most crowded first."""
    found = {}
    for name, at, side in (("rows", places // shape[1], shape[0]), ("columns", places % shape[1], shape[1])):
        counts = torch.bincount(at, minlength=side).double().sort(descending=True).values.cumsum(0) / len(places)
        edges = torch.linspace(0, 1, 101, dtype=torch.float64) * side
        below = torch.cat([counts.new_zeros(1), counts])
        low = edges.floor().long().clamp(max=side - 1)
        at_edges = below[low] + (edges - low) * (below[low + 1] - below[low])
        found[name] = at_edges.diff().tolist()
    return found


def mean(of: list[dict[str, list[float]]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name in ("rows", "columns"):
        hundredths = torch.tensor([each[name] for each in of]).mean(0)
        result[name] = {f"most crowded {n}%": round(hundredths[:n].sum().item(), 4) for n in (1, 10, 50)}
        result[name]["hundredths"] = [round(x, 6) for x in hundredths.tolist()]
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--examples", type=int, default=32, help="in a batch")
    parser.add_argument("--kinds", nargs="+", default=["encoder", "decoder"], choices=["encoder", "decoder"])
    options = arguments(parser, "crowded_places")
    bench = benchmark(options)
    for kind in options.kinds:
        torch.manual_seed(0)
        model, words = encoder() if kind == "encoder" else decoder()
        model.to(options.device)
        tasks = study_data.load_tasks(kind)
        task = "movie" if kind == "encoder" else "chain_sum"
        weights = {
            name: module.weight
            for name, module in model.train().named_modules()
            if isinstance(module, nn.Linear) and name.rpartition(".")[2] in words and "pooler" not in name
        }
        print(f"{kind}: {task}, {len(weights)} matrices, of {sorted(tasks)}", flush=True)
        scores = movement(model, weights, tasks[task], options.steps, options.examples)
        for share in SHARES:
            chosen, random = [], []
            for score in scores.values():
                count = max(1, round(share * score.numel()))
                shape = (score.shape[0], score.shape[1])
                chosen.append(crowding(score.flatten().topk(count).indices.cpu(), shape))
                random.append(crowding(torch.randperm(score.numel())[:count], shape))
            bench.value(f"{kind}, {share:.2%}", mean(chosen))
            bench.value(f"{kind}, {share:.2%}, at random", mean(random))
        crowded = bench.result["values"][f"{kind}, {SHARES[-1]:.2%}"]["rows"]["most crowded 10%"]
        bench.check(f"{kind}: the most crowded tenth of the rows holds", crowded, 0.1, at_least=True)
        bench.save(options.output_dir, options.name)
    return bench.finish(options.output_dir, options.name)


if __name__ == "__main__":
    raise SystemExit(main())
