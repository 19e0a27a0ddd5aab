"""Which weights to train: criteria, probes, sizes and rates compared in thousands of small trainings on one or more GPUs.

    python benchmarks/selection_study.py --phase explore --minutes 8.5 --output_dir DIR
    python benchmarks/selection_study.py --phase encoder --minutes 8.5 --output_dir DIR
    python benchmarks/selection_study.py --phase decoder --minutes 8.5 --output_dir DIR
    python benchmarks/selection_study.py --phase image --seeds 10 --minutes 4 --output_dir DIR

reads what study_data.py (for images: study_images.py) wrote and appends every training to DIR/PHASE.jsonl as it ends, so that a
phase that is cut short keeps what it has; with --go_on, trainings that benchmarks/results holds already are not repeated. A method's rate is chosen per task by the mean of its
validation figure over the seeds, and the grid is widened while the best rate lies on its edge, twice at most; the test part is
looked at once, at that rate. Every method starts from the same head, trained alone for one epoch. selection_tables.py and
results_page.py make the tables.

The phases proof and proof_decoder put every way to train side by side, small_data and noise some of them on fewer or more examples and on
flipped labels. There the rate is looked for with two seeds, and the chosen one is tried with all of them. Beside the test part
stands the loss on plain text at the chosen rate: what the training forgot.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import queue
import re
import statistics as stats
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.multiprocessing as mp
from torch import Tensor

import study_data
import study_training as st

HEAD_RATE = 1e-3
HEADS_OF = {"encoder": 12, "image": 3}  # attention heads; the decoder's are of two sorts
BY_WEIGHTS = ("magnitude", "spectrum", "top")  # sources of choices that look at no data
MAIN = "main 0 50"  # the probe of the second round: fixed steps of 1e-4, 50 batches of 32 in training mode
PROBE_STEPS = 50
HALF_DECADE = 10**0.5
SMALL = (5e-3, 1e-2, 2e-2, 4e-2)
COLUMN = (1e-3, 2e-3, 4e-3, 8e-3)
LORA = (1e-3, 2e-3, 4e-3, 8e-3)
FULL = (5e-5, 1e-4, 2e-4, 4e-4)


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to train.

    Attributes:
        selection: name of the places trained ("fixed 50 even 0.0025"), "" for LoRA and "all" for full tuning.
        lora: rank; ``start_a``: name of its A; ``fixed_a``: whether A stays.
        more_steps: steps beyond the epochs (or fewer), for equal total cost.
        head_rate: the head's own rate, None for the method's.
        from_movement: the chosen weights start where the probe left them.
        grow: as many weights again are chosen by a second probe after a third of the training.
        small: biases and norms of the layers are trained beside.
        untrained: starts from random weights instead of the pretrained ones.
        maps: the share of the linear maps, by KappaTune's choice, that LoRA is put on; 1 for all.
    """

    selection: str = ""
    rates: tuple[float, ...] = SMALL
    lora: int = 0
    start_a: str = ""
    fixed_a: bool = False
    more_steps: int = 0
    head_rate: float | None = None
    from_movement: bool = False
    grow: bool = False
    small: bool = False
    untrained: bool = False
    maps: float = 1


@dataclasses.dataclass(frozen=True)
class ProbeRun:
    """One batch of probes: settings (size, relative to the matrix's RMS?) side by side, and the stops at which it is read."""

    settings: tuple[tuple[float, bool], ...]
    stops: tuple[int, ...] = (PROBE_STEPS,)
    how: str = "sign"
    dropout: float | None = None
    batch: int = st.BATCH
    scope: str = "linear"


@dataclasses.dataclass(frozen=True)
class Phase:
    kind: str
    tasks: tuple[str, ...]
    epochs: int
    probes: dict[str, ProbeRun]
    methods: dict[str, Method]
    statistics: bool = False
    max_replicas: int = 20
    workers: int = 3
    head_epochs: int = 1  # that every method's new head is trained alone before
    main: str = MAIN  # the probe whose movement and votes other choices are made from
    scouts: int = 0  # seeds that the rates are looked for with; 0 for all
    widen: float = 2  # the next rate beyond an edge is so many times the one there


def even(score: str, share: float = 0.0025) -> str:
    return f"{score}|even|{share}"


