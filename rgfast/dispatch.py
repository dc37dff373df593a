"""Which implementation of an op runs, and why.

An implementation gets one validated ``Call`` and says whether it can run it (``can_run``), how long that
takes (``cost``), and what the result is (``run``). ``impl="auto"`` takes the cheapest that can. A named
implementation never falls back, not inside either: it runs or raises :class:`ImplUnavailable`.

Environment: ``RGFAST_STRICT=1`` turns a fallback that would warn into an error.
"""

from __future__ import annotations

import os
import sys
import typing
import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

__all__ = [
    "Call",
    "Explanation",
    "FallbackWarning",
    "HandOff",
    "Impl",
    "ImplName",
    "ImplUnavailable",
    "Op",
    "Record",
    "Unproven",
    "explain",
    "implementations",
    "is_plain",
    "record",
    "register",
    "registered",
    "schema",
    "walk",
]

ImplName = Literal["auto", "reference", "library", "native", "mkl", "triton", "cuda"]
_KNOWN = typing.get_args(ImplName)
_MOST_CACHED = 1024


class ImplUnavailable(RuntimeError):
    """The implementation that was asked for by name cannot run this input; the message says why."""


class FallbackWarning(RuntimeWarning):
    """``impl="auto"`` took the reference where a faster implementation was expected, or another one in place
    of one whose results are not to be trusted here."""


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


class _Choice(typing.NamedTuple):
    impl: Impl
    passed_over: tuple[str, ...] = ()  # sentences that warn of a fallback
    lasting: bool = True


