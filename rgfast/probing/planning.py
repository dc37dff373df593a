"""The plan that follows from the first batch and what was asked for."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch

from rgfast.ops.fast import why_slow
from rgfast.probing.first import FirstBatch
from rgfast.probing.options import human_bytes
from rgfast.probing.plan import Plan, make_plan
from rgfast.probing.spec import ProbeSpec
from rgfast.runtime.waiting import waits_for

__all__ = ["plan_of", "room", "unbounded_plan", "why_no_samples"]

_UNREFINED = (
    "small singular values are not refined, which would cost more than all else on this device; "
    "effective_rank_bound says what is known, and refine=True refines them"
)


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
        rows=[chosen.name for chosen in spec.new_selections()],
        refine=refine,
        launched=first.launched,
        notes=notes,
    )


def why_no_samples(spec: ProbeSpec, several: bool, device: torch.device) -> str:
    """Why the sample route is closed, whatever the batches are; nothing if it is open."""
    if spec.route == "moments":
        return "moments were asked for"
    if several:
        return "several processes probe together"
    if spec.route == "auto" and not waits_for(device) and why_slow() is not None:
        return "moments take less time without compiled kernels"
    if spec.refine is not None:
        return "refine= is about moments"
    if spec.compared not in ("adjacent", "all", ()):
        return "it compares adjacent or all pairs of layers"
    return ""