ENCODER_CLASSES = ("movie", "amazon", "nyt", "tweets", "bbc")
EXPLORE = Phase(
    "encoder",
    ENCODER_CLASSES,
    3,
    {
        "main": ProbeRun(
            ((1e-4, False), (0.0, False), (4e-4, False), (5e-4, True), (2e-3, True), (8e-3, True)), (25, 50, 100, 200)
        ),
        "eval": ProbeRun(((1e-4, False),), dropout=0.0),
        "b16": ProbeRun(((1e-4, False),), (50, 100), batch=16),
        "all": ProbeRun(((1e-4, False),), scope="all"),
        "momentum": ProbeRun(((1e-4, False),), how="momentum"),
        "adam": ProbeRun(((1e-4, False), (1e-3, False)), how="adam"),
    },
    {
        "sign 50": Method(even(MAIN)),
        "LoRA 1": Method(lora=1, rates=LORA),
        "LoRA 4": Method(lora=4, rates=LORA),
        "full": Method("all", FULL),
        "random": Method(even("random")),
        "sign 50, head 1e-3": Method(even(MAIN), head_rate=1e-3),
        "LoRA 4, head 1e-3": Method(lora=4, rates=LORA, head_rate=1e-3),
        "sign 50 still": Method(even("main 1 50")),
        "sign 50 relative 2e-3": Method(even("main 4 50")),
        "sign 200": Method(even("main 0 200")),
        "sign 100": Method(even("main 0 100")),
        "sign 25": Method(even("main 0 25")),
        "sign 50 eval mode": Method(even("eval 0 50")),
        "sign 50 global": Method(f"{MAIN}|global|0.0025"),
        "sign 50 root": Method(f"{MAIN}|root|0.0025"),
        "sign 50 rows": Method(f"{MAIN}|rows|0.0025"),
        "sign 50 columns first": Method(f"{MAIN}|columns|0.0025"),
        "sign 50 from movement, 50 steps fewer": Method(even(MAIN), from_movement=True, more_steps=-PROBE_STEPS),
        "sign 50 from movement": Method(even(MAIN), from_movement=True),
        "sign 50 grown": Method(even(MAIN, 0.00125), grow=True),
        "sign 50 and biases, norms": Method(even(MAIN), small=True),
        "LoRA 8": Method(lora=8, rates=LORA),
        "columns centred Fisher": Method("centred|column|0.0104", COLUMN),
        "columns diverse gradient": Method("diverse gradient|column|0.0104", COLUMN),
        "columns diverse": Method("diverse|column|0.0104", COLUMN),
        "columns diverse movement": Method("diverse movement|column|0.0104", COLUMN),
        "columns movement": Method(f"{MAIN}|column|0.0104", COLUMN),
        "columns random": Method("random|column|0.0104", COLUMN),
        "columns Fisher": Method("fisher|column|0.0104", COLUMN),
        "LoRA 3": Method(lora=3, rates=LORA),
        "LoRA 3, A from movement": Method(lora=3, rates=LORA, start_a=MAIN),
        "LoRA 5, A from movement and fixed": Method(lora=5, rates=LORA, start_a=MAIN, fixed_a=True),
        "sign 50 by summed gradient": Method(even(MAIN + " sum")),
        "sign 50 by SNR": Method(even(MAIN + " snr")),
        "sign 50-100 late votes": Method(even("main 0 100 late")),
        "sign 50 relative 5e-4": Method(even("main 3 50")),
        "sign 50 relative 8e-3": Method(even("main 5 50")),
        "sign 50 step 4e-4": Method(even("main 2 50")),
        "sign 50 batch 16": Method(even("b16 0 50")),
        "sign 100 batch 16": Method(even("b16 0 100")),
        "sign 50 all moved": Method(even("all 0 50")),
        "momentum 50": Method(even("momentum 0 50")),
        "AdamW 1e-4 50": Method(even("adam 0 50")),
        "AdamW 1e-3 50": Method(even("adam 1 50")),
        "tiles 8, 0.25%": Method(f"{MAIN}|tile8|0.0025"),
        "tiles 4, 0.25%": Method(f"{MAIN}|tile4|0.0025"),
        "tiles 8, 1%": Method(f"{MAIN}|tile8|0.01"),
        "tiles 8, 1%, random": Method("random|tile8|0.01"),
        "sign 50, 0.1%": Method(even(MAIN, 0.001)),
        "sign 50, 1%": Method(even(MAIN, 0.01)),
        "BitFit": Method("none|even|0", (1e-3, 2e-3, 4e-3, 8e-3), small=True),
    },
    statistics=True,
)
ALL = "all 0 50"  # the best of the exploration: everything moves, not the linear maps alone
ALL_RELATIVE = "all 1 50"  # the same, each matrix by a share of its root mean square
ENCODER = Phase(
    "encoder",
    (*ENCODER_CLASSES, "movie_score", "capitals"),
    3,
    {
        "all": ProbeRun(((1e-4, False), (2e-3, True)), (50, 100), scope="all"),
        "linear": ProbeRun(((1e-4, False),)),
    },
    {
        "weights 0.25%": Method(even(ALL)),
        "LoRA 4": Method(lora=4, rates=LORA),
        "full": Method("all", FULL),
        "random 0.25%": Method(even("random")),
        "weights 0.25%, relative": Method(even(ALL_RELATIVE)),
        "weights 0.25%, columns first": Method(f"{ALL}|columns|0.0025"),
        "weights 0.25%, relative, columns first": Method(f"{ALL_RELATIVE}|columns|0.0025"),
        "weights 0.25%, linear maps moved": Method(even("linear 0 50")),
        "weights 0.25%, 100 steps": Method(even("all 0 100")),
        "LoRA 4, equal cost": Method(lora=4, rates=LORA, more_steps=PROBE_STEPS),
        "full, equal cost": Method("all", FULL, more_steps=PROBE_STEPS),
        "random 0.25%, equal cost": Method(even("random"), more_steps=PROBE_STEPS),
        "LoRA 1": Method(lora=1, rates=LORA),
        "LoRA 8": Method(lora=8, rates=LORA),
        "weights 1%": Method(even(ALL, 0.01)),
        "weights 0.1%": Method(even(ALL, 0.001)),
        "LoRA 3": Method(lora=3, rates=LORA),
        "columns 1%, diverse movement": Method("diverse movement|column|0.0104", COLUMN),
        "columns 1%, diverse": Method("diverse|column|0.0104", COLUMN),
        "LoRA 5, A from movement and fixed": Method(lora=5, rates=LORA, start_a=ALL, fixed_a=True),
        "tiles 8, 1%, random": Method("random|tile8|0.01"),
        "weights 0.25%, from movement": Method(even(ALL), from_movement=True),
    },
    statistics=True,
    max_replicas=12,
    main=ALL,
)
GOAL_PROBE = {"all": ProbeRun(((1e-4, False), (2e-3, True)), scope="all")}
DECODER_LORA = (1e-3, 2e-3, 4e-3)
DECODER_WEIGHTS = (5e-3, 1e-2, 2e-2)
DECODER_FULL = (3e-5, 1e-4, 3e-4)
DECODER = Phase(
    "decoder",
    ("chain_sum", "number_sequence", "movie_word", "gcd"),
    2,
    GOAL_PROBE,
    {
        "weights 1%": Method(even(ALL, 0.01), DECODER_WEIGHTS),
        "LoRA 8": Method(lora=8, rates=DECODER_LORA),
        "full": Method("all", DECODER_FULL),
        "LoRA 16, A from movement and fixed": Method(lora=16, rates=DECODER_LORA, start_a=ALL, fixed_a=True),
        "weights 0.25%": Method(even(ALL), DECODER_WEIGHTS),
        "LoRA 1": Method(lora=1, rates=DECODER_LORA),
        "LoRA 8, equal cost": Method(lora=8, rates=DECODER_LORA, more_steps=PROBE_STEPS),
        "full, equal cost": Method("all", DECODER_FULL, more_steps=PROBE_STEPS),
        "weights 1%, columns first": Method(f"{ALL}|columns|0.01", DECODER_WEIGHTS),
        "LoRA 1, equal cost": Method(lora=1, rates=DECODER_LORA, more_steps=PROBE_STEPS),
        "random 1%": Method(even("random", 0.01), DECODER_WEIGHTS),
        "weights 1%, global": Method(f"{ALL}|global|0.01", DECODER_WEIGHTS),
        "weights 1%, relative": Method(even(ALL_RELATIVE, 0.01), DECODER_WEIGHTS),
        "weights 0.25%, global": Method(f"{ALL}|global|0.0025", DECODER_WEIGHTS),
        "weights 0.25%, columns first": Method(f"{ALL}|columns|0.0025", DECODER_WEIGHTS),
        "random 0.25%": Method(even("random"), DECODER_WEIGHTS),
    },
    max_replicas=6,
    workers=1,
    main=ALL,
)
CONFIRM = dataclasses.replace(  # what the phase before found best, put together, on seeds that nothing has seen
    ENCODER,
    methods={
        "weights 0.25%, 100 steps, relative, columns first": Method("all 1 100|columns|0.0025"),
        "LoRA 4": Method(lora=4, rates=LORA),
        "full": Method("all", FULL),
        "random 0.25%": Method(even("random")),
        "LoRA 4, equal cost": Method(lora=4, rates=LORA, more_steps=100),
        "full, equal cost": Method("all", FULL, more_steps=100),
        "weights 0.25%, 100 steps, columns first": Method("all 0 100|columns|0.0025"),
        "weights 0.25%, 100 steps": Method(even("all 0 100")),
        "weights 1%, 100 steps, relative, columns first": Method("all 1 100|columns|0.01"),
    },
    statistics=False,
)
R100 = "all 1 100"
COLUMNS = f"{R100}|columns|0.0025"
HEADS = dataclasses.replace(  # what could close the gap to full tuning on regression and tagging
    ENCODER,
    tasks=("movie_score", "capitals", "movie", "nyt"),
    probes={"all": ProbeRun(((1e-4, False), (2e-3, True)), (50, 100, 200), scope="all")},
    methods={
        "columns first": Method(COLUMNS),
        "columns first, head 1e-3": Method(COLUMNS, head_rate=1e-3),
        "columns first, head 4e-3": Method(COLUMNS, head_rate=4e-3),
        "both first": Method(f"{R100}|both|0.0025"),
        "both first, words": Method(f"{R100}|both words|0.0025"),
        "columns first, words": Method(f"{R100}|columns words|0.0025"),
        "columns first, biases": Method(COLUMNS, small=True),
        "200 steps, columns first": Method("all 1 200|columns|0.0025"),
        "200 steps, fixed, columns first": Method("all 0 200|columns|0.0025"),
        "rows first": Method(f"{R100}|rows|0.0025"),
        "full": Method("all", FULL),
        "full, head 1e-3": Method("all", FULL, head_rate=1e-3),
        "both first, 1%": Method(f"{R100}|both|0.01"),
        "columns first, 1%": Method(f"{R100}|columns|0.01"),
    },
    statistics=False,
    main="all 0 50",
)
COVER = dataclasses.replace(  # the spread that the phase before found best, on all tasks and fresh seeds
    ENCODER,
    probes={"all": ProbeRun(((1e-4, False), (2e-3, True)), (50, 100, 200), scope="all")},
    methods={
        "both first, relative": Method(f"{R100}|both|0.0025"),
        "both first": Method("all 0 100|both|0.0025"),
        "LoRA 4": Method(lora=4, rates=LORA),
        "full": Method("all", FULL),
        "random, both first": Method("random|both|0.0025"),
        "both first, 200 steps": Method("all 0 200|both|0.0025"),
        "both first, 200 steps, relative": Method("all 1 200|both|0.0025"),
        "LoRA 4, equal cost": Method(lora=4, rates=LORA, more_steps=100),
        "full, equal cost": Method("all", FULL, more_steps=100),
        "both first, 1%": Method("all 0 100|both|0.01"),
    },
    statistics=False,
    main="all 0 50",
)
IMAGE = Phase(
    "image",
    ("digits",),
    16,
    {"all": ProbeRun(((1e-4, False), (2e-3, True)), (50, 100), scope="all")},
    {
        "weights 0.25%": Method(even("all 0 100")),
        "weights 1%": Method(even("all 0 100", 0.01)),
        "LoRA 1": Method(lora=1, rates=LORA),
        "LoRA 4": Method(lora=4, rates=LORA),
        "full": Method("all", FULL),
        "full, from random weights": Method("all", (2e-4, 4e-4, 8e-4, 1.6e-3), untrained=True),
        "random 0.25%": Method(even("random")),
        "random 1%": Method(even("random", 0.01)),
        "LoRA 1, equal cost": Method(lora=1, rates=LORA, more_steps=100),
        "LoRA 4, equal cost": Method(lora=4, rates=LORA, more_steps=100),
        "full, equal cost": Method("all", FULL, more_steps=100),
        "weights 0.25%, columns first": Method("all 0 100|columns|0.0025"),
        "weights 1%, columns first": Method("all 0 100|columns|0.01"),
        "weights 0.25%, relative": Method(even("all 1 100")),
        "weights 0.25%, 50 steps": Method(even("all 0 50")),
        "columns 1%, diverse movement": Method("diverse movement|column|0.0104", COLUMN),
        "columns 1%, random": Method("random|column|0.0104", COLUMN),
        "LoRA 5, A from movement and fixed": Method(lora=5, rates=LORA, start_a="all 0 100", fixed_a=True),
        "LoRA 3": Method(lora=3, rates=LORA),
    },
    statistics=True,
    max_replicas=40,
    head_epochs=7,  # as many steps as the encoder's
    main="all 0 100",
)

