"""Which implementation of an op runs, and why.

Selection is plain Python on device, dtype and shape. A named implementation never falls back: it runs or
raises :class:`ImplUnavailable`. ``impl="auto"`` walks the op's order for the input's device and takes the
first implementation whose ``supports`` returns None.

Environment: ``RGFAST_STRICT=1`` turns a fallback that would warn into an error.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

__all__ = [
    "Explanation",
    "FallbackWarning",
    "Impl",
    "ImplName",
    "ImplUnavailable",
    "Op",
    "Record",
    "explain",
    "implementations",
    "record",
    "register",
    "registered",
]

ImplName = Literal["auto", "reference", "native", "library", "triton", "cuda"]


class ImplUnavailable(RuntimeError):
    """The implementation that was asked for by name cannot run this input; the message says why."""


class FallbackWarning(RuntimeWarning):
    """``impl="auto"`` took the reference where a compiled implementation was expected."""


@dataclass(frozen=True)
class Impl:
    """One implementation of an op.

    ``supports(*args, **kwargs)`` gets what the op gets and returns None, or the reason why not, in words.
    ``broken()`` returns the reason why this implementation cannot run anything in this process (its module
    failed to import, say); only such a reason, or any reason on a GPU, is worth a warning.
    """

    name: str
    run: Callable[..., Any]
    supports: Callable[..., str | None]
    broken: Callable[[], str | None] = lambda: None
    isa: Callable[[], str | None] = lambda: None


@dataclass
class Op:
    """A named op: its implementations, and for each device type the order in which ``auto`` tries them."""

    name: str
    impls: dict[str, Impl] = field(default_factory=dict)
    order: Mapping[str, tuple[str, ...]] = field(
        default_factory=lambda: {"cpu": ("native", "reference"), "cuda": ("cuda", "triton", "reference")}
    )

    def add(self, impl: Impl) -> None:
        self.impls[impl.name] = impl

    def candidates(self, device: torch.device) -> list[Impl]:
        names = self.order.get(device.type, ("reference",))
        return [self.impls[name] for name in names if name in self.impls]

    def select(self, impl: str, device: torch.device, *args: Any, **kwargs: Any) -> Impl:
        """The implementation to run for these arguments; see the module's docstring for the rule."""
        if impl != "auto":
            if impl not in _KNOWN:
                raise ValueError(f"impl must be one of {', '.join(_KNOWN)}, got {impl!r}")
            if impl not in self.impls:
                have = ", ".join(self.impls)
                raise ImplUnavailable(f"{self.name}: there is no {impl!r} implementation (there are: {have})")
            chosen = self.impls[impl]
            reason = chosen.broken() or chosen.supports(*args, **kwargs)
            if reason is not None:
                raise ImplUnavailable(f"{self.name}: impl={impl!r} cannot run this input: {reason}")
            self._log(chosen)
            return chosen
        # Nearly every call ends here: small matrices take less time than a careful walk.
        names = self.order.get(device.type, ("reference",))
        first = self.impls.get(names[0])
        if first is not None and first.broken() is None and first.supports(*args, **kwargs) is None:
            self._log(first)
            return first
        refused: list[tuple[Impl, str, bool]] = []
        for candidate in self.candidates(device):
            broken = candidate.broken()
            reason = broken or candidate.supports(*args, **kwargs)
            if reason is None:
                for other, why, was_broken in refused:
                    if was_broken or (device.type != "cpu" and candidate.name == "reference"):
                        _warn_fallback(self.name, other.name, why, candidate.name)
                self._log(candidate)
                return candidate
            refused.append((candidate, reason, broken is not None))
        told = "; ".join(f"{impl.name}: {why}" for impl, why, _ in refused) or "no implementation registered"
        raise ImplUnavailable(f"{self.name}: nothing can run this input on {device.type} ({told})")

    def _log(self, impl: Impl) -> None:
        if torch.compiler.is_compiling():
            return  # a graph is traced once and run many times: it has nobody to tell
        log = _RECORDING.get()
        if log is not None:
            log.append(Record(self.name, impl.name, impl.isa()))

    def __call__(self, impl: str, device: torch.device, *args: Any, **kwargs: Any) -> Any:
        return self.select(impl, device, *args, **kwargs).run(*args, **kwargs)


