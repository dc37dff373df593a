"""Numbers of one curve by layer: ratio and monotonicity of an order parameter, concentration, intervals.

Everything here takes plain arrays by layer or by transition; no model and no file.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from rgfast.validation import as_floats

__all__ = [
    "Descent",
    "Interval",
    "descent",
    "effective_transitions",
    "paired_interval",
    "top_share",
]


@dataclass(frozen=True)
class Descent:
    """How an order parameter goes from its first layer to its last.

    ``ratio`` is last/first (R), ``drop`` first − last, ``largest_rise`` the largest upward step between
    neighbouring layers (0 where there is none), ``rise_share`` that step over the drop (inf without a drop).
    """

    first: float
    last: float
    ratio: float
    drop: float
    largest_rise: float
    rise_share: float

    def falls(self, tolerance: float = 0.05) -> bool:
        """Whether it falls with no upward step beyond ``tolerance`` of the total drop."""
        return self.drop > 0 and self.rise_share <= tolerance


def descent(values: ArrayLike) -> Descent:
    """The :class:`Descent` of ``values[layer]`` (at least two finite values, else every number is NaN)."""
    v = as_floats(values, "values")
    if v.ndim != 1 or v.size < 2:
        raise ValueError(f"values must be one-dimensional with at least two layers, got shape {v.shape}")
    if not np.isfinite(v).all():
        nan = math.nan
        return Descent(float(v[0]), float(v[-1]), nan, nan, nan, nan)
    first, last = float(v[0]), float(v[-1])
    drop = first - last
    rise = max(0.0, float(np.diff(v).max()))
    share = 0.0 if rise == 0 else rise / drop if drop > 0 else math.inf
    return Descent(first, last, last / first if first > 0 else math.nan, drop, rise, share)


def top_share(drift: ArrayLike, k: int = 2) -> float:
    """The share of the total that the ``k`` largest transitions hold."""
    v = np.sort(as_floats(drift, "drift"))[::-1]
    total = float(v.sum())
    return float(v[:k].sum()) / total if total > 0 else math.nan


def effective_transitions(drift: ArrayLike) -> float:
    """N_eff = (Σv)²/Σv²: how many transitions share the drift."""
    v = as_floats(drift, "drift")
    square = float((v**2).sum())
    return float(v.sum()) ** 2 / square if square > 0 else math.nan


@dataclass(frozen=True)
class Interval:
    """Mean of independent values and its 95% t-interval (NaN ends below five values: points only)."""

    mean: float
    low: float
    high: float
    n: int


def paired_interval(values: ArrayLike, *, least: int = 5) -> Interval:
    """The :class:`Interval` of ``values``, one per seed; for paired differences this is the paired t."""
    v = as_floats(values, "values")
    v = v[np.isfinite(v)]
    if v.size == 0:
        return Interval(math.nan, math.nan, math.nan, 0)
    mean = float(v.mean())
    if v.size < least:
        return Interval(mean, math.nan, math.nan, int(v.size))
    half = float(stats.t.ppf(0.975, v.size - 1)) * float(v.std(ddof=1)) / math.sqrt(v.size)
    return Interval(mean, mean - half, mean + half, int(v.size))
