import warnings
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rgfast

BOTH = pytest.mark.parametrize("debiased", [True, False])
SHAPES = [(4, 3), (5, 1), (15, 16), (17, 65), (64, 7), (97, 33), (150, 200), (300, 12)]


@pytest.fixture
def notebook():
    rng = np.random.RandomState(1337)
    x = rng.randn(100, 10)
    return x, rng.randn(100, 10) + x


def test_the_published_values(notebook):
    x, y = notebook
    assert float(rgfast.cka(x, y, debiased=False)) == pytest.approx(0.5576132566, abs=1e-10)
    assert float(rgfast.cka(x, y)) == pytest.approx(0.5134564895, abs=1e-10)
    rbf = rgfast.cka(x, y, debiased=False, kernel="rbf", threshold=0.5)
    assert float(rbf) == pytest.approx(0.65483, abs=5e-6)


@BOTH
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 1e-6)])
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_every_pair_against_brute_force(make, truth, shape, dtype, bound, offset, debiased):
    layers = (make(3, *shape, seed=3) + offset).to(dtype)
    expected = truth.matrix(layers, debiased=debiased)
    got = rgfast.cka_matrix(layers, debiased=debiased)
    assert got.dtype == torch.float64
    assert (got - expected).abs().max() <= bound
    assert (rgfast.cka(layers[0], layers[2], debiased=debiased) - expected[0, 2]).abs() <= bound
    drift = rgfast.kernel_drift(layers, debiased=debiased)
    assert (drift - (1 - expected.diagonal(1))).abs().max() <= bound


@BOTH
@pytest.mark.parametrize(("dtype", "scale"), [(torch.float32, 1e18), (torch.float64, 1e150)])
def test_scales_at_the_edge_of_the_dtype(make, truth, dtype, scale, debiased):
    layers = make(2, 40, 6).to(dtype)
    expected = truth.cka(*layers, debiased=debiased)
    for factor in (scale, 1 / scale):
        got = rgfast.cka(layers[0] * factor, layers[1], debiased=debiased)
        assert float(got) == pytest.approx(expected, abs=1e-6 if dtype == torch.float32 else 1e-10)
        drift = rgfast.kernel_drift([layers[0] * factor, layers[1]], debiased=debiased)
        assert float(drift) == pytest.approx(1 - expected, abs=1e-6 if dtype == torch.float32 else 1e-10)


@BOTH
@pytest.mark.parametrize("shape", [(200, 8), (20, 50)])
@pytest.mark.parametrize("offset", [0.0, 100.0])
@pytest.mark.parametrize("wanted", [1e-6, 1e-9])
def test_a_small_drift_keeps_three_digits_under_an_offset(truth, shape, offset, wanted, debiased):
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    move = torch.randn(shape, generator=generator, dtype=torch.float64)

    def pair(step):
        return (x + offset).float(), (x + step * move + offset).float()

    step = (wanted / truth.drift(x, x + 1e-3 * move, debiased)) ** 0.5 * 1e-3
    layers = pair(step)
    expected = truth.drift(*layers, debiased)
    assert 0.3 * wanted < expected < 3 * wanted
    assert float(rgfast.kernel_drift(list(layers), debiased=debiased)) == pytest.approx(expected, rel=1e-3)


def test_a_drift_far_below_the_rounding_of_one(make, truth):
    x = make(1, 50, 6)[0]
    moved = x.clone()
    moved[3, 2] += 1e-10
    expected = truth.drift(x, moved)
    assert 0 < expected < 1e-18
    assert float(rgfast.kernel_drift([x, moved])) == pytest.approx(expected, rel=1e-4)


@BOTH
def test_self_cka_is_one_and_a_rotation_does_not_drift(make, debiased):
    for shape in SHAPES:
        if debiased and shape[-1] == 1:
            continue
        x = make(1, *shape, seed=1)[0]
        assert float(rgfast.cka(x, x, debiased=debiased)) == pytest.approx(1.0, abs=1e-12)
        rotation = torch.linalg.qr(make(1, shape[-1], shape[-1], seed=2)[0]).Q
        drift = float(rgfast.kernel_drift([x, 3.0 * x @ rotation], debiased=debiased))
        assert 0.0 <= drift <= 1e-13


@BOTH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_are_widened_before_anything_is_summed(make, dtype, debiased):
    layers = (make(2, 600, 9) + 3.0).to(dtype)
    wide = rgfast.cka(*layers.double(), debiased=debiased)
    assert rgfast.cka(*layers, debiased=debiased) == pytest.approx(float(wide), abs=1e-6)


