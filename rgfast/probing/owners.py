"""Layers that ranks share out: each sums up some layers of all ranks' rows, so that none holds all moments.

Every rank runs the model on its own sequences. It adds the rows of the layers it owns to its moments, and
holds back those of the others. When so many have gathered (in a model whose ranks run every forward together:
after each), they go to their owners, all to all, beside the forwards that follow. What comes is summed up
when the next ones go, so that the order of sums does not depend on the network. A rank without batches left
takes part with nothing. An owner's last layer is the next owner's first, once more: drift and CKA between the
two are taken there. Spectra are solved where the moments are, and only measures travel in the end.

Rows rather than moments travel: where layers have to be shared out, the moments of all of them take more than
``memory``, and the rows that go at once an eighth of it at most.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from rgfast.probing.capture.rows import RowBatch
from rgfast.probing.distributed import first_numbers
from rgfast.probing.estimators.base import ByGroup
from rgfast.probing.estimators.finite import FiniteCheck
from rgfast.probing.estimators.moments import Moments
from rgfast.probing.exchange import Exchange
from rgfast.probing.measured import Measured, on_host, spread
from rgfast.probing.packing import packed, packed_measures, unpacked, unpacked_measures
from rgfast.probing.partitioned_plan import PartitionedPlan
from rgfast.probing.plan import Plan
from rgfast.probing.ranks import Ranks
from rgfast.probing.unread import Unread
from rgfast.runtime.waiting import numbers

__all__ = ["Gathered", "Owners"]


_APART = (
    "owner: with 'layers' all ranks take a snapshot together (or have a checkpoint=), and some ask for "
    "the result"
)
_OWN_NUMBERS = (
    "ranks that share out the layers number sequences for groups before they know how many others have"
)
# Bytes that a tensor takes beside its own, in a message or to be held back.
_NAMED = 64


@dataclass(frozen=True)
class Gathered:
    """The measures of all layers, from the ranks that own them."""

    plan: Plan
    sequences: int
    masked: bool
    views: Mapping[str, Measured]
    groups: Mapping[str, ByGroup]
    route = "moments"

    def measures(self) -> Gathered:
        """Itself."""
        return self

    def measured(self, view: str) -> Measured:
        """The measures of a view."""
        return self.views[view]

    def by_group(self, view: str) -> ByGroup:
        """The measures of a view without each group, and R² of the targets."""
        return self.groups[view]

    def later(self) -> None:
        """None: no rank has all moments."""


class Owners:
    """Takes the rows of this rank's batches, as :class:`Moments` does, and gives the measures of all ranks'.

    ``own`` are the moments of this rank's layers, if it owns some. ``in_step`` says that rows are handed over
    by :meth:`passed`, which all ranks call together. Sequences are numbered from ``start``, for groups.
    """

    def __init__(
        self,
        partitioned: PartitionedPlan,
        own: Moments | None,
        ranks: Ranks,
        device: torch.device,
        unread: Unread,
        start: int,
        *,
        masked: bool,
        in_step: bool,
    ) -> None:
        self.plan, self.masked = partitioned.plan, masked
        self.sequences = self.numbers = 0  # added here, and numbered by all ranks that divide batches
        self._held, self._buffer = partitioned.held, partitioned.buffer
        self._ranks, self._device, self._in_step = ranks, device, in_step
        self._finite = FiniteCheck(self.plan.names, unread)
        self._own = own
        self._others = {layer for rank, held in enumerate(self._held) if rank != ranks.rank for layer in held}
        # Rows with the number of their first sequence: of the next round, and of those that follow at once.
        self._kept: list[tuple[int, RowBatch]] = []
        self._then: list[tuple[int, RowBatch]] = []
        self._kept_bytes = self._came_bytes = 0
        self._start, self._line = start, tuple[int, ...]()
        self._counts = [0] * self.plan.groups  # sequences added here, by group
        self._exchange = Exchange(ranks)
        # What writes a checkpoint, whether one is due after this forward, how many there are, and whether one
        # is being written, so that nothing is on its way.
        self.save: Callable[[], None] | None = None
        self.due = False
        self._saved, self._still = 0, False

    @property
    def nbytes(self) -> int:
        """Bytes held now: moments, and rows to be handed over or on their way."""
        rows = self._kept_bytes + self._exchange.nbytes + self._came_bytes
        return rows + (0 if self._own is None else self._own.nbytes)

    def note(self, sentences: Sequence[str]) -> None:
        """Let the result say these too."""
        self.plan = self.plan.noted(sentences)

    def add(self, batch: RowBatch) -> None:
        """Add a batch. Waits for the other ranks if enough rows have gathered before those of the last time
        have come.

        Raises ValueError if a layer is not finite, or did not run.
        """
        if batch.missing:
            names = ", ".join(self.plan.names[layer] for layer in batch.missing)
            raise ValueError(
                f"layers: with owner='layers' all must run in every forward, and {names} did not; "
                "take owner='ranks', or other layers"
            )
        with torch.no_grad():
            first = self.numbers + batch.offset
            self._finite.check(batch, first)
            first += self._start
            self.sequences += batch.sequences
            self.numbers += batch.numbers
            self._line = () if batch.part is None else batch.part.ranks
            for group in range(self.plan.groups):
                self._counts[(first + group) % self.plan.groups] += len(
                    range(group, batch.sequences, self.plan.groups)
                )
            if self._own is not None:
                self._own.note(batch.notes)
                self._own.add(batch.of_layers(self._held[self._ranks.rank]), first=first)
            if self._others and batch.sequences:
                self._keep(first, batch)

    def passed(self) -> None:
        """A forward is over, in step that of all ranks together."""
        if self._in_step:
            more = True
            while more:
                if self._then:
                    self._kept = [self._then.pop(0)]
                self._turn("saves" if self.due else "goes on")
                said = self._exchange.said()
                more = any(some for _, some in said)
            if any(what == "saves" for what, _ in said):
                self._sum_up(self._landed())
                self._write()
        elif self.due:
            self._drain("saves")
            self._write()

    def _write(self) -> None:
        """Write a checkpoint, as all ranks do now."""
        if self.save is None:
            raise ValueError(_APART)
        self.due, self._still = False, True
        self._saved += 1
        self.save()
        self._still = False

    def state(self) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
        """What is summed up here, as JSON and arrays. But for a checkpoint that is due, all ranks call this
        together."""
        if not self._still:
            if "ends" in self._drain("saves"):
                raise ValueError(_APART)
            self._saved += 1
        own = self._own
        said = {
            "plan": None if own is None else own.plan.to_json(),
            "sequences": self.sequences,
            "numbers": self.numbers,
            "saved": self._saved,
            "start": self._start,
            "line": list(self._line),
            "counts": self._counts,
        }
        return said, {} if own is None else own.state()

    def load(self, said: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]], notes: Sequence[str]) -> None:
        """Go on from what :meth:`state` gave, with the notes of its plan."""
        self.note(notes)
        self.sequences, self.numbers, self._saved = said["sequences"], said["numbers"], said["saved"]
        self._start, self._line, self._counts = said["start"], tuple(said["line"]), list(said["counts"])
        if self._own is not None:
            self._own.adopt(Plan.from_json(said["plan"])[0])
            self._own.load(arrays, self._device)

    def of_all_ranks(self, provenance: Mapping[str, Any]) -> tuple[Gathered, dict[str, Any]]:
        """The measures of all ranks' sequences, the same on every rank, and the provenance of the lowest rank
        that has some. Takes part in what others hand over until all ranks have called this."""
        while "saves" in self._drain("ends"):
            self._write()
        if self.save is not None:
            self._write()
        own = self._own
        mine = {
            "notes": (*self.plan.notes, *(() if own is None else own.plan.notes)),
            "views": self.plan.views if own is None else own.plan.views,
            "sequences": self.sequences,
            "numbered": [self.numbers, self._line, self._start],
            "counts": self._counts,
            "from": dict(provenance),
        }
        said = self._ranks.gather(f"measures/{self._ranks.round()}", mine)
        views = tuple(view for view in self.plan.views if all(view in one["views"] for one in said))
        notes = dict.fromkeys(note for one in said for note in one["notes"])
        total, groups = sum(one["sequences"] for one in said), self.plan.groups
        starts = first_numbers([(one["numbered"][0], tuple(one["numbered"][1])) for one in said])
        numbered = zip(said, starts, strict=True)
        if any(one["sequences"] and (one["numbered"][2] - start) % groups for one, start in numbered):
            notes[_OWN_NUMBERS] = None
        plan = replace(self.plan, views=views, notes=tuple(notes))
        lowest = next((one for one in said if one["sequences"]), said[0])
        if total < 2 * groups:
            return Gathered(plan, total, self.masked, {}, {}), lowest["from"]
        if (least := min(map(sum, zip(*(one["counts"] for one in said), strict=True)))) < 2:
            raise ValueError(
                f"groups must hold at least 2 sequences each, got {least} in one of {groups}, since "
                f"{_OWN_NUMBERS}; take fewer groups"
            )
        parts = self._measures_of_all(views)
        return Gathered(plan, total, self.masked, *self._joined(plan, parts)), lowest["from"]

    def _joined(
        self, plan: Plan, parts: Sequence[tuple[dict[str, Measured], dict[str, Tensor]]]
    ) -> tuple[dict[str, Measured], dict[str, ByGroup]]:
        """The measures of all layers, and those without each group, from those of the owners."""
        layers = len(plan.names)

        def of_all(name: str) -> Measured:
            return spread([found[name] for found, _ in parts], self._held, layers)

        def fits(name: str) -> Tensor:
            first = parts[0][1][name]
            whole = first.new_full((first.shape[0], layers, first.shape[2]), torch.nan)
            for held, (_, more) in zip(self._held, parts, strict=True):
                whole[:, numbers(held, whole.device)] = more[name]
            return whole

        by_group: dict[str, ByGroup] = {}
        for view in plan.views if plan.groups > 1 else ():
            r2 = (fits(f"{view}/r2"), fits(f"{view}/r2_se")) if f"{view}/r2" in parts[0][1] else None
            by_group[view] = [of_all(f"{view}/{group}") for group in range(plan.groups)], r2
        return {view: of_all(view) for view in plan.views}, by_group

    def _measures_of_all(self, views: Sequence[str]) -> list[tuple[dict[str, Measured], dict[str, Tensor]]]:
        """What every owner has measured, by view and by view and group, and R², in the order of ranks."""
        own, message = self._own, None
        found: dict[str, Measured] = {}
        more: dict[str, Tensor] = {}
        if own is not None:
            own.measures()
            for view in views:
                found[view] = own.measured(view)
                if self.plan.groups > 1:
                    without, r2 = own.by_group(view)
                    found |= {f"{view}/{group}": one for group, one in enumerate(without)}
                    more |= {} if r2 is None else {f"{view}/r2": r2[0], f"{view}/r2_se": r2[1]}
            found = {name: on_host(one) for name, one in found.items()}
            more = {name: x.cpu() for name, x in more.items()}
            message = packed_measures(found, more)
        others = [None if rank == self._ranks.rank else message for rank in range(self._ranks.size)]
        self._exchange.start(None, others)
        parts = {rank: unpacked_measures(data) for rank, data in self._exchange.finish()[1]}
        parts[self._ranks.rank] = found, more
        return [parts[rank] for rank in range(len(self._held))]

    def _keep(self, first: int, batch: RowBatch) -> None:
        """Hold back the rows that other ranks sum up, so many sequences at a time as there is room for."""
        others = self._others
        batch = replace(
            batch,
            layers=[None if x is None or k not in others else x.detach() for k, x in enumerate(batch.layers)],
            keeps=[x if k in others else None for k, x in enumerate(batch.keeps)],
            owned=False,
        )
        number, at = batch.sequences, 0
        each = -(-sum(x.nbytes + _NAMED for x in _tensors(batch)) // number)
        while at < number:
            if self._kept and self._kept_bytes + each > self._buffer:
                self._turn("goes on")
            room = max(0, self._buffer - self._kept_bytes)
            end = min(number, at + max(1, room // each))
            part = batch if end - at == number else _each(batch, itemgetter(slice(at, end)))
            if self._in_step:  # they go before anything can write to them
                self._then.append((first + at, part))
            else:
                self._kept.append((first + at, part))
                self._kept_bytes += each * (end - at)
            at = end
        if self._in_step:
            return
        if self._kept_bytes + each > self._buffer:
            self._turn("goes on")
        self._kept = [
            (n, x if x.owned else replace(_each(x, torch.clone), owned=True)) for n, x in self._kept
        ]

    def _turn(self, what: str) -> None:
        """Hand over what is held back, once what was on its way is there; then sum up that. All ranks are
        told ``what`` this one does: it "goes on", "saves" or "ends"."""
        came = self._landed()
        me, owners = self._ranks.rank, len(self._held)
        self._exchange.start(
            [what, bool(self._then)],
            [
                packed([(first, batch.of_layers(self._held[taker])) for first, batch in self._kept])
                if self._kept and taker != me and taker < owners
                else None
                for taker in range(self._ranks.size)
            ],
        )
        self._kept, self._kept_bytes = [], 0
        self._sum_up(came)

    def _landed(self) -> list[Tensor]:
        """What was on its way to this rank, in the order of those that gave it."""
        came = [data for _, data in self._exchange.finish()[1]] if self._exchange.pending else []
        self._came_bytes = sum(map(len, came))
        return came

    def _sum_up(self, came: list[Tensor]) -> None:
        while came:
            assert self._own is not None
            for first, batch in unpacked(came.pop(0), self._device):
                self._own.note(batch.notes)
                self._own.add(batch, first=first)
        self._came_bytes = 0

    def _drain(self, what: str) -> set[str]:
        """Hand over everything, and take what comes, until no rank goes on; what they all do."""
        done = {"goes on"}
        while "goes on" in done:
            self._turn(what)
            done = {one for one, _ in self._exchange.said()}
            self._sum_up(self._landed())
        return done


def _tensors(batch: RowBatch) -> list[Tensor]:
    """All tensors of a batch, each once."""
    found: dict[int, Tensor] = {}
    _each(batch, lambda x: found.setdefault(id(x), x))
    return [*found.values()]


def _each(batch: RowBatch, of: Callable[[Tensor], Tensor]) -> RowBatch:
    """A batch of what becomes of its tensors; those that layers share are shared again."""
    known: dict[int, Tensor] = {}

    def one(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        if id(x) not in known:
            known[id(x)] = of(x)
        return known[id(x)]

    return replace(
        batch,
        layers=[one(x) for x in batch.layers],
        keeps=[one(x) for x in batch.keeps],
        masked=one(batch.masked),
        targets=[one(x) for x in batch.targets],
        chosen=[one(x) for x in batch.chosen],
    )
