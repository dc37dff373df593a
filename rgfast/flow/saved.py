"""What the verdicts read from a saved reproduction: curves, captured fractions, mode survival."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from rgfast.flow.answers import Thresholds
from rgfast.flow.curves import Descent, descent

__all__ = ["CONTROLS", "FIRST_LAYER", "VIEW", "Runs", "curve", "mean_of"]

# Trained equally long with nothing to learn, and what they are called in a sentence.
CONTROLS = {"control_iid": "i.i.d.", "control_permuted": "permuted"}
# The view that decides what is as stated: all rows at each position.
VIEW = "position"
_WHERE = ("xi", "seed", "stage", "view")
# The stream of masked rows is constant at the input.
FIRST_LAYER = {"visible": 0, "masked": 1, "position": 0}


def curve(
    result: xr.Dataset, measure: str, *, chain: str, xi: float, seed: int, stage: str, view: str
) -> NDArray[np.float64]:
    """``measure`` by layer (or transition) for one run, from the view's first meaningful layer on.

    The stream of masked rows is constant at the input, so that view starts at layer 1.
    """
    values = result[measure].sel(chain=chain, xi=xi, seed=seed, stage=stage, view=view)
    along = "transition" if "transition" in values.dims else "layer"
    first = FIRST_LAYER.get(view, 0)
    return np.asarray(values.sel({along: values[along] >= first}).values, dtype=float)


@dataclass(frozen=True)
class Runs:
    """One chain of a saved reproduction."""

    result: xr.Dataset
    chain: str
    bars: Thresholds

    @property
    def xis(self) -> list[float]:
        """The correlation lengths."""
        return [float(x) for x in self.result.xi.values]

    @property
    def seeds(self) -> list[int]:
        """All seeds."""
        return [int(s) for s in self.result.seed.values]

    @property
    def views(self) -> list[str]:
        """All views."""
        return [str(view) for view in self.result.view.values]

    @property
    def controls(self) -> list[str]:
        """The trained controls that the result has."""
        return [stage for stage in CONTROLS if stage in self.result.stage.values]

    @property
    def gap(self) -> float:
        """The bar of R_long − R_short, which the default set-up has to itself."""
        default = self.result.attrs.get("setup", "default") == "default" and self.chain == "two-scale"
        return self.bars.gap if default else self.bars.gap_elsewhere

    @property
    def sees_neighbors(self) -> bool:
        """Whether the stack mixes positions, as far as the result says."""
        config = json.loads(self.result.attrs.get("config", "{}"))
        return bool(config.get("mixing", "mixer") != "none")

    def _curve(self, measure: str, xi: float, seed: int, view: str, stage: str) -> NDArray[np.float64]:
        """What :func:`curve` gives, of arrays that are looked up once: labels are slow to select by."""
        if measure not in self._arrays:
            along = "transition" if "transition" in self.result[measure].dims else "layer"
            found = self.result[measure].sel(chain=self.chain).transpose(*_WHERE, along)
            self._arrays[measure] = np.asarray(found.values, dtype=float)
        labels = {"xi": xi, "seed": seed, "stage": stage, "view": view}
        at = tuple(self._places[name][labels[name]] for name in _WHERE)
        return np.asarray(self._arrays[measure][at][FIRST_LAYER.get(view, 0) :], dtype=float)

    @cached_property
    def _arrays(self) -> dict[str, NDArray[np.float64]]:
        return {}

    @cached_property
    def _places(self) -> dict[str, dict[Any, int]]:
        return {name: {v: k for k, v in enumerate(self.result[name].values.tolist())} for name in _WHERE}

    def captured(self, xi: float, seed: int) -> float:
        """The fraction that the trained stack captures of what Bayes predicts."""
        return float(self.result.captured.sel(chain=self.chain, xi=xi, seed=seed, stage="trained"))

    def learned(self, *xis: float) -> list[int]:
        """The seeds whose stacks learned the task at every ``xi``."""
        return [s for s in self.seeds if all(self.captured(x, s) >= self.bars.captured for x in xis)]

    def unlearned(self, *xis: float) -> str:
        """Which seeds did not learn the task, in words; nothing if all did."""
        learned = self.learned(*xis)
        missing = [str(seed) for seed in self.seeds if seed not in learned]
        if not missing:
            return ""
        words = "did not learn the task" if self.sees_neighbors else "cannot learn the task without mixing"
        if not learned:
            return f"{'the seed' if len(missing) == 1 else f'all {len(missing)} seeds'} {words}"
        return f"seed{'s' if len(missing) > 1 else ''} {' '.join(missing)} {words}"

    def ranks(self, xi: float, seed: int, view: str, stage: str = "trained") -> NDArray[np.float64]:
        """Effective rank by layer."""
        return self._curve("effective_rank", xi, seed, view, stage)

    def descent(
        self, xi: float, seed: int, view: str, stage: str = "trained", first: int = 0
    ) -> Descent | None:
        """That of the ranks from the view's first layer, or a later one, on; None for a single layer."""
        ranks = self.ranks(xi, seed, view, stage)[max(0, first - FIRST_LAYER.get(view, 0)) :]
        return descent(ranks) if len(ranks) > 1 else None

    def ratio(self, xi: float, seed: int, view: str, stage: str = "trained", first: int = 0) -> float:
        """R: last over first layer."""
        found = self.descent(xi, seed, view, stage, first)
        return math.nan if found is None else found.ratio

    def ratios(self, xi: float, view: str, stage: str = "trained", first: int = 0) -> dict[int, float]:
        """R of every seed."""
        return {seed: self.ratio(xi, seed, view, stage, first) for seed in self.seeds}

    def drift(
        self, xi: float, seed: int, view: str, stage: str = "trained", measure: str = "kernel_drift"
    ) -> NDArray[np.float64]:
        """Drift by transition."""
        return self._curve(measure, xi, seed, view, stage)

    def survival(
        self, xi: float, seed: int, stage: str = "trained", process: str = "visible"
    ) -> tuple[float, float] | None:
        """R² of the slowest and of the fastest eigenspace in the last layer; None if there are not two."""
        if "survival" not in self.result:
            return None
        if xi not in self._survivals:
            kept = self.result.survival.sel(chain=self.chain, xi=xi).dropna("mode", how="all").isel(layer=-1)
            self._survivals[xi] = kept.transpose("seed", "stage", "process", "mode")
        kept = self._survivals[xi]
        if kept.sizes["mode"] < 2:
            return None
        seeds, stages = self._places["seed"], self._places["stage"]
        values = kept.values[seeds[seed], stages[stage], kept.process.values.tolist().index(process)]
        return float(values[0]), float(values[-1])

    @cached_property
    def _survivals(self) -> dict[float, xr.DataArray]:
        return {}

    def mode_gap(self, xi: float, seed: int, control: str) -> float:
        """D: how much more of the fast than of the slow modes is lost than in a control, on visible rows.

        NaN if the survival of two eigenspaces is not known.
        """
        own, other = self.survival(xi, seed), self.survival(xi, seed, control)
        if own is None or other is None:
            return math.nan
        return (other[1] - own[1]) - (other[0] - own[0])


def mean_of(values: Iterable[float]) -> float:
    """The mean, NaN of nothing."""
    listed = list(values)
    return float(np.mean(listed)) if listed else math.nan
