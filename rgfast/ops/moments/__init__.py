"""Products of layers' rows, added up position by position: what streamed moments are made of."""

from rgfast.ops.moments.api import (
    add_positions,
    add_products,
    centered,
    first_mean,
    first_rows,
    pair_products,
    pooled,
    shifted,
    survey,
)
from rgfast.ops.moments.call import Centered

__all__ = [
    "Centered",
    "add_positions",
    "add_products",
    "centered",
    "first_mean",
    "first_rows",
    "pair_products",
    "pooled",
    "shifted",
    "survey",
]
