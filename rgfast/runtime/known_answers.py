"""Kernels are tried on small problems whose answers are known before a result of theirs is used.

Each kernel is tried once per process and device, when an implementation is first chosen that would run it,
or by :func:`warmup`. With a wrong answer, or none, no implementation takes it there.

While a CUDA graph is captured nothing is tried, since nothing runs: an implementation whose kernels were not
tried before is not chosen then.
"""

from __future__ import annotations

import math
import os
import threading
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from rgfast.dispatch import FallbackWarning, Unproven
from rgfast.runtime import cuda, measured
from rgfast.runtime.threads import no_autocast
from rgfast.runtime.tracing import constant_when_traced

__all__ = ["KnownAnswer", "prepare", "register", "registered", "unproven", "warmup"]


@dataclass(frozen=True)
class KnownAnswer:
    """A small problem for some kernels, and its answer.

    ``run(device)`` makes the problem, runs all of ``kernels`` with outputs that are NaN before, and returns
    what they computed; it may go through the room's own implementation. Its elements differ from ``values``
    by ``allowed`` at most. ``refusal(device)`` says why the kernels cannot run there at all; by default
    :func:`rgfast.runtime.cuda.refusal` is asked about each.
    """

    kernels: tuple[str, ...]
    run: Callable[[torch.device], Tensor]
    values: tuple[float, ...]
    allowed: float = 0.0
    refusal: Callable[[torch.device], str | None] | None = None

    @property
    def room(self) -> str:
        """The room of the kernels, by their names: ``moments`` of ``rgfast_moments_exact``."""
        return self.kernels[0].removeprefix("rgfast_").partition("_")[0]

    def cannot_run(self, device: torch.device) -> str | None:
        """Why the kernels cannot run on ``device``, whatever they compute, or None."""
        if self.refusal is not None:
            return self.refusal(device)
        return next(filter(None, (cuda.refusal(kernel, device) for kernel in self.kernels)), None)


_ANSWERS: dict[str, KnownAnswer] = {}
# By the first kernel of an answer and the device.
_TRIED: dict[tuple[str, torch.device], Unproven | None] = {}
_LOCK = threading.Lock()
_THREAD = threading.local()


def register(*answers: KnownAnswer) -> None:
    """Make answers known, from which every kernel of an implementation is tried; a kernel has one."""
    for answer in answers:
        for kernel in answer.kernels:
            if kernel in _ANSWERS:
                raise ValueError(f"{kernel} has a known answer already")
        _ANSWERS.update(dict.fromkeys(answer.kernels, answer))


def registered() -> tuple[KnownAnswer, ...]:
    """Every answer that was registered, in that order."""
    return tuple(dict.fromkeys(_ANSWERS.values()))


@constant_when_traced
def unproven(device: torch.device, *kernels: str) -> Unproven | None:
    """Why results of ``kernels`` are not to be trusted on ``device``, None if their answers are right.

    For the field of that name of an implementation. Those that were not tried yet are tried now.
    """
    if getattr(_THREAD, "trying", False):  # by the implementation that asks
        return None
    device = _placed(device)
    reasons = (_judged(_ANSWERS[kernel], device) for kernel in kernels)
    return next((reason for reason in reasons if reason is not None), None)


def warmup(device: torch.device | str | int | None = None) -> dict[str, str | None]:
    """For every kernel of the package: why it is not used on ``device``, or None if it can be.

    Tries all kernels that can run on this CUDA device (default: the current one) on small problems with known
    answers, which otherwise happens when each is first needed. Call it before a CUDA graph is captured: while
    that goes on nothing can be tried, and kernels that were not are not used. Without a GPU nothing runs, and
    every kernel has the reason.

    Warns with :class:`rgfast.FallbackWarning` of each wrong answer. Raises ValueError if ``device`` is
    another one than CUDA's, RuntimeError while a graph is captured.

    >>> import rgfast
    >>> unusable = {kernel: why for kernel, why in rgfast.warmup().items() if why}
    """
    place = torch.device("cuda" if device is None else device)
    if not cuda.is_gpu(place):
        raise ValueError(f"device must be a CUDA device, got {str(place)!r}")
    if place.type == "cuda" and not torch.cuda.is_available():
        nowhere = torch.device("cuda", 0)
        return {k: answer.cannot_run(nowhere) or "torch finds no GPU" for k, answer in _ANSWERS.items()}
    place = _placed(place)
    if _capturing(place):
        raise RuntimeError("rgfast.warmup() must be called before a CUDA graph is captured, not meanwhile")
    found: dict[str, str | None] = {}
    for kernel, answer in _ANSWERS.items():
        found[kernel] = answer.cannot_run(place)
        if found[kernel] is None:
            reason = found[kernel] = _judged(answer, place)
            if reason is not None and kernel == answer.kernels[0]:
                warnings.warn(f"{reason}; it is not used there", FallbackWarning, stacklevel=2)
    return found


