"""Spectra with a few small values, and ranks that equal rows limit: the truth within the bound."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rgfast.ops.spectrum.equal_rows import limit_by_equal_rows
from rgfast.ops.spectrum.rows import refine_spectra, spectra_of_rows
from rgfast.ops.spectrum.solve import PATHS
from rgfast.ops.spectrum.trailing import few_small, with_trailing

D = 100


def values(*small):
    return np.concatenate([np.linspace(1.0, 0.2, D - len(small)), small])


FEW = {
    "one": values(4e-8),
    "three": values(1e-5, 3e-7, 2e-8),
    "zero": values(0.0, 0.0),
    "twins": values(1e-6, 1e-6, 1e-6),
    "down to rounding": values(1e-6, 1e-11, 1e-15),
}


def made(known, dtype, n=300, scale=1.0):
    x = np.stack([known.with_spectrum(of, n, D, seed=k) for k, of in enumerate(FEW.values())])
    x += np.linspace(-0.1, 0.2, D)
    return torch.from_numpy(x * scale).to(dtype)


def by_moments(x, centering, moments=(None, None)):
    matrix, means = moments
    centred, raw = spectra_of_rows(x, uncentred=True, matrix=matrix, means=means)
    return centred if centering == "mean" else raw


def room_for_moments(x):
    return torch.full((len(x), D, D), torch.nan).double(), torch.full((len(x), D), torch.nan).double()


@pytest.mark.parametrize("at_hand", [False, True])
@pytest.mark.parametrize("centering", ["mean", "none"])
@pytest.mark.parametrize(
    ("dtype", "scale"),
    [(torch.float64, 1.0), (torch.float64, 1e80), (torch.float32, 1.0), (torch.float32, 1e-18)],
)
def test_few_small_values_come_within_their_bounds(known, dtype, scale, centering, at_hand):
    x = made(known, dtype, scale=scale)
    moments = room_for_moments(x) if at_hand else None
    solved = by_moments(x, centering, moments or (None, None))
    few = few_small(x, solved)
    assert bool((few[solved.sigma[:, -1] < 1e-3 * solved.sigma[:, 0]] > 0).all())
    for b in range(len(x)):
        if not few[b]:
            continue
        at = torch.tensor([b])
        found = with_trailing(x, at, solved.of(at), int(few[b]), centering, moments)
        truth = known.truth(x[b], centering)
        sigma, error = (value[0].numpy() for value in (found.singular_values(), found.singular_value_error()))
        assert np.all(np.diff(sigma) <= 0)
        assert np.all(np.abs(sigma - truth) <= error + 50 * 2.0**-53 * truth[0])
        assert PATHS[int(found.path[0])] == "refined"
        if known.rank_of(truth):
            assert abs(known.rank_of(sigma) / known.rank_of(truth) - 1) <= min(1e-10, float(found.bound()[0]))


@pytest.mark.parametrize("centering", ["mean", "none"])
def test_all_kinds_of_a_batch_are_refined(known, centering):
    """Few small values, many, and none: each in the way that suits it, and each to what an SVD knows."""
    x = made(known, torch.float64)
    many = known.with_spectrum(np.where(np.arange(D) < 20, 1.0, 1e-7), 300, D, seed=9)
    steep = known.with_spectrum(np.logspace(0, -9, D), 300, D, seed=10)
    x = torch.cat([x, torch.from_numpy(np.stack([many, steep]))])
    solved = by_moments(x, centering)
    refine_spectra(x, solved, torch.arange(len(x)), centering=centering)
    for b in range(len(x)):
        want = known.rank_of(known.truth(x[b], centering))
        assert known.rank_of(solved.sigma[b].numpy()) == pytest.approx(want, rel=1e-9)
    assert float(solved.bound().max()) <= 1e-6


def test_of_chosen_samples_alone(known):
    x = made(known, torch.float64)
    kept = torch.arange(300) % 3 > 0
    solved = by_moments(x[:, kept], "mean")
    refine_spectra(x, solved, torch.arange(len(x)), centering="mean", kept=kept)
    for b in range(len(x)):
        want = known.rank_of(known.truth(x[b, kept], "mean"))
        assert known.rank_of(solved.sigma[b].numpy()) == pytest.approx(want, rel=1e-10)


def test_bits_depend_on_the_matrix_alone(known):
    x = made(known, torch.float32)
    solved = by_moments(x, "mean")
    alike = torch.tensor([0, 0, 0])
    before = torch.get_num_threads()
    together = with_trailing(x, alike, solved.of(alike), 1, "mean")
    torch.set_num_threads(3)
    try:
        alone = with_trailing(x[:1].clone(), alike[:1], solved.of(alike[:1]), 1, "mean")
    finally:
        torch.set_num_threads(before)
    for sigma in together.sigma:
        assert torch.equal(sigma, alone.sigma[0])


def test_none_where_values_fall_smoothly_or_samples_are_few(known):
    smooth = torch.from_numpy(known.with_spectrum(np.logspace(0, -9, D), 300, D, seed=0))[None]
    assert few_small(smooth, by_moments(smooth, "mean")).tolist() == [0]
    wide = torch.randn(1, 50, D, generator=torch.Generator().manual_seed(0))
    centred, _ = spectra_of_rows(wide, uncentred=False)
    assert few_small(wide, centred).tolist() == [0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [40, 300])
def test_equal_rows_limit_the_rank(n, dtype):
    """No more different rows than tokens: what the moment says of other directions is rounding."""
    draw = torch.Generator().manual_seed(n)
    tokens = torch.randn(24, 64, generator=draw).to(dtype)
    x = tokens[torch.randint(24, (2, n), generator=draw)]
    different = [len(torch.unique(rows, dim=0)) for rows in x]
    assert max(different) < n
    centred, raw = spectra_of_rows(x, uncentred=n >= 64)
    for solved, centering, less in ((centred, "mean", 1), (raw, "none", 0)):
        if solved is None:
            continue
        limit_by_equal_rows(x, solved, torch.arange(2), centering=centering)
        assert solved.rank_limit.tolist() == [k - less for k in different]
        for b in range(2):
            y = x[b].double() - (x[b].double().mean(0) if less else 0.0)
            truth = torch.linalg.svdvals(y)[: different[b] - less]
            assert torch.allclose(solved.singular_values()[b, : len(truth)], truth, rtol=1e-9)
            assert not solved.sigma[b, len(truth) :].any()
            assert not solved.error[b, len(truth) :].any()


def test_other_rows_and_chosen_ones():
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(1, 12, 6, generator=draw)
    centred, _ = spectra_of_rows(x, uncentred=False)
    limit_by_equal_rows(x, centred, torch.tensor([0]), centering="mean")
    assert centred.rank_limit.tolist() == [6]
    # Six rows of which five are one: rows that differ in one feature alone are not equal.
    kept = torch.arange(12) < 6
    x[0, :5] = x[0, 0]
    x[0, 4, 3] += 1.0
    some, _ = spectra_of_rows(x[:, kept], uncentred=False)
    limit_by_equal_rows(x, some, torch.tensor([0]), centering="mean", kept=kept)
    assert some.rank_limit.tolist() == [2]
