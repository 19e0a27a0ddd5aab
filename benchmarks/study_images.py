"""The image model and the image task of the selection study.

    pip install --no-deps --target FONTS matplotlib pillow
    PYTHONPATH=FONTS python benchmarks/study_images.py --steps 0    # draws the characters: benchmarks/.study_data/glyphs.npz
    python benchmarks/study_images.py                               # trains on them: image.npz, the model and the task

The second needs numpy and torch alone, and is for a GPU (about two minutes). The model is Transformers' ViT, with its names, on grey
images of 32 × 32 pixels in patches of 8 (width 192, 6 layers, 3 heads), trained from random weights to tell 112 printed characters
from each other: letters (Latin, Greek, Cyrillic) and signs of 22 TrueType fonts that matplotlib ships, drawn with random size,
shift, rotation, shear, bends, strokes, sharpness, contrast and noise. Digits are left out, and so are letters that look like another
one once their size is gone; l and o stay, which look like one and zero. The task is scikit-learn's handwritten digits (1,797 images
of 8 × 8, enlarged): 300 to train on, 300 for validation, 1,197 for the test.

Fonts are read, and no glyph is passed on with the repository: DejaVu (Bitstream Vera's licence, its changes in the public domain) and
STIX (STIX Font License), whose texts lie beside them in matplotlib, and Computer Modern in BaKoMa's form (BaKoMa Fonts Licence). The
digits are the UCI data set "Optical Recognition of Handwritten Digits" (CC BY 4.0), of whose test part scikit-learn ships a copy.
"""

from __future__ import annotations

import argparse
import importlib.util
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

import study_training as st
from study_data import FOLDER, _split_bytes, load_model

SIDE, PATCH, WIDTH, LAYERS, HEADS = 32, 8, 192, 6, 3
REPORTED = 500  # steps between two lines
DRAWN = 64  # pixels of a side, before a glyph is bent and reduced
TRAIN, VALIDATION = 300, 300
LATIN = "abcdefghijklmnopqrstuvwxyzABDEFGHIJLMNQRTUY"  # of the capitals, those unlike their small letter
CHARACTERS = LATIN + "αβγδεζηθλμξπσφχψωΓΔΘΛΞΠΣΦΨΩ" + "бджицчшщэюяБЖИЦЧШЩЭЮЯ" + "!#$%&()+<>?@[]{}*=~^/"
FONTS = (
    *(f"DejaVu{family}" for family in ("Sans", "Serif", "SansMono")),
    *(f"DejaVu{family}-Bold" for family in ("Sans", "Serif", "SansMono")),
    *("DejaVuSans-Oblique", "DejaVuSans-BoldOblique", "DejaVuSansMono-Oblique", "DejaVuSansMono-BoldOblique"),
    *("DejaVuSerif-Italic", "DejaVuSerif-BoldItalic"),
    *(f"STIXGeneral{style}" for style in ("", "Bol", "BolIta", "Italic")),
)
COMPUTER_MODERN = (
    "cmr10",
    "cmb10",
    "cmss10",
    "cmtt10",
    "cmti10",
    "cmmi10",
)  # of their codes, letters alone are Unicode's


