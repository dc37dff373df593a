"""A comparison's result as data: measures by view, layer of one model and layer of the other, in one file."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
import torch
import xarray as xr
from numpy.typing import NDArray

from rgfast.netcdf import read_result, write_netcdf
from rgfast.ops.similarity import Calibrated
from rgfast.validation import check_choice
from rgfast.wiring import lent

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["FORMAT", "LABELS", "VERSION", "Comparison", "Match"]

FORMAT, VERSION = "rgfast.compare", 1
LABELS = {
    "cka": "CKA, debiased",
    "cka_biased": "CKA, biased",
    "mutual_knn": "mutual nearest neighbors",
    "procrustes": "Procrustes similarity",
    "rsa": "representational similarity (RSA)",
}
_COLUMNS = 10  # layers that a printed table has room for

Side = Literal["a", "b"]


@dataclass(frozen=True)
class Match:
    """A layer of one model, and the layer of the other that it is most like: −1 if no value is defined."""

    layer: int
    layer_name: str
    match: int
    match_name: str
    value: float
    se: float
    p: float


class Comparison:
    """How alike the layers of two models are; ``.dataset`` is the xarray.Dataset with everything.

    Measures have dimensions (view, layer_a, layer_b, position); views without positions stand at position −1.
    ``n(view, position)`` counts the rows of the measures of all rows, ``n_sample`` those of the sample, which
    :attr:`samples` describes. ``<measure>_se`` is the jackknife standard error if sequences were grouped,
    ``<measure>_null`` (with a dimension ``permutation``) the measure on the sample under permutations of the
    sequences of b, and ``cka_sample`` the value on the sample that belongs to it. All fp64, undefined is NaN:
    beside a layer without variance.
    """

    def __init__(self, dataset: xr.Dataset) -> None:
        self.dataset = dataset

    @property
    def views(self) -> tuple[str, ...]:
        """The views, in the order of the dataset."""
        return tuple(str(view) for view in self.dataset.view.values)

    @property
    def layers_a(self) -> tuple[str, ...]:
        """The name of every layer of a."""
        return tuple(str(name) for name in self.dataset.layer_a_name.values)

    @property
    def layers_b(self) -> tuple[str, ...]:
        """The name of every layer of b."""
        return tuple(str(name) for name in self.dataset.layer_b_name.values)

    @property
    def measures(self) -> tuple[str, ...]:
        """The measures that the result has."""
        return tuple(json.loads(self.dataset.attrs["measures"]))

    @property
    def notes(self) -> tuple[str, ...]:
        """What was left out or done otherwise than by default, in sentences."""
        return tuple(str(self.dataset.attrs.get("notes", "")).splitlines())

    @property
    def samples(self) -> dict[str, dict[str, int]]:
        """By view the ``rows`` of the sample, of how many (``of``), and the ``sequences`` that they are from;
        empty if no measure is of a sample."""
        found: dict[str, dict[str, int]] = json.loads(self.dataset.attrs["samples"])
        return found

    @property
    def provenance(self) -> dict[str, Any]:
        """Where the numbers come from: both models, versions, machine."""
        found: dict[str, Any] = json.loads(self.dataset.attrs["provenance"])
        return found

    def view_or_first(self, view: str | None = None) -> str:
        """``view``, or the first view for None. Raises ValueError for one that was not compared."""
        if view is None:
            return self.views[0]
        if view not in self.views:
            why = "".join(f" ({note})" for note in self.notes if "left out" in note)
            raise ValueError(f"view must be one of {', '.join(self.views)}, got {view!r}{why}")
        return view

    def is_positional(self, view: str) -> bool:
        """Whether the view has positions. Raises ValueError for an unknown view."""
        return bool(self.dataset.positional.sel(view=self.view_or_first(view)))

    def positions(self, view: str) -> NDArray[np.int64]:
        """The positions that the view has, or −1 alone. Raises ValueError for an unknown view."""
        where = self.dataset.position.values
        found: NDArray[np.int64] = where[where >= 0] if self.is_positional(view) else where[where < 0]
        return found

    def variable(self, name: str, view: str | None = None) -> xr.DataArray:
        """A variable of the dataset in one view, at the positions that the view has.

        Raises KeyError for an unknown variable, ValueError for an unknown view.
        """
        view = self.view_or_first(view)
        found: xr.DataArray = self.dataset[name].sel(view=view, position=self.positions(view))
        return found

    def matrix(
        self, measure: str = "cka", view: str | None = None, *, position: int | None = None
    ) -> xr.DataArray:
        """A measure ``[L_a, L_b]`` in a view, the first one by default.

        Of a view by position it is the mean over positions where it is defined, or the value at one.
        Raises ValueError for an unknown measure, view or position.
        """
        return self._at(self._known(measure), view, position)

    def standard_error(
        self, measure: str = "cka", view: str | None = None, *, position: int | None = None
    ) -> xr.DataArray | None:
        """The jackknife standard error of :meth:`matrix`; None if sequences were not grouped.

        Positions of one sequence are dependent, so the error of their mean is that of a typical position.
        """
        name = f"{self._known(measure)}_se"
        return self._at(name, view, position) if name in self.dataset else None

    def rows(self, view: str, measure: str = "cka") -> tuple[int, int]:
        """How many rows stand behind a measure in a view: the fewest and the most of any position.

        Raises ValueError for an unknown measure or view.
        """
        whole = self._known(measure) in ("cka", "cka_biased")
        count = self.variable("n" if whole else "n_sample", view).values
        return int(count.min()), int(count.max())

    def calibrated(
        self, measure: str = "cka", view: str | None = None, *, position: int | None = None
    ) -> Calibrated:
        """A measure ``[L_a, L_b]`` on the sample beside its values under permutations of b's sequences.

        Its ``p``, ``score``, ``null_mean``, ``best`` and ``corrected_p`` say what is above chance. The value
        is that of the sample (of ``cka``, too: :meth:`matrix` has it of all rows).

        Raises ValueError for a result without a null and what :meth:`matrix` raises.
        """
        name = f"{self._known(measure)}_null"
        if name not in self.dataset:
            raise ValueError("null must be given to compare() for p-values and scores, and was 0")
        value = f"{measure}_sample" if f"{measure}_sample" in self.dataset else measure
        own, null = (
            torch.from_numpy(np.ascontiguousarray(self._at(each, view, position).values))
            for each in (value, name)
        )
        return Calibrated(own, null)

    def best_match(
        self,
        measure: str = "cka",
        view: str | None = None,
        *,
        side: Side = "a",
        position: int | None = None,
    ) -> pd.DataFrame:
        """A table with a row for every layer of one side: the layer of the other that it is most like.

        Its columns are layer, layer_name, match, match_name, value, se (if sequences were grouped) and p.
        ``p`` is corrected for the choice: the same maximum over layers is taken under every permutation of
        the sequences; NaN for a comparison without ``null``. A layer without a defined value has match −1.

        Raises ValueError for an unknown side and what :meth:`matrix` raises.
        """
        found = [asdict(one) for one in self.matches(measure, view, side=side, position=position)]
        table: pd.DataFrame = pd.DataFrame(found, columns=[field.name for field in fields(Match)])
        return table if self.dataset.attrs["groups"] > 1 else table.drop(columns="se")

    def matches(
        self,
        measure: str = "cka",
        view: str | None = None,
        *,
        side: Side = "a",
        position: int | None = None,
    ) -> list[Match]:
        """The rows of :meth:`best_match`.

        :meta private:
        """
        check_choice(side, "side", ("a", "b"))
        values = self.matrix(measure, view, position=position).values
        error = self.standard_error(measure, view, position=position)
        errors = np.full_like(values, np.nan) if error is None else error.values
        p = np.full(values.shape[0 if side == "a" else 1], np.nan)
        if f"{measure}_null" in self.dataset:
            p = self.calibrated(measure, view, position=position).best(-1 if side == "a" else -2).p.numpy()
        if side == "b":
            values, errors = values.T, errors.T
        own, others = (self.layers_a, self.layers_b) if side == "a" else (self.layers_b, self.layers_a)
        found = []
        for layer, name in enumerate(own):
            if not np.isfinite(values[layer]).any():
                found.append(Match(layer, name, -1, "", math.nan, math.nan, float(p[layer])))
                continue
            best = int(np.nanargmax(values[layer]))
            value, error_of_it = float(values[layer, best]), float(errors[layer, best])
            found.append(Match(layer, name, best, others[best], value, error_of_it, float(p[layer])))
        return found

    def to_dataframe(self) -> pd.DataFrame:
        """A table with a row for every value: view, measure, layer_a, layer_a_name, layer_b, layer_b_name,
        position, value, se (if sequences were grouped) and n."""
        tables = []
        for view in self.views:
            for measure in self.measures:
                values = self.variable(measure, view)
                table = values.to_dataframe("value").reset_index()
                if f"{measure}_se" in self.dataset:
                    table["se"] = self.variable(f"{measure}_se", view).values.reshape(-1)
                whole = measure in ("cka", "cka_biased")
                count = self.variable("n" if whole else "n_sample", view)
                table["n"] = np.broadcast_to(count.values, values.shape).reshape(-1)
                tables.append(table.assign(view=view, measure=measure))
        columns = ["view", "measure", "layer_a", "layer_a_name", "layer_b", "layer_b_name", "position"]
        whole_table = pd.concat(tables, ignore_index=True)
        found: pd.DataFrame = whole_table[[*columns, *(c for c in ("value", "se", "n") if c in whole_table)]]
        return found

    def plot(
        self,
        measure: str = "cka",
        view: str | None = None,
        *,
        position: int | None = None,
        ax: Axes | None = None,
    ) -> Axes:
        """The axes with a measure of every layer of a (rows) and b (columns); best matches are marked.

        Raises ValueError for an unknown measure, view or position.
        """
        axes: Axes = lent("plot_matrix")(self, measure, view, position, ax)
        return axes

    def report(self, path: str | Path) -> None:
        """Write one self-contained HTML page to ``path``, atomically."""
        lent("write_report")(self, path)

    def save(self, path: str | Path) -> None:
        """Write everything to ``path`` (NetCDF 4), atomically.

        Raises OSError, naming ``path``, for whatever may not be written to; nothing is left behind then.
        """
        write_netcdf(path, self.dataset)

    @classmethod
    def load(cls, path: str | Path) -> Comparison:
        """The result that :meth:`save` wrote to ``path``.

        Raises FileNotFoundError if there is no such file, ValueError for a truncated file, a file of another
        kind and one that a newer version wrote.
        """
        return cls(read_result(path, FORMAT, VERSION, "a comparison"))

    def __repr__(self) -> str:
        sizes = self.dataset.sizes
        kinds = [self.provenance[side].get("model", "a model") for side in ("a", "b")]
        counts = [f"{kind} ({sizes[f'layer_{side}']} layers)" for side, kind in zip("ab", kinds, strict=True)]
        head = f"Comparison of {' and '.join(counts)}: {self.dataset.attrs['sequences']} sequences"
        lines = [head, f"  a: {_ends(self.layers_a)}", f"  b: {_ends(self.layers_b)}"]
        last = sizes["layer_a"] - 1
        shown = sorted({round(layer) for layer in np.linspace(0, last, min(last + 1, _COLUMNS))})
        lines.append(f"  {'best match in b':<26}{'layer of a':>10}" + _row([str(layer) for layer in shown]))
        for measure in self.measures:
            for view in self.views:
                matches = self.matches(measure, view)
                best, title = [matches[layer] for layer in shown], f"{measure}, {view}"
                lines.append(f"  {title:<26}{'layer of b':>10}" + _row([str(one.match) for one in best]))
                lines.append(f"  {'':<26}{'value':>10}" + _row([_number(one.value) for one in best]))
        return "\n".join([*lines, *(f"  {note}" for note in self.notes)])

    def _repr_html_(self) -> str:
        table: str = lent("comparison_as_html")(self)
        return table

    def _known(self, measure: str) -> str:
        check_choice(measure, "measure", self.measures)
        return measure

    def _at(self, name: str, view: str | None, position: int | None) -> xr.DataArray:
        values = self.variable(name, view)
        if position is None:
            found: xr.DataArray = values.mean("position", skipna=True)
            return found
        where = values.position.values
        if position not in where:
            listed = ", ".join(map(str, where)) if self.is_positional(self.view_or_first(view)) else "none"
            raise ValueError(f"position must be one that the view has ({listed}), got {position}")
        at: xr.DataArray = values.sel(position=position)
        return at


def _ends(names: tuple[str, ...]) -> str:
    last = len(names) - 1
    return f"layer 0 is {names[0]}" + (f", layer {last} is {names[last]}" if last else "")


def _number(value: float) -> str:
    return "nan" if np.isnan(value) else f"{value:.3f}"


def _row(cells: list[str]) -> str:
    return "".join(f"{cell:>7}" for cell in cells)
