"""Many small trainings of one model at a time, exactly and fast: the engine of the selection study.

R trainings that differ in seed, learning rate and chosen weights run side by side as one batch of models: a weight matrix is a
tensor (R, out, in), a batch of texts (R, batch, tokens), and no number of one training enters another. All trained numbers of a
training lie in one row of a few flat tensors; AdamW (beta 0.9 and 0.999, eps 1e-8, no weight decay), clipping of each training's
gradient at norm 1 and the linear decay of the rate are written out on them. On a GPU one step is captured in a CUDA graph and
replayed. The encoder (BERT) and the image model (ViT) run in float32 with TF32 products, the decoder (Llama) in bfloat16 autocast
over float32 weights; on a CPU all run in float32.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from study_data import LABEL_NONE

BATCH = 32
Names = Mapping[str, Tensor]


class Base:
    """A pretrained model: its weights by name, and the order in which they lie in a flat vector.

    The linear maps of the layers come first, then biases and norms of the layers, then all else; so a prefix of the flat vector is
    "linear", "layers" or "all".
    """

    def __init__(
        self, weights: Names, kind: str, device: torch.device, heads: int, kv_heads: int = 0, eps: float = 1e-12
    ):
        self.kind, self.device, self.heads, self.kv_heads, self.eps = kind, device, heads, kv_heads or heads, eps
        inside = ("encoder.layer." if kind == "encoder" else "layers.", "")[0]
        layers = [n for n in weights if n.startswith(inside)]
        maps = [n for n in layers if weights[n].dim() == 2]
        small = [n for n in layers if weights[n].dim() == 1]
        rest = [n for n in weights if n not in set(layers)]
        names = [*maps, *small, *rest]
        self.flat = torch.cat([weights[n].reshape(-1).float() for n in names]).to(device)
        self.place: dict[str, tuple[int, torch.Size]] = {}
        at = 0
        for name in names:
            self.place[name] = (at, weights[name].shape)
            at += weights[name].numel()
        self.maps = maps
        count = {n: weights[n].numel() for n in names}
        self.size = {"linear": sum(count[n] for n in maps), "all": at, "none": 0}
        self.size["layers"] = self.size["linear"] + sum(count[n] for n in small)
        self.weights = {n: self.flat[a : a + s.numel()].view(s) for n, (a, s) in self.place.items()}
        self.hidden = min(weights[n].shape[1] for n in maps)
        self.n_layers = 1 + max(int(n.removeprefix(inside).split(".")[0]) for n in maps)

    def untrained(self, generator: torch.Generator) -> Tensor:
        """All numbers as before any training: biases 0, norms 1, the rest normal with a standard deviation of 0.02."""
        fresh = 0.02 * torch.randn(len(self.flat), generator=generator)
        for name, (at, shape) in self.place.items():
            if len(shape) == 1:
                fresh[at : at + shape.numel()] = float("norm" in name.lower() and name.endswith("weight"))
        return fresh.to(self.device)

    @functools.cached_property
    def singular_values(self) -> dict[str, Tensor]:
        """By linear map, from the largest to the smallest."""
        return {name: torch.linalg.svdvals(self.weights[name]) for name in self.maps}

    def rms(self) -> Tensor:
        """For every number of "linear" the root mean square of its matrix."""
        return torch.cat([self.weights[n].square().mean().sqrt().expand(self.weights[n].numel()) for n in self.maps])


class Data:
    """A task's texts (or the pixels of its images) and labels on the device."""

    def __init__(self, task: Mapping[str, np.ndarray], device: torch.device):
        self.kind = str(task["kind"])
        self.ids = torch.from_numpy(task["ids"].astype(np.int32)).to(device)
        labels = torch.from_numpy(
            np.asarray(task["labels"]).astype(np.float32 if self.kind == "regression" else np.int64)
        )
        self.labels = labels.to(device).float() if self.kind == "regression" else labels.to(device).long()
        self.outputs = {"regression": 1, "completion": 0, "masked": 0}.get(self.kind, int(labels.max()) + 1)
        if self.kind == "completion":
            self.longest = int((labels[:, 1] - labels[:, 0]).max())
        if self.kind == "masked":
            self.places = torch.from_numpy(np.asarray(task["places"])).to(device).long()
            self.head: dict[str, Tensor] = {}  # for_masked_words


