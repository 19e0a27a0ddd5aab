"""Kernels written in CUDA C++: compiled for the device at hand, when they are first used, by the compiler that PyTorch brings.

Triton has no way to read single vectors from shared memory by an index, which is what such a kernel is for.
"""

from __future__ import annotations

import ctypes
import functools
from importlib import resources
from typing import Any

import torch
from torch.cuda import _utils


@functools.lru_cache
def compiled(file: str, names: tuple[str, ...], device: int, options: tuple[str, ...] = ()) -> dict[str, Any] | None:
    """The kernels of these names in a file of this folder, to be called as ``kernel(grid, block, args, shared_mem)``.

    None where there is no compiler, as in an installation without PyTorch's CUDA libraries.
    """
    try:
        source = resources.files(__package__).joinpath(file).read_text(encoding="utf-8")
        with torch.cuda.device(device):
            return _utils._cuda_load_module(_binary(source, device, options), list(names))  # type: ignore[return-value]
    except (OSError, AttributeError, RuntimeError, AssertionError):
        return None


def _binary(source: str, device: int, options: tuple[str, ...]) -> bytes:
    """Machine code of the source, which includes no header: those come with a CUDA toolkit only."""
    compiler = _utils._get_nvrtc_library()
    major, minor = torch.cuda.get_device_capability(device)
    given = [option.encode() for option in (f"--gpu-architecture=sm_{major}{minor}", *options)]
    program, size = ctypes.c_void_p(), ctypes.c_size_t()

    def check(result: int) -> None:
        if result:
            compiler.nvrtcGetProgramLogSize(program, ctypes.byref(size))
            log = ctypes.create_string_buffer(size.value)
            compiler.nvrtcGetProgramLog(program, log)
            raise RuntimeError(f"a CUDA kernel was not compiled: {log.value.decode()}")

    check(compiler.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernel.cu", 0, None, None))
    check(compiler.nvrtcCompileProgram(program, len(given), (ctypes.c_char_p * len(given))(*given)))
    check(compiler.nvrtcGetCUBINSize(program, ctypes.byref(size)))
    binary = ctypes.create_string_buffer(size.value)
    check(compiler.nvrtcGetCUBIN(program, binary))
    compiler.nvrtcDestroyProgram(ctypes.byref(program))
    return binary.raw
