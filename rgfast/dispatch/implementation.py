"""An implementation of an op, its call, and why it may not run."""

from __future__ import annotations

import typing
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

__all__ = [
    "KNOWN",
    "Call",
    "FallbackWarning",
    "HandOff",
    "Impl",
    "ImplName",
    "ImplUnavailable",
    "Unproven",
    "is_plain",
]

ImplName = Literal["auto", "reference", "library", "native", "mkl", "triton", "cuda"]
KNOWN = typing.get_args(ImplName)


class ImplUnavailable(RuntimeError):
    """The implementation that was asked for by name cannot run this input; the message says why."""

    __module__ = "rgfast.dispatch"  # by which it is named where it is shown or filtered


class FallbackWarning(RuntimeWarning):
    """``impl="auto"`` took the reference where a faster implementation was expected, or another one in place
    of one whose results are not to be trusted here."""

    __module__ = "rgfast.dispatch"


class Unproven(str):
    """Why an implementation is not trusted here: ``auto`` warns of it, whatever it takes instead.

    ``passing``: it may be trusted the next time, so that the choice made without it is not kept.
    """

    passing: bool

    def __new__(cls, reason: str, *, passing: bool = False) -> Unproven:
        made = super().__new__(cls, reason)
        made.passing = passing
        return made


class HandOff(Exception):
    """Raised by an implementation in ``run``: the data show that it cannot do all of the call.

    A named implementation then refuses with the reason. ``auto`` calls ``finish(run)``, where ``run(call)``
    takes the cheapest of the other implementations, and returns what that returns.
    """

    def __init__(self, reason: str, finish: Callable[[Callable[[Any], Any]], Any]) -> None:
        super().__init__(reason)
        self.finish = finish


class Call(Protocol):
    """The validated arguments of one op: tensors and options, frozen."""

    @property
    def device(self) -> torch.device: ...

    def shape_class(self) -> Hashable | None:
        """All that ``can_run`` and the order of costs depend on; None if a selection must not be cached."""


_PLAIN = (Tensor, torch.nn.Parameter)


def is_plain(x: Tensor) -> bool:
    """Whether ``x`` is an ordinary tensor with known sizes: not a subclass, not seen by a tracer."""
    return type(x) in _PLAIN and not torch.compiler.is_compiling()


def _nothing(*_: Any) -> None:
    return None


@dataclass(frozen=True)
class Impl:
    """One implementation of an op.

    ``can_run(call)`` returns None, or in words why it cannot; ``cost(call)`` a rough time in seconds, by
    which ``auto`` chooses; ``run(call)`` the result. ``devices`` are the device types that it runs on (None:
    all). ``missing()`` says why it can run nothing in this process (its module failed to import, say).
    ``by_name_only(call)`` says why ``auto`` leaves it alone although it can run, if not for its time.
    ``unproven(call)`` is asked last, when nothing else speaks against it, and may try it out: it says why its
    results are not to be trusted here, as an :class:`Unproven`.
    A ``route`` is made of other ops' or implementations' results: ``auto`` may take it, no name calls it.
    """

    name: str
    run: Callable[[Any], Any]
    can_run: Callable[[Any], str | None] = _nothing
    cost: Callable[[Any], float] = lambda call: 0.0
    devices: tuple[str, ...] | None = None
    missing: Callable[[], str | None] = _nothing
    by_name_only: Callable[[Any], str | None] = _nothing
    isa: Callable[[], str | None] = _nothing
    route: bool = False
    unproven: Callable[[Any], Unproven | None] = _nothing

    def refusal(self, call: Any) -> str | None:
        """Why it cannot run this call here, or None."""
        device = call.device.type
        if self.devices is not None and device not in self.devices:
            return f"it runs on the {' and '.join(self.devices)}, not on {device}"
        return self.missing() or self.can_run(call)
