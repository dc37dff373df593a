"""What code outside the rooms asks of them before it takes a route that pays only if it is fast."""

from __future__ import annotations

import torch
from torch import Tensor

from rgfast.ops.cka.api import OP as CKA
from rgfast.ops.cka.call import Call
from rgfast.ops.spectrum.call import Rows
from rgfast.ops.spectrum.selection import SPECTRUM
from rgfast.runtime.waiting import waits_for

__all__ = ["factors_pay", "made_for", "takes_rows", "why_slow"]


def made_for(x: Tensor) -> bool:
    """Whether there are compiled kernels for rows on the device of ``x``, in this process or not."""
    return any(x.device.type in (impl.devices or ()) for impl in SPECTRUM.impls.values())


def takes_rows(x: Tensor) -> bool:
    """Whether anything but the reference takes the spectra of rows on the device of ``x``."""
    one = torch.empty(1, 1, 1, dtype=torch.float32, device=x.device)
    return made_for(x) or SPECTRUM.why_reference(Rows(one)) is None


def factors_pay(x: Tensor) -> bool:
    """Whether decomposing many small matrices on the device of ``x`` costs about what their products do.

    LAPACK's QR does. GPUs have no batched one that comes near.
    """
    return not waits_for(x.device)


def why_slow(device: torch.device | str = "cpu") -> str | None:
    """Why spectra and alignment of fp32 rows are the reference's on ``device``, or None if any is faster."""
    x = torch.empty(1, 1, 1, dtype=torch.float32, device=device)
    alignment = Call("alignment", ("layers",), (x,), options=(("adjacent", True), ("groups", 1)))
    return SPECTRUM.why_reference(Rows(x)) or CKA.why_reference(alignment)