class Replicas:
    """R trainings side by side from the base model.

    Args:
        scope: which prefix of the flat weights is copied for each training, so that it may be changed: "none", "linear", …
        chosen: (R, k) places in the flat vector that are trained, or None: all of the scope.
        lora: the rank of low-rank adapters on every linear map, or on those of ``maps``; 0 for none.
        head: (R, outputs × (hidden + 1)) of the new heads, or None for a decoder.
        order: (R, steps, batch) rows of the data.
        rates, head_rates: (R,) peak learning rates.
    """

    def __init__(
        self,
        base: Base,
        data: Data,
        order: Tensor,
        head: Tensor | None,
        *,
        scope: str = "none",
        chosen: Tensor | None = None,
        lora: int = 0,
        maps: Collection[str] = (),
        lora_a: Tensor | None = None,
        fixed_a: bool = False,
        dropout: float = 0.1,
        train_head: bool = True,
    ):
        self.base, self.data, self.order, self.dropout = base, data, order.to(base.device), dropout
        self.R, self.steps = order.shape[0], order.shape[1]
        device, R = base.device, self.R
        self.scope, self.chosen, self.fixed_a = scope, chosen, fixed_a
        self.t = torch.zeros(1, dtype=torch.long, device=device)
        self.rates = torch.zeros(R, 1, device=device)
        self.head_rates = torch.zeros(R, 1, device=device)
        self.groups: list[dict[str, Any]] = []
        self.named: dict[str, Tensor] = dict(base.weights)
        self.lora: dict[str, tuple[Tensor, Tensor]] = {}
        n = base.size[scope]
        self.values = torch.empty(R, n, device=device)
        self.leaves: list[Tensor] = []
        if n:
            for name, (at, shape) in base.place.items():
                if at < n:
                    self.named[name] = self._leaf(self.values, at, shape)
                    self.leaves.append(self.named[name])
            if chosen is not None:
                assert chosen.shape[0] == R
            self._group(self.values, self.leaves, chosen, self.rates)
        self.factors = torch.empty(R, 0, device=device)
        if lora:
            shapes = [(name, *base.weights[name].shape) for name in base.maps if not maps or name in maps]
            total = sum(lora * (out + inn) for _, out, inn in shapes)
            self.factors = torch.zeros(R, total, device=device)
            self.factors_start = torch.zeros(R, total, device=device)
            leaves, at, at_a = [], 0, 0
            mask = torch.ones(total, device=device)
            generator = torch.Generator().manual_seed(17)
            for name, out, inn in shapes:
                first = slice(at, at + lora * inn)
                if lora_a is None:  # PEFT's start: Kaiming-uniform with a = sqrt(5)
                    start = (torch.rand(R, lora * inn, generator=generator) * 2 - 1).to(device) / math.sqrt(inn)
                else:
                    start = lora_a[:, at_a : at_a + lora * inn]
                self.factors_start[:, first] = start
                if fixed_a:
                    mask[first] = 0
                a = self._leaf(self.factors, at, torch.Size((lora, inn)))
                b = self._leaf(self.factors, at + lora * inn, torch.Size((out, lora)))
                self.lora[name] = (a, b)
                leaves += [a, b]
                at += lora * (inn + out)
                at_a += lora * inn
            self._group(self.factors, leaves, None, self.rates, mask if fixed_a else None)
        self.head = torch.empty(R, 0, device=device)
        if head is not None:
            self.head_start = head.to(device)
            self.head = torch.empty_like(self.head_start)
            c, h = data.outputs, base.hidden
            weight = self._leaf(self.head, 0, torch.Size((c, h)))
            bias = self._leaf(self.head, c * h, torch.Size((c,)))
            self.named["head.weight"], self.named["head.bias"] = weight, bias
            if train_head:
                self._group(self.head, [weight, bias], None, self.head_rates)
        self.values_start: Tensor | None = None
        self.graph: torch.cuda.CUDAGraph | None = None
        self.reset()

    @property
    def trained(self) -> int:
        """Numbers trained per training, without the head."""
        values = (self.values.shape[1] if self.chosen is None else self.chosen.shape[1]) if self.scope != "none" else 0
        factors = sum(b[0].numel() + (0 if self.fixed_a else a[0].numel()) for a, b in self.lora.values())
        return values + factors

    def _leaf(self, storage: Tensor, at: int, shape: torch.Size) -> Tensor:
        return storage[:, at : at + shape.numel()].view(self.R, *shape).detach().requires_grad_()

    def _group(
        self, storage: Tensor, leaves: list[Tensor], chosen: Tensor | None, rate: Tensor, mask: Tensor | None = None
    ) -> None:
        like = storage if chosen is None else torch.empty(chosen.shape, device=storage.device)
        self.groups.append(
            {"storage": storage, "leaves": leaves, "chosen": chosen, "rate": rate, "mask": mask}
            | {"m": torch.zeros_like(like), "v": torch.zeros_like(like)}
        )

    @torch.no_grad()
    def reset(self) -> None:
        """Everything as before the first step."""
        self.t.zero_()
        if self.values.numel():
            self.values.copy_(self.base.flat[: self.values.shape[1]].expand(self.R, -1))
            if self.values_start is not None and self.chosen is None:
                self.values.copy_(self.values_start)
            elif self.values_start is not None:
                self.values.scatter_(1, self.chosen, self.values_start)
        if self.lora:
            self.factors.copy_(self.factors_start)
        if self.head.numel():
            self.head.copy_(self.head_start)
        for group in self.groups:
            group["m"].zero_()
            group["v"].zero_()

    def state(self) -> dict[str, Tensor]:
        """What training changed, one row per training."""
        values = self.values if self.chosen is None else self.values.gather(1, self.chosen)
        return {"values": values.clone(), "factors": self.factors.clone(), "head": self.head.clone()}

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        self.reset()
        if self.chosen is None:
            self.values.copy_(state["values"])
        else:
            self.values.scatter_(1, self.chosen, state["values"])
        self.factors.copy_(state["factors"])
        self.head.copy_(state["head"])

    def batch(self) -> Tensor:
        return self.order.index_select(1, self.t).squeeze(1)

    def loss(self, rows: Tensor, training: bool) -> Tensor:
        """(R,) mean losses of the texts in ``rows`` (R, batch)."""
        output = forward(self, rows, training)
        return losses(output, self.data, rows)

    def step(self) -> None:
        """One step of AdamW in every training."""
        loss = self.loss(self.batch(), self.dropout > 0)
        leaves = [leaf for group in self.groups for leaf in group["leaves"]]
        gradients = list(torch.autograd.grad(loss.sum(), leaves, materialize_grads=True))
        with torch.no_grad():
            picked = []
            for group in self.groups:
                mine, gradients = gradients[: len(group["leaves"])], gradients[len(group["leaves"]) :]
                whole = torch.cat([g.reshape(self.R, -1) for g in mine], 1)
                if group["chosen"] is not None:
                    whole = whole.gather(1, group["chosen"])
                if group["mask"] is not None:
                    whole = whole * group["mask"]
                picked.append(whole)
            norm = sum(g.square().sum(1, keepdim=True) for g in picked).sqrt()  # type: ignore[union-attr]
            factor = (1 / (norm + 1e-6)).clamp(max=1)
            left = 1 - self.t / self.steps
            now = (self.t + 1).double()
            correct_m, correct_v = (1 - 0.9**now).float(), (1 - 0.999**now).float()
            for group, gradient in zip(self.groups, picked, strict=True):
                gradient = gradient * factor
                group["m"].lerp_(gradient, 0.1)
                group["v"].mul_(0.999).addcmul_(gradient, gradient, value=0.001)
                update = (group["m"] / correct_m) / ((group["v"] / correct_v).sqrt() + 1e-8) * (group["rate"] * left)
                storage, chosen = group["storage"], group["chosen"]
                if chosen is None:
                    storage.sub_(update)
                else:
                    storage.scatter_(1, chosen, storage.gather(1, chosen) - update)
            self.t.add_(1)

    def run(self, steps: int, step: Callable[[], None] | None = None) -> None:
        """So many steps, on a GPU as replays of one captured step; ``step`` instead of AdamW's."""
        step = step or self.step
        if self.base.device.type != "cuda":
            for _ in range(steps):
                step()
            return
        if self.graph is None:
            raise RuntimeError("capture() comes first")
        for _ in range(steps):
            self.graph.replay()

    def capture(self, step: Callable[[], None] | None = None, then: Callable[[], None] | None = None) -> None:
        """Capture a step in a CUDA graph, and put everything back as it was (``then``, reset)."""
        if self.base.device.type != "cuda":
            return
        step = step or self.step
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step()
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            step()
        (then or self.reset)()


