"""A probe's result as data: labelled arrays with error bars, baselines and provenance, in one NetCDF file."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from numpy.typing import NDArray

from rgfast.netcdf import read_netcdf, read_result, write_netcdf
from rgfast.probing.accessor import Accessor
from rgfast.probing.frame import as_long_form
from rgfast.probing.labelled import Labelled
from rgfast.probing.measures import MEASURES, named
from rgfast.wiring import lent

__all__ = ["FORMAT", "MEASURES", "VERSION", "ProbeResult", "named"]

FORMAT, VERSION = "rgfast.probe", 1
_COLUMNS = 13  # layers that a printed table has room for


class ProbeResult(Labelled, Accessor):
    """Measures by view, layer and position; ``.dataset`` is the xarray.Dataset with all of them.

    Ranks have dimensions (view, layer, position), drifts (view, transition, position) with transition l from
    layer l to l + 1, ``cka`` (debiased) and ``cka_biased`` (view, layer, other_layer, position). Views
    without positions stand at position −1. ``n(view, position)`` counts the rows of each value;
    ``<rank>_baseline`` is what isotropic Gaussian data of the same n and d would give; ``sample_limited(view,
    layer, position)`` says n < 16 d; ``effective_rank_bound`` and ``effective_rank_uncentred_bound`` bound
    their relative rounding errors, and ``refined`` says where small singular values are a triangular
    factor's; ``<measure>_se`` is the jackknife standard error if sequences were grouped. All fp64,
    undefined is NaN.
    """

    def __init__(
        self,
        dataset: xr.Dataset | Callable[[], xr.Dataset],
        moments: Mapping[str, NDArray[Any]] | Callable[[], Mapping[str, NDArray[Any]]] | None = None,
        *,
        writes: bool = True,
    ) -> None:
        super().__init__(dataset)
        self._moments = moments
        self._writes = writes

    @property
    def moments(self) -> Mapping[str, NDArray[Any]] | None:
        """What :meth:`merge` adds up, moments or rows; None if the result was saved without.

        Moments stay on the device that summed them up, in its memory, until they are first asked for: here,
        by :meth:`save`, :meth:`merge` or :meth:`cpu`, by pickling, or by a probe that goes on or begins. The
        rows of a stack without mixing take a forward when they are first asked for.
        """
        return self._state()

    def cpu(self) -> ProbeResult:
        """Itself, with its moments or rows in the host's memory, which frees the device's.

        >>> import torch, rgfast
        >>> stack = rgfast.ResidualStack(4, 2, mixing="none")
        >>> result = rgfast.probe(stack, torch.randn(64, 3, 4), progress=False)
        >>> result.cpu() is result
        True
        """
        self._state()
        return self

    def _state(self) -> Mapping[str, NDArray[Any]] | None:
        if callable(self._moments):
            self._moments = self._moments()
        return self._moments

    @property
    def writes(self) -> bool:
        """Whether this process writes files: False on every rank but 0 of a probe of several ranks."""
        return self._writes

    @property
    def ids(self) -> tuple[int | str, ...] | None:
        """What identifies the sequences, in their order; None if the probe did not know."""
        if "sequence_id" not in self.dataset:
            return None
        return tuple(self.dataset.sequence_id.values.tolist())

    def with_ids(self, ids: Sequence[int | str]) -> ProbeResult:
        """The result with the ids of its sequences, the coordinate ``sequence_id``.

        :meta private:
        """
        dataset = self.dataset.assign_coords(sequence_id=("sequence", np.array(ids)))
        return ProbeResult(dataset, self._moments, writes=self._writes)

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

    def rows(self, view: str) -> tuple[int, int]:
        """How many rows stand behind the view's values: the fewest and the most of any position.

        Raises ValueError for an unknown view.

        >>> import torch, rgfast
        >>> stack = rgfast.ResidualStack(4, 2, mixing="none")
        >>> rgfast.probe(stack, torch.randn(64, 3, 4), progress=False).rows("pooled")
        (192, 192)
        """
        count = self.variable("n", view).values
        return int(count.min()), int(count.max())

    def sample_limited(self, view: str) -> bool:
        """Whether any value of the view rests on fewer than 16 d rows.

        Raises ValueError for an unknown view.
        """
        return bool(self.variable("sample_limited", view).any())

    def by_position(self, measure: str, view: str | None = None) -> xr.DataArray:
        """A measure by layer (or transition) and position; a view without positions has the one position −1.

        Raises ValueError for an unknown measure or view.
        """
        if measure not in self.measures:
            raise ValueError(f"measure must be one of {', '.join(self.measures)}, got {measure!r}")
        return self.variable(measure, view)

    def order_parameter(self, view: str | None = None, measure: str = "effective_rank") -> xr.DataArray:
        """A measure by layer (or transition), the mean over the view's positions where it is defined.

        ``view`` defaults to the first one. Raises ValueError for an unknown measure or view.
        """
        return _mean(self.by_position(measure, view))

    def standard_error(self, view: str | None = None, measure: str = "effective_rank") -> xr.DataArray | None:
        """The jackknife standard error of :meth:`order_parameter`; None for a probe without groups.

        Positions of one sequence are dependent, so the error of their mean is that of a typical position.
        Raises ValueError for an unknown measure or view.
        """
        self.by_position(measure, view)
        name = f"{measure}_se"
        return _mean(self.variable(name, view)) if name in self.dataset else None

    def baseline(self, view: str | None = None, measure: str = "effective_rank") -> xr.DataArray:
        """What isotropic Gaussian rows of the same n and d would give for :meth:`order_parameter`.

        Raises ValueError for a measure without a baseline and for an unknown view.
        """
        known = [name for name in self.measures if MEASURES[name].baseline]
        if measure not in known:
            raise ValueError(f"measure must be one with a baseline ({', '.join(known)}), got {measure!r}")
        return _mean(self.variable(f"{measure}_baseline", view))

    def target_r2(self, target: str, view: str | None = None) -> xr.DataArray:
        """Held-out R² of a target by layer, the mean over the view's positions where it is defined.

        Raises ValueError for an unknown target or view.
        """
        if target not in self.targets:
            listed = ", ".join(self.targets) or "none (it was probed without targets)"
            raise ValueError(f"target must be one of {listed}, got {target!r}")
        return _mean(self.variable("target_r2", view).sel(target=target))

    def to_dataframe(self, *, spectra: bool = False) -> pd.DataFrame:
        """A table with one row per value.

        Its columns are view, measure, layer, layer_name, other_layer, other_layer_name, position, value, n
        and sample_limited.

        ``layer`` of a drift is the transition's first layer and ``other_layer`` its second; of a CKA they are
        the pair (i < j); of a rank ``other_layer`` is −1 and ``other_layer_name`` empty. With groups there is
        a column ``se``. What was probed with targets has a column ``target``, and rows of the measure
        ``target_r2`` where it is not empty. With ``spectra`` there is a column ``component``, and rows of the
        measure ``singular_value``, descending from component 0; it is −1 elsewhere.
        """
        return as_long_form(self.dataset, self.measures, spectra)

    def report(self, path: str | Path) -> None:
        """Write one self-contained HTML page to ``path``, atomically: flow in words, figures, provenance.

        If several ranks probed together, rank 0 alone writes.
        """
        if self._writes:
            lent("write_report")(self, path)

    def merge(self, other: ProbeResult) -> ProbeResult:
        """The result of both samples, as if one probe had seen them all (to rounding).

        Those of ``other`` come last: its groups continue where these end.

        Raises TypeError for anything but a result, ValueError if the two did not probe the same layers,
        positions, views and pairs in the same number of groups, if their models differ in class, size, dtype
        or weights, if their masks, padding or origin do, or if one of them has neither moments nor rows
        (it was saved without, is of ranks that shared out the layers, or was joined). Weights are compared
        by a fingerprint in the provenance. Files of rgfast 0.1, and probes of models whose weights cannot be
        read, lack it: then only the rest is compared, and the result lacks it too.
        """
        result: ProbeResult = lent("merged")(self, other)
        return result

    def join(self, *others: ProbeResult, names: Sequence[str] | None = None) -> ProbeResult:
        """The result of all stages of a pipeline, layers in order: this one's, then those of ``others``.

        Every stage was probed by itself, on the same sequences. If the first layer of a stage is the input of
        its first block, it is what the stage before puts out: there the two are one layer, and drift and CKA
        across the border are those of the later stage. Without it they are NaN, as CKA of other layers of two
        stages is. Values are those of the stages, bit for bit. Stages that number their blocks from 0 need
        ``names``, those of all layers of the joint result. It has no moments: merge stages before joining
        them.

        Raises TypeError for anything but results and names, ValueError if a layer is in two stages, an input
        is not what the stage before puts out (one is missing, out of order, or of random weights), stages
        differ in sequences, views, positions, measures, pairs, groups or control, or pairs are index pairs.

        >>> import torch, rgfast
        >>> whole = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(4)))
        >>> first, then, x = whole[:2], torch.nn.Sequential(*whole[2:]), torch.randn(64, 4)
        >>> options = {"layers": ["0", "1"], "progress": False}
        >>> stages = [
        ...     rgfast.probe(first, x, **options),
        ...     rgfast.probe(then, first(x).detach(), **options | {"layers": ["0:input", "0", "1"]}),
        ... ]
        >>> stages[0].join(stages[1], names=["0", "1", "2", "3"]).dataset.sizes["transition"]
        3
        """
        result: ProbeResult = lent("joined_stages")([self, *others], names)
        return result

    def save(self, path: str | Path, *, moments: bool = True) -> None:
        """Write everything to ``path`` (NetCDF 4), atomically. Without ``moments`` (or the rows in their
        place) the file is small and its result cannot be merged. If several ranks probed together, rank 0
        alone writes.

        The file is made in memory first. Raises OSError, naming ``path``, for a full disk or quota, no such
        folder, and whatever may not be written to; nothing is left behind then.
        """
        if not self._writes:
            return
        state = self.moments if moments else None
        groups = {"moments": _packed(state)} if state else {}
        write_netcdf(path, self.dataset.assign_attrs(moments=int(bool(state))), **groups)

    @classmethod
    def load(cls, path: str | Path) -> ProbeResult:
        """The result that :meth:`save` wrote to ``path``.

        Raises FileNotFoundError if there is no such file, ValueError for a truncated file, a file of another
        kind and one that a newer version wrote.
        """
        dataset = read_result(path, FORMAT, VERSION, "a probe result")
        moments = None
        try:
            if dataset.attrs.get("moments"):
                moments = _unpacked(read_netcdf(path, "moments"))
        except Exception as error:
            raise ValueError(f"{path} is truncated: {error}") from error
        return cls(dataset, moments)

    def __repr__(self) -> str:
        sizes = self.dataset.sizes
        control = self.dataset.attrs.get("control")
        head = (
            f"ProbeResult of {self.provenance.get('model', 'a model')}"
            f"{f' with {control}'.replace('_', ' ') if control else ''}: {self.dataset.attrs['sequences']} "
            f"sequences, {sizes['layer']} layers, {int((self.dataset.position >= 0).sum())} positions"
        )
        lines = [head, f"  layer 0 is {self.layers[0]}, layer {sizes['layer'] - 1} is {self.layers[-1]}"]
        if "effective_rank" in self.dataset:
            lines += self._ranks_by_layer()
        return "\n".join([*lines, *(f"  {note}" for note in self.notes)])

    def _ranks_by_layer(self) -> list[str]:
        """A table of the effective rank by view and layer; of many layers, some at even distances."""
        last = self.dataset.sizes["layer"] - 1
        shown = sorted({round(k) for k in np.linspace(0, last, min(last + 1, _COLUMNS))})
        counts = {view: "–".join(dict.fromkeys(map(str, self.rows(view)))) for view in self.views}
        wide = max(len(count) for count in counts.values())
        long = max(14, *map(len, counts))
        lines = [f"  {'effective rank':<{long}} {'n':>{wide}}  {'layer':>5}" + _row([str(k) for k in shown])]
        for view, count in counts.items():
            values = self.order_parameter(view).values[shown]
            caveat = "  (sample limited)" if self.sample_limited(view) else ""
            lines.append(f"  {view:<{long}} {count:>{wide}}  {'':>5}{_row(map(_number, values))}{caveat}")
        return lines


def _mean(values: xr.DataArray) -> xr.DataArray:
    """Over positions, where defined."""
    mean: xr.DataArray = values.mean("position", skipna=True)
    return mean


def _number(value: float) -> str:
    return "nan" if np.isnan(value) else f"{value:.4g}"


def _row(cells: Iterable[str]) -> str:
    return "".join(f"{cell:>7}" for cell in cells)


def _packed(arrays: Mapping[str, NDArray[Any]]) -> xr.Dataset:
    """All arrays end to end as fp64 (exact: counts stay below 2^53), or fp32 if that holds all, with an index
    of names and shapes."""
    index = [[name, value.dtype.str, list(value.shape)] for name, value in arrays.items()]
    single = all(value.dtype in (np.float32, np.bool_, np.int8, np.int16) for value in arrays.values())
    kind = np.float32 if single else np.float64
    data = np.concatenate([value.astype(kind).reshape(-1) for value in arrays.values()])
    return xr.Dataset({"data": ("entry", data)}, attrs={"index": json.dumps(index)})


def _unpacked(packed: xr.Dataset) -> dict[str, NDArray[Any]]:
    data, at, out = packed["data"].values, 0, {}
    for name, dtype, shape in json.loads(packed.attrs["index"]):
        size = int(np.prod(shape))
        out[name] = data[at : at + size].reshape(shape).astype(dtype)
        at += size
    return out
