"""Models whose parameters lie on several ranks, FSDP2's and DTensors, read as those of one process."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "block_of",
    "class_of",
    "copied",
    "gathered",
    "is_dtensor",
    "is_sharded",
    "local",
    "reshard",
    "sharded_over",
    "tensor_mesh",
    "whole",
]


def class_of(module: nn.Module) -> type:
    """The class that the module had before ``fully_shard`` put one of its own in front of it."""
    kind, fsdp = type(module), _class("torch.distributed.fsdp", "FSDPModule")
    return kind.__bases__[1] if fsdp is not None and kind.__bases__[0] is fsdp else kind


def is_sharded(model: nn.Module) -> bool:
    """Whether every forward of the model is one of several ranks together."""
    fsdp = _class("torch.distributed.fsdp", "FSDPModule")
    if fsdp is not None and any(isinstance(module, fsdp) for module in model.modules()):
        return True
    return any(is_dtensor(p) for p in model.parameters())


def sharded_over(model: nn.Module) -> set[int]:
    """The ranks of the default group that hold a part of a parameter."""
    reshard(model)
    found: set[int] = set()
    for p in model.parameters():
        if is_dtensor(p):
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
    return parted.full_tensor() if is_dtensor(x) else x


def local(x: Tensor) -> Tensor:
    """The tensor itself, of a DTensor what this rank has of it; waits until it is there."""
    parted: Any = x
    found: Any = parted.to_local() if is_dtensor(x) else parted
    kind = _class("torch.distributed._functional_collectives", "AsyncCollectiveTensor")
    own: Tensor = found.trigger_wait() if kind is not None and isinstance(found, kind) else found
    return own


def copied(x: Tensor) -> Tensor:
    """A copy, of a DTensor one that is placed alike."""
    if not is_dtensor(x):
        return x.clone()
    from torch.distributed.tensor import DTensor

    parted: Any = x
    found: Tensor = DTensor.from_local(
        local(x).clone(),
        parted.device_mesh,
        parted.placements,
        run_check=False,
        shape=x.shape,
        stride=x.stride(),
    )
    return found


def tensor_mesh(model: nn.Module) -> Any:
    """The mesh whose ranks run every forward of the model on the same batch, None if there is none.

    It is that of DTensor parameters, of models under FSDP2 that of their whole parameters, which are looked
    at: all ranks call this together. Raises ValueError for parameters over several meshes.
    """
    fsdp = _class("torch.distributed.fsdp", "FSDPModule")
    units = [module for module in model.modules() if fsdp is not None and isinstance(module, fsdp)]
    parted = {id(p) for unit in units for p in _own(unit, fsdp)}
    meshes = {p.device_mesh for p in _dtensors(model.parameters()) if id(p) not in parted}
    for unit in units:
        if any(p.device_mesh.ndim > 1 for p in _dtensors(_own(unit, fsdp))):
            unit.unshard()
            meshes |= {p.device_mesh for p in _dtensors(_own(unit, fsdp))}
            unit.reshard()
    if len(meshes) > 1:
        raise ValueError(
            "model must have its parameters over one mesh of ranks that run it together, got "
            f"{', '.join(sorted(map(str, meshes)))}"
        )
    mesh = next(iter(meshes), None)
    return None if mesh is None or mesh.size() == 1 else mesh


def _dtensors(parameters: Iterable[Any]) -> list[Any]:
    return [p for p in parameters if is_dtensor(p)]


def _own(unit: nn.Module, fsdp: Any) -> list[nn.Parameter]:
    """The parameters of a module under FSDP2 that are of none inside it."""
    found, parts = [*unit.parameters(recurse=False)], [*unit.children()]
    while parts:
        part = parts.pop()
        if not isinstance(part, fsdp):
            found += part.parameters(recurse=False)
            parts += part.children()
    return found


def block_of(module: nn.Module) -> list[nn.Module]:
    """The module and the parts inside it, but for those in lists of modules and those that ``fully_shard``
    gathers by themselves: what a rank has room for at once, as a forward does."""
    fsdp = _class("torch.distributed.fsdp", "FSDPModule")
    found, parts = [module], [*module.children()]
    while parts:
        part = parts.pop()
        if not isinstance(part, nn.ModuleList) and (fsdp is None or not isinstance(part, fsdp)):
            found.append(part)
            parts += part.children()
    return found


@contextmanager
def gathered(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Inside, the sharded parameters of these modules are whole and plain; of what they hold in the end every
    rank keeps its own part. All ranks go through it together."""
    places = [(m, name, p) for m in modules for name, p in m._parameters.items() if is_dtensor(p)]
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


def is_dtensor(x: Any) -> bool:
    kind = _class("torch.distributed.tensor", "DTensor")
    return kind is not None and isinstance(x, kind)


def _class(module: str, name: str) -> Any:
    """A class of torch's, None where nothing has imported its module, so that nothing is of it."""
    return getattr(sys.modules.get(module), name, None)