# ---- every way to train side by side


def halves(*exponents: int) -> tuple[float, ...]:
    """Rates on the grid of half decades: -6 is 10 ** -3."""
    return tuple(float(f"{10 ** (n / 2):.3g}") for n in exponents)


PROBE_100 = "all 0 100"
LOW, MIDDLE, HIGH, HIGHEST = (
    halves(-9, -8, -7, -6),
    halves(-7, -6, -5, -4),
    halves(-6, -5, -4, -3),
    halves(-5, -4, -3, -2),
)
ADAPTER = MIDDLE


def sized(sizes: dict[str, float], directions: dict[str, int], main: str) -> dict[str, Method]:
    """The ways to train whose size can be chosen.

    Args:
        sizes: by its name as a share of the whole model ("0.12%"), the share of the linear maps' weights.
        directions: by that name, how many directions of each linear map's input are as many numbers.
        main: the size of those that are tried at one size alone.
    """
    small, usual, middle, large = sizes
    high = {small: HIGHEST, usual: HIGHEST, middle: HIGH, large: HIGH}
    methods: dict[str, Method] = {}
    for size in (usual, middle, small, large):
        share = sizes[size]
        methods |= {
            f"weights {size}": Method(even(PROBE_100, share), high[size]),
            f"random {size}": Method(even("random", share), high[size]),
        }
        if size != small:  # where neurons and blocks are more than weights
            methods |= {
                f"NeuroAda {size}": Method(f"magnitude|rows|{share}", high[size]),
                f"SMT {size}": Method(f"warm 0 100 sum|best tile64|{share}", HIGH),
            }
    for size in (middle, large):
        methods |= {
            f"columns {size}": Method(f"diverse movement|column|{sizes[size]}", ADAPTER),
            f"directions {size}": Method(lora=directions[size], rates=ADAPTER, start_a=PROBE_100, fixed_a=True),
        }
    return methods | {
        f"SHiRA-WM {main}": Method(even("magnitude", sizes[main]), high[main]),
        f"SHiRA-Grad {main}": Method(even("still 0 16 sum", sizes[main]), high[main]),
        f"SHiRA-SNIP {main}": Method(even("still 0 16 snip", sizes[main]), high[main]),
        f"Spectrum {large}": Method(f"spectrum|fit|{sizes[large]}", MIDDLE),
    }


WITHOUT_SIZE = {
    "full": Method("all", LOW),
    "LoRA 1": Method(lora=1, rates=ADAPTER),
    "LoRA 4": Method(lora=4, rates=ADAPTER),
    "LoRA 8": Method(lora=8, rates=ADAPTER),
    "LoRA 32": Method(lora=32, rates=ADAPTER),
    "KappaTune LoRA 16": Method(lora=16, rates=ADAPTER, maps=0.2),
    "Spectrum 25%": Method("spectrum|kinds|0.25", halves(-8, -7, -6, -5)),
    "top layer": Method("top|layer|1", halves(-8, -7, -6, -5)),
    "biases, norms": Method("none|even|0", HIGH, small=True),
}


