import json
import math
from functools import partial

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest

from rgfast.flow.relevance import RIVALS, relevance_test
from rgfast.report import write_report
from rgfast.report.figures import (
    plot_decimation,
    plot_multiverse,
    plot_observer,
    plot_posterior_rank,
    plot_relevance,
    plot_setups,
    plot_xi,
)
from rgfast.report.palette import LIGHT, VIEW_COLOURS, kind_colours, xi_colours

RNG = np.random.default_rng(0)
NASTY = "<script>alert('&')</script>"


def lines(axes, colour):
    return [line for line in axes.lines if mpl.colors.same_color(line.get_color(), colour)]


def write_study(root, kind, tables, summary=None, **design):
    """The folder of a study with these tables, as its command leaves it."""
    folder = root / kind
    (folder / "points").mkdir(parents=True)
    recorded = {"format": f"rgfast.{kind}/1", "name": kind, **design}
    (folder / "design.json").write_text(json.dumps(recorded))
    for name, rows in tables.items():
        pd.DataFrame(rows).to_csv(folder / f"{name}.csv", index=False)
    if summary is not None:
        name = "verdict.json" if kind == "sweep" else "summary.json"
        (folder / name).write_text(json.dumps(summary))
    return folder


@pytest.fixture
def study(tmp_path):
    return partial(write_study, tmp_path)


def page_of(folder):
    return write_report(folder).read_text(encoding="utf-8")


def points(page):
    text = page.split('id="figures">')[1].split("</script>")[0]
    panels = [panel for figure in json.loads(text)["figures"] for panel in figure["panels"]]
    return [point for panel in panels for series in panel["series"] for point in series["points"]]


def cells():
    rows = [
        {"chain": f"c{k}" if k else NASTY, "xi": k % 3 + 1.0, "width": w, "seed": 0,
         "captured": 0.8 if k == 0 else 0.95, "masked_isotropic": w - 0.5, "masked_last": 5 + k,
         "visible_R": 1.0, "masked_R": 0.5, "log_posterior_rank": 5.1 + k,
         **{r: 1 + RNG.random() for r in RIVALS}}
        for k in range(9)
        for w in (16, 48)
    ]  # fmt: skip
    return [{**row, "xi": row["xi"]} for row in rows]


def test_relevance_draws_every_trained_run_and_every_predictor(study):
    folder = study("sweep", {"table": cells()})
    figure = plot_relevance(folder)
    left, right = figure.axes
    drawn = sum(len(line.get_xdata()) for line in left.lines if line.get_linestyle() == "None")
    assert drawn == 16
    assert [line.get_ydata()[0] for line in left.lines[-2:]] == [15.5, 47.5]
    names = [label.get_text() for label in right.get_yticklabels()]
    assert names == ["y = x", "log_posterior_rank, fitted", *RIVALS, "mean"]


def test_the_relevance_page_has_the_verdict_its_predictors_and_every_run(study):
    table = cells()
    test = relevance_test(pd.DataFrame(table), draws=50).to_dict()
    test = json.loads(json.dumps(test).replace("NaN", "null"))
    page = page_of(study("sweep", {"table": table}, test))
    assert f">{test['status']}</span>" in page
    assert NASTY not in page
    assert page.count("<script") == 2
    for name in RIVALS:
        assert f">{name}</td>" in page
    # R against ξ (two panels a width), R and the rank against the posterior's (three), one line y = x each.
    assert sum("seed 0" in str(point[-1]) for point in points(page)) == 5 * len(table)


def test_xi_draws_means_of_trained_runs(study):
    rows = [
        {
            "chain": "lazy",
            "width": 16,
            "xi": xi,
            "seed": seed,
            "captured": 0.95 if seed else 0.5,
            "visible_R": xi + seed,
            "masked_R": 1.0,
            "masked_last": 5.0,
            "log_posterior_rank": 4.0 + seed,
        }
        for xi in (1.0, 7.0)
        for seed in range(3)
    ]
    folder = study("sweep", {"table": rows})
    colour = kind_colours(["lazy"])["lazy"]
    axes = plot_xi(folder).axes[0]
    mean = next(line for line in lines(axes, colour) if line.get_linestyle() == "-")
    np.testing.assert_allclose(mean.get_ydata(), [2.5, 8.5])
    assert "steps" in axes.get_xlabel()
    masked = plot_xi(folder).axes[1]  # on one scale, with its own label
    assert masked.get_ylim() == axes.get_ylim()
    assert masked.get_ylabel() == "R: last over first layer, masked rows"
    against = plot_posterior_rank(folder).axes
    assert len(against) == 3
    open_points = [line for line in lines(against[0], colour) if line.get_fillstyle() == "none"]
    assert [list(line.get_xdata()) for line in open_points] == [[4.0, 4.0]]


