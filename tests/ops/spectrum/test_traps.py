"""The known traps: every one against LAPACK's fp64 SVD, on every implementation that this machine has."""

import numpy as np
import pytest
import torch

import rgfast

IMPLS = ["reference", "auto"]


@pytest.fixture(params=IMPLS)
def impl(request):
    return request.param


def published():
    return np.random.RandomState(1337).randn(100, 10)


def test_published_values(impl):
    x = published()
    for centering, singular, variance in (
        ("mean", 9.8755029676, 9.53612989),
        ("none", 9.87408012, 9.53132307),
    ):
        assert float(rgfast.effective_rank(x, centering=centering, impl=impl)) == pytest.approx(
            singular, abs=6e-9
        )
        assert float(
            rgfast.effective_rank(x, spectrum="variance", centering=centering, impl=impl)
        ) == pytest.approx(variance, abs=6e-9)
    assert float(rgfast.participation_ratio(x, impl=impl)) == pytest.approx(9.1507913563, abs=6e-11)
    assert float(rgfast.stable_rank(x, impl=impl)) == pytest.approx(6.75343679, abs=6e-9)
    m = rgfast.rank_measures(x, impl=impl)
    assert float(m.participation_ratio) == pytest.approx(9.1507913563, abs=6e-11)
    assert float(m.stable_rank) == pytest.approx(6.75343679, abs=6e-9)


def check(x, known, impl, centering="mean", variance_error=1e-12):
    """All measures of one matrix against the truth, within the contract and within the reported bounds."""
    sigma = known.truth(x, centering)
    m = rgfast.rank_measures(x, centering=centering, impl=impl)
    rank, variance = known.rank_of(sigma), known.rank_of(sigma, "variance")
    assert abs(float(m.effective_rank) / rank - 1) <= min(1e-6, float(m.error_bound))
    assert float(m.error_bound) <= 1e-6
    assert abs(float(m.effective_rank_variance) / variance - 1) <= variance_error
    assert abs(float(m.effective_rank_variance) / variance - 1) <= float(m.variance_error_bound)
    assert abs(float(m.participation_ratio) / known.ratio_of(sigma) - 1) <= 1e-12
    ratio = rgfast.participation_ratio(x, centering=centering, impl=impl)
    assert abs(float(ratio) / known.ratio_of(sigma) - 1) <= 1e-12
    stable = (sigma**2).sum() / sigma[0] ** 2
    assert abs(float(m.stable_rank) / stable - 1) <= 1e-12
    assert abs(float(rgfast.stable_rank(x, centering=centering, impl=impl)) / stable - 1) <= 1e-9
    alone = float(rgfast.effective_rank(x, centering=centering, impl=impl))
    assert abs(alone / rank - 1) <= 1e-6


@pytest.mark.parametrize("shape", [(96, 24), (24, 96), (33, 32), (32, 32), (17, 65), (300, 7)])
@pytest.mark.parametrize("name", ["flat", "1/i", "1/i^2", "1/i^4", "condition 1e8", "condition 1e12",
                                  "low rank + 1e-7", "rank 1 + 1e-5", "rank 1 + 1e-9"])  # fmt: skip
def test_hard_spectra(known, impl, name, shape):
    n, d = shape
    x = known.with_spectrum(known.spectra[name](min(n, d)), n, d, seed=n + d)
    for data in (torch.from_numpy(x), torch.from_numpy(x).float()):
        for centering in ("mean", "none"):
            check(data, known, impl, centering)


@pytest.mark.parametrize("d", [257, 512])
def test_exact_rank_one(known, impl, d):
    draw = np.random.default_rng(d)
    x = torch.from_numpy(np.outer(draw.standard_normal(600), draw.standard_normal(d))).float()
    x = torch.outer(x[:, 0], x[0])  # fp32 products round: near rank 1
    check(x, known, impl)
    exact = torch.outer(torch.arange(600.0) - 3, torch.arange(1.0, d + 1))  # integers: rank 1 to the last bit
    assert float(rgfast.effective_rank(exact, impl=impl)) == pytest.approx(1, abs=1e-9)
    assert float(rgfast.effective_rank(exact, spectrum="variance", impl=impl)) == pytest.approx(1, abs=1e-12)
    assert float(rgfast.numerical_rank(exact, impl=impl)) == 1


def test_fourth_power_decay_wide(known, impl):
    x = torch.from_numpy(known.with_spectrum(known.spectra["1/i^4"](512), 1024, 512, seed=4)).float()
    check(x, known, impl)


