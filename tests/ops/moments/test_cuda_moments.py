"""The kernels for a GPU by the package's own way to them, run on this processor."""

import math

import pytest
import torch

import rgfast
from rgfast import ImplUnavailable
from rgfast.dispatch import HandOff
from rgfast.ops.moments import add_products, pair_products
from rgfast.ops.moments.api import OP, PAIRS
from rgfast.ops.moments.impl import cuda as kernels
from rgfast.runtime.known_answers import _ANSWERS, unproven

F64 = torch.float64


@pytest.fixture
def gpu(emulated_gpu):
    emulated_gpu.admit(OP, PAIRS)
    return emulated_gpu


@pytest.fixture(params=["double", "single"])
def precision(request, monkeypatch):
    """On a GPU whose fp64 is slow, without which there are no split products."""
    monkeypatch.setattr(kernels, "card", lambda device: ("sm_89", 128, 64))
    return request.param


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def given(positions, b, widths, *, dtype=F64, offset=0.0, scale=1.0):
    rows = [((drawn(positions, b, d, seed=k) + offset) * scale).to(dtype) for k, d in enumerate(widths)]
    shifts = [(drawn(positions, d, seed=9 + k) / 8 + offset) * scale for k, d in enumerate(widths)]
    return rows, shifts


def sums_of(rows, shifts, pairs, value=1.0, **options):
    sums = {
        (i, j): torch.full((len(rows[0]), rows[i].shape[2] + 2, rows[j].shape[2] + 2), value, dtype=F64)
        for i, j in pairs
    }
    add_products(sums, rows, shifts, **options)
    return sums


def sizes(rows, shifts, pairs, **options):
    """Σ |z_i||z_j|, from rows and shifts whose differences are not negative."""
    apart = [(x.to(F64) - s[:, None]).abs().nan_to_num() for x, s in zip(rows, shifts, strict=True)]
    zero = [torch.zeros_like(s) for s in shifts]
    return sums_of(apart, zero, pairs, 0.0, impl="reference", **options)


def assert_near(found, want, size, allowed):
    for key, total in found.items():
        error = (total - want[key]).abs()
        assert bool((error <= allowed * size[key] + 2.0**-50 * want[key].abs()).all()), key


PAIRS_OF_THREE = [(0, 0), (0, 1), (1, 1), (1, 2), (2, 2), (0, 2)]


@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_all_pairs_in_one_launch(gpu, dtype, precision):
    rows, shifts = given(2, 35, (5, 66, 64), dtype=dtype)
    keep = torch.rand(2, 35, generator=torch.Generator().manual_seed(5)) < 0.6
    rows = [x.masked_fill(~keep[..., None], math.nan) for x in rows]
    options = {"keep": keep, "exponents": [3, -2, 0]}
    kernel = f"rgfast_moments_{'split' if precision == 'single' else 'exact'}_{str(dtype)[6:]}"
    sums_of(rows, shifts, [(0, 0)], impl="cuda", precision=precision, **options)  # with what is known
    gpu.reset()
    found = sums_of(rows, shifts, PAIRS_OF_THREE, impl="cuda", precision=precision, **options)
    launched = [call["kernel"] for call in gpu.log("cuLaunchKernelEx")]
    assert launched.count(kernel) == 1
    want = sums_of(rows, shifts, PAIRS_OF_THREE, impl="reference", **options)
    size = sizes(rows, shifts, PAIRS_OF_THREE, **options)
    assert_near(found, want, size, 2.0**-18 if precision == "single" else 2.0**-47)
    assert all(torch.equal(total, total.mT) for (i, j), total in found.items() if i == j)


@pytest.mark.parametrize("b", [1, 2, 3])
def test_few_rows(gpu, b):
    rows, shifts = given(3, b, (17, 2), dtype=torch.float32)
    found = sums_of(rows, shifts, [(0, 0), (0, 1)], impl="cuda")
    want = sums_of(rows, shifts, [(0, 0), (0, 1)], impl="reference")
    assert_near(found, want, sizes(rows, shifts, [(0, 0), (0, 1)]), 2.0**-48)


