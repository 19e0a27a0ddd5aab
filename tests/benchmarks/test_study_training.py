"""The study's trainings side by side are those of a plain loop over Transformers' model."""

import copy

import pytest
import torch
from torch.nn import functional as F
from transformers import ViTConfig, ViTForImageClassification

import study_training as st

OUTPUTS, STEPS, BATCH, RATE = 5, 4, 6, 3e-3


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=40,
        image_size=16,
        patch_size=4,
        num_channels=1,
        num_labels=OUTPUTS,
    )
    model = ViTForImageClassification(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # also biases and norms are nothing special
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def data():
    generator = torch.Generator().manual_seed(1)
    task = {
        "ids": torch.randint(256, (40, 256), generator=generator, dtype=torch.uint8).numpy(),
        "labels": (torch.arange(40) % OUTPUTS).numpy(),
        "kind": "class",
    }
    return st.Data(task, torch.device("cpu"))


@pytest.fixture(scope="module")
def base(model):
    weights = {n.removeprefix("vit."): p.detach() for n, p in model.state_dict().items() if n.startswith("vit.")}
    return st.Base(weights, "image", torch.device("cpu"), heads=3)


@pytest.fixture(scope="module")
def order():
    return torch.stack([torch.randperm(40, generator=torch.Generator().manual_seed(s)) for s in (2, 3)])[
        :, : STEPS * BATCH
    ].view(2, STEPS, BATCH)


def side_by_side(base, data, model, order, **options):
    head = torch.cat((model.classifier.weight.detach().flatten(), model.classifier.bias.detach())).expand(2, -1)
    replicas = st.Replicas(base, data, order, head, dropout=0.0, **options)
    replicas.rates.copy_(torch.tensor([[RATE], [RATE / 2]]))
    replicas.head_rates.copy_(replicas.rates)
    replicas.run(STEPS)
    return replicas


def by_hand(model, data, rows, rate, masks):
    """AdamW on a copy of the model, of each parameter only what ``masks`` has; the trained parameters by name."""
    model = copy.deepcopy(model)
    named = {name: p for name, p in model.named_parameters() if name in masks}
    optimizer = torch.optim.AdamW(named.values(), lr=rate, weight_decay=0.0)
    for step, batch in enumerate(rows):
        optimizer.param_groups[0]["lr"] = rate * (1 - step / STEPS)
        pixels = data.ids[batch].view(-1, 1, 16, 16) / 127.5 - 1
        F.cross_entropy(model(pixels).logits, data.labels[batch]).backward()
        for name, parameter in named.items():
            parameter.grad.mul_(masks[name])
        torch.nn.utils.clip_grad_norm_(named.values(), 1.0)
        before = {name: p.detach().clone() for name, p in named.items()}
        optimizer.step()
        with torch.no_grad():
            for name, parameter in named.items():
                parameter.copy_(torch.where(masks[name].bool(), parameter, before[name]))
        model.zero_grad()
    return {name: p.detach() for name, p in named.items()}


@pytest.mark.parametrize("scope", ["linear", "all"])
def test_an_image_model_trains_as_in_a_plain_loop(model, data, base, order, scope):
    """Chosen weights of the linear maps, different ones in each training, and everything."""
    chosen = None
    if scope == "linear":
        places = [torch.randperm(base.size["linear"], generator=torch.Generator().manual_seed(s))[:200] for s in (4, 5)]
        chosen = torch.stack(places).sort(1).values
    replicas = side_by_side(base, data, model, order, scope=scope, chosen=chosen)
    for r, rate in enumerate((RATE, RATE / 2)):
        flat = torch.ones(base.size["all"]) if chosen is None else torch.zeros(base.size["all"])
        if chosen is not None:
            flat[chosen[r]] = 1
        masks = {"classifier.weight": torch.ones(()), "classifier.bias": torch.ones(())}
        masks |= {
            f"vit.{name}": flat[at : at + shape.numel()].view(shape)
            for name, (at, shape) in base.place.items()
            if at < base.size[scope]
        }
        trained = by_hand(model, data, order[r], rate, masks)
        for name, (at, shape) in base.place.items():
            if at < base.size[scope] and not name.endswith("k_proj.bias"):  # its gradient is 0 but for rounding
                mine = replicas.values[r, at : at + shape.numel()].view(shape)
                torch.testing.assert_close(mine, trained[f"vit.{name}"], rtol=0, atol=2e-5, msg=name)
        n = OUTPUTS * base.hidden
        torch.testing.assert_close(replicas.head[r, :n], trained["classifier.weight"].flatten(), rtol=0, atol=2e-5)


def test_low_rank_adapters_of_an_image_model_are_pefts(model, data, base, order):
    from peft import LoraConfig, get_peft_model

    replicas = side_by_side(base, data, model, order, lora=2)
    start = replicas.factors_start
    config = LoraConfig(r=2, lora_alpha=4, target_modules=r".*(_proj|fc1|fc2)", modules_to_save=["classifier"])
    adapted = get_peft_model(copy.deepcopy(model), config)
    at = 0
    with torch.no_grad():
        for name in base.maps:
            layer = adapted.get_submodule(f"base_model.model.vit.{name.removesuffix('.weight')}")
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            a.copy_(start[0, at : at + a.numel()].view_as(a))
            at += a.numel() + b.numel()
    masks = {name: torch.ones(()) for name, p in adapted.named_parameters() if p.requires_grad}
    trained = by_hand(adapted.eval(), data, order[0], RATE, masks)
    for name in base.maps:
        for mine, factor in zip(replicas.lora[name], ("lora_A", "lora_B"), strict=True):
            key = f"base_model.model.vit.{name.removesuffix('.weight')}.{factor}.default.weight"
            torch.testing.assert_close(mine[0].detach(), trained[key], rtol=0, atol=2e-5, msg=name)
