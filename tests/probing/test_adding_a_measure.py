"""The worked example of CONTRIBUTING, "Adding a measure": an entry of the registry, and nothing else."""

import math

import numpy as np
import pytest
import torch

import rgfast
from rgfast.ops.spectrum.measures import effective_rank_of, numerical_rank_of
from rgfast.probing.measures import MEASURES, Measure, named, register

ADDED = (
    Measure(
        "spectral_entropy",
        "rank",
        "entropy of the spectrum",
        "centred",
        lambda sigma: effective_rank_of(sigma).log(),
        baseline=lambda n, d: math.log(rgfast.isotropic_baseline(n, d).effective_rank),
        bound=lambda solved: solved.bound(),
    ),
    Measure(
        "tenth_rank",
        "rank",
        "singular values over a tenth, uncentred",
        "uncentred",
        lambda sigma: numerical_rank_of(sigma, 0.1),
    ),
    Measure(
        "kernel_angle",
        "drift",
        "angle between kernels",
        "kernels",
        lambda kernels: kernels.biased.diagonal(1).T.clamp(-1, 1).arccos(),
    ),
)
NAMES = [measure.name for measure in ADDED]


@pytest.fixture(autouse=True)
def added():
    for measure in ADDED:
        register(measure)
    yield
    for name in NAMES:
        del MEASURES[name]


def _stack():
    torch.manual_seed(5)
    return rgfast.ResidualStack(6, 3, mixing="none")


def _rows():
    made = torch.Generator(device="cpu").manual_seed(7)
    return torch.randn(80, 4, 6, generator=made, dtype=torch.float32, device="cpu") + 0.5


def _result(route, **options):
    views = {} if route == "moments" else {"views": ["position"]}
    return rgfast.probe(
        _stack(), _rows(), progress=False, route=route, pairs="all", measures="all", **views, **options
    )


@pytest.mark.parametrize("route", ["moments", "samples"])
def test_its_values_on_every_route(route):
    result = _result(route, groups=4)
    assert result.dataset.attrs["route"] == route
    position = result.dataset.sel(view="position").isel(position=slice(-4, None))
    with torch.no_grad():
        states, stack = [], _stack()
        handle = stack.stream_tiles(lambda first, tile: states.append(tile.double().clone()))
        stack(_rows())
        handle.remove()
    stream = torch.cat(states, 1)  # [L, n, T, d]
    for layer in range(stream.shape[0]):
        for t in range(4):
            x = stream[layer, :, t]
            p = torch.linalg.svdvals(x - x.mean(0))
            p = p / p.sum()
            got = float(position["spectral_entropy"][layer, t])
            assert got == pytest.approx(float(-(p * p.log()).sum()), rel=1e-9)
            raw = torch.linalg.svdvals(x)
            assert float(position["tenth_rank"][layer, t]) == int((raw > 0.1 * raw[0]).sum())
    cka = position["cka_biased"].values
    want = np.arccos(np.clip(np.stack([cka[i, i + 1] for i in range(3)]), -1, 1))
    np.testing.assert_allclose(position["kernel_angle"].values, want, rtol=1e-12)


@pytest.mark.parametrize("route", ["moments", "samples"])
def test_it_is_in_the_dataset_the_table_the_figures_and_the_page(route, tmp_path):
    result = _result(route, groups=4)
    data = result.dataset
    assert {*NAMES} <= {*result.measures}
    for name in NAMES:
        assert data[name].attrs["long_name"] == MEASURES[name].label
        assert f"{name}_se" in data
    assert data["kernel_angle"].dims == ("view", "transition", "position")
    assert "spectral_entropy_baseline" in data
    assert "tenth_rank_baseline" not in data
    np.testing.assert_array_equal(data["spectral_entropy_bound"], data["effective_rank_bound"])
    expected = math.log(rgfast.isotropic_baseline(80, 6).effective_rank)
    assert result.baseline("position", "spectral_entropy").values == pytest.approx(expected)

    table = result.to_dataframe()
    assert {*NAMES} <= {*table.measure}
    angles = table[table.measure == "kernel_angle"]
    assert (angles.other_layer == angles.layer + 1).all()
    assert angles.se.notna().all()

    assert result.plot_rank("spectral_entropy").get_ylabel().startswith("entropy of the spectrum")
    assert "angle between kernels" in result.plot_drift("kernel_angle").get_ylabel()
    result.plot_heat_map("tenth_rank")
    result.report(tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "entropy of the spectrum" in page
    assert "singular values over a tenth, uncentred" in page

    result.save(tmp_path / "saved.nc")
    again = rgfast.ProbeResult.load(tmp_path / "saved.nc")
    assert again.measures == result.measures


def test_it_is_asked_for_by_name():
    result = rgfast.probe(_stack(), _rows(), progress=False, measures=["tenth_rank", "kernel_angle"])
    assert result.measures == ("tenth_rank", "kernel_angle")
    assert named("drift")[-1] == "kernel_angle"
    with pytest.raises(ValueError, match=r"among effective_rank, .*kernel_angle, got 'tenth'"):
        rgfast.probe(_stack(), _rows(), progress=False, measures=["tenth"])


def test_a_name_is_given_once_and_a_kind_needs_what_it_is_computed_from():
    with pytest.raises(ValueError, match="there is a measure 'kernel_angle' already"):
        register(ADDED[2])
    wrong = Measure("other", "drift", "other", "centred", lambda sigma: sigma)
    with pytest.raises(ValueError, match="'kernels' for a drift or pair, got 'centred' for a drift"):
        register(wrong)
    assert "other" not in MEASURES
