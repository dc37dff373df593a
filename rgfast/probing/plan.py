"""What a probe will hold and compute, decided on the first batch's shapes and said before the run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

from rgfast.probing.options import (
    POSITIONAL,
    asked_views,
    checked_indices,
    default_views,
    human_bytes,
    index_of,
)
from rgfast.streaming import Pairs, block_rows, first_block, pair_keys, state_bytes

__all__ = ["CHOSEN", "SPLIT", "WHOLE", "Held", "Plan", "make_plan"]

SPLIT, WHOLE = ("seen", "hidden"), ("rows",)
# Kinds of accumulators of the views of rows=, by their number.
CHOSEN = "chosen"

_FLATTENED_WIDTH = 1024  # above this the flattened view is only taken when asked for
_PENDING_BYTES = 256 << 20
UNALIGNED = "layers differ in their positions: the mean_pooled view compares them, pooled ranks are of each"
_MISSED = "did not run in some batches: "
_REFINED_WIDTH = 512  # above this a decomposition costs too much to take unasked


@dataclass(frozen=True)
class Held:
    """One accumulator of a plan: its kind, the plan's layers in it, number of positions, widths (targets
    last), pairs and layers with factors by their number here, and whether every sum is a launch.

    ``name`` tells accumulators of one kind apart.
    """

    name: str
    kind: str
    layers: tuple[int, ...]
    positions: int
    widths: tuple[int, ...]
    pairs: tuple[tuple[int, int], ...]
    factors: tuple[int, ...]
    launched: bool = False

    def bytes(self, pending: int) -> int:
        """Moments, and at most ``pending`` bytes (but for very wide rows) of rows not yet summed, in fp64."""
        return self.moment_bytes + self._row_bytes * self._block(pending)

    @property
    def moment_bytes(self) -> int:
        """Moments alone."""
        return state_bytes(self.widths, self.positions, self.pairs, self.factors)

    def open_bytes(self, rows: int, pending: int) -> int:
        """Rows that are not yet summed after ``rows`` per position."""
        return self._row_bytes * (rows % self._block(pending))

    @property
    def _row_bytes(self) -> int:
        """A row at every position, in fp64, and whether it counts."""
        return self.positions * (8 * sum(self.widths) + 1)

    def flops_per_row(self, pending: int) -> float:
        """For one row at one position; at most, since factors are dropped where they are not needed."""
        block, sizes = self._block(pending), [self.widths[layer] + 1 for layer in self.factors]
        # Householder QR of k + b rows of k columns: 2 k² (b + 2k/3).
        factors = sum(2 * k * k * (1 + 2 * k / (3 * block)) for k in sizes)
        return 2.0 * state_bytes(self.widths, 1, self.pairs) / 8 + factors

    def _block(self, pending: int) -> int:
        most = first_block(self.positions, self.widths, self.factors, launched=self.launched)
        return block_rows(self.positions, self.widths, pending, most)


@dataclass(frozen=True)
class Plan:
    """Layers, positions and views of one probe, and their cost.

    ``positions`` are those followed one by one, of ``length`` in all (the first batch's); the others count in
    the pooled view only. ``targets`` are (name, width). ``pending_bytes`` is what each accumulator may hold
    back until a block of rows is full. ``refine`` says which layers have triangular factors (see
    :mod:`rgfast.streaming.factors`): all (True), none (False), or those up to 512 wide (None).

    ``places`` numbers the places that layers have their rows at (none: all have the same): two layers at the
    same places can be compared row by row. ``aligned`` says that all layers have as many positions.
    ``from_end`` says that negative positions are counted from each sequence's last token that counts (else
    there are none); ``columns`` are where these stand in a sequence of full length.
    ``missed`` are layers that did not run in some batch, so that they have fewer rows than the others.
    ``launched`` says that rows are on a device where every sum is a launch, so that more are held back.
    ``rows`` names the selections that batches come with, of which ``views`` has some.
    """

    names: tuple[str, ...]
    widths: tuple[int, ...]
    length: int
    positions: tuple[int, ...]
    views: tuple[str, ...]
    views_asked: bool
    pairs: Pairs
    groups: int
    targets: tuple[tuple[str, int], ...] = ()
    pending_bytes: int = 0
    refine: bool | None = False
    notes: tuple[str, ...] = ()
    places: tuple[int, ...] = ()
    aligned: bool = True
    missed: tuple[int, ...] = ()
    from_end: bool = False
    launched: bool = False
    rows: tuple[str, ...] = ()

    def to_json(self, **extra: Any) -> str:
        """Everything that decides what is measured, as JSON."""
        return json.dumps({**{field.name: getattr(self, field.name) for field in fields(self)}, **extra})

    @classmethod
    def from_json(cls, text: str) -> tuple[Plan, dict[str, Any]]:
        """The plan that :meth:`to_json` wrote, and what was added to it."""
        data = json.loads(text)
        own = {field.name: data.pop(field.name) for field in fields(cls) if field.name in data}
        return cls(**{name: _as_tuple(value) for name, value in own.items()}), data

    @property
    def columns(self) -> tuple[int, ...]:
        """The columns of ``positions`` in a sequence of full length, their names in the result."""
        return tuple(t if t >= 0 else self.length + t for t in self.positions)

    def without(self, layers: Sequence[int]) -> Plan:
        """The plan in which ``layers`` missed some batch too, each a stream of its own."""
        missed = tuple(sorted({*self.missed, *layers}))
        if missed == self.missed:
            return self
        notes = [note for note in self.notes if not note.startswith(_MISSED)]
        names = ", ".join(self.names[layer] for layer in missed)
        note = f"{_MISSED}{names}; they have fewer rows, and no drift or CKA beside other layers"
        return replace(self, missed=missed, notes=(*notes, note))

    @cached_property
    def streams(self) -> tuple[tuple[int, ...], ...]:
        """The layers that have their rows at the same places, as one stream each."""
        places = self.places or (0,) * len(self.widths)
        together = [tuple(k for k, at in enumerate(places) if at == one) for one in sorted(set(places))]
        return tuple(part for members in together for part in self._parted(members))

    @cached_property
    def accumulators(self) -> tuple[Held, ...]:
        """What each group of sequences holds; layers come first, targets after them."""
        held = []
        for members in self.streams:
            if self.positions:
                # With a mask the rows go to one of two states; the position view is their sum.
                kinds = SPLIT if {"visible", "masked"} & set(self.views) else WHOLE
                held += [self._one(kind, members, len(self.positions)) for kind in kinds]
            if "pooled" in self.views:
                held.append(self._one("rest", members, 1))
            if "flattened" in self.views:
                held.append(self._one("flattened", members, 1))
            held += [self._one(f"{CHOSEN}{number}", members, 1) for number in self.chosen]
        if "mean_pooled" in self.views:
            everything = tuple(range(len(self.widths)))
            held += [self._one("mean_pooled", members, 1) for members in self._parted(everything)]
        return tuple(held)

    @property
    def chosen(self) -> dict[int, str]:
        """The views of ``rows=`` by the number of their selection."""
        return {number: name for number, name in enumerate(self.rows) if name in self.views}

    def _parted(self, members: tuple[int, ...]) -> list[tuple[int, ...]]:
        """``members``, each layer that missed a batch by itself."""
        rest = tuple(layer for layer in members if layer not in self.missed)
        alone: list[tuple[int, ...]] = [(layer,) for layer in members if layer in self.missed]
        return [rest, *alone] if rest else alone

    def _one(self, kind: str, members: tuple[int, ...], positions: int) -> Held:
        number, times = len(members), self.length if kind == "flattened" else 1
        # Targets stand at the places of the first layer; for others they are known by sequence alone.
        with_targets = kind != "flattened" and (self.aligned or kind == "mean_pooled")
        targets = tuple(width for _, width in self.targets) if with_targets else ()
        new = {layer: k for k, layer in enumerate(members)}
        pairs = [
            (new[i], new[j])
            for i, j in pair_keys(self.pairs, len(self.widths))
            if i != j and {i, j} <= {*new}
        ]
        pairs += [(i, j) for i in range(number) for j in range(number, number + len(targets))]
        return Held(
            name=kind if number == len(self.widths) else f"{kind}.{members[0]}",
            kind=kind,
            layers=members,
            positions=positions,
            widths=tuple(times * self.widths[layer] for layer in members) + targets,
            pairs=tuple(pairs),
            factors=tuple(new[layer] for layer in members if self._refines(times * self.widths[layer])),
            launched=self.launched,
        )

    def _refines(self, width: int) -> bool:
        """Whether a layer whose rows are so wide has factors."""
        return width <= _REFINED_WIDTH if self.refine is None else self.refine

    @property
    def state_bytes(self) -> int:
        """Bytes held, at most, for any number of samples."""
        return self.groups * sum(held.bytes(self.pending_bytes) for held in self.accumulators)

    @property
    def flops_per_sequence(self) -> float:
        """What measuring adds to the model's forward, for one sequence."""
        return sum(
            h.flops_per_row(self.pending_bytes) * self.rows_of(h) * h.positions for h in self.accumulators
        )

    def rows_of(self, held: Held) -> int:
        """Rows that a sequence adds to an accumulator, at each of its positions; at most."""
        if held.kind == "rest":
            return self.length - (0 if self.from_end else len(self.positions))
        return self.length if held.kind.startswith(CHOSEN) else 1

    @property
    def longer(self) -> str:
        """What has to be said if sequences have more positions than the first ones."""
        rest = "count in the pooled view only" if "pooled" in self.views else "are left out"
        return f"the first batch had {self.length} positions; further ones of longer sequences {rest}"

    def without_flattened(self, length: int) -> Plan:
        """The plan without the ``flattened`` view, since sequences have another ``length`` too.

        Raises ValueError if the view was asked for.
        """
        found = f"sequences of one length, got {length} after {self.length}"
        if self.views_asked:
            raise ValueError(f"views: 'flattened' needs {found}; leave it out of views=")
        views = tuple(view for view in self.views if view != "flattened")
        notes = (*self.notes, f"the flattened view was dropped: it needs {found}")
        return replace(self, views=views, notes=notes)

    def noted(self, sentences: Sequence[str]) -> Plan:
        """The plan with these notes too."""
        new = [sentence for sentence in sentences if sentence not in self.notes]
        return replace(self, notes=(*self.notes, *new)) if new else self

    @property
    def what(self) -> str:
        """Layers, positions and views in words."""
        followed = len(self.positions)
        where = f"all {self.length}" if followed == self.length else f"{followed} of {self.length}"
        widths = sorted(set(self.widths))
        width = str(widths[0]) if len(widths) == 1 else f"{widths[0]} to {widths[-1]}"
        return f"{len(self.names)} layers (width {width}), {where} positions, views {', '.join(self.views)}"

    def __str__(self) -> str:
        targets = f", targets {', '.join(name for name, _ in self.targets)}" if self.targets else ""
        groups = f", {self.groups} groups" if self.groups > 1 else ""
        cost = f"{human_bytes(self.state_bytes)} of state, {self.flops_per_sequence:.3g} flops a sequence"
        return "\n".join([f"{self.what}{targets}{groups}: at most {cost}", *self.notes])


