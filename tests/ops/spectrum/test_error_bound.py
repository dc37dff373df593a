"""The reported bound covers the error on each of thousands of random spectra, and the paths keep to rtol."""

import numpy as np
import pytest
import torch

import rgfast

SHAPES = [
    (2, 3),
    (3, 2),
    (5, 5),
    (6, 40),
    (40, 6),
    (17, 16),
    (64, 24),
    (24, 64),
    (33, 33),
    (300, 12),
    (12, 300),
]
KINDS = ["loguniform", "clusters", "power", "low rank", "near rank 1", "gaussian", "cliff"]


def draw_sigma(kind, m, draw):
    depth = draw.uniform(0, 12)
    if kind == "loguniform":
        sigma = 10.0 ** -draw.uniform(0, depth, m)
    elif kind == "clusters":
        sigma = 10.0 ** -draw.choice(draw.uniform(0, depth, 3), m)
    elif kind == "power":
        sigma = np.arange(1, m + 1) ** -draw.uniform(0, 8)
    elif kind == "low rank":
        rank = draw.integers(1, m + 1)
        sigma = np.where(np.arange(m) < rank, draw.uniform(0.5, 1, m), 10.0**-depth)
    elif kind == "near rank 1":
        sigma = np.where(np.arange(m) < 1, 1.0, 10.0**-depth * draw.uniform(0, 1, m))
    elif kind == "cliff":
        sigma = np.where(np.arange(m) < m / 2, 10.0 ** (-depth * np.arange(m) / m), 0.0)
    else:
        sigma = np.ones(m)
    return np.sort(sigma)[::-1]


def batch(known, n, d, seed, count):
    """`[count, n, d]` fp64 and its singular values by LAPACK, known zeros dropped."""
    draw = np.random.default_rng(seed)
    data = []
    for i in range(count):
        kind = KINDS[i % len(KINDS)]
        if kind == "gaussian":
            x = draw.standard_normal((n, d)) * 10.0 ** draw.uniform(-3, 3, d)
        else:
            x = known.with_spectrum(draw_sigma(kind, min(n, d), draw), n, d, int(draw.integers(1 << 31)))
        data.append(x * 10.0 ** draw.uniform(-9, 9) + draw.choice([0.0, 1.0, 1e-3]))
    return torch.from_numpy(np.stack(data))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_bound_covers_the_error(known, shape, dtype):
    n, d = shape
    x = batch(known, n, d, 1000 * n + d, 154).to(dtype)
    m = rgfast.rank_measures(x)
    info = rgfast.singular_values(x, return_info=True)[1]
    loose = rgfast.rank_measures(x, method="gram")
    single = rgfast.rank_measures(x, precision="single")
    svd = rgfast.rank_measures(x, method="svd")
    bounds = (m, loose, single, svd)
    for i in range(len(x)):
        truth = known.truth(x[i])[: min(n - 1, d)]
        if not truth.any():  # an offset has swallowed the signal of fp32 data
            assert all(float(way.effective_rank[i]) == 0 for way in bounds)
            continue
        rank, variance = known.rank_of(truth), known.rank_of(truth, "variance")
        for way in bounds:
            assert abs(float(way.effective_rank[i]) / rank - 1) <= float(way.error_bound[i])
            off = abs(float(way.effective_rank_variance[i]) / variance - 1)
            assert off <= float(way.variance_error_bound[i])
        assert abs(float(m.effective_rank[i]) / rank - 1) <= 1e-6
        error = np.abs(m.singular_values[i].numpy()[: len(truth)] - truth)
        lapack = 50 * 2.0**-53 * truth[0]  # what the truth itself may be off by, at exact zeros
        assert np.all(error <= info.singular_value_error[i].numpy()[: len(truth)] + lapack)
    assert bool((m.error_bound <= 1e-6).all())


def test_every_path_is_taken(known):
    x = batch(known, 64, 24, 5, 154)
    paths = rgfast.rank_measures(x).path.tolist()
    assert {"gram", "refined"} <= set(paths)
    # what the refinement cannot promise, LAPACK's SVD is asked for
    paths = rgfast.effective_rank(x, rtol=1e-9, return_info=True)[1].path.tolist()
    assert {"gram", "refined", "svd"} == set(paths)


def test_only_matrices_that_need_it_are_solved_again(known, monkeypatch):
    from rgfast.ops.spectrum import solve

    x = torch.randn(40, 64, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for i in (3, 30):
        x[i] = torch.from_numpy(known.with_spectrum(known.spectra["1/i^4"](8) ** 2, 64, 8, seed=i))
    seen = []
    inner = solve.refined

    def counted(stages, terms, accumulated, *rest):
        seen.extend(accumulated)
        return inner(stages, terms, accumulated, *rest)

    monkeypatch.setattr(solve, "refined", counted)
    m = rgfast.rank_measures(x)
    assert len(seen) == 2
    assert [i for i, path in enumerate(m.path) if path == "refined"] == [3, 30]
    alone = torch.stack([rgfast.effective_rank(y) for y in x])
    torch.testing.assert_close(alone, m.effective_rank, rtol=1e-9, atol=0)


def test_single_precision_meets_its_own_figures():
    x = torch.randn(20, 400, 48, generator=torch.Generator().manual_seed(0))
    x = x * torch.logspace(0, -2, 48) + 30
    double, single = rgfast.rank_measures(x), rgfast.rank_measures(x, precision="single")
    ratio = rgfast.participation_ratio(x, precision="single")
    torch.testing.assert_close(ratio, double.participation_ratio, rtol=1e-6, atol=0)
    torch.testing.assert_close(
        single.effective_rank_variance, double.effective_rank_variance, rtol=1.5e-5, atol=0
    )
    torch.testing.assert_close(
        rgfast.stable_rank(x, precision="single"), double.stable_rank, rtol=1e-5, atol=0
    )
    assert not torch.equal(single.effective_rank, double.effective_rank)
