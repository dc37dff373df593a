"""Streams: any split, mask and merge order gives the measures of the data."""

import itertools

import numpy as np
import pytest
import torch

import rgfast

L, P, N, D = 2, 3, 401, 12
MEASURES = ("effective_rank", "effective_rank_variance", "participation_ratio", "stable_rank")


def data(dtype=torch.float64, offset=0.0):
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(L, P, N, D, generator=draw, dtype=torch.float64)
    return (x * torch.logspace(0, -1, D, dtype=torch.float64) + offset).to(dtype)


def stream(x, edges, mask=None):
    moments = rgfast.SecondMoments()
    for a, b in itertools.pairwise([0, *edges, x.shape[-2]]):
        moments.update(x[..., a:b, :], None if mask is None else mask[..., a:b])
    return moments


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("offset", [0.0, 30.0])
@pytest.mark.parametrize("centering", ["mean", "none"])
def test_measures_are_those_of_the_data(dtype, offset, centering):
    x = data(dtype, offset)
    moments = stream(x, [1, 4, 130, 398])  # a ragged last batch of three rows
    for layer in range(L):
        got = moments.rank_measures(layer, centering=centering)
        want = rgfast.rank_measures(x[layer], centering=centering)
        for name in MEASURES:
            torch.testing.assert_close(getattr(got, name), getattr(want, name), rtol=1e-9, atol=0)
        torch.testing.assert_close(got.singular_values, want.singular_values, rtol=1e-8, atol=0)
        assert bool((got.error_bound < 1e-6).all()) or centering == "none"
        assert got.baseline == want.baseline
    assert torch.equal(moments.count, torch.full((P,), N))


@pytest.mark.parametrize("seed", range(4))
def test_any_split_mask_and_merge_order(seed):
    draw = np.random.default_rng(seed)
    x = data(offset=100.0) + torch.linspace(0, 10, N, dtype=torch.float64)[:, None]
    mask = torch.rand(P, N, generator=torch.Generator().manual_seed(seed)) < 0.6
    edges = [0, *sorted(draw.choice(np.arange(1, N), 5, replace=False)), N]
    parts = [stream(x[..., a:b, :], [(b - a) // 2], mask[:, a:b]) for a, b in itertools.pairwise(edges)]
    draw.shuffle(parts)
    while len(parts) > 1:
        first, second = parts.pop(), parts.pop(int(draw.integers(len(parts))))
        parts.append(first.merge(second))
    for layer, p in itertools.product(range(L), range(P)):
        y = x[layer, p][mask[p]]
        y = y - y.mean(0)
        scatter = y.mT @ y
        assert float((parts[0].scatter(layer)[p] - scatter).abs().max()) <= 1e-12 * float(scatter.trace())
        want = rgfast.effective_rank(x[layer, p][mask[p]])
        torch.testing.assert_close(parts[0].rank_measures(layer).effective_rank[p], want, rtol=1e-9, atol=0)


@pytest.mark.parametrize("edges", [[1], [128], [5, 6, 7, 300], list(range(1, N))])
def test_bits_do_not_depend_on_batches_or_threads(edges):
    x = data(torch.float32, 3.0)
    want = stream(x, []).rank_measures(1)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            got = stream(x, edges).rank_measures(1)
            assert torch.equal(got.singular_values, want.singular_values)
            assert torch.equal(got.effective_rank, want.effective_rank)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("dtype", "factor"), [(torch.float32, 1e18), (torch.float32, 1e-18),
                                                (torch.float64, 1e150), (torch.float64, 1e-150)])  # fmt: skip
@pytest.mark.parametrize("centering", ["mean", "none"])
def test_scales(dtype, factor, centering):
    x = (data(offset=1.0) * factor).to(dtype)
    got = stream(x, [7]).rank_measures(0, centering=centering)
    want = rgfast.rank_measures(x[0], centering=centering)
    for name in MEASURES:
        torch.testing.assert_close(getattr(got, name), getattr(want, name), rtol=1e-9, atol=0)
    ratio = got.singular_values / want.singular_values
    torch.testing.assert_close(ratio, torch.ones_like(ratio), rtol=1e-8, atol=0)


def test_masks_that_select_nothing_or_one_row():
    mask = torch.zeros(P, N, dtype=torch.bool)
    mask[1, 5] = True
    mask[2, :9] = True
    m = stream(data(), [100], mask).rank_measures(0)
    assert bool(m.effective_rank[0].isnan())
    assert bool(m.singular_values[0].isnan().all())
    assert float(m.effective_rank[1]) == float(m.participation_ratio[1]) == 0
    torch.testing.assert_close(
        m.effective_rank[2], rgfast.effective_rank(data()[0, 2, :9]), rtol=1e-9, atol=0
    )
    assert m.baseline is None


def test_constant_data_have_rank_zero():
    x = torch.full((1, 2, 300, 4), 0.1, dtype=torch.float64)
    assert stream(x, [3, 150]).rank_measures(0).effective_rank.tolist() == [0, 0]


def test_state_continues_bit_for_bit():
    x = data(torch.float32)
    first = stream(x[..., :170, :], [60])
    second = rgfast.SecondMoments()
    second.load_state_dict(first.state_dict())
    for moments in (first, second):
        moments.update(x[..., 170:, :])
    assert torch.equal(first.scatter(1), second.scatter(1))
    torch.testing.assert_close(first.mean(0), x[0].double().mean(-2), rtol=1e-12, atol=1e-14)


def test_refusals():
    with pytest.raises(ValueError, match="at least one update"):
        rgfast.SecondMoments().rank_measures(0)
    bad = data()
    bad[1, 2, 7, :2] = float("nan")
    moments = rgfast.SecondMoments()
    with pytest.raises(ValueError, match="2 NaN or infinite values in layer 1, position 2"):
        moments.update(bad)
    with pytest.raises(ValueError, match="centering must be one of"):
        moments.update(data()).rank_measures(0, centering="x")
    assert torch.equal(moments.count, torch.full((P,), N))


def test_layers_that_are_not_there_and_streams_of_another_kind():
    empty, begun = rgfast.SecondMoments(), rgfast.SecondMoments().update([torch.ones(9, 3)])
    with pytest.raises(ValueError, match="the stream must have had at least one update, got none"):
        _ = empty.count
    for read in ("mean", "scatter", "singular_values", "rank_measures"):
        with pytest.raises(ValueError, match="the stream must have had at least one update, got none"):
            getattr(empty, read)(0)
        with pytest.raises(ValueError, match="layer must be at most 0, got 4"):
            getattr(begun, read)(4)
        with pytest.raises(ValueError, match="layer must be at least 0, got -1"):
            getattr(begun, read)(-1)
    with pytest.raises(TypeError, match="other must be a SecondMoments, got CKAAccumulator"):
        begun.merge(rgfast.CKAAccumulator())
