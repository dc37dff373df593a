"""The streaming state of a probe: for every view the moments of every layer, by group of sequences."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rgfast.probing.estimators.base import ByGroup, RowBatch
from rgfast.probing.measures import Measured, measure
from rgfast.probing.plan import SPLIT, WHOLE, Plan
from rgfast.probing.targets import linear_r2
from rgfast.streaming import MomentAccumulator, NonFiniteError, check_finite

__all__ = ["Moments"]


class Moments:
    """The estimator that sums up moments by view: memory does not depend on the number of sequences.

    Held are the rows at followed positions (two states where the sequences have a mask, seen and hidden), the
    rows at all other positions as one cloud, the means over positions, and whole sequences as one row. The
    ``position`` and ``pooled`` views are sums of these, made when read. Sequence number i goes to group i mod
    G.
    """

    route = "moments"

    def __init__(self, plan: Plan, *, masked: bool) -> None:
        self.plan, self.masked = plan, masked
        self.sequences = 0
        self._groups = [_accumulators(plan) for _ in range(plan.groups)]
        self._held = [kind for kind in (*SPLIT, *WHOLE) if kind in self._groups[0]]

    def accepts(self, batch: RowBatch) -> str:
        """Nothing: any batch can be summed up."""
        return ""

    def add(self, batch: RowBatch) -> None:
        """Add a batch, without gradients.

        Raises ValueError if a layer is not finite at a kept position, before anything is added, and if the
        ``flattened`` view meets sequences of another length.
        """
        with torch.no_grad():
            self._update(batch.layers, batch.keep, batch.masked, batch.targets)

    def _update(
        self,
        layers: Sequence[Tensor],
        keep: Tensor | None,
        masked: Tensor | None,
        targets: Sequence[Tensor],
    ) -> None:
        batch = layers[0].shape[0]
        self.check(layers, keep, self.sequences)
        length = layers[0].shape[1]
        if self._held and length > self.plan.length:
            self._note_longer()
        if "flattened" in self.plan.views and length != self.plan.length:
            self._drop_flattened(length)
        groups = self.plan.groups
        for group in range(groups):
            first = (group - self.sequences) % groups
            part = slice(first, None, groups)
            if first < batch:
                self._add(
                    self._groups[group],
                    [x[part] for x in (*layers, *targets)],
                    None if keep is None else keep[part],
                    None if masked is None else masked[part],
                )
        self.sequences += batch

    def check(self, layers: Sequence[Tensor], keep: Tensor | None, seen: int) -> None:
        """Raise ValueError where a layer of the batch after ``seen`` sequences is not finite."""
        aligned = len({x.shape[1] for x in layers}) == 1
        for index, x in enumerate(layers):
            self._check_finite(index, x, keep if aligned or x.shape[1] == layers[0].shape[1] else None, seen)

    def _note_longer(self) -> None:
        rest = "count in the pooled view only" if "pooled" in self.plan.views else "are left out"
        note = f"the first batch had {self.plan.length} positions; further ones of longer sequences {rest}"
        if note not in self.plan.notes:
            self.plan = replace(self.plan, notes=(*self.plan.notes, note))

    def _drop_flattened(self, length: int) -> None:
        found = f"sequences of one length, got {length} after {self.plan.length}"
        if self.plan.views_asked:
            raise ValueError(f"views: 'flattened' needs {found}; leave it out of views=")
        views = tuple(view for view in self.plan.views if view != "flattened")
        notes = (*self.plan.notes, f"the flattened view was dropped: it needs {found}")
        self.plan = replace(self.plan, views=views, notes=notes)
        for state in self._groups:
            del state["flattened"]

    def _add(
        self,
        state: dict[str, MomentAccumulator],
        layers: list[Tensor],
        keep: Tensor | None,
        masked: Tensor | None,
    ) -> None:
        batch, length = layers[0].shape[:2]
        if self._held:
            rows = [self._followed(x).transpose(0, 1) for x in layers]  # [P, B, d]
            missing = max(self.plan.positions) >= length
            if keep is None and missing:
                keep = torch.ones(batch, length, dtype=torch.bool, device=layers[0].device)
            kept = None if keep is None else self._followed(keep).T
            if "seen" in state:
                assert masked is not None
                hidden = self._followed(masked).T
                seen = ~hidden if kept is None else ~hidden & kept
                state["seen"].update(rows, seen, finite=True)
                state["hidden"].update(rows, hidden if kept is None else hidden & kept, finite=True)
            else:
                state["rows"].update(rows, kept, finite=True)
        if "rest" in state:
            self._add_rest(state["rest"], layers, keep)
        if "mean_pooled" in state:
            self._add_means(state["mean_pooled"], layers, keep)
        if "flattened" in state:
            whole = None if keep is None else keep.all(1)
            rows = [x.flatten(1) for x in layers[: len(self.plan.widths)]]
            state["flattened"].update(rows, whole, finite=True)

    def _add_rest(self, rest: MomentAccumulator, layers: list[Tensor], keep: Tensor | None) -> None:
        batch, length = layers[0].shape[:2]
        followed = set(self.plan.positions)
        others = [t for t in range(length) if t not in followed]
        if not others:
            return
        # Rows that do not count are left out rather than masked: how far a batch is padded depends on how the
        # sequences were batched, and the bits must not.
        x = [layer[:, others].reshape(batch * len(others), -1) for layer in layers]
        if keep is not None:
            kept = keep[:, others].reshape(-1)
            x = [layer[kept] for layer in x]
        rest.update(x, finite=True)

    def _add_means(self, means: MomentAccumulator, layers: list[Tensor], keep: Tensor | None) -> None:
        rows, some = [], None
        for x in layers:
            wide = x.to(torch.float64)
            if keep is None or keep.shape[1] != x.shape[1]:
                rows.append(wide.sum(1) / x.shape[1])
                continue
            number = keep.sum(1, keepdim=True)
            some = number[:, 0] > 0
            total = wide.masked_fill(~keep[..., None], 0.0).sum(1)
            rows.append(total / number.clamp_min(1))
        means.update(rows, some, finite=True)

    def _followed(self, x: Tensor) -> Tensor:
        """The followed positions of ``[B, T, ...]``; what a shorter batch lacks is zero (and not kept)."""
        length = x.shape[1]
        if len(self.plan.positions) == length == self.plan.length:
            return x
        inside = [t for t in self.plan.positions if t < length]
        found = x[:, inside]
        lacking = len(self.plan.positions) - len(inside)
        if not lacking:
            return found
        return torch.cat([found, found.new_zeros(found.shape[0], lacking, *found.shape[2:])], 1)

    def _check_finite(self, index: int, x: Tensor, keep: Tensor | None, seen: int) -> None:
        try:
            check_finite(x.transpose(0, 1), None if keep is None else keep.T, index)
        except NonFiniteError as error:
            where = f" at position {error.position[0]}" if x.shape[1] > 1 else ""
            last = seen + x.shape[0] - 1
            raise ValueError(
                f"activations must be finite, got {error.count} NaN or infinite values in layer "
                f"{index}{where} ({self.plan.names[index]}, sequences {seen} to {last})"
            ) from error

    def moments(self, view: str) -> MomentAccumulator:
        """The moments of a view, leading shape ``[P]`` or ``()``, of all groups; to be read only."""
        return _joined([self._of_group(group, view, factors=True) for group in range(self.plan.groups)])

    def measures(self) -> Moments:
        """Itself: measures are read off the moments one view at a time."""
        return self

    def measured(self, view: str) -> Measured:
        """The measures of a view."""
        return measure(self._layers_of(self.moments(view)), spectra=view != "flattened")

    def by_group(self, view: str) -> ByGroup:
        """The measures without each group of sequences, and R² of the targets from these on the group."""
        folds, rest = self._folds(view)
        left_out = [measure(self._layers_of(part), spectra=False, refine=False) for part in rest]
        if not self.plan.targets or view == "flattened":
            return left_out, None
        return left_out, linear_r2(folds, rest, len(self.plan.names), len(self.plan.targets))

    def _layers_of(self, moments: MomentAccumulator) -> MomentAccumulator:
        """Without the targets."""
        layers = len(self.plan.names)
        return moments if len(moments.widths) == layers else moments.only(range(layers))

    def _folds(self, view: str) -> tuple[list[MomentAccumulator], list[MomentAccumulator]]:
        """The moments of a view by group, and of all groups but one; to be read only, without factors."""
        parts = [self._of_group(group, view, factors=False) for group in range(self.plan.groups)]
        return parts, list(_all_but_one(parts, []))

    def _of_group(self, group: int, view: str, *, factors: bool) -> MomentAccumulator:
        """The moments of a view over one group; to be read only, since it may be the state itself."""
        state = self._groups[group]
        if view in ("mean_pooled", "flattened"):
            return state[view]
        if view in ("visible", "masked"):
            return state["seen" if view == "visible" else "hidden"]
        if view == "position" and "rows" in state:
            return state["rows"]
        any_kind = next(iter(state.values()))
        total = MomentAccumulator(pairs=any_kind.pairs_asked, factors=any_kind.factored if factors else ())
        for kind in self._held:
            total.merge(state[kind])
        if view == "pooled":
            total = total.pooled().merge(state["rest"])
        return total

    def merge(self, other: Moments) -> None:
        """Add all that ``other`` has seen, its sequences numbered on from the own. Its plan must ask for the
        same."""
        for group, theirs in enumerate(other._groups):
            mine = self._groups[(group + self.sequences) % self.plan.groups]
            for kind, accumulator in mine.items():
                accumulator.merge(theirs[kind])
        self.sequences += other.sequences

    def parts(self) -> Iterator[dict[str, np.ndarray[Any, Any]]]:
        """All moments as :meth:`state` names them, one accumulator at a time."""
        for state in self._groups:
            for accumulator in state.values():
                yield accumulator.state_dict()

    def merge_parts(
        self, sequences: int, parts: Iterator[Mapping[str, np.ndarray[Any, Any]]], device: torch.device | str
    ) -> None:
        """:meth:`merge` with a state of the same plan that comes as :meth:`parts`."""
        for group in range(self.plan.groups):
            mine = self._groups[(group + self.sequences) % self.plan.groups]
            for kind, other in _accumulators(self.plan).items():
                other.load_state_dict(next(parts), device)
                mine[kind].merge(other)
        self.sequences += sequences

    def load_parts(
        self, sequences: int, parts: Iterator[Mapping[str, np.ndarray[Any, Any]]], device: torch.device | str
    ) -> None:
        """:meth:`load` of a state of the same plan that comes as :meth:`parts`."""
        for state in self._groups:
            for accumulator in state.values():
                accumulator.load_state_dict(next(parts), device)
        self.sequences = sequences

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for state in self._groups for a in state.values())

    def state(self) -> dict[str, np.ndarray[Any, Any]]:
        """All moments as named arrays, rows not yet summed included."""
        arrays: dict[str, np.ndarray[Any, Any]] = {"sequences": np.array(self.sequences)}
        for group, state in enumerate(self._groups):
            for kind, accumulator in state.items():
                for name, value in accumulator.state_dict().items():
                    arrays[f"{group}.{kind}.{name}"] = value
        return arrays

    def load(self, arrays: Mapping[str, np.ndarray[Any, Any]], device: torch.device | str = "cpu") -> None:
        """Replace all moments by what :meth:`state` returned for the same plan."""
        self.sequences = int(arrays["sequences"])
        for group, state in enumerate(self._groups):
            for kind, accumulator in state.items():
                prefix = f"{group}.{kind}."
                own = {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}
                accumulator.load_state_dict(own, device)


def _accumulators(plan: Plan) -> dict[str, MomentAccumulator]:
    """What one group holds, empty."""
    return {
        held.kind: MomentAccumulator(pairs=held.pairs, pending_bytes=plan.pending_bytes, factors=held.factors)
        for held in plan.accumulators
    }


def _all_but_one(
    parts: Sequence[MomentAccumulator], more: list[MomentAccumulator]
) -> Iterator[MomentAccumulator]:
    """All of ``parts`` but one, for every one in order, and ``more``; in G log G steps for G parts."""
    if len(parts) == 1:
        yield _joined(more, factors=False)
        return
    half = len(parts) // 2
    for mine, others in ((parts[:half], parts[half:]), (parts[half:], parts[:half])):
        yield from _all_but_one(mine, [_joined([*more, *others], factors=False)])


def _joined(parts: Sequence[MomentAccumulator], *, factors: bool = True) -> MomentAccumulator:
    """All of them as one; the only one itself."""
    if len(parts) == 1:
        return parts[0]
    total = MomentAccumulator(pairs=parts[0].pairs_asked, factors=parts[0].factored if factors else ())
    for part in parts:
        total.merge(part)
    return total
