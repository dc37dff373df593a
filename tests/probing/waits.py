"""Modes that see every operator, and say which would make a host wait for a device or fill its memory."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

READS = {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal"}
READS |= {"unique", "_unique2", "unique_dim"}
MEMORY = {"empty", "new_empty", "empty_like", "empty_strided", "_unsafe_view"}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}


class Waits(TorchDispatchMode):
    """Collects the operators that make a host wait for a device; with ``here``, the CPU is taken for one.

    A copy to the host, or from it, waits unless it says that it does not.
    """

    def __init__(self, *, here=False):
        super().__init__()
        self._here, self.found = here, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function.overloadpacket.__name__
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if self._here or any(x.device.type != "cpu" for x in tensors):
            self._look(name, args)
        where, wanted = _devices(name, args, kwargs)
        # Copies between two of a kind are queued on both.
        if wanted is not None and where.type != wanted.type and not kwargs.get("non_blocking", False):
            self.found.append(f"{name} from {where.type} to {wanted.type}")
        return function(*args, **kwargs)

    def _look(self, name, args):
        if name in READS:
            self.found.append(name)
        if name in INDEXING and any(x.dtype in (torch.bool, torch.uint8) for x in args[1] if x is not None):
            self.found.append(f"{name} with a mask")
        if name == "lift_fresh" and args[0].dim():  # a number is filled in, a list is copied from the host
            self.found.append("lift_fresh of a list")


def _devices(name, args, kwargs):
    """From where to where a copy is made; None twice if none is."""
    if name == "_to_copy" and kwargs.get("device") is not None:
        return args[0].device, torch.device(kwargs["device"])
    if name == "copy_" and not (len(args) > 2 and args[2]):
        return args[1].device, args[0].device
    return None, None


class Made(TorchDispatchMode):
    """Collects the bytes of every memory that operators took, of ``least`` bytes or more."""

    def __init__(self, least):
        super().__init__()
        self._least, self.bytes = least, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        known = {_memory(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        found = function(*args, **(kwargs or {}))
        for x in tree_leaves(found):
            if isinstance(x, Tensor) and _memory(x) not in known and x.nbytes >= self._least:
                self.bytes.append(x.nbytes)
        return found


class Launches(TorchDispatchMode):
    """Counts the operators that have work for a device: views and memory are none; with ``here``, the CPU is
    taken for one."""

    def __init__(self, *, here=False):
        super().__init__()
        self._here, self.found = here, Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = function(*args, **(kwargs or {}))
        name, schema = function.overloadpacket.__name__, function._schema
        aliases = [x.alias_info for x in schema.returns if x.alias_info is not None]
        idle = name in MEMORY or any(not alias.is_write for alias in aliases)
        there = self._here or any(
            isinstance(x, Tensor) and x.device.type != "cpu" for x in tree_leaves((args, kwargs, given))
        )
        self.found[name] += there and not idle
        return given


def _memory(x):
    return x.untyped_storage()._cdata
