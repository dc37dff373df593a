"""Products added to moments, against loops in fp64 and long double, by every implementation."""

import math

import numpy as np
import pytest
import torch

import rgfast
from rgfast.ops.moments import add_products, first_mean, shifted
from rgfast.ops.moments.api import OP
from rgfast.ops.moments.call import Products
from rgfast.ops.moments.impl import library
from rgfast.runtime import waiting

F64 = torch.float64
WIDTHS = [0, 1, 2, 3, 15, 16, 17, 63, 64, 65, 97]


@pytest.fixture(params=["native", "cuda", "reference"])
def impl(request):
    if request.param == "cuda":  # its kernels run on this processor, on the CPU's tensors
        request.getfixturevalue("emulated_gpu").admit(OP)
    return request.param


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def truth(x, shift, y, other, keep, exponents=(0, 0)):
    """Σ z_iᵀ z_j in long double, and the same of absolute values, ``[P, d + 2, e + 2]``."""

    def extended(x, shift, exponent):
        z = (x.to(F64) - shift[:, None]).numpy().astype(np.longdouble) * np.longdouble(2) ** -exponent
        return np.concatenate([z, np.square(z).sum(-1, keepdims=True), np.ones_like(z[..., :1])], -1)

    total, size = [], []
    sides = (extended(x, shift, exponents[0]), extended(y, other, exponents[1]))
    for a, b, kept in zip(*sides, keep.numpy(), strict=True):
        total.append(a[kept].T @ b[kept])
        size.append(np.abs(a[kept]).T @ np.abs(b[kept]))
    return np.array(total), np.array(size)


def assert_close(found, before, want, size, b):
    # Sums of b terms, of squares of d terms, in fp64, added to what was there.
    error = np.abs(found.numpy() - before.numpy() - want)
    assert (error <= 2.0**-52 * ((b + 100) * size + np.abs(before.numpy()) + 1e-300)).all()


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(("positions", "b"), [(1, 1), (1, 129), (2, 17), (5, 300), (9, 128)])
def test_sums(impl, width, positions, b):
    if width == 0:
        return
    x, y = drawn(positions, b, width), drawn(positions, b, 5, seed=1)
    shifts = [drawn(positions, width, seed=2), drawn(positions, 5, seed=3)]
    keep = torch.ones(positions, b, dtype=torch.bool)
    sums = {
        (0, 0): torch.ones(positions, width + 2, width + 2, dtype=F64),
        (0, 1): drawn(positions, width + 2, 7, seed=4),
        (1, 1): torch.zeros(positions, 7, 7, dtype=F64),
    }
    before = {key: total.clone() for key, total in sums.items()}
    add_products(sums, [x, y], shifts, impl=impl)
    for (i, j), total in sums.items():
        sides = [(x, shifts[0]), (y, shifts[1])]
        want, size = truth(*sides[i], *sides[j], keep)
        assert_close(total, before[i, j], want, size, b)
        if i == j and impl != "reference":
            assert torch.equal(total, total.mT)


@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes_masks_and_units(impl, dtype):
    x, y = (8 * drawn(3, 150, 21)).to(dtype), drawn(3, 150, 9, seed=1).to(dtype)
    x[0, 0, 0] = 2.0**-24 if dtype == torch.float16 else 0.0  # a half that is not normal
    shifts = [drawn(3, 21, seed=2), drawn(3, 9, seed=3)]
    keep = torch.rand(3, 150, generator=torch.Generator().manual_seed(5)) < 0.5
    keep[2] = False
    want, size = truth(x, shifts[0], y, shifts[1], keep, (40, -3))
    hidden = [z.masked_fill(~keep[..., None], math.nan) for z in (x, y)]
    total = torch.zeros(3, 23, 11, dtype=F64)
    add_products({(0, 1): total}, hidden, shifts, keep=keep, exponents=[40, -3], impl=impl)
    assert_close(total, torch.zeros_like(total), want, size, 150)
    assert (total[2] == 0).all()


def test_strides(impl):
    x = drawn(4, 60, 13)
    shift = drawn(4, 13, seed=1)
    want = torch.zeros(4, 15, 15, dtype=F64)
    add_products({(0, 0): want}, [x], [shift], impl=impl)
    wide = torch.empty(4, 60, 27, dtype=F64)
    wide[..., 1::2] = x
    for other in (x.mT.contiguous().mT, x.transpose(0, 1).contiguous().transpose(0, 1), wide[..., 1::2]):
        keep = torch.ones(60, 4, dtype=torch.bool).T
        total = torch.zeros(4, 15, 15, dtype=F64)
        add_products({(0, 0): total}, [other], [shift.T.contiguous().T], keep=keep, impl=impl)
        assert torch.equal(total, want)


def test_sums_without_the_last_columns(impl):
    x, y = drawn(2, 40, 64).float(), drawn(2, 40, 3, seed=1).float()
    shifts = [drawn(2, 64, seed=2), drawn(2, 3, seed=3)]
    sums = {(0, 0): torch.ones(2, 64, 64, dtype=F64), (0, 1): torch.ones(2, 64, 3, dtype=F64)}
    if impl == "native":
        with pytest.raises(rgfast.ImplUnavailable, match=r"it computes the columns .* in any case"):
            add_products(sums, [x, y], shifts, extended=False, impl=impl)
        return
    add_products(sums, [x, y], shifts, extended=False, impl=impl)
    for j, other in ((0, x), (1, y)):
        want, size = truth(x, shifts[0], other, shifts[j], torch.ones(2, 40, dtype=torch.bool))
        d = other.shape[2]
        assert_close(sums[0, j], torch.ones(2, 64, d, dtype=F64), want[:, :64, :d], size[:, :64, :d], 40)
    with pytest.raises(ValueError, match=r"sums\[0, 0\] must have shape \(2, 66, 66\), got \(2, 64, 64\)"):
        add_products(sums, [x, y], shifts, impl=impl)


