"""All samples of a stack without mixing, a few positions at a time through all its layers.

Every position of such a stack goes its own way, so with all samples at hand nothing has to be accumulated:
spectra and alignments are computed while a tile's rows are there, and no layer's output is stored for more
positions than these.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rgfast.ops.fast import made_for
from rgfast.probing.capture.batches import batch_items
from rgfast.probing.capture.layers import Tap
from rgfast.probing.capture.watcher import tile_streamer
from rgfast.probing.estimators import samples
from rgfast.probing.estimators.finite import NOT_FINITE
from rgfast.probing.estimators.row_views import RowViews, Tile
from rgfast.probing.estimators.samples import LEAST_TILES, SampleState, tile_rows
from rgfast.probing.options import POSITIONAL
from rgfast.probing.plan import Plan
from rgfast.probing.sharding import is_sharded

__all__ = ["LaterRows", "gather", "independent_stack", "measured_by_tiles"]


def independent_stack(model: nn.Module, taps: Sequence[Tap]) -> Any:
    """``model`` if it is a stack of which every position goes its own way and ``taps`` are the stream."""
    if not getattr(model, "positions_are_independent", False) or tile_streamer({"": model}, taps) is None:
        return None
    return None if model._forward_hooks or model._forward_pre_hooks or is_sharded(model) else model


def gather(model: Any, batches: Iterator[Any]) -> tuple[Tensor | None, list[Any]]:
    """All batches as one ``[n, T, D]``, or None if they are not few and alike; and what was taken.

    Pieces of one tensor are a view of it.
    """
    taken: list[Any] = []
    parts: list[Tensor] = []
    if not all(made_for(w) and w.dtype == torch.float32 for w in model.parameters()):
        return None, taken
    n = 0
    for batch in batches:
        taken.append(batch)
        items = batch_items(batch)
        x = items[0] if len(items) == 1 else None
        if not isinstance(x, Tensor) or x.dim() != 3 or not made_for(x) or x.dtype != torch.float32:
            return None, taken
        if x.shape[2] != model.width or (parts and x.shape[1:] != parts[0].shape[1:]):
            return None, taken
        parts += [x] if len(x) else []
        n += len(x)
        if n > samples.LIMIT:
            return None, taken
    return (_end_to_end(parts) if parts else None), taken


def _end_to_end(parts: Sequence[Tensor]) -> Tensor:
    """``parts`` as one tensor: a view where they are pieces of one, as those of an array are."""
    first, at = parts[0], parts[0].storage_offset()
    for part in parts:
        same = part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not same or part.stride() != first.stride() or part.storage_offset() != at:
            return torch.cat(list(parts))
        at += len(part) * part.stride(0)
    rows = sum(len(part) for part in parts)
    return first.as_strided((rows, *first.shape[1:]), first.stride(), first.storage_offset())


def measured_by_tiles(
    stack: Any,
    x: Tensor,
    plan: Plan,
    *,
    uncentred: bool,
    memory: int,
    advance: Callable[[int], object],
) -> SampleState:
    """The measures of ``x[n, T, D]`` at the positions of ``plan``; ``advance(k)`` after every k of them.

    Raises ValueError if a layer is not finite, naming it and the position.
    """
    n, length = x.shape[:2]
    every = any(view not in POSITIONAL for view in plan.views) or len(plan.positions) == length
    where = tuple(range(length)) if every else plan.positions
    x = (x if every else x[:, list(where)]).transpose(0, 1)
    views = RowViews(plan, uncentred=uncentred, sequences=n, total=n * length)
    step = max(1, min(tile_rows(plan, memory) // n, -(-len(where) // LEAST_TILES)))

    def take(first: int, states: Tensor) -> None:
        positions = where[first : first + states.shape[1]]
        rows = states.view(len(states), -1, states.shape[3])
        if not views.take(Tile(positions, [n] * len(positions), rows)):
            raise ValueError(_not_finite(states, plan, positions))
        advance(states.shape[1])

    _stream(stack, x, take, step)
    return SampleState(plan, n, views.finish(_Again(stack, x, step, memory)))


class LaterRows:
    """The rows of every layer in the form of :meth:`Rows.state`, by a forward when they are asked for.

    The stack and its input may be written to until then, so that both are copies.
    """

    def __init__(self, stack: Any, x: Tensor, *, own: bool) -> None:
        self._stack = copy.deepcopy(stack)
        self._x = x if own else x.clone()

    def __call__(self) -> dict[str, np.ndarray[Any, Any]]:
        layers: list[Tensor] = []

        def take(first: int, states: Tensor) -> None:
            if not layers:
                layers.extend(torch.empty_like(self._x) for _ in states)
            for layer, rows in zip(layers, states, strict=True):
                layer[:, first : first + len(rows)] = rows.transpose(0, 1)

        with torch.no_grad():
            _stream(self._stack, self._x.transpose(0, 1), take, max(1, self._x.shape[1] // LEAST_TILES))
        return {f"rows.0.{number}": layer.numpy() for number, layer in enumerate(layers)}


class _Again:
    """All rows of a layer, by another forward: as many layers of one are held as memory allows."""

    def __init__(self, stack: Any, x: Tensor, step: int, memory: int) -> None:
        self._stack, self._x, self._step = stack, x, step
        self._most = memory // (4 * x.numel())
        self._held: dict[int, list[Tensor]] = {}

    def __call__(self, layer: int) -> Tensor | None:
        if layer not in self._held:
            if not self._most:
                return None
            self._held = {k: [] for k in range(layer, layer + self._most)}

            def take(first: int, states: Tensor) -> None:
                for k, parts in self._held.items():
                    parts += [states[k].flatten(0, 1).clone()] if k < len(states) else []

            _stream(self._stack, self._x, take, self._step)
        return torch.cat(self._held.pop(layer))


def _stream(stack: Any, x: Tensor, take: Callable[[int, Tensor], None], step: int) -> None:
    handle = stack.stream_tiles(take, step)
    try:
        stack(x)
    finally:
        handle.remove()


def _not_finite(states: Tensor, plan: Plan, where: Sequence[int]) -> str:
    bad = (~torch.isfinite(states)).sum((2, 3))
    layer, k = (int(i) for i in bad.nonzero()[0])
    return (
        f"{NOT_FINITE}, got {int(bad[layer, k])} NaN or infinite values in layer {layer} at "
        f"position {where[k]} ({plan.names[layer]}, sequences 0 to {states.shape[2] - 1})"
    )
