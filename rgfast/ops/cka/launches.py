"""Launches of the kernels in csrc/cuda/cka*: sums of pairs of layers by features or by samples, and values.

Every sum has a fixed order that the rows of its position alone decide, so its bits are the same in any call.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from rgfast.ops.cka.sums import Wanted
from rgfast.ops.moments.tiles import DTYPES, SHARED, SIDE, THREADS, bits, card, count
from rgfast.runtime import cuda
from rgfast.runtime.waiting import numbers

__all__ = [
    "SUMS",
    "TILE_BYTES",
    "Batches",
    "Layers",
    "chunk",
    "finish",
    "numbers_of_sums",
    "sample_tiles",
]

# Of the headers: numbers per pair, warps of a block, and columns that a block centers.
SUMS, _WARPS, _COLUMNS = 4, 4, 32
TILE_BYTES = 8 * SIDE * SIDE
# Shared memory of blocks for tiles without groups, for Gram tiles, for those of neighbors, and for products
# of layers: of so many layers over so many entries.
_LEFT_OUT_SHARED, _GRAM_SHARED, _NEAR_SHARED, _INNER_SHARED = 66_784, 33_792, 66_592, 32_768
_GROUP, _SPAN = 32, 512
_SPANS = SIDE * SIDE // _SPAN
# Bytes of Gram tiles at a time, about half of the second-level cache of GPUs that have fast fp64, and how
# many tiles an H100 computes at a time, of which they are a multiple. Both decide the order of sums, and are
# therefore the same everywhere.
_SCRATCH, _AT_ONCE = 26 << 20, 3 * 132
# Layers at least that a block goes through for neighbors: it multiplies one more.
_RUN = 4
_TASKS = {"matrix": 0, "cka": 0, "drift": 1, "alignment": 2, "hsic": 3, "minibatch": 0, "hsic_sums": 4}


class Layers:
    """Layers ``[P, n, d_l]`` of one dtype, centered by kernels as they are read, and the pairs to multiply.

    With ``groups`` every sum is also formed without the samples g, g + groups, ..., for every g.
    """

    def __init__(self, flat: Sequence[Tensor], wanted: Wanted, *, samples: bool, groups: int = 1) -> None:
        self.wanted, self.samples, self.groups = wanted, samples, groups
        self.device, (self.positions, self.n, _) = flat[0].device, flat[0].shape
        self.count, self.name, self.widths = len(flat), DTYPES[flat[0].dtype], [x.shape[2] for x in flat]
        self.pairs = wanted.each()
        self._flat = flat  # their rows are read later
        self.variants = 1 + (groups if groups > 1 else 0)
        self._words = self._table_words(flat)

    def sums(self) -> Tensor:
        """Σ_{i≠j} K_ij M_ij, Σ K_ii M_ii, tr K and how far rows were moved ``[P, variants, pairs, 4]``."""
        out = self._empty(self.positions, self.variants, len(self.pairs), SUMS)
        if not self.positions:
            return out
        self.table = numbers(self._words, self.device)
        self._center()
        parts = self._by_samples() if self.samples else self._by_features()
        sizes = self.count, len(self.pairs), parts.shape[2], self.n, self.groups, int(self.samples)
        grid = self.positions, len(self.pairs), self.variants
        self._launch("sums", grid, 8 * _WARPS, *sizes, parts, out)
        return out

    def _table_words(self, flat: Sequence[Tensor]) -> list[int]:
        """Of every layer where its rows are and what is known of them, then of every pair."""
        positions, n = self.positions, self.n
        of_groups = self.groups if self.groups > 1 else 0
        sizes = [(2 * positions * d, positions * n, of_groups * positions * (d + n)) for d in self.widths]
        self._kept = self._empty(sum(map(sum, sizes)))
        words, at = [], self._kept.data_ptr()
        for x, (means, norms, sums) in zip(flat, sizes, strict=True):
            places = at, bits(1.0), at + 8 * means, at + 8 * (means + norms)
            words += [x.data_ptr(), *x.stride(), x.shape[2], *places]
            at += 8 * (means + norms + sums)
        own = {i: k for k, (i, j) in enumerate(self.pairs) if i == j}
        for (i, j), first in zip(self.pairs, self._firsts(), strict=True):
            words += [i, j, first, own[i], own[j]]
        return words

    def _firsts(self) -> list[int]:
        """Where the sums of a pair's tiles begin."""
        if not self.samples:
            return [*accumulate((self._tiles(*pair) for pair in self.pairs), initial=0)][:-1]
        if self.wanted.near:
            return [2 * i + (j - i) for i, j in self.pairs]
        return [i * self.count + j for i, j in self.pairs]

    def _tiles(self, i: int, j: int) -> int:
        return count(self.widths[i], self.widths[j], same=i == j)

    def _center(self) -> None:
        chunks = -(-max(self.widths) // _COLUMNS)
        grid = self.positions * chunks, self.count
        rows = -(-self.positions * self.n // _WARPS), self.count
        self._launch(f"centers_{self.name}", grid, 8 * THREADS, self.positions, self.n, chunks)
        self._launch(f"norms_{self.name}", rows, 0, self.positions, self.n)
        if self.groups > 1:
            grid = self.positions * chunks * self.groups, self.count
            self._launch(f"group_sums_{self.name}", grid, 8 * THREADS, self.n, chunks, self.groups)
            self._launch(f"group_products_{self.name}", rows, 0, self.positions, self.n, self.groups)

    def _by_features(self) -> Tensor:
        """Squares of every tile of cross moments, none of which is stored ``[P, variants, tiles]``."""
        tiles = sum(self._tiles(*pair) for pair in self.pairs)
        squares = self._empty(self.positions, self.variants, tiles)
        sizes = self.count, len(self.pairs), tiles, self.n
        grid = self.positions * tiles, 1
        if self.groups > 1:
            self._launch(f"left_out_{self.name}", grid, _LEFT_OUT_SHARED, *sizes, self.groups, squares)
        else:
            self._launch(f"squares_{self.name}", grid, SHARED, *sizes, squares)
        return squares

    def _by_samples(self) -> Tensor:
        """Σ_{i<j} K_ij M_ij, no kernel being stored ``[P, variants, L²]``, or of neighbors ``[..., 2 L]``."""
        positions, layers, tiles = self.positions, self.count, sample_tiles(self.n, self.groups)
        if not self.wanted.near:
            return self._all(tiles)
        found = self._empty(positions, self.variants, 2 * layers)
        apart = self._empty(tiles, positions, layers, 2)
        # Two turns of three blocks on every multiprocessor, if there are too few tiles for that.
        runs = -(-6 * card(self.device)[1] // (positions * tiles))
        run = max(_RUN, -(-layers // runs))
        grid = positions * tiles, -(-layers // run)
        sizes = positions, layers, self.n, self.groups, tiles, run
        self._launch(f"near_{self.name}", grid, _NEAR_SHARED, *sizes, apart)
        self._collect(apart, (0, tiles, 1), 0, found)
        return found

    def _all(self, tiles: int) -> Tensor:
        positions, layers = self.positions, self.count
        most, side = chunk(layers, self.n, self.groups)
        most = min(most, positions)
        found = self._empty(positions, self.variants, layers**2)
        scratch = self._empty(most, layers, side * SIDE * SIDE)
        spans, groups = side * _SPANS, count(layers, layers, same=True, side=_GROUP)
        # Without groups all turns of a position add up in place.
        shared = self.groups == 1
        apart = self._empty(spans, positions if shared else most, layers**2)
        for start in range(0, positions, most):
            here = min(most, positions - start)
            for first in range(0, tiles, side):
                some = min(side, tiles - first)
                place = positions, self.n, self.groups, start, first, some, side
                self._launch(f"grams_{self.name}", (here * some, layers), _GRAM_SHARED, *place, scratch)
                grid = here * (some * _SPANS), groups
                to = (positions, start, int(first > 0)) if shared else (here, 0, 0)
                self._launch_on(scratch, "inner", grid, _INNER_SHARED, layers, some, side, *to, apart)
                if not shared:
                    turn = first, some, _SPANS
                    self._collect(apart, turn, start, found, here=here, add=first > 0)
        if shared:
            self._collect(apart, (0, side, _SPANS), 0, found)
        return found

    def _collect(
        self,
        apart: Tensor,
        turn: tuple[int, int, int],
        start: int,
        to: Tensor,
        *,
        here: int | None = None,
        add: bool = False,
    ) -> None:
        """Add up sums of some tiles, from the first on so many, of so many spans each."""
        here, entries = len(to) if here is None else here, to.shape[2]
        grid = -(-here * entries // 32), self.variants
        sizes = *turn, here, entries, _strips(self.n, self.groups), start, int(add)
        self._launch_on(apart, "collect", grid, 8 * THREADS, *sizes, to)

    def _empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float64, device=self.device)

    def _launch(self, kernel: str, grid: tuple[int, ...], shared: int, *arguments: Tensor | int) -> None:
        self._launch_on(self.table, kernel, grid, shared, *arguments)

    def _launch_on(
        self, first: Tensor, kernel: str, grid: tuple[int, ...], shared: int, *arguments: Tensor | int
    ) -> None:
        whole = (grid[0], grid[1], grid[2] if len(grid) > 2 else 1)
        cuda.launch(f"rgfast_cka_{kernel}", whole, THREADS, shared, first, *arguments, device=self.device)


class Batches(NamedTuple):
    """Layers of ``P number`` positions, batches of one size, their sums, and a weight of their products."""

    layers: Layers
    sums: Tensor
    number: int = 1
    weight: float = 1.0


def finish(
    task: str, batches: Sequence[Batches], start: int, to: Tensor, faults: Tensor, debiased: bool
) -> None:
    """Write what ``task`` returns of some positions, from ``start`` on, and what is wrong with their sums.

    ``to`` and ``faults[P, variants]`` are of all positions; batches are of one or of two sizes.
    """
    one, other = batches[0], batches[-1]
    if len(batches) == 1:
        other = one._replace(number=0)
    layers, positions = one.layers, one.layers.positions // one.number
    if not positions:
        return
    words: list[Tensor | int | float] = []
    for each in (one, other):
        words += [each.sums, each.number, each.layers.n, float(each.weight)]
    sizes = layers.count, layers.wanted.first, len(layers.pairs), start, len(faults)
    cuda.launch(
        "rgfast_cka_finish",
        (positions, layers.variants, 1),
        THREADS,
        0,
        layers.table,
        *sizes,
        _TASKS[task],
        int(debiased),
        *words,
        to,
        faults,
        device=layers.device,
    )


def _strips(n: int, groups: int) -> int:
    """Strips of samples of a group, each of which begins with one of its own."""
    most = -(-n // groups)
    return -(-most // SIDE)


def sample_tiles(n: int, groups: int = 1) -> int:
    """Gram tiles of a layer at a position."""
    side = SIDE * _strips(n, groups) * groups
    return count(side, side, same=True)


def chunk(layers: int, n: int, groups: int = 1) -> tuple[int, int]:
    """Positions, and pairs of strips of samples, whose tiles of all layers are there at the same time."""
    tiles = sample_tiles(n, groups)
    fit = _SCRATCH // (layers * TILE_BYTES)
    turns = fit * layers // _AT_ONCE
    if turns:
        fit = turns * _AT_ONCE // layers
    return max(1, fit // tiles), max(1, min(fit, tiles))


def numbers_of_sums(layers: int, n: int, groups: int, *, near: bool) -> int:
    """How many numbers of a position are added up in the end, by samples."""
    variants = 1 + (groups if groups > 1 else 0)
    if near:
        return 2 * layers * (sample_tiles(n, groups) + variants)
    return (chunk(layers, n, groups)[1] * _SPANS + variants) * layers**2
