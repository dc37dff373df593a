"""What a module returned: finding the tensor in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from rgfast.runtime.waiting import numbers
from rgfast.validation import kind_of

__all__ = ["Activation", "find_tensor", "locate", "unnested"]

_PREFERRED = ("last_hidden_state", "hidden_states", "hidden_state", "logits")
_WHOLE = "last_hidden_state"


def find_tensor(value: Any, name: str) -> Tensor:
    """The activation in what layer ``name`` returned or was given.

    A tensor is itself; of a tuple or list it is the first tensor; of a mapping or dataclass the entry called
    ``last_hidden_state``, ``hidden_states``, ``hidden_state`` or ``logits``, else the first tensor.
    Raises TypeError where there is none.
    """
    return locate(value, name)[0]


def locate(value: Any, name: str) -> tuple[Tensor, list[Tensor]]:
    """The activation as :func:`find_tensor` finds it, and the other floating tensors that are held beside it,
    none if it goes by the name of a whole model's output."""
    found = _find(value)
    if found is None:
        raise TypeError(f"layer {name!r} must return a floating tensor (or hold one), got {_told(value)}")
    if type(found[0]) is Tensor and found[0].is_meta:
        raise ValueError(f"layer {name!r} must hold numbers, got a tensor on the meta device")
    return found


def _told(value: Any) -> str:
    if isinstance(value, (list, tuple)) and any(isinstance(item, Tensor) for item in value):
        return f"a {type(value).__name__} of {', '.join(kind_of(item) for item in value)}"
    return kind_of(value)


def _find(value: Any) -> tuple[Tensor, list[Tensor]] | None:
    if isinstance(value, Tensor):
        return (value, []) if value.is_floating_point() else None
    if isinstance(value, Mapping):
        entries = dict(value)
    elif is_dataclass(value) and not isinstance(value, type):
        entries = {field.name: getattr(value, field.name) for field in fields(value)}
    elif isinstance(value, (tuple, list)):
        return _first(value)
    else:
        return None
    if isinstance(x := entries.get(_WHOLE), Tensor) and x.is_floating_point():
        return x, []
    return _first([*(entries[key] for key in _PREFERRED if key in entries), *entries.values()])


def _first(items: Sequence[Any]) -> tuple[Tensor, list[Tensor]] | None:
    """The first tensor in ``items``, with the other items if it is one of them."""
    for item in items:
        if (found := _find(item)) is None:
            continue
        if found[0] is not item:
            return found
        others = {
            id(x): x for x in items if isinstance(x, Tensor) and x.is_floating_point() and x is not item
        }
        return item, list(others.values())
    return None


@dataclass(frozen=True)
class Activation:
    """What a layer put out for a batch: ``rows`` ``[B, T, D]``, and which of them count ``[B, T]`` if the
    layer itself tells (a nested tensor does), else None."""

    rows: Tensor
    keep: Tensor | None = None

    def longer(self, length: int) -> Activation:
        """With rows that do not count up to ``length``, if it tells which ones do."""
        lacking = length - self.rows.shape[1]
        if self.keep is None or lacking <= 0:
            return self
        return Activation(pad(self.rows, (0, 0, 0, lacking)), pad(self.keep, (0, lacking)))


def unnested(x: Tensor, name: str) -> tuple[Tensor, Tensor | None]:
    """A nested tensor of sequences ``[T_b, D]`` as ``[B, T, D]`` and which rows are there; others as is."""
    if not x.is_nested:
        return x, None
    parts = x.unbind()
    if not parts or any(part.dim() != 2 for part in parts):
        raise ValueError(
            f"layer {name!r} must hold sequences [T, D] if it is nested, got {x.dim()} dimensions"
        )
    lengths = numbers([len(part) for part in parts], x.device)
    rows = pad_sequence(list(parts), batch_first=True)
    return rows, torch.arange(rows.shape[1], dtype=torch.int64, device=x.device) < lengths[:, None]
