"""What a probe has seen so far: it chooses the estimators, and hands what one holds over to another."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from rgfast.ops.fast import factors_pay, takes_rows
from rgfast.probing import checkpoint as checkpoints
from rgfast.probing.assemble import assemble
from rgfast.probing.capture.batches import batch_items
from rgfast.probing.capture.layers import Tap
from rgfast.probing.capture.rows import RowBatch
from rgfast.probing.distributed import agree, all_reduce
from rgfast.probing.estimators.base import HoldsRows
from rgfast.probing.estimators.moments import Moments
from rgfast.probing.estimators.rows import Rows
from rgfast.probing.estimators.samples import LIMIT, enough, tile_rows, worthwhile
from rgfast.probing.estimators.tiles import LaterRows, gather, independent_stack, measured_by_tiles
from rgfast.probing.first import FirstBatch
from rgfast.probing.later import bring
from rgfast.probing.offloaded import is_offloaded, runs_on
from rgfast.probing.plan import Plan
from rgfast.probing.planning import plan_of, room, unbounded_plan, why_no_samples
from rgfast.probing.predict import Foreseen
from rgfast.probing.provenance import provenance
from rgfast.probing.ranks import Ranks
from rgfast.probing.result import ProbeResult
from rgfast.probing.sharding import class_of, is_sharded
from rgfast.probing.spec import ProbeSpec
from rgfast.probing.targets import Target
from rgfast.probing.unread import Unread
from rgfast.runtime.memory import free_bytes
from rgfast.runtime.waiting import waits_for
from rgfast.streaming import pair_keys

__all__ = ["Tally"]

# Forwards to wait for a layer that does not run in every one.
_PATIENCE = 16

_BY_SAMPLES = "by samples: CKA and drift to 1e-6"


class Tally:
    """Everything seen of one model, by this process or by all ``ranks``; ``say`` prints what is measured.

    Raises ValueError if ``spec`` wants the sample route and rules it out.
    """

    def __init__(
        self,
        model: nn.Module,
        spec: ProbeSpec,
        taps: Sequence[Tap],
        targets: Sequence[Target],
        ranks: Ranks | None,
        unread: Unread,
        *,
        say: bool,
    ) -> None:
        self._model, self._spec, self._ranks, self._say = model, spec, ranks, say
        self._unread = unread
        self._taps, self._targets = taps, targets
        self._names = [tap.name for tap in taps]
        self._no_samples = why_no_samples(spec, ranks is not None, self._device())
        if spec.route == "samples" and self._no_samples:
            raise ValueError(f"route: 'samples' cannot be taken, since {self._no_samples}")
        self._moments: Moments | None = None
        self._why_moments = ""
        self._too_big: ValueError | None = None
        self._early: list[RowBatch] = []
        self._rows: HoldsRows | None = None
        self._first_batch: FirstBatch | None = None
        self._summed: tuple[Moments | None, dict[str, Any]] | None = None
        self._provenance: dict[str, Any] = {}
        self._weights: str | None = None
        self._sharded = is_sharded(model)
        self._read_once = self._sharded or is_offloaded(model)
        # Ranks that run every forward together agree after one of them, all at the same time.
        self._due = self._sharded and ranks is not None

    def open(self) -> None:
        """Forwards will follow. Reads the weights for their fingerprint, which would hold up a forward, and
        what earlier results have left on devices."""
        bring()
        if not self._begun:
            self._weights = checkpoints.fingerprint(self._model)
            if self._weights is None and self._spec.checkpoint is not None:
                self._digest()  # which says so

    @property
    def plan(self) -> Plan | None:
        """What is measured and what it costs; None before the first batch."""
        if self._moments is None:
            return None if self._rows is None else self._rows.plan
        return self._moments.plan

    @property
    def names(self) -> tuple[str, ...]:
        """The layers by name."""
        return tuple(self._names)

    @property
    def _begun(self) -> bool:
        """Whether it is known what is measured."""
        return self._moments is not None or self._rows is not None

    @property
    def sequences(self) -> int:
        """How many sequences came, to all ranks that run the model together with this one."""
        held = sum(batch.numbers for batch in self._early)
        held += 0 if self._rows is None else self._rows.sequences
        return held + (0 if self._moments is None else self._moments.numbers)

    @property
    def nbytes(self) -> int:
        """Bytes that moments take now."""
        return 0 if self._moments is None else self._moments.nbytes

    @property
    def ended(self) -> bool:
        """Whether the ranks have exchanged their last, so that nothing more can be added."""
        return self._summed is not None

    def by_tiles(
        self, batches: Iterator[Any], advance: Callable[[int], object]
    ) -> tuple[ProbeResult | None, list[Any]]:
        """What :meth:`rgfast.Probe.by_samples` says."""
        spec, stack = self._spec, independent_stack(self._model, self._taps)
        if stack is None or not self._may_tile:
            return None, []
        x, taken = gather(stack, batches)
        plan = None if x is None else self._tile_plan(stack.width, x.shape[1], len(x))
        if x is None or plan is None:
            return None, taken
        self._announce(plan, f"{plan.what}, {plan.notes[-1]}", weights=checkpoints.fingerprint(self._model))
        with torch.no_grad():
            found = measured_by_tiles(
                stack, x, plan, uncentred=spec.uncentred, memory=spec.memory_bytes, advance=advance
            )
        given = {batch_items(batch)[0].untyped_storage().data_ptr() for batch in taken}
        own = x.untyped_storage().data_ptr() not in given
        dataset = assemble(found, spec.measures, self._provenance)
        return ProbeResult(dataset, LaterRows(stack, x, own=own)), taken

    def _tile_plan(self, width: int, length: int, sequences: int) -> Plan | None:
        """What a stack without mixing measures of all samples at once, if so many are enough and worth it."""
        if not enough(sequences, self._spec.groups):
            return None
        layers = len(self._taps)
        first = FirstBatch((width,) * layers, length, True, (0,) * layers, False, False, ())
        plan = unbounded_plan(first, self._spec, self._names)
        few = self._spec.route == "auto" and not worthwhile(plan, sequences)
        return None if few or "flattened" in plan.views else plan.noted([_BY_SAMPLES])

    @property
    def _may_tile(self) -> bool:
        spec = self._spec
        of_entries = spec.mask is not None or bool(spec.targets) or spec.rows is not None
        all_rows = spec.checkpoint is not None or spec.keep is not None
        return not (self._no_samples or spec.reads_layers or of_entries or all_rows)

    def foreseen(self, batch: Any, sequences: int) -> Foreseen:
        """What ``sequences`` like those added so far, which were those of ``batch``, lead to."""
        stack = independent_stack(self._model, self._taps)
        if stack is not None and self._may_tile:
            x, _ = gather(stack, iter([batch]))
            if x is not None and sequences <= LIMIT:
                plan = self._tile_plan(stack.width, x.shape[1], sequences)
                if plan is not None:
                    rows = min(tile_rows(plan, self._spec.memory_bytes), sequences * plan.length)
                    why = (
                        "the rows of a few positions go through all layers of a stack without mixing at once"
                    )
                    return Foreseen("tiles", why, plan, 4 * rows * sum(plan.widths), self._deficient())
        held, moments = self._rows, self._moments
        plan = held.plan if held is not None else moments.plan if moments is not None else None
        assert plan is not None
        targets = sum(width for _, width in plan.targets)
        rows_bytes = sequences * plan.length * (4 * sum(plan.widths) + 8 * targets)
        reasons = {
            self._no_samples or self._why_moments: held is None,
            f"there are more than {LIMIT} sequences": sequences > LIMIT,
            "the rows of all layers do not fit memory=": rows_bytes > self._spec.memory_bytes,
            "there are too few sequences for every measure": not enough(sequences, self._spec.groups),
            "they take a moment either way": self._spec.route == "auto" and not worthwhile(plan, sequences),
        }
        why = next((reason for reason, holds in reasons.items() if reason and holds), "")
        if not why:
            why = f"the rows of at most {LIMIT} sequences fit memory="
            return Foreseen("rows", why, plan, rows_bytes, self._deficient())
        if moments is None:
            raise ValueError(f"{self._too_big} (rows cannot be held, since {why})")
        return Foreseen("moments", why, moments.plan, moments.plan.state_bytes, self._deficient())

    def _deficient(self) -> tuple[int, ...]:
        """What :class:`Foreseen` says."""
        return self._rows.deficient() if isinstance(self._rows, Rows) else ()

    def name_layers(self, names: Sequence[str]) -> None:
        """Name the layers of the batches to come: a module that runs several times is as many layers.

        Raises ValueError if there are others than before.
        """
        if not self._begun:
            self._names = list(names)
        elif list(names) != self._names:
            raise ValueError(f"layers must be the same in all forwards, got {', '.join(names)}")

    def add(self, batch: RowBatch) -> None:
        """Add a batch."""
        if self._ranks is not None:
            self._ranks.check()
        if not self._begun:
            self._early.append(_owned(batch) if batch.missing else batch)
            unseen = self._unseen()
            if unseen and len(self._early) == _PATIENCE:
                raise ValueError(self._never_ran(unseen))
            if not unseen and not self._due:
                first = self._agreed(self._seen_first(batch))
                assert first is not None
                self._begin(batch, first)
            return
        self._add(batch)

    @property
    def due(self) -> bool:
        """Whether ranks that run every forward together have yet to agree on what they start from."""
        return self._due

    def passed(self) -> None:
        """Agree: a forward of all ranks together is over, or they all are where the sum is taken."""
        seen, waiting = bool(self._early), bool(self._early) and bool(self._unseen())
        own = self._seen_first(self._early[-1]) if seen and not waiting else self._first_batch
        first = self._agreed(own, waiting=waiting)
        if first is None:
            self._early[-1:] = [_owned(batch) for batch in self._early[-1:]]
            return
        self._due = False
        if seen:
            self._begin(self._early[-1], first)
        elif self._moments is None:
            self._moments = self._empty(first)

    def _unseen(self) -> list[int]:
        """The layers that have not run yet."""
        layers = range(len(self._early[-1].layers))
        return [k for k in layers if all(batch.layers[k] is None for batch in self._early)]

    def _begin(self, batch: RowBatch, first: FirstBatch) -> None:
        """Plan what is measured, now that every layer has been seen, and add the batches so far."""
        pair_keys(self._spec.compared, len(self._names))
        if not self._no_samples and self._spec.route == "auto" and not takes_rows(batch.first):
            self._no_samples = "moments take less time on this device"
        rows = None if self._no_samples else self._hold(first)
        if rows is None:
            self._why_moments = "layers or sequences differ in their positions"
        try:
            self._moments = self._empty(first)
        except ValueError as error:
            if rows is None:
                raise
            self._too_big = error
        if rows is not None:
            if self._moments is None:
                said = f"{rows.plan.what}, {rows.plan.notes[-1]}"
                self._announce(rows.plan, said, weights=self._fingerprint())
            self._rows = rows
        early, self._early = self._early, []
        for one in early:
            self._add(one)

    def _hold(self, first: FirstBatch) -> Rows | None:
        """What holds rows back, if these views can be had from rows."""
        if not first.aligned or any(first.places):
            return None
        plan = unbounded_plan(first, self._spec, self._names).noted([_BY_SAMPLES])
        if plan.from_end:
            return None
        return Rows(plan, room(first, self._spec), uncentred=self._spec.uncentred)

    def _add(self, batch: RowBatch) -> None:
        if self._rows is not None:
            why = self._rows.accepts(batch)
            if not why:
                self._rows.note(batch.notes)
                self._rows.add(batch)
                return
            self._hand_over(why)
        self._sum_up(batch)

    def _sum_up(self, batch: RowBatch) -> None:
        """Add a batch to the moments."""
        assert self._moments is not None
        self._moments.note(batch.notes)
        if batch.padded and self._spec.counts_from_end and not self._moments.plan.from_end:
            raise ValueError(
                "positions: those from the end are each sequence's own only if the first batch tells its "
                "padding too; give every batch a mask"
            )
        # Of labels there may be more on other ranks than in this one's first batch.
        widths = [width for _, width in self._moments.plan.targets]
        targets = [
            x if x.shape[2] >= width else torch.nn.functional.pad(x, (0, width - x.shape[2]))
            for x, width in zip(batch.targets, widths, strict=True)
        ]
        self._moments.add(replace(batch, targets=targets))

    def _never_ran(self, layers: Sequence[int]) -> str:
        names = ", ".join(self._names[layer] for layer in layers)
        return f"layers: {names} did not run in {len(self._early)} forwards; name layers that run"

    def result(self, *, last: bool) -> ProbeResult:
        """The measures of all that was seen; ``last`` makes it the last exchange with the other ranks."""
        self._look()
        spec = self._spec
        rows = self._rows if self._rows is not None and enough(self._rows.sequences, spec.groups) else None
        if rows is not None and (spec.route == "samples" or worthwhile(rows.plan, rows.sequences)):
            return ProbeResult(assemble(rows.measures(), spec.measures, self._provenance), rows.state())
        if self._early:
            raise ValueError(self._never_ran(self._unseen()))
        self._hand_over("there are too few sequences for every measure")
        moments, provenance = self._moments, self._provenance
        if self._ranks is not None:
            moments, provenance = self._of_all_ranks(self._ranks, last)
        seen = 0 if moments is None else moments.sequences
        if moments is None or seen < 2:
            raise ValueError(f"batches must hold at least 2 sequences in all, got n = {seen}")
        if seen < 2 * spec.groups:
            raise ValueError(
                f"groups must hold at least 2 sequences each, got {spec.groups} groups of {seen} sequences"
            )
        dataset = assemble(moments.measures(), spec.measures, provenance)
        first = self._ranks is None or self._ranks.rank == 0
        return ProbeResult(dataset, moments.later(), writes=first)

    def _look(self) -> None:
        """Raise what was left unread; the other ranks know of it."""
        try:
            self._unread.look()
        except ValueError as error:
            if self._ranks is not None:
                self._ranks.fail(error)
            raise

    def snapshot(self) -> tuple[dict[str, Any], dict[str, np.ndarray[Any, Any]]]:
        """What :meth:`rgfast.Probe.snapshot` says."""
        self._look()
        if self.plan is None:
            raise RuntimeError("snapshot() has nothing to give before the first forward")
        header = {
            "first": None if self._first_batch is None else asdict(self._first_batch),
            "asked": self._asked(),
            "model": self._digest(),
            "provenance": self._provenance,
        }
        rows = self._rows
        if isinstance(rows, Rows):
            rows.look()
            return {**header, "plan": rows.plan.to_json(), "notes": list(rows.notes)}, rows.state()
        self._hand_over("a snapshot is of moments")
        moments = self._moments
        assert moments is not None
        return {**header, "plan": moments.plan.to_json(), "masked": moments.masked}, moments.state()

    def restore(self, header: Mapping[str, Any], arrays: Mapping[str, np.ndarray[Any, Any]]) -> None:
        """What :meth:`rgfast.Probe.restore` says."""
        self._names = checkpoints.runs_of(self._names, header["asked"].get("layers"))
        asked = self._asked()
        for name in dict.fromkeys((*asked, *header["asked"])):
            value, was = asked.get(name), header["asked"].get(name)
            if was != value:
                raise ValueError(
                    f"checkpoint is of another probe: {name} was {was}, now {value}; delete it to start anew"
                )
        if header["model"] != self._digest() and (
            self._sharded or not checkpoints.is_model(header["model"], self._model)
        ):
            raise ValueError("checkpoint is of a model with other weights; delete it to start anew")
        plan, _ = Plan.from_json(header["plan"])
        of_rows = Rows.is_state(arrays)
        if self._due:
            self._first_batch = FirstBatch.from_json(header["first"])
        elif of_rows or self._ranks is not None:
            self._agreed(FirstBatch.from_json(header["first"]))
        for target, (_, width) in zip(self._targets, plan.targets, strict=True):
            target.classes = width
        if of_rows:
            self._restore_rows(plan, header["notes"], arrays)
        elif self._spec.route == "samples":
            raise ValueError(
                "route: 'samples' cannot be taken, since the checkpoint is of moments; delete it to start "
                "anew"
            )
        else:
            self._moments = self._summing(plan, masked=header["masked"])
            self._moments.load(arrays, self._device())
        self._provenance = {**header["provenance"], "weights": self._digest()}

    def _restore_rows(
        self, plan: Plan, notes: Sequence[str], arrays: Mapping[str, np.ndarray[Any, Any]]
    ) -> None:
        """Hold the rows of a checkpoint, with empty moments to hand them over to."""
        first = self._first_batch
        assert first is not None
        rows = Rows(plan, room(first, self._spec), uncentred=self._spec.uncentred)
        rows.load(arrays, self._device(), notes)
        self._rows = rows
        try:
            moments = plan_of(first, self._spec, self._names)
            self._moments = self._summing(moments, masked=first.masked)
        except ValueError as error:
            self._too_big = error
        if self._no_samples:
            self._hand_over(self._no_samples)

    def _asked(self) -> dict[str, Any]:
        ranks = None if self._ranks is None else [self._ranks.rank, self._ranks.size]
        return {**self._spec.to_json(self._names), "ranks": ranks}

    def _of_all_ranks(self, ranks: Ranks, last: bool) -> tuple[Moments | None, dict[str, Any]]:
        """The moments and provenance of all ranks."""
        if self._summed is not None:
            return self._summed
        try:
            if self._due:
                self.passed()
            elif self._moments is None and (first := self._agreed(None)) is not None:
                self._moments = self._empty(first)
            found = all_reduce(ranks, self._moments, self._provenance, self._device())
            if last:
                self._summed = (None, {}) if found is None else found
                ranks.close()
        except BaseException as error:
            ranks.fail(error)
            raise
        return (None, {}) if found is None else found

    def _device(self) -> torch.device:
        return runs_on(self._model) or torch.device("cpu")

    def _agreed(self, first: FirstBatch | None, *, waiting: bool = False) -> FirstBatch | None:
        """The first batch that all ranks start from; this one's if it is by itself. None if no rank has one,
        or one is ``waiting`` for layers to run."""
        own = first
        if self._ranks is not None:
            asked = {**self._spec.to_json(self._names), "weights": self._fingerprint()}
            first = agree(self._ranks, asked, first, waiting=waiting)
        self._first_batch = first or own
        found = first.targets if first else ()
        for target, (_, width, labels) in zip(self._targets, found, strict=False):
            target.classes = width if labels else None
        return first

    def _hand_over(self, why: str) -> None:
        """Sum up the rows that were held back, since they will not be measured at once: ``why``.

        Raises ValueError if that was asked for, or moments do not fit ``memory``.
        """
        rows, self._rows = self._rows, None
        self._why_moments = self._why_moments or why
        if rows is not None:
            if self._spec.route == "samples":
                raise ValueError(f"route: 'samples' cannot be taken, since {why}")
            if self._too_big is not None:
                raise ValueError(f"{self._too_big} (rows cannot be held, since {why})")
            for batch in rows.batches():
                self._sum_up(batch)

    def _seen_first(self, batch: RowBatch) -> FirstBatch:
        rows = [
            next(x for b in self._early if (x := b.layers[k]) is not None) for k in range(len(self._names))
        ]
        return FirstBatch(
            widths=tuple(x.shape[2] for x in rows),
            length=rows[0].shape[1],
            aligned=len({x.shape[1] for x in batch.present}) == 1,
            padded=batch.padded,
            places=tuple(batch.places),
            masked=batch.masked is not None,
            targets=tuple(
                (t.name, x.shape[2], t.classes is not None)
                for t, x in zip(self._targets, batch.targets, strict=True)
            ),
            free=free_bytes(rows[0].device),
            factors=factors_pay(rows[0]),
            launched=waits_for(rows[0].device),
        )

    def _empty(self, first: FirstBatch) -> Moments:
        plan = plan_of(first, self._spec, self._names)
        self._announce(plan, str(plan), weights=self._fingerprint())
        return self._summing(plan, masked=first.masked)

    def _summing(self, plan: Plan, *, masked: bool) -> Moments:
        # On the CPU results have the bound of uncentred ranks whether these are asked for or not, as ever.
        uncentred = self._spec.uncentred or not waits_for(self._device())
        return Moments(plan, masked=masked, unread=self._unread, uncentred=uncentred)

    def _digest(self) -> str:
        """That of the weights; if they are sharded or offloaded, as they were at the start.

        Raises ValueError if they cannot be read.
        """
        found = self._weights if self._read_once else None
        if (found := found or checkpoints.fingerprint(self._model)) is None:
            raise ValueError(
                "checkpoint must be of a model whose weights can be read, to tell it from others, and those "
                f"of this {class_of(self._model).__name__} cannot (offloaded, and no hook says where to)"
            )
        return found

    def _fingerprint(self) -> str | None:
        return self._weights or checkpoints.fingerprint(self._model)

    def _announce(self, plan: Plan, text: str, **found: Any) -> None:
        if self._say:
            print(f"probe: {text}")
            sys.stdout.flush()
        ranks = {} if self._ranks is None else {"ranks": self._ranks.size}
        asked = self._spec.to_json(self._names)
        self._provenance = provenance(
            self._model,
            layers=list(plan.names),
            measures=list(self._spec.measures),
            **{
                name: asked[name]
                for name in ("mask", "rows", "padding", "origin", "axes", "output", "placements")
                if name in asked
            },
            **ranks,
            **found,
        )


def _owned(batch: RowBatch) -> RowBatch:
    """``batch`` with layers of its own, which later forwards do not write to."""
    return replace(batch, layers=[None if x is None else x.clone() for x in batch.layers])
