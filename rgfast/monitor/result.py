"""What a monitor measured: a probe's measures with the dimension ``step``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import xarray as xr
from numpy.typing import NDArray

from rgfast.files import check_file
from rgfast.monitor import record
from rgfast.probing.frame import as_long_form
from rgfast.probing.labelled import Labelled
from rgfast.probing.measures import MEASURES
from rgfast.wiring import lent

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["MonitorResult", "header_of", "values_of"]

COLLAPSED = 0.9
_COLUMNS = 9  # steps that a printed table has room for
_CONSTANT = ("n", "sample_limited")  # of a fixed batch


class MonitorResult(Labelled):
    """Measures by training step, view, layer and position; ``.dataset`` is the xarray.Dataset of all.

    The variables are those of :class:`~rgfast.ProbeResult`, with ``step`` as their first dimension; ``n`` and
    ``sample_limited``, which a fixed batch leaves as they are, have none. All fp64, undefined is NaN; a step
    whose activations were not finite is NaN throughout, and :attr:`notes` says so.
    """

    def __init__(self, header: Mapping[str, Any], steps: Sequence[Mapping[str, Any]]) -> None:
        self._header, self._steps = dict(header), list(steps)
        super().__init__(_dataset(self._header, self._steps))

    @property
    def steps(self) -> tuple[int, ...]:
        """The measured steps, ascending."""
        return tuple(int(step) for step in self.dataset.step.values)

    @property
    def notes(self) -> dict[int, str]:
        """What was out of the ordinary, by step."""
        return {int(step["step"]): step["note"] for step in self._steps if "note" in step}

    @property
    def provenance(self) -> dict[str, Any]:
        """Model, options and versions."""
        found: dict[str, Any] = self._header["provenance"]
        return found

    def by_step(self, measure: str = "effective_rank", view: str | None = None) -> xr.DataArray:
        """A measure by step and layer (or transition), the mean over the view's positions where defined.

        ``view`` defaults to the first one. Raises ValueError for an unknown measure or view.
        """
        if measure not in self.measures:
            raise ValueError(f"measure must be one of {', '.join(self.measures)}, got {measure!r}")
        mean: xr.DataArray = self.variable(measure, view).mean("position", skipna=True)
        return mean

    def target_r2(self, target: str, view: str | None = None) -> xr.DataArray:
        """Held-out R² of a target by step and layer, the mean over the view's positions where defined.

        Raises ValueError for an unknown target or view.
        """
        if target not in self.targets:
            listed = ", ".join(self.targets) or "none (it was monitored without targets)"
            raise ValueError(f"target must be one of {listed}, got {target!r}")
        mean: xr.DataArray = self.variable("target_r2", view).sel(target=target).mean("position", skipna=True)
        return mean

    def collapse(
        self, view: str | None = None, *, below: float = COLLAPSED, measure: str = "effective_rank"
    ) -> xr.DataArray:
        """By layer, the step at which its rank collapsed; NaN for a layer that did not.

        That is the first measured step from which on the rank stays at or under ``below`` times what it was
        at the first measured step. Raises ValueError for an unknown measure, one that is no rank, an unknown
        view and ``below`` outside 0 to 1.
        """
        if measure not in MEASURES or MEASURES[measure].kind != "rank":
            raise ValueError(f"measure must be a rank, got {measure!r}")
        if not 0 < below < 1:
            raise ValueError(f"below must be between 0 and 1, got {below}")
        rank = self.by_step(measure, view)
        values = rank.values
        low = values <= below * values[:1]
        stays = np.logical_and.accumulate(low[::-1])[::-1]
        steps = rank.step.values.astype(np.float64)
        found = np.where(stays.any(0), steps[stays.argmax(0)], np.nan)
        return xr.DataArray(found, {"layer": rank.layer.values}, ("layer",), name="collapse_step")

    def plot(
        self, measure: str = "effective_rank", *, view: str | None = None, ax: Axes | None = None
    ) -> Axes:
        """The axes with a rank by layer, or a drift by transition, and training step.

        Raises ValueError for an unknown measure or view, and for CKA, which has two layers.
        """
        axes: Axes = lent("plot_monitor")(self, measure, view, ax)
        return axes

    def report(self, path: str | Path) -> None:
        """Write one self-contained HTML page to ``path``, atomically: when layers collapsed, figures."""
        lent("write_report")(self, path)

    def to_dataframe(self) -> pd.DataFrame:
        """A table with one row per value: ``step`` and the columns of ``ProbeResult.to_dataframe``."""
        measures = self.measures
        parts = []
        for k, step in enumerate(self.steps):
            part = as_long_form(self.dataset.isel(step=k).drop_vars("step"), measures, spectra=False)
            part.insert(0, "step", step)
            parts.append(part)
        whole: pd.DataFrame = pd.concat(parts, ignore_index=True)
        return whole

    def save(self, path: str | Path) -> None:
        """Write the result to ``path``, atomically, as a :class:`Monitor` writes its own file."""
        record.rewrite(check_file(path, "path"), self._header, self._steps)

    @classmethod
    def load(cls, path: str | Path) -> MonitorResult:
        """The result in the file of a monitor, also while it is written.

        Raises FileNotFoundError if there is no such file, ValueError for a file of another kind, a damaged
        one, one of a newer version, and one without a measured step.
        """
        header, steps = record.read(Path(path))
        if not steps:
            raise ValueError(f"{path} has no measured step yet")
        return cls(header, steps)

    def __repr__(self) -> str:
        steps = self.steps
        lines = [
            f"MonitorResult of {self.provenance.get('model', 'a model')}: {len(steps)} steps from {steps[0]} "
            f"to {steps[-1]}, {len(self.layers)} layers"
        ]
        if "effective_rank" in self.measures:
            shown = sorted({round(k) for k in np.linspace(0, len(steps) - 1, min(len(steps), _COLUMNS))})
            view = self.views[0]
            values, fell = self.by_step().values, self.collapse().values
            heads = "".join(f"{steps[k]:>8}" for k in shown)
            lines.append(f"  effective rank, {view}: step{heads}   collapsed at")
            for layer, name in enumerate(self.layers):
                cells = "".join(f"{values[k, layer]:>8.4g}" for k in shown)
                at = "never" if np.isnan(fell[layer]) else f"{fell[layer]:.0f}"
                lines.append(f"  layer {layer:<{len(view) + 20}}{cells}   {at}  {name}")
        return "\n".join([*lines, *(f"  step {step}: {note}" for step, note in self.notes.items())])


def header_of(dataset: xr.Dataset, measures: Sequence[str], provenance: Mapping[str, Any]) -> dict[str, Any]:
    """The first line of a monitor's file: what the values of every step mean, from a probe's dataset."""
    names = list(_variables(dataset, measures))
    return {
        "dims": {name: list(dataset[name].dims) for name in (*names, *_CONSTANT)},
        "coords": {
            name: [list(dataset[name].dims), dataset[name].values]
            for name in ("view", "layer", "other_layer", "transition", "position", "layer_name", "width",
                         "positional", *(["target"] if "target" in dataset else []))
        },
        "constant": {name: dataset[name].values for name in _CONSTANT},
        "sequences": int(dataset.attrs["sequences"]),
        "provenance": dict(provenance),
    }  # fmt: skip


def values_of(dataset: xr.Dataset, measures: Sequence[str]) -> dict[str, NDArray[np.float64]]:
    """What one step has of a probe's dataset."""
    return {name: dataset[name].values for name in _variables(dataset, measures)}


def _variables(dataset: xr.Dataset, measures: Sequence[str]) -> list[str]:
    names = [*measures, "target_r2"]
    return [name for name in (*names, *(f"{name}_se" for name in names)) if name in dataset]


def _dataset(header: Mapping[str, Any], steps: Sequence[Mapping[str, Any]]) -> xr.Dataset:
    dims, coords = header["dims"], header["coords"]
    sizes = {name: len(values) for name, (_, values) in coords.items()}
    data: dict[str, Any] = {name: (dims[name], np.array(v)) for name, v in header["constant"].items()}
    for name in (n for n in dims if n not in data):
        shape = [sizes[d] for d in dims[name]]
        by_step = [np.array(step["values"].get(name, np.full(shape, np.nan)), np.float64) for step in steps]
        data[name] = (["step", *dims[name]], np.stack([values.reshape(shape) for values in by_step]))
    return xr.Dataset(
        data,
        coords={
            "step": [int(step["step"]) for step in steps],
            **{name: (tuple(d), np.array(values)) for name, (d, values) in coords.items()},
        },
        attrs={
            "format": record.FORMAT,
            "sequences": header["sequences"],
            "provenance": json.dumps(header["provenance"]),
        },
    )