@dataclass(frozen=True)
class Record:
    """One op that ran: its name, the implementation, and the instruction set where one was chosen."""

    op: str
    impl: str
    isa: str | None = None


@dataclass(frozen=True)
class Explanation:
    """Every candidate for an op and input, in the order they are tried, with the reason each is refused."""

    op: str
    device: str
    candidates: tuple[tuple[str, str | None], ...]

    @property
    def chosen(self) -> str | None:
        return next((name for name, reason in self.candidates if reason is None), None)

    def __str__(self) -> str:
        lines = [f"{self.op} on {self.device}:"]
        taken = False
        for name, reason in self.candidates:
            if reason is not None:
                lines.append(f"  {name:<10} no: {reason}")
            else:
                lines.append(f"  {name:<10} {'yes' if taken else 'chosen'}")
                taken = True
        return "\n".join(lines)

    __repr__ = __str__


_KNOWN = ("auto", "reference", "native", "library", "triton", "cuda")
_OPS: dict[str, tuple[Op, Callable[..., tuple[torch.device, tuple[Any, ...], dict[str, Any]]]]] = {}
_WARNED: set[tuple[str, str]] = set()
_RECORDING: ContextVar[list[Record] | None] = ContextVar("rgfast_record", default=None)


def register(op: Op, prepare: Callable[..., tuple[torch.device, tuple[Any, ...], dict[str, Any]]]) -> Op:
    """Make ``op`` known to :func:`explain`.

    ``prepare`` turns the arguments of the public function into (device, args, kwargs) as ``op`` gets them,
    validating as the public function does.
    """
    _OPS[op.name] = (op, prepare)
    return op


def registered() -> tuple[str, ...]:
    """Names of all ops, sorted."""
    return tuple(sorted(_OPS))


def implementations(op: str, device: str) -> tuple[str, ...]:
    """Names of the implementations of ``op`` on a device type, in the order in which "auto" tries them."""
    if op not in _OPS:
        raise ValueError(f"op must be one of {', '.join(registered())}, got {op!r}")
    return tuple(impl.name for impl in _OPS[op][0].candidates(torch.device(device)))


def explain(op: str, *args: Any, **kwargs: Any) -> Explanation:
    """Every implementation of ``op`` for this input with the reason why it is refused, or that it is chosen.

    Takes the arguments of the public function (without ``impl``). Nothing is computed.

    >>> import rgfast, torch
    >>> rgfast.explain("spectrum", torch.randn(8, 4)).candidates[-1]
    ('reference', None)
    """
    if op not in _OPS:
        raise ValueError(f"op must be one of {', '.join(registered())}, got {op!r}")
    found, prepare = _OPS[op]
    device, call_args, call_kwargs = prepare(*args, **kwargs)
    rows = tuple(
        (impl.name, impl.broken() or impl.supports(*call_args, **call_kwargs))
        for impl in found.candidates(device)
    )
    return Explanation(op, device.type, rows)


@contextmanager
def record() -> Iterator[list[Record]]:
    """Collect which implementation (and which ISA) of every op runs inside the ``with`` block.

    >>> import rgfast, torch
    >>> with rgfast.record() as log:
    ...     _ = rgfast.effective_rank(torch.randn(8, 4), impl="reference")
    >>> log[0].op, log[0].impl
    ('spectrum', 'reference')
    """
    log: list[Record] = []
    token = _RECORDING.set(log)
    try:
        yield log
    finally:
        _RECORDING.reset(token)


def _warn_fallback(op: str, refused: str, reason: str, taken: str) -> None:
    message = f"{op}: {refused} cannot run ({reason}); using {taken}"
    if os.environ.get("RGFAST_STRICT") == "1":
        raise ImplUnavailable(f"{message}, which RGFAST_STRICT=1 forbids")
    if (op, reason) not in _WARNED:
        _WARNED.add((op, reason))
        warnings.warn(message, FallbackWarning, stacklevel=5)
