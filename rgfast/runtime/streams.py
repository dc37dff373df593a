"""The CUDA streams that activations come on, and the one that reads them.

A model may run on another stream than the one its forward ends on, and every forward on another one. What
reads activations keeps memory from one forward to the next, so it runs on one stream for each device, the
first that it saw; streams are made to wait for each other on the device, the host never does.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

__all__ = ["Home", "capturing", "current", "stream_of"]


def capturing() -> bool:
    """Whether what is queued now goes into a CUDA graph instead of being run."""
    begun: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]  # else there is no stream
    return begun and torch.cuda.is_current_stream_capturing()


def current(device: torch.device) -> Any:
    """The stream that operators on ``device`` are queued on now; None if it has none."""
    return torch.cuda.current_stream(device) if device.type == "cuda" else None


def stream_of(x: Tensor) -> Any:
    """:func:`current` of the device of ``x``."""
    return current(x.device)


class Home:
    """The stream of every device on which all that is kept is made and read."""

    def __init__(self) -> None:
        self._streams: dict[torch.device, Any] = {}

    @contextmanager
    def reading(self, came: Iterable[tuple[Tensor, Any]]) -> Iterator[None]:
        """Queue on the home streams, of the devices of tensors that ``came`` on the streams beside them.

        The block begins when these have made them, and what they queue later begins when the block is over:
        a model may write to them again.
        """
        streams: dict[torch.device, dict[Any, None]] = {}
        for x, stream in came:
            if stream is None:
                continue
            now = torch.cuda.current_stream(x.device)
            home = self._streams.setdefault(x.device, now)
            streams.setdefault(x.device, {}).update(dict.fromkeys((stream, now)))
            if stream != home:
                x.record_stream(home)
        with ExitStack() as stack:
            for device, others in streams.items():
                home = self._streams[device]
                for other in others:
                    if other != home:
                        home.wait_stream(other)
                stack.enter_context(torch.cuda.stream(home))
            yield
        for device, others in streams.items():
            for other in others:
                if other != self._streams[device]:
                    other.wait_stream(self._streams[device])

    @contextmanager
    def own(self) -> Iterator[None]:
        """Queue on the home streams of all devices seen."""
        with ExitStack() as stack:
            for stream in self._streams.values():
                stack.enter_context(torch.cuda.stream(stream))
            yield
