"""Watching a model: hooks on its layers while it runs, moments as the state."""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, ParamSpec

import numpy as np
import torch
from torch import Tensor, nn

from rgfast.probing.capture.activations import as_rows, find_tensor
from rgfast.probing.capture.batches import Caller, batch_rows
from rgfast.probing.capture.captures import Captures, stack_of
from rgfast.probing.capture.companions import Companions, MaskSpec, row_masks
from rgfast.probing.capture.layers import LayerSpec, resolve
from rgfast.probing.distributed import Distributed, open_ranks, unwrapped
from rgfast.probing.measures import DRIFTS, PAIRWISE, asked_measures
from rgfast.probing.plan import Plan, check_positions, check_views, parse_memory
from rgfast.probing.ranks import Ranks
from rgfast.probing.result import ProbeResult
from rgfast.probing.tally import Asked, Route, Tally
from rgfast.probing.targets import TargetSpec, make_targets
from rgfast.streaming import Pairs, as_pairs, pair_keys
from rgfast.validation import check_choice, check_positive_int

__all__ = ["Probe"]

_P = ParamSpec("_P")

_FOLDS = 5

# Sequences of our own stack that are taken through all its layers, and summed, at once: as many rows per
# position as an accumulator sums in one product.
_TILE = 128


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
        self.model, self.measures = model, asked_measures(measures)
        pairs = as_pairs(pairs)
        self._mask, self._targets = mask, make_targets(targets)
        if self._targets and groups == 1:
            groups = _FOLDS
        views_asked, memory = None if views is None else list(views), parse_memory(memory)
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
        self._groups = groups
        asked = Asked(
            taps=self._taps,
            positions=positions,
            measures=self.measures,
            pairs=pairs if set(self.measures) & {*DRIFTS, *PAIRWISE} else (),
            mask=mask,
            targets=self._targets,
            groups=groups,
            views=views_asked,
            memory=memory,
            refine=refine,
            route=route,
        )
        self._tally = Tally(model, asked, self._ranks, say=self._say)

    @property
    def plan(self) -> Plan | None:
        """What is measured and what it costs; None before the first forward."""
        return None if self._tally.state is None else self._tally.state.plan

    def __enter__(self) -> Probe:
        if self._handles:
            raise RuntimeError("this Probe is watching already; its with block cannot be nested in itself")
        if self._tally.ended:
            raise RuntimeError("this Probe has summed what all ranks saw; take a new one to see more")
        self._modes = [(module, module.training) for module in self.model.modules()]
        self._grad = torch.is_grad_enabled()
        modules = dict(self.model.named_modules(remove_duplicate=False))
        stack = stack_of(modules, self._taps)
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
        return self._tally.by_samples(batches, advance)

    def result(self) -> ProbeResult:
        """The measures of all that was seen so far. With several ranks, the call outside the with block is
        the last exchange.

        Raises ValueError for fewer than 2 sequences.
        """
        return self._tally.result(last=not self._handles)

    def snapshot(self) -> tuple[dict[str, Any], dict[str, np.ndarray[Any, Any]]]:
        """All that a checkpoint holds: what is measured and on which model, and the moments.

        Raises RuntimeError before the first forward.
        """
        return self._tally.snapshot()

    def restore(self, header: Mapping[str, Any], arrays: Mapping[str, np.ndarray[Any, Any]]) -> None:
        """Go on from what :meth:`snapshot` gave. Raises ValueError where it was of another probe or model."""
        self._tally.restore(header, arrays)

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
            self._tally.add(rows, self._whole_batch(rows[0], entries), reused=False)

    def _whole_batch(self, rows: Tensor, entries: Mapping[str, Any]) -> Companions:
        """What goes with a batch of which ``rows`` ``[B, T, D]`` is one layer."""
        keep, masked = row_masks(self._mask, entries, rows)
        seen = self._tally.sequences
        targets = [target.rows(entries, seen, *rows.shape[:2]).to(rows.device) for target in self._targets]
        return Companions(keep, masked, targets)

    def _enter_stack(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._batch is not None:
            raise ValueError("layers: the stack ran twice in one forward, so its layers are ambiguous")
        name = self._taps[0].name
        x = find_tensor([*args, *kwargs.values()], name).detach()
        if x.dim() > 3:  # [B, C, H, W] elsewhere, but here the last dimension is the width
            raise ValueError(f"layer {name!r} must be [B, D] or [B, T, D], got shape {tuple(x.shape)}")
        self._batch = self._whole_batch(as_rows(x, name), self._entries)

    def _take_tile(self, first: int, states: Tensor) -> None:
        assert self._batch is not None
        rows = [as_rows(x, tap.name) for x, tap in zip(states, self._taps, strict=True)]
        batch = self._batch.part(slice(first, first + len(rows[0])))
        self._tally.add(rows, batch, reused=True)

    def _finish_stack(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._batch is None:
            raise ValueError(f"layers: {self._taps[0].module} did not run in this forward")
        self._batch, self._entries = None, {}