@BOTH
@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(5, 40),
    d=st.integers(2, 40),
    e=st.integers(2, 40),
    seed=st.integers(0, 2**31),
    scale=st.sampled_from([1e-3, 0.5, 7.0, 1e5]),
)
def test_invariances(debiased, n, d, e, seed, scale):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=generator, dtype=torch.float64)
    y = torch.randn(n, e, generator=generator, dtype=torch.float64) + x[:, :1]
    value = rgfast.cka(x, y, debiased=debiased)
    rotation = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64)).Q
    order = torch.randperm(n, generator=generator)
    features = torch.randperm(e, generator=generator)
    shift = torch.randn(d, generator=generator, dtype=torch.float64)
    for a, b in (
        (x @ rotation, y),
        (scale * x, y),
        (x + shift, y - 5.0),
        (x[order], y[order]),
        (x, y[:, features]),
    ):
        assert float(rgfast.cka(a, b, debiased=debiased)) == pytest.approx(float(value), abs=1e-10)
    assert float(rgfast.cka(y, x, debiased=debiased)) == pytest.approx(float(value), abs=1e-12)
    assert -1 - 1e-9 <= float(value) <= 1 + 1e-9


def test_negative_values_stay(make):
    values = torch.stack(
        [rgfast.cka(make(1, 8, 4, seed=s)[0], make(1, 8, 4, seed=s + 99)[0]) for s in range(20)]
    )
    assert values.min() < -0.01


@BOTH
def test_two_models_and_different_widths(make, truth, debiased):
    wide, narrow = make(2, 30, 40, seed=1), make(3, 30, 5, seed=2)
    layers, other = [wide[0], narrow[0], wide[1]], [narrow[1], wide[0] + 2.0]
    got = rgfast.cka_matrix(layers, other, debiased=debiased)
    assert got.shape == (3, 2)
    assert (got - truth.matrix(layers, other, debiased)).abs().max() <= 1e-10
    assert float(got[0, 1]) == pytest.approx(1.0, abs=1e-12)
    assert (
        rgfast.cka_matrix(layers, debiased=debiased) - truth.matrix(layers, None, debiased)
    ).abs().max() < 1e-10
    drift = rgfast.kernel_drift(layers, debiased=debiased)
    assert float(drift[0]) == pytest.approx(truth.drift(layers[0], layers[1], debiased), abs=1e-12)


@BOTH
def test_leading_dimensions_are_batch(make, truth, debiased):
    layers = make(3, 2, 5, 12, 4)
    matrix = rgfast.cka_matrix(layers, debiased=debiased)
    drift = rgfast.kernel_drift(layers, debiased=debiased)
    assert matrix.shape == (2, 5, 3, 3)
    assert drift.shape == (2, 5, 2)
    for b in range(2):
        for t in range(5):
            expected = truth.matrix(layers[:, b, t], debiased=debiased)
            assert (matrix[b, t] - expected).abs().max() <= 1e-10
    assert (rgfast.cka(layers[0], layers[1], debiased=debiased) - matrix[..., 0, 1]).abs().max() <= 1e-12


@BOTH
def test_constant_layers_are_nan_without_a_warning(make, debiased):
    layers = make(3, 2, 9, 4)
    layers[1, 0] = 0.1
    layers[1, 1] = 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        matrix = rgfast.cka_matrix(layers, debiased=debiased)
        drift = rgfast.kernel_drift(layers, debiased=debiased)
        rbf = rgfast.cka(layers[0], layers[1], debiased=debiased, kernel="rbf")
    assert drift.isnan().all()
    assert rbf.isnan().all()
    assert matrix[..., 1, :].isnan().all()
    assert matrix[..., :, 1].isnan().all()
    assert matrix[..., ::2, ::2].isfinite().all()
    assert (rgfast.hsic(layers[0], layers[1], debiased=debiased) == 0).all()
    change = rgfast.kernel_change(layers)
    assert (change[:, 0] == 1).all()
    assert change[:, 1].isnan().all()


def test_few_samples():
    x, y = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    for n in (1, 2, 3):
        for function in (rgfast.cka, rgfast.hsic):
            with pytest.raises(ValueError, match=f"x must have at least 4 samples .* got {n}"):
                function(x[:n], y[:n])
        with pytest.raises(ValueError, match="layers must have at least 4 samples"):
            rgfast.cka_matrix([x[:n], y[:n]])
        with pytest.raises(ValueError, match="layers must have at least 4 samples"):
            rgfast.kernel_drift([x[:n], y[:n]], debiased=True)
    assert rgfast.cka(x[:1], y[:1], debiased=False).isnan()
    assert float(rgfast.cka(x[:2], y[:2], debiased=False)) == pytest.approx(1.0, abs=1e-12)
    assert 0 <= float(rgfast.cka(x, y, debiased=False)) <= 1
    with pytest.raises(ValueError, match="at least one sample"):
        rgfast.cka(x[:0], y[:0], debiased=False)


@BOTH
def test_an_empty_batch_has_an_empty_result(debiased):
    layers = torch.randn(3, 0, 2, 6, 4)
    assert rgfast.cka_matrix(layers, debiased=debiased).shape == (0, 2, 3, 3)
    assert rgfast.kernel_drift(layers, debiased=debiased).shape == (0, 2, 2)
    assert rgfast.cka(layers[0], layers[1], debiased=debiased).shape == (0, 2)
    assert rgfast.hsic(layers[0], layers[1], debiased=debiased).shape == (0, 2)
    assert rgfast.kernel_drift(torch.randn(1, 6, 4), debiased=debiased).shape == (0,)


