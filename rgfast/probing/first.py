"""What the first batch shows, and the plan that follows from it."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rgfast.probing.options import human_bytes
from rgfast.probing.plan import Plan, make_plan
from rgfast.probing.spec import ProbeSpec

__all__ = ["FirstBatch", "plan_of", "room", "unbounded_plan"]

_UNREFINED = (
    "small singular values are not refined, which would cost more than all else on this device; "
    "effective_rank_bound says what is known, and refine=True refines them"
)


@dataclass(frozen=True)
class FirstBatch:
    """What a plan is made from: widths of layers, positions, and (name, width, has labels) of targets.

    ``free`` are the bytes that the device has, None where nobody counts them, and ``factors`` says whether it
    computes triangular factors at a fair price.
    """

    widths: tuple[int, ...]
    length: int
    aligned: bool
    places: tuple[int, ...]
    padded: bool
    masked: bool
    targets: tuple[tuple[str, int, bool], ...]
    free: int | None = None
    factors: bool = True

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> FirstBatch:
        """What ``asdict`` gave, after JSON."""
        targets = tuple((name, width, labels) for name, width, labels in data["targets"])
        lists = {name: tuple(data[name]) for name in ("widths", "places")}
        return cls(**{**data, **lists, "targets": targets})


def room(first: FirstBatch, spec: ProbeSpec) -> int:
    """Bytes that ``memory`` allows and the device has."""
    return spec.memory_bytes if first.free is None else max(1, min(first.free, spec.memory_bytes))


def plan_of(first: FirstBatch, spec: ProbeSpec, names: Sequence[str]) -> Plan:
    """What is summed up."""
    refine, notes, memory = spec.refine, [], room(first, spec)
    if memory < spec.memory_bytes:
        notes.append(f"the device has {human_bytes(memory)} free, less than memory= allows")
    if refine is None and not first.factors:
        refine = False
        notes.append(_UNREFINED)
    return _plan(first, spec, names, memory, refine, notes)


def unbounded_plan(first: FirstBatch, spec: ProbeSpec, names: Sequence[str]) -> Plan:
    """What is measured if nothing is summed up."""
    return _plan(first, spec, names, sys.maxsize, False, [])


def _plan(
    first: FirstBatch,
    spec: ProbeSpec,
    names: Sequence[str],
    memory: int,
    refine: bool | None,
    notes: Sequence[str],
) -> Plan:
    return make_plan(
        names,
        first.widths,
        first.length,
        positions=spec.positions,
        views=spec.views,
        pairs=spec.compared,
        groups=spec.groups,
        memory=memory,
        masked=first.masked,
        aligned=first.aligned,
        places=first.places,
        padded=first.padded,
        targets=[(name, width) for name, width, _ in first.targets],
        refine=refine,
        notes=notes,
    )
