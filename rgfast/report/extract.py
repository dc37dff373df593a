"""What figures and pages take from a saved ``reproduce`` result."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from numpy.typing import NDArray

from rgfast.flow import DriftShape, curve, descent, drift_shape
from rgfast.flow.saved import FIRST_LAYER
from rgfast.report.palette import MODE_COLOURS, POSTERIOR, VIEW_COLOURS

__all__ = [
    "SMALLEST",
    "SPACING_ARMS",
    "SPACING_PANELS",
    "DriftFits",
    "by_seed",
    "chain_of",
    "drift_fits",
    "mean_of",
    "observer_cells",
    "observer_grid",
    "rank_by_position",
    "ratio_table",
    "ratios_of",
    "sorted_xi",
]

Array = NDArray[np.float64]
# Relative singular values below it are what rounding leaves of a direction that is not there.
SMALLEST = 1e-6

# What is drawn of one network against the spacing: an axis, and (column, words, colour) of each curve.
SPACING_PANELS = (
    (
        "R: last over first layer",
        (("R_visible", "visible", VIEW_COLOURS["visible"]), ("R_masked", "masked", VIEW_COLOURS["masked"])),
    ),
    (
        "R² of the own token, last layer",
        (("slow_visible", "slow mode", MODE_COLOURS[0]), ("fast_visible", "fast mode", MODE_COLOURS[1])),
    ),
    (
        "total kernel drift",
        (
            ("total_drift_visible", "visible", VIEW_COLOURS["visible"]),
            ("total_drift_masked", "masked", VIEW_COLOURS["masked"]),
        ),
    ),
    (
        "effective rank, masked rows",
        (
            ("final_rank_masked", "last layer", VIEW_COLOURS["masked"]),
            ("log_posterior_rank", "log-posterior", POSTERIOR),
        ),
    ),
)
SPACING_ARMS = (("trained", "grid", "-"), ("trained", "block", "--"), ("control_iid", "grid", ":"))


def chain_of(result: xr.Dataset, chain: str | None) -> str:
    """``chain``, or the first that the result holds. Raises ValueError for one that it does not hold."""
    chains = [str(name) for name in result.chain.values]
    if chain is not None and chain not in chains:
        raise ValueError(f"chain must be one of {', '.join(chains)}, got {chain!r}")
    return chains[0] if chain is None else chain


def sorted_xi(result: xr.Dataset) -> list[float]:
    """The correlation lengths, short to long."""
    return sorted(float(xi) for xi in result.xi.values)


def by_seed(
    result: xr.Dataset, measure: str, *, chain: str, xi: float, stage: str, view: str
) -> tuple[Array, Array]:
    """Layers (or transitions) and ``measure[seed, layer]`` from the view's first meaningful layer on."""
    curves = [
        curve(result, measure, chain=chain, xi=xi, seed=int(seed), stage=stage, view=view)
        for seed in result.seed.values
    ]
    first = FIRST_LAYER.get(view, 0)
    return np.arange(first, first + curves[0].size, dtype=float), np.stack(curves)


def ratios_of(
    result: xr.Dataset, chain: str, xi: float, stage: str, view: str, measure: str = "effective_rank"
) -> list[float]:
    """R of ``measure`` by seed: the last layer over the first meaningful one, NaN where there is no such."""
    _, curves = by_seed(result, measure, chain=chain, xi=xi, stage=stage, view=view)
    return [descent(each).ratio if each.size > 1 else math.nan for each in curves]


def mean_of(curves: Array) -> Array:
    """The mean over the first axis where anything is defined, NaN elsewhere, without a warning."""
    finite = np.isfinite(curves).any(axis=0)
    mean = np.full(curves.shape[1:], np.nan)
    mean[finite] = np.nanmean(np.where(np.isfinite(curves), curves, np.nan)[:, finite], axis=0)
    return mean


@dataclass(frozen=True)
class DriftFits:
    """Both descriptions of a drift by transition, as curves, and their numbers."""

    shape: DriftShape
    decay: Array
    step: Array


