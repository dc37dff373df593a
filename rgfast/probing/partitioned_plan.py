"""Plans of several ranks: whether they partition the layers, and what each then sums up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from rgfast.probing.distributed import first_numbers
from rgfast.probing.estimators.moments import Moments
from rgfast.probing.first import FirstBatch
from rgfast.probing.options import human_bytes
from rgfast.probing.partition import buffer_bytes, held_layers, transit_budget, transit_bytes
from rgfast.probing.plan import Plan
from rgfast.probing.planning import plan_of, room
from rgfast.probing.rank_costs import handed_bytes, handing_note, summing_note
from rgfast.probing.ranks import Ranks
from rgfast.probing.spec import ProbeSpec
from rgfast.probing.unread import Unread

__all__ = ["PartitionedPlan", "first_number", "partitioned_plan", "plan_of_ranks"]


@dataclass(frozen=True)
class PartitionedPlan:
    """What each rank sums up: ``plan`` is of all layers, ``parts[r]`` of the layers ``held[r]``, one for
    every rank that owns some. ``buffer`` bytes of rows are held back before they are handed over, ``transit``
    are on their way, these included."""

    plan: Plan
    parts: tuple[Plan, ...]
    held: tuple[tuple[int, ...], ...]
    buffer: int
    transit: int

    @property
    def state_bytes(self) -> int:
        """What a rank holds, at most: moments, rows to hand over, those that go out and those that come."""
        return max(part.state_bytes for part in self.parts) + self.transit

    def moments(self, rank: int, *, masked: bool, unread: Unread, uncentred: bool) -> Moments | None:
        """What a rank sums up, empty; None if it owns no layer."""
        if rank >= len(self.parts):
            return None
        return Moments(self.parts[rank], masked=masked, unread=unread, uncentred=uncentred)


def partitioned_plan(first: FirstBatch, spec: ProbeSpec, names: Sequence[str], ranks: int) -> PartitionedPlan:
    """How ``ranks`` share out the layers. Raises ValueError, naming the change to make, if a rank's part does
    not fit ``memory``."""
    memory = room(first, spec)
    fewer = replace(spec, memory=memory - transit_budget(memory))
    held = held_layers(first.widths, ranks, neighbors=spec.compared == "adjacent")
    parts = []
    for layers in held:
        places = tuple(first.places[layer] for layer in layers) if first.places else ()
        some = replace(first, widths=tuple(first.widths[layer] for layer in layers), places=places)
        try:
            parts.append(plan_of(some, fewer, [names[layer] for layer in layers]))
        except ValueError as error:
            raise ValueError(
                f"{error}; of {human_bytes(memory)}, rows on their way between {ranks} ranks take "
                f"{human_bytes(transit_budget(memory))}, and with more ranks each has fewer layers"
            ) from None
    # All have room for what the one with the least room measures.
    least = min(parts, key=lambda part: (len(part.views), len(part.positions)))
    refine = False if any(part.refine is False for part in parts) else least.refine
    pending = min(part.pending_bytes for part in parts)
    alike = [
        replace(part, positions=least.positions, views=least.views, refine=refine, pending_bytes=pending)
        for part in parts
    ]
    whole = replace(least, names=tuple(names), widths=first.widths, places=first.places, refine=refine)
    state = human_bytes(max(part.state_bytes for part in alike))
    transit = transit_bytes(memory, first.widths, held, ranks, first.length * first.itemsize)
    note = (
        f"layers are shared out among {len(held)} of {ranks} ranks, at most {max(map(len, held))} on each: "
        f"{state} of state and up to {human_bytes(transit)} of rows on their way per rank"
    )
    row = handed_bytes(first.widths, held, first.itemsize)
    note += f", {handing_note(whole, alike, row, ranks, transit)}"
    notes = dict.fromkeys(note for part in parts for note in part.notes)
    buffer = buffer_bytes(memory, first.widths, held, ranks)
    return PartitionedPlan(replace(whole, notes=(*notes, note)), tuple(alike), held, buffer, transit)


def plan_of_ranks(
    first: FirstBatch, spec: ProbeSpec, names: Sequence[str], ranks: int
) -> Plan | PartitionedPlan:
    """What ranks sum up: all layers each, or some if that was asked for or nothing else fits ``memory``; one
    by itself owns all. Raises ValueError, naming the change to make, if nothing fits."""
    why = spec.why_not_shared
    if not why and first.targets and len({*first.places}) > 1:
        why = "targets= are read at the places of the first layer, and other layers have their rows elsewhere"
    if ranks == 1 or spec.owner != "layers":
        try:
            plan = plan_of(first, spec, names)
            return plan if ranks == 1 else plan.noted([summing_note(plan, ranks)])
        except ValueError as error:
            if ranks == 1 or spec.owner == "ranks":
                raise
            if why:
                raise ValueError(f"{error} (ranks cannot share out the layers: {why})") from None
    if why:
        raise ValueError(f"owner: 'layers' cannot be had, since {why}")
    return partitioned_plan(first, spec, names, ranks)


def first_number(ranks: Ranks, expected: int | None, line: Sequence[int]) -> int:
    """The number of this rank's first sequence among those of all, of how many each expects and the ranks of
    ``line`` that divide batches with it; 0 if one of them does not know. All ranks call this together."""
    said = ranks.gather(f"expected/{ranks.round()}", [expected, list(line)])
    if any(number is None for number, _ in said):
        return 0
    return first_numbers([(number, tuple(line)) for number, line in said])[ranks.rank]
