"""The charts of a reproduction. Color is ξ, marker the view; grey is a control."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import xarray as xr

from rgfast.flow import descent
from rgfast.flow.answers import spread
from rgfast.flow.stages import in_words
from rgfast.report.extract import Array, by_seed, mean_of, rank_by_position, sorted_xi
from rgfast.report.palette import CONTROL, CONTROLS, VIEW_MARKERS, xi_colours
from rgfast.report.parts import component_axis, fit_series, layer_axis, spectrum_series, transition_axis
from rgfast.report.spec import Axis, Chart, Panel, Rule, Series, heat_panel

__all__ = [
    "VIEWS",
    "cka_chart",
    "drift_chart",
    "experiment_charts",
    "heat_chart",
    "rank_chart",
    "spectra_chart",
    "survival_chart",
    "training_chart",
]

VIEWS = ("visible", "masked")
_WORDS = {
    "visible": "visible rows: what the stack forgets",
    "masked": "masked rows: what it infers",
    "position": "all rows at each position",
}
_PROCESSES = {"visible": "own token (visible rows)", "masked": "Bayes posterior (masked rows)"}


def _seeds(result: xr.Dataset) -> str:
    return f"{result.sizes['seed']} seed{'s' if result.sizes['seed'] > 1 else ''}"


def _setup(result: xr.Dataset, chain: str) -> str:
    return f"{chain} chain, {result.sizes['layer'] - 1} blocks"


def _note(result: xr.Dataset, view: str) -> str:
    """How many rows and seeds stand behind a value."""
    rows = f"n = {int(result.n.sel(view=view))} rows per position, " if "n" in result else ""
    return f"{rows}{_seeds(result)}"


def _facts(result: xr.Dataset, view: str, *, by_position: bool = False) -> tuple[str, ...]:
    facts = [f"mean over {_seeds(result)}"]
    if "position" in result.sizes and not by_position:
        facts.append(f"mean over {result.sizes['position']} positions")
    if "n" in result and view in result.view.values:
        facts.append(f"n = {int(result.n.sel(view=view))} rows per position and seed")
    return tuple(facts)


def _of_seeds(
    result: xr.Dataset, name: str, x: Array, curves: Array, color: str, view: str, **style: Any
) -> Series:
    """The mean of ``curves[seed, x]``, with the seeds beside it."""
    each = tuple(f"seed {seed}" for seed in result.seed.values)
    style = {"marker": VIEW_MARKERS[view], "facts": _facts(result, view), "width": 2.2, **style}
    return Series(name, x, mean_of(curves), color, members=curves, each=each, **style)


def _layers(result: xr.Dataset) -> Axis:
    return layer_axis(result.sizes["layer"], "input of the stack")


def rank_chart(result: xr.Dataset, chain: str, views: Sequence[str] = VIEWS) -> Chart:
    """Effective rank by layer, a panel per view, with the trained controls and the isotropic baseline."""
    xis, panels = sorted_xi(result), []
    colors = xi_colours(xis)
    for view in views:
        series, rules = [], []
        for xi in xis:
            run: dict[str, Any] = {"chain": chain, "xi": xi, "stage": "trained", "view": view}
            x, curves = by_seed(result, "effective_rank", **run)
            ratios = np.array([[descent(values).ratio] for values in curves if values.size > 1])
            note = f"R = {mean_of(ratios)[0]:.2f}" if ratios.size else ""
            series.append(_of_seeds(result, f"ξ = {xi:g}", x, curves, colors[xi], view, note=note))
        for stage, (color, dash, marker, words) in CONTROLS.items():
            if stage in result.stage.values:
                run = {"chain": chain, "xi": xis[0], "stage": stage, "view": view}
                x, curves = by_seed(result, "effective_rank", **run)
                style = {"dash": dash, "width": 1.4, "marker": marker, "size": 2.5}
                name = f"{words} (ξ = {xis[0]:g})"
                series.append(_of_seeds(result, name, x, curves, color, view, **style))
        if "effective_rank_baseline" in result:
            rules = [Rule("isotropic, same n", float(result.effective_rank_baseline.sel(view=view)), ":")]
        y, note = Axis("effective rank", "effective rank (dimensions)", low=0), _note(result, view)
        panels.append(
            Panel(_layers(result), y, _WORDS.get(view, view), tuple(series), tuple(rules), note=note)
        )
    return Chart(
        "Effective rank by depth",
        "Lines are means over seeds, points the seeds. Grey: stacks with nothing to learn, trained as long.",
        tuple(panels),
        heading=f"{_setup(result, chain)}: effective rank of the residual stream, mean over positions",
        columns=2,
        size=(5, 4.2),
        shared="y",
    )


def _grid(
    result: xr.Dataset, views: Sequence[str], draw: Callable[[str, float], Panel], **chart: Any
) -> Chart:
    """A panel per view (row) and ξ (column)."""
    xis = sorted_xi(result)
    panels = tuple(draw(view, xi) for view in views for xi in xis)
    return Chart(panels=panels, columns=len(xis), shared="xy", **chart)


def heat_chart(result: xr.Dataset, chain: str, views: Sequence[str] = VIEWS) -> Chart:
    """Effective rank by layer and position, a panel per view and ξ, all on one scale."""
    mean = rank_by_position(result, chain).sel(positional_view=list(views))
    limits = (float(mean.min()), float(mean.max())) if bool(mean.notnull().any()) else None
    y = ("layer (0 = input)", result.layer.values)

    def draw(view: str, xi: float) -> Panel:
        values = mean.sel(xi=xi, positional_view=view).transpose("layer", "position").values
        return heat_panel(
            values,
            name="effective rank",
            label="effective rank (dimensions)",
            x=("position", result.position.values),
            y=y,
            limits=limits,
            facts=_facts(result, view, by_position=True),
            title=f"{view} rows, ξ = {xi:g}",
            note=_note(result, view),
        )

    return _grid(
        result,
        views,
        draw,
        title="Effective rank by layer and position",
        caption="An even row means that positions agree, and that the mean over them hides nothing. Masked "
        "rows are constant at the input and have no rank there.",
        heading=f"{_setup(result, chain)}: effective rank by layer and position",
        size=(5, 3.1),
        one_bar=True,
    )


def drift_chart(result: xr.Dataset, chain: str, views: Sequence[str] = VIEWS) -> Chart:
    """Kernel drift by transition, a panel per view, with both fits to the mean over seeds."""
    xis, panels = sorted_xi(result), []
    colors = xi_colours(xis)
    for view in views:
        series = []
        for xi in xis:
            run: dict[str, Any] = {"chain": chain, "xi": xi, "stage": "trained", "view": view}
            x, curves = by_seed(result, "kernel_drift", **run)
            series.append(_of_seeds(result, f"ξ = {xi:g}", x, curves, colors[xi], view))
            fitted = ("fitted to the mean over seeds",)
            first = int(x[0]) if x.size else 0  # masked rows of one block have no transition
            series += fit_series(mean_of(curves), first, colors[xi], f"ξ = {xi:g}", fitted)
        y = Axis("drift", "kernel drift 1 − CKA", log=True)
        axis, note = transition_axis(result.sizes["transition"]), _note(result, view)
        panels.append(Panel(axis, y, f"{view} rows", tuple(series), note=note))
    return Chart(
        "Kernel drift by transition",
        "How far each block moves the representation, with the two descriptions that finding (iii) compares.",
        tuple(panels),
        heading=f"{_setup(result, chain)}: where the representation still moves",
        columns=2,
        size=(5, 4.4),
        shared="y",
    )


def survival_chart(result: xr.Dataset, chain: str, views: Sequence[str] = VIEWS) -> Chart:
    """Held-out R² of the slowest and the fastest eigenspace of the chain by layer, a panel per process."""
    whole, xis, panels = result.survival.sel(chain=chain), sorted_xi(result), []
    colors = xi_colours(xis)
    runs = [(xi, "trained") for xi in xis]
    runs += [(xis[0], "control_iid")] if "control_iid" in result.stage.values else []
    for view in views:
        series = []
        for xi, stage in runs:
            # Eigenspaces of other chains in the result are empty modes.
            modes = whole.sel(xi=xi).dropna("mode", how="all")["mode"].values
            trained = stage == "trained"
            run = f"ξ = {xi:g}" if trained else f"{in_words(stage)} (ξ = {xi:g})"
            for mode, which, dash in ((modes[0], "slowest", "-"), (modes[-1], "fastest", "--")):
                part = whole.sel(xi=xi, stage=stage, process=view, mode=mode)
                style: dict[str, Any] = {"dash": dash, "width": 2.2 if trained else 1.4}
                if "mode_modulus" in result:
                    modulus = float(result.mode_modulus.sel(chain=chain, xi=xi, mode=mode))
                    style["facts"] = (*_facts(result, view), f"|λ| = {modulus:.3g}")
                color, x = colors[xi] if trained else CONTROL, np.arange(result.sizes["layer"], dtype=float)
                values = part.transpose("seed", "layer").values
                style["note"] = f"ends at {mean_of(values)[-1]:.2f}"
                series.append(_of_seeds(result, f"{run}, {which} mode", x, values, color, view, **style))
        y, note = Axis("R²", "held-out linear R²", low=-0.08, high=1.05), _note(result, view)
        panels.append(Panel(_layers(result), y, _PROCESSES[view], tuple(series), (Rule("", 0.0),), note=note))
    return Chart(
        "Mode survival",
        "What a linear map still reads of the chain's slowest and fastest eigenspace. "
        f"{_ends(result, chain)}",
        tuple(panels),
        heading=f"{_setup(result, chain)}: which modes each layer still holds",
        columns=2,
        size=(5, 4.2),
        shared="y",
    )


def _ends(result: xr.Dataset, chain: str) -> str:
    """What is left of the own token's slowest mode in the last layer, and what that number belongs to."""
    told = []
    for xi in sorted_xi(result) if "visible" in result.process.values else ():
        part = result.survival.sel(chain=chain, xi=xi, stage="trained", process="visible").isel(layer=-1)
        slow = part.dropna("mode", how="all")
        if slow.sizes["mode"]:
            told.append(f"{spread(slow.isel(mode=0).values)} at ξ = {xi:g}")
    if not told:
        return ""
    steps = json.loads(result.attrs.get("config", "{}")).get("training", {}).get("steps")
    trained = f", {steps} training steps" if steps else ""
    return (
        f"Of the own token's slowest mode the last layer keeps {', '.join(told)}. These numbers belong to "
        f"this run ({result.sizes['layer'] - 1} blocks{trained}, {_seeds(result)}) and differ between "
        "presets and seeds; README and documentation show the preset full (8 blocks)."
    )


