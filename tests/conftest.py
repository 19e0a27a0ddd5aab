"""Settings that the libraries read when they are first imported: offline, quiet, on two threads.

As environment variables they hold for subprocesses too, and nothing heavy is imported here.
"""

import os
from collections.abc import Iterator

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
if not os.path.exists("/dev/nvidiactl"):  # no GPU: Triton's kernels run in its interpreter
    os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "2")  # torch's number of threads


@pytest.fixture
def one_thread() -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
