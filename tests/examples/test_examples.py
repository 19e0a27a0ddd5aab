"""The examples run as a user runs them: as scripts, in a directory of their own."""

import re
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_layer_11(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, EXAMPLES / "layer_11.py"], cwd=tmp_path, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    accuracy = re.search(r"test accuracy ([\d.]+)%", done.stdout)
    # Five topics; a model that learned nothing is near 20%.
    assert accuracy and float(accuracy[1]) > 85, done.stdout
    assert re.search(r"trainable params: 1,776,389", done.stdout), done.stdout  # one layer and the head, nothing else
    assert (tmp_path / "layer_11-adapter" / "adapter_model.safetensors").is_file()
