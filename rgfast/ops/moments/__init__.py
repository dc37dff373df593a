"""Products of layers' rows, added up position by position: what streamed moments are made of."""

from rgfast.ops.moments.api import (
    add_positions,
    add_products,
    first_mean,
    first_rows,
    pair_products,
    shifted,
)

__all__ = ["add_positions", "add_products", "first_mean", "first_rows", "pair_products", "shifted"]
