"""The result object: saving, refusing, long form, pictures, notebook form."""

import json

import h5py
import matplotlib as mpl
import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt

import rgfast

mpl.use("agg")


@pytest.fixture
def result(token_model, token_data):
    return rgfast.probe(token_model, token_data, mask="mask", groups=3, pairs="all", progress=False)


def test_save_and_load(result, tmp_path):
    path = tmp_path / "probe.nc"
    result.save(path)
    loaded = rgfast.ProbeResult.load(path)
    assert loaded.dataset.drop_attrs().identical(result.dataset.drop_attrs())
    assert repr(loaded) == repr(result)
    assert loaded.provenance == result.provenance
    assert {"model", "torch", "rgfast", "layers", "machine"} <= set(loaded.provenance)
    assert [p.name for p in tmp_path.iterdir()] == ["probe.nc"]
    small = tmp_path / "small.nc"
    result.save(small, moments=False)
    assert small.stat().st_size < path.stat().st_size / 2
    for name, value in loaded.moments.items():
        np.testing.assert_array_equal(value, result.moments[name])
        assert value.dtype == result.moments[name].dtype


def test_a_printed_result_has_n_layers_and_the_rank_of_every_layer(result):
    head, layers, columns, *rows = str(result).splitlines()
    assert head.endswith(f"{len(result.layers)} layers, 6 positions")
    assert layers == f"  layer 0 is {result.layers[0]}, layer {len(result.layers) - 1} is {result.layers[-1]}"
    assert columns.split() == ["effective", "rank", "n", "layer", *map(str, range(len(result.layers)))]
    for view, row in zip(result.views, rows, strict=False):
        least, most = result.rows(view)
        words = row.removesuffix("  (sample limited)").split()
        assert words[:2] == [view, str(least) if least == most else f"{least}–{most}"]
        assert words[2:] == [f"{value:.4g}" for value in result.order_parameter(view).values]


def test_of_many_layers_some_are_printed():
    deep = rgfast.probe(rgfast.ResidualStack(4, 40, mixing="none"), torch.randn(70, 2, 4), progress=False)
    columns = str(deep).splitlines()[2].split()
    assert columns[4:] == ["0", "3", "7", "10", "13", "17", "20", "23", "27", "30", "33", "37", "40"]


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.9, 0.999])
def test_truncated_files_are_refused(result, tmp_path, share):
    path = tmp_path / "probe.nc"
    result.save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ValueError, match="is truncated"):
        rgfast.ProbeResult.load(path)


def test_newer_other_and_missing_files_are_refused(result, tmp_path):
    path = tmp_path / "probe.nc"
    result.save(path)
    with h5py.File(path, "a") as file:
        file.attrs["format_version"] = 7
    with pytest.raises(ValueError, match=r"written by a newer rgfast \(format 7; this one reads up to 1\)"):
        rgfast.ProbeResult.load(path)
    other = tmp_path / "other.nc"
    result.dataset.drop_attrs().to_netcdf(other, engine="h5netcdf")
    with pytest.raises(ValueError, match="not a probe result"):
        rgfast.ProbeResult.load(other)
    with pytest.raises(FileNotFoundError, match="no file"):
        rgfast.ProbeResult.load(tmp_path / "none.nc")


def test_long_form(result):
    frame = result.to_dataframe()
    assert list(frame.columns) == [
        "view", "measure", "layer", "layer_name", "other_layer", "other_layer_name", "position", "value", "n",
        "sample_limited", "se",
    ]  # fmt: skip
    row = frame.query("view == 'visible' and measure == 'effective_rank' and layer == 2 and position == 3")
    assert len(row) == 1
    want = result.dataset.effective_rank.sel(view="visible", layer=2, position=3)
    assert row.value.item() == float(want)
    assert row.n.item() == int(result.dataset.n.sel(view="visible", position=3))
    drift = frame.query("measure == 'kernel_drift' and view == 'pooled'")
    assert drift.layer.tolist() == [0, 1, 2]
    assert drift.other_layer.tolist() == [1, 2, 3]
    assert drift.layer_name.tolist() == list(result.layers[:3])
    assert drift.other_layer_name.tolist() == list(result.layers[1:])
    pairs = frame.query("measure == 'cka' and view == 'pooled'")
    assert len(pairs) == 6
    names = [(result.layers[i], result.layers[j]) for i in range(4) for j in range(i + 1, 4)]
    assert list(zip(pairs.layer_name, pairs.other_layer_name, strict=True)) == names
    ranks = frame.query("measure == 'stable_rank' and view == 'pooled'")
    assert ranks.layer_name.tolist() == list(result.layers)
    assert (ranks.other_layer_name == "").all()
    assert set(frame.query("view == 'pooled'").position) == {-1}
    assert set(frame.query("view == 'position'").position) == set(range(6))
    assert frame.query("view == 'flattened' and measure == 'stable_rank'").sample_limited.all()


