"""Spectra without each group of samples, from one moment a group, against those of just these rows."""

import pytest
import torch

import rgfast
from rgfast.dispatch import walk
from rgfast.ops.spectrum.impl import native as room
from rgfast.ops.spectrum.rows import spectra_of_rows, spectra_without_groups, without_each
from rgfast.runtime import native

pytestmark = pytest.mark.skipif(
    native.unavailable_reason() is not None, reason="the native module is not built"
)


def data(b, n, d, seed=0):
    x = torch.randn(b, n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x * torch.linspace(0.2, 2, d, dtype=torch.float64)


def constant_columns(b, n, d):
    x = data(b, n, d) + 3
    x[..., ::3] = 0.1
    return x


def constant_but_for_a_group(b, n, d):
    x = torch.full((b, n, d), 0.3, dtype=torch.float64)
    x[:, 1::4] = data(b, n, d)[:, 1::4]
    return x


def outliers(b, n, d):
    x = data(b, n, d)
    x[:, 2::4] *= 1e5
    return x


KINDS = {
    "plain": data,
    "far off": lambda b, n, d: data(b, n, d) + 1e4,
    "columns that are constant": constant_columns,
    "a group of outliers": outliers,
    "constant but for a group": constant_but_for_a_group,
    "rank one": lambda b, n, d: data(b, n, 1) * data(1, 1, d) + 1,
    "constant": lambda b, n, d: torch.full((b, n, d), 7.0),
    "zero": lambda b, n, d: torch.zeros(b, n, d),
}


@pytest.mark.parametrize("isa", native.available_isas())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("n", "d", "groups"), [(16, 3, 4), (50, 1, 4), (70, 17, 4), (203, 40, 4), (80, 33, 2)]
)
def test_within_the_bound_of_the_truth(isa, n, d, groups, dtype):
    for kind, made in KINDS.items():
        x = made(9, n, d).to(dtype)
        with native.use_isa(isa):
            found = spectra_without_groups(x, groups, uncentred=True)
        assert found is not None
        assert len(found) == groups
        group = torch.arange(n) % groups
        for g, solved in enumerate(found):
            rows = x[:, group != g].double()
            off = rows - rows[:, :1]
            alone = spectra_of_rows(rows.float(), uncentred=True)
            for part, truth, plain in zip(
                solved, (off - off.mean(1, keepdim=True), rows), alone, strict=True
            ):
                sigma = torch.linalg.svdvals(truth)
                wrong = (part.singular_values() - sigma).abs()
                assert (wrong <= part.singular_value_error() + 1e-14 * sigma[:, :1]).all(), kind
                if kind == "plain":  # a bound that says nothing would hold, too
                    assert (part.error <= 10 * plain.error).all()
                assert (part.rank_limit >= (sigma > 1e-9 * sigma[:, :1]).sum(-1)).all(), kind


def test_the_moments_are_of_groups():
    """That the fast path is what was tested."""
    x = data(9, 203, 40).float()
    values, *_ = room.left_out_spectrum(x, 4)
    assert values.shape == (36, 40)


def test_without_each():
    x = torch.arange(2 * 11 * 3).reshape(2, 11, 3)
    for g, rest in enumerate(without_each(x, 3)):
        kept = torch.arange(11) % 3 != g
        assert torch.equal(rest.sort(1).values, x[:, kept])


def test_bits_do_not_depend_on_threads_or_neighbours():
    x = data(21, 203, 40).float()

    def run(x):
        raw = torch.empty(8 * len(x), 40, dtype=torch.float64)
        return [*room.left_out_spectrum(x, 8, raw), raw]

    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(run(x))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
    x[5, 7, 3] = torch.nan
    kept = torch.ones(21 * 8, dtype=torch.bool)
    kept[40:48] = False
    spoilt = run(x)
    assert all(torch.equal(a[kept], b[kept]) for a, b in zip(found[0], spoilt, strict=True))
    assert not torch.isfinite(spoilt[1][40:48]).any()
    assert spectra_without_groups(x, 8, uncentred=False) is None


@pytest.mark.parametrize(
    ("shape", "dtype", "ran"),
    [
        ((3, 80, 300), torch.float32, ["each group"]),
        ((3, 40, 33), torch.float64, ["each group"]),
        ((3, 40, 35), torch.float32, ["each group"]),
        ((1, 400, 280), torch.float32, ["native", "each group"]),  # too large for lanes, as the kernel says
    ],
)
def test_what_is_not_done_by_groups_is_done_by_rows_and_recorded(shape, dtype, ran):
    x = data(*shape).to(dtype)
    with rgfast.record() as log:
        found = spectra_without_groups(x, 4, uncentred=True)
    entries = list(walk(log))
    assert [r.op for r in entries] == ["spectrum"] * len(entries)
    assert [r.impl for r in entries[: len(ran)]] == ran
    assert [r.impl for r in entries[len(ran) :]] == ["native"] * (4 if shape[1] * 3 // 4 >= shape[2] else 8)
    group = torch.arange(shape[1]) % 4
    for g, parts in enumerate(found):
        want = spectra_of_rows(x[:, group != g].contiguous(), uncentred=True)
        for part, truth in zip(parts, want, strict=True):
            torch.testing.assert_close(part.sigma, truth.sigma, rtol=0, atol=1e-7 * float(truth.sigma.max()))


@pytest.mark.parametrize(
    ("x", "groups", "said"),
    [
        (torch.zeros(2, 5, 3), 1, "groups must be from 2"),
        (torch.zeros(2, 5, 3), 6, "groups must be from 2"),
        (torch.zeros(2, 5, 3).double(), 2, "fewer bits than float64"),
        (torch.zeros(2, 0, 3), 2, "at least one sample"),
    ],
)
def test_the_binding_checks(x, groups, said):
    with pytest.raises(ValueError, match=said):
        native.load().left_out_moments(native.tensor(x), groups, 8, 0, (8, 8, 8, 0), 1)
