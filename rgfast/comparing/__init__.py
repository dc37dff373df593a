"""Compare two models over the same sequences: how alike every layer of one is to every layer of the other."""

from rgfast.comparing.result import Comparison
from rgfast.comparing.run import compare

__all__ = ["Comparison", "compare"]
