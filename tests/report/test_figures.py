import matplotlib as mpl
import numpy as np
import pytest
import xarray as xr
from matplotlib.figure import Figure

import rgfast
from rgfast.flow import drift_shape
from rgfast.report import figures
from rgfast.report.experiment_charts import experiment_charts
from rgfast.report.figures import (
    plot_cka,
    plot_drift,
    plot_heat_map,
    plot_order_parameter,
    plot_posterior_rank,
    plot_spectra,
    plot_survival,
    plot_training,
    plot_xi,
    save_figure,
)
from rgfast.report.palette import CONTROLS, VIEW_COLOURS, xi_colours

VIEWS = ["visible", "masked"]
STAGES = ["trained", *CONTROLS, "untrained"]
COLOURS = xi_colours([1.0, 7.0])
BY_DEPTH = (plot_order_parameter, plot_heat_map, plot_drift, plot_cka, plot_spectra, plot_survival)


@pytest.fixture
def result():
    rng = np.random.default_rng(0)
    shape = (1, 2, 3, len(STAGES), len(VIEWS))
    rank = 5 + rng.random((*shape, 8))
    drift = 0.5 ** np.arange(7) * (1 + 0.2 * rng.random((*shape, 7)))
    rank[..., 1, 0], drift[..., 1, 0] = 0, np.nan
    dims = ("chain", "xi", "seed", "stage", "view")
    return xr.Dataset(
        {
            "effective_rank": ((*dims, "layer"), rank),
            "kernel_drift": ((*dims, "transition"), drift),
            "effective_rank_baseline": ("view", [7.5, 7.0]),
            "n": ("view", [1638, 410]),
        },
        coords={
            "chain": ["two-scale"],
            "xi": [1.0, 7.0],
            "seed": [0, 1, 2],
            "stage": STAGES,
            "view": VIEWS,
            "layer": np.arange(8),
            "transition": np.arange(7),
        },
    )


def lines(axes, colour):
    return [line for line in axes.lines if mpl.colors.same_color(line.get_color(), colour)]


