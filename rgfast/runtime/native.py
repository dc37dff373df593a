"""The compiled CPU module: loading it once, saying why when it cannot be had, and what is passed to it.

Environment: ``RGFAST_ISA=baseline|neon|avx2|avx512`` forces the instruction set that kernels use; a value
that this machine cannot run is a ValueError, never a silent fallback.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType

import torch
from torch import Tensor

from rgfast.dispatch import ImplUnavailable

__all__ = [
    "NativeTensor",
    "active_isa",
    "address",
    "available_isas",
    "compiled_isas",
    "load",
    "tensor",
    "threads",
    "unavailable_reason",
    "use_isa",
]

NativeTensor = tuple[int, Sequence[int], Sequence[int], int]

# The codes of csrc/include/rgfast/view.hpp.
_CODES = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}


@functools.cache
def _attempt() -> tuple[ModuleType | None, str | None]:
    try:
        module = importlib.import_module("rgfast._native")
    except ImportError as error:
        return None, f"the native module is not importable ({error})"
    module.active_isa()  # a bad RGFAST_ISA is an error of the user's, told here and not at some later call
    return module, None


def load() -> ModuleType:
    """The compiled module.

    Raises :class:`ImplUnavailable` where it is not built or does not load, ValueError where ``RGFAST_ISA``
    names an instruction set that cannot run here.
    """
    module, reason = _attempt()
    if module is None:
        raise ImplUnavailable(str(reason))
    return module


def unavailable_reason() -> str | None:
    """None where the compiled module loads, else the reason in words."""
    return _attempt()[1]


def active_isa() -> str | None:
    """The instruction set that compiled kernels use in this process (``RGFAST_ISA`` forces one)."""
    module, _ = _attempt()
    return None if module is None else str(module.active_isa())


def compiled_isas() -> tuple[str, ...]:
    """Instruction sets that the kernels were compiled for, least first; empty without the module."""
    module, _ = _attempt()
    return () if module is None else tuple(module.compiled_isas())


def available_isas() -> tuple[str, ...]:
    """Those of :func:`compiled_isas` that this machine can run, least first."""
    module, _ = _attempt()
    return () if module is None else tuple(module.available_isas())


@contextmanager
def use_isa(name: str) -> Iterator[None]:
    """Run the kernels on ``name`` inside the ``with`` block, in the whole process.

    Raises ValueError for a set that cannot run here, :class:`ImplUnavailable` without the module.
    """
    module = load()
    before = module.forced_isa()
    module.set_isa(name)
    try:
        yield
    finally:
        module.set_isa(before)


def tensor(x: Tensor) -> NativeTensor:
    """``x`` as kernels take it: address, sizes, element strides and dtype code.

    Nothing is copied, and nothing keeps ``x`` alive: hold it until the call returns.
    """
    code = _CODES.get(x.dtype)
    if code is None or not x.is_cpu:
        raise TypeError(
            f"a kernel takes float64, float32, bfloat16 and float16 on the CPU, got {_described(x)}"
        )
    return x.data_ptr(), x.shape, x.stride(), code


def address(x: Tensor | None, dtype: torch.dtype, count: int, name: str) -> int:
    """The address of ``x``, whose memory a kernel takes for ``count`` contiguous numbers; 0 if it is None.

    Raises TypeError unless that is what lies there: a kernel given an address cannot see it.
    """
    if x is None:
        return 0
    if x.dtype != dtype or not x.is_cpu or x.numel() != count or not x.is_contiguous():
        kind = str(dtype).removeprefix("torch.")
        raise TypeError(f"{name} must be {count} contiguous {kind} numbers on the CPU, got {_described(x)}")
    return x.data_ptr()


def _described(x: Tensor) -> str:
    layout = "" if x.is_contiguous() else ", not contiguous"
    return f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)} on {x.device}{layout}"


def threads() -> int:
    """How many threads a kernel may use: PyTorch's own setting."""
    return torch.get_num_threads()
