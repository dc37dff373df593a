"""The interactive figures of a reproduction, as what ``page.js`` draws: plain lists and dicts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr

from rgfast.report.extract import SMALLEST, Array, by_seed, drift_fits, mean_of, rank_by_position, sorted_xi
from rgfast.report.palette import CONTROL, CONTROLS, VIEW_MARKERS, depth_colours, xi_colours

__all__ = ["Panel", "experiment_figures", "heat_panel", "line"]

Panel = dict[str, Any]
SHAPES = {
    "o": "circle",
    "s": "square",
    "D": "diamond",
    "^": "triangle",
    "v": "triangle",
    "P": "diamond",
    ".": "circle",
}
DASHES = {"-": None, "--": "6 4", ":": "2 3", "-.": "7 3 2 3"}
LAYER = {"name": "layer", "label": "layer (0 = input)", "whole": True}
VIEWS = ("visible", "masked")
WORDS = {"visible": "visible rows: what the stack forgets", "masked": "masked rows: what it infers"}


def line(name: str, x: Any, y: Any, colour: str, **more: Any) -> dict[str, Any]:
    """A series through the points; None in ``more`` is left out."""
    points = [[float(a), float(b)] for a, b in zip(x, y, strict=True)]
    return {"name": name, "colour": colour, "line": True, "points": points, **_given(more)}


def dots(
    name: str, x: Any, y: Any, colour: str, texts: Sequence[str] | None = None, **more: Any
) -> dict[str, Any]:
    """Points on their own, each with its words."""
    texts = [""] * len(x) if texts is None else texts
    points = [[float(a), float(b), None, None, text] for a, b, text in zip(x, y, texts, strict=True)]
    return {"name": name, "colour": colour, "points": points, **_given(more)}


def _given(more: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in more.items() if value is not None}


def heat_panel(
    values: Array,
    *,
    title: str,
    name: str,
    x: tuple[str, Sequence[object]],
    y: tuple[str, Sequence[object]],
    limits: tuple[float, float] | None = None,
    counts: Any = None,
    facts: Sequence[str] = (),
    series: Sequence[dict[str, Any]] = (),
) -> Panel:
    """A heat map of ``values[row, column]``; ``x`` and ``y`` are an axis's name and its labels."""
    good = values[np.isfinite(values)]
    low, high = limits or ((float(good.min()), float(good.max())) if good.size else (0.0, 1.0))
    axes = {
        k: {"name": each[0], "label": each[0], "labels": [str(v) for v in each[1]]}
        for k, each in (("x", x), ("y", y))
    }
    heat = {"values": values.tolist(), "low": low, "high": high, "name": name, "facts": list(facts)}
    return {"title": title, **axes, "heat": {**heat, **_given({"counts": counts})}, "series": list(series)}


def _facts(result: xr.Dataset, view: str, *more: str) -> list[str]:
    told = [f"mean over {result.sizes['position']} positions"] if "position" in result.sizes else []
    if "n" in result and view in result.view.values:
        told.append(f"n = {int(result.n.sel(view=view))} rows a position and seed")
    return [*told, *more]


def _mean_and_seeds(
    result: xr.Dataset, measure: str, name: str, colour: str, run: dict[str, Any], **style: Any
) -> list[dict[str, Any]]:
    """A line for the mean over seeds, and a faint point a seed, toggled together."""
    x, curves = by_seed(result, measure, **run)
    shape, facts = SHAPES[VIEW_MARKERS[run["view"]]], _facts(result, run["view"])
    whole = line(
        name,
        x,
        mean_of(curves),
        colour,
        shape=shape,
        facts=[f"mean over {len(curves)} seeds", *facts],
        **style,
    )
    if len(curves) == 1:
        return [whole]
    texts = [f"seed {seed}" for seed in result.seed.values for _ in x]
    seeds = dots(
        name, np.tile(x, len(curves)), curves.ravel(), colour, texts, faint=True, shape=shape, facts=facts
    )
    return [whole, seeds]


def order_parameter(result: xr.Dataset, chain: str) -> list[Panel]:
    """Effective rank by layer, by view, with the trained controls and what isotropic rows would give."""
    colours, xis = xi_colours(sorted_xi(result)), sorted_xi(result)
    panels = []
    for view in VIEWS:
        series: list[dict[str, Any]] = []
        for xi in xis:
            run = {"chain": chain, "xi": xi, "stage": "trained", "view": view}
            series += _mean_and_seeds(result, "effective_rank", f"ξ = {xi:g}", colours[xi], run)
        for stage, (dash, words) in CONTROLS.items():
            if stage not in result.stage.values:
                continue
            run = {"chain": chain, "xi": xis[0], "stage": stage, "view": view}
            style = {"dash": DASHES[dash], "width": 1.5}
            series += _mean_and_seeds(
                result, "effective_rank", f"{words} (ξ = {xis[0]:g})", CONTROL, run, **style
            )
        rules = []
        if "effective_rank_baseline" in result:
            baseline = float(result.effective_rank_baseline.sel(view=view))
            rules.append({"name": "isotropic, same n", "y": baseline, "dash": "2 4"})
        y = {"name": "effective rank", "label": "effective rank (dimensions)", "low": 0}
        panels.append({"title": WORDS[view], "x": LAYER, "y": y, "series": series, "rules": rules})
    return panels