def test_long_form_of_targets_and_spectra(token_model, token_data):
    result = rgfast.probe(token_model, token_data, mask="mask", targets={"t": "tokens"}, progress=False)
    frame = result.to_dataframe(spectra=True)
    assert list(frame.columns[-3:]) == ["se", "target", "component"]
    rows = frame.query("measure == 'target_r2' and view == 'position' and layer == 1")
    assert rows.target.unique().tolist() == ["t"]
    at = result.dataset.sel(view="position", position=rows.position.tolist())
    np.testing.assert_array_equal(rows.value, at.target_r2.sel(target="t", layer=1))
    np.testing.assert_array_equal(rows.se, at.target_r2_se.sel(target="t", layer=1))
    rows = frame.query("measure == 'singular_value' and view == 'position' and layer == 2 and position == 4")
    np.testing.assert_array_equal(
        rows.value, result.dataset.singular_values.sel(view="position", layer=2, position=4)
    )
    assert rows.component.tolist() == list(range(7))
    assert (frame.query("measure == 'effective_rank'").component == -1).all()
    assert (frame.query("measure == 'effective_rank'").target == "").all()
    assert frame.query("measure == 'singular_value' and view == 'flattened'").empty
    plain = result.to_dataframe()
    assert "component" not in plain
    assert (frame.measure != "singular_value").sum() == len(plain)


