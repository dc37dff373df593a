"""The digest of a model's weights on GPUs, taken while its forwards run."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from rgfast.probing.checkpoint import PART, UNREADABLE, digest_of
from rgfast.runtime.copies import Copies, apart_from_captures

__all__ = ["Beside", "on_gpus"]

_PINNED = 8 * PART  # bytes of one of two buffers


class _Stopped(Exception):
    pass


def on_gpus(model: nn.Module) -> bool:
    """Whether all parameters and buffers of a model lie on GPUs, as plain tensors."""
    found = [*model.parameters(), *model.buffers()]
    return bool(found) and all(map(_is_plain, found))


class Beside:
    """The digest of a model's weights as they are now, copied and hashed by a thread of its own.

    Copies wait for what is queued now on the current streams. They hold up no forward, so that weights may
    change meanwhile: then there is no digest. A change that leaves no trace in a tensor's version, as one
    written to its ``.data``, is not seen.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model, self._stop = model, False
        self._found: str | None = None
        self._thread: threading.Thread | None = None
        try:
            state = model.state_dict(keep_vars=True)
        except UNREADABLE:
            return
        self._before = [*_marks(state)]
        # While they live, no other tensor lies where they do.
        self._weights = [x.detach() for x in state.values() if isinstance(x, Tensor)]
        own = {id(x) for x in chain(model.parameters(), model.buffers())}
        if all(id(x) in own and _is_plain(x) for x in state.values() if isinstance(x, Tensor)):
            copies = Copies(dict.fromkeys(x.device for x in self._weights))
            arguments = dict(state), copies
            self._thread = threading.Thread(target=self._take, args=arguments, name="rgfast-weights")
            self._thread.start()

    def digest(self) -> str | None:
        """The digest; None if weights have changed since, or could not be copied."""
        if self._thread is None:
            return None
        self._thread.join()
        same = self._before == [*_marks(self._model.state_dict(keep_vars=True))]
        return self._found if same else None

    def stop(self) -> None:
        """End the thread; there will be no digest."""
        self._stop = True
        if self._thread is not None:
            self._thread.join()

    def _take(self, state: dict[str, Any], copies: Copies) -> None:
        try:
            apart_from_captures()
            self._found = digest_of(self._model, state, self._parts(copies))
        except Exception:  # whoever asks takes it again, where an error is raised
            return

    def _parts(self, copies: Copies) -> Iterator[list[memoryview]]:
        for pieces in copies.bytes_of(self._weights, _PINNED):
            if self._stop:
                raise _Stopped
            yield pieces


def _marks(state: dict[str, Any]) -> Iterator[tuple[Any, ...]]:
    """By what entries are told from those of another time."""
    for name, x in state.items():
        if isinstance(x, Tensor) and _is_plain(x):
            yield name, id(x), x.data_ptr(), x._version, x.dtype, x.shape, x.stride()
        else:
            yield name, id(x) if isinstance(x, Tensor) else None


def _is_plain(x: Tensor) -> bool:
    """Whether ``x`` is on a GPU as any tensor is, and tells how often it was written to."""
    plain = type(x) in (Tensor, nn.Parameter) and x.layout == torch.strided
    return plain and _on_a_gpu(x) and not x.is_inference()


def _on_a_gpu(x: Tensor) -> bool:
    return x.is_cuda
