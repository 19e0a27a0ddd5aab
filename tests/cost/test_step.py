"""The count of a training step against closed forms, and against what autograd really keeps on a CPU."""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import math
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import BartConfig, BartForConditionalGeneration, LlamaForCausalLM, T5ForConditionalGeneration

from cost_cases import BATCH, LENGTH, batch_for, bert, llama, mixtral, t5
from oracles.kept_tensors import kept_bytes
from reltune import InputError, ReltuneConfig
from reltune.cost import heap, stand_ins
from reltune.cost.blocks import shorten
from reltune.cost.ledger import HOST, Ledger
from reltune.cost.step import CPU_ROUNDING, Conditions, StepCount, count_step, counting, kernels
from reltune.plan.plan import ModulePlan, Plan

ON_CPU, ON_CUDA = Conditions(cuda=False), Conditions()


def frozen(model: nn.Module) -> nn.Module:
    return model.requires_grad_(False)


def full(model: Any) -> Any:
    return model


def top_layer(model: Any) -> Any:
    frozen(model)
    blocks = model.model.layers if hasattr(model, "model") else model.bert.encoder.layer
    blocks[-1].requires_grad_(True)
    return model


def lora(model: Any) -> Any:
    return get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))


def columns(model: Any) -> Any:
    names = ["q_proj", "down_proj"] if hasattr(model, "model") else ["query", "output.dense"]
    return get_peft_model(model, ReltuneConfig(target_modules=names, r=4))


def single_weights(model: Any) -> Any:
    modules = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.endswith(("k_proj", "up_proj", "key", "intermediate.dense")):
            modules[name] = ModulePlan(tuple(module.weight.shape))
            modules[name].take_elements(torch.arange(0, module.weight.numel(), 50))
    return get_peft_model(model, ReltuneConfig(plan=Plan(modules, "1%", 10**9, 10**9, fingerprint="")))


METHODS = {"full": full, "top": top_layer, "lora": lora, "columns": columns, "weights": single_weights}


def counted(make: Any, prepare: Any, conditions: Conditions = ON_CPU, short: bool = False) -> StepCount:
    with torch.device("meta"):
        model = make()
    batch = batch_for(model, "meta")
    repeats = shorten(model) if short else {}
    with counting(conditions):
        return count_step(prepare(model).train(), batch, conditions, repeats)


def test_storages_without_bytes_are_passed_over() -> None:
    """Such as those of a cache of keys that is still empty."""

    def with_cache() -> Any:
        model = llama()
        model.config.use_cache = True
        return model

    found, wanted = counted(with_cache, lora), counted(llama, lora)
    assert found.trained == wanted.trained and found.bytes == pytest.approx(wanted.bytes, rel=0.2)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("make", [llama, bert], ids=["llama", "bert"])
def test_what_is_kept_is_what_autograd_keeps_on_a_cpu(make: Any, method: str) -> None:
    torch.manual_seed(0)
    model = METHODS[method](make()).train()
    copies = [t for layer in model.modules() for kept in getattr(layer, "originals", {}).values() for t in kept.index]
    wanted = kept_bytes(model, batch_for(getattr(model, "get_base_model", lambda: model)(), "cpu"), copies)
    # The loss itself is alive too; a storage is rounded up; what is held while nothing is kept is a few positions and masks.
    assert counted(make, METHODS[method]).kept == pytest.approx(wanted, rel=0.02, abs=40 * CPU_ROUNDING)


def experts_frozen(model: Any) -> Any:
    for name, p in model.named_parameters():
        p.requires_grad_("experts" not in name)
    return model


@pytest.mark.parametrize(
    ("make", "prepare"),
    [(t5, full), (mixtral, full), (mixtral, experts_frozen)],
    ids=["t5", "mixtral", "frozen experts"],
)
def test_encoder_decoders_and_experts_are_counted_as_they_are(make: Any, prepare: Any) -> None:
    torch.manual_seed(0)
    model = prepare(make()).train()
    wanted = kept_bytes(model, batch_for(model, "cpu"))
    assert counted(make, prepare).kept == pytest.approx(wanted, rel=0.05)


