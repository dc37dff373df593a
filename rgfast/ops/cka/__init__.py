"""Centred kernel alignment, HSIC and kernel drift."""

from rgfast.ops.cka.api import cka, cka_matrix, cka_null, hsic, kernel_change, kernel_drift, minibatch_cka
from rgfast.ops.cka.minibatch import MinibatchCKAAccumulator
from rgfast.ops.cka.streaming import CKAAccumulator, CKAResult

__all__ = [
    "CKAAccumulator",
    "CKAResult",
    "MinibatchCKAAccumulator",
    "cka",
    "cka_matrix",
    "cka_null",
    "hsic",
    "kernel_change",
    "kernel_drift",
    "minibatch_cka",
]
