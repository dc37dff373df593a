"""The block on the products of MKL, which PyTorch brings and exports, handed to the compiled module.

Nothing is linked and no second copy loaded: the addresses come from the file that the process has open. The
compiled module multiplies small matrices with them first, and without a right result they are not used.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from pathlib import Path

import torch

from rgfast.dispatch import Impl
from rgfast.ops.residual_mlp import contract
from rgfast.ops.residual_mlp.call import SECONDS_PER_CALL, Call
from rgfast.runtime import native

__all__ = ["BLOCK", "unavailable_reason"]

# Products a second on one AVX-512 core, both factors packed (README, "Library or ours?").
_FLOPS, _FLOPS_RECORDED = 122e9, 118e9

# Fortran's single precision product, and the C function that sets (and returns) the calling thread's number
# of threads; of the latter's names those in small letters take a pointer.
_SYMBOLS = ("sgemm_", "MKL_Set_Num_Threads_Local")
# Not needed, but faster where all three are there: a factor is then packed once for all tiles of a product.
_PACKING = ("sgemm_pack_get_size_", "sgemm_pack_", "sgemm_compute_")


def _address(library: ctypes.CDLL, name: str) -> int | None:
    try:
        return ctypes.cast(getattr(library, name), ctypes.c_void_p).value
    except AttributeError:
        return None


@functools.cache
def unavailable_reason() -> str | None:
    """None where products can be handed to the library, else why not, in words; the first call settles it."""
    reason = native.unavailable_reason()
    if reason is not None:
        return reason
    # torch gives this function no types.
    if not torch.backends.mkl.is_available() or sys.byteorder != "little":  # type: ignore[no-untyped-call]
        return "this PyTorch has no MKL"
    path = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    if not path.is_file():
        return f"there is no {path.name} to find MKL in"
    library = ctypes.CDLL(str(path))
    addresses = [_address(library, name) for name in _SYMBOLS]
    missing = [name for name, found in zip(_SYMBOLS, addresses, strict=True) if not found]
    if missing:
        return f"this PyTorch does not export {' and '.join(missing)}"
    packing = [_address(library, name) or 0 for name in _PACKING]
    if not native.load().residual_mlp_use_library(*addresses, *packing):
        return "the library's product gave a wrong result"
    return None


# Settled on import: a traced graph reads constants, where it could not follow the attempt to load.
_BROKEN, _NO_LIBRARY = native.unavailable_reason(), unavailable_reason()


def _can_run(call: Call) -> str | None:
    if call.x.dtype == torch.float64:
        return "it computes in fp32, and x is float64"
    if _NO_LIBRARY is not None:
        return _NO_LIBRARY
    return "it does not mix positions" if call.mixes else None


BLOCK = Impl(
    "mkl",
    lambda call: contract.run(call, by_library=True),
    _can_run,
    lambda call: SECONDS_PER_CALL + call.flops() / (_FLOPS_RECORDED if call.recorded() else _FLOPS),
    ("cpu",),
    lambda: _BROKEN,
    Call.too_narrow,
    native.active_isa,
)
