"""The streaming state of a probe: for every view the moments of every layer, by group of sequences."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rgfast.probing.capture.positions import columns_of, index_of
from rgfast.probing.capture.rows import RowBatch
from rgfast.probing.estimators.base import ByGroup
from rgfast.probing.estimators.finite import FiniteCheck
from rgfast.probing.estimators.joining import all_but_one, joined_moments
from rgfast.probing.estimators.means import means_of
from rgfast.probing.estimators.moment_measures import measure_all, measure_moments
from rgfast.probing.later import LaterState
from rgfast.probing.measured import Measured, spread
from rgfast.probing.plan import CHOSEN, SPLIT, WHOLE, Held, Plan
from rgfast.probing.targets import linear_r2
from rgfast.probing.unread import Unread
from rgfast.runtime.waiting import numbers, sent, waits_for
from rgfast.streaming import MomentAccumulator, settle

__all__ = ["Moments", "layers_of"]


class Moments:
    """The estimator that sums up moments by view: memory does not depend on the number of sequences.

    Held are, for every stream of layers that have their rows at the same places, the rows at followed
    positions (two states if the sequences have a mask, seen and hidden), the rows at all other positions as
    one cloud, and whole sequences as one row, and for all layers the means over positions. The ``position``
    and ``pooled`` views are sums of these, made when read. Sequence number i goes to group i mod G. Without
    ``uncentred`` the measures of uncentred rows are NaN.
    """

    route = "moments"

    def __init__(
        self, plan: Plan, *, masked: bool, unread: Unread | None = None, uncentred: bool = True
    ) -> None:
        self.plan, self.masked, self.uncentred = plan, masked, uncentred
        self.sequences = self.numbers = 0  # summed here, and numbered by all ranks of ``line``
        self.line: tuple[int, ...] = ()
        self._groups = [_accumulators(plan) for _ in range(plan.groups)]
        self._finite = FiniteCheck(plan.names, unread or Unread())
        self._measured: dict[str, Measured] = {}
        self._given: weakref.WeakSet[LaterState] = weakref.WeakSet()

    def accepts(self, batch: RowBatch) -> str:
        """Nothing: any batch can be summed up."""
        return ""

    def add(self, batch: RowBatch, *, first: int | None = None) -> None:
        """Add a batch, without gradients. Its sequences are numbered on from those before, or from ``first``.

        Raises ValueError if a layer is not finite at a kept position, and if the ``flattened`` view meets
        sequences of another length. Nothing is added then where looking at values costs nothing (on the CPU);
        elsewhere it is raised up to 64 batches later, or when the measures are read, and ever after.
        """
        with torch.no_grad():
            self._add(batch, self.numbers + batch.offset if first is None else first)

    def _add(self, batch: RowBatch, start: int) -> None:
        self._changes()
        averaged = any(held.kind == "mean_pooled" for held in self.plan.accumulators)
        batch = replace(batch, means=self._finite.check(batch, start, means=averaged))
        length = batch.first.shape[1]
        if self.plan.positions and length > self.plan.length:
            self.note([self.plan.longer])
        if "flattened" in self.plan.views and length != self.plan.length:
            self.adopt(self.plan.without_flattened(length))
        if late := [layer for layer in batch.missing if layer not in self.plan.missed]:
            self.adopt(self.plan.without(late))
        groups = self.plan.groups
        for group in range(groups):
            first = (group - start) % groups
            if first < batch.sequences:
                some = batch if groups == 1 else batch.some(slice(first, None, groups))
                for held in self.plan.accumulators:
                    if all(batch.layers[layer] is not None for layer in held.layers):
                        self._add_to(self._groups[group][held.name], held, some)
        self.sequences += batch.sequences
        self.numbers += batch.numbers
        self.line = () if batch.part is None else batch.part.ranks

    def adopt(self, plan: Plan) -> None:
        """Hold what is held as another plan parts it, whose streams are parts of this one's."""
        if plan.accumulators != self.plan.accumulators:
            olds = self.plan.accumulators
            for group, state in enumerate(self._groups):
                self._groups[group] = {
                    held.name: _part_of(state, olds, held, plan.pending_bytes) for held in plan.accumulators
                }
        self.plan = plan

    def note(self, sentences: Sequence[str]) -> None:
        """Let the result say these too."""
        self.plan = self.plan.noted(sentences)

    def _add_to(self, accumulator: MomentAccumulator, held: Held, batch: RowBatch) -> None:
        layers: list[Any] = [batch.layers[layer] for layer in held.layers]
        if len(held.widths) > len(layers):
            layers += batch.targets
        keep = batch.keeps[held.layers[0]]
        if held.kind == "mean_pooled":
            keeps = [batch.keeps[layer] for layer in held.layers]
            known = {k: batch.means[layer] for k, layer in enumerate(held.layers) if layer in batch.means}
            rows, some = means_of(layers, keeps + [keep] * (len(layers) - len(keeps)), known)
            narrow = all(x.dtype != torch.float64 for x in layers)
            accumulator.update(rows, some, finite=True, narrow=narrow)
        elif held.kind == "flattened":
            whole = None if keep is None else keep.all(1)
            accumulator.update([x.flatten(1) for x in layers], whole, finite=True)
        elif held.kind == "rest":
            followed = () if self.plan.from_end else self.plan.positions
            _add_rest(accumulator, layers, keep, {*followed})
        elif held.kind.startswith(CHOSEN):
            chosen = batch.chosen_of(int(held.kind.removeprefix(CHOSEN)), held.layers[0])
            _add_rest(accumulator, layers, chosen, set())
        else:
            self._add_positions(accumulator, held.kind, layers, keep, batch.masked)

    def _add_positions(
        self,
        accumulator: MomentAccumulator,
        kind: str,
        layers: list[Tensor],
        keep: Tensor | None,
        masked: Tensor | None,
    ) -> None:
        batch, length = layers[0].shape[:2]
        if keep is None and (self.plan.from_end or max(self.plan.positions) >= length):
            keep = torch.ones(batch, length, dtype=torch.bool, device=layers[0].device)
        at = None if keep is None or not self.plan.from_end else columns_of(self.plan.positions, keep)
        rows = [self._followed(x, at).transpose(0, 1) for x in layers]  # [P, B, d]
        kept = None if keep is None else self._followed(keep, at).T
        if at is not None and kept is not None:
            kept = kept & (at.T >= 0) & (length > at.T)
        if kind != "rows":
            assert masked is not None
            hidden = self._followed(masked, at).T
            wanted = hidden if kind == "hidden" else ~hidden
            kept = wanted if kept is None else wanted & kept
        accumulator.update(rows, kept, finite=True)

    def _followed(self, x: Tensor, at: Tensor | None) -> Tensor:
        """The followed positions of ``[B, T, ...]``, at the columns ``at[B, P]`` if there are any; what a
        shorter batch lacks is zero (and not kept)."""
        length = x.shape[1]
        if at is not None:
            index = sent(at, x.device).clamp(0, length - 1)
            return x.gather(1, index.reshape(*index.shape, *[1] * (x.dim() - 2)).expand(-1, -1, *x.shape[2:]))
        if len(self.plan.positions) == length == self.plan.length:
            return x
        inside = tuple(t for t in self.plan.positions if t < length)
        found = x[:, index_of(inside, x.device)]
        lacking = len(self.plan.positions) - len(inside)
        if not lacking:
            return found
        return torch.cat([found, found.new_zeros(found.shape[0], lacking, *found.shape[2:])], 1)

    def measures(self) -> Moments:
        """Itself: measures are read off the moments, on the CPU one view at a time."""
        self._finite.look()
        self._measured = {}
        settle([accumulator for state in self._groups for accumulator in state.values()])
        return self

    def measured(self, view: str) -> Measured:
        """The measures of a view."""
        if view not in self._measured:
            self._measured = self._measures_beside(view)
        return self._measured.pop(view)

    def _measures_beside(self, view: str) -> dict[str, Measured]:
        """Those of a view, and of the others that are better measured along with it."""
        if view == "flattened":
            found = [
                measure_moments(layers_of(moments, len(members)), spectra=False, uncentred=self.uncentred)
                for members, moments in self.moments_of(view)
            ]
            return {view: self._spread(view, found)}
        views, first = [view], next(iter(self._groups[0].values()))
        if waits_for(first.device):
            others = (other for other in self.plan.views if other not in (view, "flattened"))
            views += [other for other in others if self._streams(other) == self._streams(view)]
        measured = [
            measure_all(
                [layers_of(moments, len(members)) for members, moments in beside], uncentred=self.uncentred
            )
            for beside in zip(*(self.moments_of(one) for one in views), strict=True)
        ]
        by_view = zip(views, zip(*measured, strict=True), strict=True)
        return {one: self._spread(one, list(parts)) for one, parts in by_view}

    def by_group(self, view: str) -> ByGroup:
        """The measures without each group of sequences, and R² of the targets from these on the group."""
        left_out: list[list[Measured]] = []  # [streams][groups]
        targets, r2 = len(self.plan.targets), None
        for members in self._streams(view):
            folds, rest = self._folds(view, members)
            own = [layers_of(part, len(members)) for part in rest]
            left_out.append(measure_all(own, spectra=False, refine=False, uncentred=self.uncentred))
            if targets and view != "flattened":
                if r2 is None:
                    shape = (targets, len(self.plan.names), folds[0].count.numel())
                    unknown = torch.full(shape, torch.nan, dtype=torch.float64, device=folds[0].count.device)
                    r2 = unknown, unknown.clone()
                if len(folds[0].widths) > len(members):
                    for all_layers, some in zip(
                        r2, linear_r2(folds, rest, len(members), targets), strict=True
                    ):
                        all_layers[:, numbers(members, some.device)] = some
        return [self._spread(view, list(parts)) for parts in zip(*left_out, strict=True)], r2

    def moments_without(self, view: str) -> Iterator[tuple[tuple[int, ...], list[MomentAccumulator]]]:
        """The layers of each stream of a view, and its moments without each group; to be read only."""
        for members in self._streams(view):
            yield members, self._folds(view, members)[1]

    def _folds(
        self, view: str, members: tuple[int, ...]
    ) -> tuple[list[MomentAccumulator], list[MomentAccumulator]]:
        """The moments of a stream over each group, and over all sequences but those of each."""
        folds = [self._of_group(group, view, members, factors=False) for group in range(self.plan.groups)]
        return folds, list(all_but_one(folds, []))

    def _spread(self, view: str, parts: list[Measured]) -> Measured:
        """Measures of all layers from those of a view's streams."""
        return spread(parts, self._streams(view), len(self.plan.names))

    def _streams(self, view: str) -> list[tuple[int, ...]]:
        """The layers of each stream of a view."""
        kind = view if view in ("mean_pooled", "flattened") else None
        held = self.plan.accumulators
        found = [h.layers for h in held if h.kind == kind] if kind else self.plan.streams
        return list(found)

    def moments_of(self, view: str) -> Iterator[tuple[tuple[int, ...], MomentAccumulator]]:
        """The layers and moments of each stream of a view, leading shape ``[P]`` or ``()``, of all groups; to
        be read only."""
        for members in self._streams(view):
            groups = range(self.plan.groups)
            yield (
                members,
                joined_moments([self._of_group(group, view, members, factors=True) for group in groups]),
            )

    def _of_group(
        self, group: int, view: str, members: tuple[int, ...], *, factors: bool
    ) -> MomentAccumulator:
        """The moments of a view over one group; to be read only, since it may be the state itself."""
        own = {h.kind: self._groups[group][h.name] for h in self.plan.accumulators if h.layers == members}
        if view in ("mean_pooled", "flattened"):
            return own[view]
        if view in self.plan.rows:
            return own[f"{CHOSEN}{self.plan.rows.index(view)}"]
        if view in ("visible", "masked"):
            return own["seen" if view == "visible" else "hidden"]
        if view == "position" and "rows" in own:
            return own["rows"]
        if view == "pooled" and self.plan.from_end:
            return own["rest"]  # tokens may stand at two of the positions
        any_kind = next(iter(own.values()))
        parts = [own[kind] for kind in (*SPLIT, *WHOLE) if kind in own]
        if view == "pooled" and len(parts) == 1 and (factors or not parts[0].factored):
            return parts[0].pooled().merge(own["rest"])
        total = MomentAccumulator(pairs=any_kind.pairs_asked, factors=any_kind.factored if factors else ())
        for part in parts:
            total.merge(part)
        if view == "pooled":
            total = total.pooled().merge(own["rest"])
        return total

    def merge(self, other: Moments) -> None:
        """Add all that ``other`` has seen, its sequences numbered on from the own. Its plan must ask for the
        same."""
        self._changes()
        self._finite.look()
        other._finite.look()
        if self.plan.missed != other.plan.missed:
            self.adopt(self.plan.without(other.plan.missed))
            other.adopt(other.plan.without(self.plan.missed))
        for group, theirs in enumerate(other._groups):
            mine = self._groups[(group + self.numbers) % self.plan.groups]
            for kind, accumulator in mine.items():
                accumulator.merge(theirs[kind])
        self.sequences += other.sequences
        self.numbers += other.numbers

    def parts(self) -> Iterator[dict[str, np.ndarray[Any, Any]]]:
        """All moments as :meth:`state` names them, one accumulator at a time."""
        self._finite.look()
        for state in self._groups:
            for accumulator in state.values():
                yield accumulator.state_dict()

    def merge_parts(
        self,
        sequences: int,
        parts: Iterator[Mapping[str, np.ndarray[Any, Any]]],
        device: torch.device | str,
        *,
        shift: int,
    ) -> None:
        """:meth:`merge` with a state of the same plan that comes as :meth:`parts`, whose sequence 0 has the
        number ``shift`` here."""
        self._changes()
        for group in range(self.plan.groups):
            mine = self._groups[(group + shift) % self.plan.groups]
            for held in self.plan.accumulators:
                other = _accumulator(held, self.plan.pending_bytes)
                other.load_state_dict(next(parts), device)
                mine[held.name].merge(other)
        self.sequences += sequences

    def load_parts(
        self, sequences: int, parts: Iterator[Mapping[str, np.ndarray[Any, Any]]], device: torch.device | str
    ) -> None:
        """:meth:`load` of a state of the same plan that comes as :meth:`parts`."""
        self._changes()
        for state in self._groups:
            for accumulator in state.values():
                accumulator.load_state_dict(next(parts), device)
        self.sequences = self.numbers = sequences
        self.line = ()

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for state in self._groups for a in state.values())

    def state(self) -> dict[str, np.ndarray[Any, Any]]:
        """All moments as named arrays, rows not yet summed included."""
        self._finite.look()
        arrays: dict[str, np.ndarray[Any, Any]] = {"sequences": np.array(self.sequences)}
        if self.line:
            arrays |= {"numbers": np.array(self.numbers), "line": np.array(self.line)}
        for group, state in enumerate(self._groups):
            for kind, accumulator in state.items():
                for name, value in accumulator.state_dict().items():
                    arrays[f"{group}.{kind}.{name}"] = value
        return arrays

    def later(self) -> LaterState:
        """:meth:`state` as it is now, copied when it is asked for, or before anything changes here."""
        given = LaterState(self.state, next(iter(self._groups[0].values())).device)
        self._given.add(given)
        return given

    def _changes(self) -> None:
        """Copy what was promised of the state as it still is."""
        for given in list(self._given):
            given()
        self._given.clear()

    def load(self, arrays: Mapping[str, np.ndarray[Any, Any]], device: torch.device | str = "cpu") -> None:
        """Replace all moments by what :meth:`state` returned for the same plan."""
        self._changes()
        self.sequences = int(arrays["sequences"])
        self.numbers = int(arrays.get("numbers", arrays["sequences"]))
        self.line = tuple(map(int, arrays.get("line", ())))
        for group, state in enumerate(self._groups):
            for kind, accumulator in state.items():
                prefix = f"{group}.{kind}."
                own = {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}
                accumulator.load_state_dict(own, device)


