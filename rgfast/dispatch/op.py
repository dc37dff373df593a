"""An op: its implementations, and the one that runs."""

from __future__ import annotations

import os
import sys
import typing
import warnings
from collections.abc import Hashable, Iterable
from contextvars import ContextVar
from typing import Any

import torch

from rgfast.dispatch.implementation import (
    KNOWN,
    FallbackWarning,
    HandOff,
    Impl,
    ImplUnavailable,
    Unproven,
)
from rgfast.dispatch.records import RECORDING, Record

__all__ = ["ASKING", "Asked", "Op"]

_MOST_CACHED = 1024
_WARNED: set[tuple[str, str]] = set()
ASKING: ContextVar[bool] = ContextVar("rgfast_explain", default=False)


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
        if ASKING.get():
            raise Asked(self, call)
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
        if ASKING.get():
            return None
        try:
            return self.select(impl, call)
        except ImplUnavailable:
            return None

    def run(self, chosen: Impl, call: Any, *, named: bool) -> Any:
        """The result of an implementation that :meth:`select` returned, recorded."""
        if torch.compiler.is_compiling():
            return chosen.run(call)
        log = RECORDING.get()
        if log is None:
            try:
                return chosen.run(call)
            except HandOff as rest:
                return self._hand_off(rest, chosen, named)
        entry = Record(self.recorded_as, chosen.name, chosen.isa())
        log.append(entry)
        token = RECORDING.set(entry.nested)
        try:
            return chosen.run(call)
        except HandOff as rest:
            return self._hand_off(rest, chosen, named)
        finally:
            RECORDING.reset(token)

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
        if impl not in KNOWN:
            raise ValueError(f"impl must be one of {', '.join(KNOWN)}, got {impl!r}")
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


class Asked(BaseException):
    """What a public function was about to select; no handler of an Exception may swallow it."""

    def __init__(self, op: Op, call: Any) -> None:
        super().__init__(op.name)
        self.op, self.call = op, call
