"""The products by torch's batched GEMMs: fp64 truth on awkward shapes, no wait, on a fake GPU too."""

import itertools
import math

import guards
import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException

import rgfast
from rgfast import ImplUnavailable
from rgfast.ops.moments import add_positions, add_products, pair_products
from rgfast.ops.moments.api import OP, PAIRS, POSITIONS
from rgfast.ops.moments.call import Products
from rgfast.ops.moments.impl import library
from rgfast.runtime import waiting

F64 = torch.float64
SIZES = [0, 1, 2, 3, 15, 16, 17, 63, 65, 97]


def drawn(*shape, seed=0, dtype=F64):
    made = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(*shape, generator=made, dtype=F64, device="cpu").to(dtype)


def case(widths, positions, b, pairs="all", dtype=torch.float32):
    rows = [drawn(positions, b, d, seed=k, dtype=dtype) * 2 + 30 for k, d in enumerate(widths)]
    count = range(len(widths))
    near = len(widths) if pairs == "all" else 1
    keys = [(i, j) for i in count for j in count if i <= j <= i + near]
    sums = {
        (i, j): torch.zeros(positions, widths[i] + 2, widths[j] + 2, dtype=F64, device="cpu") for i, j in keys
    }
    shifts = [x.to(F64).sum(1) / max(1, b) + drawn(positions, x.shape[2], seed=9) for x in rows]
    return sums, rows, shifts


def truth(rows, shifts, keep, exponents, p):
    sides = []
    for x, shift, exponent in zip(rows, shifts, exponents, strict=True):
        kept = slice(None) if keep is None else keep[p]
        y = (x[p][kept].to(F64) - shift[p]) * 2.0**-exponent
        sides.append(torch.cat([y, y.square().sum(1, keepdim=True), torch.ones_like(y[:, :1])], 1))
    return sides


def check(sums, rows, shifts, keep=None, exponents=None, before=0.0):
    exponents = exponents or [0] * len(rows)
    for p in range(len(rows[0])):
        z = truth(rows, shifts, keep, exponents, p)
        for (i, j), total in sums.items():
            size = z[i].abs().T @ z[j].abs()
            bound = (len(z[i]) + 4) * 2.0**-53 * size + 2.0**-52 * before
            assert ((total[p] - before - z[i].T @ z[j]).abs() <= bound).all(), (i, j, p)


@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("b", SIZES)
def test_awkward_numbers_of_rows(b, dtype):
    sums, rows, shifts = case((5, 3), 2, b, dtype=dtype)
    add_products(sums, rows, shifts, impl="library")
    check(sums, rows, shifts)


@pytest.mark.parametrize("d", [1, 2, 3, 15, 16, 17, 63, 65, 97, 128, 130])
def test_awkward_widths(d):
    sums, rows, shifts = case((d, 4, d), 3, 20)
    add_products(sums, rows, shifts, impl="library")
    check(sums, rows, shifts)
    own = sums[0, 0]
    assert torch.equal(own, own.mT)


@pytest.mark.parametrize("pairs", ["all", "adjacent"])
@pytest.mark.parametrize("d", [4, 130])
def test_masks_units_strides_and_what_was_there(d, pairs):
    sums, rows, shifts = case((d, d, d), 4, 31, pairs)
    keep = drawn(4, 31, seed=5) > 0
    keep[1] = False
    rows[1][2, ~keep[2]] = torch.nan
    rows[2] = rows[2].mT.contiguous().mT
    rows[0] = torch.stack([rows[0], rows[0]], 3)[..., 1]
    for total in sums.values():
        total += 0.5
    with rgfast.record() as log:
        add_products(sums, rows, shifts, keep=keep, exponents=[1, -2, 3], impl="library")
    assert [(entry.op, entry.impl) for entry in log] == [("moments", "library")]
    check(sums, rows, shifts, keep, [1, -2, 3], before=0.5)
    for total in sums.values():
        assert (total[1] == 0.5).all()


@pytest.fixture
def elsewhere(monkeypatch):
    """The CPU is taken for a device, where launches take longer than what they do for few rows."""
    monkeypatch.setattr(waiting, "_EVERYWHERE", True)


@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("pairs", ["all", "adjacent"])
def test_layers_are_multiplied_together(elsewhere, pairs, masked, dtype):
    sums, rows, shifts = case((5,) * 4, 3, 31, pairs, dtype)
    keep = None
    if masked:
        keep = drawn(3, 31, seed=5) > 0
        keep[1] = False
        rows[2][0, ~keep[0]] = torch.nan
    for total in sums.values():
        total += 0.5
    assert library._fits_together(Products(sums, rows, shifts, keep, [0] * 4))
    add_products(sums, rows, shifts, keep=keep, impl="library")
    check(sums, rows, shifts, keep, before=0.5)


