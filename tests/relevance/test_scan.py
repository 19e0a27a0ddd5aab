"""Analysing a checkpoint on disk: the loaded model's scores and fingerprint, and refusals by name."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

import reltune
from measured_models import CLASSIFIER
from relevance_cases import measure
from reltune.errors import InputError
from reltune.layers.fingerprint import fingerprint
from reltune.names import WITHOUT_DATA
from reltune.relevance.weights.scan import analyze_checkpoint

GPT2 = {"vocab_size": 20, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
T5 = {"vocab_size": 20, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
VIT = {"hidden_size": 16, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2}
LLAMA = {**CLASSIFIER, "num_key_value_heads": 1}

CASES = {
    # what is saved, its config, and the class that it is analysed as
    "bert with its head": (BertForSequenceClassification, BertConfig(**CLASSIFIER), None),
    "bert without a head": (BertModel, BertConfig(**CLASSIFIER), BertForSequenceClassification),
    "bert by an auto class": (BertModel, BertConfig(**CLASSIFIER), AutoModelForSequenceClassification),
    "bert without its head": (BertForSequenceClassification, BertConfig(**CLASSIFIER), AutoModel),
    "bert without a pooler": (BertForMaskedLM, BertConfig(**CLASSIFIER), BertForSequenceClassification),
    "bert tied": (BertForMaskedLM, BertConfig(**CLASSIFIER), None),
    "gpt2": (GPT2LMHeadModel, GPT2Config(**GPT2), None),
    "gpt2 untied": (GPT2LMHeadModel, GPT2Config(**GPT2, tie_word_embeddings=False), None),
    "llama": (LlamaForCausalLM, LlamaConfig(**LLAMA), None),
    "llama tied": (LlamaForCausalLM, LlamaConfig(**LLAMA, tie_word_embeddings=True), None),
    "mixtral": (MixtralForCausalLM, MixtralConfig(**LLAMA, num_local_experts=3, num_experts_per_tok=2), None),
    "t5": (T5ForConditionalGeneration, T5Config(**T5, decoder_start_token_id=0), None),
    "vit": (ViTForImageClassification, ViTConfig(**VIT, image_size=8, patch_size=4, num_channels=1), None),
}


def save(kind: type, config: object, path: Path, dtype: torch.dtype = torch.float32, **how: object) -> Path:
    torch.manual_seed(0)
    kind(config).to(dtype).save_pretrained(path, **how)
    return path


def assert_as_loaded(path: Path, kind: type, model_class: object = None, **options: object) -> None:
    """Streaming gives what analysing the loaded model gives, to the last bit."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = (model_class or kind).from_pretrained(path)
        wanted = measure(model, criteria=WITHOUT_DATA, **options)
    found = analyze_checkpoint(path, WITHOUT_DATA, model_class=model_class, progress=False, **options)
    assert found.always_trained == wanted.always_trained
    assert found.inventory == wanted.inventory
    assert found.fingerprint == wanted.fingerprint == fingerprint(model, wanted.always_trained) != ""
    known = {key: value for key, value in wanted.provenance.items() if key != "weights"}  # of a model in memory alone
    assert found.provenance == {**known, "model": str(path)}
    assert list(found.parts) == list(WITHOUT_DATA)
    for criterion, modules in wanted.parts.items():
        assert found.parts[criterion].keys() == modules.keys()
        for name, parts in modules.items():
            assert found.parts[criterion][name].keys() == parts.keys()
            for part, value in parts.items():
                assert torch.equal(found.parts[criterion][name][part], value), (criterion, name, part)


@pytest.mark.parametrize("case", CASES)
def test_as_the_loaded_model(case, tmp_path):
    kind, config, model_class = CASES[case]
    assert_as_loaded(save(kind, config, tmp_path), kind, model_class)


