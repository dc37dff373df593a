"""The three ops of this room and their implementations.

`spectrum` and `gram` take `x[b, n, d]` and return (eigenvalues `[b, m]` or Gram matrix `[b, m, m]`,
accumulated trace `[b]`, exponent `[b]`, rank limit `[b]`) as described in `reference.py`; `eigvalsh` takes
`a[..., d, d]`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from rgfast.dispatch import Impl, Op
from rgfast.ops.spectrum import native, reference
from rgfast.runtime.native import active_isa, unavailable_reason
from rgfast.runtime.threads import one_thread

__all__ = ["EIGVALSH", "GRAM", "SPECTRUM"]


def _pinned(function: Callable[..., Any]) -> Callable[..., Any]:
    def run(x: torch.Tensor, **kwargs: Any) -> Any:
        kwargs.pop("method", None)
        with one_thread():
            return function(x, **kwargs)

    return run


def _anything(*args: Any, **kwargs: Any) -> str | None:
    return None


SPECTRUM = Op("spectrum")
GRAM = Op("gram")
EIGVALSH = Op("eigvalsh")

SPECTRUM.add(Impl("reference", _pinned(reference.gram_spectrum), _anything))
GRAM.add(Impl("reference", _pinned(reference.gram), _anything))
EIGVALSH.add(Impl("reference", _pinned(reference.eigvalsh), _anything))
EIGVALSH.add(Impl("native", native.eigvalsh, native.eigvalsh_supports, unavailable_reason, active_isa))
SPECTRUM.add(Impl("native", native.gram_spectrum, native.gram_supports, unavailable_reason, active_isa))
GRAM.add(Impl("native", native.gram, native.gram_supports, unavailable_reason, active_isa))