def test_weights_gradients_and_states_of_a_llama_in_closed_form() -> None:
    d, i, v, layers = 64, 160, 256, 3
    numbers = 2 * v * d + d + layers * (4 * d * d + 3 * d * i + 2 * d)
    found = counted(llama, full)
    assert found.trained == numbers
    assert found.trained_bytes == 4 * numbers
    assert found.state_bytes == 8 * numbers
    assert found.peak["trained"] == 4 * numbers
    assert found.peak["states"] == 8 * numbers + found.tensors * CPU_ROUNDING  # and each tensor's count of steps
    twice = counted(llama, full, Conditions(cuda=False, accumulates=True))
    assert twice.peak["gradients"] == 4 * numbers


def test_weights_of_a_bert_in_closed_form() -> None:
    d, i, layers = 64, 160, 3
    embeddings = (256 + 64 + 2) * d + 2 * d
    block = 4 * (d * d + d) + (d * i + i) + (i * d + d) + 4 * d
    numbers = embeddings + layers * block + (d * d + d) + (2 * d + 2)
    found = counted(bert, top_layer)
    assert found.trained == block
    assert found.peak["weights"] + found.peak["trained"] == pytest.approx(4 * numbers, rel=0.01)
    assert found.peak["trained"] == 4 * block


def test_tied_embeddings_are_held_and_trained_once() -> None:
    tied, apart = counted(lambda: llama(tied=True), full), counted(llama, full)
    assert apart.trained - tied.trained == 256 * 64
    assert apart.peak["trained"] - tied.peak["trained"] == 4 * 256 * 64


def test_nothing_is_kept_or_differentiated_below_the_lowest_trained_unit() -> None:
    def deeper() -> LlamaForCausalLM:
        return llama(6)

    low, high = counted(llama, top_layer), counted(deeper, top_layer)
    assert high.kept == low.kept
    assert high.work["backward"] == low.work["backward"]
    assert sum(high.work["forward"].values()) > sum(low.work["forward"].values())


def assert_alike(few: StepCount, every: StepCount) -> None:
    """The same to the byte, but for holes: chance has a part in where blocks come to lie."""
    assert few.holes == pytest.approx(every.holes, rel=0.2)
    assert dataclasses.replace(few, holes=every.holes) == every


@pytest.mark.parametrize("conditions", [ON_CPU, ON_CUDA], ids=["cpu", "cuda"])
@pytest.mark.parametrize("method", ["full", "lora", "columns", "weights"])
def test_a_few_blocks_stand_for_all(method: str, conditions: Conditions) -> None:
    def deep() -> LlamaForCausalLM:
        return llama(11)

    assert_alike(counted(deep, METHODS[method], conditions, short=True), counted(deep, METHODS[method], conditions))