def test_plain_sums_of_layers_together(elsewhere):
    extended, rows, shifts = case((4,) * 3, 2, 20)
    sums = {key: torch.zeros(2, 4, 4, dtype=F64, device="cpu") for key in extended}
    assert library._fits_together(Products(sums, rows, shifts, None, [0] * 3, 0))
    add_products(sums, rows, shifts, extended=False, impl="library")
    add_products(extended, rows, shifts, impl="reference")
    for key, total in sums.items():
        torch.testing.assert_close(total, extended[key][:, :4, :4], rtol=1e-12, atol=1e-12)


def test_which_layers_are_multiplied_together(elsewhere, monkeypatch):
    def fits(widths=(5, 5, 5), exponents=(0, 0, 0), without=(), dtype=torch.float32):
        sums, rows, shifts = case(widths, 2, 9, "adjacent")
        rows[0] = rows[0].to(dtype)
        sums = {key: total for key, total in sums.items() if key not in without}
        return library._fits_together(Products(sums, rows, shifts, None, exponents))

    assert fits()
    assert fits(without=[(0, 1), (1, 2)])
    assert not fits(without=[(0, 1)])  # neighbors are compared here and there
    assert not fits(widths=(5, 5, 6))
    assert not fits(exponents=(0, 1, 0))
    assert not fits(dtype=torch.bfloat16)
    assert not fits(widths=(5,), exponents=(0,))
    monkeypatch.setattr(library, "_TOGETHER", 8 * 3 * 2 * 7 * 9 - 1)
    assert not fits()
    monkeypatch.setattr(waiting, "_EVERYWHERE", False)
    monkeypatch.setattr(library, "_TOGETHER", 1 << 30)
    assert not fits()  # on the CPU bits stay what they were


def test_offsets_and_a_drift_below_fp32():
    x = drawn(1, 50, 6) + 1e4
    y = x + 1e-6 * drawn(1, 50, 6, seed=1)
    sums = {(i, j): torch.zeros(1, 8, 8, dtype=F64, device="cpu") for i, j in ((0, 0), (0, 1), (1, 1))}
    shifts = [x.mean(1), x.mean(1)]
    add_products(sums, [x, y], shifts, impl="library")
    check(sums, [x, y], shifts)


def test_positions_are_taken_a_few_at_a_time(monkeypatch):
    whole = case((7, 7), 9, 11)
    add_products(*whole, impl="library")
    monkeypatch.setattr(library, "_WORK_BYTES", 8 * 11 * 9 * 2 * 2)
    parts = case((7, 7), 9, 11)
    call = Products(*parts, None, [0, 0])
    assert library.positions_at_once(call) == 2
    add_products(*parts, impl="library")
    check(*parts)
    assert all(torch.equal(parts[0][key], whole[0][key]) for key in whole[0])


def test_a_layer_is_widened_once_into_the_place_of_one_that_is_done(monkeypatch):
    made = []

    def extended(call, layer, part, dropped, spare):
        z = original(call, layer, part, dropped, spare)
        made.append((layer, z.data_ptr()))
        return z

    original = library._extended
    monkeypatch.setattr(library, "_extended", extended)
    args = case((4,) * 5, 2, 6, "adjacent")
    add_products(*args, impl="library")
    assert [layer for layer, _ in made] == [0, 1, 2, 3, 4]
    assert len({place for _, place in made}) == 2
    check(*args)
    assert library._layers_at_once(args[0]) == 2
    assert library._layers_at_once(case((4,) * 5, 2, 6, "all")[0]) == 5


def pairs_of(dtype=torch.float32, positions=3, n=10):
    rows = [drawn(positions, n, d, seed=d, dtype=dtype) for d in (4, 6, 4)]
    shifts = [drawn(positions, x.shape[2], seed=7) for x in rows]
    moves = [drawn(positions, x.shape[2], seed=8) for x in rows]
    totals = {
        (i, j): drawn(rows[i].shape[2], rows[j].shape[2]) for i, j in itertools.combinations(range(3), 2)
    }
    units = [torch.ones(positions, dtype=F64, device="cpu")] * 3
    return totals, rows, shifts, {"owns": [None] * 3, "moves": moves, "units": units}