def prepare(devices: Iterable[torch.device], rooms: Collection[str]) -> None:
    """Try the kernels of some rooms on those GPUs among ``devices`` where ``auto`` may take a kernel.

    For what runs beside a user's forward, which is not to wait for that. While a graph is captured nothing is
    tried; a wrong answer is told when its kernel is passed over.
    """
    for device in {_placed(each) for each in devices if cuda.is_gpu(each)}:
        if measured.stands(device):
            for answer in registered():
                if answer.room in rooms and answer.cannot_run(device) is None:
                    _judged(answer, device)


def _placed(device: torch.device) -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if device == torch.device("cuda") else device


def _judged(answer: KnownAnswer, device: torch.device) -> Unproven | None:
    key = answer.kernels[0], device
    if key in _TRIED:
        return _TRIED[key]
    with _LOCK:
        if key in _TRIED:  # by another thread, meanwhile
            return _TRIED[key]
        if _capturing(device):
            return Unproven(
                f"{_named(answer)} was not tried yet on {device}, which cannot be done while a CUDA graph is "
                "captured: call rgfast.warmup() before",
                passing=True,
            )
        reason = _tried(answer, device)
        if reason is None or not reason.passing:
            _TRIED[key] = reason
        return reason


def _tried(answer: KnownAnswer, device: torch.device) -> Unproven | None:
    _THREAD.trying = True
    try:
        with _by_itself(device):
            found = answer.run(device).detach().to("cpu", torch.float64).reshape(-1)
            wrong = _wrong(found, answer)
    except torch.OutOfMemoryError as error:
        return Unproven(f"{_named(answer)} could not be tried on {device}: {error}", passing=True)
    except Exception as error:  # of the driver, of torch or of a kernel's compiler
        return Unproven(f"{_named(answer)} failed on {device}: {error}")
    finally:
        _THREAD.trying = False
    if wrong is None:
        return None
    return Unproven(f"{_named(answer)} gave a wrong answer to a known problem on {device}: {wrong}")


def _wrong(found: Tensor, answer: KnownAnswer) -> str | None:
    want = torch.tensor(answer.values, dtype=torch.float64, device="cpu")
    if found.shape != want.shape:
        return f"{len(found)} numbers instead of {len(want)}"
    off = float((found - want).abs().max())
    if math.isnan(off):
        return "not a number"
    return None if off <= answer.allowed else f"off by {off:.1e}, more than {answer.allowed:.1e}"


@contextmanager
def _by_itself(device: torch.device) -> Iterator[None]:
    """Without what is set around the caller, on a stream whose end waits for nothing queued before.

    The caller may be traced with tensors that have no data.
    """
    with _disable_current_modes(), torch.no_grad(), no_autocast(device.type):
        if device.type != "cuda":
            yield
            return
        with torch.cuda.stream(torch.cuda.Stream(device)):  # type: ignore[no-untyped-call]  # torch's own
            yield


def _capturing(device: torch.device) -> bool:
    if device.type != "cuda":  # stands for a GPU in a test
        return cuda.missing() is None and cuda.capturing(device)
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def _named(answer: KnownAnswer) -> str:
    return answer.kernels[0] if len(answer.kernels) == 1 else f"{answer.kernels[0]} with those it goes with"


def _after_fork() -> None:
    global _LOCK
    _LOCK = threading.Lock()  # a thread that the child lacks may have had it
    _TRIED.clear()
    _THREAD.trying = False


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _fill(device: torch.device) -> Tensor:
    out = torch.full((40,), torch.nan, dtype=torch.float64, device=device)
    cuda.launch("rgfast_fill", (1, 1, 1), 32, 0, out, 39, 2.5, device=device)
    return torch.cat([out[:39], out[39:].isnan()])  # what lies behind is left alone


register(KnownAnswer(("rgfast_fill",), _fill, (2.5,) * 39 + (1.0,)))