def test_blocks_that_stand_for_others_ask_for_as_much(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def noted(steps: Any, states: Any) -> int:
        sizes: list[int] = []
        there: dict[Any, int] = {}
        most = 0
        for name, size, _ in steps:
            if size > 0:
                there[name] = size
                sizes.append(size)
                most = max(most, sum(there.values()))
            else:
                del there[name]
        asked.append((sorted(sizes), most, sorted(there.values()), sorted(states)))
        return 0

    monkeypatch.setattr(heap, "holes", noted)
    for method in ("full", "lora"):
        for short in (True, False):
            counted(lambda: llama(11), METHODS[method], ON_CPU, short=short)
    assert asked[0] == asked[1] and asked[2] == asked[3]
    assert asked[0] != asked[2]


def test_a_heap_that_gives_back_has_no_holes() -> None:
    assert counted(llama, METHODS["lora"], ON_CPU).holes > 0
    for conditions in (Conditions(cuda=False, gives_back=True), ON_CUDA):
        assert counted(llama, METHODS["lora"], conditions).holes == 0


def test_blocks_of_an_encoder_and_a_decoder_stand_for_their_own() -> None:
    def deep() -> T5ForConditionalGeneration:
        model = t5()
        for stack in (model.encoder, model.decoder):
            stack.block.extend(copy.deepcopy(stack.block[1]) for _ in range(6))
        return model

    assert_alike(counted(deep, full, short=True), counted(deep, full))


def test_inputs_that_are_made_again_on_cuda_are_not_kept() -> None:
    # single weights of k and up read the norms' outputs, which are made again from their inputs
    made_again = counted(lambda: llama().bfloat16(), single_weights, ON_CUDA).kept
    kept = counted(lambda: llama().bfloat16(), single_weights, ON_CPU).kept
    assert kept - made_again >= 2 * 2 * BATCH * LENGTH * 64 * 2


def test_checkpoints_keep_the_inputs_of_blocks_alone() -> None:
    def checkpointed(model: Any) -> Any:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        return model

    plain, checked = counted(llama, full), counted(llama, checkpointed)
    blocks = 3 * BATCH * LENGTH * 64 * 4
    assert checked.kept < plain.kept - blocks
    again = sum(work.flops * n for work, n in checked.work["backward"].items())
    assert again > 1.3 * sum(work.flops * n for work, n in plain.work["backward"].items())
    assert sum(w.flops * n for w, n in checked.work["forward"].items()) == sum(
        w.flops * n for w, n in plain.work["forward"].items()
    )


def test_products_take_two_operations_for_a_number_and_twice_as_many_backward() -> None:
    found = counted(llama, full)
    tokens, weights = BATCH * LENGTH, 3 * (4 * 64 * 64 + 3 * 64 * 160) + 256 * 64
    products = {
        part: sum(w.flops * n for w, n in work.items() if w.name in ("aten::mm", "aten::addmm"))
        for part, work in found.work.items()
    }
    assert products == {"forward": 2 * tokens * weights, "backward": 4 * tokens * weights}


def test_attention_and_products_written_into_take_operations() -> None:
    """Closed forms: none of these is in PyTorch's own list."""
    with torch.device("meta"), Ledger() as ledger:
        q = torch.empty(2, 4, 32, 16)
        y, scale = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, q, q)
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(y, q, q, q, y, scale, 0.0, False)
        torch.empty(8, 6).addmm_(torch.empty(8, 4), torch.empty(4, 6))
        torch.empty(10, 6).index_copy_(1, torch.empty(2, dtype=torch.long), torch.empty(10, 2))
    found = {work.name: work for work in ledger.spans[-1].work}
    attention = 4 * 2 * 4 * 32 * 32 * 16
    assert found["aten::_scaled_dot_product_flash_attention_for_cpu"].flops == attention
    assert found["aten::_scaled_dot_product_flash_attention_for_cpu_backward"].flops == 2.5 * attention
    assert found["aten::addmm_"].flops == 2 * 8 * 4 * 6
    assert found["aten::index_copy_"].bytes == 2 * 4 * 10 * 2  # no more than is chosen


def test_attention_is_written_out_on_cuda_where_its_mask_lies_otherwise() -> None:
    """As PyTorch's kernels ask for masks whose last dimension is contiguous; T5's positions are not."""
    for turned, written_out in ((False, False), (True, True)):
        with torch.device("meta"), stand_ins.Kernels(cuda=True), Ledger() as ledger:
            q, mask = torch.empty(2, 4, 32, 16), torch.empty(2, 4, 32, 32)
            nn.functional.scaled_dot_product_attention(q, q, q, mask.mT if turned else mask, 0.1)
        names = " ".join(work.name for work in ledger.spans[-1].work)
        assert ("softmax" in names) == ("native_dropout" in names) == written_out


@pytest.mark.parametrize("method, modules", [("full", 0), ("lora", 0), ("columns", 2 * 11), ("weights", 2 * 11)])
def test_modules_that_are_tuned_are_counted(method: str, modules: int) -> None:
    for short in (False, True):
        assert counted(lambda: llama(11), METHODS[method], short=short).tuned == modules


def test_frozen_experts_have_no_gradients_of_weights() -> None:
    def flops(prepare: Any) -> int:
        return sum(w.flops * n for w, n in counted(mixtral, prepare).work["backward"].items() if "reltune" in w.name)

    assert flops(experts_frozen) * 2 == flops(full) > 0


