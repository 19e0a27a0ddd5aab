"""Image classification on drawn squares: rows, batches, a whole run, through a ViT and a convolutional network."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)

from reltune.data.rows import Row
from reltune.errors import InputError
from reltune.losses import LOSSES
from reltune.tasks.image_classification import ImageClassification
from task_cases import check_reload, run_task

SIZE = 8


def png(side: str, seed: int) -> bytes:
    """Grey noise with the left or the right half lighter."""
    pixels = np.random.default_rng(seed).integers(0, 100, (SIZE, SIZE))
    pixels[:, : SIZE // 2] += 120 * (side == "left")
    pixels[:, SIZE // 2 :] += 120 * (side == "right")
    buffer = io.BytesIO()
    Image.fromarray(pixels.astype("uint8")).save(buffer, "PNG")
    return buffer.getvalue()


def save_tiny(path: Path, kind: str) -> None:
    torch.manual_seed(0)
    if kind == "vit":
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
        ViTForImageClassification(ViTConfig(image_size=SIZE, patch_size=4, **sizes)).save_pretrained(path)
    else:
        config = ResNetConfig(embedding_size=8, hidden_sizes=[16, 16], depths=[1, 1], layer_type="basic")
        ResNetForImageClassification(config).save_pretrained(path)
    ViTImageProcessorPil(size={"height": SIZE, "width": SIZE}).save_pretrained(path)


def row(image: Any, label: Any = "left") -> Row:
    return Row({"image": image, "label": label}, 1)


def test_images_that_are_none(tmp_path: Path) -> None:
    task = ImageClassification()
    data = png("left", 0)
    (tmp_path / "a.png").write_bytes(data)
    for image, found in (
        ({"bytes": data, "path": None}, None), (str(tmp_path / "a.png"), None), ({"bytes": None, "path": str(tmp_path / "a.png")}, None),
        (None, "empty"), ({"bytes": data[:40], "path": None}, "cannot be decoded"), (str(tmp_path / "b.png"), "cannot be decoded"), (3, "no image"),
    ):  # fmt: skip
        problem = task.problem(row(image))
        assert problem is None if found is None else found in str(problem), image
    assert "empty 'label'" in str(task.problem(row({"bytes": data}, "")))
    assert task.content(row({"bytes": data})) == task.content(row({"bytes": data, "path": "x"}))
    assert task.content(row({"bytes": data})) != task.content(row({"bytes": png("left", 1)}))


def test_the_loss_of_an_image_is_the_models(tmp_path: Path) -> None:
    save_tiny(tmp_path, "vit")
    task = ImageClassification(labels=["left", "right", "up"])
    model, missing = task.load_model(tmp_path)
    assert missing == ["classifier.bias", "classifier.weight"]
    processor = task.load_tokenizer(tmp_path)
    examples = task.encode(
        [row({"bytes": png(side, i)}, side) for i, side in enumerate(("left", "right", "up"))], processor, 9
    )
    batch = task.collator(processor)([examples[i] for i in range(len(examples))])
    assert batch["pixel_values"].shape == (3, 3, SIZE, SIZE) and batch["labels"].tolist() == [0, 1, 2]
    outputs = model.eval()(**batch)
    assert LOSSES[task.loss].per_example(outputs, batch).mean().item() == pytest.approx(outputs.loss.item())


def test_a_model_without_an_image_processor(tmp_path: Path) -> None:
    save_tiny(tmp_path, "vit")
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(InputError, match="no usable image processor"):
        ImageClassification().load_tokenizer(tmp_path)


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_a_run_on_images(tmp_path: Path, kind: str) -> None:
    save_tiny(tmp_path / "model", kind)
    (tmp_path / "images").mkdir()
    rows = []
    for i in range(80):
        side = ("left", "right")[i % 2]
        path = tmp_path / "images" / f"{i}.png"
        path.write_bytes(png(side, i))
        rows.append({"image": str(path), "label": side})
    fields = {"exclude_modules": ["embedder"]} if kind == "resnet" else {}
    training = {"num_train_epochs": 8, "learning_rate": 3e-3, "per_device_train_batch_size": 8}
    results = run_task(tmp_path, rows, training, **fields)
    assert results["test_accuracy"] > 0.8, results
    check_reload(tmp_path)