def test_constant_offset(known, impl):
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(256, 32, generator=draw)
    check(x + 1e4, known, impl)
    near = x.double() + 1e4
    moved = near + 1e-6 * torch.randn(256, 32, generator=draw, dtype=torch.float64)
    for y in (near, moved):
        check(y, known, impl)
    # a signal of 1e-6 on the same offset
    check(1e4 + 1e-6 * x.double(), known, impl, variance_error=1e-9)


@pytest.mark.parametrize(("dtype", "factor"), [(torch.float32, 1e18), (torch.float32, 1e-18),
                                                (torch.float64, 1e150), (torch.float64, 1e-150),
                                                (torch.float64, 1e80), (torch.float64, 1e-300)])  # fmt: skip
def test_scales(known, impl, dtype, factor):
    x = torch.randn(50, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    scaled = (x * factor).to(dtype)
    base = (scaled.double() / factor).contiguous()
    want = known.truth(base)
    m = rgfast.rank_measures(scaled, impl=impl)
    assert float(m.effective_rank) == pytest.approx(known.rank_of(want), rel=1e-12)
    assert float(m.participation_ratio) == pytest.approx(known.ratio_of(want), rel=1e-12)
    assert float(rgfast.participation_ratio(scaled, impl=impl)) == pytest.approx(
        known.ratio_of(want), rel=1e-12
    )
    assert float(rgfast.stable_rank(scaled, impl=impl)) == pytest.approx(float(m.stable_rank), rel=1e-10)
    np.testing.assert_allclose(m.singular_values.numpy() / factor, want, rtol=1e-10)
    single = rgfast.effective_rank(scaled, precision="single", impl=impl)
    assert float(single) == pytest.approx(known.rank_of(want), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dead_and_duplicated_columns(known, impl, dtype):
    x = torch.randn(64, 20, generator=torch.Generator().manual_seed(2)).to(dtype)
    x[:, 3] = 0.1  # constant, and not a dyadic number
    x[:, 7] = 0
    x[:, 11] = x[:, 12]
    x[:, 13] = x[:, 12]
    x = x.contiguous()
    sigma = known.truth(x)
    m = rgfast.rank_measures(x, impl=impl)
    live = sigma[sigma > 1e-10 * sigma[0]]
    assert len(live) == 16
    assert float(m.effective_rank) == pytest.approx(known.rank_of(live), rel=1e-9)
    assert float(m.effective_rank_variance) == pytest.approx(known.rank_of(live, "variance"), rel=1e-12)
    assert float(rgfast.numerical_rank(x, impl=impl)) == 16
    assert float(rgfast.numerical_rank(x, tol=1e-12, impl=impl)) == 16
    assert int((m.singular_values == 0).sum()) >= 2  # the two constant columns, exactly


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("centering", ["mean", "none"])
def test_zero_and_constant(impl, dtype, centering):
    zero = torch.zeros(3, 9, 5, dtype=dtype)
    constant = (
        (torch.rand(3, 1, 5, generator=torch.Generator().manual_seed(0)) * 3.3).to(dtype).expand(3, 9, 5)
    )
    for x in [zero, constant] if centering == "mean" else [zero]:
        m = rgfast.rank_measures(x, centering=centering, impl=impl)
        values = [
            *(m.effective_rank, m.effective_rank_variance, m.participation_ratio, m.stable_rank),
            *(m.numerical_rank, m.singular_values),
            rgfast.participation_ratio(x, centering=centering, impl=impl),
            rgfast.stable_rank(x, centering=centering, impl=impl),
        ]
        assert bool((m.error_bound < 1e-12).all())
        for value in values:
            assert torch.equal(value, torch.zeros_like(value))
    if centering == "none":
        assert rgfast.effective_rank(constant, centering="none", impl=impl).tolist() == pytest.approx(
            [1.0] * 3
        )


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("d", [1, 2, 3, 17])
def test_few_samples(known, impl, n, d):
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(n * 100 + d))
    sigma = known.truth(x)[: max(n - 1, 0)]
    m = rgfast.rank_measures(x, impl=impl)
    assert m.singular_values.shape == (min(n, d),)
    if n == 1:
        assert float(m.effective_rank) == float(m.participation_ratio) == float(m.stable_rank) == 0
        assert m.baseline.effective_rank == 0
    else:
        assert float(m.effective_rank) == pytest.approx(known.rank_of(sigma[:d]), rel=1e-9)
        assert int((m.singular_values > 0).sum()) == min(n - 1, d)
    raw = known.truth(x, "none")
    assert float(rgfast.effective_rank(x, centering="none", impl=impl)) == pytest.approx(
        known.rank_of(raw), rel=1e-9
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_are_not_accumulated_in_half(known, impl, dtype):
    x = (torch.randn(4096, 8, generator=torch.Generator().manual_seed(3)) + 30).to(dtype)
    check(x, known, impl)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_nonfinite_is_named(impl, bad, dtype):
    x = torch.randn(3, 4, 10, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[2, 1, 3, :2] = bad
    for function in (
        rgfast.singular_values, rgfast.effective_rank, rgfast.participation_ratio, rgfast.stable_rank,
        rgfast.numerical_rank, rgfast.rank_measures,
    ):  # fmt: skip
        with pytest.raises(
            ValueError, match=r"x must be finite, got 2 NaN or infinite values in matrix \(2, 1\)"
        ):
            function(x, impl=impl)
    with pytest.raises(ValueError, match=r"matrix \(2, 1\)"):
        rgfast.effective_rank(x, precision="single", impl=impl)
    with pytest.raises(ValueError, match=r"matrix \(2, 1\)"):
        rgfast.effective_rank(x, method="svd", impl="auto")
    x[0, 0, 0, 0] = bad
    with pytest.raises(
        ValueError, match=r"1 NaN or infinite values in matrix \(0, 0\) of the batch \(one more"
    ):
        rgfast.effective_rank(x, impl=impl)


def test_strides(impl):
    base = torch.randn(5, 40, 3, 13, generator=torch.Generator().manual_seed(6))
    plain = base.permute(0, 2, 1, 3).contiguous()
    want = rgfast.rank_measures(plain, impl=impl)
    odd = torch.empty(5, 1, 3, 40, 26)[..., ::2]
    odd.copy_(plain[:, None])
    numpy_view = base.numpy().transpose(0, 2, 1, 3)
    for view in (base.permute(0, 2, 1, 3), plain.mT.contiguous().mT, odd, numpy_view):
        got = rgfast.rank_measures(view, impl=impl)
        assert torch.equal(got.singular_values.reshape(5, 3, -1), want.singular_values)
        ratio = rgfast.participation_ratio(view, impl=impl).reshape(5, 3)
        assert torch.equal(ratio, rgfast.participation_ratio(plain, impl=impl))
    expanded = plain[:1].expand(4, 3, 40, 13)
    got = rgfast.effective_rank(expanded, impl=impl)
    whole = rgfast.effective_rank(plain, impl=impl)[:1].expand(4, 3)
    if impl == "reference":  # a matrix's place in the batch is its place in memory, which MKL may go by
        torch.testing.assert_close(got, whole, rtol=1e-14, atol=0)
    else:
        assert torch.equal(got, whole)
    torch.testing.assert_close(got, want.effective_rank[:1].expand(4, 3), rtol=1e-14, atol=0)
    one = plain[0, 0].as_strided((1, 40, 13), (12345, 13, 1))
    # a batch of one may be solved in another order than a batch of many
    torch.testing.assert_close(
        rgfast.effective_rank(one, impl=impl)[0], want.effective_rank[0, 0], rtol=1e-12, atol=0
    )


def test_empty_batch(impl):
    x = torch.empty(0, 3, 10, 5)
    assert rgfast.singular_values(x, impl=impl).shape == (0, 3, 5)
    m = rgfast.rank_measures(x, impl=impl)
    assert (
        m.effective_rank.shape == m.participation_ratio.shape == m.error_bound.shape == m.path.shape == (0, 3)
    )
    for function in (rgfast.participation_ratio, rgfast.stable_rank, rgfast.numerical_rank):
        assert function(x, impl=impl).shape == (0, 3)
        assert function(x, impl=impl).dtype == torch.float64
    assert rgfast.eigvalsh(torch.empty(0, 4, 4), impl=impl).shape == (0, 4)
    assert rgfast.eigvalsh(torch.empty(2, 0, 0), impl=impl).shape == (2, 0)


def test_numerical_rank_below_what_a_gram_matrix_sees(known, impl):
    sigma = np.array([1.0, 1e-2, 1e-5, 1e-9, 1e-11, 1e-13])
    x = known.with_spectrum(sigma, 50, 6, seed=0)
    for tol, want in ((1e-1, 1), (1e-4, 2), (1e-7, 3), (1e-8, 3), (1e-10, 4), (1e-12, 5)):
        assert float(rgfast.numerical_rank(x, tol=tol, impl=impl)) == want, tol
