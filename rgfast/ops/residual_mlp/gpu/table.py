"""How each kernel is cut into tiles, by architecture and width.

The rows for "h100" are the fastest of those that prototypes tried there, or the nearest to them. Elsewhere it
is the tile with the fewest instructions per number in the inner loop, a spilled register counted fourfold, of
those that fit into shared memory. These kernels themselves have not run on a GPU.

A warp takes 16 rows, since what the first product leaves in its registers is the second's operand: more warps
than that repeat each other's work. Tiles of 32 rows, whose warps stand two by two, can have four.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

__all__ = [
    "BACKWARD",
    "FORWARD",
    "GROUPS",
    "OPTIONS",
    "STACK",
    "WIDEST",
    "WIDEST_STACK",
    "Form",
    "Tile",
    "form_of",
    "group_of",
    "padded",
    "tile_width",
]

Form = Literal["plain", "single", "split"]

# Without it a product and a sum are rounded apart, and the default changes with Triton's version.
OPTIONS: dict[str, Any] = {"enable_fp_fusion": True}

# The widest block that is fused: a wider one does not fit on a multiprocessor.
WIDEST = 256
# The widest of which several are: their rows stay in registers beside all else.
WIDEST_STACK = 128


class Tile(NamedTuple):
    """Rows and hidden units of a tile, warps, stages of the pipeline, and parts that columns are cut into.

    ``tma``: the forward pass has its weights copied by the tensor memory accelerator of sm_90 and sm_100.
    """

    rows: int
    units: int
    warps: int
    stages: int
    halves: int = 1
    tma: bool = False


# Shared memory per block is 227 KiB in the first two groups, 163 KiB and 99 KiB in the others. The second
# keeps sums in tensor memory, too small for split products at 256 unless a tile has fewer than 64 rows.
GROUPS = {"h100": (90,), "b200": (100, 103), "a100": (80, 87), "other": (86, 89, 120, 121)}

_SMALL = Tile(64, 64, 4, 2)
_COPIED, _NARROW = _SMALL._replace(tma=True), Tile(64, 32, 4, 2, tma=True)
FORWARD: dict[tuple[str, Form], dict[int, Tile]] = {
    ("h100", "plain"): {64: _SMALL, 128: _COPIED, 256: Tile(128, 64, 8, 2, tma=True)},
    ("h100", "single"): {64: _SMALL, 128: _COPIED, 256: Tile(128, 64, 8, 2, 2)},
    ("h100", "split"): {
        64: _NARROW,
        128: Tile(128, 64, 8, 2, tma=True),
        256: Tile(128, 32, 8, 1, 2, tma=True),
    },
    ("b200", "plain"): {64: _SMALL, 128: _COPIED, 256: Tile(128, 64, 8, 2, tma=True)},
    ("b200", "single"): {64: _SMALL, 128: _SMALL, 256: Tile(64, 32, 8, 2, 2)},
    ("b200", "split"): {64: _NARROW, 128: Tile(64, 32, 8, 2, tma=True), 256: Tile(32, 32, 4, 1, 2, tma=True)},
    ("a100", "plain"): {64: _SMALL, 128: _SMALL, 256: Tile(64, 32, 4, 2)},
    ("a100", "single"): {64: _SMALL, 128: Tile(64, 32, 4, 2), 256: Tile(64, 32, 4, 1, 2)},
    ("a100", "split"): {64: Tile(64, 32, 4, 2), 128: Tile(64, 32, 4, 1), 256: Tile(32, 32, 4, 1, 2)},
    ("other", "plain"): {64: _SMALL, 128: Tile(64, 32, 4, 2), 256: Tile(64, 32, 4, 1)},
    ("other", "single"): {64: _SMALL, 128: Tile(64, 32, 4, 2), 256: Tile(64, 32, 4, 1, 2)},
    ("other", "split"): {64: Tile(64, 32, 4, 2), 128: Tile(64, 32, 4, 1), 256: Tile(32, 32, 4, 1, 2)},
}
BACKWARD: dict[tuple[str, Form], dict[int, Tile]] = {
    ("h100", "plain"): {64: Tile(128, 64, 8, 2), 128: Tile(128, 64, 8, 2), 256: Tile(128, 32, 8, 2, 2)},
    ("h100", "single"): {64: Tile(64, 32, 4, 2), 128: Tile(64, 32, 4, 2), 256: Tile(128, 32, 8, 2, 2)},
    ("h100", "split"): {64: Tile(64, 32, 4, 2), 128: Tile(64, 32, 4, 1), 256: Tile(64, 32, 4, 1, 2)},
    ("b200", "plain"): {64: Tile(128, 64, 8, 2), 128: Tile(128, 64, 8, 2), 256: Tile(64, 32, 8, 2, 2)},
    ("b200", "single"): {64: Tile(64, 32, 4, 2), 128: Tile(64, 32, 4, 2), 256: Tile(64, 32, 8, 2, 2)},
    ("b200", "split"): {64: Tile(64, 32, 4, 2), 128: Tile(64, 32, 8, 2), 256: Tile(32, 32, 4, 1, 2)},
    ("a100", "plain"): {64: Tile(64, 32, 4, 2), 128: Tile(64, 32, 4, 2), 256: Tile(32, 32, 4, 2, 2)},
    ("a100", "single"): {64: Tile(64, 32, 4, 2), 128: Tile(64, 32, 4, 2), 256: Tile(32, 32, 4, 1, 2)},
    ("a100", "split"): {64: Tile(64, 32, 4, 2), 128: Tile(32, 32, 4, 1), 256: Tile(32, 32, 4, 1, 2)},
    ("other", "plain"): {64: Tile(64, 32, 4, 2), 128: Tile(64, 32, 4, 1), 256: Tile(32, 32, 4, 1, 2)},
    ("other", "single"): {64: Tile(64, 32, 4, 2), 128: Tile(64, 32, 4, 1), 256: Tile(32, 32, 4, 1, 2)},
    ("other", "split"): {64: Tile(64, 32, 4, 1), 128: Tile(32, 32, 4, 1), 256: Tile(32, 16, 4, 1, 2)},
}
# Several blocks in one kernel. Every program reads all weights of all layers, so that tiles have many rows.
_STACK, _LESS = Tile(128, 64, 8, 2), Tile(128, 32, 8, 2)
STACK: dict[tuple[str, Form], dict[int, Tile]] = {
    ("h100", "plain"): {64: _STACK, 128: _STACK},
    ("h100", "single"): {64: _STACK, 128: _LESS},
    ("h100", "split"): {64: _STACK, 128: _LESS},
    ("b200", "plain"): {64: _STACK, 128: _STACK},
    ("b200", "single"): {64: _STACK, 128: _LESS},
    ("b200", "split"): {64: Tile(64, 32, 8, 2), 128: Tile(64, 32, 8, 2)},
    ("a100", "plain"): {64: _STACK, 128: _LESS},
    ("a100", "single"): {64: _LESS, 128: Tile(64, 32, 4, 2)},
    ("a100", "split"): {64: _LESS, 128: Tile(64, 32, 4, 1)},
    ("other", "plain"): {64: _STACK, 128: _LESS},
    ("other", "single"): {64: _LESS, 128: Tile(64, 32, 4, 1)},
    ("other", "split"): {64: _LESS, 128: Tile(64, 32, 4, 1)},
}


def group_of(capability: tuple[int, int]) -> str:
    """The group whose tiles an architecture gets; one not named gets the smallest."""
    number = 10 * capability[0] + capability[1]
    return next((group for group, numbers in GROUPS.items() if number in numbers), "other")


def form_of(products: str) -> Form:
    """How the kernels make products of a type."""
    forms: dict[str, Form] = {"fp32": "split", "tf32": "single"}
    return forms.get(products, "plain")


def padded(width: int) -> int:
    """The columns of a tile: a power of two, and at least what the tensor cores take."""
    return max(16, 1 << (width - 1).bit_length())


def tile_width(width: int) -> int:
    """The width whose tile a block has: 64 at least."""
    return max(64, padded(width))
