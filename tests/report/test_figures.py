import matplotlib as mpl
import numpy as np
import pytest
import xarray as xr

from rgfast.report.figures import (
    COLOURS,
    CONTROLS,
    plot_drift_by_transition,
    plot_order_parameter,
    plot_survival,
    save_figure,
)

VIEWS = ["visible", "masked"]
STAGES = ["trained", *CONTROLS, "untrained"]


@pytest.fixture
def result():
    rng = np.random.default_rng(0)
    shape = (1, 2, 3, len(STAGES), len(VIEWS))
    rank = 5 + rng.random((*shape, 5))
    drift = rng.random((*shape, 4))
    rank[..., 1, 0], drift[..., 1, 0] = 0, np.nan
    dims = ("chain", "xi", "seed", "stage", "view")
    return xr.Dataset(
        {
            "effective_rank": ((*dims, "layer"), rank),
            "kernel_drift": ((*dims, "transition"), drift),
            "effective_rank_baseline": ("view", [7.5, 7.0]),
        },
        coords={
            "chain": ["two-scale"],
            "xi": [1.0, 7.0],
            "seed": [0, 1, 2],
            "stage": STAGES,
            "view": VIEWS,
            "layer": np.arange(5),
            "transition": np.arange(4),
        },
    )


def lines(axes, colour):
    return [line for line in axes.lines if mpl.colors.same_color(line.get_color(), colour)]


def test_order_parameter_draws_means_seeds_and_controls(result):
    figure = plot_order_parameter(result, "two-scale")
    for axes, view in zip(figure.axes, VIEWS, strict=True):
        first = 0 if view == "visible" else 1
        for xi, colour in zip((1.0, 7.0), COLOURS, strict=False):
            mean, *seeds = lines(axes, colour)
            truth = result.effective_rank.sel(xi=xi, stage="trained", view=view, chain="two-scale")
            np.testing.assert_allclose(mean.get_ydata(), truth.mean("seed").values[first:])
            assert len(seeds) == 3
        labels = [text.get_text() for text in axes.get_legend().get_texts()]
        assert any("i.i.d." in label for label in labels)
        assert axes.get_xlabel().startswith("layer")
        baseline = next(line for line in axes.lines if line.get_label() == "isotropic, same n")
        assert baseline.get_ydata()[0] == result.effective_rank_baseline.sel(view=view)
    assert figure.axes[0].get_ylabel() == "effective rank (dimensions)"


def test_drift_is_logarithmic_and_starts_where_it_is_defined(result):
    figure = plot_drift_by_transition(result, "two-scale")
    visible, masked = figure.axes
    assert visible.get_yscale() == masked.get_yscale() == "log"
    assert lines(visible, COLOURS[0])[0].get_xdata()[0] == 0
    assert lines(masked, COLOURS[0])[0].get_xdata()[0] == 1


def test_a_stack_that_does_not_move_still_has_a_figure(result, tmp_path):
    result.kernel_drift[:] = 0.0
    save_figure(plot_drift_by_transition(result, "two-scale"), tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 0


def test_save_figure_writes_a_png(result, tmp_path):
    save_figure(plot_order_parameter(result, "two-scale"), tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_survival_draws_the_slowest_and_the_fastest_mode(result):
    values = np.random.default_rng(1).random((1, 2, 3, len(STAGES), 2, 3, 5))
    # The third mode belongs to another chain of the same result.
    values[..., 2, :] = np.nan
    dims = ("chain", "xi", "seed", "stage", "process", "mode", "layer")
    result = result.assign_coords(process=VIEWS, mode=[0, 1, 2]).assign(survival=(dims, values))
    figure = plot_survival(result, "two-scale")
    for k, axes in enumerate(figure.axes):
        slow, *_ = lines(axes, COLOURS[1])
        np.testing.assert_allclose(slow.get_ydata(), values[0, 1, :, 0, k, 0].mean(0))
        dashed = [line for line in lines(axes, COLOURS[1]) if line.get_linestyle() == "--"]
        np.testing.assert_allclose(dashed[0].get_ydata(), values[0, 1, :, 0, k, 1].mean(0))
    labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert "i.i.d. control (ξ = 1), fastest mode" in labels
