"""The sample route: measures are taken of all rows of a few positions at once, and nothing is summed up."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from rgfast.probing.estimators.base import ByGroup
from rgfast.probing.estimators.row_measures import measure_rows
from rgfast.probing.measured import Measured, joined
from rgfast.probing.plan import Plan

__all__ = [
    "LIMIT",
    "Part",
    "SampleState",
    "at_once",
    "enough",
    "measured_part",
    "worthwhile",
]

# More sequences than these are summed up as they come.
LIMIT = 4096
# What the rows alive at a time may take, over all layers, and how many tiles there are at least: enough
# matrices for the eigenvalue solver's lanes, and a fraction of what storing every layer takes.
_TILE_BYTES, _LEAST_TILES = 112 << 20, 4
# With fewer products of pairs than these any route takes a moment, and moments can be merged.
_LEAST_FLOPS = 1e9


# The measures of some positions: of all sequences, and of all but those of each group.
Part = tuple[Measured, ...]


@dataclass(frozen=True)
class SampleState:
    """What was measured of ``sequences`` sequences, a few positions a part. It cannot be added to."""

    plan: Plan
    sequences: int
    parts: tuple[Part, ...]
    masked: bool = False

    route = "samples"

    def measured(self, view: str) -> Measured:
        """The measures of all positions."""
        return joined([part[0] for part in self.parts])

    def by_group(self, view: str) -> ByGroup:
        """The measures of all positions without each group of sequences."""
        return [joined(some) for some in zip(*(part[1:] for part in self.parts), strict=True)], None


def worthwhile(plan: Plan, sequences: int) -> bool:
    """Whether the products that moments of so many sequences take would be felt."""
    layers = len(plan.names)
    pairs = 2 * layers if plan.pairs == "adjacent" else layers * (layers + 1) / 2
    flops = 2.0 * sequences * len(plan.positions) * plan.widths[0] ** 2 * pairs
    return flops >= _LEAST_FLOPS


def enough(sequences: int, groups: int) -> bool:
    """Whether all measures are defined, without any group too."""
    most = -(-sequences // groups) if groups > 1 else 0
    return sequences - most >= 4 and sequences >= 2 * groups


def at_once(plan: Plan, sequences: int, memory: int) -> int:
    """How many positions of all layers are alive at a time."""
    bytes_each = len(plan.names) * sequences * plan.widths[0] * 4
    bytes_each *= 3 if plan.groups > 1 else 1  # at worst two copies without a group each
    return max(1, min(min(_TILE_BYTES, memory // 4) // bytes_each, -(-len(plan.positions) // _LEAST_TILES)))


def measured_part(states: Tensor, plan: Plan, uncentred: bool) -> Part | None:
    """The measures of ``states[L, P, n, d]``, and without each group; None where NaN or infinity is met."""
    adjacent = plan.pairs == "adjacent"
    return measure_rows(states, adjacent=adjacent, uncentred=uncentred, groups=plan.groups)
