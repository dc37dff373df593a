"""What must not happen where work is queued on a device: reads, copies, and too many bytes."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import DeviceType
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CUDA, META = int(DeviceType.CUDA), int(DeviceType.Meta)

# These make the host wait for what was queued.
READS = {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique", "unique_dim"}


class Waits(TorchDispatchMode):
    """Collects operators that make a host wait for a device, or would on one.

    ``after`` is how many others ran since the first.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.after = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = function.overloadpacket.__name__, kwargs or {}
        found = ""
        if name in READS:
            found = name
        elif name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            chosen = [at for at in args[1] if at is not None]
            if any(at.dtype in (torch.bool, torch.uint8) for at in chosen):
                found = f"{name} with a mask"
        elif (name == "lift_fresh" and args[0].dim()) or (
            name == "_to_copy" and kwargs.get("device") is not None
        ):
            found = f"{name} between devices"
        if found:
            self.found.append(found)
        elif self.found:
            self.after += 1
        return function(*args, **kwargs)


class Peak(TorchDispatchMode):
    """The most bytes of tensors that were there at a time, of those that were made inside."""

    def __init__(self, given: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.most = 0
        self.given = {x.untyped_storage()._cdata for x in given}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        for x in tree_leaves(found):
            if isinstance(x, torch.Tensor):
                storage = x.untyped_storage()
                if storage._cdata not in {*self.live, *self.given}:
                    self.live[storage._cdata] = storage.nbytes()
                    weakref.finalize(storage, self.live.pop, storage._cdata, None)
        self.most = max(self.most, sum(self.live.values()))
        return found


def _device_guard() -> None:
    """Let PyTorch switch to a GPU and back in a build without one: what it does for "meta", nothing.

    Fake tensors have no data, but their device is switched to all the same.
    """
    slots = (ctypes.c_void_p * (META + 1)).in_dll(
        ctypes.CDLL(next(Path(torch.__file__).parent.glob("lib/libc10.*"))),
        "_ZN3c104impl26device_guard_impl_registryE",
    )
    if not slots[CUDA]:
        slots[CUDA] = slots[META]


@contextmanager
def fake_gpu() -> Iterator[None]:
    """Inside, tensors on "cuda" are fake, and reading one is an error."""
    _device_guard()
    with FakeTensorMode():
        yield
