import math

import matplotlib as mpl
import numpy as np
import pandas as pd

from rgfast.flow.relevance import RIVALS, relevance_test
from rgfast.report.figures import COLOURS
from rgfast.report.studies import (
    plot_decimation,
    plot_multiverse,
    plot_observer,
    plot_relevance,
    plot_xi,
)

RNG = np.random.default_rng(0)


def lines(axes, colour):
    return [line for line in axes.lines if mpl.colors.same_color(line.get_color(), colour)]


def test_relevance_draws_every_trained_run_and_every_predictor():
    rows = [
        {"chain": f"c{k}", "xi": 1.0, "width": w, "seed": 0, "captured": 0.8 if k == 0 else 0.95,
         "masked_isotropic": w - 0.5, "masked_last": 5 + k, "log_posterior_rank": 5.1 + k,
         **{r: 1 + RNG.random() for r in RIVALS}}
        for k in range(9)
        for w in (16, 48)
    ]  # fmt: skip
    table = pd.DataFrame(rows).assign(xi=lambda t: t.chain.str[1:].astype(float) % 3 + 1)
    figure = plot_relevance(table, relevance_test(table, draws=50))
    left, right = figure.axes
    drawn = sum(len(line.get_xdata()) for line in left.lines if line.get_linestyle() == "None")
    assert drawn == 16
    assert [line.get_ydata()[0] for line in left.lines[-2:]] == [15.5, 47.5]
    names = [label.get_text() for label in right.get_yticklabels()]
    assert names == ["y = x", "log_posterior_rank, fitted", *RIVALS, "mean"]


def test_xi_draws_means_of_trained_runs():
    rows = [
        {
            "chain": "lazy",
            "width": 16,
            "xi": xi,
            "captured": 0.95 if seed else 0.5,
            "visible_R": xi + seed,
            "masked_R": 1.0,
        }
        for xi in (1.0, 7.0)
        for seed in range(3)
    ]
    axes = plot_xi(pd.DataFrame(rows)).axes[0]
    mean = next(line for line in lines(axes, COLOURS[0]) if line.get_linestyle() == "-")
    np.testing.assert_allclose(mean.get_ydata(), [2.5, 8.5])


def test_multiverse_sorts_and_marks_the_default():
    values = [0.3, 0.1, 0.2]
    table = pd.DataFrame({
        "default": [True, False, False], "trained": True, "norm": ["layer", "rms", "rms"],
        "e": values, "e_low": [0.2, 0.0, 0.1], "e_high": [0.4, 0.2, 0.3],
    })  # fmt: skip
    figure = plot_multiverse(table, (("norm", ("layer", "rms")),), {"e": ("an effect", 0.15)})
    curve, dots = figure.axes
    star = next(line for line in curve.lines if line.get_marker() == "*")
    assert (star.get_xdata().tolist(), star.get_ydata().tolist()) == ([2], [0.3])
    # The two set-ups with the other norm come first.
    assert dots.lines[0].get_xdata().tolist() == [0, 1]


def test_decimation_draws_the_mean_of_each_arm():
    names = (
        "R_visible", "R_masked", "slow_visible", "fast_visible", "total_drift_visible",
        "total_drift_masked", "final_rank_masked", "log_posterior_rank", "masked_isotropic",
    )  # fmt: skip
    rows = [
        {"stage": stage, "arm": arm, "spacing": k, "seed": s, **dict.fromkeys(names, k + s)}
        for stage in ("trained", "control_iid")
        for arm in ("grid", "block")
        for k in (1, 3)
        for s in (0, 1)
    ]
    figure = plot_decimation(pd.DataFrame(rows), 7.0)
    grid = next(line for line in lines(figure.axes[0], COLOURS[0]) if line.get_linestyle() == "-")
    np.testing.assert_allclose(grid.get_ydata(), [1.5, 3.5])
    assert "ξ = 7/k" in figure.axes[0].get_xlabel()
    baseline = next(line for line in figure.axes[3].lines if line.get_label() == "isotropic, same n")
    np.testing.assert_allclose(baseline.get_ydata(), [1.5, 3.5])


def test_observer_leaves_out_what_is_nowhere_defined():
    rows = [
        {"stage": stage, "xi": 7.0, "seed": 0, "layer": layer, "radius": w,
         "cka": math.nan if stage == "untrained" or layer == 0 else 0.5}
        for stage in ("trained", "untrained")
        for layer in range(3)
        for w in (1, 2, 8)
    ]  # fmt: skip
    ridge = [{"stage": "trained", "xi": 7.0, "seed": 0, "layer": layer, "radius": 2.0} for layer in (1, 2)]
    figure = plot_observer(pd.DataFrame(rows), pd.DataFrame(ridge))
    panels = [axes for axes in figure.axes if axes.get_title()]
    assert [axes.get_title() for axes in panels] == ["trained, ξ = 7"]
    assert panels[0].lines[0].get_ydata().tolist() == [1.0, 1.0]
