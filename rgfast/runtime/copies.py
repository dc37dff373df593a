"""Copies from GPUs to the host that run beside what else is queued there."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Copies", "apart_from_captures", "flat_bytes"]

_RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED


def flat_bytes(x: Tensor) -> Tensor:
    """The elements of a tensor in their order as bytes ``[n]``, where they are; a view if they lie so."""
    flat = x.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8) if flat.numel() else flat.new_empty(0, dtype=torch.uint8)


def apart_from_captures() -> None:
    """Let this thread call CUDA while another one captures a graph, which such calls would else spoil."""
    with contextlib.suppress(OSError, AttributeError):  # other names of the driver, older ones
        mode = ctypes.c_int(_RELAXED)
        ctypes.CDLL("libcuda.so.1").cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))


@dataclass(frozen=True)
class _Queued:
    """A copy on its way to the host, of pieces of so many bytes one after the other."""

    to: Tensor
    sizes: list[int]
    event: Any

    def arrived(self) -> list[memoryview]:
        """The pieces, once they are there."""
        self.event.synchronize()
        data = self.to.numpy().data
        ends = [sum(self.sizes[: k + 1]) for k in range(len(self.sizes))]
        return [data[end - size : end] for end, size in zip(ends, self.sizes, strict=True)]


class Copies:
    """Streams of ``devices`` that wait for what is queued there now, and for nothing that is queued later."""

    def __init__(self, devices: Iterable[torch.device]) -> None:
        self._streams = {device: _beside(device) for device in devices}

    def bytes_of(self, tensors: Sequence[Tensor], most: int) -> Iterator[list[memoryview]]:
        """The bytes of ``tensors`` in their order, ``most`` of them at a time.

        Each tensor is cut at multiples of ``most``. They come through two pinned buffers: what is given is
        overwritten once the next is asked for.
        """
        most = min(most, max(1, sum(x.numel() * x.element_size() for x in tensors)))
        free: list[Tensor] = []
        before: _Queued | None = None
        for number, (device, pieces) in enumerate(self._together(tensors, most)):
            if number < 2:
                free.append(_pinned(most))
            now = self._queue(device, pieces, free.pop(0))
            if before is not None:
                yield before.arrived()
                free.append(before.to)
            before = now
        if before is not None:
            yield before.arrived()

    def _together(self, tensors: Iterable[Tensor], most: int) -> Iterator[tuple[torch.device, list[Tensor]]]:
        """Pieces on one device that fit into ``most`` bytes."""
        place, pieces, size = torch.device("cpu"), list[Tensor](), 0
        for x in tensors:
            with torch.cuda.stream(self._streams[x.device]):
                flat = flat_bytes(x)
            for start in range(0, len(flat), most):
                piece = flat[start : start + most]
                if pieces and (x.device != place or size + len(piece) > most):
                    yield place, pieces
                    pieces, size = [], 0
                place, size = x.device, size + len(piece)
                pieces.append(piece)
        if pieces:
            yield place, pieces

    def _queue(self, device: torch.device, pieces: Sequence[Tensor], to: Tensor) -> _Queued:
        stream, sizes, start = self._streams[device], [len(piece) for piece in pieces], 0
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(stream):
            for piece in pieces:
                to[start : start + len(piece)].copy_(piece, non_blocking=True)
                start += len(piece)
            event.record(stream)
        return _Queued(to, sizes, event)


def _pinned(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=True)


def _beside(device: torch.device) -> Any:
    stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream(device))
    return stream