@pytest.mark.parametrize("case", ["bert without a head", "gpt2", "llama", "mixtral"])
def test_in_shards(case, tmp_path):
    kind, config, model_class = CASES[case]
    save(kind, config, tmp_path, max_shard_size="5KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    assert_as_loaded(tmp_path, kind, model_class)


def test_with_elements_and_patterns(tmp_path):
    kind, config, _ = CASES["gpt2"]
    save(kind, config, tmp_path, torch.bfloat16)
    model = kind.from_pretrained(tmp_path)
    options = {"criteria": ["magnitude", "principal"], "elements": True, "target_modules": ["mlp"]}
    wanted = measure(model, **options)
    found = reltune.analyze(tmp_path, progress=False, **options)
    assert found.inventory == wanted.inventory and found.fingerprint == wanted.fingerprint
    for criterion in wanted.parts:
        for name, parts in wanted.parts[criterion].items():
            assert {"element"} <= parts.keys() == found.parts[criterion][name].keys()
            assert all(torch.equal(found.parts[criterion][name][part], value) for part, value in parts.items())


def test_types_are_those_of_loading(tmp_path):
    """Files in float32 whose config says bfloat16, and T5's matrix that stays in float32 where the model is float16."""
    save(*CASES["llama"][:2], tmp_path / "llama")
    save(*CASES["t5"][:2], tmp_path / "t5")
    for name, dtype in (("llama", "bfloat16"), ("t5", "float16")):
        config = json.loads((tmp_path / name / "config.json").read_text())
        (tmp_path / name / "config.json").write_text(json.dumps({**config, "dtype": dtype}))
        assert_as_loaded(tmp_path / name, CASES[name][0])


def test_tied_by_the_config_and_stored_twice(tmp_path):
    """Loading ties the two where they are equal, and leaves them apart where they are not."""
    kind, config, _ = CASES["llama tied"]
    save(kind, config, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for change in (0.0, 1.0):
        twice = {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"] + change}
        save_file(twice, tmp_path / "model.safetensors", {"format": "pt"})
        assert_as_loaded(tmp_path, kind)
    # under the other of its names
    other = {k: v for k, v in twice.items() if k != "model.embed_tokens.weight"}
    save_file(other, tmp_path / "model.safetensors", {"format": "pt"})
    assert_as_loaded(tmp_path, kind)


def test_old_names(tmp_path):
    """LayerNorm.gamma and beta, and the base model's prefix, as the first BERT checkpoints have them."""
    kind, config, _ = CASES["bert with its head"]
    save(kind, config, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    old = {
        k.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): v
        for k, v in tensors.items()
    }
    assert old.keys() != tensors.keys()
    save_file(old, tmp_path / "model.safetensors", {"format": "pt"})
    assert_as_loaded(tmp_path, kind)


def test_a_plan_of_it_fits_the_loaded_model(tmp_path):
    kind, config, model_class = CASES["bert without a head"]
    save(kind, config, tmp_path)
    relevance = analyze_checkpoint(tmp_path, "magnitude", model_class=model_class, progress=False)
    relevance.save(tmp_path / "relevance")
    plan = reltune.select(reltune.RelevanceScores.load(tmp_path / "relevance"), budget="5%", granularity="column")
    from peft import get_peft_model

    model = get_peft_model(model_class.from_pretrained(tmp_path), reltune.ReltuneConfig(plan=plan))
    assert plan.always_trained == ["classifier"]
    assert sum(p.requires_grad for p in model.parameters()) > 2


def refused(path: Path, *named: str, **options: object) -> None:
    with pytest.raises(InputError) as caught:
        analyze_checkpoint(path, progress=False, **{"criteria": "magnitude", **options})
    message = str(caught.value)
    assert all(part in message for part in named), message
    assert len(message) - len(str(path)) * message.count(str(path)) < 400


def test_refusals(tmp_path):
    kind, config, _ = CASES["llama"]
    path = save(kind, config, tmp_path / "model", max_shard_size="5KB")
    refused(path, "'fisher'", "data", criteria="fisher")
    refused(path, "'magnitud'", "magnitude", criteria="magnitud")
    refused(path, "spectral_snr", "single weights", criteria="spectral_snr", elements=True)
    refused(path, "target_modules 'absent'", target_modules="absent")
    refused(path, "BertForSequenceClassification", model_class=BertForSequenceClassification)
    refused(tmp_path / "absent", "does not exist")
    with pytest.raises(InputError, match="without data"):
        reltune.analyze(path, [{}], criteria=["magnitude"])

    first = min(path.glob("*.safetensors"))
    whole = first.read_bytes()
    first.unlink()
    refused(path, first.name, "needs all of them")
    first.write_bytes(whole[:20])
    refused(path, first.name, "cannot be read")
    tensors = load_file(max(path.glob("*.safetensors")))
    gone = next(iter(tensors))
    first.write_bytes(whole)
    save_file({key: value for key, value in tensors.items() if key != gone}, max(path.glob("*.safetensors")))
    refused(path, gone, "index")


def test_what_does_not_fit_the_config_is_named(tmp_path):
    kind, config, _ = CASES["llama"]
    save(kind, config, tmp_path)
    text = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(json.dumps({**json.loads(text), "intermediate_size": 44}))
    refused(tmp_path, "mlp", "(16, 40)", "(16, 44)")
    (tmp_path / "config.json").write_text(json.dumps({**json.loads(text), "architectures": ["MyLlama"]}))
    refused(tmp_path, "MyLlama", "model_class")
    (tmp_path / "config.json").write_text(
        json.dumps({**json.loads(text), "quantization_config": {"quant_method": "gptq"}})
    )
    refused(tmp_path, "quantised")
    (tmp_path / "config.json").write_text(text)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    save_file({**tensors, name: tensors[name].to(torch.int8)}, tmp_path / "model.safetensors")
    refused(tmp_path, name, "floating-point")
    tensors.pop(name)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.warns(RuntimeWarning, match="lacks model.layers.0.mlp.up_proj.weight"):
        found = analyze_checkpoint(tmp_path, "magnitude", progress=False)
    assert found.always_trained == ["model.layers.0.mlp.up_proj"]
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    refused(tmp_path, "model.safetensors", "safetensors files")


def test_no_weight_stays_in_memory(tmp_path):
    """Every tensor is gone before the next is read, and none is read twice."""
    import gc
    import weakref

    from reltune.relevance.weights import checkpoint

    kind, config, _ = CASES["llama"]
    save(kind, config, tmp_path, max_shard_size="5KB")
    held: list[weakref.ref] = []
    keys: list[str] = []
    original = checkpoint.Stored.read
    gc.collect()

    def read(self):
        gc.collect()
        assert sum(ref() is not None for ref in held) <= 2  # a weight waits for its bias, and no more
        tensor = original(self)
        held.append(weakref.ref(tensor))
        keys.append(self.key)
        return tensor

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint.Stored, "read", read)
        found = analyze_checkpoint(tmp_path, "magnitude", progress=False)
    assert len(keys) == len(set(keys)) == len(load_all(tmp_path))
    assert found.fingerprint


def load_all(path: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in path.glob("*.safetensors") for k, v in load_file(file).items()}
