"""Models whose parameters lie on several ranks, FSDP2's and DTensors, read as those of one process."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["class_of", "gathered", "is_sharded", "local", "reshard", "sharded_over", "whole"]


def class_of(module: nn.Module) -> type:
    """The class that the module had before ``fully_shard`` put one of its own in front of it."""
    kind, fsdp = type(module), _class("torch.distributed.fsdp", "FSDPModule")
    return kind.__bases__[1] if fsdp is not None and kind.__bases__[0] is fsdp else kind


def is_sharded(model: nn.Module) -> bool:
    """Whether every forward of the model is one of several ranks together."""
    fsdp = _class("torch.distributed.fsdp", "FSDPModule")
    if fsdp is not None and any(isinstance(module, fsdp) for module in model.modules()):
        return True
    return any(_is_dtensor(p) for p in model.parameters())


def sharded_over(model: nn.Module) -> set[int]:
    """The ranks of the default group that hold a part of a parameter."""
    reshard(model)
    found: set[int] = set()
    for p in model.parameters():
        if _is_dtensor(p):
            parted: Any = p
            found.update(parted.device_mesh.mesh.flatten().tolist())
    return found


def reshard(model: nn.Module) -> None:
    """Free the whole parameters that FSDP2 keeps after a forward: each rank has its own part again."""
    fsdp = _class("torch.distributed.fsdp", "FSDPModule")
    for module in model.modules() if fsdp is not None else ():
        if isinstance(module, fsdp):
            module.reshard()


def whole(x: Tensor) -> Tensor:
    """The tensor itself, of a DTensor all of it: then every rank that has a part of it must call this."""
    parted: Any = x
    return parted.full_tensor() if _is_dtensor(x) else x


def local(x: Tensor) -> Tensor:
    """The tensor itself, of a DTensor what this rank has of it."""
    parted: Any = x
    return parted.to_local() if _is_dtensor(x) else x


@contextmanager
def gathered(module: nn.Module, *, recurse: bool) -> Iterator[None]:
    """Inside, the sharded parameters of a module (``recurse``: of its parts too) are whole and plain; of what
    they hold in the end every rank keeps its own part. All ranks go through it together."""
    modules = list(module.modules()) if recurse else [module]
    places = [(m, name, p) for m in modules for name, p in m._parameters.items() if _is_dtensor(p)]
    if not places:
        yield
        return
    from torch.distributed.tensor import distribute_tensor

    parts: dict[int, Any] = {id(p): p for _, _, p in places}
    plain = {key: nn.Parameter(whole(p.detach()).clone(), p.requires_grad) for key, p in parts.items()}
    for m, name, p in places:
        m._parameters[name] = plain[id(p)]
    try:
        yield
    finally:
        for m, name, p in places:
            if (drawn := m._parameters[name]) is not None:
                plain[id(p)] = drawn
            m._parameters[name] = p
    with torch.no_grad():
        for key, part in parts.items():
            new = plain[key].detach()
            new = distribute_tensor(new, part.device_mesh, part.placements, src_data_rank=None)
            local(part).copy_(local(new))


def _is_dtensor(x: Any) -> bool:
    kind = _class("torch.distributed.tensor", "DTensor")
    return kind is not None and isinstance(x, kind)


def _class(module: str, name: str) -> Any:
    """A class of torch's, None where nothing has imported its module, so that nothing is of it."""
    return getattr(sys.modules.get(module), name, None)
