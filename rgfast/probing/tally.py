"""What a probe has seen so far: it chooses the estimators, and hands what one holds over to another."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from rgfast.ops.fast import takes_rows
from rgfast.probing import checkpoint as checkpoints
from rgfast.probing.assemble import assemble
from rgfast.probing.capture.layers import Tap
from rgfast.probing.capture.rows import RowBatch
from rgfast.probing.distributed import agree, all_reduce
from rgfast.probing.early import Early
from rgfast.probing.estimators.base import HoldsRows
from rgfast.probing.estimators.moments import Moments
from rgfast.probing.estimators.rows import Rows
from rgfast.probing.estimators.samples import enough, worthwhile
from rgfast.probing.fingerprint import Fingerprint
from rgfast.probing.first import FirstBatch
from rgfast.probing.foreseeing import rows_or_moments
from rgfast.probing.later import bring
from rgfast.probing.offloaded import runs_on
from rgfast.probing.owners import Gathered, Owners
from rgfast.probing.partitioned_plan import first_number, plan_of_ranks
from rgfast.probing.plan import Plan
from rgfast.probing.planning import plan_of, room, unbounded_plan, why_no_samples
from rgfast.probing.predict import Foreseen
from rgfast.probing.provenance import provenance
from rgfast.probing.ranks import Ranks
from rgfast.probing.result import ProbeResult
from rgfast.probing.spec import ProbeSpec
from rgfast.probing.targets import Target
from rgfast.probing.tiling import BY_SAMPLES, by_tiles, foreseen_tiles
from rgfast.probing.unread import Unread
from rgfast.runtime.waiting import waits_for
from rgfast.streaming import pair_keys

__all__ = ["Tally"]

_OWNED = "checkpoint is of another owner= of the layers' moments; take the one it was made with, or delete it"
# Options that say how batches and layers were read.
_READ = ("mask", "rows", "padding", "origin", "axes", "output", "placements")


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
        self._moments: Moments | Owners | None = None
        self._why_moments = ""
        self._too_big: ValueError | None = None
        self._early = Early()
        self._rows: HoldsRows | None = None
        self._first_batch: FirstBatch | None = None
        self._summed: tuple[Moments | Gathered | None, dict[str, Any]] | None = None
        self._provenance: dict[str, Any] = {}
        self.expected: int | None = None  # how many sequences come, if that is known
        self._save: Callable[[], None] | None = None
        self._save_due = False
        self._weights = Fingerprint(model)
        # Ranks that run every forward together agree after one of them, all at the same time.
        self._due = self._weights.sharded and ranks is not None

    def open(self) -> None:
        """Forwards will follow. Reads the weights for their fingerprint, which would hold up a forward, and
        what earlier results have left on devices. Those on GPUs wait for :meth:`began`."""
        bring()
        if not self._begun:
            self._weights.open(alone=self._ranks is None, needed=self._spec.checkpoint is not None)

    def began(self) -> None:
        """A forward begins."""
        self._weights.began()

    def close(self, *, failed: bool) -> None:
        """No forward follows: weights may change from now on."""
        if failed:
            self._weights.stop()
        else:
            self._weights.put_into(self._provenance)

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
        held = self._early.sequences + (0 if self._rows is None else self._rows.sequences)
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
        if self._no_samples:
            return None, []
        return by_tiles(self._model, self._spec, self._taps, batches, self._announce_last_note, advance)

    def _announce_last_note(self, plan: Plan) -> dict[str, Any]:
        """Say what is measured, and the last note; the provenance."""
        self._announce(plan, f"{plan.what}, {plan.notes[-1]}")
        return self._provenance

    def foreseen(self, batch: Any, sequences: int) -> Foreseen:
        """What ``sequences`` like those added so far, which were those of ``batch``, lead to."""
        deficient = self._rows.deficient() if isinstance(self._rows, Rows) else ()
        if not self._no_samples:
            tiles = foreseen_tiles(self._model, self._spec, self._taps, batch, sequences, deficient)
            if tiles is not None:
                return tiles
        return rows_or_moments(
            self._spec,
            None if self._rows is None else self._rows.plan,
            None if self._moments is None else self._moments.plan,
            sequences,
            why_moments=self._no_samples or self._why_moments,
            too_big=self._too_big,
            deficient=deficient,
        )

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
            self._early.add(batch, self._names)
            if not self._early.unseen() and not self._due:
                first = self._agreed(self._seen_first())
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
        seen, waiting = bool(self._early), bool(self._early) and bool(self._early.unseen())
        own = self._seen_first() if seen and not waiting else self._first_batch
        first = self._agreed(own, waiting=waiting)
        if first is None:
            self._early.own()
            return
        self._due = False
        if seen:
            self._begin(self._early.batches[-1], first)
        elif self._moments is None:
            self._moments = self._empty(first)

    def hand_rows(self) -> None:
        """Have rows go to the owners of their layers after a forward, and a checkpoint be written if it is
        due."""
        if isinstance(self._moments, Owners):
            self._moments.due = self._moments.due or self._save_due
            self._save_due = False
            self._moments.passed()

    @property
    def shared(self) -> bool:
        """Whether ranks share out the layers, as far as that is known."""
        return isinstance(self._moments, Owners)

    def save_by(self, save: Callable[[], None]) -> None:
        """Have ranks that share out the layers write checkpoints by ``save()``, all at the same time."""
        self._save = save

    def save_next(self) -> None:
        """Have these ranks do so after the next forward."""
        self._save_due = True

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
                self._announce(rows.plan, said)
            self._rows = rows
        for one in self._early.take():
            self._add(one)

    def _hold(self, first: FirstBatch) -> Rows | None:
        """What holds rows back, if these views can be had from rows."""
        if not first.aligned or any(first.places):
            return None
        plan = unbounded_plan(first, self._spec, self._names).noted([BY_SAMPLES])
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

    def result(self, *, last: bool) -> ProbeResult:
        """The measures of all that was seen; ``last`` makes it the last exchange with the other ranks."""
        self._look()
        self._weights.put_into(self._provenance)
        spec = self._spec
        rows = self._rows if self._rows is not None and enough(self._rows.sequences, spec.groups) else None
        if rows is not None and (spec.route == "samples" or worthwhile(rows.plan, rows.sequences)):
            return ProbeResult(assemble(rows.measures(), spec.measures, self._provenance), rows.state())
        if self._early:
            raise ValueError(self._early.never_ran(self._names))
        self._hand_over("there are too few sequences for every measure")
        found: Any = (self._moments, self._provenance)
        moments, provenance = found if self._ranks is None else self._of_all_ranks(self._ranks, last)
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
        self._weights.put_into(self._provenance)
        if self._ranks is not None and self._spec.owner == "layers" and not self._early and not self._due:
            self._join()
        if self.plan is None:
            raise RuntimeError("snapshot() has nothing to give before the first forward")
        header = {
            "first": None if self._first_batch is None else asdict(self._first_batch),
            "asked": self._asked(),
            "model": self._weights.known(),
            "provenance": self._provenance,
        }
        rows = self._rows
        if isinstance(rows, Rows):
            rows.look()
            return {**header, "plan": rows.plan.to_json(), "notes": list(rows.notes)}, rows.state()
        self._hand_over("a snapshot is of moments")
        moments = self._moments
        assert moments is not None
        if isinstance(moments, Owners):
            header["owned"], arrays = moments.state()
        else:
            arrays = moments.state()
        return {**header, "plan": moments.plan.to_json(), "masked": moments.masked}, arrays

    def restore(self, header: Mapping[str, Any], arrays: Mapping[str, np.ndarray[Any, Any]]) -> None:
        """What :meth:`rgfast.Probe.restore` says."""
        self._names = checkpoints.runs_of(self._names, header["asked"].get("layers"))
        checkpoints.refuse_another(header["asked"], self._asked())
        if not self._weights.matches(header["model"]):
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
        elif "owned" in header:
            first = self._first_batch
            assert first is not None
            owners = self._empty(first, start=0)
            if not isinstance(owners, Owners):
                raise ValueError(_OWNED)
            owners.load(header["owned"], arrays, plan.notes)
            self._moments = owners
        elif self._spec.owner == "layers" and self._ranks is not None and self._ranks.size > 1:
            raise ValueError(_OWNED)
        else:
            summing = self._summing(plan, masked=header["masked"])
            summing.load(arrays, self._device())
            self._moments = summing
        self._provenance = {**header["provenance"], "weights": self._weights.known()}
        self._weights.forgo()

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

    def _of_all_ranks(self, ranks: Ranks, last: bool) -> tuple[Moments | Gathered | None, dict[str, Any]]:
        """The moments or measures, and the provenance, of all ranks."""
        if self._summed is not None:
            return self._summed
        try:
            if self._due:
                self.passed()
            else:
                self._join()
            found: Any = self._moments
            if isinstance(found, Owners):
                found = found.of_all_ranks(self._provenance)
            else:
                found = all_reduce(ranks, found, self._provenance, self._device())
            if last:
                self._summed = (None, {}) if found is None else found
                ranks.close()
        except BaseException as error:
            ranks.fail(error)
            raise
        return (None, {}) if found is None else found

    def _join(self) -> None:
        """Agree with the other ranks if this one has had no batch."""
        if self._moments is None and (first := self._agreed(None)) is not None:
            self._moments = self._empty(first)

    def _device(self) -> torch.device:
        return runs_on(self._model) or torch.device("cpu")

    def _agreed(self, first: FirstBatch | None, *, waiting: bool = False) -> FirstBatch | None:
        """The first batch that all ranks start from; this one's if it is by itself. None if no rank has one,
        or one is ``waiting`` for layers to run."""
        own = first
        if self._ranks is not None:
            asked = {**self._spec.to_json(self._names), "owner": self._spec.owner}
            asked["weights"] = self._weights.found()
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

    def _seen_first(self) -> FirstBatch:
        return self._early.first(len(self._names), self._targets)

    def _empty(self, first: FirstBatch, *, start: int | None = None) -> Moments | Owners:
        """What sums up; the number of the first sequence is ``start``, or agreed on by all ranks."""
        ranks = self._ranks
        found = plan_of_ranks(first, self._spec, self._names, 1 if ranks is None else ranks.size)
        if isinstance(found, Plan):
            self._announce(found, str(found))
            return self._summing(found, masked=first.masked)
        assert ranks is not None
        self._announce_last_note(found.plan)
        unread, masked = self._unread, first.masked
        own = found.moments(ranks.rank, masked=masked, unread=unread, uncentred=self._uncentred)
        if start is None:
            part = self._early.batches[-1].part if self._early else None
            start = first_number(ranks, self.expected, () if part is None else part.ranks)
        made = Owners(
            found, own, ranks, self._device(), unread, start, masked=masked, in_step=self._weights.sharded
        )
        made.save = self._save
        return made

    def _summing(self, plan: Plan, *, masked: bool) -> Moments:
        return Moments(plan, masked=masked, unread=self._unread, uncentred=self._uncentred)

    @property
    def _uncentred(self) -> bool:
        # On the CPU results have the bound of uncentred ranks whether these are asked for or not, as ever.
        return self._spec.uncentred or not waits_for(self._device())

    def _announce(self, plan: Plan, text: str) -> None:
        if self._say:
            print(f"probe: {text}", flush=True)
        ranks = {} if self._ranks is None else {"ranks": self._ranks.size}
        asked = self._spec.to_json(self._names)
        self._provenance = provenance(
            self._model,
            layers=list(plan.names),
            measures=list(self._spec.measures),
            **{name: asked[name] for name in _READ if name in asked},
            **ranks,
            weights=self._weights.so_far(),
        )