def drift_fits(drift: Array) -> DriftFits | None:
    """Geometric decay and step + plateau fitted to ``drift[transition]``.

    None if they are not defined, and if there is no evidence for any shape.
    """
    shape = drift_shape(drift)
    if shape is None or shape.word in ("flat", "not judged"):
        return None
    k, slope = np.arange(drift.size), np.log(shape.decay_rate)
    decay = np.exp(np.log(drift).mean() + slope * (k - k.mean()))
    step = np.where(np.isin(k, shape.step_at), shape.step_high, shape.step_low)
    return DriftFits(shape, decay, step)


def rank_by_position(result: xr.Dataset, chain: str) -> xr.DataArray:
    """Effective rank (ξ, view, layer, position) of the trained stacks, the mean over seeds.

    NaN where a view has no rank yet: masked rows at the input.
    """
    views = [view for view in FIRST_LAYER if view in result.positional_view.values]
    whole = result.effective_rank_by_position.sel(chain=chain, stage="trained", positional_view=views)
    first = xr.DataArray([FIRST_LAYER[view] for view in views], dims="positional_view")
    mean: xr.DataArray = whole.where(whole.layer >= first).mean("seed", skipna=True)
    return mean


def observer_cells(curves: pd.DataFrame) -> list[tuple[str, float]]:
    """The (stage, ξ) whose layers are defined somewhere; all of them where none is."""
    whole = list(dict.fromkeys(zip(curves.stage, curves.xi, strict=True)))
    defined = curves.dropna(subset="cka")
    known = set(zip(defined.stage, defined.xi, strict=True))
    return [cell for cell in whole if cell in known] or whole


def observer_grid(
    curves: pd.DataFrame, ridges: pd.DataFrame, stage: str, xi: float
) -> tuple[pd.DataFrame, Array, Array]:
    """CKA by radius (rows) and layer, means over seeds; the same over each layer's largest; the ridge.

    The ridge is the place of the mean radius on the axis of radii, by layer, NaN where there is none.
    """
    part = curves[(curves.stage == stage) & (curves.xi == xi)]
    grid = part.pivot_table(index="radius", columns="layer", values="cka", dropna=False)
    largest = grid.max()
    relative = grid.to_numpy(float) / np.where(largest > 0, largest, np.nan)
    own = ridges[(ridges.stage == stage) & (ridges.xi == xi)].groupby("layer").radius.mean()
    radius = own.reindex(grid.columns).to_numpy(float)
    # Radii are not evenly spaced on the axis: place the mean between its neighbours.
    place = np.interp(radius, grid.index.to_numpy(float), np.arange(len(grid)))
    return grid, relative, np.where(np.isfinite(radius), place, np.nan)


def ratio_table(result: xr.Dataset, width: int) -> pd.DataFrame:
    """A row per trained run of a reproduction, with the columns that a sweep's table has for the same."""
    rows = []
    for chain in (str(name) for name in result.chain.values):
        for xi in sorted_xi(result):
            for seed in (int(s) for s in result.seed.values):
                run = result.sel(chain=chain, xi=xi, seed=seed, stage="trained")
                row: dict[str, Any] = {"chain": chain, "xi": xi, "width": width, "seed": seed}
                row["captured"] = float(run.captured)
                for view in ("visible", "masked"):
                    ranks = curve(
                        result, "effective_rank", chain=chain, xi=xi, seed=seed, stage="trained", view=view
                    )
                    ends = descent(ranks) if ranks.size > 1 else None
                    row[f"{view}_R"] = ends.ratio if ends else np.nan
                    row[f"{view}_last"] = float(ranks[-1])
                if "log_posterior_rank" in run:
                    row["log_posterior_rank"] = float(run.log_posterior_rank)
                if "effective_rank_baseline" in result:
                    row["masked_isotropic"] = float(result.effective_rank_baseline.sel(view="masked"))
                rows.append(row)
    table: pd.DataFrame = pd.DataFrame(rows)
    return table