def universe():
    values = [0.3, 0.1, 0.2]
    table = {
        "default": [True, False, False], "trained": True, "norm": ["layer", "rms", "rms"],
        "captured_short": 0.95, "captured_long": 0.96,
        "e": values, "e_low": [0.2, 0.0, 0.1], "e_high": [0.4, 0.2, 0.3],
    }  # fmt: skip
    views = {"measure": "effective_rank", "view": ["visible"], "trained": True, "R_short": 0.5, "R_long": 1.0}
    part = {
        "what": "an effect <1>", "bar": 0.15, "reaches_bar": 2, "interval_above_zero": None, "median": 0.2,
        "lowest": 0.1, "highest": 0.3, "default": 0.3, "option_moves_it_by": {"norm": {"rms": -0.15}},
    }  # fmt: skip
    summary = {
        "format": "rgfast.multiverse/1",
        "setups": 3,
        "trained": 3,
        "intervals_over": "seeds",
        "e": part,
    }
    return {"table": table, "views": views}, summary, {"options": [["norm", ["layer", "rms"]]]}


def test_multiverse_sorts_and_marks_the_default(study):
    tables, summary, design = universe()
    curve, dots = plot_multiverse(study("multiverse", tables, summary, **design)).axes
    star = next(line for line in curve.lines if line.get_marker() == "*")
    assert (star.get_xdata().tolist(), star.get_ydata().tolist()) == ([2], [0.3])
    # The two set-ups with the other norm come first.
    assert dots.lines[0].get_xdata().tolist() == [0, 1]


def test_the_multiverse_page_has_the_robustness_table(study):
    tables, summary, design = universe()
    page = page_of(study("multiverse", tables, summary, **design))
    for words in ("an effect &lt;1&gt;", "2 of 3", "no intervals", "rms: −0.15", "1 of 1", "over seeds"):
        assert words in page
    assert {tuple(point[:2]) for point in points(page)} == {(0, 0.1), (1, 0.2), (2, 0.3)}
    assert any("norm: layer" in point[4] for point in points(page))


def spaced():
    names = (
        "R_visible", "R_masked", "slow_visible", "fast_visible", "total_drift_visible",
        "total_drift_masked", "final_rank_masked", "log_posterior_rank", "masked_isotropic",
    )  # fmt: skip
    return [
        {"stage": stage, "arm": arm, "spacing": k, "seed": s, **dict.fromkeys(names, k + s)}
        for stage in ("trained", "control_iid")
        for arm in ("grid", "block")
        for k in (1, 3)
        for s in (0, 1)
    ]


def test_decimation_draws_the_mean_of_each_arm(study):
    figure = plot_decimation(study("decimation", {"table": spaced()}, {}, base={"xi": [7.0]}))
    grid = next(
        line for line in lines(figure.axes[0], VIEW_COLOURS["visible"]) if line.get_linestyle() == "-"
    )
    np.testing.assert_allclose(grid.get_ydata(), [1.5, 3.5])
    assert "ξ = 7/k" in figure.axes[0].get_xlabel()
    assert lines(figure.axes[0], LIGHT)
    baseline = next(line for line in figure.axes[3].lines if line.get_label() == "isotropic, same n")
    np.testing.assert_allclose(baseline.get_ydata(), [1.5, 3.5])


def test_the_decimation_page_has_slopes_with_intervals(study):
    slope = {"mean": -0.19, "low": -0.21, "high": -0.17, "n": 5}
    few = {"mean": 0.5, "low": None, "high": None, "n": 2}
    summary = {"slopes_against_ln_k": {"grid": {"R_masked": slope}, "block": {"R_masked": few}}}
    page = page_of(study("decimation", {"table": spaced()}, summary, base={"xi": [7.0]}))
    assert "−0.19 [−0.21, −0.17]" in page
    assert "0.5 (n = 2, no interval below five seeds)" in page


def ridge_study(study):
    rows = [
        {"stage": stage, "xi": 7.0, "seed": 0, "layer": layer, "radius": w,
         "cka": math.nan if stage == "untrained" or layer == 0 else 0.5}
        for stage in ("trained", "untrained")
        for layer in range(3)
        for w in (1, 2, 8)
    ]  # fmt: skip
    ridge = [{"stage": "trained", "xi": 7.0, "seed": 0, "layer": layer, "radius": 2.0} for layer in (1, 2)]
    slopes = [{"stage": "trained", "xi": 7.0, "mean": 0.1, "low": math.nan, "high": math.nan, "n": 1}]
    tables = {"table": rows, "ridges": ridge, "slopes": slopes}
    return study("observer", tables, {"captured": {"xi7-seed0": 0.97}})


