"""Settings that the libraries read when they are first imported: offline, quiet, on one thread.

As environment variables they hold for subprocesses too, and nothing heavy is imported here.
"""

import gc
import os
import signal

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
if not os.path.exists("/dev/nvidiactl"):  # no GPU: Triton's kernels run in its interpreter
    os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of torch: models this small only lose time to a second one

signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in a shell's background is started without it


os.fsync = lambda descriptor: None  # tests kill processes and cut no power; subprocesses wait for the disk as always


def pytest_collection_finish() -> None:
    """What was imported stays: every later look for garbage, of which a training asks for some, need not go through it."""
    gc.collect()
    gc.freeze()
