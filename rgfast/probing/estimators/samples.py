"""The sample route: measures are taken of all rows of a few positions at once, and nothing is summed up."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from rgfast.probing.estimators.base import ByGroup
from rgfast.probing.estimators.row_views import Part
from rgfast.probing.measured import Measured
from rgfast.probing.plan import Plan

__all__ = ["LEAST_TILES", "LIMIT", "SampleState", "enough", "tile_rows", "worthwhile"]

# More sequences than these are summed up as they come.
LIMIT = 4096
# What the rows alive at a time may take, over all layers, and how many tiles there are at least: enough
# matrices for the eigenvalue solver's lanes, and a fraction of what storing every layer takes.
_TILE_BYTES, LEAST_TILES = 112 << 20, 4
# With fewer products of pairs than these any route takes a moment, and moments take no rows to merge.
_LEAST_FLOPS = 1e9
# What the eigenvectors that a target's map may need cost, over the third power of the width.
_MAP_FLOPS = 10.0


@dataclass(frozen=True)
class SampleState:
    """What was measured of ``sequences`` sequences, by view: of all, and of all but those of each group.

    ``r2`` is that of the targets and its standard error, of views that they are asked in. Nothing can be
    added.
    """

    plan: Plan
    sequences: int
    parts: Mapping[str, Part]
    masked: bool = False
    r2: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    route = "samples"

    def measured(self, view: str) -> Measured:
        """The measures of a view."""
        return self.parts[view][0]

    def by_group(self, view: str) -> ByGroup:
        """The measures without each group of sequences, and R² of the targets."""
        return list(self.parts[view][1:]), self.r2.get(view)


def worthwhile(plan: Plan, sequences: int) -> bool:
    """Whether what moments of so many sequences take would be felt."""
    layers = len(plan.names)
    pairs = 2 * layers if plan.pairs == "adjacent" else layers * (layers + 1) / 2
    width = sum(plan.widths) / layers
    flops = 2.0 * sequences * width**2 * pairs
    if plan.targets:
        flops += _MAP_FLOPS * plan.groups * layers * width**3
    return max(1, len(plan.positions)) * flops >= _LEAST_FLOPS


def enough(sequences: int, groups: int) -> bool:
    """Whether all measures are defined, without any group too."""
    most = -(-sequences // groups) if groups > 1 else 0
    return sequences - most >= 4 and sequences >= 2 * groups


def tile_rows(plan: Plan, memory: int) -> int:
    """How many rows of all layers are alive at a time."""
    bytes_each = sum(plan.widths) * 4
    bytes_each *= 3 if plan.groups > 1 else 1  # at worst two copies without a group each
    return max(1, min(_TILE_BYTES, memory // 4) // bytes_each)
