"""Watching the layers of a model while it runs. Nothing about the model or torch is changed but hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from rgfast.probing.capture.activations import find_tensor, unnested
from rgfast.probing.capture.eager import eager_while
from rgfast.probing.capture.layers import Tap
from rgfast.probing.capture.outputs import Outputs
from rgfast.probing.capture.recompute import Forwards
from rgfast.probing.sharding import copied, local
from rgfast.runtime.streams import stream_of
from rgfast.runtime.waiting import Later

__all__ = ["Receiver", "Seen", "StreamsTiles", "Watcher", "tile_streamer"]


class Receiver(Protocol):
    """Who is told what a :class:`Watcher` sees, in the order of these methods for every forward."""

    def began(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The model is about to run on these arguments."""

    def entered(self, x: Tensor) -> None:
        """The stack that hands over tiles is about to run on ``x``."""

    def tile(self, first: int, states: Tensor) -> None:
        """``states[l]`` are the layers' rows of the samples from ``first`` on, soon overwritten."""

    def finished(self, seen: Sequence[Seen] | None) -> None:
        """The forward is over; ``seen`` are all layers, None if they came as tiles."""


class StreamsTiles(Protocol):
    """A stack that hands its residual stream over a tile of samples at a time, so that none is stored."""

    @property
    def stream_layers(self) -> tuple[str, ...]:
        """The names of the stream's layers within the stack, as ``layers=`` takes them."""

    def stream_tiles(self, consumer: Callable[[int, Tensor], None], tile: int | None = None) -> Any:
        """The handle whose ``remove()`` ends it."""


@dataclass(frozen=True)
class Seen:
    """A layer in one forward: its name, the tap that it comes from (one for every run of the tap's module),
    and what it put out, None if it did not run. ``keep`` is of :class:`Activation`, ``stream`` of
    :func:`rgfast.runtime.streams.stream_of` when it was put out."""

    name: str
    tap: int
    value: Tensor | None
    keep: Tensor | None = None
    stream: Any = None


@dataclass(frozen=True)
class _Captured:
    """An activation, the tensor it came as, and how often that had been written to."""

    value: Tensor
    keep: Tensor | None
    original: Tensor
    version: int
    stream: Any