@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("moved", [True, False])
def test_what_cross_moments_lead_to(dtype, moved):
    totals, rows, shifts, more = pairs_of(dtype)
    if not moved:
        more["moves"] = [None] * 3
    before = {key: total.clone() for key, total in totals.items()}
    found = pair_products(totals, rows, shifts, **more, impl="library")
    for k, (i, j) in enumerate(totals):
        u, v = (rows[at].to(F64) - shifts[at][:, None] for at in (i, j))
        cross = u.mT @ v
        a, b = u.square().sum(2), v.square().sum(2)
        torch.testing.assert_close(totals[i, j] - before[i, j], cross.sum(0), rtol=1e-12, atol=1e-12)
        wanted = {
            "norm": cross.square().sum((1, 2)),
            "products": (a * b).sum(1),
            "right_sums": (a[..., None] * v).sum(1),
            "left_sums": (b[..., None] * u).sum(1),
        }
        if moved:
            wanted["moved_right"] = (cross.mT @ more["moves"][i][..., None])[..., 0]
            wanted["moved_left"] = (cross @ more["moves"][j][..., None])[..., 0]
        for name, want in wanted.items():
            got = getattr(found, name)[k]
            torch.testing.assert_close(
                got if want.dim() == 1 else got[:, : want.shape[1]], want, rtol=1e-12, atol=1e-12
            )
    if not moved:
        assert (found.moved_right == 0).all()
        assert (found.moved_left == 0).all()


def test_positions_are_summed():
    rows, total = drawn(5, 7, 3, dtype=torch.float32), drawn(7, 3)
    want = total + rows.to(F64).sum(0)
    add_positions(rows, total, impl="library")
    torch.testing.assert_close(total, want, rtol=1e-15, atol=1e-15)


def test_auto_leaves_the_cpu_as_it_was():
    args = case((4, 4), 2, 9)
    told = dict(rgfast.explain(add_products, *args).candidates)
    assert told["library"] == "on the CPU it multiplies as the reference does, which keeps the bits there"
    assert rgfast.explain(add_products, *args).chosen != "library"


def on_a_gpu(sums, rows, shifts):
    there = {key: torch.empty(total.shape, dtype=F64, device="cuda") for key, total in sums.items()}
    x, s = ([torch.empty(t.shape, dtype=t.dtype, device="cuda") for t in each] for each in (rows, shifts))
    return there, x, s


@pytest.mark.parametrize("d", [4, 130])
@pytest.mark.parametrize("masked", [True, False])
def test_on_a_fake_gpu_auto_takes_it_and_nothing_is_read(d, masked):
    args = case((d, d, 7), 2, 9)
    with guards.fake_gpu(), guards.Waits() as watch, rgfast.record() as log:
        keep = torch.ones(2, 9, dtype=torch.bool, device="cuda") if masked else None
        add_products(*on_a_gpu(*args), keep=keep, exponents=[0, 1, 0])
        totals, rows, shifts, more = pairs_of()
        _, rows, shifts = on_a_gpu({}, rows, shifts)
        totals = {key: torch.empty(t.shape, dtype=F64, device="cuda") for key, t in totals.items()}
        more = {
            name: [None if t is None else torch.empty(t.shape, dtype=F64, device="cuda") for t in each]
            for name, each in more.items()
        }
        found = pair_products(totals, rows, shifts, **more)
        assert found.norm.device.type == "cuda"
        add_positions(rows[0], torch.empty(10, 4, dtype=F64, device="cuda"))
    assert [(entry.op, entry.impl) for entry in log] == [("moments", "library")] * 3
    assert watch.found == []


def test_the_guard_sees_a_read():
    with guards.fake_gpu(), guards.Waits() as watch, pytest.raises(DataDependentOutputException):
        torch.zeros(1, device="cuda").item()
    assert watch.found == ["_local_scalar_dense"]


@pytest.mark.parametrize(
    ("widths", "positions", "b"), [((64,) * 7, 64, 128), ((256,) * 25, 16, 128), ((4,), 1, 2)]
)
def test_on_a_gpu_it_costs_less_than_the_reference(widths, positions, b):
    with guards.fake_gpu():
        keys = [(i, i) for i in range(len(widths))]
        rows = [torch.empty(positions, b, d, device="cuda") for d in widths]
        sums = {(i, j): torch.empty(positions, widths[i] + 2, widths[j] + 2, device="cuda") for i, j in keys}
        call = Products(sums, rows, rows, None, [0] * len(rows))
        ours, plain = (OP.impls[name].cost(call) for name in ("library", "reference"))
        step = library.positions_at_once(call)
    assert 0 < ours < plain
    assert 1 <= step <= positions
    assert math.isfinite(plain)


def test_the_room_has_one_for_every_op():
    assert all("library" in op.impls for op in (OP, PAIRS, POSITIONS))


def test_a_type_that_nothing_takes_is_refused():
    sums, rows, shifts = case((4,), 1, 3)
    with pytest.raises((TypeError, ImplUnavailable)):
        add_products(sums, [rows[0].to(torch.int32)], shifts, impl="library")
