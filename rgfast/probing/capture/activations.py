"""What a module returned, as ``[B, T, D]``: finding the tensor and laying out its axes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

__all__ = ["Activation", "as_rows", "find_tensor", "unnested"]

_PREFERRED = ("last_hidden_state", "hidden_states", "hidden_state", "logits")


def find_tensor(value: Any, name: str) -> Tensor:
    """The activation in what layer ``name`` returned or was given.

    A tensor is itself; of a tuple or list it is the first tensor; of a mapping or dataclass the entry called
    ``last_hidden_state``, ``hidden_states``, ``hidden_state`` or ``logits``, else the first tensor.
    Raises TypeError where there is none.
    """
    found = _find(value)
    if found is None:
        raise TypeError(
            f"layer {name!r} must return a floating tensor (or hold one), got {type(value).__name__}"
        )
    return found


def _find(value: Any) -> Tensor | None:
    if isinstance(value, Tensor):
        return value if value.is_floating_point() else None
    if isinstance(value, Mapping):
        entries = dict(value)
    elif is_dataclass(value) and not isinstance(value, type):
        entries = {field.name: getattr(value, field.name) for field in fields(value)}
    elif isinstance(value, (tuple, list)):
        return next((t for t in (_find(item) for item in value) if t is not None), None)
    else:
        return None
    ordered = [*(entries[key] for key in _PREFERRED if key in entries), *entries.values()]
    return next((t for t in (_find(item) for item in ordered) if t is not None), None)


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


def as_rows(x: Tensor, name: str) -> Tensor:
    """``[B, T, D]`` of an activation: ``[B, D]`` has one position, ``[B, C, H, W]`` has H·W.

    Raises ValueError for any other number of dimensions, and if there are no positions or features.
    """
    rows = x
    if x.dim() == 2:
        rows = x[:, None]
    elif x.dim() == 4:
        rows = x.flatten(2).transpose(1, 2)
    if rows.dim() != 3 or not rows.shape[1] or not rows.shape[2]:
        raise ValueError(
            f"layer {name!r} must be [B, D], [B, T, D] or [B, C, H, W] with none but B empty, got shape "
            f"{tuple(x.shape)}"
        )
    return rows


def unnested(x: Tensor, name: str) -> tuple[Tensor, Tensor | None]:
    """A nested tensor of sequences ``[T_b, D]`` as ``[B, T, D]`` and which rows are there; others as is."""
    if not x.is_nested:
        return x, None
    parts = x.unbind()
    if not parts or any(part.dim() != 2 for part in parts):
        raise ValueError(
            f"layer {name!r} must hold sequences [T, D] if it is nested, got {x.dim()} dimensions"
        )
    lengths = torch.tensor([len(part) for part in parts], dtype=torch.int64, device=x.device)
    rows = pad_sequence(list(parts), batch_first=True)
    return rows, torch.arange(rows.shape[1], dtype=torch.int64, device=x.device) < lengths[:, None]
