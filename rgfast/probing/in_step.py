"""The forwards of a sharded model: all ranks take part in every one, with or without a batch of their own."""

from __future__ import annotations

import copy
import io
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from rgfast.probing.capture.recompute import Forwards
from rgfast.probing.offloaded import runs_on
from rgfast.probing.ranks import RankError, Ranks
from rgfast.probing.sharding import is_dtensor, sharded_over

__all__ = ["InStep"]

# Floating tensors of more bytes reach ranks without a batch as a shape, and are zero there.
_BY_VALUE = 1 << 20

_Arguments = tuple[tuple[Any, ...], dict[str, Any]]

_MIXES = (
    "batches must be as many on every rank if the model has SyncBatchNorm in training mode, which would mix "
    "what ranks without a batch run on into the others' activations"
)


class InStep:
    """Has every rank run as many forwards as the one with the most batches.

    A rank announces each of its forwards before it starts. One that has no batch left waits in :meth:`join`
    and takes part in what others announce, on arguments like those of its own first forward, or of another
    rank's if it had none. Buffers and random numbers are afterwards as they were. A forward that no rank can
    take part in without a batch of its own begins once all ranks have one, and is a ValueError on all of them
    if one has none.

    Raises ValueError if ranks that hold a part of the model are not among ``ranks``.
    """

    def __init__(self, model: nn.Module, ranks: Ranks) -> None:
        self._model, self._ranks = model, ranks
        if left_out := sharded_over(model) - {*ranks.members}:
            raise ValueError(
                "distributed must take in all ranks that hold a part of the model, got "
                f"{list(ranks.members)} without {sorted(left_out)}"
            )
        self._number = self._joins = 0
        self._given: _Arguments | None = None
        self._among = self._dummy = False
        self._handles: list[Any] = []

    def open(self, meet: Callable[[str | None], None]) -> None:
        """Announce the forwards of the model from now on. Waits until all ranks are here.

        ``meet`` is called before each: with None for a batch, else with what this rank failed of, "" if it
        has only run out of batches.
        """
        self._meet = meet
        self._ranks.gather(f"open/{self._ranks.round()}", None)
        # Before anything that FSDP2 does in a forward, and after all of it.
        once, model = Forwards().hook, self._model
        self._handles.append(
            model.register_forward_pre_hook(once(self._begin), prepend=True, with_kwargs=True)
        )
        self._handles.append(model.register_forward_hook(once(self._end)))

    def close(self) -> None:
        """Announce nothing any more."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def join(self, unseen: Callable[[], AbstractContextManager[Any]], passed: Callable[[], None]) -> None:
        """Take part in the forwards of the others until all ranks have called this.

        ``unseen()`` is entered around each of them, and ``passed()`` called after it.
        """
        self._joins += 1
        here = self._here()
        self._ranks.count(here, 1)
        with _as_before(self._model):
            while self._is_next(lambda: self._ranks.count(here) == self._ranks.size):
                self._take_part(unseen)
                passed()

    def leave(self, unseen: Callable[[], AbstractContextManager[Any]]) -> None:
        """Take part in what the others began before they learned that this rank has failed.

        Impossible if it failed in the midst of a forward, or another rank died.
        """
        if self._among or self._ranks.dead:
            return
        end = time.monotonic() + self._ranks.timeout
        try:
            with _as_before(self._model):
                while self._is_next(lambda: self._ranks.all_gone() or time.monotonic() > end):
                    self._take_part(unseen)
        except Exception:
            return  # the others have gone, too

    def lost(self, error: BaseException) -> RankError | None:
        """What befell another rank, if that is why a forward raised ``error``."""
        return self._ranks.lost(error) if self._among else None

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._dummy:
            self._announce(self._number + 1, (args, kwargs))
            self._number += 1
        self._among = True
        self._meet(self._ranks.said if self._dummy else None)

    def _announce(self, number: int, given: _Arguments) -> None:
        """Have the other ranks take part in a forward, or wait until all begin it if they cannot."""
        why = _MIXES if _mixes(self._model) else ""
        if not why:  # else the others may have failed of it already, and this rank finds it, too
            self._ranks.check()
        if self._given is None:
            self._given = _copied(given)
            if self._ranks.count("giver", 1) == 1:
                data, unsent = _packed(self._given)
                self._ranks.post("given", data)
                self._ranks.post("unsent", unsent.encode())
            if number == 1:  # later on, every rank has arguments of its own or another's
                why = why or self._ranks.posted("unsent").decode()
        if why:
            self._ranks.post(f"all/{number}", why.encode())
        begun = self._ranks.count(f"forward/{number}", 1)
        if why:
            if begun == self._ranks.size:
                self._ranks.post(f"begun/{number}")
            if not self._ranks.until(f"begun/{number}", lambda: self._ranks.count(self._here(1)) > 0):
                raise ValueError(why)

    def _here(self, later: int = 0) -> str:
        """Where ranks that wait in :meth:`join` are counted: all call it equally often."""
        return f"here/{self._joins + later}"

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        self._among = False

    def _is_next(self, over: Callable[[], bool]) -> bool:
        """Whether some rank begins another forward. Waits until one does or it is ``over``."""
        return self._ranks.until(f"forward/{self._number + 1}", over)

    def _take_part(self, unseen: Callable[[], AbstractContextManager[Any]]) -> None:
        alone = f"all/{self._number + 1}"
        if self._ranks.until(alone, lambda: True):
            raise ValueError(self._ranks.posted(alone).decode())
        if self._given is None:
            self._given = _unpacked(self._ranks.posted("given"), self._model)
        args, kwargs = _copied(self._given)  # models write to caches
        self._number += 1
        self._dummy = True
        try:
            with torch.no_grad(), unseen():
                self._model(*args, **kwargs)
        finally:
            self._dummy = False


@contextmanager
def _as_before(model: nn.Module) -> Iterator[None]:
    """Inside, forwards leave buffers and random numbers as they are."""
    kept = [
        (m, name, x, x.clone()) for m in model.modules() for name, x in m._buffers.items() if x is not None
    ]
    devices = sorted({p.get_device() for p in model.parameters() if p.is_cuda})
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            with torch.no_grad():
                for module, name, buffer, value in kept:
                    module._buffers[name] = buffer
                    buffer.copy_(value)


def _copied(given: _Arguments) -> _Arguments:
    """Arguments that the model's own forward does not write to."""
    found: _Arguments = tree_map(_copy, given)
    return found


