"""The image model and the image task of the selection study, made once where Transformers, scikit-learn and Pillow are.

    pip install --no-deps --target FONTS matplotlib pillow
    PYTHONPATH=FONTS python benchmarks/study_images.py

writes ``benchmarks/.study_data/image.npz`` in about MINUTES of one CPU core. The model is Transformers' ViT on grey images of 32 × 32
pixels in patches of 8 (width 192, 6 layers, 3 heads), trained from random weights to tell 112 printed characters from each other:
letters (Latin, Greek, Cyrillic) and signs from the TrueType fonts that matplotlib ships, drawn with random size, shift, rotation,
shear, bends, strokes, sharpness, contrast and noise. Digits are left out, and so are letters that look like another one once their
size is gone, but for l and o, which look like one and zero. The task is scikit-learn's handwritten digits (1,797 images of 8 × 8,
enlarged): 300 to train on, 300 for validation, 1,197 for the test.

Fonts are read, not passed on: DejaVu (Bitstream Vera's licence; DejaVu's changes are in the public domain), STIX (its own licence,
later the SIL Open Font License) and the BaKoMa Computer Modern fonts (BaKoMa's licence), whose texts lie beside them in
matplotlib. The digits are the UCI data set "Optical Recognition of Handwritten Digits" (CC BY 4.0), a copy of whose test part
scikit-learn ships.
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

from study_data import FOLDER, _split_bytes, load_model

SIDE, PATCH = 32, 8
HEADS = 3
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
COMPUTER_MODERN = ("cmr10", "cmb10", "cmss10", "cmtt10", "cmti10", "cmmi10")  # of their codes, letters alone are Unicode's


def glyphs(folder: Path) -> tuple[Tensor, Tensor]:
    """(n, 64, 64) characters in grey from 0 to 1, and (n,) which of CHARACTERS each is; every font's that it has."""
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
    return torch.stack(images).float() / 255, torch.tensor(labels)


