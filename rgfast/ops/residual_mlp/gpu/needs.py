"""What the Triton block needs of a machine."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import shutil
from importlib.metadata import PackageNotFoundError, version

import torch

from rgfast.runtime.tracing import constant_when_traced

__all__ = ["LEAST_TRITON", "capability", "dtype_of", "missing", "too_old"]

# The oldest that compiles every kernel here, and what torch 2.8 brings.
LEAST_TRITON = (3, 4)
_LEAST_CAPABILITY = (8, 0)


def dtype_of(products: str) -> torch.dtype:
    """The type in which the library multiplies for these products."""
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(products, torch.float32)


@functools.cache
def missing() -> str | None:
    """Why no kernel can be compiled in this process, or None. Triton itself is not imported."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not importable"
    try:
        found = version("triton")
    except PackageNotFoundError:
        return "Triton's version is not known"
    numbers = re.match(r"(\d+)\.(\d+)", found)
    if numbers is None or (int(numbers[1]), int(numbers[2])) < LEAST_TRITON:
        return f"Triton {found} is older than {'.'.join(map(str, LEAST_TRITON))}"
    if torch.version.hip is not None:
        return "it is for NVIDIA GPUs, and this PyTorch is for AMD's"
    compiler = os.environ.get("CC")
    if shutil.which(compiler) is None if compiler else not (shutil.which("gcc") or shutil.which("clang")):
        wanted = f"CC={compiler} is not one" if compiler else "neither gcc nor clang is there"
        return f"Triton builds its launchers with a C compiler, and {wanted}"
    return None


@constant_when_traced
def capability(device: torch.device) -> tuple[int, int]:
    """The compute capability of a GPU, (0, 0) if torch finds none: a fake tensor may be on one."""
    return torch.cuda.get_device_capability(device) if torch.cuda.is_available() else (0, 0)


def too_old(device: torch.device) -> str | None:
    """Why a device has no tensor cores for these products, or None."""
    if device.type != "cuda":
        return f"it is for NVIDIA GPUs, and this is {device.type}"
    major, minor = capability(device)
    if major == 0:
        return "torch finds no GPU"
    if (major, minor) < _LEAST_CAPABILITY:
        return f"it is for compute capability 8.0 and later, and this GPU has {major}.{minor}"
    return None
