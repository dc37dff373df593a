"""What shape a drift by transition has, and how much evidence there is for one.

Shapes compete on ln drift by least squares; the nulls are what chance alone does: broken sticks for the share
of the largest transitions, flat draws for the shape.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rgfast.flow.curves import effective_transitions, top_share
from rgfast.validation import as_floats, check_positive_int

__all__ = [
    "FEWEST_TRANSITIONS",
    "DriftShape",
    "ShapeWord",
    "broken_stick_share",
    "common_shape",
    "described",
    "drift_shape",
    "flat_quantile",
    "rest_of",
    "top_share_quantile",
]

ShapeWord = Literal["flat", "geometric decay", "growing", "step + plateau", "undecided", "not judged"]

FEWEST_TRANSITIONS = 6
# A shape wins if its BIC is lower by more than this (Kass and Raftery 1995: strong evidence), with the same
# sign in this share of the seeds; below, or if the largest transition is not twice the median, it is flat.
_DECISIVE, _AGREE, _STANDS_OUT = 6.0, 0.8, 2.0
_QUANTILE, _DRAWS, _SEED = 0.95, 40_000, 0


def broken_stick_share(transitions: int, k: int = 2) -> float:
    """The expected :func:`top_share` of i.i.d. exponential drifts: Σ_{j≤k} Σ_{i=j}^{L} 1/(iL).

    >>> round(broken_stick_share(6), 2)
    0.65
    """
    return sum(sum(1 / i for i in range(j, transitions + 1)) for j in range(1, k + 1)) / transitions


@lru_cache
def top_share_quantile(transitions: int, seeds: int = 1) -> float:
    """The 95% quantile of the mean over ``seeds`` of the share of the two largest of broken sticks.

    From 40,000 draws with a fixed seed. Raises ValueError or TypeError unless both are positive integers.

    >>> [round(top_share_quantile(6, seeds), 2) for seeds in (1, 3, 5, 11)]
    [0.83, 0.75, 0.73, 0.7]
    """
    check_positive_int(transitions, "transitions")
    check_positive_int(seeds, "seeds")
    rng, total = np.random.default_rng(_SEED), np.zeros(_DRAWS)
    for _ in range(seeds):
        sticks = rng.exponential(size=(_DRAWS, transitions))
        total += np.sort(sticks, axis=1)[:, -2:].sum(1) / sticks.sum(1)
    return float(np.quantile(total / seeds, _QUANTILE))


@dataclass(frozen=True)
class _Fits:
    """Every shape fitted to ``y[..., transition]`` = ln drift, with its BIC.

    ``placed`` is that of the step with 2 ln of the number of its places added, as in the extended BIC of Chen
    and Chen (2008): a flat profile has some largest transitions, too.
    """

    flat: NDArray[np.float64]
    decay: NDArray[np.float64]
    step: NDArray[np.float64]
    placed: NDArray[np.float64]
    width: NDArray[np.int64]
    decay_rss: NDArray[np.float64]
    step_rss: NDArray[np.float64]
    slope: NDArray[np.float64]

    @property
    def over_flat(self) -> NDArray[np.float64]:
        """How much lower than that of a flat profile the BIC of the better shape is."""
        return self.flat - np.minimum(self.decay, self.placed)


def _fits(y: NDArray[np.float64]) -> _Fits:
    n = y.shape[-1]
    centered = y - y.mean(-1, keepdims=True)
    total = (centered**2).sum(-1)
    k = np.arange(n) - (n - 1) / 2
    slope = centered @ k / (k @ k)
    decay_rss = ((centered - slope[..., None] * k) ** 2).sum(-1)
    # With high above low, the best step of a width is at that many largest values.
    largest = -np.sort(-centered, axis=-1)
    rss, placed = [], []
    for width in (1, 2):
        parts = (part - part.mean(-1, keepdims=True) for part in (largest[..., :width], largest[..., width:]))
        rss.append(np.sum([(part**2).sum(-1) for part in parts], axis=0))
        placed.append(_bic(rss[-1], n, 4) + 2 * math.log(math.comb(n, width)))
    step_rss = np.minimum(*rss)
    return _Fits(
        flat=_bic(total, n, 2),
        decay=_bic(decay_rss, n, 3),
        step=_bic(step_rss, n, 4),
        placed=np.minimum(*placed),
        width=np.where(rss[1] < rss[0], 2, 1),
        decay_rss=decay_rss,
        step_rss=step_rss,
        slope=slope,
    )


def _bic(rss: NDArray[np.float64], n: int, parameters: int) -> NDArray[np.float64]:
    # A residual of zero would make any comparison infinite; the floor is far below what a drift resolves.
    found: NDArray[np.float64] = n * np.log(np.maximum(rss / n, 1e-12)) + parameters * math.log(n)
    return found


@lru_cache
def flat_quantile(transitions: int) -> float:
    """The 95% quantile, on flat profiles, of how much lower than flat the BIC of decay or step comes out.

    Flat profiles have i.i.d. normal ln drift, of any width: the statistic does not depend on it. From 40,000
    draws with a fixed seed. Raises ValueError below four transitions, which leave nothing to compare.

    >>> [round(flat_quantile(n)) for n in (6, 8, 12, 24)]
    [7, 5, 3, 1]
    """
    if transitions < 4:
        raise ValueError(f"transitions must be at least 4, got {transitions}")
    draws = np.random.default_rng(_SEED).standard_normal((_DRAWS, transitions))
    return float(np.quantile(_fits(draws).over_flat, _QUANTILE))


def rest_of(drift: ArrayLike) -> tuple[float, float]:
    """The median of all but the two largest transitions, and that over the largest.

    NaN for fewer than three transitions, and where nothing moves.

    >>> rest_of([1.0, 0.5, 0.1, 0.0, 0.05])
    (0.05, 0.05)
    """
    v = np.sort(as_floats(drift, "drift"))[::-1]
    if v.size < 3 or not v[0] > 0:
        return math.nan, math.nan
    median = float(np.median(v[2:]))
    return median, median / float(v[0])


@dataclass(frozen=True)
class DriftShape:
    """Descriptions of a drift by transition, fitted to its logarithm, and what the evidence says of them.

    *Geometric decay*: ln v_k = a + k ln(``decay_rate``). *Step + plateau*: ln v_k is high at any one or two
    transitions (``step_at``) and low elsewhere. BIC is n ln(RSS/n) + p ln n with p = 2 (flat), 3 (decay) and
    4 (step). ``bic_difference`` is BIC(decay) − BIC(step), above 0 if the step is better. ``over_flat`` is by
    how much a flat profile's BIC exceeds that of the better one, beside its 95% quantile on flat profiles;
    there 2 ln C(n, width) is added for the place of the step, since flat profiles have some largest
    transitions, too.

    ``word`` is *flat* unless ``over_flat`` exceeds its null and the largest transition is at least twice the
    median; else the shape that is better by more than 6, *growing* for a rate above 1; else *undecided*. With
    fewer than six transitions it is *not judged*. ``rest_median`` and ``rest_share`` are those of
    :func:`rest_of`; ``top2_null`` is the 95% quantile of broken sticks.
    """

    word: ShapeWord
    transitions: int
    decay_rate: float
    decay_rss: float
    step_at: tuple[int, ...]
    step_high: float
    step_low: float
    step_rss: float
    bic_difference: float
    over_flat: float
    over_flat_null: float
    largest_over_median: float
    rest_median: float
    rest_share: float
    top2: float
    top2_null: float
    effective_transitions: float

    @property
    def flat(self) -> bool:
        """Whether there is no more evidence for a shape than flat profiles show by chance."""
        stands_out = self.largest_over_median >= _STANDS_OUT
        return not (self.over_flat > self.over_flat_null and stands_out)

    def __str__(self) -> str:
        return described(self.word, self.decay_rate, self.transitions)


def described(word: ShapeWord, rate: float, transitions: int) -> str:
    """A shape in words: with its rate if it has one, with the reason if it is not judged."""
    if word in ("geometric decay", "growing"):
        return f"{word}, rate {rate:.3g} per transition"
    if word == "undecided":
        return "undecided between two shapes"
    if word == "not judged":
        return f"shape not judged: {transitions} transitions, and it takes {FEWEST_TRANSITIONS}"
    return word


def drift_shape(drift: ArrayLike) -> DriftShape | None:
    """The :class:`DriftShape` of ``drift[transition]``; None below four values or if one is not positive.

    >>> str(drift_shape([0.4, 0.21, 0.1, 0.049, 0.026, 0.0125]))
    'geometric decay, rate 0.499 per transition'
    >>> drift_shape([0.011, 0.012, 0.01, 0.012, 0.013, 0.011]).word
    'flat'
    """
    v = as_floats(drift, "drift")
    if v.ndim != 1:
        raise ValueError(f"drift must be one-dimensional, got shape {v.shape}")
    if v.size < 4 or not np.isfinite(v).all() or (v <= 0).any():
        return None
    n, y = v.size, np.log(v)
    fits = _fits(y)
    width = int(fits.width)
    at = np.argsort(-v, kind="stable")
    high, low = at[:width], at[width:]
    rest, share = rest_of(v)
    shape = DriftShape(
        word="not judged",
        transitions=n,
        decay_rate=math.exp(float(fits.slope)),
        decay_rss=float(fits.decay_rss),
        step_at=tuple(sorted(int(k) for k in high)),
        step_high=math.exp(float(y[high].mean())),
        step_low=math.exp(float(y[low].mean())),
        step_rss=float(fits.step_rss),
        bic_difference=float(fits.decay - fits.step),
        over_flat=float(fits.over_flat),
        over_flat_null=flat_quantile(n),
        largest_over_median=float(v.max() / np.median(v)),
        rest_median=rest,
        rest_share=share,
        top2=top_share(v),
        top2_null=top_share_quantile(n),
        effective_transitions=effective_transitions(v),
    )
    return replace(shape, word=common_shape([shape], shape))


def common_shape(shapes: Sequence[DriftShape], mean: DriftShape) -> ShapeWord:
    """The shape that profiles have in common, one per seed; ``mean`` is that of their mean.

    It is flat if the mean is. Otherwise the BIC differences are summed: a shape wins if the sum exceeds 6 in
    size and 80% of the profiles have its sign.
    """
    if mean.transitions < FEWEST_TRANSITIONS or not shapes:
        return "not judged"
    if mean.flat:
        return "flat"
    differences = np.array([shape.bic_difference for shape in shapes])
    total = float(differences.sum())
    if abs(total) <= _DECISIVE or float((np.sign(differences) == np.sign(total)).mean()) < _AGREE:
        return "undecided"
    if total > 0:
        return "step + plateau"
    rates = np.log([shape.decay_rate for shape in shapes])
    return "growing" if float(rates.mean()) > 0 else "geometric decay"