def altered(images: Tensor, draw: torch.Generator) -> Tensor:
    """(n, 64, 64) to (n, 32, 32) from 0 to 1: each drawn anew by a hand that is never the same."""
    n = len(images)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(n, *shape, generator=draw) * (high - low) + low

    x = images.unsqueeze(1)
    thick, thin = F.max_pool2d(x, 5, 1, 2), -F.max_pool2d(-x, 3, 1, 1)
    stroke = uniform(0, 1, 1, 1, 1)
    x = torch.where(stroke < 0.35, thick, torch.where(stroke > 0.9, thin, x))
    angle, shear = uniform(-0.25, 0.25), uniform(-0.35, 0.35)
    wide, high = uniform(0.65, 1.15), uniform(0.65, 1.05)
    cos, sin = angle.cos(), angle.sin()
    maps = torch.stack(
        (cos * wide, (shear * cos - sin) * high, uniform(-0.12, 0.12), sin * wide, (shear * sin + cos) * high)
        + (uniform(-0.12, 0.12),),
        1,
    ).view(n, 2, 3)
    grid = F.affine_grid(maps, [n, 1, SIDE, SIDE], align_corners=False)
    bends = F.interpolate(uniform(-1, 1, 2, 4, 4), (SIDE, SIDE), mode="bicubic", align_corners=True)
    x = F.grid_sample(x, grid + 0.08 * bends.permute(0, 2, 3, 1), align_corners=False)
    sharp = uniform(0, 1, 1, 1, 1)
    for least, most, side in ((0.2, 0.7, 8), (0.7, 0.85, 16)):  # the others keep all pixels
        coarse = F.interpolate(F.avg_pool2d(x, SIDE // side), (SIDE, SIDE), mode="bilinear")
        x = torch.where((sharp >= least) & (sharp < most), coarse, x)
    x = x / x.amax((2, 3), keepdim=True).clamp(min=0.2)
    noise = torch.randn(x.shape, generator=draw) * uniform(0, 0.1, 1, 1, 1)
    return (x * uniform(0.6, 1.3, 1, 1, 1) + noise).clamp(0, 1).squeeze(1)


def vit(layers: int = 6, outputs: int = len(CHARACTERS)) -> Any:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(
        ViTConfig(
            hidden_size=192,
            num_hidden_layers=layers,
            num_attention_heads=HEADS,
            intermediate_size=768,
            image_size=SIDE,
            patch_size=PATCH,
            num_channels=1,
            num_labels=outputs,
        )
    )


def normal(images: Tensor) -> Tensor:
    """(n, 32, 32) from 0 to 1 as the model takes them: (n, 1, 32, 32) from -1 to 1."""
    return (2 * images - 1).unsqueeze(1)


def pretrained(folder: Path, steps: int, batch: int = 128, rate: float = 1e-3) -> Any:
    """The model after so many steps of AdamW on characters drawn anew each time."""
    torch.manual_seed(0)
    draw = torch.Generator().manual_seed(1)
    images, labels = glyphs(folder)
    print(f"{len(images)} glyphs of {len(CHARACTERS)} characters", flush=True)
    model = vit()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, pct_start=0.05)
    began = time.perf_counter()
    right: list[float] = []
    for step in range(steps):
        rows = torch.randint(len(images), (batch,), generator=draw)
        logits = model(normal(altered(images[rows], draw))).logits
        loss = F.cross_entropy(logits, labels[rows])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        right.append((logits.argmax(-1) == labels[rows]).float().mean().item())
        if (step + 1) % 200 == 0:
            share = sum(right[-200:]) / 200
            print(f"{step + 1} steps, {time.perf_counter() - began:.0f} s: {share:.1%} right, before each step", flush=True)
    return model.eval()


def digits() -> Iterator[tuple[str, Any]]:
    """The fields of the task: ``ids`` are the pixels (1797, 1024), 0 to 255, in a fixed random order."""
    from sklearn.datasets import load_digits

    found = load_digits()
    order = np.random.default_rng(0).permutation(len(found.images))
    small = torch.from_numpy(found.images[order]).float().unsqueeze(1) / 16
    large = F.interpolate(small, (SIDE, SIDE), mode="bilinear").flatten(1)
    yield "ids", (255 * large).round().to(torch.uint8).numpy()
    yield "labels", found.target[order].astype(np.int64)
    yield "n_test", np.array(len(order) - TRAIN - VALIDATION)
    yield "n_train", np.array(TRAIN)
    yield "n_validation", np.array(VALIDATION)
    yield "kind", np.array("class")


def write_image(model: Any) -> None:
    arrays = {f"task:digits:{field}": value for field, value in digits()}
    weights = {
        name.removeprefix("vit."): tensor.detach().bfloat16().float()  # half the file; what is read is what is meant
        for name, tensor in model.state_dict().items()
        if name.startswith("vit.")
    }
    arrays |= {f"model:{name}": _split_bytes(tensor.numpy()) for name, tensor in weights.items()}
    FOLDER.mkdir(exist_ok=True)
    np.savez_compressed(FOLDER / "image.npz", **arrays)
    again = load_model("image")
    assert all(torch.equal(again[name], tensor) for name, tensor in weights.items())
    print(f"image.npz {(FOLDER / 'image.npz').stat().st_size / 2**20:.1f} MiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fonts", type=Path, help="a folder of the TrueType fonts; matplotlib's by default")
    parser.add_argument("--steps", type=int, default=2400)
    options = parser.parse_args()
    folder = options.fonts
    if folder is None:
        spec = importlib.util.find_spec("matplotlib")
        if spec is None or spec.origin is None:
            parser.error("matplotlib, whose fonts are drawn, is not installed; name a folder of them (--fonts)")
        folder = Path(spec.origin).parent / "mpl-data" / "fonts" / "ttf"
    write_image(pretrained(folder, options.steps))


if __name__ == "__main__":
    main()
