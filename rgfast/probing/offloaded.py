"""Models whose weights wait elsewhere between forwards, on the host or on disk, as accelerate has them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["brought", "is_offloaded", "runs_on"]


def is_offloaded(model: nn.Module) -> bool:
    """Whether some parameters are on ``meta``, so that they wait elsewhere."""
    return any(p.is_meta for p in model.parameters())


def runs_on(model: nn.Module) -> torch.device | None:
    """Where a model takes its input; None if it does not say.

    Of weights that are offloaded, the hook that brings them says where the model runs.
    """
    first = next(iter(model.parameters()), None)
    if first is None:
        return None
    if first.device.type != "meta":
        return first.device
    for module in model.modules():
        device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.device(device if not isinstance(device, int) else f"cuda:{device}")
    return None


def brought(model: nn.Module, name: str, value: Tensor) -> Tensor:
    """The entry ``name`` of the model's state, on the host if it was offloaded; as it is, on ``meta``, if no
    hook says where it waits."""
    if not value.is_meta:
        return value
    parts = name.split(".")
    for k in reversed(range(len(parts))):  # a hook may bring what modules inside its own have
        for hook in _hooks(model.get_submodule(".".join(parts[:k]))):
            found = (getattr(hook, "weights_map", None) or {}).get(".".join(parts[k:]))
            if found is not None:
                there: Tensor = found.to(value.dtype)
                return there
    return value


def _hooks(module: nn.Module) -> Iterator[Any]:
    hook = getattr(module, "_hf_hook", None)
    yield from getattr(hook, "hooks", [hook])