def longer(methods: dict[str, Method], *names: str) -> dict[str, Method]:
    """At equal total cost: as many training steps more as the probe of the chosen weights takes."""
    return {f"{name}, equal cost": dataclasses.replace(methods[name], more_steps=100) for name in names}


def proof(
    sizes: dict[str, float], directions: dict[str, int], rank: int, main: str, without: tuple[str, ...] = ()
) -> dict[str, Method]:
    """All ways to train; what the claims rest on comes first.

    Args:
        main: the size of weights that LoRA of that rank is compared with.
        without: methods that are left out.
    """
    methods = sized(sizes, directions, main) | WITHOUT_SIZE
    lora = f"LoRA {rank}"
    methods |= longer(methods, lora, "full", f"random {main}", "LoRA 1")
    first = [
        f"weights {main}",
        lora,
        "full",
        f"random {main}",
        f"{lora}, equal cost",
        "full, equal cost",
        f"NeuroAda {main}",
    ]
    first += [
        "LoRA 1",
        "LoRA 32",
        *(f"weights {size}" for size in sizes),
        f"SMT {main}",
        "columns 0.5%",
        "directions 0.5%",
    ]
    first += [*WITHOUT_SIZE, *(f"SHiRA-{mask} {main}" for mask in ("WM", "Grad", "SNIP")), "LoRA 1, equal cost"]
    return {name: methods[name] for name in dict.fromkeys((*first, *methods)) if name not in without}


SIDE_BY_SIDE = {
    "all": ProbeRun(((1e-4, False),), (100,), scope="all"),
    "warm": ProbeRun(((1e-4, False),), (100,), how="adam", scope="all"),
    "still": ProbeRun(((0.0, False),), (16,), dropout=0.0),
}
# Shares of the 10.6M weights of MiniLM's linear maps that are 0.05%, … of its 22.7M; 0.25% is what the phases before had.
ENCODER_SIZES = {"0.05%": 0.00107, "0.12%": 0.0025, "0.5%": 0.0107, "2%": 0.0428}
PROOF = dataclasses.replace(
    ENCODER,
    probes=SIDE_BY_SIDE,
    methods=proof(ENCODER_SIZES, {"0.5%": 5, "2%": 22}, 4, "0.12%"),
    main=PROBE_100,
    scouts=2,
    widen=HALF_DECADE,
)
DECODER_SIZES = {"0.05%": 0.00063, "0.12%": 0.00152, "0.5%": 0.00633, "2%": 0.0253}  # 106M weights, 134.5M in all
PROOF_DECODER = dataclasses.replace(
    DECODER,
    probes=SIDE_BY_SIDE,
    methods=proof(
        DECODER_SIZES,
        {"0.5%": 4, "2%": 17},
        8,
        "0.5%",
        without=(
            "random 0.05%",
            "NeuroAda 2%",
            "SMT 2%",
            "columns 2%",
            "Spectrum 2%",
        ),  # a training costs three times the encoder's
    ),
    statistics=True,
    main=PROBE_100,
    scouts=2,
    widen=HALF_DECADE,
)
FEW = ("weights 0.12%", "LoRA 4", "full", "random 0.12%", "biases, norms")
SMALL_DATA = dataclasses.replace(
    PROOF,
    tasks=(
        *(f"{task}, 200 examples" for task in ENCODER.tasks),
        *(f"{task}, 10000 examples" for task in ("movie", "movie_score", "capitals")),
    ),
    probes={"all": SIDE_BY_SIDE["all"]},
    methods={
        name: PROOF.methods[name]
        for name in (*FEW, "LoRA 4, equal cost", "full, equal cost", "weights 0.5%", "weights 2%")
    },
    statistics=False,
)
NOISE = dataclasses.replace(
    SMALL_DATA,
    tasks=tuple(f"{task}, {share}% flipped" for share in (30, 10) for task in ("movie", "amazon", "nyt", "bbc")),
    methods={name: PROOF.methods[name] for name in FEW},
)
DEPTHS = (5, 4, 3, 2, 1)
DEPTH = dataclasses.replace(
    SMALL_DATA,
    tasks=ENCODER.tasks,
    methods={"weights 0.12%": PROOF.methods["weights 0.12%"]}
    | {
        f"weights 0.12%, top {top} of 6 layers": Method(f"{PROBE_100}|above {6 - top}|0.0025", HIGHEST)
        for top in DEPTHS
    },
)
PHASES = {
    "depth": DEPTH,
    "image": IMAGE,
    "confirm": CONFIRM,
    "explore": EXPLORE,
    "encoder": ENCODER,
    "decoder": DECODER,
    "heads": HEADS,
    "cover": COVER,
    "proof": PROOF,
    "proof_decoder": PROOF_DECODER,
    "small_data": SMALL_DATA,
    "noise": NOISE,
}


