"""The result: its tables, files, words, figure and page."""

import json
import re

import numpy as np
import pytest
import torch
import xarray as xr

import rgfast
from rgfast.report import figures


@pytest.fixture(scope="module")
def found(kit):
    a, b = kit.Encoder(6, 3), kit.Encoder(4, 2, seed=1)
    return rgfast.compare(
        a, b, kit.padded(60, 5), positions="all", measures=["cka", "rsa"], groups=3, null=19, progress=False
    )


def test_labels_and_views(found):
    assert found.views == ("position", "pooled", "mean_pooled")
    assert found.measures == ("cka", "rsa")
    matrix = found.matrix("cka", view="pooled")
    assert matrix.dims == ("layer_a", "layer_b")
    assert (
        list(matrix.layer_b_name.values) == list(found.layers_b) == ["blocks.0:input", "blocks.0", "blocks.1"]
    )
    assert list(found.dataset.width_a.values) == [6] * 4
    assert list(found.positions("position")) == [0, 1, 2, 3, 4]
    by_position = np.stack([found.matrix("cka", "position", position=t).values for t in range(5)])
    assert np.allclose(found.matrix("cka", "position").values, by_position.mean(0), atol=1e-14)
    assert found.is_positional("position")
    assert not found.is_positional("pooled")
    assert found.provenance["a"]["model"] == "Encoder"
    assert found.provenance["a"]["weights"] != found.provenance["b"]["weights"]
    for call, words in (
        (lambda: found.matrix("knn"), "measure must be one of 'cka', 'rsa', got 'knn'"),
        (lambda: found.matrix("cka", "masked"), "view must be one of position, pooled, mean_pooled"),
        (
            lambda: found.matrix("cka", "position", position=7),
            r"position must be one .* \(0, 1, 2, 3, 4\), got 7",
        ),
        (lambda: found.matrix("cka", "pooled", position=0), "position must be one .*none.* got 0"),
        (lambda: found.best_match(side="c"), "side must be one of 'a', 'b'"),
    ):
        with pytest.raises(ValueError, match=words):
            call()


def test_best_matches_are_the_largest_of_each_row_and_column(found):
    values = found.matrix("cka", "pooled").values
    table = found.best_match("cka", "pooled")
    assert list(table.columns) == ["layer", "layer_name", "match", "match_name", "value", "se", "p"]
    assert list(table.match) == list(values.argmax(1))
    assert np.array_equal(table.value, values.max(1))
    assert np.array_equal(table.se, found.standard_error("cka", "pooled").values[range(4), values.argmax(1)])
    assert table.match_name[0] == found.layers_b[table.match[0]]
    other = found.best_match("cka", "pooled", side="b")
    assert list(other.match) == list(values.argmax(0))
    assert (other.p >= 1 / 20).all()


def test_the_table_has_every_value(found):
    table = found.to_dataframe()
    assert len(table) == 2 * (5 + 1 + 1) * 4 * 3
    row = table[
        (table.view == "pooled") & (table.measure == "cka") & (table.layer_a == 2) & (table.layer_b == 1)
    ]
    assert row.value.item() == found.matrix("cka", "pooled").values[2, 1]
    assert row.n.item() == found.rows("pooled")[0]
    assert row.layer_a_name.item() == "blocks.1"
    assert "se" in table


def test_a_file_brings_everything_back(found, tmp_path):
    found.save(tmp_path / "c.nc")
    again = rgfast.Comparison.load(tmp_path / "c.nc")
    xr.testing.assert_identical(again.dataset, found.dataset)
    assert repr(again) == repr(found)
    assert again.samples == found.samples
    assert torch.equal(again.calibrated("rsa", "pooled").p, found.calibrated("rsa", "pooled").p)
    with pytest.raises(FileNotFoundError, match="path must be a comparison"):
        rgfast.Comparison.load(tmp_path / "none.nc")
    rgfast.probe(rgfast.ResidualStack(4, 2, mixing="none"), torch.randn(20, 4), progress=False).save(
        tmp_path / "probe.nc"
    )
    with pytest.raises(ValueError, match="not a comparison"):
        rgfast.Comparison.load(tmp_path / "probe.nc")
    with pytest.raises(ValueError, match="not a probe result"):
        rgfast.ProbeResult.load(tmp_path / "c.nc")
    rgfast.Comparison(found.dataset.assign_attrs(format_version=9)).save(tmp_path / "new.nc")
    with pytest.raises(ValueError, match="newer rgfast"):
        rgfast.Comparison.load(tmp_path / "new.nc")


def test_it_says_what_it_is(found):
    text = repr(found)
    assert text.startswith("Comparison of Encoder (4 layers) and Encoder (3 layers): 60 sequences")
    assert "cka, pooled" in text
    cells = found._repr_html_()
    assert cells.count("<tr>") == 1 + 2 * 3
    assert "0 → 0" in cells


def test_the_figure_marks_the_best_matches(found):
    figure = figures.plot_comparison(found)
    panels = [axes for axes in figure.axes if axes.images]
    assert len(panels) == 3
    assert np.array_equal(panels[1].images[0].get_array(), found.matrix("cka", "pooled").values)
    (line,) = panels[1].lines
    assert list(line.get_xdata()) == list(found.best_match("cka", "pooled").match)
    assert "layer of b" in panels[0].get_xlabel()
    axes = found.plot("rsa", "pooled")
    assert np.array_equal(axes.images[0].get_array(), found.matrix("rsa", "pooled").values)
    probed = rgfast.probe(rgfast.ResidualStack(4, 2, mixing="none"), torch.randn(20, 4), progress=False)
    with pytest.raises(TypeError, match="source must be a comparison, got ProbeResult"):
        figures.plot_comparison(probed)


def test_the_page_has_matches_pictures_and_provenance(found, tmp_path, kit):
    found.report(tmp_path / "c.html")
    page = (tmp_path / "c.html").read_text(encoding="utf-8")
    titles = re.findall(r"<h3>(.*?)</h3>", page)
    assert titles[0] == "CKA, debiased between the layers of both models"
    assert len(titles) == 4
    data = json.loads(re.search(r'id="figures">(.*?)</script>', page, re.S).group(1))
    heat = data["figures"][0]["panels"][1]["heat"]["values"]
    assert np.allclose(heat, found.matrix("cka", "pooled").values, atol=1e-6)
    for words in ("Best matches", "best match", "blocks.0:input", "centered kernel alignment", "a.weights"):
        assert words in page
    found.save(tmp_path / "saved.nc")
    assert rgfast.report.write_report(tmp_path / "saved.nc") == tmp_path / "saved.html"
    short = kit.Mlp(5, 4, 1)
    dead = rgfast.compare(short, short, torch.zeros(20, 5), progress=False)
    dead.report(tmp_path / "dead.html")
    assert "nothing varies there" in (tmp_path / "dead.html").read_text(encoding="utf-8")
