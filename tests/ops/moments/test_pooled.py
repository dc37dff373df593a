"""Sums of all positions together, by every implementation, against rows that had one shift from the start."""

import pytest
import torch

from rgfast import ImplUnavailable
from rgfast.ops.moments import add_products, pooled, pooling
from rgfast.ops.moments.api import POOLED
from rgfast.runtime import measured

F64 = torch.float64


@pytest.fixture(params=["reference", "library", "cuda"])
def impl(request):
    if request.param == "cuda":
        request.getfixturevalue("emulated_gpu").admit(POOLED)
    return request.param


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def sums_of(rows, shifts, keep, pairs):
    sums = {
        (i, j): torch.zeros(len(rows[0]), rows[i].shape[2] + 2, rows[j].shape[2] + 2, dtype=F64)
        for i, j in pairs
    }
    add_products(sums, rows, shifts, keep=keep)
    return [sums[pair] for pair in pairs]


def given(positions, n, widths, pairs, *, offset=1.0, seed=0):
    """What `pooled` takes, and what it should give."""
    rows = [drawn(positions, n, d, seed=seed + k) + offset for k, d in enumerate(widths)]
    keep = torch.rand(positions, n, generator=torch.Generator().manual_seed(seed)) < 0.8
    keep[0], keep[-1, 0] = positions == 1, True  # the first of several positions has no rows
    shifts = [x[:, 0] + 0.25 for x in rows]
    alone = [x[-1:, 0] + 0.5 for x in rows]
    moves = [shift - one for shift, one in zip(shifts, alone, strict=True)]
    sums = sums_of(rows, shifts, keep, pairs)
    whole = [x.reshape(1, -1, x.shape[2]) for x in rows]
    want = torch.cat(sums_of(whole, alone, keep.reshape(1, -1), pairs))
    return (sums, [moves[i] for i, _ in pairs], [moves[j] for _, j in pairs]), want


@pytest.mark.parametrize("positions", [1, 2, 9])
@pytest.mark.parametrize(
    ("widths", "pairs"),
    [
        ((5, 5, 5), [(0, 0), (0, 1), (1, 2), (2, 2)]),
        ((34, 3), [(0, 1)]),
        ((3, 33), [(0, 1)]),
        ((1,), [(0, 0)]),
    ],
)
def test_positions_together(impl, positions, widths, pairs):
    call, want = given(positions, 7, widths, pairs)
    found = pooled(*call, impl=impl)
    assert found.shape == want.shape
    size = want.abs().amax((1, 2), keepdim=True)
    assert bool(((found - want).abs() <= 1e-13 * size).all())
    torch.testing.assert_close(found, want, rtol=1e-10, atol=1e-11)


def test_an_offset_takes_no_digits_of_what_varies(impl):
    call, want = given(4, 30, (6, 6), [(0, 1)], offset=1e6)
    torch.testing.assert_close(pooled(*call, impl=impl), want, rtol=1e-9, atol=1e-6)


def test_two_launches_with_the_same_bits_in_any_call(emulated_gpu, monkeypatch):
    emulated_gpu.admit(POOLED)
    (sums, left, right), _ = given(3, 6, (40, 40), [(0, 0), (0, 1), (1, 1)])
    assert POOLED.select("auto", pooling.Moved(sums, left, right)).name == "library"
    monkeypatch.setattr(measured, "refusal", lambda op, impl, device: None)
    monkeypatch.setattr(POOLED, "_chosen", {})
    pooled(sums, left, right)  # with what is known
    emulated_gpu.reset()
    emulated_gpu.seed(3)
    found = pooled(sums, left, right)
    launches = emulated_gpu.log("cuLaunchKernelEx")
    assert [call["kernel"] for call in launches] == list(pooling.POOLING)
    assert [call["grid"] for call in launches] == [[2, 3, 1], [3, 1, 1]]
    alone = pooled(sums[1:2], [left[1].mT.contiguous().mT], right[1:2])
    assert torch.equal(alone[0], found[1])


def test_what_the_kernels_refuse(emulated_gpu, monkeypatch):
    emulated_gpu.admit(POOLED)
    (sums, left, right), _ = given(2, 5, (3,), [(0, 0)])
    with pytest.raises(ImplUnavailable, match="sums and moves must be on one device"):
        pooled(sums, left, [x.to("meta") for x in right], impl="cuda")
    with pytest.raises(ImplUnavailable, match="there must be positions and features"):
        pooled([sums[0][:0]], [left[0][:0]], [right[0][:0]], impl="cuda")
    monkeypatch.setattr(pooling, "MOST_SIDE", 0)
    with pytest.raises(ImplUnavailable, match="a grid has 0 blocks of pairs at most"):
        pooled(sums, left, right, impl="cuda")
