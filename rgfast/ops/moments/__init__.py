"""Products of layers' rows, added up position by position: what streamed moments are made of."""

from rgfast.ops.moments.api import add_products, first_mean, shifted

__all__ = ["add_products", "first_mean", "shifted"]