class Op:
    """A named op and its implementations.

    ``also`` are names of 0.1 under which an implementation is still known. A fused variant of an op is an
    ``Op`` of its own, recorded under the name of the op that it is ``part_of``.
    """

    def __init__(
        self,
        name: str,
        impls: Iterable[Impl] = (),
        *,
        also: typing.Mapping[str, str] | None = None,
        part_of: str | None = None,
    ) -> None:
        self.name, self.recorded_as = name, part_of or name
        self.impls: dict[str, Impl] = {impl.name: impl for impl in impls}
        self._also = dict(also or {})
        self._chosen: dict[Hashable, _Choice] = {}

    def add(self, impl: Impl) -> None:
        self.impls[impl.name] = impl
        self._chosen.clear()

    def __call__(self, impl: str, call: Any) -> Any:
        return self.run(self.select(impl, call), call, named=impl != "auto")

    def select(self, impl: str, call: Any) -> Impl:
        """The implementation to run for this call; see the module's docstring for the rule."""
        if torch.compiler.is_compiling():  # traced once and run many times: there is nothing to cache
            choice = self._choose(impl, call)
            self._forbid(choice)
            return choice.impl
        if _ASKING.get():
            raise _Asked(self, call)
        kind = call.shape_class()
        # Of two GPUs one may be of another architecture, or broken.
        key = (impl, call.device, kind)
        found = None if kind is None else self._chosen.get(key)
        choice = found or self._choose(impl, call)
        if found is None and kind is not None and choice.lasting:
            if len(self._chosen) >= _MOST_CACHED:
                self._chosen.clear()
            self._chosen[key] = choice
        if choice.passed_over:
            self._warn(choice)
        return choice.impl

    def find(self, impl: str, call: Any) -> Impl | None:
        """What :meth:`select` returns, or None where it would refuse: whether there is a fused variant."""
        if _ASKING.get():
            return None
        try:
            return self.select(impl, call)
        except ImplUnavailable:
            return None

    def run(self, chosen: Impl, call: Any, *, named: bool) -> Any:
        """The result of an implementation that :meth:`select` returned, recorded."""
        if torch.compiler.is_compiling():
            return chosen.run(call)
        log = _RECORDING.get()
        if log is None:
            try:
                return chosen.run(call)
            except HandOff as rest:
                return self._hand_off(rest, chosen, named)
        entry = Record(self.recorded_as, chosen.name, chosen.isa())
        log.append(entry)
        token = _RECORDING.set(entry.nested)
        try:
            return chosen.run(call)
        except HandOff as rest:
            return self._hand_off(rest, chosen, named)
        finally:
            _RECORDING.reset(token)

    def cost(self, call: Any) -> float:
        """The cost of the implementation that ``auto`` takes."""
        return self._choose("auto", call).impl.cost(call)

    def why_reference(self, call: Any) -> str | None:
        """Why ``auto`` is left with the reference, or None if it takes something faster. Warns of nothing."""
        if self._cheapest(call).impl.name != "reference":
            return None
        refused = [f"{impl.name}: {reason}" for impl, reason in self.candidates(call) if reason is not None]
        return "; ".join(refused) or "there is nothing else"

    def candidates(self, call: Any) -> list[tuple[Impl, str | None]]:
        """Every implementation with the reason why ``auto`` does not take it, None where it could."""
        return [
            (impl, impl.refusal(call) or impl.by_name_only(call) or impl.unproven(call))
            for impl in self.impls.values()
        ]

    def _hand_off(self, rest: HandOff, chosen: Impl, named: bool) -> Any:
        if named:
            raise self._refused(chosen.name, str(rest)) from None

        def others(call: Any) -> Any:
            return self.run(self._cheapest(call, chosen.name).impl, call, named=False)

        return rest.finish(others)

    def _choose(self, impl: str, call: Any) -> _Choice:
        if impl == "auto":
            return self._cheapest(call)
        if impl not in _KNOWN:
            raise ValueError(f"impl must be one of {', '.join(_KNOWN)}, got {impl!r}")
        chosen = self.impls.get(self._also.get(impl, impl))
        if chosen is None or chosen.route:
            have = ", ".join(each.name for each in self.impls.values() if not each.route)
            raise ImplUnavailable(f"{self.name}: there is no {impl!r} implementation (there are: {have})")
        reason = chosen.refusal(call) or chosen.unproven(call)
        if reason is not None:
            raise self._refused(impl, reason)
        return _Choice(chosen)

    def _refused(self, impl: str, reason: str) -> ImplUnavailable:
        return ImplUnavailable(f"{self.name}: impl={impl!r} cannot run this input: {reason}")

    def _cheapest(self, call: Any, without: str | None = None) -> _Choice:
        others = [(impl, reason) for impl, reason in self.candidates(call) if impl.name != without]
        able = [impl for impl, reason in others if reason is None]
        refused = [(impl, reason) for impl, reason in others if reason is not None]
        if not able:
            why = "; ".join(f"{impl.name}: {reason}" for impl, reason in refused) or "nothing is registered"
            raise ImplUnavailable(f"{self.name}: nothing can run this input on {call.device.type} ({why})")
        costs = [impl.cost(call) for impl in able]  # a tracer does not follow min() with a key
        best = able[costs.index(min(costs))]
        slow = best.name == "reference"
        # Two that are missing for the same reason are told once, as the first of them.
        told = {
            reason: impl.name
            for impl, reason in reversed(refused)
            if isinstance(reason, Unproven) or (slow and _expected(impl, call))
        }
        lasting = not any(isinstance(reason, Unproven) and reason.passing for reason in told)
        return _Choice(best, tuple(f"{name} cannot run ({why})" for why, name in told.items()), lasting)

    def _forbid(self, choice: _Choice) -> None:
        if choice.passed_over and os.environ.get("RGFAST_STRICT") == "1":
            reason, instead = choice.passed_over[0], choice.impl.name
            message = f"{self.name}: {reason}; using {instead}, which RGFAST_STRICT=1 forbids"
            raise ImplUnavailable(message)

    def _warn(self, choice: _Choice) -> None:
        self._forbid(choice)
        for reason in choice.passed_over:
            if (self.name, reason) not in _WARNED:
                _WARNED.add((self.name, reason))
                message = f"{self.name}: {reason}; using {choice.impl.name}"
                warnings.warn(message, FallbackWarning, _outside())


def _expected(impl: Impl, call: Any) -> bool:
    """Whether ``auto`` would have been expected to take an implementation that it refused."""
    device = call.device.type
    if impl.route:
        return False
    if device == "cpu":
        return device in (impl.devices or (device,)) and impl.missing() is not None
    # One for this device, or one that runs the same elsewhere: here, too, something faster is meant to exist.
    return device in (impl.devices or ()) or (impl.can_run(call) or impl.by_name_only(call)) is None


def _outside() -> int:
    """The stack level of the caller's own code."""
    level, frame = 2, sys._getframe(2)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "rgfast":
        level, frame = level + 1, frame.f_back
    return level


@dataclass(frozen=True)
class Record:
    """One op that ran: its name, the implementation, the instruction set where one was chosen.

    ``nested`` are the ops and implementations that it handed a part to.
    """

    op: str
    impl: str
    isa: str | None = None
    nested: list[Record] = field(default_factory=list, hash=False)


def walk(log: Iterable[Record]) -> Iterator[Record]:
    """Every entry of what :func:`record` collected, nested ones after the one they are nested in."""
    for entry in log:
        yield entry
        yield from walk(entry.nested)


