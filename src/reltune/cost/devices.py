"""What is known of usual cards without having one: memory, and the speeds that their makers state."""

from __future__ import annotations

import dataclasses
import re
from typing import TYPE_CHECKING

from reltune.errors import InputError, nearest

if TYPE_CHECKING:
    from reltune.cost.calibration import Calibration, Rates

GIB = 1 << 30
LIBRARIES = 15 << 20  # bytes of a process on a CPU, that the first step loads


@dataclasses.dataclass(frozen=True)
class Card:
    """A card, by its maker's data sheet.

    Attributes:
        memory: bytes that a process finds free on it.
        bfloat16, float32: dense multiplications and additions a second with sums in float32, in 10¹²; 0: it has none.
        bandwidth: bytes a second, in 10⁹.
    """

    name: str
    memory: int
    bfloat16: float
    float32: float
    bandwidth: float


def _card(name: str, gib: float, bfloat16: float, float32: float, bandwidth: float) -> Card:
    return Card(name, int(gib * GIB), bfloat16, float32, bandwidth)


# NVIDIA's data sheets of each; memory as torch.cuda.get_device_properties gives it, or the sheet's less 2%.
CARDS = {
    "b200-180gb": _card("NVIDIA B200", 178.0, 2250, 75, 8000),
    "h200-141gb": _card("NVIDIA H200", 139.8, 989, 67, 4800),
    "h100-80gb": _card("NVIDIA H100 SXM", 79.1, 989, 67, 3350),
    "h100-pcie-80gb": _card("NVIDIA H100 PCIe", 79.1, 756, 51, 2000),
    "a100-80gb": _card("NVIDIA A100 SXM 80 GB", 79.1, 312, 19.5, 2039),
    "a100-40gb": _card("NVIDIA A100 40 GB", 39.4, 312, 19.5, 1555),
    "l40s-48gb": _card("NVIDIA L40S", 44.4, 362, 91.6, 864),
    "a6000-48gb": _card("NVIDIA RTX A6000", 47.4, 155, 38.7, 768),
    "a10g-24gb": _card("NVIDIA A10G", 22.0, 70, 35, 600),
    "l4-24gb": _card("NVIDIA L4", 22.0, 121, 30.3, 300),
    "t4-16gb": _card("NVIDIA T4", 14.6, 0, 8.1, 320),
    "v100-16gb": _card("NVIDIA V100 16 GB", 15.8, 0, 15.7, 900),
    "v100-32gb": _card("NVIDIA V100 32 GB", 31.7, 0, 15.7, 900),
    "rtx5090-32gb": _card("NVIDIA GeForce RTX 5090", 31.4, 209, 105, 1792),
    "rtx4090-24gb": _card("NVIDIA GeForce RTX 4090", 23.5, 165, 82.6, 1008),
    "rtx4080-16gb": _card("NVIDIA GeForce RTX 4080", 15.7, 97.5, 48.7, 717),
    "rtx4070-12gb": _card("NVIDIA GeForce RTX 4070", 11.7, 58.3, 29.1, 504),
    "rtx4060ti-16gb": _card("NVIDIA GeForce RTX 4060 Ti 16 GB", 15.7, 44.1, 22.1, 288),
    "rtx3090-24gb": _card("NVIDIA GeForce RTX 3090", 23.6, 71, 35.6, 936),
    "rtx3060-12gb": _card("NVIDIA GeForce RTX 3060", 11.8, 25.5, 12.7, 360),
}

# What of the stated speed operations of so many flops, or bytes, reach: what a calibration of an H200 found (benchmarks/results/cost_sweep.json) over
# its data sheet; of attention, of so many flops for each query.
SHARES: dict[str, list[tuple[float, float]]] = {
    "products": [(3.4e7, 0.009), (2.7e8, 0.064), (2.1e9, 0.33), (1.7e10, 0.69), (1.4e11, 0.80)],
    "attention forward": [(4.9e4, 0.19), (1.5e5, 0.28), (5.4e5, 0.35)],
    "attention backward": [(1.2e5, 0.12), (3.7e5, 0.22), (1.4e6, 0.32)],
    "bandwidth": [(6.6e4, 0.0075), (2.7e8, 0.84)],
}
PER_OPERATION = 9e-6  # seconds of the host for an operation, by the same


def card(name: str) -> Card:
    """The card of that name, in whatever case and with or without its memory, or a size such as 24GiB as a card of unknown speed.

    Raises InputError for another name.
    """
    key = name.strip().lower()
    size = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(gib|gb|g)", key)
    if size:
        return Card(name, int(float(size[1]) * (10**9 if size[2] == "gb" else GIB)), 0, 0, 0)
    found = [each for each in CARDS if key in (each, each.rpartition("-")[0], each.removeprefix("rtx"))]
    if not found:
        known = nearest(key, CARDS)
        raise InputError(f"device {name!r} is no card that is known here, and no size such as 24GiB; {known}")
    return CARDS[found[0]]


def calibration_of(card: Card) -> Calibration | None:
    """What a calibration would find on the card, by its data sheet; None for a card of unknown speed."""
    if not card.bandwidth:
        return None
    from reltune.cost.calibration import Calibration  # which needs torch

    def of(what: str, peak: float) -> Rates:
        return [(amount, share * peak) for amount, share in SHARES[what]]

    peaks = {"float32": card.float32 * 1e12, "bfloat16": (card.bfloat16 or card.float32) * 1e12}
    return Calibration(
        "cuda",
        card.name,
        {dtype: of("products", peak) for dtype, peak in peaks.items()},
        {
            f"{dtype} {way}": of(f"attention {way}", peak)
            for dtype, peak in peaks.items()
            for way in ("forward", "backward")
        },
        of("bandwidth", card.bandwidth * 1e9),
        PER_OPERATION,
    )
