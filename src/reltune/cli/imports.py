"""Imports of a command that only counts: without what is installed beside and never called on the meta device."""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Iterator

# torch, transformers and peft import these wherever they are installed: kernels, quantised weights, chats, the loss of object detection.
UNCALLED = ("bitsandbytes", "jinja2", "scipy", "sklearn", "torchao", "triton")


@contextlib.contextmanager
def for_a_count() -> Iterator[None]:
    """Import inside, in a process that has loaded no torch yet and ends with the command: ``UNCALLED`` cannot be imported any more.

    What is imported stays, so that the garbage collector need not go through it again and again.
    """
    if "torch" in sys.modules:  # the process has other things to do
        yield
        return
    for name in UNCALLED:
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