def heat_maps(result: xr.Dataset, chain: str) -> list[Panel]:
    """Effective rank by layer and position, for every ξ and process."""
    mean = rank_by_position(result, chain)
    limits = (float(mean.min()), float(mean.max())) if bool(mean.notnull().any()) else None
    panels = []
    for view in VIEWS:
        for xi in sorted_xi(result):
            values = mean.sel(xi=xi, positional_view=view).transpose("layer", "position").values
            facts = [f"mean over {result.sizes['seed']} seeds", *_facts(result, view)[1:]]
            axes: dict[str, Any] = {
                "x": ("position", result.position.values),
                "y": ("layer", result.layer.values),
            }
            title = f"{view} rows, ξ = {xi:g}"
            panels.append(
                heat_panel(values, title=title, name="effective rank", limits=limits, facts=facts, **axes)
            )
    return panels


def drift(result: xr.Dataset, chain: str) -> list[Panel]:
    """Kernel drift by transition, with both fits to the mean over seeds."""
    colours = xi_colours(sorted_xi(result))
    labels = [f"{k}→{k + 1}" for k in result.transition.values]
    panels = []
    for view in VIEWS:
        series: list[dict[str, Any]] = []
        for xi in sorted_xi(result):
            run: dict[str, Any] = {"chain": chain, "xi": xi, "stage": "trained", "view": view}
            x, curves = by_seed(result, "kernel_drift", **run)
            series += _mean_and_seeds(result, "kernel_drift", f"ξ = {xi:g}", colours[xi], run)
            fits = drift_fits(mean_of(curves))
            if fits is None:
                continue
            words = "step + plateau" if fits.shape.preferred == "step" else "geometric decay"
            preferred = f"preferred by BIC: {words}"
            first = int(x[0]) + fits.shape.plateau[0]
            for name, values, dash, fact in (
                ("geometric decay", fits.decay, "6 4", f"rate {fits.shape.decay_rate:.3g} a layer"),
                ("step + plateau", fits.step, "2 3", f"plateau from transition {first}→{first + 1} on"),
            ):
                told = f"{name}, ξ = {xi:g}"
                facts = ["fitted to the mean over seeds", fact, preferred]
                series.append(line(told, x, values, colours[xi], dash=dash, width=1.3, size=1.5, facts=facts))
        y = {"name": "drift", "label": "kernel drift 1 − CKA", "log": True}
        x_axis = {"name": "transition", "label": "transition between layers", "labels": labels}
        panels.append({"title": f"{view} rows", "x": x_axis, "y": y, "series": series})
    return panels


def survival(result: xr.Dataset, chain: str) -> list[Panel]:
    """Held-out R² of the slowest and the fastest eigenspace of the chain by layer."""
    titles = {"visible": "own token (visible rows)", "masked": "Bayes posterior (masked rows)"}
    whole, xis, colours = result.survival.sel(chain=chain), sorted_xi(result), xi_colours(sorted_xi(result))
    panels = []
    for process, title in titles.items():
        series = []
        for xi, stage in [*((xi, "trained") for xi in xis), (xis[0], "control_iid")]:
            if stage not in result.stage.values:
                continue
            modes = whole.sel(xi=xi).dropna("mode", how="all")["mode"].values
            for mode, which, dash in ((modes[0], "slowest", None), (modes[-1], "fastest", "6 4")):
                part = (
                    whole.sel(xi=xi, stage=stage, process=process, mode=mode)
                    .transpose("seed", "layer")
                    .values
                )
                what = f"ξ = {xi:g}" if stage == "trained" else f"i.i.d. control (ξ = {xi:g})"
                colour = colours[xi] if stage == "trained" else CONTROL
                facts = [f"mean over {len(part)} seeds", *_facts(result, process)]
                if "mode_modulus" in result:
                    facts.append(f"|λ| = {float(result.mode_modulus.sel(chain=chain, xi=xi, mode=mode)):.3g}")
                name = f"{what}, {which} mode"
                shape = SHAPES[VIEW_MARKERS[process]]
                series.append(
                    line(
                        name, result.layer.values, mean_of(part), colour, dash=dash, shape=shape, facts=facts
                    )
                )
        y = {"name": "R²", "label": "held-out linear R²", "low": 0, "high": 1}
        panels.append({"title": title, "x": LAYER, "y": y, "series": series})
    return panels