@pytest.mark.parametrize(
    ("offset", "scale"), [(1e4, 1.0), (1e4, 1e-150), (0.0, 1e150), (0.0, 1e18), (0.0, 1e-18)]
)
def test_offsets_and_scales(gpu, offset, scale, precision):
    dtype = torch.float32 if abs(math.log10(scale)) == 18 else F64
    rows, shifts = given(1, 40, (18, 3), dtype=dtype, offset=offset, scale=scale)
    exponent = math.frexp(scale)[1]
    options = {"exponents": [exponent, exponent]}
    pairs = [(0, 0), (0, 1)]
    found = sums_of(rows, shifts, pairs, impl="cuda", precision=precision, **options)
    want = sums_of(rows, shifts, pairs, impl="reference", **options)
    size = sizes(rows, shifts, pairs, **options)
    assert_near(found, want, size, 2.0**-18 if precision == "single" else 2.0**-46)


@pytest.mark.parametrize("precision", ["single"], indirect=True)
def test_a_bound_of_split_products_holds_where_columns_differ_by_far(gpu, precision):
    rows, shifts = given(2, 100, (40,), dtype=torch.float32)
    rows[0] *= 2.0 ** -torch.arange(40)
    shifts[0] *= 2.0 ** -torch.arange(40)
    found = sums_of(rows, shifts, [(0, 0)], impl="cuda", precision=precision)[0, 0]
    want = sums_of(rows, shifts, [(0, 0)], impl="reference")[0, 0]
    size = sizes(rows, shifts, [(0, 0)])[0, 0]
    apart = (rows[0] - shifts[0][:, None]).square().sum(2)
    longest = torch.stack([apart.amax(1).sqrt(), apart.square().amax(1).sqrt(), torch.ones(2)], 1)
    longest = torch.cat([longest[:, :1].expand(-1, 40), longest[:, 1:]], 1)
    least = kernels.SINGLE_LEAST * 100 * longest[:, :, None] * longest[:, None]
    assert bool(((found - want).abs() <= kernels.SINGLE_ERROR * size + least).all())


def test_what_is_not_finite_stays_at_its_position(gpu, precision):
    rows, shifts = given(3, 20, (5,), dtype=torch.float32)
    rows[0][1, 3, 2] = math.nan
    total = sums_of(rows, shifts, [(0, 0)], impl="cuda", precision=precision)[0, 0]
    assert not total[1, 2, :6].isfinite().any()
    assert total[[0, 2]].isfinite().all()


def test_products_are_split_only_where_that_is_allowed_and_faster(gpu, monkeypatch):
    rows, shifts = given(2, 5, (3,))
    for card, precision, kind in (
        (("sm_90", 132, 2), "single", "exact"),
        (("sm_100", 148, 64), "single", "exact"),  # the table knows better than the driver
        (("sm_89", 128, 64), "single", "split"),
        (("sm_89", 128, 64), "double", "exact"),
    ):
        monkeypatch.setattr(kernels, "card", lambda device, card=card: card)
        OP._chosen.clear()
        sums_of(rows, shifts, [(0, 0)], impl="cuda", precision=precision)
        assert gpu.log("cuLaunchKernelEx")[-1]["kernel"] == f"rgfast_moments_{kind}_float64"


def test_any_strides_and_addresses_give_the_same_bits(gpu):
    (x,), (shift,) = given(2, 50, (13,), dtype=torch.float32)
    x[:, :, 4:] = x[:, :, :1]
    want = sums_of([x], [shift], [(0, 0)], impl="cuda")[0, 0]
    beside = torch.empty(2, 50, 14)
    beside[..., 1:] = x  # begins at no multiple of 16 bytes
    wide = torch.empty(2, 50, 39)
    wide[..., ::3] = x
    back = x.transpose(0, 2).contiguous().transpose(0, 2)
    for other in (beside[..., 1:], wide[..., ::3], back):
        assert torch.equal(sums_of([other], [shift], [(0, 0)], impl="cuda")[0, 0], want)
    repeated = x[:1, :, :1].expand(2, 50, 13)  # strides of zero
    found = sums_of([repeated], [shift], [(0, 0)], impl="cuda")[0, 0]
    assert torch.equal(found, sums_of([repeated.contiguous()], [shift], [(0, 0)], impl="cuda")[0, 0])


