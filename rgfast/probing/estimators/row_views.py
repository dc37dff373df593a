"""The measures of every view from rows that come a few positions at a time, all sequences of each at once."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from rgfast.ops.cka.api import alignment
from rgfast.ops.moments import add_positions
from rgfast.ops.spectrum.measures import times_power
from rgfast.ops.spectrum.rows import refine_spectra
from rgfast.ops.spectrum.solve import Solved
from rgfast.probing.estimators.joining import all_but_one, joined_moments
from rgfast.probing.estimators.moment_measures import Again, Centering, measure_moments
from rgfast.probing.estimators.moments import layers_of
from rgfast.probing.estimators.pooled import Pooled
from rgfast.probing.estimators.row_measures import DOUBT, Align, Room, measure_rows
from rgfast.probing.estimators.row_targets import errors_on_groups
from rgfast.probing.measured import Measured, doubtful, joined
from rgfast.probing.options import POSITIONAL
from rgfast.probing.plan import Plan
from rgfast.probing.targets import linear_r2, over_folds
from rgfast.streaming import MomentAccumulator, pair_keys

__all__ = ["Part", "RowViews", "Tile", "numbers_of"]

_T = TypeVar("_T")

# Sizes of fp64 rows whose fourth powers are numbers.
_MODERATE = 1e-30, 1e30

# The measures of some positions: of all sequences, and of all but those of each group.
Part = tuple[Measured, ...]


@dataclass(frozen=True)
class Tile:
    """The rows of some positions, one position after another: ``rows[l][R, d_l]``, ``counts`` of each.

    ``sequence[R]`` numbers the sequences that rows are of, None if every position has those of all in their
    order; ``hidden[R]`` says whose token was hidden, None if there is no mask. ``targets[k][R, m_k]`` are
    what rows are asked about, ``chosen[k][R]`` says which rows a view of ``rows=`` has.
    """

    positions: Sequence[int]
    counts: Sequence[int]
    rows: Sequence[Tensor] | Tensor
    sequence: Tensor | None = None
    hidden: Tensor | None = None
    targets: Sequence[Tensor] = ()
    chosen: Sequence[Tensor] = ()


class RowViews:
    """Takes every position once, and then gives the measures of the views of ``plan``.

    ``uncentred`` says whether ranks of rows as they are are wanted, ``total`` is the number of rows of a
    layer, ``sequences`` that of the sequences. Pooled rows are summed up unless they are fewer than features.
    """

    def __init__(self, plan: Plan, *, uncentred: bool, sequences: int, total: int) -> None:
        self._plan, self._uncentred, self._sequences = plan, uncentred, sequences
        self._adjacent, self._compared = plan.pairs == "adjacent", bool(plan.pairs)
        self._followed = {*plan.positions}
        self._positional = [view for view in plan.views if view in POSITIONAL]
        self._parts: dict[str, list[tuple[int, Part]]] = {view: [] for view in self._positional}
        self._pools = "pooled" in plan.views
        self._few = self._pools and total < max(plan.widths)
        self._few_tiles: list[Tile] = []
        layers = len(plan.widths)
        pairs = plan.pairs
        if plan.targets:
            asked = [(layer, layers + k) for layer in range(layers) for k in range(len(plan.targets))]
            pairs = [*pair_keys(pairs, layers), *asked]
        self._sums = [MomentAccumulator(pairs=pairs) for _ in range(plan.groups)]
        self._errors: dict[str, list[tuple[int, Tensor]]] = {}
        self._r2: dict[str, tuple[Tensor, Tensor]] = {}
        self._pool_of_all = Pooled(plan.widths, plan.pairs) if plan.groups == 1 else None
        self._room = Room()
        self._means: list[Tensor] = []
        self._counted: Tensor | None = None

    def take(self, tile: Tile) -> bool:
        """Take the rows of some positions, which may be overwritten afterwards. False for NaN or infinity."""
        seen, pooled = False, False
        if self._positional:
            pooled = self._is_alike(tile) and self._pools and self._shares(tile)
            if not self._take_positions(tile, pooled):
                return False
            seen = all(t in self._followed for t in tile.positions)
        if not seen and not all(_finite(x) for x in tile.rows):
            return False
        if self._pools and not pooled:
            self._pool(tile)
        if "mean_pooled" in self._plan.views:
            self._add_to_means(tile)
        return True

    def finish(self, rows_of: Callable[[int], Tensor | None]) -> dict[str, Part]:
        """The measures of every view but ``flattened``; ``rows_of(l)`` are all rows ``[R, d_l]`` of a layer
        again, None if they cannot be had."""
        found: dict[str, Part] = {}
        for view, parts in self._parts.items():
            parts.sort(key=lambda part: part[0])
            found[view] = tuple(joined(some) for some in zip(*(part for _, part in parts), strict=True))
        if self._pools:
            found["pooled"] = self._few_pooled() if self._few else self._pooled(rows_of)
        if self._means:
            found["mean_pooled"] = self._of_means()
        return found

    def r2(self) -> dict[str, tuple[Tensor, Tensor]]:
        """R² of the targets ``[targets, layers, P]`` and its standard error by view, after :meth:`finish`."""
        for view, parts in self._errors.items():
            parts.sort(key=lambda part: part[0])
            self._r2[view] = over_folds(torch.cat([errors for _, errors in parts], 4))
        return self._r2

    def _ask(
        self,
        view: str,
        position: int,
        rows: Sequence[Tensor] | Tensor,
        targets: Sequence[Tensor],
        sequence: Tensor | None,
    ) -> None:
        """Take the errors of the targets on each group, of ``rows[l][P, R, d_l]`` of these sequences."""
        if self._plan.targets:
            if sequence is None:
                sequence = _counted(rows[0].shape[1], rows[0].device)
            groups = self._plan.groups
            errors = errors_on_groups(rows, targets, sequence % groups, groups)
            self._errors.setdefault(view, []).append((position, errors))

    def cloud(self, rows: Sequence[Tensor], sequence: Tensor | None) -> Part | None:
        """The measures of ``rows[l][R, d_l]`` of these sequences (None: all in order) as one cloud."""
        return self._variants([x[None] for x in rows], sequence)

    def _is_alike(self, tile: Tile) -> bool:
        """Whether all positions are measured, of all sequences."""
        return tile.sequence is None and tile.hidden is None and {*tile.positions} <= self._followed

    def _shares(self, tile: Tile) -> bool:
        """Whether pooled moments are summed up from those of the positions."""
        fits = not self._few and tile.counts[0] >= max(self._plan.widths)
        return self._pool_of_all is not None and fits and tile.rows[0].dtype == torch.float32

    def _take_positions(self, tile: Tile, pooled: bool) -> bool:
        if self._is_alike(tile):
            n = tile.counts[0]
            if isinstance(tile.rows, Tensor):
                rows: Sequence[Tensor] | Tensor = tile.rows.view(len(tile.rows), -1, n, tile.rows.shape[2])
            else:
                rows = [x.view(-1, n, x.shape[1]) for x in tile.rows]
            align = _Aligned(_given(self._pool_of_all), self._adjacent) if pooled else None
            part = self._variants(rows, None, align)
            if part is None:
                return False
            self._parts["position"].append((tile.positions[0], part))
            targets = [y.view(-1, n, y.shape[1]) for y in tile.targets]
            self._ask("position", tile.positions[0], rows, targets, None)
            return True
        for position, at in _segments(tile):
            if position not in self._followed:
                continue
            hidden = None if tile.hidden is None else tile.hidden[at]
            for view in self._positional:
                kept = None if view == "position" else hidden if view == "masked" else ~_given(hidden)
                rows, targets = (
                    [(x[at] if kept is None else x[at][kept])[None] for x in some]
                    for some in (tile.rows, tile.targets)
                )
                sequence = None if tile.sequence is None else tile.sequence[at]
                if kept is not None:
                    numbers = _counted(len(kept), kept.device)
                    sequence = (numbers if sequence is None else sequence)[kept]
                part = self._variants(rows, sequence)
                if part is None:
                    return False
                self._parts[view].append((position, part))
                self._ask(view, position, rows, targets, sequence)
        return True

    def _variants(
        self, rows: Sequence[Tensor] | Tensor, sequence: Tensor | None, align: Align | None = None
    ) -> Part | None:
        """The measures of ``rows[l][P, R, d_l]``, and without each group of sequences."""
        groups = self._plan.groups

        def measure(rows: Sequence[Tensor] | Tensor, groups: int) -> Part | None:
            return measure_rows(
                rows,
                adjacent=self._adjacent,
                uncentred=self._uncentred,
                groups=groups,
                compared=self._compared,
                align=align,
                room=self._room,
            )

        enough = rows[0].shape[1] >= 2 * groups
        if groups == 1 or (sequence is None and enough):
            return measure(rows, groups)
        n = rows[0].shape[1]
        if sequence is None:
            sequence = _counted(n, rows[0].device)
        found = measure(rows, 1)
        for group in range(groups):
            kept = sequence % groups != group
            rest = None if found is None else measure([x[:, kept] for x in rows], 1)
            found = None if found is None or rest is None else found + rest
        return found

    def _pool(self, tile: Tile) -> None:
        groups = self._plan.groups
        if self._few:
            rows, targets = ([x.clone() for x in some] for some in (tile.rows, tile.targets))
            self._few_tiles.append(replace(tile, rows=rows, targets=targets, sequence=numbers_of(tile)))
            return
        if self._pool_of_all is not None:
            if len(tile.rows[0]):
                self._pool_of_all.add(tile.rows)
            return
        group = numbers_of(tile) % groups
        for g, sums in enumerate(self._sums):
            at = (group == g).nonzero()[:, 0]
            if len(at):
                sums.add_block([x[at][None] for x in (*tile.rows, *tile.targets)])

    def _few_pooled(self) -> Part:
        rows, targets = (
            [torch.cat(parts)[None] for parts in zip(*some, strict=True)]
            for some in ([t.rows for t in self._few_tiles], [t.targets for t in self._few_tiles])
        )
        sequence = torch.cat([_given(tile.sequence) for tile in self._few_tiles])
        found = self._variants(rows, sequence)
        assert found is not None  # every tile was looked at
        self._ask("pooled", -1, rows, targets, sequence)
        return found

    def _pooled(self, rows_of: Callable[[int], Tensor | None]) -> Part:
        held: dict[int, Tensor | None] = {}

        def again(layer: int, centering: Centering, solved: Solved) -> Tensor:
            most = whole.count.reshape(-1) - int(centering == "mean")
            doubt: Tensor = doubtful(solved.sigma, most, DOUBT)
            if not bool(doubt.any()):
                return doubt
            if layer not in held:
                held.clear()
                held[layer] = rows_of(layer)
            rows = held[layer]
            if rows is None:
                return torch.zeros_like(doubt)
            _solve_again(rows, solved, centering, whole.exponent(layer))
            return doubt

        layers, targets = len(self._plan.widths), len(self._plan.targets)
        whole = (
            layers_of(joined_moments(self._sums), layers)
            if self._pool_of_all is None
            else self._pool_of_all.moments()
        )
        better: Again = again
        found = [measure_moments(whole, refine=False, again=better)]
        if self._plan.groups > 1:
            rest = list(all_but_one(self._sums, []))
            found += [measure_moments(layers_of(part, layers), spectra=False, refine=False) for part in rest]
            if targets:
                self._r2["pooled"] = linear_r2(self._sums, rest, layers, targets)
        return tuple(found)

    def _add_to_means(self, tile: Tile) -> None:
        if not self._means:
            device = tile.rows[0].device
            self._means = [
                torch.zeros(self._sequences, x.shape[1], dtype=torch.float64, device=device)
                for x in (*tile.rows, *tile.targets)
            ]
            self._counted = torch.zeros(self._sequences, dtype=torch.float64, device=device)
        counted = _given(self._counted)
        if tile.sequence is None:
            counted += float(len(tile.counts))
            for sums, x in zip(self._means, (*tile.rows, *tile.targets), strict=True):
                add_positions(x.view(len(tile.counts), -1, x.shape[1]), sums)
            return
        for _, at in _segments(tile):
            sequence = tile.sequence[at]
            counted[sequence] += 1.0
            for sums, x in zip(self._means, (*tile.rows, *tile.targets), strict=True):
                sums.index_add_(0, sequence, x[at].to(torch.float64))

    def _of_means(self) -> Part:
        counted = _given(self._counted)
        kept = (counted > 0).nonzero()[:, 0]
        every = len(kept) == len(counted)
        means = [
            sums / counted[:, None] if every else sums[kept] / counted[kept, None] for sums in self._means
        ]
        rows, targets = (
            [x[None] for x in some]
            for some in (means[: len(self._plan.widths)], means[len(self._plan.widths) :])
        )
        fits = len(kept) >= max(self._plan.widths) and self._plan.groups == 1
        fits = fits and all(_MODERATE[0] < float(x.abs().max()) < _MODERATE[1] for x in rows)
        align = _Aligned(Pooled(self._plan.widths, self._plan.pairs), self._adjacent) if fits else None
        sequence = None if every else kept
        found = self._variants(rows, sequence, align)
        assert found is not None
        self._ask("mean_pooled", -1, rows, targets, sequence)
        return found


@dataclass(frozen=True)
class _Aligned:
    """Compares layers by what ``pooled`` sums up, again by themselves where that would be blurred."""

    pooled: Pooled
    adjacent: bool

    def __call__(self, rows: Sequence[Tensor], owns: Sequence[Tensor], means: Sequence[Tensor]) -> Tensor:
        found, blurred = self.pooled.aligned(rows, owns, means)
        if bool(blurred.any()):
            at = blurred.nonzero()[:, 0]
            found[:, at] = alignment([x[at] for x in rows], adjacent=self.adjacent)[0]
        return found


def _solve_again(rows: Tensor, solved: Solved, centering: str, exponent: int) -> None:
    """The one spectrum of a layer from its rows, in the unit that it was in."""
    at = torch.zeros(1, dtype=torch.int64, device=rows.device)
    solved.exponent.fill_(exponent)
    refine_spectra(rows[None], solved, at, centering=centering)
    move = solved.exponent[:, None] - exponent
    solved.sigma, solved.error = times_power(solved.sigma, move), times_power(solved.error, move)
    solved.exponent.zero_()


def _segments(tile: Tile) -> Iterator[tuple[int, slice]]:
    ends = [*itertools.accumulate(tile.counts)]
    for position, count, end in zip(tile.positions, tile.counts, ends, strict=True):
        yield position, slice(end - count, end)


def numbers_of(tile: Tile) -> Tensor:
    """The sequence of every row."""
    if tile.sequence is not None:
        return tile.sequence
    return _counted(tile.counts[0], tile.rows[0].device).repeat(len(tile.counts))


def _counted(number: int, device: torch.device) -> Tensor:
    return torch.arange(number, dtype=torch.int64, device=device)


def _finite(x: Tensor) -> bool:
    if not x.numel():
        return True
    low, high = torch.aminmax(x)
    return bool(torch.isfinite(low)) and bool(torch.isfinite(high))


def _given(x: _T | None) -> _T:
    assert x is not None
    return x
