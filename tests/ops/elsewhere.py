"""Tensors that say they are not on the CPU, where they are: public functions run on them to their end."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

DEVICE = torch.device("meta")


class Elsewhere(torch.Tensor):
    """A tensor on another device, as far as it says, around one on the CPU."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> Elsewhere:
        made = torch.Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), dtype=held.dtype, device=DEVICE
        )
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(function, args, kwargs)


def _run(function: Any, args: Any, kwargs: Any) -> Any:
    kwargs = dict(kwargs or {})
    if function.namespace == "rgfast":  # the package's own, which sees where its tensors are
        with MakingElsewhere():
            return function.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **kwargs)
    device, to = kwargs.get("device"), False
    there = any(isinstance(each, Elsewhere) for each in torch.utils._pytree.tree_leaves((args, kwargs)))
    if device is not None:
        there = to = torch.device(device).type == DEVICE.type
        kwargs["device"] = "cpu"
    if to and "pin_memory" in kwargs:
        kwargs["pin_memory"] = False

    def inner(value: Any) -> Any:
        return value.held if isinstance(value, Elsewhere) else value

    def outer(value: Any) -> Any:
        return Elsewhere(value) if isinstance(value, torch.Tensor) and there else value

    args = list(args)
    found = function(*tree_map(inner, args), **tree_map(inner, kwargs))
    written = function._schema.arguments and function._schema.arguments[0].alias_info
    if written and written.is_write and (isinstance(args[0], Elsewhere) or found is None):
        return args[0] if function._schema.returns else None
    return tree_map(outer, found)


class MakingElsewhere(TorchDispatchMode):
    """Inside, tensors that are made on that device are `Elsewhere`, too."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(function, args, kwargs)
