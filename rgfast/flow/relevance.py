"""Does the last layer's rank follow the rank of the exact Bayes posterior? Rules fixed before any run.

The claim: on masked rows, the effective rank of the last layer is that of the centred log-posterior, y = x,
with no free parameter. Rivals are properties of the chain alone, each given a fitted line in ln y, against x
or ln x, whichever errs less. Errors are root mean squares of ln y on the one (chain, ξ) cell left out;
intervals are 95% bootstrap intervals over cells. With α the exponent of the final rank in the width:

- *refuted* if at some width a rival (or the mean) errs no more than y = x, or if the mean α is 1/2 or more;
- *supported* if at every width the error of every rival, minus that of y = x, has an interval above 0, and α
  an interval below 1/2;
- *undecided* otherwise, and where fewer than two thirds of the cells (or fewer than six) were trained.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

from rgfast.flow.answers import Thresholds

__all__ = ["RIVALS", "Predictor", "RelevanceTest", "relevance_test"]

RIVALS = ("xi", "relaxation_time", "mutual_information", "transition_rank")
RESPONSE, CLAIM = "masked_last", "log_posterior_rank"
CAPTURED, TRACKING, LEAST_CELLS = Thresholds().captured, 0.5, 6
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Predictor:
    """One predictor at one width: its error, that minus the claim's with interval, rank correlation."""

    name: str
    width: int
    error: float
    excess: float
    excess_low: float
    excess_high: float
    spearman: float
    spearman_low: float
    spearman_high: float


@dataclass(frozen=True)
class RelevanceTest:
    """The outcome, why, and all numbers. ``width_exponent`` is (mean, low, high) of α over cells."""

    status: str
    reason: str
    predictors: tuple[Predictor, ...]
    width_exponent: tuple[float, float, float]
    cells: dict[int, int]
    cells_asked: int
    surplus: dict[int, float]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def relevance_test(table: pd.DataFrame, *, draws: int = 4000, seed: int = 0) -> RelevanceTest:
    """The test on one row a point: chain, xi, width, seed, captured, masked_last, log_posterior_rank, rivals.

    Points under captured 0.90 are left out; seeds of a cell are averaged. ``seed`` is of the bootstrap.
    Raises ValueError for a missing column.
    """
    wanted = ["chain", "xi", "width", "seed", "captured", RESPONSE, CLAIM, *RIVALS]
    missing = [name for name in wanted if name not in table]
    if missing:
        raise ValueError(f"table must have the columns {', '.join(wanted)}; missing are {', '.join(missing)}")
    asked = len(table[["chain", "xi"]].drop_duplicates())
    trained = table[table.captured >= CAPTURED]
    keys = list(dict.fromkeys([RESPONSE, CLAIM, *RIVALS]))
    cells = trained.assign(cell_xi=trained.xi).groupby(["width", "chain", "cell_xi"])[keys].mean()
    rng = np.random.default_rng(seed)
    predictors: list[Predictor] = []
    widths = sorted(int(w) for w in table.width.unique())
    counts = {w: int((cells.index.get_level_values("width") == w).sum()) for w in widths}
    surplus = {}
    for width in widths:
        if counts[width] >= LEAST_CELLS:
            part = cells.xs(width, level="width")
            predictors += _predictors(part, width, draws, rng)
            surplus[width] = float(np.exp(np.log(part[RESPONSE] / part[CLAIM]).mean()))
    alpha = _width_exponent(cells, widths, draws, rng)
    status, reason = _decide(predictors, alpha, counts, asked)
    return RelevanceTest(status, reason, tuple(predictors), alpha, counts, asked, surplus)


def _left_out(x: Array, y: Array) -> Array:
    """Error of a fitted line on each cell left out."""
    out = np.empty(len(y))
    for k in range(len(y)):
        keep = np.arange(len(y)) != k
        design = np.stack([np.ones(keep.sum()), x[keep]], 1)
        intercept, slope = np.linalg.lstsq(design, y[keep], rcond=None)[0]
        out[k] = y[k] - intercept - slope * x[k]
    return out


