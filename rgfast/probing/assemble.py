"""From the streaming state to the labelled dataset: measures by view, error bars, baselines, flags."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from rgfast.probing.estimators.base import Findings
from rgfast.probing.measures import (
    BASELINES,
    BOUNDED,
    DRIFTS,
    LABELS,
    PAIRWISE,
    RANKS,
    Measured,
    baselines,
)
from rgfast.probing.plan import POSITIONAL
from rgfast.probing.result import FORMAT, VERSION

__all__ = ["assemble"]

SAMPLES_PER_FEATURE = 16

_DIMS = (
    dict.fromkeys(RANKS, ("view", "layer", "position"))
    | dict.fromkeys(DRIFTS, ("view", "transition", "position"))
    | dict.fromkeys(PAIRWISE, ("view", "layer", "other_layer", "position"))
)


def assemble(state: Findings, measures: Sequence[str], provenance: dict[str, Any]) -> xr.Dataset:
    """The dataset of a :class:`~rgfast.probing.result.ProbeResult`."""
    plan = state.plan
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
    data: dict[str, tuple[tuple[str, ...], NDArray[Any]]] = {}

    def empty(dims: tuple[str, ...], fill: Any = np.nan) -> NDArray[Any]:
        return np.full([sizes[d] for d in dims], fill)

    for name in measures:
        data[name] = (_DIMS[name], empty(_DIMS[name]))
        if plan.groups > 1:
            data[f"{name}_se"] = (_DIMS[name], empty(_DIMS[name]))
        if name in BASELINES:
            data[f"{name}_baseline"] = (_DIMS[name], empty(_DIMS[name]))
    rank_dims = ("view", "layer", "position")
    for name in BOUNDED:
        data[f"{name}_bound"] = (rank_dims, empty(rank_dims))
    data["refined"] = (rank_dims, empty(rank_dims, False))
    data["sample_limited"] = (rank_dims, empty(rank_dims, False))
    data["n"] = (("view", "position"), empty(("view", "position"), 0))
    data["n_by_layer"] = (rank_dims, empty(rank_dims, 0))
    if plan.targets:
        sizes["target"] = len(plan.targets)
        for name in ("target_r2", "target_r2_se"):
            dims = ("view", "target", "layer", "position")
            data[name] = (dims, empty(dims))
    sizes["component"] = max(plan.widths)
    spectra = (*rank_dims, "component")
    data["singular_values"] = (spectra, empty(spectra))

    for v, view in enumerate(views):
        positional = view in POSITIONAL
        at = [i for i, t in enumerate(where) if (t >= 0) == positional]
        found = state.measured(view)
        widths = tuple(plan.length * d for d in plan.widths) if view == "flattened" else plan.widths
        data["n"][1][v, at] = found.count.max(0)
        data["n_by_layer"][1][v][:, at] = found.count
        limit = SAMPLES_PER_FEATURE * np.array(widths)
        data["sample_limited"][1][v][:, at] = found.count < limit[:, None]
        for name in BOUNDED:
            data[f"{name}_bound"][1][v][:, at] = found.bounds[name]
        data["refined"][1][v][:, at] = found.refined
        if view != "flattened":
            data["singular_values"][1][v][:, at] = found.spectrum
        expected = baselines(found.count, widths)
        for name in measures:
            data[name][1][v][..., at] = _values(found, name)
            if name in BASELINES:
                data[f"{name}_baseline"][1][v][:, at] = expected[name]
        if plan.groups > 1:
            left_out, r2 = state.by_group(view)
            for name, error in _jackknife(left_out, measures).items():
                data[f"{name}_se"][1][v][..., at] = error
            if r2 is not None:
                data["target_r2"][1][v][..., at], data["target_r2_se"][1][v][..., at] = r2

    if bool((data["n_by_layer"][1] == data["n"][1][:, None]).all()):
        del data["n_by_layer"]
    dataset = xr.Dataset(
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
            "sequences": state.sequences,
            "groups": plan.groups,
            "route": state.route,
            "length": plan.length,
            "notes": "\n".join(plan.notes),
            "plan": plan.to_json(masked=state.masked),
            "provenance": json.dumps(provenance),
        },
    )
    for name, label in LABELS.items():
        if name in dataset:
            dataset[name].attrs["long_name"] = label
    return dataset


def _values(found: Measured, name: str) -> NDArray[np.float64]:
    return (found.ranks | found.drifts | found.pairs)[name]


def _jackknife(left_out: Sequence[Measured], measures: Sequence[str]) -> dict[str, NDArray[np.float64]]:
    """Standard errors by leaving out one group of sequences at a time: sqrt((G−1)/G Σ(θ_g − θ̄)²)."""
    groups = len(left_out)
    out = {}
    for name in measures:
        values = np.stack([_values(found, name) for found in left_out])
        spread = values - values.mean(0)
        out[name] = np.sqrt((groups - 1) / groups * (spread**2).sum(0))
    return out
