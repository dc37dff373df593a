"""Figures by depth, of a reproduction and of a probe. Color is ξ or the view, marker the view."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from matplotlib.figure import Figure

from rgfast.probing.result import ProbeResult, named
from rgfast.report import experiment_charts, probe_charts
from rgfast.report.accessor import check_measure, views_of
from rgfast.report.canvas import Canvas, draw_chart
from rgfast.report.extract import chain_of
from rgfast.report.sources import Experiment, load
from rgfast.report.spec import Chart

__all__ = [
    "plot_cka",
    "plot_drift",
    "plot_heat_map",
    "plot_order_parameter",
    "plot_spectra",
    "plot_survival",
    "plot_training",
]

Views = Sequence[str] | None


def _experiment(source: Any, needs: str, what: str) -> Experiment:
    """``source`` as a reproduction that has the variable ``needs``."""
    if not isinstance(source, Experiment):
        kind = "a probe's result" if isinstance(source, ProbeResult) else "a study"
        raise TypeError(f"source must be a reproduction for {what}, got {kind}")
    if needs not in source.dataset:
        raise ValueError(f"source must hold {needs!r} for {what}; an older version wrote it, run it again")
    return source


def _chosen(known: Sequence[str], views: Views) -> list[str]:
    chosen = list(known) if views is None else list(views)
    for view in chosen:
        if view not in known:
            raise ValueError(f"views must be among {', '.join(known)}, got {view!r}")
    return chosen


def _by_depth(
    source: Any,
    chart: Callable[..., Chart],
    needs: str,
    what: str,
    chain: str | None,
    views: Views,
    ax: Canvas,
) -> Figure:
    """A reproduction's chart, a panel or row per view."""
    result = _experiment(source, needs, what).dataset
    chosen = _chosen(experiment_charts.VIEWS, views)
    return draw_chart(chart(result, chain_of(result, chain), chosen), ax)


def plot_order_parameter(
    source: Any, *, chain: str | None = None, views: Views = None, ax: Canvas = None
) -> Figure:
    """The figure of the order parameter by depth: effective rank by layer, controls and baseline beside it.

    Of a reproduction: a panel per view, one color per ξ; lines are means over seeds, points the seeds; grey
    the stacks trained on i.i.d. tokens and on permuted targets, probed on the sequences of the smallest ξ;
    black dots what isotropic data with as many rows and features would give. Of a probe: one panel, a
    line per view with its error bars, its baseline dotted.

    Args:
        source: what :func:`rgfast.report.write_report` takes, but a study.
        chain: of those in a reproduction; by default the first.
        views: ``"visible"`` and ``"masked"`` by default; of a probe all but ``"flattened"``.
        ax: axes to draw on, one per panel, instead of a new figure.

    Raises TypeError for a source of another kind, ValueError for an unknown chain or view, a missing
    variable, and another number of axes than panels.
    """
    found = load(source)
    if isinstance(found, ProbeResult):
        return draw_chart(probe_charts.rank_chart(found, "effective_rank", views_of(found, views)), ax)
    return _by_depth(
        found, experiment_charts.rank_chart, "effective_rank", "the order parameter", chain, views, ax
    )


def plot_heat_map(
    source: Any,
    *,
    measure: str = "effective_rank",
    chain: str | None = None,
    views: Views = None,
    ax: Canvas = None,
) -> Figure:
    """The figure of a measure by layer and position, a panel per view (and ξ, of a reproduction).

    All panels are on one scale, and undefined cells are blank. Of a reproduction it is the effective rank of
    the trained stacks, the mean over seeds; of a probe any rank or drift. For ``source``, ``chain``,
    ``views`` and ``ax``, and what is raised, see :func:`plot_order_parameter`.
    """
    found = load(source)
    if isinstance(found, ProbeResult):
        check_measure(measure, named("rank", "drift"))
        known = [view for view in found.views if found.is_positional(view)]
        if not known:
            raise ValueError("source must have a view with positions for a heat map, and holds none")
        return draw_chart(probe_charts.heat_chart(found, measure, _chosen(known, views)), ax)
    _experiment(found, "effective_rank_by_position", "a heat map")
    if measure != "effective_rank":
        raise ValueError(f"measure must be 'effective_rank' for a reproduction, got {measure!r}")
    return _by_depth(
        found, experiment_charts.heat_chart, "effective_rank_by_position", "a heat map", chain, views, ax
    )


