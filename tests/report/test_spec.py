"""One specification of a figure: what it says to a page, and that matplotlib draws the same numbers."""

import numpy as np
import pytest
from matplotlib import pyplot as plt
from matplotlib.backends.backend_agg import FigureCanvasAgg

from rgfast.report.canvas import draw_chart
from rgfast.report.experiment_charts import experiment_charts
from rgfast.report.parts import transition_axis
from rgfast.report.probe_charts import probe_charts
from rgfast.report.spec import Axis, Chart, Panel, Rule, Series, as_json, heat_panel

X = np.arange(3.0)
LAYER, VALUE = Axis("layer"), Axis("value", "value (units)", low=0)


def panel(*series, y=VALUE, **more):
    return Panel(LAYER, y, series=series, **more)


def chart(*panels, **more):
    return Chart("title", "caption", panels, **more)


def drawn_numbers(axes):
    """Every finite value of every line, in order of size."""
    values = [np.asarray(line.get_ydata(), float) for line in axes.lines]
    return np.sort(np.concatenate([v[np.isfinite(v)] for v in values])) if values else np.array([])


def test_a_page_gets_points_with_ends_and_words():
    y = np.array([1.0, np.nan, 3.0])
    series = Series(
        "a", X, y, "#123456", low=y - 1, high=y + 1, texts=("p", "q", "r"), note="R = 1", facts=("f",)
    )
    found = as_json(panel(series, rules=(Rule("bar", 2.0, ":"),), title="t"))
    (one,) = found["series"]
    assert one["points"][0] == [0.0, 1.0, 0.0, 2.0, "p"]
    assert np.isnan(one["points"][1][1])
    assert (one["facts"], one["spread"], one["line"]) == (["R = 1", "f"], "interval", True)
    assert "dash" not in one
    assert "open" not in one
    assert found["rules"] == [{"name": "bar", "y": 2.0, "dash": "2 3", "color": "ink"}]
    assert found["y"] == {"name": "value", "label": "value (units)", "low": 0}
    assert found["x"] == {"name": "layer", "label": "layer"}


def test_words_without_ends_stay_the_fifth_entry_of_a_point():
    found = as_json(panel(Series("a", X, X, "ink", line=False, texts=("p", "q", "r"))))
    assert found["series"][0]["points"][1] == [1.0, 1.0, None, None, "q"]
    assert "line" not in found["series"][0]


def test_members_are_a_second_series_of_points_unless_there_is_one_alone():
    curves = np.array([[1.0, 2.0, 3.0], [3.0, 4.0, 5.0]])
    series = Series("a", X, curves.mean(0), "#123456", members=curves, each=("seed 0", "seed 7"))
    mean, members = as_json(panel(series))["series"]
    assert [point[1] for point in mean["points"]] == [2.0, 3.0, 4.0]
    assert [point[1] for point in members["points"]] == [1.0, 2.0, 3.0, 3.0, 4.0, 5.0]
    assert [point[4] for point in members["points"]] == ["seed 0"] * 3 + ["seed 7"] * 3
    assert members["faint"]
    alone = Series("a", X, curves[0], "#123456", members=curves[:1], each=("seed 0",))
    assert len(as_json(panel(alone))["series"]) == 1
    (axes,) = draw_chart(chart(panel(series))).axes
    np.testing.assert_array_equal(drawn_numbers(axes), np.sort([2, 3, 4, 1, 2, 3, 3, 4, 5]))


def test_limits_of_a_heat_map_are_those_of_the_finite_values():
    heat = heat_panel(np.array([[1.0, np.nan], [4.0, 2.0]]), name="v", x=("p", [0, 1]), y=("l", [0, 1])).heat
    assert (heat.low, heat.high) == (1.0, 4.0)
    nothing = heat_panel(np.full((1, 1), np.nan), name="v", x=("p", [0]), y=("l", [0])).heat
    assert (nothing.low, nothing.high) == (0.0, 1.0)


def test_shared_axes_show_every_value_of_every_panel():
    low, high = (Series("a", X, np.array(values), "ink") for values in ([0.1, 0.2, 0.3], [-2.0, 0.0, 9.0]))
    y = Axis("R²", low=-0.1, high=1.0)
    left, right = draw_chart(chart(panel(low, y=y), panel(high, y=y), shared="y")).axes
    assert left.get_ylim() == right.get_ylim()
    assert left.get_ylim()[0] <= -2.0
    assert left.get_ylim()[1] >= 9.0
    (alone,) = draw_chart(chart(panel(low, y=y))).axes
    assert alone.get_ylim() == (-0.1, 1.0)


def test_a_logarithm_leaves_out_what_is_not_positive_and_needs_a_value():
    y = Axis("drift", log=True)
    (axes,) = draw_chart(chart(panel(Series("a", X, np.array([0.0, 1.0, 10.0]), "ink"), y=y))).axes
    assert axes.get_yscale() == "log"
    np.testing.assert_array_equal(axes.lines[0].get_ydata(), [np.nan, 1.0, 10.0])
    (empty,) = draw_chart(chart(panel(Series("a", X, np.zeros(3), "ink"), y=y))).axes
    assert empty.get_yscale() == "linear"
    assert not empty.lines