def _copy(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    try:
        return copy.deepcopy(value)
    except Exception:  # what cannot be copied is left as it is
        return value


@dataclass(frozen=True)
class _Zeros:
    shape: tuple[int, ...]
    dtype: torch.dtype
    placed: bool


def _packed(given: _Arguments) -> tuple[bytes, str]:
    """Arguments as bytes, and a sentence that says why they cannot be sent, empty if they can."""

    def light(value: Any) -> Any:
        if is_dtensor(value):
            raise TypeError("a DTensor is of its own ranks")
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.is_nested:
            return value
        if value.nbytes <= _BY_VALUE:
            return value.clone()  # not with all of the memory that it is a part of
        return _Zeros(tuple(value.shape), value.dtype, value.device.type != "cpu")

    file = io.BytesIO()
    try:
        torch.save(tree_map(light, given), file)
        _loaded(file.getvalue(), None)  # some of what can be written cannot be read
    except Exception as error:
        return b"", (
            "batches must hold at least one sequence on every rank, since what the others have cannot be "
            f"sent to a rank without any ({type(error).__name__}: {error})"
        )
    return file.getvalue(), ""


def _unpacked(data: bytes, model: nn.Module) -> _Arguments:
    """The arguments that another rank packed, on this one's device."""
    device = runs_on(model)
    whole: _Arguments = tree_map(
        lambda x: (
            torch.zeros(x.shape, dtype=x.dtype, device=device if x.placed else "cpu")
            if isinstance(x, _Zeros)
            else x
        ),
        _loaded(data, device),
    )
    return whole


def _loaded(data: bytes, device: torch.device | None) -> Any:
    """What was packed; what was not on the CPU on ``device``, if there is one."""

    def placed(storage: Any, location: str) -> Any:
        there = location if device is None or location.startswith("cpu") else str(device)
        restore: Any = torch.serialization.default_restore_location
        return restore(storage, there)

    # Between the ranks of one program, as torch's own broadcast of objects.
    return torch.load(io.BytesIO(data), map_location=placed, weights_only=False)


def _mixes(model: nn.Module) -> bool:
    """Whether a forward on arguments that do not count would change what other ranks compute."""
    return any(isinstance(m, nn.SyncBatchNorm) and m.training for m in model.modules())
