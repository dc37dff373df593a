"""How Gram tiles are cut, by architecture.

That for "h100" is the fastest that prototypes tried there. Elsewhere it is the largest tile that compiles
without a spill and fits into shared memory. These kernels themselves have not run on a GPU.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = [
    "COLUMNS",
    "ENTRIES",
    "GRAMS",
    "GROUP",
    "LONG",
    "NEAR",
    "PARTS",
    "ROWS",
    "SPAN",
    "STAGES",
    "STEP",
    "TOGETHER",
    "Tile",
]

# Features that share a scale, and after which tensor cores begin a new sum; samples centered at a time.
COLUMNS, ROWS = 64, 64
# Layers of which all are multiplied with all at a time, over so many entries of Gram tiles; after how many of
# these tensor cores begin a new sum, and how many such steps are on their way.
GROUP, SPAN, STEP, STAGES = 32, 1024, 64, 3
# Of small kernels: squared lengths at a time, and of how many layers; parts and entries that are added up.
LONG, TOGETHER, PARTS, ENTRIES = 256, 16, 16, 64


class Tile(NamedTuple):
    """Samples down and across of a Gram tile, warps, and stages of the pipeline."""

    side: int
    warps: int
    stages: int


# Groups as those of the residual block. Shared memory per block is 227 KiB in the first two, whose larger
# tiles read less from the second-level cache, which binds; it is 163 KiB and 99 KiB in the others. Of
# neighbors the tile of the layer before stays in registers.
_LARGE, _SMALL = Tile(128, 8, 3), Tile(64, 4, 3)
GRAMS: dict[str, Tile] = {"h100": _LARGE, "b200": Tile(128, 8, 2), "a100": _SMALL, "other": _SMALL}
NEAR: dict[str, Tile] = {"h100": _LARGE, "b200": _SMALL, "a100": Tile(64, 8, 3), "other": Tile(64, 8, 3)}