def test_the_bits_of_a_position_do_not_depend_on_the_rest_of_the_call(gpu, precision, monkeypatch):
    rows, shifts = given(2, 2100, (7, 3), dtype=torch.float32)
    pairs = [(0, 0), (0, 1)]
    together = sums_of(rows, shifts, pairs, impl="cuda", precision=precision)
    assert gpu.log("cuLaunchKernelEx")[-1]["kernel"] == "rgfast_moments_gather"
    monkeypatch.setattr(kernels, "_SPREAD_BYTES", 0)
    gpu.seed(7)
    in_turn = sums_of(rows, shifts, pairs, impl="cuda", precision=precision)
    assert gpu.log("cuLaunchKernelEx")[-1]["kernel"] != "rgfast_moments_gather"
    alone = sums_of([rows[0][1:]], [shifts[0][1:]], [(0, 0)], impl="cuda", precision=precision)
    assert all(torch.equal(total, in_turn[key]) for key, total in together.items())
    assert torch.equal(alone[0, 0][0], together[0, 0][1])


def test_pairs_of_layers_held_in_parts(gpu, monkeypatch):
    rows, shifts = given(2, 30, (6, 9, 4), dtype=torch.float32)
    moves = [drawn(2, x.shape[2], seed=3) for x in rows]

    def found(impl):
        totals = {
            (i, j): torch.ones(rows[i].shape[2], rows[j].shape[2], dtype=F64) for i, j in PAIRS_OF_THREE
        }
        one = torch.ones(2, dtype=F64)
        sums = pair_products(
            totals, rows, shifts, owns=[None] * 3, moves=moves, units=[one] * 3, impl=impl
        )  # fmt: skip
        return [*totals.values(), *sums]

    want, whole = found("reference"), found("cuda")
    for a, b in zip(whole, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    monkeypatch.setattr(kernels, "_CROSS_BYTES", 1)
    assert all(torch.equal(a, b) for a, b in zip(found("cuda"), whole, strict=True))


def test_refusals(gpu, monkeypatch):
    rows, shifts = given(2, 5, (3, 3))
    mixed = [rows[0], rows[1].float()]
    sums_of(mixed, shifts, [(0, 0), (1, 1)], impl="cuda")
    with pytest.raises(
        ImplUnavailable, match=r"must have the same dtype, and those of \(0, 1\) have float64 and"
    ):
        sums_of(mixed, shifts, [(0, 1)], impl="cuda")
    elsewhere = [rows[0], rows[1].to("meta")]
    with pytest.raises(ImplUnavailable, match="rows, shifts and sums must be on one device"):
        sums_of(elsewhere, shifts, [(0, 0)], impl="cuda")
    with pytest.raises(ValueError, match="precision must be one of"):
        sums_of(rows, shifts, [(0, 1)], precision="half")
    monkeypatch.setattr(kernels, "MOST_BLOCKS", 1)
    with pytest.raises(ImplUnavailable, match="a grid has 1 blocks at most"):
        sums_of(rows, shifts, [(0, 1)], impl="cuda")


def test_a_graph_does_not_hold_it(gpu, monkeypatch):
    rows, shifts = given(2, 5, (3,))
    sums_of(rows, shifts, [(0, 0)], impl="cuda")
    monkeypatch.setattr(kernels.cuda, "capturing", lambda device: True)
    with pytest.raises(ImplUnavailable, match="a CUDA graph would read the table of pairs"):
        sums_of(rows, shifts, [(0, 0)], impl="cuda")
    for answer in {each for name, each in _ANSWERS.items() if name.startswith("rgfast_moments")}:
        with pytest.raises(HandOff, match=r"a CUDA graph would read the table of (pairs|layers)"):
            answer.run(gpu.device)


def test_every_kernel_has_an_answer(gpu):
    names = [name for name in gpu.kernels() if name.startswith("rgfast_moments")]
    assert len(names) == 21
    assert {*names} <= {*_ANSWERS}
    assert unproven(gpu.device, *names) is None


def test_auto_takes_it_where_a_row_stands(gpu, monkeypatch):
    rows, shifts = given(2, 5, (3,))
    total = {(0, 0): torch.zeros(2, 5, 5, dtype=F64)}
    why = dict(rgfast.explain(add_products, total, rows, shifts).candidates)["cuda"]
    assert why == "it was not measured on sm_90 (rgfast bench --device cuda --save does that)"
    monkeypatch.setattr(kernels.measured, "refusal", lambda op, impl, device: None)
    explained = rgfast.explain(add_products, total, rows, shifts)
    assert dict(explained.candidates)["cuda"] is None
