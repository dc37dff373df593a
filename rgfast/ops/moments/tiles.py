"""How products of rows are cut into tiles for a GPU, by kernels of this room and of those that use them."""

from __future__ import annotations

import struct

import torch

from rgfast.runtime import cuda

__all__ = [
    "CLOCK",
    "DTYPES",
    "EXACT",
    "MOST_BLOCKS",
    "MOST_SIDE",
    "SHARED",
    "SIDE",
    "THREADS",
    "bits",
    "card",
    "clocks",
    "count",
]

# Of csrc/cuda/moments.cuh, which holds its side of these numbers against its sources.
SIDE, THREADS, SHARED = 64, 128, 34_016
DTYPES = {
    torch.float64: "float64",
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}
MOST_BLOCKS, MOST_SIDE = 2**31 - 1, 65_535  # of a grid
# A multiprocessor's clocks per second, its clocks for 16 rows of a tile by architecture, and what a block
# takes that has it alone. Computed, not measured (the room's README, "Kernels for a GPU").
CLOCK, _ALONE = 1.755e9, 800.0
EXACT = {"sm_80": 1024.0, "sm_90": 540.0, "sm_100": 1024.0}
_H100 = ("sm_90", 132, 2)
_DOUBLE, _WORD = struct.Struct("<d"), struct.Struct("<q")


def count(high: int, wide: int, *, same: bool, side: int = SIDE) -> int:
    """Tiles of a moment of so many columns at a position, with ``same`` without those below the diagonal."""
    down, right = -(-high // side), -(-wide // side)
    return down * (down + 1) // 2 if same else down * right


def bits(x: float) -> int:
    """``x`` as a word of a kernel's table."""
    (word,) = _WORD.unpack(_DOUBLE.pack(x))
    return int(word)


def card(device: torch.device) -> tuple[str, int, int]:
    """Architecture, multiprocessors, and how much faster fp32 is than fp64; an H100's if there is no GPU."""
    if cuda.device_refusal(device) is not None:
        return _H100
    return cuda.architecture(device), cuda.multiprocessors(device), cuda.single_to_double(device)


def clocks(tiles: int, rows: int, multiprocessors: int, each: float) -> float:
    """About how many clocks so many tiles of ``rows`` take in turns, ``each`` per 16 rows of one."""
    return -(-rows // 16) * max(-(-tiles // multiprocessors) * each, _ALONE)
