"""Start a script in two gloo processes."""

from __future__ import annotations

import os
import subprocess
import sys


def torchrun(*words: object) -> subprocess.CompletedProcess:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    environment["TQDM_MININTERVAL"] = "1000"  # a bar writes its end once, however slow the machine is
    return subprocess.run([*launcher, *map(str, words)], env=environment, capture_output=True, text=True, timeout=300)
