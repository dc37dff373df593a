"""What code outside the rooms asks of them before it takes a route that pays only if it is fast."""

from __future__ import annotations

import torch
from torch import Tensor

from rgfast.ops.cka.api import OP as CKA
from rgfast.ops.cka.call import Call
from rgfast.ops.spectrum.call import Rows
from rgfast.ops.spectrum.selection import SPECTRUM

__all__ = ["made_for", "why_slow"]


def made_for(x: Tensor) -> bool:
    """Whether any implementation but the reference is for rows on the device of ``x``, present or not."""
    return any(x.device.type in (impl.devices or ()) for impl in SPECTRUM.impls.values())


def why_slow(device: torch.device | str = "cpu") -> str | None:
    """Why spectra and alignment of fp32 rows are the reference's on ``device``, or None if any is faster."""
    x = torch.empty(1, 1, 1, dtype=torch.float32, device=device)
    alignment = Call("alignment", ("layers",), (x,), options=(("adjacent", True), ("groups", 1)))
    return SPECTRUM.why_reference(Rows(x)) or CKA.why_reference(alignment)
