"""Two GPUs as far as devices go: tensors that say they are on ``meta:0`` or ``meta:1``, where they are.

Everything is computed, by the CPU, so values can be checked; but operators refuse tensors of several
devices, as those of CUDA do, and modes (see `waits`) see every read and every copy. Fake tensors of type
``cuda`` need a torch that was built for it, and have no values.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

KIND = "meta"
COPIES = {"_to_copy", "copy_"}


class There(Tensor):
    """A tensor on a device ``meta:k``, around one on the CPU."""

    held: Tensor

    @staticmethod
    def __new__(cls, held, device):
        device = torch.device(device)
        assert device.type == KIND
        assert device.index is not None, f"a buffer on {device} must name its device"
        made = Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), dtype=held.dtype, device=device
        )
        made.held = held
        return made

    def data_ptr(self):
        return self.held.data_ptr()

    def __repr__(self):
        return f"There({self.held}, {self.device})"

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return _run(function, args, kwargs or {})


class Making(TorchDispatchMode):
    """Inside, tensors that are made on such a device are `There`."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return _run(function, args, kwargs or {})


def _run(function, args, kwargs):
    name = function.overloadpacket.__name__
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    places = {x.device for x in tensors if isinstance(x, There) or x.dim()}
    if len(places) > 1 and name not in COPIES:
        raise RuntimeError(f"{name}: expected all tensors to be on the same device, got {places}")
    device = next((x.device for x in tensors if isinstance(x, There)), None)
    if kwargs.get("device") is not None:
        device = torch.device(kwargs["device"])
        kwargs = {**kwargs, "device": torch.device("cpu")}
    found = function(*tree_map(_inner, args), **tree_map(_inner, kwargs))
    written = function._schema.arguments and function._schema.arguments[0].alias_info
    if written and written.is_write:
        return args[0] if function._schema.returns else None
    if device is None or device.type != KIND:
        return found

    def outer(value):
        return There(value, device) if isinstance(value, Tensor) else value

    return tree_map(outer, found)


def _inner(value):
    return value.held if isinstance(value, There) else value
