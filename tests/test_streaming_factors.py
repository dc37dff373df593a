"""Triangular factors of a stream against the SVD of all its rows, for any split, mask and merge."""

import itertools

import numpy as np
import pytest
import torch

from rgfast.streaming import MomentAccumulator, state_bytes

F64 = torch.float64
NOISES = (0.0, 1e-12, 1e-9, 1e-7)


def deficient(noise, n=500, d=9, rank=3, lead=(2,), seed=0, offset=30.0):
    """Rows of a low rank, but for noise, about a mean that drifts away from the first rows."""
    g = torch.Generator().manual_seed(seed)
    low = torch.randn(*lead, n, rank, generator=g, dtype=F64)
    x = low @ torch.randn(*lead, rank, d, generator=g, dtype=F64)
    x = x + noise * torch.randn(*lead, n, d, generator=g, dtype=F64)
    # Powers of two leave the deficient directions as they are.
    return x + offset + torch.linspace(0, 4, n, dtype=F64).round()[:, None] * x[..., :1, :]


def singular(x, centred):
    return torch.linalg.svdvals(x - x.mean(-2, keepdim=True) if centred else x)


def assert_factor(acc, layer, x, at=(), tol=3e-14):
    """To a small multiple of u σ₁: a moment would be good to 1e-8 σ₁."""
    for centering in ("mean", "none"):
        factor = acc.factor(layer, centering=centering)[at]
        want = singular(x, centering == "mean")
        got = torch.linalg.svdvals(factor)
        assert (got - want).abs().max() <= tol * singular(x, False)[0], centering
    assert torch.allclose(acc.factor(layer)[at].mT @ acc.factor(layer)[at], acc.scatter(layer)[at])


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("cuts", [[], [1, 2, 3], [127, 128, 300]])
@pytest.mark.parametrize("masked", [False, True])
def test_small_singular_values_are_those_of_all_rows(noise, cuts, masked):
    x = deficient(noise)
    mask = torch.rand(2, 500, generator=torch.Generator().manual_seed(1)) < 0.4 if masked else None
    acc = MomentAccumulator(factors=[0])
    for a, b in itertools.pairwise([0, *cuts, 500]):
        acc.update([x[:, a:b]], None if mask is None else mask[:, a:b])
    for p in range(2):
        assert_factor(acc, 0, x[p] if mask is None else x[p][mask[p]], p)


def test_scale_and_shift_of_far_data():
    x = deficient(1e-9)
    for scale in (2.0**400, 2.0**-300):
        acc = MomentAccumulator(factors=[0]).update([x * scale])
        got = torch.linalg.svdvals(acc.factor(0)[0]) / scale
        assert (got - singular(x[0], True)).abs().max() <= 1e-13 * singular(x[0], False)[0]


@pytest.mark.parametrize("seed", range(3))
def test_parts_merge_in_any_order(seed):
    x = deficient(1e-8, n=700)
    rng = np.random.default_rng(seed)
    edges = [0, *sorted(rng.choice(700, 5, replace=False)), 700]
    parts = [MomentAccumulator(factors=[0]).update([x[:, a:b]]) for a, b in itertools.pairwise(edges)]
    parts.append(MomentAccumulator(factors=[0]))
    rng.shuffle(parts)
    total = MomentAccumulator(factors=[0])
    for part in parts:
        total.merge(part)
    for p in range(2):
        assert_factor(total, 0, x[p], p)
    pooled = total.pooled()
    assert_factor(pooled, 0, x.flatten(0, 1))
    assert_factor(total.at(1), 0, x[1])


def test_a_well_conditioned_layer_needs_none():
    g = torch.Generator().manual_seed(0)
    good = torch.randn(2, 400, 6, generator=g, dtype=F64)
    bad = deficient(1e-9, n=400)
    acc = MomentAccumulator(factors=[0, 1]).update([good, bad])
    bare = MomentAccumulator().update([good, bad])
    assert acc.factor(0).isnan().all()
    assert not acc.factor(1).isnan().any()
    assert bare.factor(0) is None
    assert acc.nbytes - bare.nbytes <= 8 * 2 * 10**2 + 16
    few = MomentAccumulator(factors=[0]).update([good[:, :10]])
    assert_factor(few, 0, good[0, :10], 0)
    # One position may need it and another not.
    mixed = torch.stack([good[0], bad[0, :, :6]])
    mixed[1, :, 5] = mixed[1, :, 4]
    acc = MomentAccumulator(factors=[0]).update([mixed])
    assert acc.factor(0)[0].isnan().all()
    assert_factor(acc, 0, mixed[1], 1)
    # What either has dropped is not needed for both, nor for all positions as one.
    more = MomentAccumulator(factors=[0]).update([mixed.flip(0)]).merge(acc)
    assert more.factor(0).isnan().all()
    assert acc.pooled().factor(0).isnan().all()


def test_positions_without_rows_do_not_count():
    x = deficient(1e-9)
    mask = torch.ones(2, 500, dtype=torch.bool)
    mask[1] = False
    acc = MomentAccumulator(factors=[0]).update([x], mask)
    assert_factor(acc.pooled(), 0, x[0])
    assert torch.linalg.svdvals(acc.factor(0)[1]).max() == 0


def test_bits_do_not_depend_on_batches_threads_or_a_stop():
    x, good = deficient(1e-8, d=70, n=600), torch.randn(2, 600, 4, dtype=F64)
    before = torch.get_num_threads()
    found = []
    for size, threads in ((600, 1), (1, 2), (37, 2)):
        torch.set_num_threads(threads)
        acc = MomentAccumulator(factors=[0, 1])
        for k, (a, b) in enumerate(zip(x.split(size, 1), good.split(size, 1), strict=True)):
            acc.update([a, b])
            if k in (3, 400):
                state = acc.state_dict()
                acc = MomentAccumulator(factors=[0, 1])
                acc.load_state_dict(state)
        found.append(acc)
    torch.set_num_threads(before)
    for other in found[1:]:
        assert torch.equal(other.factor(0), found[0].factor(0))
        assert other.factor(1).isnan().all()


def test_a_state_without_factors_goes_on_without():
    x = deficient(1e-9)
    acc = MomentAccumulator(factors=[0])
    acc.load_state_dict(MomentAccumulator().update([x]).state_dict())
    assert acc.update([x]).factor(0).isnan().all()


def test_layers_are_picked_with_their_factors():
    x, y = deficient(1e-9), deficient(1e-9, d=5, seed=3)
    acc = MomentAccumulator(factors=[0, 2]).update([x, x, y])
    part = acc.only([2, 1])
    assert_factor(part, 0, y[0], 0)
    assert part.factor(1) is None
    assert acc.factored == (0, 2)
    with pytest.raises(ValueError, match=r"factors of the layers \[0\], got \[0, 2\]"):
        MomentAccumulator(factors=[0]).update([x, x, y]).merge(acc)


def test_memory_is_what_was_stated():
    x = deficient(1e-9, n=2048)
    acc = MomentAccumulator(factors=[0]).update([x])
    assert acc.nbytes <= state_bytes((9,), 2, factors=[0]) + 16
    held = acc.nbytes
    assert acc.update([x]).nbytes == held
