"""From what was seen of two models to the labelled dataset."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray
from torch import Tensor

from rgfast.comparing.estimates import Estimate
from rgfast.comparing.result import FORMAT, VERSION
from rgfast.comparing.rows import Rows
from rgfast.comparing.sample import Sample
from rgfast.comparing.spec import CKA_MEASURES, CompareSpec
from rgfast.ops.similarity import calibrate, similarity_matrix
from rgfast.probing.assemble import jackknife
from rgfast.probing.options import POSITIONAL

__all__ = ["assemble"]

_PAIR = ("view", "layer_a", "layer_b", "position")
_NULL = ("view", "permutation", "layer_a", "layer_b", "position")
# Fewest rows that a measure is defined for.
_LEAST = {"cka": 4, "cka_biased": 2, "procrustes": 2, "rsa": 3}

Array = NDArray[Any]


def assemble(
    estimate: Estimate,
    samples: Mapping[str, Sample],
    spec: CompareSpec,
    names: tuple[tuple[str, ...], tuple[str, ...]],
    models: Sequence[dict[str, Any]],
) -> xr.Dataset:
    """The dataset of a :class:`~rgfast.comparing.result.Comparison`."""
    plan = estimate.plan
    where = [*plan.columns] if any(view in POSITIONAL for view in plan.views) else []
    if any(view not in POSITIONAL for view in plan.views):
        where = [-1, *where]
    sizes = {
        "view": len(plan.views),
        "layer_a": len(names[0]),
        "layer_b": len(names[1]),
        "position": len(where),
        "permutation": spec.null,
    }
    data: dict[str, tuple[tuple[str, ...], Array]] = {}

    def put(name: str, view: str, values: Array, dims: tuple[str, ...] = _PAIR) -> None:
        if name not in data:
            data[name] = dims, np.full([sizes[dim] for dim in dims], np.nan)
        at = [i for i, t in enumerate(where) if (t >= 0) == (view in POSITIONAL)]
        data[name][1][plan.views.index(view)][..., at] = values

    count = np.zeros((sizes["view"], sizes["position"]), dtype=np.int64)
    counts = {"n": count, "n_sample": count.copy()}
    for v, view in enumerate(plan.views):
        at = [i for i, t in enumerate(where) if (t >= 0) == (view in POSITIONAL)]
        found = estimate.values(view, spec.measures_of_all)
        counts["n"][v, at] = found.count.cpu().numpy()
        for name, value in found.of.items():
            put(name, view, value.cpu().numpy())
        if spec.groups > 1:
            without = list(estimate.without(view, spec.measures_of_all))
            for name in spec.measures_of_all:
                put(f"{name}_se", view, jackknife(np.stack([one.of[name].cpu().numpy() for one in without])))
        if view in samples:
            rows = samples[view].rows()
            counts["n_sample"][v, at] = rows.counts().numpy()
            for name in spec.measures_of_sample:
                _put_sampled(name, view, rows, spec, len(names[0]), put)
    if not samples:
        del counts["n_sample"]
    dataset = xr.Dataset(
        {**data, **{name: (("view", "position"), values) for name, values in counts.items()}},
        coords={
            "view": list(plan.views),
            "layer_a": np.arange(sizes["layer_a"]),
            "layer_b": np.arange(sizes["layer_b"]),
            "position": np.array(where, dtype=np.int64),
            "layer_a_name": ("layer_a", list(names[0])),
            "layer_b_name": ("layer_b", list(names[1])),
            "width_a": ("layer_a", np.array(plan.widths[: sizes["layer_a"]], dtype=np.int64)),
            "width_b": ("layer_b", np.array(plan.widths[sizes["layer_a"] :], dtype=np.int64)),
            "positional": ("view", np.array([view in POSITIONAL for view in plan.views])),
        },
        attrs={
            "format": FORMAT,
            "format_version": VERSION,
            "measures": json.dumps(spec.measures),
            "sequences": estimate.sequences,
            "groups": spec.groups,
            "null": spec.null,
            "route": estimate.route,
            "length": plan.length,
            "k": spec.k,
            "seed": spec.seed,
            "sample_limit": spec.sample_limit,
            "samples": json.dumps({view: sample.words() for view, sample in samples.items()}),
            "notes": "\n".join(plan.notes),
            "provenance": json.dumps(dict(zip("ab", models, strict=True))),
        },
    )
    return dataset


def _put_sampled(
    name: str, view: str, rows: Rows, spec: CompareSpec, layers_a: int, put: Callable[..., None]
) -> None:
    """A measure of the sample, its null and standard errors."""
    shown = f"{name}_sample" if name in CKA_MEASURES else name
    values, nulls = [], []
    for layers, sequence in rows.by_position():
        a, b = _sides(layers, layers_a)
        if len(sequence) < _least(name, spec):
            values.append(torch.full((len(a), len(b)), torch.nan, dtype=torch.float64, device="cpu"))
            nulls.append(values[-1].expand(spec.null, -1, -1))
        elif spec.null:
            found = calibrate(
                _named(name), a, b, null=spec.null, seed=spec.seed, sequences=sequence, **_options(name, spec)
            )
            values.append(found.value.cpu())
            nulls.append(found.null.cpu())
        else:
            values.append(similarity_matrix(_named(name), a, b, **_options(name, spec)).cpu())
    put(shown, view, torch.stack(values, -1).numpy())
    if spec.null:
        put(f"{name}_null", view, torch.stack(nulls, -1).numpy(), _NULL)
    if spec.groups > 1 and name not in CKA_MEASURES:
        without = [_without(name, rows, group, spec, layers_a) for group in range(spec.groups)]
        put(f"{name}_se", view, jackknife(np.stack(without)))


def _without(name: str, rows: Rows, group: int, spec: CompareSpec, layers_a: int) -> Array:
    """A measure of the sample without a group of sequences ``[L_a, L_b, P]``."""
    some = rows.at((rows.sequence % spec.groups != group).nonzero()[:, 0])
    values = []
    for layers, sequence in some.by_position():
        a, b = _sides(layers, layers_a)
        if len(sequence) < _least(name, spec):
            values.append(torch.full((len(a), len(b)), torch.nan, dtype=torch.float64, device="cpu"))
        else:
            values.append(similarity_matrix(name, a, b, **_options(name, spec)).cpu())
    return torch.stack(values, -1).numpy()


def _sides(layers: Sequence[Tensor], layers_a: int) -> tuple[list[Tensor], list[Tensor]]:
    """The layers of each model, on one device."""
    here = layers[0].device
    return list(layers[:layers_a]), [x.to(here) for x in layers[layers_a:]]


def _named(name: str) -> str:
    return "cka" if name in CKA_MEASURES else name


def _options(name: str, spec: CompareSpec) -> dict[str, Any]:
    options: dict[str, dict[str, Any]] = {"cka_biased": {"debiased": False}, "mutual_knn": {"k": spec.k}}
    return options.get(name, {})


def _least(name: str, spec: CompareSpec) -> int:
    return spec.k + 1 if name == "mutual_knn" else _LEAST[name]