def _accumulators(plan: Plan) -> dict[str, MomentAccumulator]:
    """What one group holds, empty."""
    return {held.name: _accumulator(held, plan.pending_bytes) for held in plan.accumulators}


def _accumulator(held: Held, pending: int) -> MomentAccumulator:
    return MomentAccumulator(pairs=held.pairs, pending_bytes=pending, factors=held.factors)


def _part_of(
    state: Mapping[str, MomentAccumulator], olds: Sequence[Held], held: Held, pending: int
) -> MomentAccumulator:
    """What ``state``, of the accumulators ``olds``, holds of the layers of ``held``."""
    old = next(o for o in olds if o.kind == held.kind and {*held.layers} <= {*o.layers})
    if old.layers == held.layers:
        return state[old.name]
    if not state[old.name].widths:  # nothing was added yet
        return _accumulator(held, pending)
    at = [old.layers.index(layer) for layer in held.layers]
    at += range(len(old.layers), len(old.widths))  # the targets
    return _accumulator(held, pending).merge(state[old.name].only(at))


def layers_of(moments: MomentAccumulator, layers: int) -> MomentAccumulator:
    """Without the targets."""
    return moments if len(moments.widths) <= layers else moments.only(range(layers))


def _add_rest(rest: MomentAccumulator, layers: list[Tensor], keep: Tensor | None, followed: set[int]) -> None:
    batch, length = layers[0].shape[:2]
    others = tuple(t for t in range(length) if t not in followed)
    if not others:
        return

    def rest_of(x: Tensor) -> Tensor:
        return x[:, index_of(others, x.device)] if followed else x

    x = [rest_of(layer).reshape(batch * len(others), -1) for layer in layers]
    kept = None if keep is None else rest_of(keep).reshape(-1)
    if kept is not None and not waits_for(kept.device):
        # Rows that do not count are left out rather than masked: how far a batch is padded depends on how the
        # sequences were batched, and the bits must not. Elsewhere the number of rows is not known here.
        x, kept = [layer[kept] for layer in x], None
    rest.update(x, kept, finite=True)