@pytest.mark.parametrize(("b", "width"), [(0, 3), (70, 130), (1100, 3)])
@pytest.mark.parametrize("impl", ["native", "cuda", "library", "reference"], indirect=True)
def test_fresh_sums_hold_products_alone(impl, b, width):
    """Of few rows and of so many that a GPU's kernels cut them, and of layers that are cut by the library."""
    x, shift = drawn(2, b, width).float(), [drawn(2, width, seed=1), drawn(2, 4, seed=2)]
    rows, keep = [x, drawn(2, b, 4, seed=3).float()], torch.rand(2, b, generator=torch.Generator()) < 0.7
    shapes = {(0, 0): (width, width), (0, 1): (width, 4), (1, 1): (4, 4)}

    def summed(value, fresh):
        sums = {key: torch.full((2, d + 2, e + 2), value, dtype=F64) for key, (d, e) in shapes.items()}
        add_products(sums, rows, shift, keep=keep, fresh=fresh, impl=impl)
        return sums

    want, found = summed(0.0, False), summed(math.nan, True)
    for key, total in found.items():
        assert torch.equal(total, want[key])


def test_fresh_sums_of_layers_that_are_multiplied_at_once(monkeypatch):
    monkeypatch.setattr(waiting, "_EVERYWHERE", True)
    rows, shifts = [drawn(3, 40, 6, seed=k) for k in range(3)], [drawn(3, 6, seed=9)] * 3
    sums = {(i, j): torch.full((3, 8, 8), math.nan, dtype=F64) for i in range(3) for j in (i, i + 1) if j < 3}
    assert library._fits_together(Products(sums, rows, shifts, None, [0] * 3))
    add_products(sums, rows, shifts, fresh=True, impl="library")
    want = {key: torch.zeros(3, 8, 8, dtype=F64) for key in sums}
    add_products(want, rows, shifts, impl="reference")
    for key, total in sums.items():
        torch.testing.assert_close(total, want[key], rtol=1e-12, atol=1e-12)


def test_nothing_to_add(impl):
    for positions, b in ((0, 3), (2, 0)):
        total = torch.ones(positions, 4, 4, dtype=F64)
        add_products(
            {(0, 0): total}, [torch.empty(positions, b, 2)], [torch.zeros(positions, 2, dtype=F64)], impl=impl
        )
        assert (total == 1).all()


def test_first_mean_and_shifted():
    x = drawn(3, 50, 4).float()
    x[..., 1] = 0.1
    keep = torch.rand(3, 50, generator=torch.Generator().manual_seed(5)) < 0.5
    for kept in (None, keep):
        found = first_mean(x.masked_fill(~keep[..., None], math.nan) if kept is not None else x, kept)
        for p in range(3):
            rows = x[p].double() if kept is None else x[p, keep[p]].double()
            assert torch.allclose(found[p], rows.mean(0), rtol=1e-14, atol=1e-15)
        assert (found[:, 1] == x[0, 0, 1].double()).all()
    moved = shifted(x, found, keep, exponent=3)
    assert torch.equal(moved, ((x.double() - found[:, None]) / 8).masked_fill(~keep[..., None], 0.0))


def test_what_runs_is_recorded_and_explained():
    total = torch.zeros(1, 4, 4, dtype=F64)
    args = ({(0, 0): total}, [torch.ones(1, 5, 2)], [torch.zeros(1, 2, dtype=F64)])
    with rgfast.record() as log:
        add_products(*args)
    assert [entry.op for entry in log] == ["moments"]
    assert log[0].impl == rgfast.explain("moments", *args).chosen


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"rows": []}, ValueError, "shifts must be one per layer of rows, got 1 for 0 layers"),
        ({"rows": [torch.zeros(2, 5, 4)]}, ValueError, r"shifts\[0\] must have shape \(2, 4\), got \(2, 3\)"),
        ({"rows": [torch.zeros(5, 3)]}, ValueError, r"rows\[0\] must have at least 3"),
        ({"shifts": [torch.zeros(2, 3)]}, TypeError, r"shifts\[0\] must be float64, got float32"),
        ({"keep": torch.ones(2, 4, dtype=torch.bool)}, ValueError, r"keep must be bool \(2, 5\)"),
        ({"sums": {(1, 0): torch.zeros(2, 5, 5, dtype=F64)}}, ValueError, "with 0 <= i <= j < 1"),
        ({"sums": {(0, 0): torch.zeros(2, 5, 4, dtype=F64)}}, ValueError, r"must have shape \(2, 5, 5\)"),
        ({"sums": {(0, 0): torch.zeros(2, 5, 5, dtype=F64).mT}}, ValueError, "must be contiguous"),
        ({"exponents": [1, 2]}, ValueError, "exponents must be one per layer of rows, got 2 for 1 layers"),
    ],
)  # fmt: skip
def test_bad_input_is_refused(change, error, message):
    given = {
        "sums": {(0, 0): torch.zeros(2, 5, 5, dtype=F64)},
        "rows": [torch.zeros(2, 5, 3)],
        "shifts": [torch.zeros(2, 3, dtype=F64)],
        "keep": None,
        "exponents": None,
    } | change
    sums, rows, shifts = given["sums"], given["rows"], given["shifts"]
    with pytest.raises(error, match=message):
        add_products(sums, rows, shifts, keep=given["keep"], exponents=given["exponents"])