def make_plan(
    names: Sequence[str],
    widths: Sequence[int],
    length: int,
    *,
    positions: str | Sequence[int | str],
    views: Sequence[str] | None,
    pairs: Pairs,
    groups: int,
    memory: int,
    masked: bool,
    aligned: bool = True,
    places: Sequence[int] = (),
    padded: bool = False,
    targets: Sequence[tuple[str, int]] = (),
    rows: Sequence[str] = (),
    refine: bool | None = None,
    launched: bool = False,
    notes: Sequence[str] = (),
) -> Plan:
    """The :class:`Plan` that fits ``memory``; ``aligned`` says whether all layers have the same positions.

    With ``refine=None`` factors give way to positions, and are left out where they do not fit. Raises
    ValueError, naming the change to make, where what was asked for does not fit.
    """
    if not isinstance(positions, str) and aligned:  # of views without positions, too
        checked_indices(positions, length)
    defaults = default_views(length, masked, aligned)
    plan = Plan(
        names=tuple(names),
        widths=tuple(widths),
        length=length,
        positions=(),
        views=(*defaults, *rows) if views is None else asked_views(views, masked, aligned, rows),
        views_asked=views is not None,
        pairs=pairs,
        groups=groups,
        targets=tuple(targets),
        rows=tuple(rows),
        refine=refine,
        places=tuple(places),
        aligned=aligned,
        launched=launched,
        from_end=padded and not isinstance(positions, str) and any(index_of(t) < 0 for t in positions),
        notes=tuple(notes) if aligned else (*notes, UNALIGNED),
    )
    if refine is not None:
        return _fitted(plan, positions, memory)
    try:
        with_factors = _fitted(plan, positions, memory)
        if positions != "auto" or len(with_factors.positions) in (0, length):
            return with_factors
    except ValueError:
        pass
    note = "small singular values are not refined: their factors do not fit the memory"
    return _fitted(replace(plan, refine=False, notes=(*plan.notes, note)), positions, memory)


