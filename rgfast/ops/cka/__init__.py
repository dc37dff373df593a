"""Centred kernel alignment, HSIC and kernel drift."""

from rgfast.ops.cka.api import cka, cka_matrix, cka_null, hsic, kernel_change, kernel_drift, minibatch_cka

__all__ = ["cka", "cka_matrix", "cka_null", "hsic", "kernel_change", "kernel_drift", "minibatch_cka"]