class Watcher:
    """A context manager: while it is open, ``receiver`` is told of every forward of ``model``.

    It can be opened again and again, during training too: training flags and grad mode are not touched, and
    no graph is kept alive. Compiled models and modules run eagerly while it is open, since compiled code does
    not call hooks. What a backward runs again (activation checkpointing) is no forward.

    A module that runs several times in a forward is as many layers, ``name#1``, ``name#2`` and so on, and the
    layers are then in the order in which they ran. How many there are is known from the first forward in
    which it runs; a layer that does not run in some forward is seen without a value.

    ``outputs`` says which tensor of a layer's output is seen; ``tiles=False`` hooks our own stack, too, and
    only then can it be :meth:`paused`.
    """

    def __init__(
        self,
        model: nn.Module,
        taps: Sequence[Tap],
        receiver: Receiver,
        outputs: Outputs,
        *,
        tile: int | None = None,
        tiles: bool = True,
    ) -> None:
        self._model, self._taps, self._receiver, self._tile = model, taps, receiver, tile
        self._outputs, self._tiles = outputs, tiles
        self._handles: list[Any] = []
        self._held: dict[tuple[int, int], _Captured] = {}
        self._runs: dict[int, int] = {}
        self._order: list[tuple[int, int]] = []
        self._copied, self._first = {*range(len(taps))}, True
        # Whether the first forward wrote to layers' outputs without a trace, on the way from their device.
        self._differ: list[tuple[list[int], Later]] = []
        self._tiles_began = False
        self._eager: Callable[[], Any] | None = None
        self._paused = False

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, forwards of the model are none that ``receiver`` is told of."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    @property
    def is_open(self) -> bool:
        """Whether forwards are watched now."""
        return bool(self._handles)

    def __enter__(self) -> Watcher:
        if self._handles:
            raise RuntimeError("this Probe is watching already; its with block cannot be nested in itself")
        modules = dict(self._model.named_modules(remove_duplicate=False))
        streamer = tile_streamer(modules, self._taps) if self._tiles else None
        try:
            self._eager = eager_while(self)
            once = Forwards().hook
            self._handles.append(self._model.register_forward_pre_hook(once(self._begin), with_kwargs=True))
            if streamer is None:
                for index, tap in enumerate(self._taps):
                    self._handles.append(self._hook(index, modules[tap.module], once))
            else:
                stack: Any = streamer
                enter = once(self._enter_stack)
                self._handles.append(stack.register_forward_pre_hook(enter, with_kwargs=True))
                self._handles.append(streamer.stream_tiles(once(self._receiver.tile), self._tile))
            finish = self._finish if streamer is None else self._finish_stack
            self._handles.append(self._model.register_forward_hook(once(finish)))
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove all hooks and forget what a forward that failed left."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._held.clear()
        self._tiles_began = False
        if self._eager is not None:
            self._eager()
            self._eager = None

    def _hook(
        self, index: int, module: nn.Module, once: Callable[[Callable[..., object]], Callable[..., None]]
    ) -> Any:
        def returned(m: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            self._capture(index, lambda: self._outputs.returned(index, output, args, kwargs, m))

        def given(m: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._capture(index, lambda: self._outputs.given(index, args, kwargs, m))

        if self._taps[index].side == "output":
            return module.register_forward_hook(once(returned), with_kwargs=True)
        return module.register_forward_pre_hook(once(given), with_kwargs=True)

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._paused:
            return
        self._held.clear()
        self._tiles_began = False
        self._receiver.began(args, kwargs)

    def _capture(self, index: int, find: Callable[[], Tensor]) -> None:
        if self._paused:
            return
        tap, run = self._taps[index], sum(key[0] == index for key in self._held)
        if run and tap.once:
            return
        if run >= self._runs.get(index, run + 1):
            raise ValueError(
                f"layers: {tap.module!r} ran {run + 1} times in this forward and {run} in an earlier one; "
                "begin with the batch that needs most"
            )
        x = find().detach()
        rows, keep = unnested(x, tap.name)
        value = copied(rows) if index in self._copied and rows is x else rows
        self._held[index, run] = _Captured(value, keep, x, _version(x), stream_of(x))

    def _finish(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._paused:
            return
        held, self._held = self._held, {}
        if not held:
            raise ValueError(
                f"layers: {', '.join(tap.name for tap in self._taps)} did not run in this forward (code that "
                "was traced or exported does not run its modules)"
            )
        self._check_unchanged(held)
        for index, run in held:
            self._runs[index] = max(run + 1, self._runs.get(index, 0))
        layers = [(k, run) for k in range(len(self._taps)) for run in range(self._runs.get(k, 1))]
        if any(run for _, run in layers):
            ran = [*dict.fromkeys([*self._order, *held])]
            layers = self._order = ran + [layer for layer in layers if layer not in ran]
        self._receiver.finished([self._seen(layer, held.get(layer)) for layer in layers])

    def _seen(self, layer: tuple[int, int], captured: _Captured | None) -> Seen:
        index, run = layer
        name = self._taps[index].name
        name = f"{name}#{run + 1}" if self._runs.get(index, 1) > 1 else name
        if captured is None:
            return Seen(name, index, None)
        return Seen(name, index, captured.value, captured.keep, captured.stream)

    def _check_unchanged(self, held: Mapping[tuple[int, int], _Captured]) -> None:
        """Copies are made in the first forward, later of those layers only that the model then wrote to."""
        written = {k for (k, _), x in held.items() if _version(x.original) != x.version}
        if self._first:
            # Tensors of inference mode do not tell, nor do any that are written to through .data or numpy.
            silent = {k for (k, _), x in held.items() if x.original.is_inference()}
            differ: dict[torch.device, list[tuple[int, Tensor]]] = {}
            for (k, _), x in held.items():
                if k not in written | silent and not x.original.is_nested:
                    found = (local(x.value) != local(x.original)).any()
                    differ.setdefault(found.device, []).append((k, found))
            for each in differ.values():
                self._differ.append(([k for k, _ in each], Later(torch.stack([x for _, x in each]))))
            unseen = {*range(len(self._taps))} - {k for k, _ in held}
            unknown = {k for layers, _ in self._differ for k in layers}
            self._copied, self._first = written | silent | unseen | unknown, False
        elif written - self._copied:
            names = ", ".join(self._taps[k].name for k in sorted(written - self._copied))
            raise RuntimeError(
                f"the model wrote to the output of {names}, which it left alone in its first forward"
            )
        self._stop_copying(written)

    def _stop_copying(self, written: set[int]) -> None:
        """Copy no longer what, as far as that is known by now, the model left alone in its first forward."""
        if self._differ and all(later.ready() for _, later in self._differ):
            unknown = {k for layers, _ in self._differ for k in layers}
            differ = {k for layers, later in self._differ for k in np.array(layers)[later.value].tolist()}
            self._copied -= unknown - differ - written
            self._differ.clear()

    def _enter_stack(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._tiles_began:
            raise ValueError("layers: the stack ran twice in one forward, so its layers are ambiguous")
        name = self._taps[0].name
        x = find_tensor([*args, *kwargs.values()], name).detach()
        if x.dim() > 3:  # [B, C, H, W] elsewhere, but here the last dimension is the width
            raise ValueError(f"layer {name!r} must be [B, D] or [B, T, D], got shape {tuple(x.shape)}")
        self._receiver.entered(x)
        self._tiles_began = True

    def _finish_stack(self, module: nn.Module, args: Any, output: Any) -> None:
        if not self._tiles_began:
            raise ValueError(f"layers: {self._taps[0].module} did not run in this forward")
        self._tiles_began = False
        self._receiver.finished(None)


def tile_streamer(modules: Mapping[str, nn.Module], taps: Sequence[Tap]) -> StreamsTiles | None:
    """The module whose whole residual stream ``taps`` are, if it hands it over in tiles."""
    names = [tap.name for tap in taps]
    for name, module in modules.items():
        if hasattr(module, "stream_tiles") and hasattr(module, "stream_layers"):
            stack: Any = module
            if names == [f"{name}.{layer}".lstrip(".") for layer in stack.stream_layers]:
                streamer: StreamsTiles = stack
                return streamer
    return None


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version
