"""Launches of the kernels in csrc/cuda/cka.cu: sums of pairs of layers, by features or by samples.

Every sum has a fixed order that the rows of its position alone decide, so its bits are the same in any call.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from rgfast.ops.cka.sums import Wanted
from rgfast.ops.moments.tiles import DTYPES, SHARED, SIDE, THREADS, bits, card, count
from rgfast.runtime import cuda
from rgfast.runtime.waiting import numbers

__all__ = [
    "SUMS",
    "TILE_BYTES",
    "by_features",
    "by_samples",
    "chunk",
    "parts_of_samples",
    "sample_tiles",
]

# Of cka.cuh and cka_samples.cuh: numbers per pair, warps of a block, and columns that a block centers.
SUMS, _WARPS, _COLUMNS = 4, 4, 32
TILE_BYTES = 8 * SIDE * SIDE
# Shared memory of blocks for Gram tiles, for those of neighbors, and for products of layers: of so many
# layers over so many entries.
_GRAM_SHARED, _NEAR_SHARED, _INNER_SHARED = 33_792, 66_592, 32_768
_GROUP, _SPAN = 32, 512
# Bytes of Gram tiles at a time, about half of the second-level cache of GPUs that have fast fp64, and how
# many tiles an H100 computes at a time, of which they are a multiple. Both decide the order of sums, and are
# therefore the same everywhere.
_SCRATCH, _AT_ONCE = 26 << 20, 3 * 132
# Layers at least that a block goes through for neighbors: it multiplies one more.
_RUN = 4


class _Layers:
    """Layers ``[P, n, d_l]`` of one dtype, centered by kernels as they are read."""

    def __init__(self, flat: Sequence[Tensor], pairs: Sequence[tuple[int, int, int]]) -> None:
        """``pairs`` are two layers and the first of their tiles."""
        self.device, (self.positions, self.n, _) = flat[0].device, flat[0].shape
        self.count, self.name = len(flat), DTYPES[flat[0].dtype]
        self._norms = self.empty(len(flat), self.positions, self.n)
        self._means = [self.empty(2, self.positions, x.shape[2]) for x in flat]
        words = []
        for x, mean, norm in zip(flat, self._means, self._norms, strict=True):
            words += [x.data_ptr(), *x.stride(), x.shape[2], mean.data_ptr(), bits(1.0), norm.data_ptr(), 0]
        for i, j, tile in pairs:
            words += [i, j, tile, 0, 0]
        self._table = numbers(words, self.device)
        chunks = -(-max(x.shape[2] for x in flat) // _COLUMNS)
        grid = self.positions * chunks, len(flat)
        self.launch(f"centers_{self.name}", grid, 8 * THREADS, self.positions, self.n, chunks)
        grid = -(-self.positions * self.n // _WARPS), len(flat)
        self.launch(f"norms_{self.name}", grid, 0, self.positions, self.n)

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float64, device=self.device)

    def launch(self, kernel: str, grid: tuple[int, int], shared: int, *arguments: Tensor | int) -> None:
        self.launch_on(self._table, f"cka_{kernel}", grid, shared, *arguments)

    def launch_on(
        self, first: Tensor, kernel: str, grid: tuple[int, int], shared: int, *arguments: Tensor | int
    ) -> None:
        whole = (*grid, 1)
        cuda.launch(f"rgfast_{kernel}", whole, THREADS, shared, first, *arguments, device=self.device)


def by_features(flat: Sequence[Tensor], pairs: Sequence[tuple[int, int]]) -> Tensor:
    """Of pairs of layers Σ_{i≠j} K_ij M_ij, Σ K_ii M_ii, tr K and the squared length of the first's mean.

    ``[P, pairs, 4]``, from squared norms of cross moments of ``flat[l][P, n, d_l]``; every layer is a pair
    with itself.
    """
    *first, tiles = accumulate(
        (count(flat[i].shape[2], flat[j].shape[2], same=i == j) for i, j in pairs), initial=0
    )
    positions = len(flat[0])
    if not positions:
        return torch.empty((0, len(pairs), SUMS), dtype=torch.float64, device=flat[0].device)
    layers = _Layers(flat, [(i, j, tile) for (i, j), tile in zip(pairs, first, strict=True)])
    squares = layers.empty(positions, tiles)
    sizes = len(flat), len(pairs), tiles, layers.n
    layers.launch(f"squares_{layers.name}", (positions * tiles, 1), SHARED, *sizes, squares)
    out = layers.empty(positions, len(pairs), SUMS)
    layers.launch("sums", (positions, len(pairs)), 8 * _WARPS, *sizes, squares, out)
    out[:, :, 0] -= out[:, :, 1]
    return out


def by_samples(flat: Sequence[Tensor], wanted: Wanted) -> Tensor:
    """As :func:`by_features`, of the pairs that are ``wanted``, from Gram tiles: no whole kernel is kept."""
    pairs, positions = wanted.each(), len(flat[0])
    if not positions:
        return torch.empty((0, len(pairs), SUMS), dtype=torch.float64, device=flat[0].device)
    layers = _Layers(flat, [(i, j, 0) for i, j in pairs])
    half = _neighbors(layers) if wanted.near else _all(layers)
    out = layers.empty(positions, len(pairs), SUMS)
    # Without tiles no squares are read.
    layers.launch("sums", (positions, len(pairs)), 8 * _WARPS, len(flat), len(pairs), 0, layers.n, half, out)
    at = numbers([i * half.shape[2] + (j - i if wanted.near else j) for i, j in pairs], layers.device)
    out[:, :, 0] = 2.0 * half.flatten(1)[:, at]
    return out


def sample_tiles(n: int) -> int:
    """Gram tiles of a layer at a position."""
    return count(n, n, same=True)


def parts_of_samples(layers: int, n: int, *, near: bool) -> int:
    """How many numbers of a position are added up in the end."""
    if near:
        return 2 * layers * sample_tiles(n)
    return chunk(layers, n)[1] * (SIDE * SIDE // _SPAN) * layers**2


def _neighbors(layers: _Layers) -> Tensor:
    """Σ_{i<j} of squares of every layer's kernel and of its products with the next ``[P, L, 2]``."""
    positions, tiles = layers.positions, sample_tiles(layers.n)
    found = layers.empty(positions, layers.count, 2)
    apart = layers.empty(tiles, *found.shape)
    # Two turns of three blocks on every multiprocessor, if there are too few tiles for that.
    runs = -(-6 * card(layers.device)[1] // (positions * tiles))
    run = max(_RUN, -(-layers.count // runs))
    grid = positions * tiles, -(-layers.count // run)
    sizes = positions, layers.count, layers.n, tiles, run
    layers.launch(f"near_{layers.name}", grid, _NEAR_SHARED, *sizes, apart)
    _gather(layers, found, apart)
    return found


def _gather(layers: _Layers, to: Tensor, apart: Tensor) -> None:
    """Add up ``apart[parts, P, rows, columns]`` in their order, by the kernel for moments."""
    words = []
    for width in to.shape[1:]:
        words += [0, 0, 0, 0, width, 0, bits(1.0), 0, 0]
    table = numbers([*words, 0, 1, 0, to.data_ptr(), apart.data_ptr()], layers.device)
    grid = -(-to.numel() // THREADS), 1
    layers.launch_on(table, "moments_gather", grid, 0, 2, len(to), 0, 0, len(apart), to.numel())


def chunk(layers: int, n: int) -> tuple[int, int]:
    """Positions, and pairs of strips of samples, whose tiles of all layers are there at the same time."""
    tiles = sample_tiles(n)
    fit = _SCRATCH // (layers * TILE_BYTES)
    turns = fit * layers // _AT_ONCE
    if turns:
        fit = turns * _AT_ONCE // layers
    return max(1, fit // tiles), max(1, min(fit, tiles))


def _all(layers: _Layers) -> Tensor:
    """Σ_{i<j} K_ij M_ij of all layers ``[P, L, L]``, those above the diagonal."""
    positions, many, tiles = layers.positions, layers.count, sample_tiles(layers.n)
    most, side = chunk(many, layers.n)
    most = min(most, positions)
    found = layers.empty(positions, many, many)
    scratch = layers.empty(most, many, side * SIDE * SIDE)
    spans = side * SIDE * SIDE // _SPAN
    apart = layers.empty(spans, *found.shape)
    groups = count(many, many, same=True, side=_GROUP)
    for start in range(0, positions, most):
        here = min(most, positions - start)
        for first in range(0, tiles, side):
            some = min(side, tiles - first)
            place = positions, layers.n, start, first, some, side
            layers.launch(f"grams_{layers.name}", (here * some, many), _GRAM_SHARED, *place, scratch)
            grid = here * (some * SIDE * SIDE // _SPAN), groups
            sizes = many, some, side, positions, start, int(first > 0)
            layers.launch_on(scratch, "cka_inner", grid, _INNER_SHARED, *sizes, apart)
    _gather(layers, found, apart)
    return found