def _predictors(part: pd.DataFrame, width: int, draws: int, rng: np.random.Generator) -> list[Predictor]:
    y = np.log(part[RESPONSE].to_numpy(float))
    claimed = np.log(part[CLAIM].to_numpy(float))
    n = len(y)
    errors = {"y = x": y - claimed, f"{CLAIM}, fitted": _left_out(claimed, y)}
    values = {"y = x": claimed, f"{CLAIM}, fitted": claimed}
    for name in RIVALS:
        x = part[name].to_numpy(float)
        fits = [_left_out(x, y)] + ([_left_out(np.log(x), y)] if (x > 0).all() else [])
        errors[name], values[name] = min(fits, key=lambda e: float((e**2).sum())), x
    errors["mean"] = (y - y.mean()) * n / (n - 1)
    picks = rng.integers(0, n, (draws, n))

    def rms(e: Array) -> float:
        return float(np.sqrt((e**2).mean()))

    def drawn(e: Array) -> Array:
        return np.asarray(np.sqrt((e[picks] ** 2).mean(1)))

    found = []
    for name, e in errors.items():
        low, high = np.percentile(drawn(e) - drawn(errors["y = x"]), [2.5, 97.5])
        rank = (math.nan,) * 3
        if name in values:
            rank = _spearman(values[name], y, picks[:1000])
        excess = rms(e) - rms(errors["y = x"])
        found.append(Predictor(name, width, rms(e), excess, float(low), float(high), *rank))
    return found


def _spearman(x: Array, y: Array, picks: NDArray[np.int64]) -> tuple[float, float, float]:
    def rho(a: Array, b: Array) -> Array:
        left, right = (stats.rankdata(v, axis=-1) for v in (a, b))
        left, right = (v - v.mean(-1, keepdims=True) for v in (left, right))
        size = np.sqrt((left**2).sum(-1) * (right**2).sum(-1))
        # A draw of equal cells has no order.
        return np.where(size > 0, (left * right).sum(-1) / np.where(size > 0, size, 1.0), math.nan)

    drawn = rho(x[picks], y[picks])
    low, high = np.nanpercentile(drawn, [2.5, 97.5]) if np.isfinite(drawn).any() else (math.nan, math.nan)
    return float(rho(x, y)), float(low), float(high)


def _width_exponent(
    cells: pd.DataFrame, widths: list[int], draws: int, rng: np.random.Generator
) -> tuple[float, float, float]:
    """d ln(rank) / d ln(width) between the smallest and the largest width; NaN with one width."""
    if len(widths) < 2 or cells.empty:
        return math.nan, math.nan, math.nan
    by_width = cells[RESPONSE].unstack("width")
    if not {widths[0], widths[-1]} <= set(by_width.columns):
        return math.nan, math.nan, math.nan
    both = by_width[[widths[0], widths[-1]]].dropna().to_numpy(float)
    if len(both) < 2:
        return math.nan, math.nan, math.nan
    slope = np.log(both[:, 1] / both[:, 0]) / math.log(widths[-1] / widths[0])
    means = slope[rng.integers(0, len(slope), (draws, len(slope)))].mean(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(slope.mean()), float(low), float(high)


def _decide(
    predictors: list[Predictor], alpha: tuple[float, float, float], counts: dict[int, int], asked: int
) -> tuple[str, str]:
    least = max(LEAST_CELLS, math.ceil(2 * asked / 3))
    few = [f"{n} at width {w}" for w, n in counts.items() if n < least]
    if few:
        return "undecided", f"too few of the {asked} cells were trained ({', '.join(few)}; wanted {least})"
    rivals = [p for p in predictors if p.name in RIVALS or p.name == "mean"]
    beaten = [f"{p.name} at width {p.width}" for p in rivals if p.excess <= 0]
    if beaten:
        return "refuted", f"predicted as well or better than by y = x: {', '.join(beaten)}"
    mean, _, high = alpha
    if mean >= TRACKING:
        return "refuted", f"the final rank tracks the width (exponent {mean:.2f})"
    close = [f"{p.name} at width {p.width}" for p in rivals if not p.excess_low > 0]
    if close:
        return "undecided", f"y = x errs less, but not surely less than {', '.join(close)}"
    if not high < TRACKING:
        return (
            "undecided",
            f"whether the final rank tracks the width is open (exponent {mean:.2f}, up to {high:.2f})",
        )
    return (
        "supported",
        "y = x errs less than every rival at every width, and the final rank ignores the width",
    )
