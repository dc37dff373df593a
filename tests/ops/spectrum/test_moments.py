"""Measures from a given second moment."""

import numpy as np
import pytest
import torch

import rgfast


def scatter_of(x, centering):
    y = x - x.mean(-2, keepdim=True) if centering == "mean" else x
    return y.mT @ y


@pytest.mark.parametrize("centering", ["mean", "none"])
@pytest.mark.parametrize("shape", [(2, 3, 80, 12), (5, 20), (1, 4), (33, 33)])
def test_agree_with_the_data(centering, shape):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    if shape[-2] == 1:
        x = x * 1.0
    n, d = shape[-2:]
    direct = rgfast.rank_measures(x, centering=centering, tol=1e-7)
    m = rgfast.rank_measures_from_moment(scatter_of(x, centering), n, centering=centering)
    for name in ("effective_rank", "effective_rank_variance", "participation_ratio", "stable_rank"):
        torch.testing.assert_close(getattr(m, name), getattr(direct, name), rtol=1e-9, atol=1e-12)
    assert torch.equal(m.numerical_rank, direct.numerical_rank)
    sigma = rgfast.singular_values_from_moment(scatter_of(x, centering), n, centering=centering)
    assert sigma.shape == (*shape[:-2], d)
    torch.testing.assert_close(sigma[..., : min(n, d)], direct.singular_values, rtol=1e-6, atol=1e-7)
    assert bool((sigma[..., min(n, d) :] == 0).all())
    assert m.baseline == rgfast.isotropic_baseline(n, d, centering=centering)


def test_bound_covers_the_error(known):
    draw = np.random.default_rng(0)
    for trial in range(300):
        n, d = int(draw.integers(2, 60)), int(draw.integers(1, 40))
        sigma = 10.0 ** draw.uniform(-9, 0, min(n, d))
        x = torch.from_numpy(known.with_spectrum(np.sort(sigma)[::-1], n, d, seed=trial))
        want = known.rank_of(known.truth(x)[: max(1, min(n - 1, d))])
        m = rgfast.rank_measures_from_moment(scatter_of(x, "mean"), n)
        assert abs(float(m.effective_rank) / want - 1) <= float(m.error_bound)


def test_counts_may_differ():
    x = torch.randn(3, 10, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scatter = torch.stack([scatter_of(x[0], "mean"), torch.zeros(4, 4, dtype=torch.float64),
                           torch.zeros(4, 4, dtype=torch.float64)])  # fmt: skip
    m = rgfast.rank_measures_from_moment(scatter, torch.tensor([10, 1, 0]))
    assert float(m.effective_rank[0]) == pytest.approx(float(rgfast.effective_rank(x[0])), rel=1e-12)
    assert float(m.effective_rank[1]) == 0
    assert bool(m.effective_rank[2].isnan())
    assert bool(m.participation_ratio[2].isnan())
    assert m.baseline is None
    assert torch.equal(m.n, torch.tensor([10, 1, 0]))


def test_empty_batch():
    m = rgfast.rank_measures_from_moment(torch.empty(0, 4, 4, dtype=torch.float64), 5)
    assert m.effective_rank.shape == (0,)


def test_what_was_accumulated_widens_the_bound():
    scatter = torch.diag(torch.tensor([1.0, 1e-3, 1e-6], dtype=torch.float64))
    tight = rgfast.rank_measures_from_moment(scatter, 100)
    wide = rgfast.rank_measures_from_moment(scatter, 100, accumulated=1e6)
    assert float(wide.error_bound) > 10 * float(tight.error_bound)
    assert float(wide.effective_rank) == float(tight.effective_rank)


@pytest.mark.parametrize(
    ("args", "kind", "match"),
    [
        ((torch.eye(3), 5), TypeError, "scatter must be float64, got float32"),
        ((torch.ones(3, 4, dtype=torch.float64), 5), ValueError, "square"),
        ((torch.eye(3, dtype=torch.float64), 5.0), TypeError, "n must be an integer"),
        ((torch.eye(3, dtype=torch.float64), -1), ValueError, "n must not be negative, got -1"),
        (
            (torch.eye(3, dtype=torch.float64).expand(2, 3, 3), torch.tensor([1, 2, 3])),
            ValueError,
            "have shape",
        ),
        ((torch.full((2, 3, 3), torch.nan, dtype=torch.float64), 5), ValueError, "9 NaN or .* in matrix 0"),
    ],
)
def test_refusals(args, kind, match):
    with pytest.raises(kind, match=match):
        rgfast.rank_measures_from_moment(*args)
