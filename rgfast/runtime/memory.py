"""What a device has room for."""

from __future__ import annotations

import torch

__all__ = ["free_bytes"]


def free_bytes(device: torch.device) -> int | None:
    """Bytes of a GPU that nothing has taken yet; None for a device of which that is not known, as the CPU.

    What torch keeps for itself counts as free but for the most that tensors have taken so far: a model's next
    forward will want it again.
    """
    if device.type != "cuda":
        return None
    unclaimed, _ = torch.cuda.mem_get_info(device)
    held = torch.cuda.memory_reserved(device) - torch.cuda.max_memory_allocated(device)
    return max(0, unclaimed + held)
