"""Compiles the float8 kernels of columns for a GPU that need not be there, and prints what shared memory each takes.

    python tests/shared_memory_worker.py '[[90, 232448, "bf16", "fp32", "bf16", 32], …]'

Each case has the compute capability, the bytes that a block may have there, the types of g, values and own, and the columns. Printed are the
bytes that the two kernels take. In a process of its own, since Triton's interpreter, in which the tests run, compiles nothing.
"""

import json
import os
import sys
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)
os.environ["DISABLE_LLVM_OPT"] = "1"  # memory is laid out before

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.compiler import ASTSource

from reltune.ops.kernels import float8 as kernels

BYTES = {"bf16": 2, "fp32": 4}


def nothing(backend: Any, source: Any, metadata: dict[str, Any], *_: Any) -> bytes:
    """In the place of what makes a program of the laid out kernel, which takes most of the time."""
    metadata["name"] = "kernel"
    return b""


CUDABackend.make_ptx = lambda *given: nothing(*given).decode()
CUDABackend.make_cubin = nothing


def shared(
    kernel: Any, pointers: dict[str, str], numbers: str, blocks: tuple[int, ...], columns: int, capability: int
) -> int:
    of_tokens, of_outputs, warps, stages = blocks
    constants = {"T": of_tokens, "OUT": of_outputs, "C": kernels._padded(columns)}
    pointed = {name: f"*{kind}" for name, kind in pointers.items()}
    signature = {**pointed, **dict.fromkeys(numbers.split(), "i32"), **dict.fromkeys(constants, "constexpr")}
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(len(signature) - len(constants))}
    compiled = triton.compile(
        ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": warps, "num_stages": stages},
    )
    return int(compiled.metadata.shared)


def main() -> None:
    found = []
    for capability, most, g, values, own, columns in json.loads(sys.argv[1]):
        both = {"values": values, "own": own}
        blocks = kernels.change_blocks(columns, BYTES[g], BYTES[values] + BYTES[own], most)
        changed = shared(
            kernels.change_kernel,
            {"g": g, **both, "dx": g, "idx": "i64"},
            "tokens out_features in_features columns",
            blocks,
            columns,
            capability,
        )
        added = shared(
            kernels.add_kernel,
            {"y": g, "selected": g, **both},
            "tokens out_features columns",
            kernels.ADDED,
            columns,
            capability,
        )
        found.append([changed, added])
    print(json.dumps(found))


main()