def test_a_group_has_one_entry_and_a_nameless_rule_none():
    series = [Series(f"a{k}", X, X + k, "ink", group="all", note="n = 3") for k in range(3)]
    (axes,) = draw_chart(chart(panel(*series, rules=(Rule("", 0.0), Rule("bar", 1.0))))).axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["all  (n = 3)", "bar"]


def test_error_bars_keep_both_ends():
    y = np.array([1.0, 2.0, 4.0])
    series = Series("a", X, y, "ink", low=y - 0.5, high=y + np.array([1.0, 0.0, 2.0]))
    (axes,) = draw_chart(chart(panel(series))).axes
    (bars,) = axes.collections
    ends = [[low, high] for (_, low), (_, high) in bars.get_segments()]
    np.testing.assert_allclose(ends, [[0.5, 2.0], [1.5, 2.0], [3.5, 6.0]])


def charts_of(finished, probed):
    return [*experiment_charts(finished.dataset, "two-scale"), *probe_charts(probed)]


def test_a_file_and_a_page_show_the_same_numbers(finished, probed):
    charts = charts_of(finished, probed)
    assert len(charts) == 13
    for one in charts:
        figure = draw_chart(one)
        axes = [each for each in figure.axes if each.get_label() != "<colorbar>"]
        for panel, drawn in zip(one.panels, axes, strict=True):
            page = as_json(panel)
            assert drawn.get_ylabel() in ("", page["y"]["label"])
            if panel.heat is not None:
                np.testing.assert_array_equal(
                    np.ma.filled(drawn.images[0].get_array(), np.nan), page["heat"]["values"]
                )
                assert drawn.images[0].get_clim() == (page["heat"]["low"], page["heat"]["high"])
                continue
            points = np.array([point[1] for series in page["series"] for point in series["points"]])
            usable = points[np.isfinite(points) & (points > (0 if panel.y.log else -np.inf))]
            rules = [rule["y"] for rule in page["rules"] for _ in range(2)]
            caps = [
                end
                for series in panel.series
                if series.low is not None
                for end in (*series.low, *series.high)
            ]
            expected = np.sort([*usable, *rules, *caps])
            np.testing.assert_allclose(drawn_numbers(drawn), expected, rtol=1e-12)
        plt.close("all")


@pytest.mark.parametrize("legend", ["each", "right", "none"])
def test_a_legend_is_where_the_chart_has_it(legend):
    series = Series("a", X, X, "ink")
    figure = draw_chart(chart(panel(series), panel(series), legend=legend))
    own = [axes.get_legend() is not None for axes in figure.axes]
    assert (own, len(figure.legends)) == ([legend == "each"] * 2, int(legend == "right"))


def boxes(figure):
    """Draws the figure; the boxes of titles, of labels and ticks below the axes, and of legends, by axes."""
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    shown = [axes for axes in figure.axes if axes.get_label() != "<colorbar>"]
    titles = [axes.title.get_window_extent(renderer) for axes in shown]
    below = [axes.xaxis.get_tightbbox(renderer) for axes in shown]
    legends = [axes.get_legend() and axes.get_legend().get_window_extent(renderer) for axes in shown]
    return shown, titles, below, legends


def test_neither_titles_nor_legends_of_a_file_cover_anything(finished, probed):
    for one in charts_of(finished, probed):
        figure = draw_chart(one)
        FigureCanvasAgg(figure)
        shown, titles, below, legends = boxes(figure)
        whole = [axes.bbox for axes in shown]
        for k, title in enumerate(titles):
            if one.panels[k].title:
                assert not any(title.overlaps(other) for other in titles[:k])
                assert not any(title.overlaps(box) for box in whole), one.title
        for own in filter(None, legends + [each.get_window_extent() for each in figure.legends]):
            assert not any(own.overlaps(box) for box in [*whole, *filter(None, below)]), one.title
            assert figure.bbox.x0 <= own.x0 < own.x1 <= figure.bbox.x1, one.title
            assert figure.bbox.y0 <= own.y0 < own.y1 <= figure.bbox.y1, one.title
        plt.close("all")


@pytest.mark.parametrize("layers", [4, 40])
def test_a_legend_lies_under_turned_labels_too(layers):
    drift = Series("drift of a view with a long name", np.arange(float(layers)), np.ones(layers), "ink")
    axis = transition_axis(layers)
    figure = draw_chart(chart(Panel(axis, VALUE, series=(drift,), note="n = 100 rows per position, 3 seeds")))
    FigureCanvasAgg(figure)
    (axes,), _, (below,), (legend,) = boxes(figure)
    assert bool(axes.get_xticklabels()[0].get_rotation()) == (layers == 40)
    assert not legend.overlaps(below)
    assert legend.y0 >= figure.bbox.y0


def test_a_panel_in_the_last_row_has_tick_labels_if_the_row_is_short():
    panels = [panel(Series("a", X, X + k, "ink")) for k in range(3)]
    axes = draw_chart(chart(*panels, columns=2, shared="xy")).axes
    assert [one.xaxis.get_tick_params()["labelbottom"] for one in axes] == [False, True, True]
