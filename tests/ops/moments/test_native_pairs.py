"""Cross moments of pairs of layers: every implementation against fp64 products."""

import math

import pytest
import torch

from rgfast.ops.moments import pair_products
from rgfast.ops.moments.api import PAIRS

F64 = torch.float64


def _given(positions, n, widths, *, near=1.0, offset=0.0, scales=None, own=True, dtype=torch.float32):
    generator = torch.Generator().manual_seed(sum(widths) + n)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=F64)

    base = normal(positions, n, max(widths))
    scales = scales or [1.0] * len(widths)
    rows = [
        ((base[..., :d] + near * normal(positions, n, d)) * s + offset).to(dtype)
        for d, s in zip(widths, scales, strict=True)
    ]
    shifts = [x.double().mean(1) for x in rows]
    wide = [x.double() - s[:, None] for x, s in zip(rows, shifts, strict=True)]
    power = [math.frexp(float(u.abs().max()) or 1.0)[1] for u in wide]
    return {
        "rows": rows,
        "shifts": shifts,
        "units": [torch.full((positions,), 2.0**-p, dtype=F64) for p in power],
        "owns": [torch.bmm(u.mT, u) if own else None for u in wide],
        "moves": [normal(positions, d) for d in widths],
    }, wide


def _check(given, wide, pairs, impl, tol):
    sizes = {(i, j): float((wide[i].norm(dim=(1, 2)) * wide[j].norm(dim=(1, 2))).sum()) for i, j in pairs}
    totals = {
        (i, j): torch.full((given["rows"][i].shape[2], given["rows"][j].shape[2]), size, dtype=F64)
        for (i, j), size in sizes.items()
    }
    found = pair_products(totals, **given, impl=impl)
    for k, (i, j) in enumerate(pairs):
        u, v = wide[i], wide[j]
        cross, a, b = torch.bmm(u.mT, v), u.square().sum(2), v.square().sum(2)
        level = (a.sum(1) * b.sum(1)).sqrt()  # ‖u‖‖v‖
        assert float(((totals[i, j] - sizes[i, j] - cross.sum(0)).abs() / sizes[i, j]).max()) < tol
        assert float(((found.norm[k].sqrt() - cross.square().sum((1, 2)).sqrt()).abs() / level).max()) < tol
        torch.testing.assert_close(found.products[k], (a * b).sum(1), rtol=1e-12, atol=0)
        for got, want in (
            (found.right_sums[k, :, : v.shape[2]], (a[..., None] * v).sum(1)),
            (found.left_sums[k, :, : u.shape[2]], (b[..., None] * u).sum(1)),
        ):
            assert float((got - want).abs().max()) <= 1e-11 * float((a.amax(1) * b.sqrt().sum(1)).max() * (
                1 + float((b.amax(1) / a.amax(1)).max())))  # fmt: skip
        e, f = given["moves"][i], given["moves"][j]
        right, left = (cross * e[:, :, None]).sum(1), (cross * f[:, None]).sum(2)
        size = level[:, None] * (e.norm(dim=1) + f.norm(dim=1))[:, None]
        assert float(((found.moved_right[k, :, : v.shape[2]] - right).abs() / size).max()) < tol
        assert float(((found.moved_left[k, :, : u.shape[2]] - left).abs() / size).max()) < tol


@pytest.mark.parametrize("impl", ["native", "cuda", "reference"])
@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("width", [1, 2, 3, 15, 16, 17, 63, 64, 65, 97])
def test_any_width(width, own, impl, request):
    if impl == "cuda":  # its kernels run on this processor, on the CPU's tensors
        request.getfixturevalue("emulated_gpu").admit(PAIRS)
    given, wide = _given(3, 37, (width, width, width), own=own)
    pairs = [(0, 1), (1, 2), (0, 2), *([(1, 1)] if own else [])]
    _check(given, wide, pairs, impl, 1e-6 if impl == "native" else 1e-12)


@pytest.mark.parametrize("n", [2, 3, 31, 32, 33, 127, 129, 500])
def test_any_number_of_samples(n):
    given, wide = _given(2, n, (20, 33, 20), own=False)
    _check(given, wide, [(0, 1), (0, 2), (1, 2)], "native", 1e-6)


def test_layers_of_other_widths_beside_their_own_moments():
    given, wide = _given(2, 200, (20, 33, 20))
    _check(given, wide, [(0, 0), (0, 1), (0, 2), (1, 1), (1, 2)], "native", 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scales", [(1.0, 1e3), (1e18, 1e17), (1e-18, 1e-17)])
def test_scales(scales, dtype):
    given, wide = _given(2, 100, (24, 24), scales=scales, dtype=dtype)
    _check(given, wide, [(0, 1), (0, 0), (1, 1)], "native", 1e-6)


def test_a_layer_that_is_constant_has_no_cross_moment():
    given, _ = _given(2, 100, (24, 24), scales=(1.0, 0.0), offset=3.0)
    given["units"][1] = torch.zeros(2, dtype=F64)
    totals = {(0, 1): torch.zeros(24, 24, dtype=F64), (1, 1): torch.zeros(24, 24, dtype=F64)}
    found = pair_products(totals, **given, impl="native")
    assert not any(bool(x.any()) for x in (*totals.values(), *found))


def test_an_offset_costs_no_digits():
    given, wide = _given(2, 300, (24, 24), offset=1e4, dtype=torch.float64)
    _check(given, wide, [(0, 1)], "native", 1e-6)


def test_near_layers_err_by_their_difference():
    given, wide = _given(2, 300, (24, 24), near=1e-6, dtype=torch.float64)
    _check(given, wide, [(0, 1)], "native", 1e-12)


def test_the_bits_do_not_depend_on_threads_or_on_strides():
    given, _ = _given(5, 130, (40, 40, 40))
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            totals = {(0, 1): torch.zeros(40, 40, dtype=F64), (1, 2): torch.zeros(40, 40, dtype=F64)}
            rows = [
                x.transpose(0, 1).contiguous().transpose(0, 1) if threads == 2 else x for x in given["rows"]
            ]
            sums = pair_products(totals, **{**given, "rows": rows}, impl="native")
            found.append([*totals.values(), *sums])
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, found[0], strict=True))


def test_refusals():
    given, _ = _given(2, 30, (5, 5), own=False)
    total = {(0, 0): torch.zeros(5, 5, dtype=F64)}
    with pytest.raises(RuntimeError, match="a layer beside itself needs its own moment"):
        pair_products(total, **given, impl="native")
    halves = {**given, "rows": [x.bfloat16() for x in given["rows"]]}
    with pytest.raises(RuntimeError, match="it takes float32 and float64"):
        pair_products(total, **halves, impl="native")
    turned = {**given, "rows": [x.mT.contiguous().mT for x in given["rows"]]}
    with pytest.raises(RuntimeError, match="contiguous features"):
        pair_products(total, **turned, impl="native")
    assert {*PAIRS.impls} == {"native", "cuda", "library", "reference"}