def training_chart(result: xr.Dataset, chain: str) -> Chart:
    """Loss by step over that of Bayes, and the captured fraction."""
    xis, held_out = sorted_xi(result), "training_evaluation_loss" in result
    colors, x = xi_colours(xis), result.step.values.astype(float)
    each = tuple(f"seed {seed}" for seed in result.seed.values)
    series: dict[str, list[Series]] = {}
    bayes = []
    for measure in ("training_evaluation_loss" if held_out else "training_loss", "training_captured"):
        series[measure] = []
        for xi in xis:
            values = result[measure].sel(chain=chain, xi=xi, stage="trained").transpose("seed", "step").values
            facts = (f"mean over {_seeds(result)}",)
            style: dict[str, Any] = {"members": values, "each": each, "facts": facts, "marker": "o"}
            series[measure].append(Series(f"ξ = {xi:g}", x, mean_of(values), colors[xi], **style))
    for xi in xis if "bayes_loss" in result else ():
        level = result.bayes_loss.sel(chain=chain, xi=xi, stage="trained").mean(skipna=True)
        bayes.append(Rule(f"Bayes, ξ = {xi:g}", float(level), "--", colors[xi]))
    if "stationary_loss" in result:
        known = result.stationary_loss.sel(chain=chain, stage="trained").mean(skipna=True)
        bayes.append(Rule("knowing no context (π)", float(known), ":"))
    loss, captured = series.values()
    step, note = Axis("step", "training steps"), _seeds(result)
    title = "loss on held-out sequences" if held_out else "loss of the training batch"
    y = Axis("loss", "loss (nats per hidden token)")
    left = Panel(step, y, title, tuple(loss), tuple(bayes), note=note)
    y, rules = Axis("captured fraction"), (Rule("trained: 0.90", 0.9, ":"),)
    right = Panel(step, y, "captured of what Bayes predicts", tuple(captured), rules, note=note)
    return Chart(
        "Training",
        "Dashed: the best possible loss, that of the exact Bayes posterior.",
        (left, right),
        heading=f"{_setup(result, chain)}: training",
        columns=2,
        size=(5, 4),
    )