def _fitted(plan: Plan, positions: str | Sequence[int | str], memory: int) -> Plan:
    """The plan with its positions and what it may hold back; without ``flattened`` where that is large."""
    follow = any(view in POSITIONAL for view in plan.views)
    plan = replace(plan, positions=(0,) if follow else ())
    plan = _with_pending(plan, memory)
    if not plan.views_asked and "flattened" in plan.views:
        bare = replace(plan, views=tuple(view for view in plan.views if view != "flattened"))
        small = plan.state_bytes - bare.state_bytes <= memory / 4
        plan = plan if small and plan.length * max(plan.widths) <= _FLATTENED_WIDTH else bare
        if plan.launched:  # on the CPU bits depend on it
            plan = _with_pending(plan, memory)
    if follow:
        plan = _with_positions(plan, positions, memory)
    if plan.state_bytes > memory and not plan.aligned and not plan.views_asked and "pooled" in plan.views:
        note = "the pooled view was dropped: its moments do not fit the memory"
        plan = replace(plan, views=("mean_pooled",), notes=(*plan.notes, note))
    if plan.state_bytes > memory:
        raise ValueError(_too_big(plan, memory))
    return plan


def _with_pending(plan: Plan, memory: int) -> Plan:
    """The plan in which rows not yet summed may take an eighth of ``memory``."""
    held = max(1, len(plan.accumulators)) * plan.groups
    return replace(plan, pending_bytes=min(_PENDING_BYTES, memory // (8 * held)))


def _as_tuple(value: Any) -> Any:
    return tuple(_as_tuple(item) for item in value) if isinstance(value, list) else value


def _with_positions(plan: Plan, positions: str | Sequence[int | str], memory: int) -> Plan:
    length = plan.length
    if not isinstance(positions, str):
        return _with_indices(plan, positions)
    picked = tuple(range(length))
    if positions == "auto":
        picked = _fitting(plan, memory)
    if len(picked) < length:
        rest = "the others count in the pooled view" if "pooled" in plan.views else "the others are left out"
        note = f"{len(picked)} log-spaced positions of {length} fit the memory; {rest}"
        plan = replace(plan, notes=(*plan.notes, note))
    return replace(plan, positions=picked)


def _with_indices(plan: Plan, positions: Sequence[int | str]) -> Plan:
    length, wanted = plan.length, checked_indices(positions, plan.length)
    columns = sorted({t if t >= 0 else length + t for t in wanted})
    if not plan.from_end:
        return replace(plan, positions=tuple(columns))
    if len(columns) < len(wanted):
        raise ValueError(
            f"positions must not name one column twice, from the start and from the end of {length}, got "
            f"{list(positions)}"
        )
    ends = ", ".join(
        f"position {length + t} is each sequence's {'last' if t == -1 else f'{-t}th last'} token that counts"
        for t in sorted(wanted)
        if t < 0
    )
    ordered = sorted(wanted, key=lambda t: t if t >= 0 else length + t)
    return replace(plan, positions=tuple(ordered), notes=(*plan.notes, ends))


def _fitting(plan: Plan, memory: int) -> tuple[int, ...]:
    """As many positions as fit: all, else log-spaced ones."""
    low, high = 0, plan.length
    while low < high:
        middle = (low + high + 1) // 2
        fits = replace(plan, positions=tuple(range(middle))).state_bytes <= memory
        low, high = (middle, high) if fits else (low, middle - 1)
    if low == 0:
        raise ValueError(_too_big(plan, memory))
    return tuple(range(plan.length)) if low == plan.length else _log_spaced(plan.length, low)


def _log_spaced(length: int, number: int) -> tuple[int, ...]:
    """At most ``number`` of 0 … length−1, dense at the start, first and last included where two fit."""
    best: tuple[int, ...] = (0,)
    for steps in range(2, 4 * number):
        found = {min(round(length ** (k / (steps - 1))) - 1, length - 1) for k in range(steps)}
        if len(found) > number:
            break
        best = tuple(sorted(found))
    return best


def _too_big(plan: Plan, memory: int) -> str:
    changes = []
    if plan.pairs == "all":
        changes.append("pairs='adjacent'")
    if plan.groups > 1:
        changes.append("fewer groups")
    if "flattened" in plan.views:
        changes.append("views without 'flattened'")
    if plan.refine:
        changes.append("refine=False")
    if len(plan.positions) > 1:
        changes.append("fewer positions (positions='auto')")
    elif plan.positions and set(plan.views) - set(POSITIONAL):
        changes.append("views=('pooled', 'mean_pooled')")
    if plan.chosen:
        changes.append("fewer selections in rows=")
    changes.append("fewer layers")
    number = len(plan.positions)
    what = f"{number} position{'s' * (number != 1)}" if number else "the views"
    return (
        f"memory: {what} of {len(plan.names)} layers need {human_bytes(plan.state_bytes)}, and memory allows "
        f"{human_bytes(memory)}; raise memory= or take {' or '.join(changes)}"
    )