def training(result: xr.Dataset, chain: str) -> list[Panel]:
    """Loss by step over that of Bayes, and the captured fraction."""
    colours, panels = xi_colours(sorted_xi(result)), []
    step = {"name": "step", "label": "training steps"}
    evaluated = "training_evaluation_loss" in result
    name = "training_evaluation_loss" if evaluated else "training_loss"
    for measure, title, label in (
        (
            name,
            "loss on held-out sequences" if evaluated else "loss of the training batch",
            "loss (nats a hidden token)",
        ),
        ("training_captured", "captured of what Bayes predicts", "captured fraction"),
    ):
        series, rules = [], []
        for xi in sorted_xi(result):
            part = result.sel(chain=chain, xi=xi, stage="trained").transpose("seed", ...)
            values = part[measure].values
            told = f"ξ = {xi:g}"
            x = result.step.values
            series.append(
                line(told, x, mean_of(values), colours[xi], facts=[f"mean over {len(values)} seeds"])
            )
            if len(values) > 1:
                texts = [f"seed {seed}" for seed in result.seed.values for _ in x]
                series.append(
                    dots(told, np.tile(x, len(values)), values.ravel(), colours[xi], texts, faint=True)
                )
            if measure == name and "bayes_loss" in part:
                bayes = part.bayes_loss.mean(skipna=True)
                rules.append(
                    {"name": f"Bayes, ξ = {xi:g}", "y": float(bayes), "dash": "6 4", "colour": colours[xi]}
                )
        if measure == name and "stationary_loss" in result:
            known = result.stationary_loss.sel(chain=chain, stage="trained").mean(skipna=True)
            rules.append({"name": "knowing no context (π)", "y": float(known), "dash": "2 4"})
        if measure != name:
            rules.append({"name": "trained: 0.90", "y": 0.9, "dash": "2 4"})
        y = {"name": label.partition(" (")[0], "label": label}
        panels.append({"title": title, "x": step, "y": y, "series": series, "rules": rules})
    return panels


def cka(result: xr.Dataset, chain: str) -> list[Panel]:
    """Debiased CKA of every two layers, the mean over seeds and positions."""
    panels = []
    for view in VIEWS:
        for xi in sorted_xi(result):
            part = result.cka.sel(chain=chain, xi=xi, stage="trained", process=view)
            values = mean_of(part.transpose("seed", "layer", "other_layer").values)
            axes: dict[str, Any] = {"x": ("layer", result.layer.values), "y": ("layer", result.layer.values)}
            facts = [f"mean over {part.sizes['seed']} seeds", *_facts(result, view)]
            title = f"{view} rows, ξ = {xi:g}"
            panels.append(heat_panel(values, title=title, name="CKA", limits=(0, 1), facts=facts, **axes))
    return panels


def spectra(result: xr.Dataset, chain: str) -> list[Panel]:
    """Singular values over the largest by layer, for every ξ and process."""
    colours, panels = depth_colours(result.sizes["layer"]), []
    for view in VIEWS:
        for xi in sorted_xi(result):
            part = result.relative_spectrum.sel(chain=chain, xi=xi, stage="trained", positional_view=view)
            mean = mean_of(part.transpose("seed", "layer", "component").values)
            x, facts = (
                np.arange(1, mean.shape[1] + 1),
                [f"mean over {part.sizes['seed']} seeds", *_facts(result, view)],
            )
            series = [
                line(
                    f"layer {layer}",
                    x,
                    np.where(values > SMALLEST, values, np.nan),
                    colours[layer],
                    facts=facts,
                    size=2.2,
                )
                for layer, values in enumerate(mean)
                if np.isfinite(values).any()
            ]
            x_axis = {"name": "component", "label": "component", "whole": True}
            y = {"name": "σ over the largest", "label": "singular value over the largest", "log": True}
            panels.append({"title": f"{view} rows, ξ = {xi:g}", "x": x_axis, "y": y, "series": series})
    return panels


# Title, caption, what draws it, and the variable that a result must hold for it.
FIGURES = (
    (
        "Effective rank by depth",
        "Lines are means over seeds, points the seeds. Grey: stacks with nothing to learn, trained as long.",
        order_parameter,
        "effective_rank",
    ),
    (
        "Effective rank by layer and position",
        "An even row means that positions agree, and that the mean over them hides nothing. Masked rows are "
        "constant at the input and have no rank there.",
        heat_maps,
        "effective_rank_by_position",
    ),
    (
        "Kernel drift by transition",
        "How far each block moves the representation, with the two descriptions that finding (iii) compares.",
        drift,
        "kernel_drift",
    ),
    (
        "Mode survival",
        "What a linear map still reads of the chain's slowest and fastest eigenspace.",
        survival,
        "survival",
    ),
    (
        "Training",
        "Dashed: the best possible loss, that of the exact Bayes posterior.",
        training,
        "training_loss",
    ),
    (
        "CKA between layers",
        "Debiased linear CKA; 1 is the same representation up to rotation and scale.",
        cka,
        "cka",
    ),
    (
        "Singular values by depth",
        "Darker is nearer to the input. Values below 1e-6 of the largest are rounding, and are left out.",
        spectra,
        "relative_spectrum",
    ),
)


def experiment_figures(result: xr.Dataset, chain: str) -> list[tuple[str, str, list[Panel]]]:
    """Title, caption and panels of every figure that the result holds what is needed for."""
    return [
        (title, caption, draw(result, chain)) for title, caption, draw, needed in FIGURES if needed in result
    ]