def cka_chart(result: xr.Dataset, chain: str, views: Sequence[str] = VIEWS) -> Chart:
    """Debiased CKA of every two layers, the mean over seeds and positions, a panel per view and ξ."""
    layers = result.layer.values

    def draw(view: str, xi: float) -> Panel:
        part = result.cka.sel(chain=chain, xi=xi, stage="trained", process=view)
        values = mean_of(part.transpose("seed", "layer", "other_layer").values)
        more: dict[str, Any] = {"facts": _facts(result, view), "note": _note(result, view)}
        more |= {"x": ("layer", layers), "y": ("layer", layers), "title": f"{view} rows, ξ = {xi:g}"}
        return heat_panel(values, name="CKA", label="CKA, debiased", limits=(0.0, 1.0), **more)

    return _grid(
        result,
        views,
        draw,
        title="CKA between layers",
        caption="Debiased linear CKA; 1 is the same representation up to rotation and scale.",
        heading=f"{_setup(result, chain)}: CKA between layers",
        size=(4.6, 3.5),
        one_bar=True,
    )


def spectra_chart(result: xr.Dataset, chain: str, views: Sequence[str] = VIEWS) -> Chart:
    """Singular values over the largest by layer, means over seeds and positions, a panel per view and ξ."""

    def draw(view: str, xi: float) -> Panel:
        part = result.relative_spectrum.sel(chain=chain, xi=xi, stage="trained", positional_view=view)
        mean = mean_of(part.transpose("seed", "layer", "component").values)
        y = Axis("σ over the largest", "singular value over the largest", log=True)
        series = spectrum_series(mean, _facts(result, view))
        title, note = f"{view} rows, ξ = {xi:g}", _note(result, view)
        return Panel(component_axis(), y, title, series, note=note, legend="layer")

    return _grid(
        result,
        views,
        draw,
        title="Singular values by depth",
        caption="Darker is nearer to the input. Values below 1e-6 of the largest are rounding and left out.",
        heading=f"{_setup(result, chain)}: singular values by depth, mean over positions",
        size=(4.6, 3.5),
        legend="right",
    )


# Each chart, and the variable that a result must have for it.
_CHARTS = (
    (rank_chart, "effective_rank"),
    (heat_chart, "effective_rank_by_position"),
    (drift_chart, "kernel_drift"),
    (survival_chart, "survival"),
    (training_chart, "training_loss"),
    (cka_chart, "cka"),
    (spectra_chart, "relative_spectrum"),
)


def experiment_charts(result: xr.Dataset, chain: str) -> list[Chart]:
    """Every chart that the result has data for."""
    return [chart(result, chain) for chart, needed in _CHARTS if needed in result]
