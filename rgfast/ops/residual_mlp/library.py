"""The library's own product, handed to the compiled module: PyTorch brings MKL, and exports it.

Nothing is linked and no second copy loaded: the addresses come from the file that the process has open. The
compiled module multiplies small matrices with them first, and without a right result they are not used.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from pathlib import Path

import torch

from rgfast.runtime import native

__all__ = ["unavailable_reason"]

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
