"""Whether looking at a value holds the host up."""

from __future__ import annotations

import torch

__all__ = ["waits_for"]

# Tests set it, so that what runs elsewhere is run on the CPU.
_EVERYWHERE = False


def waits_for(device: torch.device) -> bool:
    """Whether reading a value on ``device`` waits for all that was queued there: everywhere but on the CPU.

    What runs while a model does must not read values then. It counts on the device, and what is counted is
    read at the end or at stated intervals.
    """
    return _EVERYWHERE or device.type != "cpu"
