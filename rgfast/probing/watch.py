"""Watching a model: hooks on its layers while it runs, moments as the state."""

from __future__ import annotations

import functools
import inspect
import json
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from types import TracebackType
from typing import Any, Literal, ParamSpec

import numpy as np
import torch
from torch import Tensor, nn

from rgfast.probing import checkpoint as checkpoints
from rgfast.probing.activations import as_rows, find_tensor
from rgfast.probing.assemble import assemble
from rgfast.probing.batches import Caller, batch_rows
from rgfast.probing.capture import Captures, stack_of
from rgfast.probing.companions import Companions, MaskSpec, row_masks
from rgfast.probing.distributed import (
    Distributed,
    FirstBatch,
    agree,
    all_reduce,
    open_ranks,
    unwrapped,
)
from rgfast.probing.held import HeldRows
from rgfast.probing.layers import LayerSpec, resolve
from rgfast.probing.measures import DRIFTS, PAIRWISE, asked_measures
from rgfast.probing.plan import Plan, check_positions, check_views, make_plan, parse_memory
from rgfast.probing.provenance import provenance
from rgfast.probing.ranks import Ranks
from rgfast.probing.result import ProbeResult
from rgfast.probing.samples import enough, gather, measured_by_samples, worthwhile
from rgfast.probing.targets import TargetSpec, make_targets
from rgfast.probing.views import ViewState
from rgfast.stack import ResidualStack
from rgfast.streaming import Pairs, as_pairs, pair_keys
from rgfast.validation import check_choice, check_positive_int

__all__ = ["MaskSpec", "Probe", "Route"]

_P = ParamSpec("_P")

_FOLDS = 5

# Sequences of our own stack that are taken through all its layers, and summed, at once: as many rows per
# position as an accumulator sums in one product.
_TILE = 128

Route = Literal["auto", "moments", "samples"]

_BY_SAMPLES = "by samples: CKA and drift to 1e-6, nothing kept to merge (route='moments' keeps it)"


def _telling_ranks(init: Callable[_P, None]) -> Callable[_P, None]:
    """``init``, after which the other ranks know of an error in it."""

    @functools.wraps(init)
    def wrapped(*args: _P.args, **kwargs: _P.kwargs) -> None:
        try:
            init(*args, **kwargs)
        except BaseException as error:
            ranks: Ranks | None = getattr(args[0], "_ranks", None)
            if ranks is not None:
                ranks.fail(error)
            raise

    return wrapped


