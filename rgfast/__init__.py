"""rgfast: watch a residual stack coarse-grain, at every layer and position."""

from rgfast.dispatch import FallbackWarning, ImplUnavailable, explain, record
from rgfast.ops.cka import (
    CKAAccumulator,
    CKAResult,
    MinibatchCKAAccumulator,
    cka,
    cka_matrix,
    cka_null,
    hsic,
    kernel_change,
    kernel_drift,
    minibatch_cka,
)
from rgfast.ops.residual_mlp import residual_mlp
from rgfast.stack import MaskedTokenModel, ResidualStack

__version__ = "0.1.0"

__all__ = [
    "CKAAccumulator",
    "CKAResult",
    "FallbackWarning",
    "ImplUnavailable",
    "MaskedTokenModel",
    "MinibatchCKAAccumulator",
    "ResidualStack",
    "__version__",
    "cka",
    "cka_matrix",
    "cka_null",
    "explain",
    "hsic",
    "kernel_change",
    "kernel_drift",
    "minibatch_cka",
    "record",
    "residual_mlp",
]
