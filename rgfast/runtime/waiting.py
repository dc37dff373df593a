"""What holds the host up, and how values go to and from a device without that.

Looking at a value on a GPU waits for all that was queued there before. What runs while a model does must not
do that: it counts on the device, and what was counted is read at the end or at stated intervals, by `read`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["Later", "numbers", "read", "sent", "waits_for"]

# Tests set it, so that what runs elsewhere is run on the CPU.
_EVERYWHERE = False


def waits_for(device: torch.device) -> bool:
    """Whether reading a value on ``device`` waits for what was queued there: everywhere but on the CPU."""
    return _EVERYWHERE or device.type != "cpu"


def read(values: Sequence[Tensor]) -> list[Tensor]:
    """Small tensors on the host, in one transfer from each device; this waits for what was queued there."""
    devices = [x.device for x in values]
    found: dict[int, Tensor] = {}
    for device in {*devices}:
        kinds: dict[torch.dtype, list[int]] = {}
        for k, x in enumerate(values):
            if devices[k] == device:
                kinds.setdefault(x.dtype, []).append(k)
        flat = [_end_to_end([values[k] for k in at]) for at in kinds.values()]
        if len(flat) > 1:  # counts and exponents are far below 2^53
            flat = [x.to(torch.float64) for x in flat]
        order = [k for at in kinds.values() for k in at]
        parts = _end_to_end(flat).cpu().split_with_sizes([values[k].numel() for k in order])
        for k, part in zip(order, parts, strict=True):
            found[k] = part.to(values[k].dtype).view(values[k].shape)
    return [found[k] for k in range(len(values))]


def _end_to_end(values: Sequence[Tensor]) -> Tensor:
    return values[0].reshape(-1) if len(values) == 1 else torch.cat([x.reshape(-1) for x in values])


def sent(x: Tensor, device: torch.device) -> Tensor:
    """``x`` on ``device``; the host goes on at once, unless it is the CPU that it is sent to.

    From pageable memory the driver would wait for what was queued before, so a copy in pinned memory is sent.
    """
    if x.device == device or device.type == "cpu":
        return x.to(device)
    if x.device.type == "cpu" and device.type == "cuda" and not x.is_nested:
        x = torch.empty_like(x, pin_memory=True).copy_(x)
    return x.to(device, non_blocking=True)


def numbers(values: Sequence[int], device: torch.device) -> Tensor:
    """``values`` on ``device``, int64, as :func:`sent`; ``torch.tensor`` would wait."""
    return sent(torch.from_numpy(np.array(values, dtype=np.int64)), device)


class Later:
    """A small tensor on its way to the host: :meth:`ready` asks whether it is there and never waits.

    From devices other than CUDA's it never comes, since there is nothing to ask.
    """

    def __init__(self, x: Tensor) -> None:
        self._asked, self._event, self._host = False, None, x
        if x.device.type == "cuda":
            self._host = torch.empty_like(x, device="cpu", pin_memory=True).copy_(x, non_blocking=True)
            self._event = torch.cuda.current_stream(x.device).record_event()
        elif x.device.type == "cpu":
            self._host = x.clone()

    def ready(self) -> bool:
        """Whether :attr:`value` can be read."""
        if self._event is not None:
            return bool(self._event.query())
        asked, self._asked = self._asked, True
        return self._host.device.type == "cpu" and (asked or not _EVERYWHERE)

    @property
    def value(self) -> NDArray[Any]:
        """The tensor's values, once it is ready."""
        return self._host.numpy()
