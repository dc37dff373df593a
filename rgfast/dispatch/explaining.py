"""Ops by name, and every implementation of one for an input, with the reason why it is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from rgfast.dispatch.op import ASKING, Asked, Op

__all__ = ["Explanation", "explain", "implementations", "register", "registered"]

_OPS: dict[str, tuple[Op, Callable[..., Any]]] = {}
_FUNCTIONS: dict[str, Callable[..., Any]] = {}


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
    token = ASKING.set(True)
    try:
        function(*args, **kwargs)
    except Asked as asked:
        op, call = asked.op, asked.call
    else:
        raise RuntimeError(f"{name} selected no implementation")
    finally:
        ASKING.reset(token)
    rows = op.candidates(call)
    return Explanation(
        op.name,
        call.device.type,
        tuple((impl.name, reason) for impl, reason in rows),
        tuple(impl.cost(call) for impl, _ in rows),
    )
