"""The residual MLP block ``x + s (act(norm(x) W1^T + b1) W2^T + b2)``."""

from rgfast.ops.residual_mlp.api import residual_mlp

__all__ = ["residual_mlp"]
