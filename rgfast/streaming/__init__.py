"""Streaming second and cross moments of many layers at once, and triangular factors where moments lose."""

from rgfast.streaming.accumulator import MomentAccumulator, settle
from rgfast.streaming.algebra import in_order
from rgfast.streaming.finite import NonFiniteError, check_finite
from rgfast.streaming.pairs import PairMoments
from rgfast.streaming.sizes import Pairs, as_pairs, block_rows, first_block, pair_keys, state_bytes
from rgfast.streaming.together import KernelSums, Together

__all__ = [
    "KernelSums",
    "MomentAccumulator",
    "NonFiniteError",
    "PairMoments",
    "Pairs",
    "Together",
    "as_pairs",
    "block_rows",
    "check_finite",
    "first_block",
    "in_order",
    "pair_keys",
    "settle",
    "state_bytes",
]