@dataclass(frozen=True)
class Explanation:
    """Every implementation of an op for an input: why it is refused, or None, and its cost in seconds."""

    op: str
    device: str
    candidates: tuple[tuple[str, str | None], ...]
    costs: tuple[float, ...]

    @property
    def chosen(self) -> str | None:
        """What ``auto`` takes: the cheapest of those that are not refused."""
        able = [i for i, (_, reason) in enumerate(self.candidates) if reason is None]
        return self.candidates[min(able, key=self.costs.__getitem__)][0] if able else None

    def __str__(self) -> str:
        lines, chosen = [f"{self.op} on {self.device}:"], self.chosen
        for (name, reason), cost in zip(self.candidates, self.costs, strict=True):
            if reason is not None:
                lines.append(f"  {name:<10} no: {reason}")
            else:
                lines.append(f"  {name:<10} {'chosen' if name == chosen else 'yes':<7} {cost:.1e} s")
        return "\n".join(lines)

    __repr__ = __str__


class _Asked(BaseException):
    """What a public function was about to select; no handler of an Exception may swallow it."""

    def __init__(self, op: Op, call: Any) -> None:
        super().__init__(op.name)
        self.op, self.call = op, call


_OPS: dict[str, tuple[Op, Callable[..., Any]]] = {}
_FUNCTIONS: dict[str, Callable[..., Any]] = {}
_WARNED: set[tuple[str, str]] = set()
_RECORDING: ContextVar[list[Record] | None] = ContextVar("rgfast_record", default=None)
_ASKING: ContextVar[bool] = ContextVar("rgfast_explain", default=False)


def register(op: Op, function: Callable[..., Any], *more: Callable[..., Any]) -> Op:
    """Make ``op`` known to :func:`explain`: its name, with the arguments of ``function``, and functions."""
    _OPS[op.name] = op, function
    for each in (function, *more):
        _FUNCTIONS[each.__name__] = each
    return op


def registered() -> tuple[str, ...]:
    """Names of all ops, sorted."""
    return tuple(sorted(_OPS))


def implementations(op: str, device: str) -> tuple[str, ...]:
    """Names of the implementations of ``op`` that may run on a device type if asked for."""
    if op not in _OPS:
        raise ValueError(f"op must be one of {', '.join(registered())}, got {op!r}")
    impls = _OPS[op][0].impls.values()
    return tuple(
        i.name for i in impls if not i.route and (i.devices is None or torch.device(device).type in i.devices)
    )


def explain(what: Callable[..., Any] | str, *args: Any, **kwargs: Any) -> Explanation:
    """Every implementation for this input, with the reason why it is refused and its cost in seconds.

    Takes a public function, or its name or that of an op, and the arguments of the function (without
    ``impl``), which are validated. Nothing is computed of them.

    >>> import rgfast, torch
    >>> rgfast.explain(rgfast.effective_rank, torch.randn(8, 4)).candidates[-1]
    ('reference', None)
    """
    name = what if isinstance(what, str) else getattr(what, "__name__", repr(what))
    if isinstance(what, str):
        function = _OPS[name][1] if name in _OPS else _FUNCTIONS.get(name)
    else:
        function = what if _FUNCTIONS.get(name) is what else None
    if function is None:
        known = ", ".join(sorted({*_OPS, *_FUNCTIONS}))
        raise ValueError(f"op must be a public function or one of {known}, got {what!r}")
    token = _ASKING.set(True)
    try:
        function(*args, **kwargs)
    except _Asked as asked:
        op, call = asked.op, asked.call
    else:
        raise RuntimeError(f"{name} selected no implementation")
    finally:
        _ASKING.reset(token)
    rows = op.candidates(call)
    return Explanation(
        op.name,
        call.device.type,
        tuple((impl.name, reason) for impl, reason in rows),
        tuple(impl.cost(call) for impl, _ in rows),
    )


@contextmanager
def record() -> Iterator[list[Record]]:
    """Collect which implementation (and which ISA) of every op runs inside the ``with`` block.

    What ``auto`` handed to another op or implementation is nested in the entry of the one that ran first.

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


_SCHEMA_TYPES: dict[Any, str] = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    str: "str",
    str | None: "str?",
    float: "float",
    int: "int",
    bool: "bool",
}


def schema(call: Any, before: str = "", after: str = "", returns: str = "Tensor") -> str:
    """The ``torch.library`` schema of an operator that takes the fields of a ``Call`` in their order.

    A ``Call`` that is a NamedTuple flattens to them by being one, and ``call._make`` goes back.
    """
    fields = [f"{_SCHEMA_TYPES[kind]} {name}" for name, kind in typing.get_type_hints(call).items()]
    return f"({', '.join(each for each in (before, *fields, after) if each)}) -> {returns}"
