"""The digest of a model's weights on GPUs, taken while its forwards run."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import suppress
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
        state = _state(model)
        self._before = _marks(state)
        # While they live, no other tensor lies where they do.
        self._weights = [x.detach() for x in state.values() if isinstance(x, Tensor)]
        own = {id(x) for x in chain(model.parameters(), model.buffers())}
        if not state or not all(
            id(x) in own and _is_plain(x) for x in state.values() if isinstance(x, Tensor)
        ):
            return
        with suppress(RuntimeError):  # of CUDA, or of a thread that cannot be had
            copies = Copies(dict.fromkeys(x.device for x in self._weights))
            thread = threading.Thread(target=self._take, args=(state, copies), name="rgfast-weights")
            thread.start()
            self._thread = thread

    def digest(self) -> str | None:
        """The digest; None if weights have changed since, or could not be copied. To be asked for once."""
        if self._thread is None:
            return None
        self._thread.join()
        same = self._before == _marks(_state(self._model))
        self._weights = []
        return self._found if same else None

    def stop(self) -> None:
        """End the thread; there will be no digest."""
        self._stop = True
        if self._thread is not None:
            self._thread.join()
        self._thread, self._weights = None, []

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


def _state(model: nn.Module) -> dict[str, Any]:
    """The model's entries themselves; none if they cannot be read."""
    try:
        return dict(model.state_dict(keep_vars=True))
    except UNREADABLE:
        return {}


def _marks(state: dict[str, Any]) -> list[tuple[Any, ...]]:
    """By what entries are told from those of another time."""
    found: list[tuple[Any, ...]] = []
    for name, x in state.items():
        if isinstance(x, Tensor) and _is_plain(x):
            found.append((name, id(x), x.data_ptr(), x._version, x.dtype, x.shape, x.stride()))
        else:
            found.append((name, id(x) if isinstance(x, Tensor) else None))
    return found


def _is_plain(x: Tensor) -> bool:
    """Whether ``x`` is on a GPU as any tensor is, and tells how often it was written to."""
    plain = type(x) in (Tensor, nn.Parameter) and x.layout == torch.strided
    return plain and _on_a_gpu(x) and not x.is_inference()


def _on_a_gpu(x: Tensor) -> bool:
    return x.is_cuda