def glyphs(folder: Path) -> tuple[Tensor, Tensor]:
    """(n, 64, 64) characters in grey from 0 to 255, and (n,) which of CHARACTERS each is; every font's that it has."""
    from PIL import Image, ImageDraw, ImageFont

    images, labels = [], []
    for name in (*FONTS, *COMPUTER_MODERN):
        font = ImageFont.truetype(folder / f"{name}.ttf", 96)

        def drawn(character: str, font: Any = font) -> Image.Image | None:
            sheet = Image.new("L", (256, 256))
            ImageDraw.Draw(sheet).text((64, 64), character, fill=255, font=font)
            box = sheet.getbbox()
            return None if box is None else sheet.crop(box)

        absent = drawn("\ufffe")
        for label, character in enumerate(CHARACTERS):
            if name in COMPUTER_MODERN and character not in LATIN:
                continue
            glyph = drawn(character)
            if glyph is None or (absent is not None and glyph.tobytes() == absent.tobytes()):
                continue
            largest = 48 / max(glyph.size)
            glyph = glyph.resize(tuple(max(1, round(largest * side)) for side in glyph.size))  # type: ignore[arg-type]
            sheet = Image.new("L", (DRAWN, DRAWN))
            sheet.paste(glyph, tuple((DRAWN - side) // 2 for side in glyph.size))  # type: ignore[arg-type]
            images.append(torch.from_numpy(np.asarray(sheet).copy()))
            labels.append(label)
    return torch.stack(images), torch.tensor(labels)


def altered(images: Tensor, draw: torch.Generator) -> Tensor:
    """(n, 64, 64) to (n, 32, 32) from 0 to 1: each drawn anew by a hand that is never the same."""
    n = len(images)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(n, *shape, generator=draw, device=images.device) * (high - low) + low

    x = images.unsqueeze(1)
    thick, thin = F.max_pool2d(x, 5, 1, 2), -F.max_pool2d(-x, 3, 1, 1)
    stroke = uniform(0, 1, 1, 1, 1)
    x = torch.where(stroke < 0.35, thick, torch.where(stroke > 0.9, thin, x))
    angle, shear = uniform(-0.25, 0.25), uniform(-0.35, 0.35)
    wide, high = uniform(0.65, 1.15), uniform(0.65, 1.05)
    cos, sin = angle.cos(), angle.sin()
    across = torch.stack((cos * wide, (shear * cos - sin) * high, uniform(-0.12, 0.12)), 1)
    down = torch.stack((sin * wide, (shear * sin + cos) * high, uniform(-0.12, 0.12)), 1)
    grid = F.affine_grid(torch.stack((across, down), 1), [n, 1, SIDE, SIDE], align_corners=False)
    bends = F.interpolate(uniform(-1, 1, 2, 4, 4), (SIDE, SIDE), mode="bicubic", align_corners=True)
    x = F.grid_sample(x, grid + 0.08 * bends.permute(0, 2, 3, 1), align_corners=False)
    sharp = uniform(0, 1, 1, 1, 1)
    for least, most, side in ((0.2, 0.7, 8), (0.7, 0.85, 16)):  # the others keep all pixels
        coarse = F.interpolate(F.avg_pool2d(x, SIDE // side), (SIDE, SIDE), mode="bilinear")
        x = torch.where((sharp >= least) & (sharp < most), coarse, x)
    x = x / x.amax((2, 3), keepdim=True).clamp(min=0.2)
    noise = torch.randn(x.shape, generator=draw, device=x.device) * uniform(0, 0.1, 1, 1, 1)
    return (x * uniform(0.6, 1.3, 1, 1, 1) + noise).clamp(0, 1).squeeze(1)


def shapes() -> dict[str, tuple[int, ...]]:
    """Of the model's weights, by their names in Transformers' ViTModel."""
    tokens = (SIDE // PATCH) ** 2 + 1
    found: dict[str, tuple[int, ...]] = {
        "embeddings.cls_token": (1, 1, WIDTH),
        "embeddings.position_embeddings": (1, tokens, WIDTH),
        "embeddings.patch_embeddings.projection.weight": (WIDTH, 1, PATCH, PATCH),
        "embeddings.patch_embeddings.projection.bias": (WIDTH,),
    }
    for layer in range(LAYERS):
        for part in ("attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.o_proj"):
            found[f"layers.{layer}.{part}.weight"] = (WIDTH, WIDTH)
        found[f"layers.{layer}.mlp.fc1.weight"] = (4 * WIDTH, WIDTH)
        found[f"layers.{layer}.mlp.fc2.weight"] = (WIDTH, 4 * WIDTH)
        found |= {f"layers.{layer}.layernorm_{at}.weight": (WIDTH,) for at in ("before", "after")}
    found["layernorm.weight"] = (WIDTH,)
    return found | {
        name.replace("weight", "bias"): shape[:1] for name, shape in found.items() if name.endswith("weight")
    }


def pretrained(
    glyphs: Tensor, labels: Tensor, device: str, steps: int, batch: int = 512, rate: float = 1e-3
) -> dict[str, Tensor]:
    """The weights after so many steps of AdamW on characters drawn anew each time."""
    torch.backends.cuda.matmul.allow_tf32 = True
    draw = torch.Generator(device).manual_seed(1)
    base = st.Base({n: torch.zeros(shape) for n, shape in shapes().items()}, "image", torch.device(device), HEADS)
    base.flat.copy_(base.untrained(torch.Generator().manual_seed(0)))
    most = np.array([len(CHARACTERS) - 1])
    data = st.Data({"kind": "class", "ids": np.zeros((1, SIDE * SIDE)), "labels": most}, torch.device(device))
    head = torch.zeros(1, data.outputs * (WIDTH + 1))
    one = st.Replicas(base, data, torch.zeros(1, 1, 1), head, scope="all", dropout=0.0)
    leaves = [leaf for group in one.groups for leaf in group["leaves"]]
    optimizer = torch.optim.AdamW(leaves, lr=rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, pct_start=0.1)
    glyphs, labels = glyphs.to(device), labels.to(device)
    began, right = time.perf_counter(), torch.zeros((), device=device)
    for step in range(1, steps + 1):
        rows = torch.randint(len(glyphs), (batch,), generator=draw, device=device)
        pixels = 255 * altered(glyphs[rows], draw).flatten(1)
        logits = st.vit(one, pixels.unsqueeze(0), None).squeeze(0)
        F.cross_entropy(logits, labels[rows]).backward()
        torch.nn.utils.clip_grad_norm_(leaves, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        right += (logits.argmax(-1) == labels[rows]).float().mean()
        if step % REPORTED == 0:
            share, seconds = right.item() / REPORTED, time.perf_counter() - began
            print(f"{step} steps, {seconds:.0f} s: {share:.1%} of the last {REPORTED} batches right", flush=True)
            right.zero_()
    return {name: one.named[name][0].detach().cpu() for name in base.place}


def digits() -> Iterator[tuple[str, Any]]:
    """The fields of the task: ``ids`` are the pixels (1797, 1024), 0 to 255, in a fixed random order."""
    from sklearn.datasets import load_digits

    found = load_digits()
    order = np.random.default_rng(0).permutation(len(found.images))
    small = torch.from_numpy(found.images[order]).float().unsqueeze(1) / 16
    large = F.interpolate(small, (SIDE, SIDE), mode="bilinear").flatten(1)
    yield "task:digits:ids", (255 * large).round().to(torch.uint8).numpy()
    yield "task:digits:labels", found.target[order].astype(np.int64)
    yield "task:digits:n_test", np.array(len(order) - TRAIN - VALIDATION)
    yield "task:digits:n_train", np.array(TRAIN)
    yield "task:digits:n_validation", np.array(VALIDATION)
    yield "task:digits:kind", np.array("class")


def write_image(weights: dict[str, Tensor], task: dict[str, np.ndarray]) -> None:
    rounded = {name: weight.bfloat16().float() for name, weight in weights.items()}  # half the file
    arrays = {f"model:{name}": _split_bytes(weight.numpy()) for name, weight in rounded.items()}
    np.savez_compressed(FOLDER / "image.npz", **arrays, **task)
    again = load_model("image")
    assert all(torch.equal(again[name], weight) for name, weight in rounded.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fonts", type=Path, help="a folder of the TrueType fonts; matplotlib's by default")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=10_000, help="0: the characters alone are drawn")
    options = parser.parse_args()
    file = FOLDER / "glyphs.npz"
    if not file.exists():
        folder = options.fonts
        if folder is None:
            spec = importlib.util.find_spec("matplotlib")
            if spec is None or spec.origin is None:
                parser.error("matplotlib, whose fonts are drawn, is not installed; name a folder of them (--fonts)")
            folder = Path(spec.origin).parent / "mpl-data" / "fonts" / "ttf"
        FOLDER.mkdir(exist_ok=True)
        images, labels = glyphs(folder)
        np.savez_compressed(file, glyphs=images.numpy(), labels=labels.numpy(), **dict(digits()))
    if options.steps:
        with np.load(file) as kept:
            task = {name: kept[name] for name in kept.files if name.startswith("task:")}
            images, labels = torch.from_numpy(kept["glyphs"]), torch.from_numpy(kept["labels"])
        print(f"{len(images)} glyphs of {len(CHARACTERS)} characters", flush=True)
        write_image(pretrained(images.float() / 255, labels, options.device, options.steps), task)
    for written in (file, FOLDER / "image.npz"):
        if written.exists():
            print(f"{written.name} {written.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
