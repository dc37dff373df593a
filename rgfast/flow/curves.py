"""Numbers of one flow: ratio and monotonicity of an order parameter, concentration and shape of a drift.

Everything here takes plain arrays by layer or by transition; no model and no file.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from rgfast.validation import as_floats

__all__ = [
    "Descent",
    "DriftShape",
    "Interval",
    "broken_stick_share",
    "descent",
    "drift_shape",
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


def broken_stick_share(transitions: int, k: int = 2) -> float:
    """The expected :func:`top_share` of i.i.d. exponential drifts: Σ_{j≤k} Σ_{i=j}^{L} 1/(iL).

    >>> round(broken_stick_share(6), 2)
    0.65
    """
    return sum(sum(1 / i for i in range(j, transitions + 1)) for j in range(1, k + 1)) / transitions


def effective_transitions(drift: ArrayLike) -> float:
    """N_eff = (Σv)²/Σv²: how many transitions share the drift."""
    v = as_floats(drift, "drift")
    square = float((v**2).sum())
    return float(v.sum()) ** 2 / square if square > 0 else math.nan


@dataclass(frozen=True)
class DriftShape:
    """Two descriptions of a drift by transition, fitted to its logarithm by least squares.

    *Geometric decay*: ln v_k = a + k ln(rate). *Step + plateau*: ln v_k = high for k < width, low after, with
    width 1 or 2 and high > low. ``preferred`` is the one with the lower BIC, n ln(RSS/n) + p ln n with p = 3
    for the decay (a, rate, noise) and 4 for the step (high, low, width, noise). ``plateau`` names the first
    and last transition after the step, whichever description is preferred.
    """

    preferred: str | None
    decay_rate: float
    decay_rss: float
    step_width: int
    step_high: float
    step_low: float
    step_rss: float
    bic_difference: float
    plateau: tuple[int, int]
    plateau_mean: float
    top2: float
    top2_null: float
    effective_transitions: float


def _rss(y: NDArray[np.float64], fit: NDArray[np.float64]) -> float:
    return float(((y - fit) ** 2).sum())


def drift_shape(drift: ArrayLike) -> DriftShape | None:
    """The :class:`DriftShape` of ``drift[transition]``; None below four values or if one is not positive."""
    v = as_floats(drift, "drift")
    if v.ndim != 1:
        raise ValueError(f"drift must be one-dimensional, got shape {v.shape}")
    if v.size < 4 or not np.isfinite(v).all() or (v <= 0).any():
        return None
    n, y, k = v.size, np.log(v), np.arange(v.size, dtype=float)
    slope, intercept = np.polyfit(k, y, 1)
    decay_rss = _rss(y, intercept + slope * k)

    def step(width: int) -> tuple[float, float, float]:
        high, low = float(y[:width].mean()), float(y[width:].mean())
        return _rss(y, np.where(k < width, high, low)), high, low

    width = min((1, 2), key=lambda w: step(w)[0])
    step_rss, high, low = step(width)
    # A residual of zero would make any comparison infinite; the floor is far below what a drift resolves.
    floor = n * 1e-12
    bic_decay = n * math.log(max(decay_rss, floor) / n) + 3 * math.log(n)
    bic_step = n * math.log(max(step_rss, floor) / n) + 4 * math.log(n)
    step_wins = bic_step < bic_decay and high > low
    return DriftShape(
        preferred="step" if step_wins else "decay",
        decay_rate=math.exp(slope),
        decay_rss=decay_rss,
        step_width=width,
        step_high=math.exp(high),
        step_low=math.exp(low),
        step_rss=step_rss,
        bic_difference=bic_decay - bic_step,
        plateau=(width, n - 1),
        plateau_mean=float(v[width:].mean()),
        top2=top_share(v),
        top2_null=broken_stick_share(n),
        effective_transitions=effective_transitions(v),
    )


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
