"""The interactive figures of a probe's result, as what ``page.js`` draws."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from rgfast.probing import ProbeResult
from rgfast.probing.measures import BASELINES, DRIFTS, LABELS, RANKS
from rgfast.report.extract import SMALLEST, Array, drift_fits, mean_of
from rgfast.report.interactive import DASHES, SHAPES, Panel, heat_panel, line
from rgfast.report.palette import VIEW_COLOURS, VIEW_MARKERS, depth_colours, kind_colours

__all__ = ["baseline", "count_text", "errors", "plain", "probe_figures"]


def title(measure: str) -> str:
    label = LABELS[measure]
    return label[:1].upper() + label[1:]


def plain(name: str) -> str:
    return name.replace("_", " ")


def count_text(result: ProbeResult, view: str) -> str:
    return result._rows(view, " to ")


def errors(result: ProbeResult, measure: str, view: str) -> Array | None:
    if f"{measure}_se" not in result.dataset:
        return None
    # Positions of one sequence are dependent: the error of the mean is taken as that of a typical position.
    return np.asarray(result._own(f"{measure}_se", view).mean("position", skipna=True).values)


def baseline(result: ProbeResult, measure: str, view: str) -> Array:
    return np.asarray(result._own(f"{measure}_baseline", view).mean("position", skipna=True).values)


def _facts(result: ProbeResult, view: str) -> list[str]:
    positions = result._own_positions(view)
    where = (
        f"mean over {len(positions)} positions"
        if bool(result.dataset.positional.sel(view=view))
        else "position: all"
    )
    return [where, f"n = {count_text(result, view)} rows"]


def _series(result: ProbeResult, measure: str, view: str, name: str = "", **style: Any) -> dict[str, Any]:
    values = result.order_parameter(view, measure)
    x, y = np.asarray(values[values.dims[0]].values, float), np.asarray(values.values)
    style = {"shape": SHAPES[VIEW_MARKERS[view]], "facts": _facts(result, view), **style}
    drawn = line(name or plain(view), x, y, VIEW_COLOURS[view], **style)
    error = errors(result, measure, view)
    if error is not None:
        ends = zip(drawn["points"], y - error, y + error, strict=True)
        drawn |= {"points": [[*point, low, high] for point, low, high in ends], "spread": "± 1 s.e.:"}
    return drawn


def probe_figures(result: ProbeResult) -> list[tuple[str, str, list[Panel]]]:
    names, several = set(result.measures), len(result.layers) > 1
    narrow = [view for view in result.views if view != "flattened"] or list(result.views)
    found: list[tuple[str, str, list[Panel]]] = []
    ranks = [measure for measure in RANKS if measure in names]
    if ranks:
        caption = (
            "The mean over positions; dotted, what isotropic Gaussian rows of the same n and width would "
            "give."
        )
        found.append((f"{title(ranks[0])} by layer", caption, [_rank_panel(result, ranks[0], narrow)]))
    maps = _heat_maps(result, ranks[0]) if ranks else []
    if maps:
        caption = "An even row means that positions agree, and that the mean over them hides nothing."
        found.append((f"{title(ranks[0])} by layer and position", caption, maps))
    drifts = [measure for measure in DRIFTS if measure in names]
    if drifts and several:
        caption = "How far each block moves the representation, with two descriptions of its decay."
        found.append(
            (f"{title(drifts[0])} by transition", caption, [_drift_panel(result, drifts[0], narrow)])
        )
    for measure in ("cka", "cka_biased"):
        if measure in names:
            caption = (
                "1 is the same representation up to rotation and scale. Pairs that were not asked for are "
                "blank."
            )
            found.append(
                (
                    "CKA between layers",
                    caption,
                    [_cka_panel(result, measure, v) for v in narrow],
                )
            )
            break
    if result.views[0] != "flattened":
        caption = (
            "Darker is nearer to the input. Values below 1e-6 of the largest are rounding, and are left out."
        )
        found.append(("Singular values by depth", caption, [_spectra_panel(result, view) for view in narrow]))
    if "target" in result.dataset:
        caption = "What a linear map fitted on other sequences still reads of each target."
        found.append(("Targets by layer", caption, [_target_panel(result, view) for view in narrow]))
    if len(ranks) > 1:
        caption = "Do they tell the same story?"
        found.append(
            ("Every rank, over its first layer", caption, [_relative_panel(result, ranks, v) for v in narrow])
        )
    return found


def _layer_axis(result: ProbeResult) -> dict[str, Any]:
    return {"name": "layer", "label": "layer (0 = first probed)", "whole": True}


def _rank_panel(result: ProbeResult, measure: str, views: Sequence[str]) -> Panel:
    series = [_series(result, measure, view) for view in views]
    if measure in BASELINES:
        for view in views:
            style = {"dash": "2 3", "width": 1.2, "size": 1.5, "facts": _facts(result, view)}
            name = f"isotropic, {plain(view)}"
            series.append(
                line(
                    name,
                    result.dataset.layer.values,
                    baseline(result, measure, view),
                    VIEW_COLOURS[view],
                    **style,
                )
            )
    y = {"name": LABELS[measure], "label": f"{LABELS[measure]} (dimensions)", "low": 0}
    return {"x": _layer_axis(result), "y": y, "series": series}


def _heat_maps(result: ProbeResult, measure: str) -> list[Panel]:
    panels = []
    for view in result.views:
        if not bool(result.dataset.positional.sel(view=view)):
            continue
        values = result.by_position(measure, view)
        counts = result._own("n", view).values
        grid = np.asarray(values.transpose("layer", "position").values)
        # A layer that is constant (masked rows at the input) would set the scale.
        grid = np.where(grid > 0, grid, np.nan)
        axes: dict[str, Any] = {
            "x": ("position", values.position.values),
            "y": ("layer", values.layer.values),
        }
        panels.append(heat_panel(grid, title=plain(view), name=LABELS[measure], counts=counts, **axes))
    return panels


def _drift_panel(result: ProbeResult, measure: str, views: Sequence[str]) -> Panel:
    series = []
    for view in views:
        series.append(_series(result, measure, view))
        values = np.asarray(result.order_parameter(view, measure).values)
        defined = np.flatnonzero(np.isfinite(values))
        fits = drift_fits(values[defined[0] :]) if defined.size else None
        if fits is None:
            continue
        at = np.arange(defined[0], len(values))
        words = "step + plateau" if fits.shape.preferred == "step" else "geometric decay"
        first = int(defined[0]) + fits.shape.plateau[0]
        for name, fit, dash, fact in (
            ("geometric decay", fits.decay, "--", f"rate {fits.shape.decay_rate:.3g} a layer"),
            ("step + plateau", fits.step, ":", f"plateau from transition {first}→{first + 1} on"),
        ):
            facts = [fact, f"preferred by BIC: {words}"]
            style = {"dash": DASHES[dash], "width": 1.2, "size": 1.5, "facts": facts}
            series.append(line(f"{name}, {plain(view)}", at, fit, VIEW_COLOURS[view], **style))
    labels = [f"{k}→{k + 1}" for k in result.dataset.transition.values]
    x = {"name": "transition", "label": "transition between layers", "labels": labels}
    return {"x": x, "y": {"name": LABELS[measure], "label": LABELS[measure], "log": True}, "series": series}


def _cka_panel(result: ProbeResult, measure: str, view: str) -> Panel:
    values = np.asarray(result.order_parameter(view, measure).values)
    layers = [int(layer) for layer in result.dataset.layer.values]
    axes: dict[str, Any] = {"x": ("layer", layers), "y": ("layer", layers)}
    return heat_panel(
        values, title=plain(view), name=LABELS[measure], limits=(0, 1), facts=_facts(result, view), **axes
    )


def _spectra_panel(result: ProbeResult, view: str) -> Panel:
    sigma = result._own("singular_values", view).transpose("position", "layer", "component").values
    top = sigma[..., :1]
    mean = mean_of(sigma / np.where(top > 0, top, np.nan))
    colours, x = depth_colours(mean.shape[0]), np.arange(1, mean.shape[1] + 1)
    style = {"facts": _facts(result, view), "size": 2.2}
    series = [
        line(f"layer {layer}", x, np.where(values > SMALLEST, values, np.nan), colours[layer], **style)
        for layer, values in enumerate(mean)
        if np.isfinite(values).any()
    ]
    y = {"name": "σ over the largest", "label": "singular value over the largest", "log": True}
    return {
        "title": plain(view),
        "x": {"name": "component", "label": "component", "whole": True},
        "y": y,
        "series": series,
    }


def _target_panel(result: ProbeResult, view: str) -> Panel:
    targets = [str(name) for name in result.dataset.target.values]
    colours, facts = kind_colours(targets), _facts(result, view)
    series = [
        line(
            name, result.dataset.layer.values, result.target_r2(name, view).values, colours[name], facts=facts
        )
        for name in targets
    ]
    y = {"name": "R²", "label": "held-out linear R²"}
    return {"title": plain(view), "x": _layer_axis(result), "y": y, "series": series}


def _relative_panel(result: ProbeResult, ranks: Sequence[str], view: str) -> Panel:
    colours, series = kind_colours(ranks), []
    for measure in ranks:
        values = np.asarray(result.order_parameter(view, measure).values)
        good = values[np.isfinite(values) & (values > 0)]
        scaled = values / good[0] if good.size else values * math.nan
        series.append(
            line(
                LABELS[measure],
                result.dataset.layer.values,
                scaled,
                colours[measure],
                facts=_facts(result, view),
            )
        )
    y = {"name": "over the first layer", "label": "rank over the first layer's", "low": 0}
    return {"title": plain(view), "x": _layer_axis(result), "y": y, "series": series}
