"""What a probe was asked for, and what it has seen so far: rows held back, or moments as the state."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from rgfast.native import unavailable_reason
from rgfast.probing import checkpoint as checkpoints
from rgfast.probing.assemble import assemble
from rgfast.probing.capture.companions import Companions, MaskSpec
from rgfast.probing.capture.layers import Tap
from rgfast.probing.distributed import FirstBatch, agree, all_reduce
from rgfast.probing.estimators.held import HeldRows
from rgfast.probing.estimators.moments import ViewState
from rgfast.probing.estimators.samples import enough, gather, measured_by_samples, worthwhile
from rgfast.probing.plan import Plan, make_plan
from rgfast.probing.provenance import provenance
from rgfast.probing.ranks import Ranks
from rgfast.probing.result import ProbeResult
from rgfast.probing.targets import Target
from rgfast.stack import ResidualStack
from rgfast.streaming import Pairs

__all__ = ["Asked", "Route", "Tally"]

Route = Literal["auto", "moments", "samples"]

_BY_SAMPLES = "by samples: CKA and drift to 1e-6, nothing kept to merge (route='moments' keeps it)"


@dataclass(frozen=True)
class Asked:
    """The options that decide what is measured, checked."""

    taps: Sequence[Tap]
    positions: str | Sequence[int]
    measures: Sequence[str]
    pairs: Pairs
    mask: MaskSpec
    targets: Sequence[Target]
    groups: int
    views: Sequence[str] | None
    memory: int
    refine: bool | None
    route: Route

    @property
    def names(self) -> list[str]:
        return [tap.name for tap in self.taps]

    @property
    def uncentred(self) -> bool:
        return any(name.endswith("uncentred") for name in self.measures)

    def why_no_samples(self, ranks: Ranks | None) -> str:
        """Why the sample route is closed, whatever the batches are; nothing where it is not."""
        if self.route == "moments":
            return "moments were asked for"
        if ranks is not None:
            return "several processes probe together"
        if self.route == "auto" and unavailable_reason() is not None:
            return "moments take less time without compiled kernels"
        if self.mask is not None or self.targets or self.refine is not None:
            return "it knows no mask, targets or refine"
        if self.views != ["position"] or self.pairs not in ("adjacent", "all"):
            return "it gives views=['position'] of adjacent or all pairs"
        return ""

    def plan(self, widths: Sequence[int], length: int, *, masked: bool, **found: Any) -> Plan:
        """The plan for layers of these widths; ``found`` is what else :func:`make_plan` takes."""
        return make_plan(
            self.names,
            widths,
            length,
            positions=self.positions,
            views=self.views,
            pairs=self.pairs,
            groups=self.groups,
            memory=self.memory,
            masked=masked,
            refine=self.refine,
            **found,
        )

    def to_json(self) -> dict[str, Any]:
        """All of it but the route as JSON gives it back, to compare with another rank's or a checkpoint's."""
        asked = {
            "layers": self.names,
            "positions": self.positions if isinstance(self.positions, str) else list(self.positions),
            "measures": self.measures,
            "pairs": self.pairs if isinstance(self.pairs, str) else [list(pair) for pair in self.pairs],
            "mask": self.mask if isinstance(self.mask, str) else self.mask is not None,
            "targets": [target.name for target in self.targets],
            "groups": self.groups,
            "views": self.views,
            "memory": self.memory,
            "refine": self.refine,
        }
        found: dict[str, Any] = json.loads(json.dumps(asked))
        return found


class Tally:
    """Everything seen of one model, by this process or by all ``ranks``; ``say`` prints what is measured.

    Raises ValueError where ``asked`` wants the sample route and rules it out.
    """

    def __init__(self, model: nn.Module, asked: Asked, ranks: Ranks | None, *, say: bool) -> None:
        self._model, self._asked, self._ranks, self._say = model, asked, ranks, say
        self._no_samples = asked.why_no_samples(ranks)
        if asked.route == "samples" and self._no_samples:
            raise ValueError(f"route: 'samples' cannot be taken, since {self._no_samples}")
        self.state: ViewState | None = None
        self._held: HeldRows | None = None
        self._first_batch: FirstBatch | None = None
        self._summed: tuple[ViewState | None, dict[str, Any]] | None = None
        self._provenance: dict[str, Any] = {}

    @property
    def sequences(self) -> int:
        """How many sequences the moments are of, rows held back not counted."""
        return 0 if self.state is None else self.state.sequences

    @property
    def ended(self) -> bool:
        """Whether the ranks have exchanged their last, so that nothing more can be added."""
        return self._summed is not None

    def by_samples(
        self, batches: Iterator[Any], advance: Callable[[int], object]
    ) -> tuple[ProbeResult | None, list[Any]]:
        """What :meth:`rgfast.Probe.by_samples` says."""
        stack, asked, taken = self._model, self._asked, list[Any]()
        if self._no_samples or not isinstance(stack, ResidualStack) or stack.mixing != "none":
            return None, taken
        x, taken = gather(stack, asked.taps, batches)
        if x is None or not enough(len(x), asked.groups):
            return None, taken
        unbounded = replace(asked, memory=sys.maxsize, refine=False)
        plan = unbounded.plan([stack.width] * len(asked.taps), x.shape[1], masked=False)
        if asked.route == "auto" and not worthwhile(plan, len(x)):
            return None, taken
        plan = replace(plan, notes=(_BY_SAMPLES,))
        self._announce(plan, f"{plan.what}, {_BY_SAMPLES}")
        with torch.no_grad():
            state = measured_by_samples(
                stack, x, plan, uncentred=asked.uncentred, memory=asked.memory, advance=advance
            )
        return ProbeResult(assemble(state, asked.measures, self._provenance)), taken

    def add(self, rows: list[Tensor], batch: Companions, *, reused: bool) -> None:
        """Add a batch, ``rows[l]`` ``[B, T, D]``; ``reused`` says that these are about to be overwritten."""
        if self._ranks is not None:
            self._ranks.check()
        if self.state is None:
            self.state = self._start(rows, batch.masked is not None, batch.targets)
            if not self._no_samples and batch.masked is None:
                plan = replace(self.state.plan, notes=(_BY_SAMPLES,))
                self._held = HeldRows(plan, self._asked.memory, copied=reused)
        if self._held is not None:
            why = "positions are left out" if batch.keep is not None else self._held.refusal(rows)
            if not why:
                self.state.check(rows, None, self._held.sequences)
                self._held.add(rows)
                return
            self._release(why)
        # Of labels there may be more on other ranks than in this one's first batch.
        widths = [width for _, width in self.state.plan.targets]
        targets = [
            x if x.shape[2] >= width else torch.nn.functional.pad(x, (0, width - x.shape[2]))
            for x, width in zip(batch.targets, widths, strict=True)
        ]
        with torch.no_grad():
            self.state.update(rows, batch.keep, batch.masked, targets)

    def result(self, *, last: bool) -> ProbeResult:
        """The measures of all that was seen; ``last`` makes it the last exchange with the other ranks."""
        asked = self._asked
        held = self._held if self._held is not None and self._held.enough() else None
        if held is not None and (asked.route == "samples" or held.worthwhile()):
            found = held.measured(uncentred=asked.uncentred)
            return ProbeResult(assemble(found, asked.measures, self._provenance))
        self._release("there are too few sequences for every measure")
        state, provenance = self.state, self._provenance
        if self._ranks is not None:
            state, provenance = self._of_all_ranks(self._ranks, last)
        seen = 0 if state is None else state.sequences
        if state is None or seen < 2:
            raise ValueError(f"batches must hold at least 2 sequences in all, got n = {seen}")
        if seen < 2 * asked.groups:
            raise ValueError(
                f"groups must hold at least 2 sequences each, got {asked.groups} groups of {seen} sequences"
            )
        dataset = assemble(state, asked.measures, provenance)
        first = self._ranks is None or self._ranks.rank == 0
        return ProbeResult(dataset, state.state_dict(), writes=first)

    def snapshot(self) -> tuple[dict[str, Any], dict[str, np.ndarray[Any, Any]]]:
        """What :meth:`rgfast.Probe.snapshot` says."""
        self._release("a snapshot is of moments")
        if self.state is None:
            raise RuntimeError("snapshot() has nothing to give before the first forward")
        header = {
            "plan": self.state.plan.to_json(),
            "masked": self.state.masked,
            "first": None if self._first_batch is None else asdict(self._first_batch),
            "asked": self._asked_for(),
            "model": checkpoints.model_digest(self._model),
            "provenance": self._provenance,
        }
        return header, self.state.state_dict()

    def restore(self, header: Mapping[str, Any], arrays: Mapping[str, np.ndarray[Any, Any]]) -> None:
        """What :meth:`rgfast.Probe.restore` says."""
        for name, value in self._asked_for().items():
            if header["asked"].get(name) != value:
                was = header["asked"].get(name)
                raise ValueError(
                    f"checkpoint is of another probe: {name} was {was}, now {value}; delete it to start anew"
                )
        if header["model"] != checkpoints.model_digest(self._model):
            raise ValueError("checkpoint is of a model with other weights; delete it to start anew")
        plan, _ = Plan.from_json(header["plan"])
        self.state = ViewState(plan, masked=header["masked"])
        self.state.load_state_dict(arrays, self._device())
        for target, (_, width) in zip(self._asked.targets, plan.targets, strict=True):
            target.classes = width
        if self._ranks is not None:
            self._agreed(FirstBatch.from_json(header["first"]))
        self._provenance = dict(header["provenance"])

    def _asked_for(self) -> dict[str, Any]:
        ranks = None if self._ranks is None else [self._ranks.rank, self._ranks.size]
        return {**self._asked.to_json(), "ranks": ranks}

    def _of_all_ranks(self, ranks: Ranks, last: bool) -> tuple[ViewState | None, dict[str, Any]]:
        """The moments and provenance of all ranks."""
        if self._summed is not None:
            return self._summed
        try:
            if self.state is None and (first := self._agreed(None)) is not None:
                self.state = self._empty(first)
            found = all_reduce(ranks, self.state, self._provenance, self._device())
            if last:
                self._summed = (None, {}) if found is None else found
                ranks.close()
        except BaseException as error:
            ranks.fail(error)
            raise
        return (None, {}) if found is None else found

    def _device(self) -> torch.device:
        first = next(iter(self._model.parameters()), None)
        return torch.device("cpu") if first is None else first.device

    def _agreed(self, first: FirstBatch | None) -> FirstBatch | None:
        """The first batch that all ranks start from; this one's where it is by itself."""
        if self._ranks is not None:
            asked = {**self._asked.to_json(), "weights": checkpoints.model_digest(self._model)}
            first = agree(self._ranks, asked, first)
        self._first_batch = first
        found = first.targets if first else ()
        for target, (_, width, labels) in zip(self._asked.targets, found, strict=False):
            target.classes = width if labels else None
        return first

    def _release(self, why: str) -> None:
        """Sum up what was held back, since it will not be measured at once: ``why``."""
        held, self._held = self._held, None
        if held is not None:
            if self._asked.route == "samples":
                raise ValueError(f"route: 'samples' cannot be taken, since {why}")
            assert self.state is not None
            held.check()
            with torch.no_grad():
                for rows in held.batches:
                    self.state.update(rows, None, None)

    def _start(self, rows: list[Tensor], masked: bool, targets: list[Tensor]) -> ViewState:
        sizes = {x.shape[0] for x in rows}
        if len(sizes) != 1:
            found = {name: x.shape[0] for name, x in zip(self._asked.names, rows, strict=True)}
            raise ValueError(f"layers must have the same number of rows, got {found}")
        first = self._agreed(
            FirstBatch(
                widths=tuple(x.shape[2] for x in rows),
                length=rows[0].shape[1],
                aligned=len({x.shape[1] for x in rows}) == 1,
                masked=masked,
                targets=tuple(
                    (t.name, x.shape[2], t.classes is not None)
                    for t, x in zip(self._asked.targets, targets, strict=True)
                ),
            )
        )
        assert first is not None
        return self._empty(first)

    def _empty(self, first: FirstBatch) -> ViewState:
        plan = self._asked.plan(
            first.widths,
            first.length,
            masked=first.masked,
            aligned=first.aligned,
            targets=[(name, width) for name, width, _ in first.targets],
        )
        self._announce(plan, str(plan))
        return ViewState(plan, masked=first.masked)

    def _announce(self, plan: Plan, text: str) -> None:
        if self._say:
            print(f"probe: {text}")
            sys.stdout.flush()
        ranks = {} if self._ranks is None else {"ranks": self._ranks.size}
        self._provenance = provenance(
            self._model, layers=list(plan.names), measures=list(self._asked.measures), **ranks
        )