@pytest.mark.parametrize(("conditions", "products"), [(ON_CUDA, 4), (ON_CPU, 1)])
def test_products_of_experts_in_float32_are_one_for_each_on_cuda(conditions: Conditions, products: int) -> None:
    x, weight = torch.empty(12, 8, device="meta"), torch.empty(4, 8, 6, device="meta", requires_grad=True)
    with Ledger() as ledger, stand_ins.Kernels(conditions.cuda):
        y = torch._grouped_mm(x, weight)
    ledger.mark("backward")
    with ledger:
        torch.autograd.grad(y, weight, torch.empty_like(y))
    for span in ledger.spans[-2:]:
        assert [(work.flops, times) for work, times in span.work.items() if work.flops] == [
            (2 * 12 * 8 * 6 // products, products)
        ]
    assert y.shape == (12, 6)


@pytest.mark.parametrize(("queries", "keys", "causal"), [(300, 300, True), (300, 300, False), (128, 500, False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_on_cuda_computes_blocks_that_it_reaches(
    queries: int, keys: int, causal: bool, dtype: torch.dtype
) -> None:
    q, k, v = (torch.empty(2, 3, n, 8, dtype=dtype, device="meta", requires_grad=True) for n in (queries, keys, keys))
    reached = torch.ones(queries, keys).tril() if causal else torch.ones(queries, keys)
    # What is computed: of each block that has a score, 128 × 128 of them.
    blocks = int(nn.functional.max_pool2d(reached[None], 128, ceil_mode=True).sum())
    with Ledger() as ledger, stand_ins.Kernels(True):
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
    ledger.mark("backward")
    with ledger:
        torch.autograd.grad(y, (q, k, v), torch.empty_like(y))
    for span, products in zip(ledger.spans[-2:], (2, 5), strict=True):
        (work,) = (each for each in span.work if each.flops)
        assert work.flops == pytest.approx(2 * products * 2 * 3 * 8 * blocks * 128**2)
        assert work.vectors == 2 * 3 * (queries + keys) // 2


def test_what_goes_through_alike_tensors_is_told_from_the_rest() -> None:
    x, row = torch.empty(4, 8, device="meta"), torch.empty(8, device="meta")
    narrow = x.to(torch.bfloat16)

    def plain(run: Any) -> bool:
        with Ledger() as ledger:
            run()
        (work,) = (each for each in ledger.spans[-1].work if each.name != HOST)
        return work.plain

    for run in (lambda: x + x, lambda: x * 2, x.exp, x.clone, x.bfloat16):
        assert plain(run)
    for run in (lambda: x + row, lambda: x + narrow, lambda: x.t() + x.t(), lambda: x.sum(0), narrow.float):
        assert not plain(run)


def test_mixed_precision_keeps_narrow_copies_of_weights() -> None:
    mixed = counted(llama, lora, Conditions(autocast=torch.bfloat16))
    assert {work.dtype for work in mixed.work["forward"] if work.name == "aten::mm"} == {torch.bfloat16}
    assert mixed.peak["weights"] == counted(llama, lora, ON_CUDA).peak["weights"]


def test_mixed_precision_casts_each_part_of_a_tensor_anew() -> None:
    x, weight = torch.empty(50, 4, device="meta", requires_grad=True), torch.empty(3, 4, device="meta")
    with torch.no_grad(), stand_ins.Autocast(torch.bfloat16):
        for size in range(50):  # parts lie where earlier ones lay
            assert nn.functional.linear(x[:size], weight).shape == (size, 3)


def test_logits_that_the_model_looks_at_are_made_in_the_narrow_type() -> None:
    """BART adds a bias to its logits, which the tuner would have deferred: what is kept has a narrow copy of the output weight."""

    def bart() -> BartForConditionalGeneration:
        sizes = {f"{part}_{name}": n for part in ("encoder", "decoder") for name, n in
                 (("layers", 1), ("attention_heads", 2), ("ffn_dim", 64))}  # fmt: skip
        return BartForConditionalGeneration(
            BartConfig(
                vocab_size=1024, d_model=32, max_position_embeddings=64, dropout=0.0, decoder_start_token_id=0, **sizes
            )
        )

    def few(model: Any) -> Any:
        return get_peft_model(model, ReltuneConfig(target_modules=["q_proj"], r=4))

    torch.manual_seed(0)
    model = few(bart()).train()
    copies = [t for layer in model.modules() for kept in getattr(layer, "originals", {}).values() for t in kept.index]
    with torch.autocast("cpu", torch.bfloat16):
        wanted = kept_bytes(model, batch_for(model.get_base_model(), "cpu"), copies)
    found = counted(bart, few, Conditions(cuda=False, autocast=torch.bfloat16)).kept
    assert found == pytest.approx(wanted, rel=0.03) and wanted > 2 * 1024 * 32 + 4 * BATCH * LENGTH * 1024


def test_liger_keeps_no_logits() -> None:
    with_liger = counted(llama, lora, Conditions(liger=True))
    without = counted(llama, lora, ON_CUDA)
    assert without.peak["loss"] >= 4 * BATCH * LENGTH * 256
    assert with_liger.peak["loss"] == 0
    assert with_liger.kept < without.kept - 4 * BATCH * LENGTH * (256 - 64)


@pytest.mark.parametrize(("bits", "bytes_each"), [(4, 0.5 + 4 / 64), (8, 1.0)])
def test_weights_in_few_bits_are_unpacked_for_a_product_alone(bits: int, bytes_each: float) -> None:
    def packed(model: Any) -> Any:
        stand_ins.hold_in_few_bits(model, bits, ["lm_head"])
        return lora(model)

    few, whole = counted(llama, packed), counted(llama, lora)
    maps = 3 * (4 * 64 * 64 + 3 * 64 * 160)
    scales = 0 if bits == 4 else 3 * 4 * (4 * 64 + 2 * 160 + 64)
    assert whole.peak["weights"] - few.peak["weights"] == pytest.approx(maps * (4 - bytes_each) - scales, rel=0.02)
    assert few.kept == whole.kept


def test_optimizers_in_8_bits_hold_a_byte_for_a_number() -> None:
    plain = counted(llama, full)
    few = counted(llama, full, Conditions(cuda=False, optimizer="adamw_8bit"))
    assert few.state_bytes < 0.3 * plain.state_bytes
    with pytest.raises(InputError, match="optim 'adamw_8bits' are not known; did you mean 'adamw_8bit'"):
        counted(llama, full, Conditions(optimizer="adamw_8bits"))


def test_a_cpu_keeps_a_kernel_for_each_shape_of_a_narrow_product() -> None:
    """Of a frozen Llama's maps and LoRA's, with its gradient: four of a kind in each block, of which there are three."""

    def narrow(model: Any) -> Any:
        return lora(model.to(torch.bfloat16))

    assert counted(llama, lora).peak["kernels"] == counted(llama, narrow, ON_CUDA).peak["kernels"] == 0
    found = counted(llama, narrow).peak["kernels"]
    assert found and found == counted(functools.partial(llama, layers=1), narrow).peak["kernels"]
    ledger = Ledger()
    x, w = (torch.zeros(size, device="meta", dtype=torch.bfloat16) for size in ((5, 8), (8, 6)))
    with ledger:
        for _ in range(2):
            x @ w
            x[:3] @ w
        x @ torch.zeros(6, 8, device="meta", dtype=torch.bfloat16).t()  # lies otherwise
        x.float() @ w.float()
    assert kernels(ledger) == 3


def test_experts_have_a_kernel_for_each_number_of_rows_that_is_expected() -> None:
    """Brute force: each of two experts in two blocks has 1, 2 or 3 of 3 rows with chances 3/8, 3/8 and 1/8."""
    chances = {0: 1 / 8, 1: 3 / 8, 2: 3 / 8, 3: 1 / 8}
    wanted = sum(
        math.prod(chances[n] for n in numbers) * len({*numbers} - {0})
        for numbers in itertools.product(chances, repeat=4)
    )
    ledger = Ledger()
    ledger.groups = {((8, 16), 300, 1, "other"), *((((8, 6), 3, 2, block)) for block in "ab")}
    assert kernels(ledger) == round(wanted + 1)
    ledger.groups = {((8, 6), 3, 2, "a")}
    assert kernels(ledger, {"a": 2}) == round(wanted)

    def narrow(model: Any) -> Any:
        return frozen(model.to(torch.bfloat16)).get_input_embeddings().requires_grad_(True) and model

    many = functools.partial(mixtral, layers=6)
    short, whole = counted(many, narrow, short=True), counted(many, narrow)
    assert short.peak["kernels"] == whole.peak["kernels"] > counted(mixtral, narrow).peak["kernels"]


def test_a_model_that_trains_nothing_is_refused() -> None:
    with pytest.raises(InputError, match="nothing in the model requires a gradient"):
        counted(llama, frozen)


def test_a_ledger_counts_storages_once_and_until_they_are_let_go() -> None:
    ledger = Ledger(rounding=512)
    x = torch.ones(100, device="meta")
    ledger.enter([x, x.view(10, 10)], "weights")
    with ledger:
        y = x * 2
        z = y.view(10, 10).t()
        assert ledger.live == 2 * 512
        del y
        assert ledger.live == 2 * 512
        del z
    assert ledger.live == 512
    assert sum(ledger.spans[-1].peak.values()) == 2 * 512


def test_an_optimizer_that_steps_on_all_at_once_makes_a_copy_of_all() -> None:
    fused, all_at_once = (
        counted(llama, full, Conditions(optimizer=name)) for name in ("adamw_torch_fused", "adamw_torch")
    )
    assert sum(all_at_once.peak.values()) >= 5 * fused.trained_bytes  # weights, gradients, two states, the copy
    assert fused.state_bytes == all_at_once.state_bytes
