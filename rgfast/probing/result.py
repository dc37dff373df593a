"""What a probe found: labelled arrays with their error bars, baselines and provenance, in one NetCDF file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import xarray as xr

from rgfast.files import write_atomically, write_text
from rgfast.probing.assemble import FORMAT, VERSION, assemble
from rgfast.probing.estimators.moments import Moments
from rgfast.probing.frame import as_long_form
from rgfast.probing.html import as_html
from rgfast.probing.measures import LABELS
from rgfast.probing.plan import Plan

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from rgfast.probing.summary import ViewFlow

__all__ = ["ProbeResult"]


class ProbeResult:
    """Measures by view, layer and position; ``.dataset`` is the xarray.Dataset that holds them.

    Ranks have dimensions (view, layer, position), drifts (view, transition, position) with transition l from
    layer l to l + 1, ``cka`` (debiased) and ``cka_biased`` (view, layer, other_layer, position). Views
    without positions stand at position −1. ``n(view, position)`` counts the rows of each value;
    ``<rank>_baseline`` is what isotropic Gaussian data of the same n and d would give; ``sample_limited(view,
    layer, position)`` says n < 16 d; ``effective_rank_bound`` and ``effective_rank_uncentred_bound`` bound
    their relative rounding errors, and ``refined`` says where small singular values are a triangular
    factor's; ``<measure>_se`` is the jackknife standard error where sequences were grouped. All fp64,
    undefined is NaN.
    """

    def __init__(
        self,
        dataset: xr.Dataset,
        moments: Mapping[str, np.ndarray[Any, Any]] | None = None,
        *,
        writes: bool = True,
    ) -> None:
        self.dataset = dataset
        self._moments = moments
        self._writes = writes

    @property
    def views(self) -> tuple[str, ...]:
        """The views, in the order of the dataset."""
        return tuple(str(view) for view in self.dataset.view.values)

    @property
    def layers(self) -> tuple[str, ...]:
        """The name of every layer."""
        return tuple(str(name) for name in self.dataset.layer_name.values)

    @property
    def measures(self) -> tuple[str, ...]:
        """The measures it holds."""
        return tuple(name for name in LABELS if name in self.dataset)

    @property
    def provenance(self) -> dict[str, Any]:
        """Where the numbers come from: model, layers, options, versions, machine."""
        found: dict[str, Any] = json.loads(self.dataset.attrs["provenance"])
        return found

    @property
    def notes(self) -> tuple[str, ...]:
        """What was left out or done otherwise than by default, in sentences."""
        found = str(self.dataset.attrs.get("notes", ""))
        return tuple(found.splitlines())

    def by_position(self, measure: str, view: str | None = None) -> xr.DataArray:
        """A measure by layer (or transition) and position; a view without positions has the one position −1.

        Raises ValueError for a measure or view that the result does not hold.
        """
        values = self._of(measure, view)
        own: xr.DataArray = values.isel(position=self._own_positions(str(values.view.values)))
        return own

    def order_parameter(self, view: str | None = None, measure: str = "effective_rank") -> xr.DataArray:
        """A measure by layer (or transition), the mean over the view's positions where it is defined.

        ``view`` defaults to the first one. Raises ValueError for a measure or view the result does not hold.
        """
        mean: xr.DataArray = self.by_position(measure, view).mean("position", skipna=True)
        return mean

    def target_r2(self, target: str, view: str | None = None) -> xr.DataArray:
        """Held-out R² of a target by layer, the mean over the view's positions where it is defined.

        Raises ValueError for a target or view that the result does not hold.
        """
        known = [str(name) for name in self.dataset.target.values] if "target" in self.dataset else []
        if target not in known:
            listed = ", ".join(known) or "none (it was probed without targets)"
            raise ValueError(f"target must be one of {listed}, got {target!r}")
        view = self._view(view)
        values = self._own("target_r2", view).sel(target=target)
        mean: xr.DataArray = values.mean("position", skipna=True)
        return mean

    def flow(self, view: str | None = None) -> ViewFlow:
        """The view's flow with depth: R and monotonicity of the rank, decay and plateau of the drift.

        ``view`` defaults to the first one; numbers are those of :mod:`rgfast.flow`. Raises ValueError for an
        unknown view, a result without ``effective_rank`` and ``kernel_drift``, or a single layer.
        """
        from rgfast.probing.summary import flow_of

        return flow_of(self, self._view(view))

    def to_dataframe(self, *, spectra: bool = False) -> pd.DataFrame:
        """Long form, one row a value: view, measure, layer, other_layer, position, value, n, sample_limited.

        ``layer`` of a drift is the transition's first layer and ``other_layer`` its second; of a CKA they are
        the pair (i < j); of a rank ``other_layer`` is −1. With groups there is a column ``se``. What was
        probed with targets has a column ``target``, and rows of the measure ``target_r2`` where it is not
        empty. With ``spectra`` there is a column ``component``, and rows of the measure ``singular_value``,
        descending from component 0; it is −1 elsewhere.
        """
        return as_long_form(self, spectra)

    def merge(self, other: ProbeResult) -> ProbeResult:
        """The result of both samples together, exactly as if one probe had seen them all (to rounding), those
        of ``other`` after its own: groups go on where these end.

        Raises TypeError for anything but a result, ValueError where the two did not probe the same layers,
        positions, views and pairs in the same number of groups, or where one carries no moments (it was saved
        without).
        """
        if not isinstance(other, ProbeResult):
            raise TypeError(f"other must be a ProbeResult, got {type(other).__name__}")
        if self._moments is None or other._moments is None:
            raise ValueError(
                "other cannot be merged: one of the two results was saved with moments=False, or probed by "
                "samples (probe with route='moments' to merge)"
            )
        (plan, extra), (theirs, _) = (Plan.from_json(r.dataset.attrs["plan"]) for r in (self, other))
        same = ("names", "widths", "length", "positions", "views", "pairs", "groups", "targets", "places")
        for name in same:
            if getattr(plan, name) != getattr(theirs, name):
                raise ValueError(
                    f"other must have the same {name}: {getattr(plan, name)}, got {getattr(theirs, name)}"
                )
        if plan.refine != theirs.refine:  # what one of them lacks, both lack together
            plan = replace(plan, refine=False)
        theirs = replace(theirs, refine=plan.refine)
        state, added = (Moments(one, masked=extra["masked"]) for one in (plan, theirs))
        state.load(self._moments)
        added.load(other._moments)
        state.merge(added)
        measures = [name for name in self.measures if name in other.measures]
        dataset = assemble(state, measures, self.provenance)
        return ProbeResult(dataset, state.state(), writes=self._writes and other._writes)

    def save(self, path: str | Path, *, moments: bool = True) -> None:
        """Write everything to ``path`` (NetCDF 4), atomically. Without ``moments`` the file is small and its
        result cannot be merged. What a probe of several ranks returned is written by rank 0 alone."""
        if not self._writes:
            return
        held = self._moments if moments else None

        def write(temporary: Path) -> None:
            self.dataset.assign_attrs(moments=int(bool(held))).to_netcdf(temporary, engine="h5netcdf")
            if held:
                _packed(held).to_netcdf(temporary, mode="a", group="moments", engine="h5netcdf")

        write_atomically(path, write)

    @classmethod
    def load(cls, path: str | Path) -> ProbeResult:
        """The result that :meth:`save` wrote to ``path``.

        Raises FileNotFoundError where there is no file, ValueError for a truncated file, a file of another
        kind and one that a newer version wrote.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"path must be a probe result, and there is no file {path}")
        try:
            with xr.open_dataset(path, engine="h5netcdf") as file:
                dataset = file.load()
        except Exception as error:
            raise ValueError(f"{path} is truncated or not a NetCDF file: {error}") from error
        if dataset.attrs.get("format") != FORMAT:
            raise ValueError(f"{path} is a NetCDF file but not a probe result (no format {FORMAT!r} in it)")
        version = int(dataset.attrs.get("format_version", 0))
        if version > VERSION:
            raise ValueError(
                f"{path} was written by a newer rgfast (format {version}; this one reads up to {VERSION})"
            )
        moments = None
        try:
            if dataset.attrs.get("moments"):
                with xr.open_dataset(path, group="moments", engine="h5netcdf") as file:
                    moments = _unpacked(file.load())
        except Exception as error:
            raise ValueError(f"{path} is truncated: {error}") from error
        return cls(dataset, moments)

    def plot_rank(
        self,
        measure: str = "effective_rank",
        *,
        views: Sequence[str] | None = None,
        relative: bool = False,
        ax: Axes | None = None,
    ) -> Axes:
        """The axes with a rank by layer: a line a view, error bars where grouped, isotropic baseline dotted.

        ``relative`` divides by the first layer. Raises ValueError for an unknown measure or view.
        """
        from rgfast.probing import plots

        return plots.plot_rank(self, measure, views, relative, ax)

    def plot_drift(
        self,
        measure: str = "kernel_drift",
        *,
        views: Sequence[str] | None = None,
        ax: Axes | None = None,
    ) -> Axes:
        """The axes with a drift by transition, logarithmic. Raises ValueError for unknown names."""
        from rgfast.probing import plots

        return plots.plot_drift(self, measure, views, ax)

    def plot_cka(self, measure: str = "cka", *, view: str | None = None, ax: Axes | None = None) -> Axes:
        """The axes with CKA between layers in one view. Raises ValueError for an unknown measure or view."""
        from rgfast.probing import plots

        return plots.plot_cka(self, measure, view, ax)

    def plot_heat_map(
        self, measure: str = "effective_rank", *, view: str | None = None, ax: Axes | None = None
    ) -> Axes:
        """The axes with a rank by layer, or a drift by transition, and position in one view.

        What is undefined or constant is blank. Raises ValueError for an unknown measure or view.
        """
        from rgfast.probing import plots

        return plots.plot_heat_map(self, measure, view, ax)

    def plot_spectra(self, *, view: str | None = None, ax: Axes | None = None) -> Axes:
        """The axes with each layer's singular values in one view. Raises ValueError for an unknown view."""
        from rgfast.probing import plots

        return plots.plot_spectra(self, view, ax)

    def report(self, path: str | Path) -> None:
        """Write one self-contained HTML page to ``path``, atomically: flow in words, figures, provenance.

        What a probe of several ranks returned is written by rank 0 alone.
        """
        from rgfast.report.probed import probe_page

        if self._writes:
            write_text(path, probe_page(self).render())

    def _repr_html_(self) -> str:
        return as_html(self)

    def __repr__(self) -> str:
        sizes = self.dataset.sizes
        head = (
            f"ProbeResult of {self.provenance.get('model', 'a model')}: {self.dataset.attrs['sequences']} "
            f"sequences, {sizes['layer']} layers, {int((self.dataset.position >= 0).sum())} positions"
        )
        lines = [head]
        if "effective_rank" in self.dataset:
            lines.append(f"  {'view':<12} effective rank, first → last layer")
            for view in self.views:
                values = self.order_parameter(view).values
                lines.append(f"  {view:<12} {_number(values[0])} → {_number(values[-1])}{self._caveat(view)}")
        return "\n".join([*lines, *(f"  {note}" for note in self.notes)])

    def _caveat(self, view: str) -> str:
        limited = self.dataset.sample_limited.sel(view=view)
        return "  (sample limited)" if bool(limited.any()) else ""

    def _of(self, measure: str, view: str | None) -> xr.DataArray:
        if measure not in self.measures:
            raise ValueError(f"measure must be one of {', '.join(self.measures)}, got {measure!r}")
        values: xr.DataArray = self.dataset[measure].sel(view=self._view(view))
        return values

    def _view(self, view: str | None) -> str:
        if view is None:
            return self.views[0]
        if view not in self.views:
            raise ValueError(f"view must be one of {', '.join(self.views)}, got {view!r}")
        return view

    def _own(self, name: str, view: str) -> xr.DataArray:
        """A variable of one view, at the positions that the view has."""
        values: xr.DataArray = self.dataset[name].sel(view=view).isel(position=self._own_positions(view))
        return values

    def _rows(self, view: str, to: str = "–") -> str:
        """How many rows a view's values are of, in words: the fewest to the most where positions differ."""
        count = self._own("n", view).values
        return f"{count.min()}" if count.min() == count.max() else f"{count.min()}{to}{count.max()}"

    def _own_positions(self, view: str) -> np.ndarray[Any, Any]:
        """Indices into ``position``: the followed ones, or −1 alone."""
        at = self.dataset.position.values
        positional = bool(self.dataset.positional.sel(view=view))
        return np.flatnonzero(at >= 0 if positional else at == -1)


def _number(value: float) -> str:
    return "undefined" if np.isnan(value) else f"{value:.4g}"


def _packed(arrays: Mapping[str, np.ndarray[Any, Any]]) -> xr.Dataset:
    """All arrays end to end as fp64 (exact: counts stay below 2^53), and an index of what lies where."""
    index = [[name, value.dtype.str, list(value.shape)] for name, value in arrays.items()]
    data = np.concatenate([value.astype(np.float64).reshape(-1) for value in arrays.values()])
    return xr.Dataset({"data": ("entry", data)}, attrs={"index": json.dumps(index)})


def _unpacked(packed: xr.Dataset) -> dict[str, np.ndarray[Any, Any]]:
    data, at, out = packed["data"].values, 0, {}
    for name, dtype, shape in json.loads(packed.attrs["index"]):
        size = int(np.prod(shape))
        out[name] = data[at : at + size].reshape(shape).astype(dtype)
        at += size
    return out
