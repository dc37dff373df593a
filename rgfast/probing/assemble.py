"""From the streaming state to the labelled dataset: measures by view, error bars, baselines, flags."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from rgfast.probing.estimators.base import Findings
from rgfast.probing.measured import baselines, to_host
from rgfast.probing.measures import MEASURES, Kind, Measure
from rgfast.probing.options import POSITIONAL
from rgfast.probing.plan import Plan
from rgfast.probing.result import FORMAT, VERSION

__all__ = ["assemble", "jackknife"]

SAMPLES_PER_FEATURE = 16

_RANK_DIMS = ("view", "layer", "position")
_DIMS: dict[Kind, tuple[str, ...]] = {
    "rank": _RANK_DIMS,
    "drift": ("view", "transition", "position"),
    "pair": ("view", "layer", "other_layer", "position"),
}


@dataclass(frozen=True)
class _View:
    """What the dataset has of a view, in the host's memory: what :func:`to_host` gives by name, standard
    errors of measures, and R² of the targets with its standard error."""

    values: dict[str, NDArray[Any]]
    errors: dict[str, NDArray[np.float64]]
    r2: tuple[NDArray[np.float64], ...] | None


def assemble(
    state: Findings, measures: Sequence[str], provenance: dict[str, Any]
) -> Callable[[], xr.Dataset]:
    """What makes the dataset of a :class:`~rgfast.probing.result.ProbeResult`. All that a device knows is
    read now; it is put in its place, beside baselines and labels, when the dataset is asked for."""
    known = dict(MEASURES)  # others may have been registered until then
    names = ("n_by_layer", "refined", "singular_values", *_bounded(known), *measures)
    found = {view: _view(state, view, names, measures) for view in state.plan.views}
    attrs = {"sequences": state.sequences, "groups": state.plan.groups, "route": state.route}
    asked = {name: known[name] for name in measures}
    return _Later(
        partial(_dataset, state.plan, state.masked, found, asked, _bounded(known), attrs, dict(provenance))
    )


class _Later:
    """What makes a dataset. It is made to be pickled: measures are functions, which cannot be."""

    def __init__(self, make: Callable[[], xr.Dataset]) -> None:
        self._make = make

    def __call__(self) -> xr.Dataset:
        return self._make()

    def __reduce__(self) -> tuple[Callable[[xr.Dataset], xr.Dataset], tuple[xr.Dataset]]:
        return _itself, (self(),)


def _itself(dataset: xr.Dataset) -> xr.Dataset:
    return dataset


def _view(state: Findings, view: str, names: Sequence[str], measures: Sequence[str]) -> _View:
    given = to_host(state.measured(view))
    values = {name: given[name] for name in names}
    if state.plan.groups == 1:
        return _View(values, {}, None)
    left_out, r2 = state.by_group(view)
    without = [to_host(found) for found in left_out]
    errors = {name: jackknife(np.stack([part[name] for part in without])) for name in measures}
    return _View(values, errors, None if r2 is None else tuple(each.cpu().numpy() for each in r2))


def _bounded(known: Mapping[str, Measure]) -> list[str]:
    """The names of all bounds."""
    return [f"{name}_bound" for name, measure in known.items() if measure.bound is not None]


def _dataset(
    plan: Plan,
    masked: bool,
    found: Mapping[str, _View],
    measures: Mapping[str, Measure],
    bounded: Sequence[str],
    attrs: Mapping[str, Any],
    provenance: Mapping[str, Any],
) -> xr.Dataset:
    """The dataset of what was ``found`` of every view: these ``measures``, and the bounds of all."""
    layers, views = len(plan.names), plan.views
    where = [*plan.columns] if any(v in POSITIONAL for v in views) else []
    if any(v not in POSITIONAL for v in views):
        where = [-1, *where]
    sizes = {
        "view": len(views),
        "layer": layers,
        "other_layer": layers,
        "transition": max(layers - 1, 0),
        "position": len(where),
    }
    data: dict[str, tuple[tuple[str, ...], NDArray[Any], dict[str, str]]] = {}

    def empty(dims: tuple[str, ...], fill: Any = np.nan) -> NDArray[Any]:
        return np.full([sizes[d] for d in dims], fill)

    def add(name: str, dims: tuple[str, ...], fill: Any = np.nan, **attrs: str) -> None:
        data[name] = (dims, empty(dims, fill), attrs)

    for name, measure in measures.items():
        dims = _DIMS[measure.kind]
        add(name, dims, long_name=measure.label)
        if plan.groups > 1:
            add(f"{name}_se", dims)
        if measure.baseline is not None:
            add(f"{name}_baseline", dims)
    for name in bounded:
        add(name, _RANK_DIMS)
    for name in ("refined", "sample_limited"):
        add(name, _RANK_DIMS, False)
    add("n", ("view", "position"), 0)
    add("n_by_layer", _RANK_DIMS, 0)
    if plan.targets:
        sizes["target"] = len(plan.targets)
        for name in ("target_r2", "target_r2_se"):
            add(name, ("view", "target", "layer", "position"))
    sizes["component"] = max(plan.widths)
    add("singular_values", (*_RANK_DIMS, "component"))

    for v, view in enumerate(views):
        # What views without positions have comes first.
        at = slice(where[0] < 0, None) if view in POSITIONAL else slice(0, 1)
        of = found[view]
        count = of.values["n_by_layer"]
        widths = tuple(plan.length * d for d in plan.widths) if view == "flattened" else plan.widths
        data["n"][1][v, at] = count.max(0)
        limit = SAMPLES_PER_FEATURE * np.array(widths)
        data["sample_limited"][1][v][:, at] = count < limit[:, None]
        if view != "flattened":
            data["singular_values"][1][v][:, at] = of.values["singular_values"]
        for name in ("n_by_layer", "refined", *bounded, *measures):
            data[name][1][v][..., at] = of.values[name]
        for name, expected in baselines(count, widths, measures.values()).items():
            data[f"{name}_baseline"][1][v][:, at] = expected
        for name, error in of.errors.items():
            data[f"{name}_se"][1][v][..., at] = error
        if of.r2 is not None:
            for name, value in zip(("target_r2", "target_r2_se"), of.r2, strict=True):
                data[name][1][v][..., at] = value

    few = [
        f"the view {view!r} has {n} row{'s' * (n != 1)} that count, too few for any measure"
        for view in plan.chosen.values()
        if (n := int(data["n"][1][views.index(view)].max())) < 2
    ]
    if bool((data["n_by_layer"][1] == data["n"][1][:, None]).all()):
        del data["n_by_layer"]
    return xr.Dataset(
        data,
        coords={
            "view": list(views),
            "layer": np.arange(layers),
            "other_layer": np.arange(layers),
            "transition": np.arange(sizes["transition"]),
            "position": np.array(where, dtype=np.int64),
            "component": np.arange(sizes["component"]),
            "layer_name": ("layer", list(plan.names)),
            "width": ("layer", np.array(plan.widths, dtype=np.int64)),
            **({"target": [name for name, _ in plan.targets]} if plan.targets else {}),
            "positional": ("view", np.array([view in POSITIONAL for view in views])),
        },
        attrs={
            "format": FORMAT,
            "format_version": VERSION,
            **attrs,
            "length": plan.length,
            "notes": "\n".join([*plan.notes, *few]),
            "plan": plan.to_json(masked=masked),
            "provenance": json.dumps(provenance),
        },
    )


def jackknife(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Standard errors of ``values[G, ...]`` without one of G groups: sqrt((G−1)/G Σ(θ_g − θ̄)²)."""
    spread = values - values.mean(0)
    found: NDArray[np.float64] = np.sqrt((len(values) - 1) / len(values) * (spread**2).sum(0))
    return found