# ---- the models


def linear(replicas: Replicas, name: str, x: Tensor, taps: dict[str, tuple[Tensor, Tensor]] | None) -> Tensor:
    """(R, n, in) to (R, n, out), by one weight for all trainings or one for each."""
    y = product(x, replicas.named[f"{name}.weight"], replicas.named.get(f"{name}.bias"))
    if f"{name}.weight" in replicas.lora:
        a, b = replicas.lora[f"{name}.weight"]
        y = y + 2.0 * torch.bmm(torch.bmm(x, a.transpose(1, 2)), b.transpose(1, 2))
    if taps is not None:
        taps[f"{name}.weight"] = (x, y)
    return y


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if weight.dim() == 2 and (bias is None or bias.dim() == 1):
        return F.linear(x, weight, bias)
    full = weight if weight.dim() == 3 else weight.expand(x.shape[0], -1, -1)
    y = torch.bmm(x, full.transpose(1, 2))
    return y if bias is None else y + (bias.unsqueeze(1) if bias.dim() == 2 else bias)


def layer_norm(replicas: Replicas, x: Tensor, name: str) -> Tensor:
    weight, bias = replicas.named[f"{name}.weight"], replicas.named[f"{name}.bias"]
    H, eps = replicas.base.hidden, replicas.base.eps
    if weight.dim() == 1:
        return F.layer_norm(x, (H,), weight, bias, eps)
    return scaled(F.layer_norm(x, (H,), eps=eps), weight, bias)


def embed(table: Tensor, ids: Tensor) -> Tensor:
    """(R, batch, tokens) to (R, batch × tokens, hidden)."""
    R = ids.shape[0]
    ids = ids.reshape(R, -1).long()
    if table.dim() == 2:
        return F.embedding(ids, table)
    shift = torch.arange(R, device=ids.device).unsqueeze(1) * table.shape[1]
    return table.reshape(-1, table.shape[2]).index_select(0, (ids + shift).view(-1)).view(R, -1, table.shape[2])