def plot_drift(source: Any, *, chain: str | None = None, views: Views = None, ax: Canvas = None) -> Figure:
    """The figure of the kernel drift 1 − CKA(l, l+1) by transition, logarithmic, with both fits.

    Of a reproduction: a panel per view, points are seeds, lines means; thin dashes a geometric decay and dots
    a step with its plateau, fitted to the mean (better: the lower BIC). Of a probe: one panel, a line per
    view, with the fits if it is drawn alone. For ``source``, ``chain``, ``views`` and ``ax``, and what is
    raised, see :func:`plot_order_parameter`.
    """
    found = load(source)
    if isinstance(found, ProbeResult):
        chosen = views_of(found, views)
        chart = probe_charts.drift_chart(found, "kernel_drift", chosen, fits=len(chosen) == 1)
        return draw_chart(chart, ax)
    return _by_depth(found, experiment_charts.drift_chart, "kernel_drift", "the drift", chain, views, ax)


def plot_cka(source: Any, *, chain: str | None = None, views: Views = None, ax: Canvas = None) -> Figure:
    """The figure of the debiased linear CKA of every two layers, a panel per view (and ξ, of a reproduction).

    Means over positions, and over the seeds of a reproduction. For ``source``, ``chain``, ``views`` and
    ``ax``, and what is raised, see :func:`plot_order_parameter`.
    """
    found = load(source)
    if isinstance(found, ProbeResult):
        return draw_chart(probe_charts.cka_chart(found, "cka", _chosen(found.views, views)), ax)
    return _by_depth(found, experiment_charts.cka_chart, "cka", "the CKA of layers", chain, views, ax)


def plot_spectra(source: Any, *, chain: str | None = None, views: Views = None, ax: Canvas = None) -> Figure:
    """The figure of each layer's singular values over its largest, logarithmic, from dark (input) to light.

    A panel per view (and ξ, of a reproduction); means over positions, and over the seeds of a reproduction.
    Values below 1e-6 of the largest are rounding and left out. For ``source``, ``chain``, ``views`` and
    ``ax``, and what is raised, see :func:`plot_order_parameter`.
    """
    found = load(source)
    if isinstance(found, ProbeResult):
        return draw_chart(probe_charts.spectra_chart(found, _narrow(found, views)), ax)
    return _by_depth(
        found, experiment_charts.spectra_chart, "relative_spectrum", "the spectra", chain, views, ax
    )


def plot_survival(source: Any, *, chain: str | None = None, views: Views = None, ax: Canvas = None) -> Figure:
    """The figure of what each layer still holds: held-out linear R² by layer.

    Of a reproduction: of the chain's slowest (solid) and fastest eigenspace (dashed), color ξ; the own token
    on visible rows, the Bayes posterior on masked rows; grey the stack trained on i.i.d. tokens, on the
    sequences of the smallest ξ. Of a probe: of its targets. For ``source``, ``chain``, ``views`` and ``ax``,
    and what is raised, see :func:`plot_order_parameter`; also ValueError for a probe without targets.
    """
    found = load(source)
    if isinstance(found, ProbeResult):
        if not found.targets:
            raise ValueError("source must have been probed with targets, and was probed without")
        return draw_chart(probe_charts.target_chart(found, _narrow(found, views)), ax)
    return _by_depth(found, experiment_charts.survival_chart, "survival", "mode survival", chain, views, ax)


def _narrow(result: ProbeResult, views: Views) -> list[str]:
    return _chosen([view for view in result.views if view != "flattened"], views)


def plot_training(source: Any, *, chain: str | None = None, ax: Canvas = None) -> Figure:
    """The figure of a reproduction's training: loss by step over that of Bayes, and the captured fraction.

    Left: expected cross-entropy on held-out sequences (nats per hidden token), color ξ, points are seeds;
    dashed the exact Bayes posterior's, the best possible, dotted that of knowing no context. Right: captured,
    with the bar below which a run is undertrained. A result of an older version has the loss of the training
    batches instead, and no Bayes line.

    Args:
        source: what :func:`rgfast.reproduce` returned, its folder, its ``result.nc`` or its dataset.
        chain: of those in the result; by default the first.
        ax: two axes to draw on, instead of a new figure.

    Raises TypeError for a source of another kind, ValueError for an unknown chain and another number of axes.
    """
    result = _experiment(load(source), "training_loss", "training curves").dataset
    return draw_chart(experiment_charts.training_chart(result, chain_of(result, chain)), ax)
