"""Checks that public functions share: one sentence naming the argument, what was expected and what came."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "FLOATS",
    "as_real_tensor",
    "as_tensor",
    "check_choice",
    "check_integer",
    "check_positive_int",
    "kind_of",
    "widen",
]

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def as_real_tensor(value: Any, name: str, *, min_dim: int = 0) -> Tensor:
    """``value`` as a real floating tensor of at least ``min_dim`` dimensions (numpy arrays are wrapped).

    Raises TypeError for anything but a floating tensor or array, ValueError for too few dimensions.
    """
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(value)
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor or numpy array, got {type(value).__name__}")
    if value.dtype not in FLOATS:
        kinds = ", ".join(str(d).removeprefix("torch.") for d in FLOATS)
        raise TypeError(f"{name} must be one of {kinds}, got {str(value.dtype).removeprefix('torch.')}")
    if value.layout != torch.strided:
        raise TypeError(f"{name} must be a dense (strided) tensor, got layout {value.layout}")
    if value.dim() < min_dim:
        raise ValueError(f"{name} must have at least {min_dim} dimensions, got shape {tuple(value.shape)}")
    return value


def as_tensor(value: Any) -> Tensor:
    """``value`` if it is a tensor; else what it holds, on the CPU, in the dtype that numpy gives it.

    ``torch.as_tensor`` would round floats to the default dtype, and move even tensors to the default device.
    """
    return value if isinstance(value, Tensor) else torch.from_numpy(np.asarray(value))


def check_choice(value: Any, name: str, choices: Iterable[Any]) -> None:
    """Raise ValueError unless ``value`` is one of ``choices``."""
    choices = tuple(choices)
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_integer(value: Any, name: str, *, least: int, most: int | None = None) -> None:
    """Raise TypeError unless ``value`` is a whole number, ValueError unless in ``least`` to ``most``."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} must be a whole number, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    if most is not None and value > most:
        raise ValueError(f"{name} must be at most {most}, got {value}")


def check_positive_int(value: Any, name: str) -> None:
    """Raise unless ``value`` is a whole number of at least 1 (TypeError for what is no whole number)."""
    check_integer(value, name, least=1)


def kind_of(value: Any) -> str:
    """What ``value`` is, for a message: the dtype of a tensor, else the type."""
    return str(value.dtype) if isinstance(value, Tensor) else type(value).__name__


def widen(x: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """``x`` in at least the precision of ``dtype``; exact, since every float here is a subset of fp64."""
    return x if x.dtype == torch.float64 else x.to(dtype)
