"""Which tensor of what a block returns, or is given, is the stream."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rgfast.probing.capture.activations import find_tensor, locate
from rgfast.probing.capture.layers import Tap
from rgfast.probing.capture.patterns import by_layer
from rgfast.probing.unread import Unread

__all__ = ["OutputSpec", "Outputs", "check_output"]

# "sum", an index, a key, or a function of what a block returns.
_Choice = int | str | Callable[[Any], Any]
OutputSpec = _Choice | Mapping[str, _Choice] | None

_SUM = "sum"
_WAYS = "an index, a key, a function or 'sum'"
# These return two states of one shape, or weights that may have the shape of the stream; the first counts.
_FIRST_COUNTS = (nn.LSTMCell, nn.MultiheadAttention)


class Outputs:
    """Takes the stream out of what layers return.

    Raises ValueError for a pattern that no layer matches.
    """

    def __init__(self, asked: OutputSpec, taps: Sequence[Tap], unread: Unread) -> None:
        self._taps, self._unread = taps, unread
        found = by_layer("output", asked, [tap.name for tap in taps])
        # What a block is given is not ordered as what it returns is, so that only "sum", and patterns that
        # end in ":input", are of inputs.
        self._asked: list[_Choice | None] = [
            choice if tap.side == "output" or choice == _SUM or pattern.endswith(":input") else None
            for tap, (pattern, choice) in zip(taps, found, strict=True)
        ]

    def returned(
        self, tap: int, value: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], module: nn.Module
    ) -> Tensor:
        """The stream in what the module of a tap returned on these arguments.

        Raises TypeError if there is no floating tensor, ValueError if several may be the stream.
        """
        if isinstance(value, Tensor):
            if callable(self._asked[tap]):
                return self._chosen(tap, value)
            return find_tensor(value, self._taps[tap].name)
        if self._asked[tap] is not None:
            return self._chosen(tap, value)
        found, beside = locate(value, self._taps[tap].name)
        shapes = {x.shape for x in _tensors([*args, *kwargs.values()])}
        rivals = [x for x in beside if x is not found and x.shape == found.shape]
        if found.shape in shapes and rivals and not isinstance(module, _FIRST_COUNTS):
            number = torch.stack([1 - _is_attention(x) for x in rivals]).sum()
            self._unread.check(
                number, lambda n: self._ambiguous(tap, f"returns {int(n) + 1}", found) if int(n) else ""
            )
        return found

    def given(self, tap: int, args: tuple[Any, ...], kwargs: Mapping[str, Any], module: nn.Module) -> Tensor:
        """The stream in what the module of a tap is given.

        Raises TypeError if there is no floating tensor, ValueError if there is a residual beside it.
        """
        name, asked = self._taps[tap].name, self._asked[tap]
        if asked is not None and asked != _SUM:
            return self._chosen(tap, kwargs if isinstance(asked, str) and asked in kwargs else args)
        found, beside = locate([*args, *kwargs.values()], name)
        named = _residuals(args, kwargs, module) if len(args) + len(kwargs) > 1 else []
        residuals = [x for x in named if x is not found and x.shape == found.shape]
        if asked == _SUM:
            return _summed(found, residuals or beside)
        if residuals:
            raise ValueError(self._ambiguous(tap, "is given a residual: 2", found))
        return found

    def _chosen(self, tap: int, value: Any) -> Tensor:
        asked, name = self._asked[tap], self._taps[tap].name
        if asked == _SUM:
            return _summed(*locate(value, name))
        if callable(asked):
            chosen, shown = asked(value), "the function"
        else:
            chosen, shown = _item(value, asked, name), f"{asked!r}"
        if not isinstance(chosen, Tensor) or not chosen.is_floating_point():
            raise TypeError(
                f"output: {shown} must give a floating tensor of layer {name!r}, got {type(chosen).__name__}"
            )
        return chosen

    def _ambiguous(self, tap: int, what: str, found: Tensor) -> str:
        return (
            f"output: layer {self._taps[tap].name!r} {what} floating tensors of the stream's shape "
            f"{tuple(found.shape)}; say which is the stream: output='sum' adds them (a branch and its "
            "residual), output=0 takes the first, and a key, a function or these by layer pattern work too"
        )


def check_output(output: Any) -> None:
    """Raise TypeError unless ``output`` is an :data:`OutputSpec`."""
    for choice in output.values() if isinstance(output, Mapping) else [output]:
        if choice is None and output is None:
            continue
        if isinstance(choice, bool) or not (isinstance(choice, (int, str)) or callable(choice)):
            raise TypeError(f"output must be {_WAYS}, or these by layer pattern, got {choice!r}")


def _item(value: Any, key: Any, name: str) -> Any:
    """``value[key]``, or the field of that name."""
    if is_dataclass(value) and not isinstance(value, (type, Mapping)):
        value = {field.name: getattr(value, field.name) for field in fields(value)}
    if isinstance(value, Mapping):
        holds = f"the keys {', '.join(map(str, value))}"
        if isinstance(key, int) and key not in value:
            value = list(value.values())
    elif isinstance(value, (tuple, list)):
        holds = f"{len(value)} items"
        if isinstance(key, str):
            value = value._asdict() if hasattr(value, "_asdict") else {}
    else:
        raise TypeError(f"output: layer {name!r} must return several values, got {type(value).__name__}")
    try:
        return value[key]
    except (KeyError, IndexError):
        raise ValueError(f"output: layer {name!r} has no {key!r}, it has {holds}") from None


def _summed(found: Tensor, beside: Sequence[Tensor]) -> Tensor:
    """``found`` and the others of its shape, added up."""
    for x in beside:
        if x is not found and x.shape == found.shape:
            found = found + x
    return found


def _tensors(value: Any) -> Iterator[Tensor]:
    """The floating tensors in arguments, those in tuples and mappings too."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, (tuple, list, Mapping)):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(item)


def _residuals(args: tuple[Any, ...], kwargs: Mapping[str, Any], module: nn.Module) -> list[Tensor]:
    """The arguments whose names call them a residual."""
    try:
        bound = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
    except (TypeError, ValueError):
        bound = dict(kwargs)
    return [x for name, x in bound.items() if "resid" in name.lower() and isinstance(x, Tensor)]


def _is_attention(x: Tensor) -> Tensor:
    """Whether ``x`` ``[..., T, T]`` can only be attention weights, rows that sum to 1: an integer on its
    device."""
    if x.dim() < 2 or x.shape[-1] != x.shape[-2]:
        return torch.zeros((), dtype=torch.int64, device=x.device)
    near = torch.isclose(x.sum(-1), torch.ones((), dtype=x.dtype, device=x.device), atol=1e-2)
    return ((x >= 0).all() & near.all()).to(torch.int64)
