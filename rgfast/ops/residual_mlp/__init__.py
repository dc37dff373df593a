"""The residual MLP block ``x + s (act(norm(x) W1^T + b1) W2^T + b2)`` and stacks of it."""

from rgfast.ops.residual_mlp.api import residual_mlp
from rgfast.ops.residual_mlp.stack import residual_stack

__all__ = ["residual_mlp", "residual_stack"]
