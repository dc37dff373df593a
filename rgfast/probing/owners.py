"""Layers that ranks share out: each sums up some layers of all ranks' rows, so that none holds all moments.

Every rank runs the model on its own sequences. It adds the rows of the layers it owns to its moments, and
holds back those of the others. When so many have gathered (in a model whose ranks run every forward together:
after each), all ranks exchange what they hold, in pairs, and nothing else passes between them until the next
time. A rank without batches left takes part with nothing. An owner's last layer is the next owner's first,
once more: drift and CKA between the two are taken there. Spectra are solved where the moments are, and only
measures travel in the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from rgfast.probing.capture.rows import RowBatch
from rgfast.probing.estimators.base import ByGroup
from rgfast.probing.estimators.finite import FiniteCheck
from rgfast.probing.estimators.moments import Moments
from rgfast.probing.first import FirstBatch
from rgfast.probing.measured import Measured, spread
from rgfast.probing.options import human_bytes
from rgfast.probing.packing import Arrays, packed, packed_measures, unpacked, unpacked_measures
from rgfast.probing.plan import Plan
from rgfast.probing.planning import plan_of, room
from rgfast.probing.rank_costs import handed_bytes, handing_note, summing_note
from rgfast.probing.ranks import Ranks
from rgfast.probing.sharing import buffer_bytes, held_layers
from rgfast.probing.spec import ProbeSpec
from rgfast.probing.unread import Unread

__all__ = ["Gathered", "Owners", "Shares", "plan_or_shares", "shares_of"]


@dataclass(frozen=True)
class Shares:
    """What each rank sums up: ``plan`` is of all layers, ``parts[r]`` of the layers ``held[r]``, one for
    every rank that owns some. ``buffer`` bytes of rows are held back before they are handed over."""

    plan: Plan
    parts: tuple[Plan, ...]
    held: tuple[tuple[int, ...], ...]
    buffer: int

    @property
    def state_bytes(self) -> int:
        """What a rank holds, at most: moments, rows to hand over, and those that came from another."""
        return max(part.state_bytes for part in self.parts) + 2 * self.buffer

    def moments(self, rank: int, *, masked: bool, unread: Unread, uncentred: bool) -> Moments | None:
        """What a rank sums up, empty; None if it owns no layer."""
        if rank >= len(self.parts):
            return None
        return Moments(self.parts[rank], masked=masked, unread=unread, uncentred=uncentred)


def shares_of(first: FirstBatch, spec: ProbeSpec, names: Sequence[str], ranks: int) -> Shares:
    """How ``ranks`` share out the layers. Raises ValueError, naming the change to make, if a rank's part does
    not fit ``memory``."""
    memory = room(first, spec)
    buffer = buffer_bytes(memory)
    fewer = replace(spec, memory=memory - 2 * buffer)
    held = held_layers(first.widths, ranks, neighbors=spec.compared == "adjacent")
    parts = []
    for layers in held:
        places = tuple(first.places[layer] for layer in layers) if first.places else ()
        some = replace(first, widths=tuple(first.widths[layer] for layer in layers), places=places)
        parts.append(plan_of(some, fewer, [names[layer] for layer in layers]))
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
    note = (
        f"layers are shared out among {len(held)} of {ranks} ranks, at most {max(map(len, held))} on each: "
        f"{state} of state and up to {human_bytes(2 * buffer)} of rows on their way per rank (of "
        "one batch, if it has more)"
    )
    row = handed_bytes(first.widths, held, first.itemsize)
    note += f", {handing_note(whole, alike, row, ranks, 2 * buffer)}"
    notes = dict.fromkeys(note for part in parts for note in part.notes)
    return Shares(replace(whole, notes=(*notes, note)), tuple(alike), held, buffer)


@dataclass(frozen=True)
class Gathered:
    """The measures of all layers, from the ranks that own them."""

    plan: Plan
    sequences: int
    masked: bool
    views: Mapping[str, Measured]
    route = "moments"

    def measures(self) -> Gathered:
        """Itself."""
        return self

    def measured(self, view: str) -> Measured:
        """The measures of a view."""
        return self.views[view]

    def by_group(self, view: str) -> ByGroup:
        """Nothing: with owner='layers' there are no groups."""
        return [], None

    def later(self) -> None:
        """None: no rank has all moments."""


def plan_or_shares(first: FirstBatch, spec: ProbeSpec, names: Sequence[str], ranks: int) -> Plan | Shares:
    """What ranks sum up: all layers each, or some if that was asked for or nothing else fits ``memory``; one
    by itself owns all. Raises ValueError, naming the change to make, if nothing fits."""
    if ranks == 1 or spec.owner != "layers":
        try:
            plan = plan_of(first, spec, names)
            return plan if ranks == 1 else plan.noted([summing_note(plan, ranks)])
        except ValueError as error:
            if ranks == 1 or spec.owner == "ranks":
                raise
            if why := spec.why_not_shared:
                raise ValueError(f"{error} (ranks cannot share out the layers: {why})") from None
    return shares_of(first, spec, names, ranks)


class Owners:
    """Takes the rows of this rank's batches, as :class:`Moments` does, and gives the measures of all ranks'.

    ``own`` are the moments of this rank's layers, if it owns some. ``in_step`` says that rows are handed over
    by :meth:`passed`, which all ranks call together.
    """

    def __init__(
        self,
        shares: Shares,
        own: Moments | None,
        ranks: Ranks,
        device: torch.device,
        unread: Unread,
        *,
        masked: bool,
        in_step: bool,
    ) -> None:
        self.plan, self.masked = shares.plan, masked
        self.sequences = self.numbers = 0  # added here, and numbered by all ranks that divide batches
        self._held, self._buffer = shares.held, shares.buffer
        self._ranks, self._device, self._in_step = ranks, device, in_step
        self._finite = FiniteCheck(self.plan.names, unread)
        self._own = own
        self._others = {layer for rank, held in enumerate(self._held) if rank != ranks.rank for layer in held}
        self._kept: list[RowBatch] = []
        self._kept_bytes = self._rounds = 0

    @property
    def nbytes(self) -> int:
        """Bytes held now: moments, and rows to be handed over."""
        return self._kept_bytes + (0 if self._own is None else self._own.nbytes)

    def note(self, sentences: Sequence[str]) -> None:
        """Let the result say these too."""
        self.plan = self.plan.noted(sentences)

    def add(self, batch: RowBatch) -> None:
        """Add a batch. Waits for the other ranks once enough rows have gathered.

        Raises ValueError if a layer is not finite, or did not run.
        """
        if batch.missing:
            names = ", ".join(self.plan.names[layer] for layer in batch.missing)
            raise ValueError(
                f"layers: with owner='layers' all must run in every forward, and {names} did not; "
                "take owner='ranks', or other layers"
            )
        with torch.no_grad():
            self._finite.check(batch, self.numbers + (0 if batch.part is None else batch.part.first))
            self.sequences += batch.sequences
            self.numbers += batch.numbers
            if self._own is not None:
                self._own.note(batch.notes)
                self._own.add(batch.of_layers(self._held[self._ranks.rank]))
            if self._others:
                self._keep(batch)
        if not self._in_step and self._kept_bytes >= self._buffer:
            self._exchange(ended=False)

    def passed(self) -> None:
        """A forward of all ranks together is over."""
        if self._in_step:
            self._exchange(ended=False)

    def of_all_ranks(self, provenance: Mapping[str, Any]) -> tuple[Gathered, dict[str, Any]]:
        """The measures of all ranks' sequences, the same on every rank, and the provenance of the lowest rank
        that has some. Takes part in what others hand over until all ranks have called this."""
        while not self._exchange(ended=True):
            pass
        own = self._own
        mine = {"notes": self.plan.notes, "views": self.plan.views, "sequences": self.sequences}
        if own is not None:
            mine |= {"notes": (*self.plan.notes, *own.plan.notes), "views": own.plan.views}
        tag = f"measures/{self._ranks.round()}"
        said = self._ranks.gather(tag, {**mine, "from": dict(provenance)})
        views = tuple(view for view in self.plan.views if all(view in one["views"] for one in said))
        notes = tuple(dict.fromkeys(note for one in said for note in one["notes"]))
        plan, total = replace(self.plan, views=views, notes=notes), sum(one["sequences"] for one in said)
        lowest = next((one for one in said if one["sequences"]), said[0])
        if total < 2:
            return Gathered(plan, total, self.masked, {}), lowest["from"]
        parts: dict[int, Arrays] = {}
        if own is not None:
            own.measures()
            parts[self._ranks.rank] = packed_measures({view: own.measured(view) for view in views})
        owners = range(len(self._held))
        pairs = {(owner, rank) for owner in owners for rank in range(self._ranks.size)}
        parts |= self._between(tag, pairs, lambda _: parts[self._ranks.rank])
        measured = {
            view: spread(
                [unpacked_measures(parts[owner], view) for owner in owners], self._held, len(plan.names)
            )
            for view in views
        }
        return Gathered(plan, total, self.masked, measured), lowest["from"]

    def _keep(self, batch: RowBatch) -> None:
        """Hold back the rows that other ranks sum up: a copy, unless they are handed over at once."""
        layers = [
            x.detach() if x is not None and layer in self._others else None
            for layer, x in enumerate(batch.layers)
        ]
        self._kept_bytes += sum(x.nbytes for x in layers if x is not None)
        if not self._in_step and self._kept_bytes < self._buffer:
            layers = [None if x is None else x.clone() for x in layers]
        self._kept.append(replace(batch, layers=layers))

    def _exchange(self, *, ended: bool) -> bool:
        """Hand over what is held back, and add what comes; whether all ranks have ``ended``."""
        self._rounds += 1
        tag = f"rows/{self._rounds}"
        said = self._ranks.gather(tag, [ended, bool(self._kept)])
        givers = [rank for rank, (_, some) in enumerate(said) if some]
        pairs = {(giver, taker) for giver in givers for taker in range(len(self._held))}

        def give(taker: int) -> Arrays:
            return packed([batch.of_layers(self._held[taker]) for batch in self._kept])

        for _, arrays in self._between(tag, pairs, give):
            assert self._own is not None
            for batch in unpacked(arrays, self._device):
                self._own.note(batch.notes)
                self._own.add(batch)
        self._kept, self._kept_bytes = [], 0
        return all(over for over, _ in said)

    def _between(
        self, tag: str, pairs: set[tuple[int, int]], give: Callable[[int], Arrays]
    ) -> Iterator[tuple[int, Arrays]]:
        """What the others hand to this rank, in a fixed order, while it gives them theirs: ``pairs`` says who
        gives to whom."""
        me, size = self._ranks.rank, self._ranks.size
        if any(giver != taker for giver, taker in pairs):
            self._ranks.connect()
        for step in range(size):  # in each every rank has one partner
            other = (step - me) % size
            if other == me:
                continue
            for giver, taker in sorted([(me, other), (other, me)]):
                if (giver, taker) not in pairs:
                    continue
                if giver == me:
                    self._ranks.send(f"{tag}/{me}/{taker}", taker, give(taker))
                else:
                    yield giver, self._ranks.receive(f"{tag}/{giver}/{me}", giver)
