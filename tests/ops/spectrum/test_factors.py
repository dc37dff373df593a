"""Rank measures from triangular factors: small singular values, rank limits, bounds and refusals."""

import pytest
import torch

import rgfast
from rgfast.ops.spectrum.factors import rank_measures_from_factor

F64 = torch.float64


def data(n, d, noise, seed=0):
    g = torch.Generator().manual_seed(seed)
    low = torch.randn(3, n, 2, generator=g, dtype=F64) @ torch.randn(3, 2, d, generator=g, dtype=F64)
    return low + noise * torch.randn(3, n, d, generator=g, dtype=F64)


def factor_of(x):
    """Square, whatever the number of rows."""
    padded = torch.cat([x, x.new_zeros(len(x), x.shape[2], x.shape[2])], 1)
    return torch.linalg.qr(padded, mode="r").R


@pytest.mark.parametrize("noise", [1e-12, 1e-9, 1e-5, 1.0])
@pytest.mark.parametrize(("n", "d"), [(200, 9), (9, 9), (5, 9), (3, 40), (50, 1)])
@pytest.mark.parametrize("centering", ["mean", "none"])
def test_equal_to_the_svd_of_the_data(noise, n, d, centering):
    x = data(n, d, noise)
    want = rgfast.rank_measures(x, centering=centering, method="svd", tol=1e-7)
    rows = x - x.mean(1, keepdim=True) if centering == "mean" else x
    got = rank_measures_from_factor(factor_of(rows), torch.full((3,), n), centering=centering)
    for name in ("effective_rank", "effective_rank_variance", "participation_ratio", "stable_rank"):
        torch.testing.assert_close(getattr(got, name), getattr(want, name), rtol=1e-11, atol=1e-11)
    assert torch.equal(got.numerical_rank, want.numerical_rank)
    size = min(n, d)
    error = (got.singular_values[:, :size] - want.singular_values).abs()
    assert (error <= 1e-14 * want.singular_values[:, :1]).all()
    assert (got.singular_values[:, size:] == 0).all()
    relative = (got.effective_rank - want.effective_rank).abs() / want.effective_rank
    assert (relative <= got.error_bound).all()
    assert (got.error_bound < 1e-10).all()
    assert set(got.path) == {"svd"}


@pytest.mark.parametrize("n", [5, 12, 30])
def test_columns_that_depend_on_those_before_them(n):
    """As where positions of a LayerNorm's output stand side by side: rank and energy are in late rows too."""
    free = torch.randn(3, n, 8, 2, generator=torch.Generator().manual_seed(1), dtype=F64)
    x = torch.cat([free, -free.sum(-1, keepdim=True), free[..., :1]], -1).flatten(2)
    want = rgfast.rank_measures(x, method="svd", tol=1e-7)
    got = rank_measures_from_factor(factor_of(x - x.mean(1, keepdim=True)), torch.full((3,), n))
    for name in ("effective_rank", "effective_rank_variance", "participation_ratio", "stable_rank"):
        torch.testing.assert_close(getattr(got, name), getattr(want, name), rtol=1e-11, atol=1e-11)
    relative = (got.effective_rank - want.effective_rank).abs() / want.effective_rank
    assert (relative <= got.error_bound).all()


def test_each_matrix_has_its_own_number_of_samples_and_live_features():
    x = data(30, 6, 1.0)
    x[0, 10:] = x[0, :1]
    x[1, :, 4] = 0.0
    count = torch.tensor([11, 30, 0])
    parts = [x[0, :11], x[1], x[2, :0]]
    factor = torch.stack([factor_of((p - p.mean(0) if len(p) else p)[None])[0] for p in parts])
    got = rank_measures_from_factor(factor, count)
    assert float(got.effective_rank[0]) == pytest.approx(float(rgfast.effective_rank(parts[0])), rel=1e-12)
    assert float(got.effective_rank[1]) == pytest.approx(float(rgfast.effective_rank(parts[1])), rel=1e-12)
    assert got.singular_values[1, 5] == 0
    assert got.effective_rank[2].isnan()


@pytest.mark.parametrize(
    ("factor", "n", "error", "message"),
    [
        (torch.eye(3)[None], torch.tensor([5]), TypeError, "factor must be float64, got float32"),
        (torch.eye(3, dtype=F64), torch.tensor([5]), ValueError, "factor must"),
        (torch.zeros(1, 2, 3, dtype=F64), torch.tensor([5]), ValueError, "with r >= d > 0"),
        (torch.eye(3, dtype=F64)[None], torch.tensor([5, 5]), ValueError, "n must be 1 integers"),
        (torch.eye(3, dtype=F64)[None], torch.tensor([-1]), ValueError, "not negative"),
    ],
)
def test_what_does_not_fit_is_refused(factor, n, error, message):
    with pytest.raises(error, match=message):
        rank_measures_from_factor(factor, n)