class Stream(torch.nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.last = torch.nn.Linear(4, 6), torch.nn.Linear(6, 5)

    def forward(self, x):
        return self.last(torch.tanh(self.first(x)))


class OtherStream(Stream):
    pass


def probed(model, **options):
    x = torch.randn(40, 4, generator=torch.Generator().manual_seed(1)).to(model.first.weight.dtype)
    batch = {
        "x": x,
        "hidden": torch.zeros(40, 1, dtype=torch.bool),
        "seen": torch.ones(40, 1, dtype=torch.bool),
    }
    return rgfast.probe(model, batch, layers=["first", "last"], views=["pooled"], progress=False, **options)


@pytest.mark.parametrize(
    ("other", "options", "words"),
    [
        (
            lambda: Stream(1),
            {},
            r"other must be of a model with the same weights \(fingerprint\): \w+, got \w+",
        ),
        (OtherStream, {}, "other must be of a model of the same class: Stream, got OtherStream"),
        (lambda: Stream().double(), {}, "other must be of a model of the same dtype: float32, got float64"),
        (Stream, {"mask": "hidden"}, "other must be of the same mask: seen, got hidden"),
    ],
)
def test_results_of_different_models_or_masks_are_not_merged(other, options, words):
    result = probed(Stream(), mask="seen")
    with pytest.raises(ValueError, match=words):
        result.merge(probed(other(), **{"mask": "seen", **options}))
    assert result.merge(probed(Stream(), mask="seen")).dataset.n.values.tolist() == [[80]]


def test_a_single_weight_tells_models_apart():
    one, two = Stream(), Stream()
    with torch.no_grad():
        two.last.bias[3] += 1e-6
    assert probed(one).provenance["weights"] == probed(Stream()).provenance["weights"]
    with pytest.raises(ValueError, match="same weights"):
        probed(one).merge(probed(two))


def test_files_without_a_fingerprint_merge_with_any_weights_of_the_same_model(tmp_path):
    result, path = probed(Stream()), tmp_path / "old.nc"
    old = {k: v for k, v in result.provenance.items() if k not in ("weights", "mask")}
    result.dataset.attrs["provenance"] = json.dumps(old)
    result.save(path)
    loaded = rgfast.ProbeResult.load(path)
    both = loaded.merge(probed(Stream(1)))
    assert both.dataset.n.values.tolist() == [[80]]
    assert both.provenance["weights"] is None
    assert probed(Stream(1)).merge(loaded).provenance["weights"] is None
    with pytest.raises(ValueError, match="of the same class"):
        loaded.merge(probed(OtherStream()))


def test_weights_that_cannot_be_read_have_no_fingerprint():
    model = Stream()
    model.spare = torch.nn.Linear(3, 3, device="meta")
    result = probed(model)
    assert result.provenance["weights"] is None
    assert result.merge(probed(model)).dataset.n.values.tolist() == [[80]]


def test_unknown_names_are_refused(result):
    with pytest.raises(ValueError, match="measure must be one of effective_rank"):
        result.order_parameter("visible", "rank")
    with pytest.raises(ValueError, match="view must be one of visible"):
        result.by_position("effective_rank", "somewhere")
    with pytest.raises(ValueError, match="without targets"):
        result.target_r2("token")


def test_accessors_give_a_view_its_own_positions(result):
    data = result.dataset
    assert result.view_or_first() == result.views[0]
    assert result.positions("pooled").tolist() == [-1]
    assert not result.is_positional("pooled")
    assert result.is_positional("masked")
    own = result.positions("masked")
    np.testing.assert_array_equal(own, data.position.values[data.position.values >= 0])
    counts = data.n.sel(view="masked", position=own).values
    np.testing.assert_array_equal(result.variable("n", "masked").values, counts)
    assert result.rows("masked") == (counts.min(), counts.max())
    assert result.sample_limited("masked") == bool(data.sample_limited.sel(view="masked").any())
    for name, found in (
        ("effective_rank_se", result.standard_error("masked")),
        ("effective_rank_baseline", result.baseline("masked")),
        ("effective_rank", result.order_parameter("masked")),
    ):
        truth = np.nanmean(data[name].sel(view="masked", position=own).values, axis=-1)
        np.testing.assert_allclose(found.values, truth, rtol=1e-14)
    assert result.targets == ()


def test_accessors_refuse_unknown_names(result):
    for call in (
        lambda: result.view_or_first("nowhere"),
        lambda: result.positions("nowhere"),
        lambda: result.is_positional("nowhere"),
        lambda: result.variable("n", "nowhere"),
        lambda: result.rows("nowhere"),
        lambda: result.sample_limited("nowhere"),
        lambda: result.standard_error("nowhere"),
        lambda: result.baseline("nowhere"),
    ):
        with pytest.raises(ValueError, match=r"view must be one of visible.*, got 'nowhere'"):
            call()
    with pytest.raises(ValueError, match=r"measure must be one with a baseline .*got 'kernel_drift'"):
        result.baseline("visible", "kernel_drift")
    with pytest.raises(ValueError, match=r"measure must be one of effective_rank.*, got 'rank'"):
        result.standard_error("visible", "rank")
    with pytest.raises(KeyError, match="nothing"):
        result.variable("nothing")


def test_without_groups_there_is_no_standard_error(token_model, token_data):
    result = rgfast.probe(token_model, token_data, measures="effective_rank", progress=False)
    assert result.standard_error() is None


def test_a_result_saved_without_moments_is_described_but_not_merged(result, tmp_path):
    result.save(tmp_path / "small.nc", moments=False)
    small = rgfast.ProbeResult.load(tmp_path / "small.nc")
    assert small.moments is None
    assert result.moments
    assert small.writes
    assert small._repr_html_() == result._repr_html_()
    assert str(small.flow("masked")) == str(result.flow("masked"))
    with pytest.raises(ValueError, match="other cannot be merged: one of the two results has no moments"):
        result.merge(small)


def test_measures_may_be_few(token_model, token_data):
    result = rgfast.probe(token_model, token_data, measures="effective_rank", progress=False)
    assert result.measures == ("effective_rank",)
    assert "cka" not in result.dataset
    assert result.to_dataframe().measure.unique().tolist() == ["effective_rank"]


def drawn(ax):
    ax.figure.canvas.draw()
    lines = [line for line in ax.get_lines() if len(line.get_xdata())]
    plt.close(ax.figure)
    return lines


def test_pictures_show_the_numbers(result):
    ax = result.plot_rank()
    assert all(tick == int(tick) for tick in ax.get_xticks())  # there is no layer 0.5
    lines = drawn(ax)
    values = result.order_parameter("visible").values
    assert any(np.array_equal(line.get_ydata(), values) for line in lines)
    lines = drawn(result.plot_rank("stable_rank", views=["masked"], relative=True))
    assert any(np.nanmin(line.get_ydata()) == 0.0 for line in lines)
    drift = result.order_parameter("position", "kernel_drift").values
    assert any(
        np.array_equal(line.get_ydata(), drift) for line in drawn(result.plot_drift(views=["position"]))
    )
    ax = result.plot_cka(view="pooled")
    np.testing.assert_array_equal(
        ax.get_images()[0].get_array(), result.order_parameter("pooled", "cka").values
    )
    plt.close(ax.figure)
    ax = result.plot_heat_map(view="masked")
    cells = np.ma.filled(ax.get_images()[0].get_array(), np.nan)
    assert np.isnan(cells[0]).all()  # the constant input
    np.testing.assert_array_equal(cells[1:], result.by_position("effective_rank", "masked").values[1:])
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("position", "layer")
    ax = result.plot_heat_map("kernel_drift")
    drift = result.by_position("kernel_drift", "visible").values
    np.testing.assert_array_equal(np.ma.filled(ax.get_images()[0].get_array(), np.nan), drift)
    assert ax.get_ylabel() == "transition"
    lines = drawn(result.plot_spectra(view="masked"))
    assert len(lines) == 3  # the constant input has none
    assert all(line.get_ydata()[0] == pytest.approx(1.0) for line in lines)
    figure, ax = plt.subplots()
    assert result.plot_rank(ax=ax) is ax
    plt.close(figure)
    for call in (
        lambda: result.plot_rank("kernel_drift"),
        lambda: result.plot_drift("effective_rank"),
        lambda: result.plot_cka("effective_rank"),
        lambda: result.plot_heat_map("cka"),
        lambda: result.plot_heat_map(view="somewhere"),
        lambda: result.plot_spectra(view="flattened"),
    ):
        with pytest.raises(ValueError, match="must be"):
            call()
    plt.close("all")


def test_flow_gives_the_numbers_and_their_caveats(result):
    flow = result.flow("masked")
    rank = result.order_parameter("masked").values
    assert flow.first_layer == 1
    assert flow.rank.ratio == rank[-1] / rank[1]
    assert "constant before layer 1" in flow.caveats[0]
    assert "R = " in str(flow)
    assert result.flow().view == "visible"
    assert any("sample limited" in caveat for caveat in result.flow("flattened").caveats)
    with pytest.raises(ValueError, match="view must be one of"):
        result.flow("nowhere")


def test_flow_tells_where_nothing_varies():
    """As at the first token of an encoder, the same in every text before attention looks round."""

    class Block(torch.nn.Module):
        def forward(self, x):
            return x + x.mean(1, keepdim=True)

    model = torch.nn.Sequential(Block(), Block(), Block())
    x = torch.randn(50, 4, 3, generator=torch.Generator().manual_seed(0))
    x[:, 0] = 1.0
    found = rgfast.probe(model, x, layers=["0:input", "0", "1", "2"], progress=False)
    (caveat,) = (c for c in found.flow("position").caveats if "nothing varies" in c)
    assert caveat.startswith("nothing varies at position 0 in some layers")
    assert not any(
        "nothing varies" in c for view in ("pooled", "mean_pooled") for c in found.flow(view).caveats
    )


def test_notebook_form(result):
    html = result._repr_html_()
    assert html.count("<tr>") == 1 + len(result.views)
    assert "<svg" in html
    assert "sample limited" in html
    assert "stack.blocks.2" in html