def test_observer_leaves_out_what_is_nowhere_defined(study):
    figure = plot_observer(ridge_study(study))
    panels = [axes for axes in figure.axes if axes.get_title()]
    assert [axes.get_title() for axes in panels] == ["trained, ξ = 7  (1 seed)"]
    np.testing.assert_array_equal(panels[0].lines[0].get_ydata(), [np.nan, 1.0, 1.0])


def test_the_observer_page_has_slopes_and_the_ridge(study):
    page = page_of(ridge_study(study))
    assert "0.1 (n = 1, no interval below five seeds)" in page
    assert "0.97" in page
    assert [point[:2] for point in points(page)] == [[0, None], [1, 1], [2, 1]]


def setups_study(study):
    """Two set-ups, of which one has runs: seeds 0 and 1 at the short ξ, 0 at the long one."""
    runs = [(1.2, 0), (1.2, 1), (6.7, 0)]
    curves = [
        {"part": "a", "arm": NASTY, "xi": xi, "seed": seed, "stage": stage, "measure": measure, "view": view,
         "layer": layer, "value": 0.0 if view == "masked" else 10.0 + seed - layer * (stage == "trained")}
        for xi, seed in runs
        for stage in ("trained", "untrained")
        for measure in ("effective_rank", "kernel_drift")
        for view in ("position", "masked")
        for layer in range(3)
    ]  # fmt: skip
    table = [{"part": "a", "arm": NASTY, "xi": xi, "seed": seed, "states": 16} for xi, seed in runs]
    answers = {
        name: {"status": "not reproduced", "summary": f"numbers of {name}"}
        for name in ("neighbors", "lifted", "i", "ii", "iii", "null")
    }
    gap, none = {"mean": -0.01, "low": None, "high": None, "n": 1}, {"mean": None, "n": 0}
    arms = [
        {"part": "a", "arm": NASTY, "seeds": [0], "missing": 7, "answers": answers,
         "gaps": {"position": gap}},
        {"part": "d", "arm": "mixer", "seeds": [], "missing": 4, "answers": answers,
         "gaps": {"position": none}},
    ]  # fmt: skip
    return study("setups", {"table": table, "curves": curves}, {"arms": arms}, xi=[1.2, 6.7])


def test_setups_draws_a_panel_per_set_up_with_runs(study):
    axes, gaps = plot_setups(setups_study(study)).axes
    short, long = xi_colours([1.2, 6.7]).values()
    mean = next(line for line in lines(axes, short) if line.get_linestyle() == "-")
    np.testing.assert_allclose(mean.get_ydata(), [10.5, 9.5, 8.5])
    masked = next(line for line in lines(axes, long) if line.get_linestyle() == "--")
    np.testing.assert_allclose(masked.get_xdata(), [1, 2])
    untrained = next(line for line in lines(axes, long) if line.get_linestyle() == ":")
    np.testing.assert_allclose(untrained.get_ydata(), [10, 10, 10])
    assert any(list(line.get_ydata()) == [16, 16] for line in axes.lines)
    assert "R(6.7) − R(1.2) = −0.010 (n = 1)" in axes.get_title()
    assert [label.get_text() for label in gaps.get_xticklabels()] == ["position"]
    assert -0.01 in [y for line in gaps.lines for y in line.get_ydata()]
    assert not gaps.collections  # one seed has no interval, not one of length 0
    assert "2 at ξ = 1.2, 1 at ξ = 6.7" in axes.get_xlabel()


def test_the_setups_page_says_what_is_missing(study):
    page = page_of(setups_study(study))
    assert NASTY not in page
    assert "3 runs at ξ = 1.2 and 6.7, 11 more not run yet" in page
    for words in ("no seed with both ξ yet", "numbers of null", "the gap is 0: an exact null", "d) mixer"):
        assert words in page
    assert page.count('class="verdict bad">not reproduced') == 2 * (5 + 6)


def test_another_kind_of_study_and_an_unfinished_one_are_refused(study):
    folder = study("decimation", {"table": spaced()}, {}, base={"xi": [7.0]})
    with pytest.raises(
        TypeError, match="source must be a sweep, what it returned or its folder, got a decimation"
    ):
        plot_xi(folder)
    (folder / "table.csv").unlink()
    with pytest.raises(ValueError, match=r"has no table\.csv yet"):
        plot_decimation(folder)