def scaled(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    y = x * (weight.unsqueeze(1) if weight.dim() == 2 else weight)
    return y if bias is None else y + (bias.unsqueeze(1) if bias.dim() == 2 else bias)


def forward(
    replicas: Replicas, rows: Tensor, training: bool, taps: dict[str, tuple[Tensor, Tensor]] | None = None
) -> Tensor:
    """Outputs of R models for their rows: (R, batch, classes), (R, batch, tokens, classes), or (R, batch, longest, vocabulary)."""
    ids = replicas.data.ids[rows]
    drop = replicas.dropout if training else 0.0
    if replicas.base.kind == "encoder":
        return encoder(replicas, ids, rows, drop, taps)
    if replicas.base.kind == "image":
        return vit(replicas, ids, taps)
    enabled = replicas.base.device.type == "cuda"
    with torch.autocast(replicas.base.device.type, torch.bfloat16, enabled=enabled, cache_enabled=False):
        return decoder(replicas, ids, rows, taps)


def encoder(
    replicas: Replicas, ids: Tensor, rows: Tensor, drop: float, taps: dict[str, tuple[Tensor, Tensor]] | None
) -> Tensor:
    """BERT, as Transformers' BertModel with the default positions, and a head on the pooled output or on every token."""
    base, named = replicas.base, replicas.named
    R, B, T = ids.shape
    H = base.hidden
    norm = partial(layer_norm, replicas)
    places, types = (named[f"embeddings.{part}_embeddings.weight"] for part in ("position", "token_type"))
    added = places[..., :T, :] + types[..., :1, :]  # (T, H) or (R, T, H)
    x = embed(named["embeddings.word_embeddings.weight"], ids).view(R, B, T, H)
    x = (x + (added.unsqueeze(1) if added.dim() == 3 else added)).view(R, B * T, H)
    x = F.dropout(norm(x, "embeddings.LayerNorm"), drop)
    unseen = torch.zeros(R * B, 1, 1, T, device=ids.device).masked_fill((ids == 0).view(R * B, 1, 1, T), -math.inf)
    unseen = unseen.expand(-1, base.heads, T, -1)
    for layer in range(base.n_layers):
        at = f"encoder.layer.{layer}"
        q, k, v = (
            linear(replicas, f"{at}.attention.self.{part}", x, taps).view(R * B, T, base.heads, -1).transpose(1, 2)
            for part in ("query", "key", "value")
        )
        y = F.scaled_dot_product_attention(q, k, v, unseen, dropout_p=drop).transpose(1, 2).reshape(R, B * T, H)
        y = F.dropout(linear(replicas, f"{at}.attention.output.dense", y, taps), drop)
        x = norm(x + y, f"{at}.attention.output.LayerNorm")
        y = linear(replicas, f"{at}.output.dense", F.gelu(linear(replicas, f"{at}.intermediate.dense", x, taps)), taps)
        x = norm(x + F.dropout(y, drop), f"{at}.output.LayerNorm")
    if replicas.data.kind == "masked":
        return masked_words(base, replicas.data, x.view(R, B, T, H), rows)
    if replicas.data.kind == "tagging":
        return linear(replicas, "head", F.dropout(x, drop), None).view(R, B, T, -1)
    first = x.view(R, B, T, H)[:, :, 0]
    pooled = torch.tanh(linear(replicas, "pooler.dense", first, None))
    return linear(replicas, "head", F.dropout(pooled, drop), None)


def vit(replicas: Replicas, pixels: Tensor, taps: dict[str, tuple[Tensor, Tensor]] | None) -> Tensor:
    """ViT without dropout, as Transformers' ViTForImageClassification, for square grey images: (R, batch, pixels), 0 to 255."""
    base, named = replicas.base, replicas.named
    R, B, n_pixels = pixels.shape
    H = base.hidden
    norm = partial(layer_norm, replicas)
    at = "embeddings.patch_embeddings.projection"
    patch = named[f"{at}.weight"].shape[-1]
    side = math.isqrt(n_pixels) // patch
    x = (pixels.float() / 127.5 - 1).view(R, B, side, patch, side, patch).transpose(3, 4).reshape(R, -1, patch * patch)
    x = product(x, named[f"{at}.weight"].flatten(-3), named[f"{at}.bias"]).view(R, B, -1, H)
    first, places = (named[f"embeddings.{part}"] for part in ("cls_token", "position_embeddings"))
    x = torch.cat((first.view(-1, 1, 1, H).expand(R, B, -1, -1), x), 2) + places.view(-1, 1, side * side + 1, H)
    T = x.shape[2]
    x = x.view(R, B * T, H)
    for layer in range(base.n_layers):
        at = f"layers.{layer}"
        y = norm(x, f"{at}.layernorm_before")
        q, k, v = (
            linear(replicas, f"{at}.attention.{part}_proj", y, taps).view(R * B, T, base.heads, -1).transpose(1, 2)
            for part in "qkv"
        )
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(R, B * T, H)
        x = x + linear(replicas, f"{at}.attention.o_proj", y, taps)
        y = norm(x, f"{at}.layernorm_after")
        x = x + linear(replicas, f"{at}.mlp.fc2", F.gelu(linear(replicas, f"{at}.mlp.fc1", y, taps)), taps)
    return linear(replicas, "head", norm(x.view(R, B, T, H)[:, :, 0], "layernorm"), None)


def masked_words(base: Base, data: Data, x: Tensor, rows: Tensor) -> Tensor:
    """(R, batch, masked, vocabulary) by a head for masked words, or what it would read: (R, batch, masked, hidden)."""
    x = x.gather(2, data.places[rows].unsqueeze(-1).expand(-1, -1, -1, x.shape[3]))
    return by_head(base, data.head, x) if data.head else x


def by_head(base: Base, head: Names, x: Tensor) -> Tensor:
    """BERT's head for masked words. The embeddings that it reads are the base's, whatever a training moved."""
    x = F.gelu(F.linear(x, head["dense"], head["dense_bias"]))
    x = F.layer_norm(x, x.shape[-1:], head["norm"], head["norm_bias"], base.eps)
    return F.linear(x, base.weights["embeddings.word_embeddings.weight"], head["bias"])


def head_for_masked_words(
    base: Base, task: Mapping[str, np.ndarray], maskings: int = 8, epochs: int = 3
) -> dict[str, Tensor]:
    """MiniLM comes without one: it is trained on what the untouched model makes of pieces of text, each masked in several ways.

    AdamW, 1024 masked words a step, 2e-3 with linear decay; the bias starts at the words' frequencies, the linear map at the identity.
    """
    device, width = base.device, base.hidden
    draw = np.random.default_rng(11)
    whole, masked = task["train_ids"].astype(np.int64), task["places"].shape[1]
    states, labels = [], []
    for _ in range(maskings):
        places = 1 + draw.random((len(whole), whole.shape[1] - 2)).argsort(1)[:, :masked]
        ids = whole.copy()
        np.put_along_axis(ids, places, int(task["mask"][0]), 1)
        data = Data(
            {"ids": ids, "places": places, "labels": np.take_along_axis(whole, places, 1), "kind": task["kind"]}, device
        )
        replicas = Replicas(base, data, torch.zeros(1, 1, 1, dtype=torch.long), None)
        with torch.no_grad():
            for rows in torch.arange(len(whole), device=device).unsqueeze(0).split(250, 1):
                states.append(forward(replicas, rows, False).flatten(0, 2))
        labels.append(data.labels.flatten())
    x, wanted = torch.cat(states), torch.cat(labels)
    counts = torch.bincount(wanted, minlength=len(base.weights["embeddings.word_embeddings.weight"])).float() + 0.1
    head = {
        "dense": torch.eye(width),
        "dense_bias": torch.zeros(width),
        "norm": torch.ones(width),
        "norm_bias": torch.zeros(width),
    }
    head = {name: tensor.to(device) for name, tensor in head.items()} | {"bias": (counts / counts.sum()).log()}
    for tensor in head.values():
        tensor.requires_grad_()
    size = min(1024, len(x))
    steps = epochs * (len(x) // size)
    optimizer = torch.optim.AdamW(head.values(), lr=2e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    torch.manual_seed(0)
    for _ in range(epochs):
        for some in torch.randperm(len(x)).to(device)[: len(x) // size * size].view(-1, size):
            optimizer.zero_grad()
            F.cross_entropy(by_head(base, head, x[some]), wanted[some]).backward()
            optimizer.step()
            schedule.step()
    return {name: tensor.detach() for name, tensor in head.items()}


def decoder(replicas: Replicas, ids: Tensor, rows: Tensor, taps: dict[str, tuple[Tensor, Tensor]] | None) -> Tensor:
    """Llama, as Transformers' LlamaForCausalLM with tied embeddings; logits only where a completion's tokens are predicted."""
    base, named = replicas.base, replicas.named
    R, B, T = ids.shape
    H, heads, kv = base.hidden, base.heads, base.kv_heads
    width = H // heads

    def norm(x: Tensor, name: str) -> Tensor:
        weight = named[f"{name}.weight"]
        if weight.dim() == 1:
            return F.rms_norm(x, (H,), weight, base.eps)
        return scaled(F.rms_norm(x, (H,), None, base.eps), weight)

    x = embed(named["embed_tokens.weight"], ids)
    angle = torch.arange(T, device=ids.device).unsqueeze(1) / (
        100000.0 ** (torch.arange(0, width, 2, device=ids.device) / width)
    )
    cos, sin = (f(angle).repeat(1, 2) for f in (torch.cos, torch.sin))

    def rotated(z: Tensor, n: int) -> Tensor:
        z = z.view(R * B, T, n, width).transpose(1, 2)
        half = width // 2
        turned = torch.cat((-z[..., half:], z[..., :half]), -1)
        return z * cos.to(z.dtype) + turned * sin.to(z.dtype)

    for layer in range(base.n_layers):
        at = f"layers.{layer}"
        y = norm(x, f"{at}.input_layernorm")
        q, k, v = (linear(replicas, f"{at}.self_attn.{part}_proj", y, taps) for part in "qkv")
        q, k = rotated(q, heads), rotated(k, kv)
        v = v.view(R * B, T, kv, width).transpose(1, 2)
        k, v = (z.repeat_interleave(heads // kv, 1) for z in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(R, B * T, H)
        x = x + linear(replicas, f"{at}.self_attn.o_proj", y, taps)
        y = norm(x, f"{at}.post_attention_layernorm")
        gate = F.silu(linear(replicas, f"{at}.mlp.gate_proj", y, taps))
        x = x + linear(replicas, f"{at}.mlp.down_proj", gate * linear(replicas, f"{at}.mlp.up_proj", y, taps), taps)
    places, _ = completion_places(replicas.data, rows, T)
    x = x.view(R, B, T, H).gather(2, places.unsqueeze(-1).expand(-1, -1, -1, H)).view(R, -1, H)
    x = norm(x, "norm")
    table = named["embed_tokens.weight"]
    logits = F.linear(x, table) if table.dim() == 2 else torch.bmm(x, table.transpose(1, 2))
    return logits.view(R, B, replicas.data.longest, -1)


def completion_places(data: Data, rows: Tensor, T: int) -> tuple[Tensor, Tensor]:
    """(R, batch, longest) tokens from which a completion's next token is predicted, and whether there is one."""
    start, end = data.labels[rows].unbind(-1)
    places = start.unsqueeze(-1) - 1 + torch.arange(data.longest, device=rows.device)
    there = places < end.unsqueeze(-1) - 1
    return places.clamp(max=T - 2), there


def targets(data: Data, rows: Tensor) -> Tensor:
    if data.kind != "completion":
        return data.labels[rows]
    ids = data.ids[rows].long()
    places, there = completion_places(data, rows, ids.shape[2])
    return ids.gather(2, places + 1).masked_fill(~there, LABEL_NONE)


def losses(output: Tensor, data: Data, rows: Tensor) -> Tensor:
    """(R,) mean losses: of texts, or of labelled tokens."""
    R = rows.shape[0]
    wanted = targets(data, rows)
    if data.kind == "regression":
        return (output.squeeze(-1) - wanted).square().mean(1)
    each = F.cross_entropy(output.float().flatten(0, -2), wanted.reshape(-1), ignore_index=LABEL_NONE, reduction="none")
    return each.view(R, -1).sum(1) / (wanted.view(R, -1) != LABEL_NONE).sum(1)


@torch.no_grad()
def evaluate(replicas: Replicas, rows: Tensor, data: Data | None = None) -> list[dict[str, float]]:
    """The metric (in points) and mean loss of every training on its rows (R, n), of its own task or of other ``data``.

    Accuracy; Pearson's correlation; F1 over words that are not lower-case; and the share of completions of which every token,
    the end included, is the likeliest after the right ones before it, which is when greedy decoding writes exactly that answer.
    """
    kept, replicas.data = replicas.data, data or replicas.data
    try:
        return _evaluate(replicas, rows)
    finally:
        replicas.data = kept


def _evaluate(replicas: Replicas, rows: Tensor) -> list[dict[str, float]]:
    data = replicas.data
    parts: list[tuple[Tensor, ...]] = []
    size = 125 if data.kind != "completion" else 32 if data.longest < 32 else 8
    for some in rows.split(size, 1):
        output, wanted = forward(replicas, some, False), targets(data, some)
        loss = losses(output, data, some)
        weight = (wanted.reshape(len(some), -1) != LABEL_NONE).sum(1) if data.kind != "regression" else some.shape[1]
        best = output.squeeze(-1) if data.kind == "regression" else output.argmax(-1)
        if data.kind == "completion":
            best, wanted = ((best == wanted) | (wanted == LABEL_NONE)).all(-1), torch.ones_like(some)
        parts.append((loss * weight, loss * 0 + weight, best.float(), wanted))
    total, weights = (torch.stack([p[i] for p in parts]).sum(0) for i in (0, 1))
    mean = (total / weights).tolist()
    best, wanted = (torch.cat([p[i] for p in parts], 1).float() for i in (2, 3))
    if data.kind == "regression":
        a, b = (z - z.mean(1, keepdim=True) for z in (best, wanted))
        metric = (a * b).sum(1) / (a.square().sum(1) * b.square().sum(1)).sqrt().clamp(min=1e-12)
    elif data.kind == "tagging":
        there = wanted != LABEL_NONE
        right = ((best == wanted) & (wanted > 0)).sum((1, 2))
        metric = 2 * right / ((best > 0) & there).sum((1, 2)).add((wanted > 0).sum((1, 2))).clamp(min=1)
    else:
        metric = (best == wanted).float().flatten(1).mean(1)
    return [{"metric": 100 * m, "loss": loss} for m, loss in zip(metric.tolist(), mean, strict=True)]


# ---- measuring along the path


class Probe:
    """A short run in which all linear maps move, for R seeds and settings; votes and gradients are added up on the way.

    Args:
        sizes: (R,) size of a step, in units of the weights or, where ``relative``, of each matrix's root mean square.
        how: "sign" of the gradient, "momentum" (sign of its mean, beta 0.9) or "adam" (its step; the votes are the movement).
    """

    def __init__(self, replicas: Replicas, sizes: Tensor, relative: Tensor, how: str = "sign"):
        self.replicas, self.how = replicas, how
        self.size = sizes.to(replicas.base.device).unsqueeze(1)
        self.relative = relative.to(replicas.base.device).unsqueeze(1)
        self.rms = replicas.base.rms()
        like = replicas.values
        self.votes, self.sums, self.squares = (torch.zeros_like(like) for _ in range(3))
        self.m, self.v = (torch.zeros_like(like if how != "sign" else like[:, :0]) for _ in range(2))

    def clear(self) -> None:
        self.replicas.reset()
        for tensor in (self.votes, self.sums, self.squares, self.m, self.v):
            tensor.zero_()

    def step(self) -> None:
        r = self.replicas
        loss = r.loss(r.batch(), r.dropout > 0)
        gradients = torch.autograd.grad(loss.sum(), r.leaves, materialize_grads=True)
        with torch.no_grad():
            every = torch.cat([g.reshape(r.R, -1) for g in gradients], 1)
            n = r.base.size["linear"]
            gradient = every
            move = gradient.sign()
            if self.how != "sign":
                self.m.lerp_(gradient, 0.1)
                move = self.m.sign()
            if self.how == "adam":
                self.v.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
                now = (r.t + 1).double()
                move = (self.m / (1 - 0.9**now).float()) / ((self.v / (1 - 0.999**now).float()).sqrt() + 1e-8)
            self.votes.add_(move)
            self.sums.add_(gradient)
            self.squares.addcmul_(gradient, gradient)
            unit = torch.where(self.relative, self.rms, torch.ones((), device=self.rms.device))
            r.values[:, :n].sub_(move[:, :n] * unit * self.size)
            if every.shape[1] > n:  # what is not a linear map moves by a fixed step
                r.values[:, n:].sub_(move[:, n:] * self.size * torch.where(self.relative, 0.05, 1.0))
            r.t.add_(1)

    def run(self, stops: Sequence[int]) -> Iterator[int]:
        """Runs on, and yields at each of the numbers of steps."""
        self.replicas.capture(self.step, self.clear)
        self.clear()
        done = 0
        for stop in stops:
            self.replicas.run(stop - done, self.step)
            done = stop
            yield stop

    def score(self) -> Tensor:
        """(R, scope) absolute votes, ties by the size of the summed gradient."""
        top = self.sums.abs().amax(1, keepdim=True).clamp(min=1e-30)
        return self.votes.abs() + 0.5 * self.sums.abs() / top


def statistics(replicas: Replicas, batches: int) -> dict[str, dict[str, Tensor]]:
    """Of trainings with scope "linear", by map and for every training: ``fisher`` and ``centred`` (R, in) sums of squared per-example gradients of columns,
    with inputs as they are and less their mean; ``gradient`` (R, out, in) summed with centred inputs; ``covariance`` (R, in, in)
    of the inputs."""
    out: dict[str, dict[str, Tensor]] = {}
    data = replicas.data
    for index in range(batches):
        rows = replicas.order[:, index]
        taps: dict[str, tuple[Tensor, Tensor]] = {}
        output = forward(replicas, rows, False, taps)
        loss = losses(output, data, rows) * rows.shape[1]
        gradients = torch.autograd.grad(loss.sum(), [y for _, y in taps.values()])
        R, B = rows.shape
        if data.kind == "completion":
            T = data.ids.shape[1]
            real = (torch.arange(T, device=rows.device) < data.labels[rows][..., 1:] - 1).view(R, -1, 1)
        elif replicas.base.kind == "image":
            real = torch.ones_like(next(iter(taps.values()))[0][..., :1])
        else:
            real = (data.ids[rows] != 0).view(R, -1, 1)
        with torch.no_grad():
            for (name, (x, _)), g in zip(taps.items(), gradients, strict=True):
                x, g = x.detach().float() * real, g.float()
                centred = (x - x.sum(1, keepdim=True) / real.sum(1, keepdim=True)) * real
                found = {
                    "gradient": g.transpose(1, 2) @ centred,
                    "covariance": centred.transpose(1, 2) @ centred,
                }
                for key, inputs in (("fisher", x), ("centred", centred)):
                    per_text = g.reshape(R * B, -1, g.shape[2]).transpose(1, 2) @ inputs.reshape(R * B, -1, x.shape[2])
                    found[key] = per_text.square().sum(1).view(R, B, -1).sum(1)
                mine = out.setdefault(name, {})
                for key, value in found.items():
                    mine[key] = mine[key] + value if key in mine else value
    return out


# ---- choosing


def top(score: Tensor, n: int) -> Tensor:
    return score.topk(n).indices


def choose(base: Base, score: Tensor, share: float, spread: str = "even") -> Tensor:
    """Places of the share of the linear maps' weights with the highest score (linear,), sorted.

    ``spread``: "even" gives each matrix the same share, "global" none, "root" the geometric mean of both; "rows" and "columns"
    are even and take the best of each row (column) of a matrix before any second one, "both" those that come early in their row
    and in their column. "… words": as many places, and the table of words is one matrix more. "above N": as many places, evenly over
    the matrices of layer N and those above it.
    """
    maps = list(base.maps)
    if spread.startswith("above "):
        layer = {name: int(re.findall(r"layers?\.(\d+)\.", name)[0]) for name in maps}
        lowest = min(int(spread.removeprefix("above ")), max(layer.values()))
        spread, maps = "even", [name for name in maps if layer[name] >= lowest]
        share *= sum(base.weights[n].numel() for n in base.maps) / sum(base.weights[n].numel() for n in maps)
    if spread.endswith(" words"):
        spread = spread.removesuffix(" words")
        maps.append(next(n for n in base.place if n.endswith("word_embeddings.weight")))
        share *= sum(base.weights[n].numel() for n in base.maps) / sum(base.weights[n].numel() for n in maps)
    sizes = [base.weights[n].numel() for n in maps]
    quotas = [max(1, round(share * n)) for n in sizes]
    if spread in ("global", "root"):
        whole = top(score[: base.size["linear"]], sum(quotas))
        if spread == "global":
            return whole.sort().values
        ends = torch.tensor(sizes, device=score.device).cumsum(0)
        counts = torch.bincount(torch.bucketize(whole, ends, right=True), minlength=len(sizes)).tolist()
        wanted = [math.sqrt(a * (b + 1)) for a, b in zip(quotas, counts, strict=True)]
        exact = [w * sum(quotas) / sum(wanted) for w in wanted]
        given = [int(e) for e in exact]
        for m in sorted(range(len(exact)), key=lambda m: given[m] - exact[m])[: sum(quotas) - sum(given)]:
            given[m] += 1
        quotas = given
    places = []
    for name, quota in zip(maps, quotas, strict=True):
        at, shape = base.place[name]
        mine = score[at : at + shape.numel()]
        if spread in ("rows", "columns", "both"):
            table = mine.view(shape)
            axes = {"rows": (1,), "columns": (0,), "both": (0, 1)}[spread]
            rank = torch.stack([table.argsort(axis, descending=True).argsort(axis) for axis in axes]).amax(0)
            mine = (table / table.max().clamp(min=1e-30) - rank).reshape(-1)
        if quota:
            places.append(at + top(mine, quota))
    return torch.cat(places).sort().values


def blocks(base: Base, score: Tensor, share: float, side: int, spread: str = "even") -> Tensor:
    """Places of the tiles of side × side with the highest summed score, evenly over the matrices, or the best of all ("global")."""
    places = []
    by_map = []
    for name in base.maps:
        at, (out, inn) = base.place[name]
        by_map.append(score[at : at + out * inn].view(out // side, side, inn // side, side).sum((1, 3)))
    every = torch.cat([tiles.reshape(-1) for tiles in by_map])
    least = every.topk(max(1, round(share * len(every)))).values[-1]
    for name, tiles in zip(base.maps, by_map, strict=True):
        at, (out, inn) = base.place[name]
        if spread == "global":
            best = (tiles.reshape(-1) >= least).nonzero().squeeze(1)
        else:
            best = top(tiles.reshape(-1), max(1, round(share * tiles.numel())))
        row, column = best // (inn // side) * side, best % (inn // side) * side
        inside = torch.arange(side, device=score.device)
        grid = (row[:, None, None] + inside[:, None]) * inn + column[:, None, None] + inside
        places.append(at + grid.reshape(-1))
    return torch.cat(places).sort().values


def columns(base: Base, picked: Callable[[str, int], Tensor], share: float) -> Tensor:
    """Places of whole columns: ``picked`` names the best so many of a matrix."""
    places = []
    for name in base.maps:
        at, (out, inn) = base.place[name]
        best = picked(name, max(1, round(share * inn)))
        rows = torch.arange(out, device=best.device).unsqueeze(1) * inn
        places.append((at + rows + best).reshape(-1))
    return torch.cat(places).sort().values


def eliminated(target: Tensor, covariance: Tensor, n: int) -> Tensor:
    """Columns one after the other, each the one that explains most of the target (k, in) beside those already taken."""
    target, covariance = target.double().clone(), covariance.double().clone()
    floor = 1e-6 * covariance.diagonal().mean()
    picked: list[Tensor] = []
    for _ in range(n):
        own = covariance.diagonal()
        gain = target.square().sum(0) / own.clamp(min=floor)
        gain = torch.where(own > floor, gain, -1.0)
        if picked:
            gain[torch.stack(picked)] = -2
        j = gain.argmax()
        picked.append(j)
        v = covariance.index_select(1, j.view(1)).squeeze(1)
        scale = covariance.diagonal().index_select(0, j.view(1)).clamp(min=floor)
        target -= target.index_select(1, j.view(1)) * v / scale
        covariance -= torch.outer(v, v) / scale
    return torch.stack(picked)


def right_vectors(base: Base, movement: Tensor, ranks: Collection[int]) -> dict[int, Tensor]:
    """By rank, LoRA's A for every linear map, flat: the movement's first right singular vectors, as long as PEFT's random rows."""
    parts: dict[int, list[Tensor]] = {rank: [] for rank in ranks}
    for name in base.maps:
        at, shape = base.place[name]
        matrix = movement[at : at + shape.numel()].view(shape).float()
        if shape[0] < shape[1]:
            vectors = torch.linalg.eigh(matrix @ matrix.T).eigenvectors[:, -max(ranks) :]
            rows = F.normalize((matrix.T @ vectors).T, dim=1)
        else:
            rows = torch.linalg.eigh(matrix.T @ matrix).eigenvectors[:, -max(ranks) :].T
        for rank, some in parts.items():
            some.append((rows.flip(0)[:rank] / math.sqrt(3)).reshape(-1))
    return {rank: torch.cat(some) for rank, some in parts.items()}


# ---- choosing by the weights alone


def by_weights(base: Base, source: str, spread: str, share: float) -> Tensor:
    """Places that look at no data: (n,), sorted.

    "magnitude": the weights farthest from 0 (SHiRA-WM); spread over "rows", each neuron's largest first (after NeuroAda).
    "spectrum": whole matrices by their spectral signal-to-noise ratio (reltune's criterion spectral_snr, after Spectrum): the best
    share of each kind of matrix ("kinds"), or the best of all that fit into the share ("fit"). "top": everything in the last layer.
    """
    if source == "magnitude":
        return choose(base, base.flat[: base.size["linear"]].abs(), share, spread)
    if source == "top":
        names = [n for n in base.place if re.search(rf"layers?\.{base.n_layers - 1}\.", n)]
    elif spread == "kinds":
        ratios = signal_to_noise(base)
        kinds: dict[str, list[str]] = {}
        for name in base.maps:
            kinds.setdefault(re.sub(r"layers?\.\d+\.", "", name), []).append(name)
        names = []
        for of_kind in kinds.values():
            names += sorted(of_kind, key=ratios.__getitem__)[-max(1, round(share * len(of_kind))) :]
    else:
        ratios, names, left = signal_to_noise(base), [], share * base.size["linear"]
        for name in sorted(base.maps, key=ratios.__getitem__, reverse=True):
            if base.weights[name].numel() <= left:
                names.append(name)
                left -= base.weights[name].numel()
        names = names or [min(base.maps, key=lambda name: base.weights[name].numel())]
    places = [base.place[n][0] + torch.arange(base.weights[n].numel(), device=base.device) for n in names]
    return torch.cat(places).sort().values


def signal_to_noise(base: Base) -> dict[str, float]:
    """By linear map, its singular values beyond the noise's edge (Marchenko-Pastur) over those below, as sums."""
    from reltune.relevance.criteria.spectral_snr import edge

    ratios = {}
    for name in base.maps:
        values = base.singular_values[name].flip(0)
        signal = values > edge(values, *base.weights[name].shape)
        ratios[name] = (values[signal].sum() / values[~signal].sum().clamp(min=1e-30)).item()
    return ratios


def well_conditioned(base: Base, share: float) -> list[str]:
    """The share of the linear maps with the lowest condition number σ_max / σ_min (KappaTune, as PEFT's find_kappa_target_modules)."""
    numbers = {name: (v[0] / (v[-1] + 1e-8)).item() for name, v in base.singular_values.items()}
    return sorted(base.maps, key=numbers.__getitem__)[: max(1, int(share * len(base.maps)))]
