"""Results of the stages of a pipeline as one: the layers of all, in order."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from rgfast.probing.plan import Plan
from rgfast.probing.result import ProbeResult

__all__ = ["joined_stages"]

_INPUT = ":input"
# Singular values of the same rows, over the largest one: moments know small ones to half of fp64's digits.
_SAME = 1e-6
# What must agree in all stages, and in their provenance.
_ATTRS = ("sequences", "groups", "length", "control", "control_seed")
_ALIKE = ("mask", "rows", "padding", "origin", "measures")


def joined_stages(results: Sequence[ProbeResult], names: Sequence[str] | None) -> ProbeResult:
    """The result of all stages; see :meth:`rgfast.ProbeResult.join`."""
    for result in results:
        if not isinstance(result, ProbeResult):
            raise TypeError(f"others must be ProbeResults, got {type(result).__name__}")
    for then in results[1:]:
        _check_alike(results[0], then)
    # What a stage is given is one layer with what the stage before puts out.
    borders = [then.layers[0].endswith(_INPUT) for then in results[1:]]
    layers = [*results[0].layers]
    for then, border in zip(results[1:], borders, strict=True):
        layers += then.layers[border:]
    if isinstance(names, str) or not all(isinstance(name, str) for name in names or ()):
        raise TypeError(f"names must be a list of names, got {names!r}")
    names = layers if names is None else list(names)
    if len(names) != len(layers):
        raise ValueError(
            f"names must be those of all {len(layers)} layers, got {len(names)}; without names= they are "
            f"{', '.join(layers)}"
        )
    if again := next((name for k, name in enumerate(names) if name in names[:k]), None):
        raise ValueError(
            f"others must have other layers, and two stages have {again!r}; if these are not the same one, "
            "give the names of all layers, names="
        )
    for (one, then), border in zip(pairwise(results), borders, strict=True):
        if border and one.dataset.attrs.get("control") == "random_weights":
            raise ValueError(
                "others of control='random_weights' do not meet, since each stage was given what the trained "
                "one before puts out; leave the input out of layers="
            )
        if border and not _same_rows(one.dataset.isel(layer=-1), then.dataset.isel(layer=0)):
            raise ValueError(
                f"others must follow in the order of the pipeline, and {then.layers[0]!r} is not what "
                f"{one.layers[-1]!r} puts out: a stage is missing or comes in another order; where stages do "
                "not meet, leave the input out of layers="
            )
    dataset = results[0].dataset
    for then, border in zip(results[1:], borders, strict=True):
        dataset = _beside(dataset, then.dataset, border)
    dataset = dataset.assign_coords(layer_name=("layer", names))
    dataset = dataset.assign_attrs(_attrs(results, borders, names))
    found = ProbeResult(dataset, writes=all(result.writes for result in results))
    return found if results[0].ids is None else found.with_ids(results[0].ids)


def _same_rows(one: xr.Dataset, then: xr.Dataset) -> bool:
    """Whether two layers are as wide and have the same singular values."""
    width = int(one.width)
    if width != int(then.width):
        return False
    mine, theirs = (x.singular_values.values[..., :width] for x in (one, then))
    if not np.array_equal(np.isnan(mine), np.isnan(theirs)):
        return False
    mine, theirs = np.nan_to_num(mine), np.nan_to_num(theirs)
    return bool((np.abs(mine - theirs) <= _SAME * mine.max(-1, keepdims=True)).all())


def _check_alike(one: ProbeResult, then: ProbeResult) -> None:
    """Raise ValueError unless two stages measure the same of the same sequences."""
    pairs, others = (Plan.from_json(result.dataset.attrs["plan"])[0].pairs for result in (one, then))
    if pairs and not isinstance(pairs, str):
        raise ValueError(
            f"others must have pairs 'adjacent' or 'all', which every stage can have, got {pairs}"
        )
    for what, mine, theirs in (
        ("views", one.views, then.views),
        ("positions", one.dataset.position.values.tolist(), then.dataset.position.values.tolist()),
        ("measures", one.measures, then.measures),
        ("pairs", pairs, others),
        ("targets", one.targets, then.targets),
        ("ids", one.ids, then.ids),
        *((name, one.dataset.attrs.get(name), then.dataset.attrs.get(name)) for name in _ATTRS),
        *((name, one.provenance.get(name), then.provenance.get(name)) for name in _ALIKE),
    ):
        if mine != theirs:
            raise ValueError(f"others must have the same {what}: {mine}, got {theirs}")
    if not one.dataset.n.equals(then.dataset.n):
        raise ValueError("others must have as many rows of every view and position, got other numbers (n)")


def _beside(one: xr.Dataset, then: xr.Dataset, border: bool) -> xr.Dataset:
    """The layers of ``one``, then those of ``then``, but for its first if that is a ``border``: the last of
    ``one``."""
    if "n_by_layer" in one or "n_by_layer" in then:
        one, then = _with_counts(one), _with_counts(then)
    first = one.sizes["layer"]
    layers = first + then.sizes["layer"] - border
    sizes = {**one.sizes, "layer": layers, "other_layer": layers, "transition": layers - 1}
    sizes["component"] = max(one.sizes["component"], then.sizes["component"])
    starts = dict.fromkeys(("layer", "other_layer", "transition"), first - border)
    data = {
        name: (x.dims, _put(x, then[name], sizes, starts), x.attrs) if {*x.dims} & {*starts} else x
        for name, x in one.data_vars.items()
    }
    kept = {name: x for name, x in one.coords.items() if not {*x.dims} & {*starts, "component"}}
    numbers = {name: np.arange(sizes[name]) for name in (*starts, "component")}
    widths = np.concatenate([one.width, then.width[border:]])
    return xr.Dataset(data, {**kept, **numbers, "width": ("layer", widths)}, one.attrs)


def _put(
    one: xr.DataArray, then: xr.DataArray, sizes: Mapping[Any, int], starts: Mapping[str, int]
) -> NDArray[Any]:
    """Both in one array, ``one`` over ``then`` where they meet; NaN, 0 or False elsewhere."""
    empty = np.nan if one.dtype.kind == "f" else 0
    found = np.full([sizes[dim] for dim in one.dims], empty, one.dtype)
    for x, at in ((then, starts), (one, dict.fromkeys(starts, 0))):
        begin = [at.get(str(dim), 0) for dim in x.dims]
        found[tuple(slice(k, k + size) for k, size in zip(begin, x.shape, strict=True))] = x
    return found


def _with_counts(dataset: xr.Dataset) -> xr.Dataset:
    """With how many rows every layer has."""
    if "n_by_layer" in dataset:
        return dataset
    counts = dataset.n.expand_dims(layer=dataset.layer).transpose("view", "layer", "position")
    counted: xr.Dataset = dataset.assign(n_by_layer=counts)
    return counted


def _attrs(results: Sequence[ProbeResult], borders: Sequence[bool], names: Sequence[str]) -> dict[str, Any]:
    """Notes, plan and provenance of all stages."""
    plans = [Plan.from_json(result.dataset.attrs["plan"]) for result in results]
    notes = [note for result in results for note in result.notes]
    plan, extra = plans[0]
    for (then, _), border in zip(plans[1:], borders, strict=True):
        at = len(plan.names) - border
        if not border:
            notes.append(
                f"no drift from {names[at - 1]} to {names[at]}: the stage of the second has not the input of "
                "its first block among its layers"
            )
        plan = replace(
            plan,
            names=(*plan.names, *then.names[border:]),
            widths=(*plan.widths, *then.widths[border:]),
            places=_places(plan, then, border),
            missed=(*plan.missed, *(at + layer for layer in then.missed if layer >= border)),
            aligned=plan.aligned and then.aligned,
        )
    plan = replace(plan, names=tuple(names), notes=tuple(dict.fromkeys(notes)))
    said = [result.provenance for result in results]
    weights = [one.get("weights") for one in said]
    whole = {
        **said[0],
        "model": ", ".join(dict.fromkeys(str(one.get("model")) for one in said)),
        "parameters": sum(int(one.get("parameters", 0)) for one in said),
        "layers": list(names),
        "weights": None
        if None in weights
        else hashlib.sha256("".join(map(str, weights)).encode()).hexdigest(),
        "stages": [list(result.layers) for result in results],
    }
    routes = {result.dataset.attrs["route"] for result in results}
    return {
        "notes": "\n".join(plan.notes),
        "plan": plan.to_json(**extra),
        "provenance": json.dumps(whole),
        "route": "moments" if len(routes) > 1 else routes.pop(),
    }


def _places(plan: Plan, then: Plan, border: bool) -> tuple[int, ...]:
    """Where the layers of both have their rows: those of ``then`` at the places of ``plan`` only if they are
    at that of its last layer, by which they meet."""
    mine, theirs = (one.places or (0,) * len(one.names) for one in (plan, then))
    if not any((*mine, *theirs)):
        return ()
    new = {theirs[0]: mine[-1]} if border else {}
    for place in theirs:
        new.setdefault(place, 1 + max((*mine, *new.values())))
    return (*mine, *(new[place] for place in theirs[border:]))