def batches(task: dict[str, np.ndarray], seed: int, steps: int, batch: int, purpose: int) -> Tensor:
    """(steps, batch) training rows: one epoch after the other in a new random order; ``purpose`` keeps head, probe, training apart."""
    rows = study_data.split(task, seed)["train"]
    draw = np.random.default_rng([seed, purpose])
    epochs = -(-steps * batch // len(rows))
    order = np.concatenate([draw.permutation(rows) for _ in range(epochs)])
    return torch.from_numpy(order[: steps * batch].reshape(steps, batch))


class Worker:
    """What one process keeps: the base model and the tasks on its GPU."""

    def __init__(self, phase: Phase, options: argparse.Namespace, device: str):
        self.phase, self.seeds, self.first_seed = phase, options.seeds, options.first_seed
        self.scratch, self.chosen_rates = Path(options.scratch), options.chosen_rates
        epochs_scale = options.scale
        self.device = torch.device(device)
        torch.backends.cuda.matmul.allow_tf32 = True
        weights = study_data.load_model(phase.kind)
        if epochs_scale < 1:  # one layer of the model will do
            weights = {name: w for name, w in weights.items() if not re.search(r"layers?\.[1-9]", name)}
        if phase.kind in HEADS_OF:
            self.base = st.Base(weights, phase.kind, self.device, heads=HEADS_OF[phase.kind])
        else:
            self.base = st.Base(weights, "decoder", self.device, heads=9, kv_heads=3, eps=9.999999747378752e-06)
        tasks = study_data.load_tasks(phase.kind)
        self.tasks = {name: study_data.variant(tasks, name) for name in phase.tasks}
        self.data = {name: st.Data(task, self.device) for name, task in self.tasks.items()}
        self.plain_task = tasks.get(study_data.PLAIN)  # images have none
        self.plain = None if self.plain_task is None else st.Data(self.plain_task, self.device)
        self.dropout = 0.1 if phase.kind == "encoder" else 0.0
        whole = tasks[phase.tasks[0].partition(", ")[0]]
        self.train_examples = int(whole.get("n_train", study_data.TRAIN))
        self.head_steps = max(2, int(phase.head_epochs * self.train_examples / st.BATCH * epochs_scale))
        self.scale = epochs_scale
        if epochs_scale < 1:
            for data in self.data.values():
                data.ids = data.ids[:, :16] if phase.kind == "encoder" else data.ids
                data.labels = data.labels[:, :16] if data.kind == "tagging" else data.labels

    def steps(self, task: str) -> int:
        """Of a training: the phase's epochs; on few or many examples at least 100 and at most 600."""
        steps = self.phase.epochs * self.train_examples / st.BATCH
        if task.endswith(" examples"):
            examples = len(study_data.split(self.tasks[task], 0)["train"])
            steps = min(600, max(100, self.phase.epochs * examples / st.BATCH))
        return max(3, int(steps * self.scale))

    def prepare_plain(self) -> None:
        """What the loss on plain text needs, once per study: a head for masked words, and the loss of the untouched model."""
        if self.plain is None or self.plain_task is None:
            return
        if self.phase.kind == "encoder":
            task = self.plain_task
            if self.scale < 1:
                task = {**task, "train_ids": task["train_ids"][:40]}
            self.plain.head = st.head_for_masked_words(self.base, task, 8 if self.scale == 1 else 1)
        replicas = st.Replicas(self.base, self.data[self.phase.tasks[0]], torch.zeros(1, 1, 1, dtype=torch.long), None)
        before = st.evaluate(replicas, self.plain_rows.unsqueeze(0), self.plain)[0]["loss"]
        torch.save(
            {"head": self.plain.head if self.phase.kind == "encoder" else {}, "before": before},
            self.scratch / "plain.pt",
        )
        print(f"loss on plain text before any training: {before:.4f}", flush=True)

    @functools.cached_property
    def plain_before(self) -> float:
        assert self.plain is not None
        kept = torch.load(self.scratch / "plain.pt", map_location=self.device)
        self.plain.head = kept["head"]
        return float(kept["before"])

    @functools.cached_property
    def plain_rows(self) -> Tensor:
        assert self.plain is not None
        return torch.arange(len(self.plain.ids) if self.scale == 1 else 8, device=self.device)

    @functools.cache  # noqa: B019  a worker lives as long as its process
    def by_weights(self, selection: str) -> Tensor:
        source, spread, share = selection.split("|")
        return st.by_weights(self.base, source, spread, float(share))

    @functools.cache  # noqa: B019
    def well_conditioned(self, share: float) -> list[str]:
        return st.well_conditioned(self.base, share) if share < 1 else []

    def orders(self, task: str, seeds: list[int], steps: int, purpose: int, batch: int = st.BATCH) -> Tensor:
        batch = batch if self.scale == 1 else 2
        return torch.stack([batches(self.tasks[task], self.first_seed + seed, steps, batch, purpose) for seed in seeds])

    def rows(self, task: str, seeds: list[int], part: str) -> Tensor:
        rows = np.stack([study_data.split(self.tasks[task], self.first_seed + seed)[part] for seed in seeds])
        if self.scale < 1:
            rows = rows[:, :8]
        return torch.from_numpy(rows).to(self.device)

    # ---- what comes before the trainings: heads, probes, statistics, chosen places

    def heads(self, task: str) -> Tensor | None:
        data = self.data[task]
        if not data.outputs:
            return None
        seeds = list(range(self.seeds))
        generator = torch.Generator().manual_seed(5)
        size = data.outputs * (self.base.hidden + 1)
        start = torch.randn(self.seeds, size, generator=generator) * 0.02
        start[:, data.outputs * self.base.hidden :] = 0
        replicas = st.Replicas(
            self.base, data, self.orders(task, seeds, self.head_steps, 0), start, dropout=self.dropout
        )
        replicas.head_rates.fill_(HEAD_RATE)
        replicas.capture()
        replicas.run(self.head_steps)
        return replicas.head.clone()

    def measure(self, task: str) -> dict[str, Any]:
        """Heads, and by the names that methods use the chosen places, their movement and LoRA's A: (seeds, …)."""
        head = self.heads(task)
        seeds = list(range(self.seeds))
        wanted = {
            m.selection
            for m in self.phase.methods.values()
            if m.selection not in ("", "all") and m.selection.split("|")[0] not in BY_WEIGHTS
        }
        starts_a = {(m.start_a, m.lora) for m in self.phase.methods.values() if m.start_a}
        chosen: dict[str, Tensor] = {}
        movement: dict[str, Tensor] = {}
        factors: dict[str, Tensor] = {}
        seconds: dict[str, float] = {}
        relevance: dict[str, Tensor] = {}
        for name, probe in self.phase.probes.items():
            began = time.perf_counter()
            n = len(probe.settings)
            every = [seed for _ in range(n) for seed in seeds]
            replicas = st.Replicas(
                self.base,
                self.data[task],
                self.orders(task, every, max(probe.stops), 1, probe.batch),
                None if head is None else head.repeat(n, 1),
                scope=probe.scope,
                dropout=self.dropout if probe.dropout is None else probe.dropout,
                train_head=False,
            )
            sizes = torch.tensor([size for size, _ in probe.settings for _ in seeds])
            relative = torch.tensor([is_relative for _, is_relative in probe.settings for _ in seeds])
            run = st.Probe(replicas, sizes, relative, probe.how)
            before = None
            stops = [max(1, int(stop * self.scale)) for stop in probe.stops]
            for stop, _ in zip(probe.stops, run.run(stops), strict=True):
                score = run.score()
                for setting in range(n):
                    mine = slice(setting * self.seeds, (setting + 1) * self.seeds)
                    at = f"{name} {setting} {stop}"
                    self._choose(wanted, chosen, at, score[mine])
                    for key in (key for key in wanted if key.startswith(f"{at}|above ")):
                        whole = torch.stack(
                            [st.choose(self.base, row, float(key.split("|")[2])) for row in score[mine]]
                        )
                        of_whole = score[mine].gather(1, whole.to(self.device)).double().sum(1)
                        of_top = score[mine].gather(1, chosen[key].to(self.device)).double().sum(1)
                        relevance[key] = (of_top / of_whole).cpu()
                    if any(key.startswith(f"{at} s") for key in wanted):
                        n_linear = self.base.size["linear"]
                        sums = run.sums[mine, :n_linear].abs()
                        self._choose(wanted, chosen, f"{at} sum", sums)
                        self._choose(wanted, chosen, f"{at} snip", sums * self.base.flat[:n_linear].abs())
                        noise = run.squares[mine, :n_linear].sqrt() + 1e-12
                        self._choose(wanted, chosen, f"{at} snr", sums / noise)
                        del sums, noise
                    if at == self.phase.main:
                        n_linear = self.base.size["linear"]
                        moved = replicas.values[mine, :n_linear] - self.base.flat[:n_linear]
                        for key in wanted:
                            if key.startswith(f"{at}|even") and any(
                                m.from_movement for m in self.phase.methods.values()
                            ):
                                movement[key] = moved.gather(1, chosen[key].to(self.device)).cpu()
                        del moved
                        if starts_a:
                            assert {source for source, _ in starts_a} == {at}
                            ranks = {rank for _, rank in starts_a}
                            found = [st.right_vectors(self.base, row, ranks) for row in run.votes[mine]]
                            factors |= {f"{at} {r}": torch.stack([one[r] for one in found]).cpu() for r in ranks}
                        if self.phase.statistics:
                            self._statistics(wanted, chosen, task, head, run.votes[mine])
                    if before is not None and setting == 0:
                        self._choose(
                            wanted, chosen, f"{at} late", (run.votes[mine] - before).abs() + score[mine] * 1e-3
                        )
                before = run.votes[: self.seeds].clone() if stop == PROBE_STEPS else None
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            seconds[name] = time.perf_counter() - began
            del replicas, run
        generator = torch.Generator(self.device).manual_seed(23)
        random = torch.rand(self.seeds, self.base.size["linear"], device=self.device, generator=generator)
        self._choose(wanted, chosen, "random", random)
        if "none|even|0" in wanted:
            chosen["none|even|0"] = torch.empty(self.seeds, 0, dtype=torch.long)
        missing = wanted - set(chosen)
        assert not missing, missing
        return {"head": None if head is None else head.cpu(), "chosen": chosen, "movement": movement} | {
            "factors": factors,
            "seconds": seconds,
            "relevance": relevance,
        }

    def _choose(self, wanted: set[str], chosen: dict[str, Tensor], at: str, score: Tensor) -> None:
        for key in wanted:
            source, spread, share_text = key.split("|")
            if source != at:
                continue
            share = float(share_text)
            rows = []
            for row in score:
                if "tile" in spread:
                    best, _, side = spread.partition("tile")
                    rows.append(st.blocks(self.base, row, share, int(side), "global" if best else "even"))
                elif spread == "column":

                    def picked(name: str, k: int, row: Tensor = row) -> Tensor:
                        place, shape = self.base.place[name]
                        return st.top(row[place : place + shape.numel()].view(shape).sum(0), k)

                    rows.append(st.columns(self.base, picked, share))
                else:
                    rows.append(st.choose(self.base, row, share, spread))
            chosen[key] = torch.stack(rows).cpu()

    def _statistics(
        self, wanted: set[str], chosen: dict[str, Tensor], task: str, head: Tensor | None, votes: Tensor
    ) -> None:
        """Columns by the criteria that look at inputs, at the starting point (``votes``: the probe's, for one of them)."""
        batches_read = 16 if self.scale == 1 else 2
        replicas = st.Replicas(
            self.base,
            self.data[task],
            self.orders(task, list(range(self.seeds)), batches_read, 1),
            head,
            scope="linear",
            dropout=0.0,
            train_head=False,
        )
        found = st.statistics(replicas, batches_read)
        for key in wanted:
            source, spread, share = key.split("|")
            if spread != "column" or source not in (
                "fisher",
                "centred",
                "diverse",
                "diverse gradient",
                "diverse movement",
            ):
                continue
            rows = []
            for seed in range(self.seeds):

                def picked(name: str, k: int, seed: int = seed, source: str = source) -> Tensor:
                    mine = found[name]
                    if source in ("fisher", "centred"):
                        return st.top(mine[source][seed], k)
                    covariance = mine["covariance"][seed]
                    place, shape = self.base.place[name]
                    target = {
                        "diverse": lambda: covariance,
                        "diverse gradient": lambda: mine["gradient"][seed],
                        "diverse movement": lambda: votes[seed, place : place + shape.numel()].view(shape) @ covariance,
                    }[source]()
                    return st.eliminated(target, covariance, k)

                rows.append(st.columns(self.base, picked, float(share)))
            chosen[key] = torch.stack(rows).cpu()

    # ---- the trainings

    def train(self, task: str, name: str, earlier: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """All rates and seeds of a method on a task, those of ``earlier`` among them; yields one record per training."""
        method = self.phase.methods[name]
        measured = torch.load(self.scratch / f"{task}.pt", mmap=True)
        records = [{**record, "seed": record["seed"] - self.first_seed} for record in earlier]
        states: dict[tuple[float, int], dict[str, Tensor]] = {}
        every = list(range(self.seeds))
        scouts = every[: self.phase.scouts or self.seeds]
        rates = sorted({record["rate"] for record in records})
        todo = list(method.rates)
        if self.chosen_rates:
            todo, records = [best_rate(records)], []
        elif records:
            edge = on_edge(records)
            todo = [] if edge is None else [self._beyond(edge, rates)]
        for _ in range(3):
            rates += todo
            pairs = [(rate, seed) for rate in todo for seed in (every if self.chosen_rates else scouts)]
            records += self._train_all(task, name, method, measured, pairs, states)
            edge = on_edge(records)
            if edge is None or self.chosen_rates or (self.scale < 1 and len(rates) > len(method.rates)):
                break
            todo = [self._beyond(edge, rates)]
        if not self.chosen_rates:
            chosen = best_rate(records)
            done = {(record["rate"], record["seed"]) for record in records}
            pairs = [(chosen, seed) for seed in every if (chosen, seed) not in done]
            records += self._train_all(task, name, method, measured, pairs, states)
        best = best_rate(records)
        figures: list[dict[str, float]] = []
        forgotten: list[dict[str, float]] = []
        if not any(r["rate"] == best and "test_metric" in r for r in records):
            again = [(best, seed) for seed in every if (best, seed) not in states]  # trained before, without the test
            self._train_all(task, name, method, measured, again, states)
            kept = [states[best, seed] for seed in every]
            replicas = self._replicas(task, method, measured, list(range(self.seeds)), 1)
            if method.grow:  # the places of the second half differ between rates
                replicas.chosen = torch.stack([state["chosen"] for state in kept])
            replicas.load(
                {part: torch.stack([state[part] for state in kept]) for part in ("values", "factors", "head")}
            )
            figures = st.evaluate(replicas, self.rows(task, every, "test"))
            if (self.scratch / "plain.pt").exists():
                before = self.plain_before
                forgotten = st.evaluate(replicas, self.plain_rows.expand(len(every), -1), self.plain)
        for record in records:
            if record["rate"] == best and figures:
                record |= {f"test_{key}": value for key, value in figures[record["seed"]].items()}
                if forgotten:
                    record |= {"plain_before": before, "plain_loss": forgotten[record["seed"]]["loss"]}
            elif record["rate"] != best:  # what an earlier run took for the best
                record = {k: v for k, v in record.items() if not k.startswith(("test_", "plain_"))}
            yield {**record, "seed": self.first_seed + record["seed"]}

    def _beyond(self, edge: float, rates: list[float]) -> float:
        up = edge != min(rates)
        if self.phase.widen == HALF_DECADE:  # records hold rounded rates
            return halves(round(2 * math.log10(edge)) + (1 if up else -1))[0]
        return edge * self.phase.widen if up else edge / self.phase.widen

    def _train_all(self, task: str, name: str, method: Method, measured: dict[str, Any], pairs: list[tuple[float, int]], states: dict[tuple[float, int], dict[str, Tensor]]) -> list[dict[str, Any]]:  # fmt: skip
        batches = -(-len(pairs) // self.phase.max_replicas)
        some = [pairs[i::batches] for i in range(batches)]  # about as many in each
        return [record for few in some for record in self._train(task, name, method, measured, few, states)]

    def _replicas(
        self, task: str, method: Method, measured: dict[str, Any], seeds: list[int], steps: int
    ) -> st.Replicas:
        pick = torch.tensor(seeds)
        head = measured["head"]
        options: dict[str, Any] = {"dropout": self.dropout}
        if method.lora:
            options |= {"lora": method.lora, "fixed_a": method.fixed_a, "maps": self.well_conditioned(method.maps)}
            if method.start_a:
                options["lora_a"] = measured["factors"][f"{method.start_a} {method.lora}"][pick].to(self.device)
        elif method.selection == "all":
            options["scope"] = "all"
        else:
            source = method.selection.split("|")[0]
            if source in BY_WEIGHTS:
                chosen = self.by_weights(method.selection).expand(len(seeds), -1).contiguous()
            else:
                chosen = measured["chosen"][method.selection][pick].to(self.device)
            whole = method.small or source == "top"
            options["scope"] = "layers" if whole else "all" if " words|" in method.selection else "linear"
            if method.small:
                beside = torch.arange(self.base.size["linear"], self.base.size["layers"], device=self.device)
                chosen = torch.cat((chosen, beside.expand(len(seeds), -1)), 1)
            options["chosen"] = chosen
        order = self.orders(task, seeds, steps, 2)
        return st.Replicas(self.base, self.data[task], order, None if head is None else head[pick], **options)

    def _train(
        self,
        task: str,
        name: str,
        method: Method,
        measured: dict[str, Any],
        pairs: list[tuple[float, int]],
        states: dict[tuple[float, int], dict[str, Tensor]],
    ) -> list[dict[str, Any]]:
        began = time.perf_counter()
        seeds = [seed for _, seed in pairs]
        steps = max(3, self.steps(task) + int(method.more_steps * self.scale))
        replicas = self._replicas(task, method, measured, seeds, steps)
        rates = torch.tensor([[rate] for rate, _ in pairs])
        replicas.rates.copy_(rates)
        replicas.head_rates.copy_(rates if method.head_rate is None else torch.full_like(rates, method.head_rate))
        if method.from_movement:
            chosen = replicas.chosen
            assert chosen is not None
            moved = measured["movement"][method.selection][torch.tensor(seeds)].to(self.device)
            replicas.values_start = self.base.flat[chosen] + moved
            replicas.reset()
        if method.untrained:
            each = [self.base.untrained(torch.Generator().manual_seed(self.first_seed + seed)) for seed in seeds]
            replicas.values_start = torch.stack(each)
            replicas.reset()
        if method.grow:
            replicas = self._grown(replicas, method, task, seeds, steps)
        else:
            replicas.capture()
            replicas.run(steps)
        figures = st.evaluate(replicas, self.rows(task, seeds, "validation"))
        state = replicas.state()
        if method.grow:
            assert replicas.chosen is not None
            state["chosen"] = replicas.chosen
        for i, pair in enumerate(pairs):
            states[pair] = {part: tensor[i].clone() for part, tensor in state.items()}
        seconds = (time.perf_counter() - began) / len(pairs)
        kept = measured["relevance"].get(method.selection)  # of all relevance, by the layers above a cut-off
        return [
            {"task": task, "method": name, "rate": rate, "seed": seed, "steps": steps, "trained": replicas.trained}
            | {f"validation_{key}": value for key, value in figure.items()}
            | {"seconds": round(seconds, 3)}
            | ({"relevance_kept": 1.0 if kept is None else float(kept[seed])} if measured["relevance"] else {})
            for (rate, seed), figure in zip(pairs, figures, strict=True)
        ]

    def _grown(self, replicas: st.Replicas, method: Method, task: str, seeds: list[int], steps: int) -> st.Replicas:
        """The chosen weights are trained for a third; a probe from there chooses as many others, and all are trained on."""
        kept = replicas.chosen
        assert kept is not None
        first_third, third = self._third(replicas, kept, steps)
        more = max(1, int(self.scale * PROBE_STEPS / 2))
        probing = st.Replicas(
            self.base,
            self.data[task],
            self.orders(task, seeds, more, 3),
            first_third["head"],
            scope="linear",
            dropout=self.dropout,
            train_head=False,
        )
        point = first_third["values"]

        def start() -> None:
            probe.clear()
            probing.values.copy_(point)

        probe = st.Probe(probing, torch.full((len(seeds),), 1e-4), torch.zeros(len(seeds), dtype=torch.bool))
        probing.capture(probe.step, start)
        start()
        probing.run(more, probe.step)
        score = probe.score().scatter_(1, kept, -1.0)
        share = float(method.selection.split("|")[2])
        new = torch.stack([st.choose(self.base, row, share) for row in score])
        both = torch.cat((kept, new), 1)
        last = st.Replicas(self.base, self.data[task], replicas.order, first_third["head"], scope="linear", chosen=both)
        last.dropout = self.dropout
        last.rates.copy_(replicas.rates)
        last.head_rates.copy_(replicas.head_rates)

        def resume() -> None:
            last.reset()
            last.values.copy_(point)
            last.t.fill_(third)
            for group, state in zip(last.groups, first_third["groups"], strict=True):
                for part in ("m", "v"):
                    group[part][:, : state[part].shape[1]].copy_(state[part])

        last.capture(then=resume)
        resume()
        last.run(steps - third)
        return last

    def _third(self, like: st.Replicas, chosen: Tensor, steps: int) -> tuple[dict[str, Any], int]:
        first = st.Replicas(
            self.base, like.data, like.order, like.head_start, scope="linear", chosen=chosen, dropout=self.dropout
        )
        first.rates.copy_(like.rates)
        first.head_rates.copy_(like.head_rates)
        first.capture()
        first.run(steps // 3)
        groups = [{part: group[part].clone() for part in ("m", "v")} for group in first.groups]
        return {"values": first.values.clone(), "head": first.head.clone(), "groups": groups}, steps // 3


def best_rate(records: list[dict[str, Any]]) -> float:
    """The rate with the best mean over the seeds that all rates were tried with: by the loss for a decoder, else by the metric."""
    rates = sorted({r["rate"] for r in records})
    common = set.intersection(*({r["seed"] for r in records if r["rate"] == rate} for rate in rates))
    records = [r for r in records if r["seed"] in common]

    def figure(rate: float) -> tuple[float, float]:
        mine = [r for r in records if r["rate"] == rate]
        loss = -stats.mean(r["validation_loss"] if np.isfinite(r["validation_loss"]) else 1e9 for r in mine)
        metric = stats.mean(r["validation_metric"] if np.isfinite(r["validation_metric"]) else -1e9 for r in mine)
        return (loss, metric) if mine[0]["task"] in DECODER.tasks else (metric, loss)

    return max(rates, key=figure)


def on_edge(records: list[dict[str, Any]]) -> float | None:
    """The best rate, where it is the lowest or the highest of those tried."""
    rates = {record["rate"] for record in records}
    best = best_rate(records)
    return best if best in (min(rates), max(rates)) else None


# ---- jobs over GPUs


def work(number: int, options: argparse.Namespace, jobs: Any, answers: Any) -> None:
    try:
        gpus = torch.cuda.device_count()
        device = f"cuda:{number % gpus}" if gpus else "cpu"
        if gpus:
            torch.cuda.set_device(device)
        torch.set_num_threads(2)
        earlier = kept_before(options)
        worker = Worker(PHASES[options.phase], options, device)
        answers.put(("ready", number, None, 0.0))
        while (job := jobs.get()) is not None:
            began = time.perf_counter()
            kind, task, method = job
            try:
                if kind == "plain":
                    if not (worker.scratch / "plain.pt").exists():
                        worker.prepare_plain()
                elif kind == "measure":
                    path = worker.scratch / f"{task}.pt"
                    if not path.exists():
                        torch.save(worker.measure(task), path)
                else:
                    lines = "".join(
                        json.dumps(record) + "\n"
                        for record in worker.train(task, method, earlier.get((task, method), []))
                    )
                    with open(Path(options.output_dir) / f"{options.phase}.jsonl", "a", encoding="utf-8") as log:
                        log.write(lines)
            except Exception:
                traceback.print_exc()
                print(f"FAILED: {job}", flush=True)
            if gpus:
                torch.cuda.empty_cache()
            answers.put(("done", number, job, time.perf_counter() - began))
    except Exception:
        traceback.print_exc()
        answers.put(("dead", number, None, 0.0))


def kept_before(options: argparse.Namespace) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """By task and method, what benchmarks/results holds of the phase, where --go_on or --chosen_rates asks for it."""
    from selection_tables import RESULTS, read

    pairs: dict[tuple[str, str], list[dict[str, Any]]] = {}
    there = (RESULTS / f"selection_{options.phase}.json").exists()
    for record in read(options.phase) if there and (options.go_on or options.chosen_rates) else []:
        numbers = {name: float("nan") if value is None else value for name, value in record.items()}
        pairs.setdefault((record["task"], record["method"]), []).append(numbers)
    return pairs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--phase", choices=PHASES, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--first_seed", type=int, default=0, help="of the confirmation: seeds that no exploration has seen"
    )
    parser.add_argument("--minutes", type=float, default=8.5, help="no job starts that would end later")
    parser.add_argument("--workers", type=int, default=0, help="processes per GPU; the phase's own number by default")
    parser.add_argument("--tasks", nargs="*", default=[])
    parser.add_argument("--methods", nargs="*", default=[], help="names of methods, or parts of them; all by default")
    parser.add_argument(
        "--go_on",
        action="store_true",
        help="run what benchmarks/results lacks, and widen where the best rate is on an edge",
    )
    parser.add_argument(
        "--chosen_rates",
        action="store_true",
        help="new seeds (--first_seed) at the rates that benchmarks/results chose, each method on each task",
    )
    parser.add_argument("--scale", type=float, default=1.0, help="below 1: shorter trainings, to try the program")
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--scratch", default="", help="heads and chosen places; in the output directory by default")
    options = parser.parse_args()
    began = time.monotonic()
    options.scratch = options.scratch or str(Path(options.output_dir) / "measured")
    Path(options.scratch).mkdir(parents=True, exist_ok=True)
    phase = PHASES[options.phase]
    tasks = [task for task in phase.tasks if not options.tasks or task in options.tasks]
    methods = [
        name
        for name in phase.methods
        if not options.methods
        or any(part == name or (part not in phase.methods and part in name) for part in options.methods)
    ]
    earlier = kept_before(options)
    trainings = [
        ("train", t, m)
        for m in methods
        for t in tasks
        if ((t, m) in earlier if options.chosen_rates else (t, m) not in earlier or on_edge(earlier[t, m]) is not None)
    ]
    if not trainings:
        print("nothing is left to train")
        return
    n_workers = max(1, torch.cuda.device_count()) * (options.workers or phase.workers)
    context = mp.get_context("spawn")
    answers = context.Queue()
    queues = [context.Queue() for _ in range(n_workers)]
    processes = [
        context.Process(target=work, args=(i, options, queues[i], answers), daemon=True) for i in range(n_workers)
    ]
    for process in processes:
        process.start()
    waiting = [("measure", task, "") for task in tasks if any(t == task for _, t, _ in trainings)] + trainings
    waiting = [("plain", "", ""), *waiting]
    measured: set[str] = set()
    took: list[float] = []
    idle: list[int] = []
    running = 0
    alive = n_workers
    done = left_out = 0
    end = began + 60 * options.minutes
    while alive and (waiting or running):
        try:
            kind, number, job, seconds = answers.get(timeout=5)
        except queue.Empty:
            if time.monotonic() > end + 40:
                print(f"{running} jobs did not end in time", flush=True)
                break
            continue
        if kind == "dead":
            alive -= 1
            continue
        if kind == "done":
            running -= 1
            done += 1
            if job[0] != "train":
                measured.add(job[1])
            else:
                took.append(seconds)
            print(f"{time.monotonic() - began:6.1f} s {' '.join(job)} took {seconds:.1f} s", flush=True)
        idle.append(number)
        expected = stats.mean(took[-20:]) * 1.3 if took else 0
        if time.monotonic() + expected > end:
            left_out += len(waiting)
            waiting = []
        for worker in list(idle):
            ready = next((j for j in waiting if j[0] != "train" or {"", j[1]} <= measured), None)
            if ready is not None:
                waiting.remove(ready)
                idle.remove(worker)
                queues[worker].put(ready)
                running += 1
    for inbox in queues:
        inbox.put(None)
    from selection_tables import methods_table

    log = Path(options.output_dir) / f"{options.phase}.jsonl"
    kept = log.read_text(encoding="utf-8").splitlines() if log.exists() else []  # none ended in time
    print(methods_table([json.loads(line) for line in kept], ()) if kept else "no training ended")
    print(f"{done} jobs in {time.monotonic() - began:.0f} s; {left_out} were left out")
    for process in processes:
        process.join(timeout=1)


if __name__ == "__main__":
    main()