def labels(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_order_parameter_draws_means_seeds_and_controls(result):
    figure = plot_order_parameter(result)
    for axes, view in zip(figure.axes, VIEWS, strict=True):
        first = 0 if view == "visible" else 1
        for xi, colour in COLOURS.items():
            mean, *seeds = lines(axes, colour)
            truth = result.effective_rank.sel(xi=xi, stage="trained", view=view, chain="two-scale")
            np.testing.assert_allclose(mean.get_ydata(), truth.mean("seed").values[first:])
            assert len(seeds) == 3
        assert any("i.i.d." in label for label in labels(axes))
        assert axes.get_xlabel().startswith("layer")
        assert f"n = {int(result.n.sel(view=view))} rows per position, 3 seeds" in axes.get_xlabel()
        baseline = next(line for line in axes.lines if line.get_label() == "isotropic, same n")
        assert baseline.get_ydata()[0] == result.effective_rank_baseline.sel(view=view)
    assert figure.axes[0].get_ylabel() == "effective rank (dimensions)"


def test_drift_is_logarithmic_starts_where_it_is_defined_and_has_both_fits(result):
    visible, masked = plot_drift(result).axes
    assert visible.get_yscale() == masked.get_yscale() == "log"
    assert lines(visible, COLOURS[1.0])[0].get_xdata()[0] == 0
    assert lines(masked, COLOURS[1.0])[0].get_xdata()[0] == 1
    mean = result.kernel_drift.sel(chain="two-scale", xi=1.0, stage="trained", view="visible").mean("seed")
    shape = drift_shape(mean.values)
    decay, step = lines(visible, COLOURS[1.0])[-2:]
    np.testing.assert_allclose(np.diff(np.log(decay.get_ydata())), np.log(shape.decay_rate))
    residual = np.log(mean.values) - np.log(decay.get_ydata())
    assert float((residual**2).sum()) == pytest.approx(shape.decay_rss)
    assert set(step.get_ydata()) == {shape.step_high, shape.step_low}
    assert shape.word == "geometric decay"
    assert next(label for label in labels(visible) if "better by BIC" in label).startswith("decay")
    assert f"at {shape.step_at[0]}→{shape.step_at[0] + 1}" in " ".join(labels(visible))


def test_a_drift_without_evidence_for_a_shape_has_no_fits(result):
    result.kernel_drift[:] = 0.01
    visible, _ = plot_drift(result).axes
    assert not any("better by BIC" in label or "decay" in label for label in labels(visible))
    five = plot_drift(result.isel(layer=slice(6), transition=slice(5))).axes[0]
    assert not any("decay" in label for label in labels(five))


def test_a_stack_that_does_not_move_still_has_a_figure(result, tmp_path):
    result.kernel_drift[:] = 0.0
    save_figure(plot_drift(result), tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 0


def test_a_stack_of_one_block_has_no_masked_drift_and_still_a_figure(result):
    visible, masked = plot_drift(result.isel(layer=[0, 1], transition=[0])).axes
    assert lines(visible, COLOURS[1.0])
    assert not masked.lines


def test_save_figure_writes_a_png(result, tmp_path):
    save_figure(plot_order_parameter(result), tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_survival_draws_the_slowest_and_the_fastest_mode(result):
    values = np.random.default_rng(1).random((1, 2, 3, len(STAGES), 2, 3, 8))
    # The third mode belongs to another chain of the same result.
    values[..., 2, :] = np.nan
    dims = ("chain", "xi", "seed", "stage", "process", "mode", "layer")
    result = result.assign_coords(process=VIEWS, mode=[0, 1, 2]).assign(survival=(dims, values))
    figure = plot_survival(result)
    for k, axes in enumerate(figure.axes):
        slow, *_ = lines(axes, COLOURS[7.0])
        np.testing.assert_allclose(slow.get_ydata(), values[0, 1, :, 0, k, 0].mean(0))
        dashed = [line for line in lines(axes, COLOURS[7.0]) if line.get_linestyle() == "--"]
        np.testing.assert_allclose(dashed[0].get_ydata(), values[0, 1, :, 0, k, 1].mean(0))
    mean = values[0, 0, :, 1, 0, 1, -1].mean()
    assert f"trained on i.i.d. tokens (ξ = 1), fastest mode  (ends at {mean:.2f})" in labels(figure.axes[0])


def test_the_caption_of_survival_says_what_its_numbers_belong_to(finished):
    (chart,) = (c for c in experiment_charts(finished.dataset, "two-scale") if c.title == "Mode survival")
    kept = finished.dataset.survival.sel(
        chain="two-scale", xi=7.0, stage="trained", process="visible", mode=0
    )
    last = kept.isel(layer=-1).values
    told = f"{last.mean():.2f} ({last.min():.2f} to {last.max():.2f}) at ξ = 7"
    assert told in chart.caption
    assert "this run (5 blocks, 60 training steps, 2 seeds)" in chart.caption


def test_controls_differ_in_color_dash_and_marker():
    colors, dashes, markers, words = zip(*CONTROLS.values(), strict=True)
    assert all(len(set(each)) == len(CONTROLS) for each in (dashes, markers, words))
    one, other = (np.array(mpl.colors.to_rgb(color)) for color in colors)
    assert np.linalg.norm(one - other) > 0.3


def test_the_heat_map_has_every_layer_and_position(finished):
    figure = plot_heat_map(finished, views=["masked"])
    panels = [axes for axes in figure.axes if axes.get_title()]
    for axes, xi in zip(panels, (1.0, 7.0), strict=True):
        part = finished.dataset.effective_rank_by_position.sel(
            chain="two-scale", xi=xi, stage="trained", positional_view="masked"
        )
        drawn = np.ma.filled(axes.images[0].get_array(), np.nan)
        np.testing.assert_allclose(drawn[1:], part.mean("seed").values[1:])
        assert np.isnan(drawn[0]).all()  # constant at the input: no rank, no colour
        assert axes.get_xlabel() == "position"
    assert figure.axes[-1].get_ylabel() == "effective rank (dimensions)"


def test_training_curves_stand_over_the_bayes_line(finished):
    loss, captured = plot_training(finished).axes
    data = finished.dataset.sel(chain="two-scale", stage="trained")
    for xi, colour in COLOURS.items():
        mean, *_, bayes = lines(loss, colour)
        np.testing.assert_allclose(mean.get_ydata(), data.training_evaluation_loss.sel(xi=xi).mean("seed"))
        np.testing.assert_array_equal(mean.get_xdata(), data.step)
        assert bayes.get_linestyle() == "--"
        assert bayes.get_ydata()[0] == pytest.approx(float(data.bayes_loss.sel(xi=xi).mean()))
        assert bayes.get_ydata()[0] < min(mean.get_ydata())
        np.testing.assert_allclose(
            lines(captured, colour)[0].get_ydata(), data.training_captured.sel(xi=xi).mean("seed")
        )
    assert loss.get_ylabel() == "loss (nats per hidden token)"


def test_an_older_result_has_the_training_loss_alone(finished):
    lost = ["training_evaluation_loss", "bayes_loss", "stationary_loss"]
    loss, _ = plot_training(finished.dataset.drop_vars(lost)).axes
    mean = lines(loss, COLOURS[1.0])[0]
    data = finished.dataset.training_loss.sel(chain="two-scale", stage="trained", xi=1.0)
    np.testing.assert_allclose(mean.get_ydata(), data.mean("seed"))
    with pytest.raises(ValueError, match="source must hold 'cka' for the CKA of layers"):
        plot_cka(finished.dataset.drop_vars("cka"))


def test_spectra_and_cka_of_a_reproduction_are_means_over_seeds(finished):
    part = finished.dataset.sel(chain="two-scale", xi=1.0, stage="trained")
    last = plot_spectra(finished, views=["visible"]).axes[0].lines[-1]
    truth = part.relative_spectrum.sel(positional_view="visible").mean("seed").values[-1]
    np.testing.assert_allclose(last.get_ydata()[truth > 1e-6], truth[truth > 1e-6])
    drawn = plot_cka(finished, views=["visible"]).axes[0].images[0].get_array()
    np.testing.assert_allclose(drawn, part.cka.sel(process="visible").mean("seed"))


def test_ratios_of_a_reproduction_are_those_of_its_verdicts(finished):
    axes = plot_xi(finished).axes[0]
    ranks = finished.dataset.effective_rank.sel(stage="trained", view="visible", chain="two-scale")
    ratios = (ranks.isel(layer=-1) / ranks.isel(layer=0)).sel(xi=1.0).values
    runs = [line for line in axes.lines if line.get_marker() == "o"]
    drawn = np.concatenate([np.asarray(line.get_ydata())[line.get_xdata() == 1.0] for line in runs])
    assert sorted(drawn) == pytest.approx(sorted(ratios))
    last = plot_posterior_rank(finished).axes[2]
    drawn = sorted(y for line in last.lines if line.get_marker() == "o" for y in line.get_ydata())
    masked = finished.dataset.effective_rank.sel(stage="trained", view="masked").isel(layer=-1).values
    assert drawn == pytest.approx(sorted(masked.ravel()))


@pytest.mark.parametrize("draw", BY_DEPTH)
def test_every_figure_by_depth_takes_a_folder_a_result_and_axes(draw, finished, tmp_path):
    whole = draw(finished)
    assert isinstance(whole, Figure)
    panels = len([axes for axes in draw(finished.out).axes if axes.get_title()])
    own = Figure()
    grid = list(np.ravel(own.subplots(1, panels)))
    assert draw(finished, chain="two-scale", ax=grid) is own
    assert all(axes.has_data() for axes in grid)
    with pytest.raises(ValueError, match=f"ax must be {panels} axes, one per panel, got {panels + 1}"):
        draw(finished, ax=[*grid, grid[0]])
    with pytest.raises(ValueError, match=r"chain must be one of two-scale, got 'no'"):
        draw(finished, chain="no")
    with pytest.raises(ValueError, match=r"views must be among visible, masked, got 'no'"):
        draw(finished, views=["no"])
    save_figure(whole, tmp_path / "a.png")


@pytest.mark.parametrize("draw", BY_DEPTH[:-1])
def test_every_figure_by_depth_takes_a_probe(draw, probed, tmp_path):
    probed.save(tmp_path / "run.nc", moments=False)
    save_figure(draw(tmp_path / "run.nc"), tmp_path / "a.png")
    figure = draw(probed, views=["masked"])
    own = Figure()
    assert draw(probed, views=["masked"], ax=own.subplots()) is own
    assert figure.axes[0].has_data()


def test_views_keep_their_colour_and_say_their_count(probed):
    axes = plot_order_parameter(probed).axes[0]
    for view in ("visible", "masked", "pooled"):
        label = next(label for label in labels(axes) if label.startswith(view))
        assert "(n = " in label
        assert lines(axes, VIEW_COLOURS[view])
    drawn = plot_drift(probed, views=["pooled"]).axes[0]
    assert not any("BIC" in label for label in labels(drawn))  # five transitions are too few for a shape


def test_a_probe_with_targets_has_a_figure_of_them_and_one_without_says_so(probed):
    import torch

    x = torch.randn(100, 3, 4, generator=torch.Generator().manual_seed(0))
    stack = rgfast.ResidualStack(4, 2, mixing="none")
    found = rgfast.probe(stack, x, targets={"sum": x.sum(-1)}, groups=2, progress=False)
    line = plot_survival(found, views=["position"]).axes[0].lines[0]
    np.testing.assert_allclose(line.get_ydata(), found.target_r2("sum", "position"))
    with pytest.raises(ValueError, match="source must have been probed with targets"):
        plot_survival(probed)
    with pytest.raises(TypeError, match="source must be a reproduction for training curves, got a probe"):
        plot_training(probed)


def test_lengths_keep_their_colour_unless_two_would_look_alike():
    alone = xi_colours([1.0, 7.0])
    assert xi_colours([1.0, 3.0, 7.0])[7.0] == alone[7.0]
    near = xi_colours([1.0, 1.1])
    apart = [np.array(mpl.colors.to_rgb(colour)) for colour in near.values()]
    assert np.linalg.norm(apart[0] - apart[1]) > 0.3


def test_every_figure_is_public_and_documented():
    for name in figures.__all__:
        assert getattr(figures, name).__doc__, name
