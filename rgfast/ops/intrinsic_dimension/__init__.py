"""Intrinsic dimension of a representation."""

from rgfast.ops.intrinsic_dimension.api import intrinsic_dimension
from rgfast.ops.intrinsic_dimension.call import DimensionInfo

__all__ = ["DimensionInfo", "intrinsic_dimension"]