class Probe:
    """The context manager behind :func:`probe`, for a loop of one's own.

    Inside the ``with`` block every forward of the model is measured; arguments are those of :func:`probe`.
    ``run(batch)`` calls the model as :func:`probe` does; a plain ``model(...)`` works too, and ``mask`` then
    names an argument of the forward or an entry given by :meth:`note` before it. On leaving, hooks are gone
    and training flags and grad mode are as they were on entering.

    >>> import torch, rgfast
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
    >>> with rgfast.Probe(model, layers=["0", "2"], progress=False) as p:
    ...     for _ in range(3):
    ...         _ = model(torch.randn(10, 4))
    >>> p.result().dataset.n.values
    array([[30]])
    """

    @_telling_ranks
    def __init__(
        self,
        model: nn.Module,
        *,
        layers: str | LayerSpec | Sequence[LayerSpec] = "auto",
        positions: str | Sequence[int] = "auto",
        measures: str | Sequence[str] = "all",
        pairs: Pairs = "adjacent",
        mask: MaskSpec = None,
        targets: Mapping[str, TargetSpec] | None = None,
        groups: int = 1,
        progress: bool | None = None,
        memory: str | int = "4GiB",
        views: Sequence[str] | None = None,
        refine: bool | None = None,
        route: Route = "auto",
        distributed: Distributed = "auto",
        timeout: float = 60.0,
    ) -> None:
        check_choice(route, "route", ("auto", "moments", "samples"))
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        self._ranks = open_ranks(distributed, timeout)
        if self._ranks is not None:
            weakref.finalize(self, self._ranks.leave)
        model = unwrapped(model)
        check_positive_int(groups, "groups")
        if mask is not None and not isinstance(mask, str) and not callable(mask):
            raise TypeError(
                f"mask must be the name of a batch entry or a callable, got {type(mask).__name__}"
            )
        if refine is not None and not isinstance(refine, bool):
            raise TypeError(f"refine must be True, False or None, got {refine!r}")
        self.model, self._refine = model, refine
        self.measures = asked_measures(measures)
        pairs = as_pairs(pairs)
        self._pairs: Pairs = pairs if set(self.measures) & {*DRIFTS, *PAIRWISE} else ()
        self._targets = make_targets(targets)
        if self._targets and groups == 1:
            groups = _FOLDS
        self._mask, self._groups, self._views = mask, groups, None if views is None else list(views)
        self._positions, self._memory = positions, parse_memory(memory)
        check_positions(positions)
        self._taps, chosen = resolve(model, layers)
        pair_keys(pairs, len(self._taps))
        if views is not None:
            check_views(views)
        self._say = progress is not False and (self._ranks is None or self._ranks.rank == 0)
        if self._say and layers == "auto":
            print(f"probe: {chosen}")
        self._caller = Caller(model)
        self._signature = inspect.signature(model.forward)
        self._captures = Captures(self._taps)
        self._entries: dict[str, Any] = {}
        self._noted: dict[str, Any] = {}
        self._handles: list[Any] = []
        self._batch: Companions | None = None
        self._route: Route = route
        self._no_samples = self._why_no_samples()
        if route == "samples" and self._no_samples:
            raise ValueError(f"route: 'samples' cannot be taken, since {self._no_samples}")
        self._uncentred = any(name.endswith("uncentred") for name in self.measures)
        self._held: HeldRows | None = None
        self._tiled = False
        self._state: ViewState | None = None
        self._first_batch: FirstBatch | None = None
        self._summed: tuple[ViewState | None, dict[str, Any]] | None = None
        self._provenance: dict[str, Any] = {}

    def _why_no_samples(self) -> str:
        if self._route == "moments":
            return "moments were asked for"
        if self._ranks is not None:
            return "several processes probe together"
        if self._mask is not None or self._targets or self._refine is not None:
            return "it knows no mask, targets or refine"
        if self._views != ["position"] or self._pairs not in ("adjacent", "all"):
            return "it gives views=['position'] of adjacent or all pairs"
        return ""

    @property
    def plan(self) -> Plan | None:
        """What is measured and what it costs; None before the first forward."""
        return None if self._state is None else self._state.plan

    def __enter__(self) -> Probe:
        if self._handles:
            raise RuntimeError("this Probe is watching already; its with block cannot be nested in itself")
        if self._summed is not None:
            raise RuntimeError("this Probe has summed what all ranks saw; take a new one to see more")
        self._modes = [(module, module.training) for module in self.model.modules()]
        self._grad = torch.is_grad_enabled()
        modules = dict(self.model.named_modules(remove_duplicate=False))
        stack = stack_of(modules, self._taps)
        self._tiled = stack is not None
        try:
            self._handles.append(self.model.register_forward_pre_hook(self._begin, with_kwargs=True))
            if stack is not None:
                self._handles.append(stack.register_forward_pre_hook(self._enter_stack, with_kwargs=True))
                self._handles.append(stack.watch(self._take_tile, _TILE * self._groups))
            for index, tap in enumerate(self._taps if stack is None else ()):
                self._handles.append(self._captures.hook(index, modules[tap.module]))
            self._handles.append(
                self.model.register_forward_hook(self._finish if stack is None else self._finish_stack)
            )
        except BaseException:
            self._restore()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._restore()
        if self._ranks is not None and value is not None:
            self._ranks.fail(value)

    def _restore(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._captures.clear()
        self._batch = None
        for module, training in self._modes:
            module.training = training
        torch.set_grad_enabled(self._grad)

    def note(self, **entries: Any) -> None:
        """Give the next forward entries that the model itself does not take, for ``mask``."""
        self._noted.update(entries)

    def run(self, batch: Any) -> Any:
        """The output of the model on one batch, called as :func:`probe` does; an empty batch gives None."""
        if not self._handles:
            raise RuntimeError("run() must be called inside the with block")
        if not batch_rows(batch):
            return None
        entries = self._caller.entries(batch)
        named = [self._mask, *(target.entry for target in self._targets)]
        reserved = frozenset(name for name in named if isinstance(name, str))
        self._noted.update(entries)
        return self._caller(batch, entries, reserved)

    def by_samples(
        self, batches: Iterator[Any], advance: Callable[[int], object]
    ) -> tuple[ProbeResult | None, list[Any]]:
        """The measures of all ``batches`` of a stack without mixing, or None and the batches taken so far.

        Such a stack takes a few positions at a time through all its layers: nothing else is ever stored.
        """
        stack, taken = self.model, list[Any]()
        if self._no_samples or not isinstance(stack, ResidualStack) or stack.mixing != "none":
            return None, taken
        x, taken = gather(stack, self._taps, batches)
        if x is None or not enough(len(x), self._groups):
            return None, taken
        names, options = [tap.name for tap in self._taps], self._options_of_plan(False)
        options |= {"memory": sys.maxsize, "refine": False}
        plan = make_plan(names, [stack.width] * len(names), x.shape[1], **options)
        if self._route == "auto" and not worthwhile(plan, len(x)):
            return None, taken
        plan = replace(plan, notes=(_BY_SAMPLES,))
        self._announce(plan, f"{plan.what}, {_BY_SAMPLES}")
        with torch.no_grad():
            state = measured_by_samples(
                stack, x, plan, uncentred=self._uncentred, memory=self._memory, advance=advance
            )
        return ProbeResult(assemble(state, self.measures, self._provenance)), taken

    def result(self) -> ProbeResult:
        """The measures of all that was seen so far.

        Raises ValueError for fewer than 2 sequences.
        """
        held = self._held if self._held is not None and self._held.enough() else None
        if held is not None and (self._route == "samples" or held.worthwhile()):
            found = held.measured(uncentred=self._uncentred)
            return ProbeResult(assemble(found, self.measures, self._provenance))
        self._release("there are too few sequences for every measure")
        state, provenance = self._state, self._provenance
        if self._ranks is not None:
            state, provenance = self._of_all_ranks(self._ranks)
        seen = 0 if state is None else state.sequences
        if state is None or seen < 2:
            raise ValueError(f"batches must hold at least 2 sequences in all, got n = {seen}")
        if seen < 2 * self._groups:
            raise ValueError(
                f"groups must hold at least 2 sequences each, got {self._groups} groups of {seen} sequences"
            )
        dataset = assemble(state, self.measures, provenance)
        first = self._ranks is None or self._ranks.rank == 0
        return ProbeResult(dataset, state.state_dict(), writes=first)

    def _of_all_ranks(self, ranks: Ranks) -> tuple[ViewState | None, dict[str, Any]]:
        """The moments and provenance of all ranks. Outside the with block it is the last exchange."""
        if self._summed is not None:
            return self._summed
        try:
            if self._state is None and (first := self._agreed(None)) is not None:
                self._state = self._empty(first)
            found = all_reduce(ranks, self._state, self._provenance, self._device())
            if not self._handles:
                self._summed = (None, {}) if found is None else found
                ranks.close()
        except BaseException as error:
            ranks.fail(error)
            raise
        return (None, {}) if found is None else found

    def _device(self) -> torch.device:
        first = next(iter(self.model.parameters()), None)
        return torch.device("cpu") if first is None else first.device

    def _agreed(self, first: FirstBatch | None) -> FirstBatch | None:
        """The first batch that all ranks start from; this one's where it is by itself."""
        if self._ranks is not None:
            asked = {**self._asked_for(), "weights": checkpoints.model_digest(self.model)}
            del asked["ranks"]
            first = agree(self._ranks, asked, first)
        self._first_batch = first
        for target, (_, width, labels) in zip(self._targets, first.targets if first else (), strict=False):
            target.classes = width if labels else None
        return first

    def snapshot(self) -> tuple[dict[str, Any], dict[str, np.ndarray[Any, Any]]]:
        """All that a checkpoint holds: what is measured and on which model, and the moments.

        Raises RuntimeError before the first forward.
        """
        self._release("a snapshot is of moments")
        if self._state is None:
            raise RuntimeError("snapshot() has nothing to give before the first forward")
        header = {
            "plan": self._state.plan.to_json(),
            "masked": self._state.masked,
            "first": None if self._first_batch is None else asdict(self._first_batch),
            "asked": self._asked_for(),
            "model": checkpoints.model_digest(self.model),
            "provenance": self._provenance,
        }
        return header, self._state.state_dict()

    def restore(self, header: Mapping[str, Any], arrays: Mapping[str, np.ndarray[Any, Any]]) -> None:
        """Go on from what :meth:`snapshot` gave. Raises ValueError where it was of another probe or model."""
        asked = self._asked_for()
        for name, value in asked.items():
            if header["asked"].get(name) != value:
                was = header["asked"].get(name)
                raise ValueError(
                    f"checkpoint is of another probe: {name} was {was}, now {value}; delete it to start anew"
                )
        if header["model"] != checkpoints.model_digest(self.model):
            raise ValueError("checkpoint is of a model with other weights; delete it to start anew")
        plan, _ = Plan.from_json(header["plan"])
        self._state = ViewState(plan, masked=header["masked"])
        self._state.load_state_dict(arrays, self._device())
        for target, (_, width) in zip(self._targets, plan.targets, strict=True):
            target.classes = width
        if self._ranks is not None:
            self._agreed(FirstBatch.from_json(header["first"]))
        self._provenance = dict(header["provenance"])

    def _asked_for(self) -> dict[str, Any]:
        """The options that decide what is measured, as JSON gives them back."""
        asked = {
            "layers": [tap.name for tap in self._taps],
            "positions": self._positions if isinstance(self._positions, str) else list(self._positions),
            "measures": self.measures,
            "pairs": self._pairs if isinstance(self._pairs, str) else [list(pair) for pair in self._pairs],
            "mask": self._mask if isinstance(self._mask, str) else self._mask is not None,
            "targets": [target.name for target in self._targets],
            "groups": self._groups,
            "views": self._views,
            "memory": self._memory,
            "refine": self._refine,
            "ranks": None if self._ranks is None else [self._ranks.rank, self._ranks.size],
        }
        found: dict[str, Any] = json.loads(json.dumps(asked))
        return found

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._captures.clear()
        self._batch = None
        try:
            bound = dict(self._signature.bind_partial(*args, **kwargs).arguments)
        except TypeError:
            bound = {}
        self._entries = {**bound, **bound.pop("kwargs", {}), **self._noted}
        self._noted = {}

    def _finish(self, module: nn.Module, args: Any, output: Any) -> None:
        entries, self._entries = self._entries, {}
        rows = self._captures.take()
        if rows[0].shape[0]:
            self._add(rows, self._whole_batch(rows[0], entries))

    def _whole_batch(self, rows: Tensor, entries: Mapping[str, Any]) -> Companions:
        """What goes with a batch of which ``rows`` ``[B, T, D]`` is one layer."""
        keep, masked = row_masks(self._mask, entries, rows)
        seen = 0 if self._state is None else self._state.sequences
        targets = [target.rows(entries, seen, *rows.shape[:2]).to(rows.device) for target in self._targets]
        return Companions(keep, masked, targets)

    def _add(self, rows: list[Tensor], batch: Companions) -> None:
        if self._ranks is not None:
            self._ranks.check()
        if self._state is None:
            self._state = self._start(rows, batch.masked is not None, batch.targets)
            if not self._no_samples and batch.masked is None:
                plan = replace(self._state.plan, notes=(_BY_SAMPLES,))
                self._held = HeldRows(plan, self._memory, copied=self._tiled)
        if self._held is not None:
            why = "positions are left out" if batch.keep is not None else self._held.refusal(rows)
            if not why:
                self._state.check(rows, None, self._held.sequences)
                self._held.add(rows)
                return
            self._release(why)
        # Of labels there may be more on other ranks than in this one's first batch.
        widths = [width for _, width in self._state.plan.targets]
        targets = [
            x if x.shape[2] >= width else torch.nn.functional.pad(x, (0, width - x.shape[2]))
            for x, width in zip(batch.targets, widths, strict=True)
        ]
        with torch.no_grad():
            self._state.update(rows, batch.keep, batch.masked, targets)

    def _release(self, why: str) -> None:
        """Sum up what was held back, since it will not be measured at once: ``why``."""
        held, self._held = self._held, None
        if held is not None:
            if self._route == "samples":
                raise ValueError(f"route: 'samples' cannot be taken, since {why}")
            assert self._state is not None
            with torch.no_grad():
                for rows in held.batches:
                    self._state.update(rows, None, None)

    def _enter_stack(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._batch is not None:
            raise ValueError("layers: the stack ran twice in one forward, so its layers are ambiguous")
        name = self._taps[0].name
        rows = as_rows(find_tensor([*args, *kwargs.values()], name).detach(), name)
        self._batch = self._whole_batch(rows, self._entries)

    def _take_tile(self, first: int, states: Tensor) -> None:
        assert self._batch is not None
        rows = [as_rows(x, tap.name) for x, tap in zip(states, self._taps, strict=True)]
        self._add(rows, self._batch.part(slice(first, first + len(rows[0]))))

    def _finish_stack(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._batch is None:
            raise ValueError(f"layers: {self._taps[0].module} did not run in this forward")
        self._batch, self._entries = None, {}

    def _start(self, rows: list[Tensor], masked: bool, targets: list[Tensor]) -> ViewState:
        sizes = {x.shape[0] for x in rows}
        if len(sizes) != 1:
            found = {tap.name: x.shape[0] for tap, x in zip(self._taps, rows, strict=True)}
            raise ValueError(f"layers must have the same number of rows, got {found}")
        first = self._agreed(
            FirstBatch(
                widths=tuple(x.shape[2] for x in rows),
                length=rows[0].shape[1],
                aligned=len({x.shape[1] for x in rows}) == 1,
                masked=masked,
                targets=tuple(
                    (t.name, x.shape[2], t.classes is not None)
                    for t, x in zip(self._targets, targets, strict=True)
                ),
            )
        )
        assert first is not None
        return self._empty(first)

    def _empty(self, first: FirstBatch) -> ViewState:
        plan = make_plan(
            [tap.name for tap in self._taps],
            first.widths,
            first.length,
            **self._options_of_plan(first.masked),
            aligned=first.aligned,
            targets=[(name, width) for name, width, _ in first.targets],
        )
        self._announce(plan, str(plan))
        return ViewState(plan, masked=first.masked)

    def _options_of_plan(self, masked: bool) -> dict[str, Any]:
        return {
            "positions": self._positions,
            "views": self._views,
            "pairs": self._pairs,
            "groups": self._groups,
            "memory": self._memory,
            "masked": masked,
            "refine": self._refine,
        }

    def _announce(self, plan: Plan, text: str) -> None:
        if self._say:
            print(f"probe: {text}")
            sys.stdout.flush()
        ranks = {} if self._ranks is None else {"ranks": self._ranks.size}
        self._provenance = provenance(
            self.model, layers=list(plan.names), measures=list(self.measures), **ranks
        )