@BOTH
def test_strides_do_not_matter(make, debiased):
    base = make(4, 3, 12, 10)
    layers = base[::2, :, ::2, 1::3]
    dense = layers.contiguous()
    turned = dense.mT.contiguous().mT
    for view in (layers, turned):
        assert torch.allclose(
            rgfast.cka_matrix(view, debiased=debiased),
            rgfast.cka_matrix(dense, debiased=debiased),
            atol=1e-14,
        )
    row = dense[0, 0]
    spread = rgfast.cka(row.expand(3, 6, 3), dense[1], debiased=debiased)
    assert torch.allclose(spread[1], rgfast.cka(row, dense[1, 1], debiased=debiased), atol=1e-14)
    same = rgfast.cka(row[:1].expand(6, 3), row, debiased=debiased)
    assert same.isnan()


def test_hsic_has_the_scale_of_its_definition(make, truth):
    x, y = make(2, 20, 3)
    n = 20
    for debiased, divisor in ((True, n * (n - 3)), (False, (n - 1) ** 2)):
        for factor in (1.0, 1e3):
            k, m = (truth.kernel(z, debiased) for z in (x, y))
            tops = [float((z - z[:1] - (z - z[:1]).mean(0)).abs().max()) for z in (x, y)]
            expected = (k * m).sum() * (tops[0] * tops[1]) ** 2 / divisor * factor**4
            got = rgfast.hsic(factor * x + 7.0, factor * y, debiased=debiased)
            assert float(got) == pytest.approx(expected, rel=1e-9)
    tiny = rgfast.hsic(x * 1e-30, y * 1e30)
    assert float(tiny) == pytest.approx(float(rgfast.hsic(x, y)), rel=1e-12)


def test_kernel_change_sees_scale_and_small_steps(make, truth):
    x, y = make(2, 30, 5)
    k, m = (truth.kernel(z, False) * float((z - z.mean(0)).abs().max()) ** 2 for z in (x, y))
    expected = np.linalg.norm(m - k) / np.linalg.norm(k)
    assert float(rgfast.kernel_change([x, y])) == pytest.approx(expected, rel=1e-9)
    assert float(rgfast.kernel_change([x, 1e3 * x])) == pytest.approx(1e6 - 1, rel=1e-12)
    assert float(rgfast.kernel_change([x, (1 + 1e-9) * x])) == pytest.approx(2e-9, rel=1e-6)
    assert float(rgfast.kernel_change([x, x])) == 0.0


def test_the_null_of_biased_cka():
    assert rgfast.cka_null(256, 4096, 4096) == pytest.approx(1 / (1 + 256 / 4096))
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(20, 200, p, generator=generator) for p in (100, 300))
    measured = rgfast.cka(x, y, debiased=False).mean()
    assert float(measured) == pytest.approx(rgfast.cka_null(200, 100, 300), abs=0.01)
    assert abs(float(rgfast.cka(x, y).mean())) < 0.01
    with pytest.raises(ValueError, match="p2 must be positive, got 0"):
        rgfast.cka_null(10, 1, 0)


def test_minibatch_cka_is_the_ratio_of_mean_hsic(make):
    layers = make(3, 22, 5)
    bounds = [0, 7, 14, 22]
    mean = torch.stack(
        [
            torch.stack([torch.stack([rgfast.hsic(x[a:b], y[a:b]) for y in layers]) for x in layers])
            for a, b in pairwise(bounds)
        ]
    ).mean(0)
    expected = mean / (mean.diagonal()[:, None] * mean.diagonal()).sqrt()
    assert torch.allclose(rgfast.minibatch_cka(layers, batch_size=8), expected, atol=1e-10)
    across = rgfast.minibatch_cka(layers[:2], layers[1:], batch_size=8)
    assert torch.allclose(across, expected[:2, 1:], atol=1e-10)
    with pytest.raises(ValueError, match="batch_size must be at least 4, got 3"):
        rgfast.minibatch_cka(layers, batch_size=3)


def test_rbf_against_its_definition(make):
    x, y = make(2, 9, 4).numpy()

    def kernel(z, sigma):
        squared = ((z[:, None] - z[None]) ** 2).sum(-1)
        squared_sigma = sigma**2 if sigma else 0.25 * np.median(squared)
        return np.exp(-squared / (2 * squared_sigma))

    h = np.eye(9) - 1 / 9
    for sigma in (None, 1.7):
        k, m = (h @ kernel(z, sigma) @ h for z in (x, y))
        expected = (k * m).sum() / np.linalg.norm(k) / np.linalg.norm(m)
        options = {"threshold": 0.5} if sigma is None else {"bandwidth": sigma}
        got = rgfast.cka(x, y, debiased=False, kernel="rbf", **options)
        assert float(got) == pytest.approx(expected, abs=1e-12)
    repeated = np.repeat(x[:2], [7, 2], axis=0)
    assert rgfast.cka(repeated, x, kernel="rbf").isnan()
    assert rgfast.cka(repeated, x, kernel="rbf", bandwidth=1.0).isfinite()
