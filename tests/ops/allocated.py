"""What is allocated while something runs."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["Allocated"]


class Allocated(TorchDispatchMode):
    """Storages of all tensors that are made, by address, as if none were freed."""

    def __init__(self):
        super().__init__()
        self.storages = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        for x in tree_leaves(found):
            if isinstance(x, torch.Tensor):
                self.storages[x.untyped_storage()._cdata] = x.untyped_storage()
        return found

    def bytes_beside(self, given):
        """Bytes of these but for the tensors ``given``."""
        known = {x.untyped_storage()._cdata for x in given}
        return sum(each.nbytes() for key, each in self.storages.items() if key not in known)
