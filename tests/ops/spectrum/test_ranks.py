"""All rank measures of eigenvalues in one table, by every implementation, and as the registry has them."""

import pytest
import torch
from torch.linalg import LinAlgError

from rgfast.ops.spectrum import ranks
from rgfast.ops.spectrum.call import Values
from rgfast.ops.spectrum.rank_kernel import KERNEL
from rgfast.ops.spectrum.selection import TABLE
from rgfast.probing.measured import of_spectra
from rgfast.probing.measures import named
from rgfast.runtime import measured

F64 = torch.float64


@pytest.fixture(params=["library", "cuda"])
def impl(request):
    if request.param == "cuda":
        request.getfixturevalue("emulated_gpu").admit(TABLE)
    return request.param


def drawn(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def spectra(d):
    """Ascending eigenvalues of awkward moments."""
    index = torch.arange(1, d + 1, dtype=F64)
    return (
        torch.stack(
            [
                drawn(d).sort().values,
                index**-4.0,
                torch.zeros(d, dtype=F64),
                torch.cat([torch.zeros(d - 1, dtype=F64), torch.ones(1, dtype=F64)]),  # rank one
                torch.full((d,), 3.0, dtype=F64),  # a cluster
                1e-17 * (index - d / 2) + (index == d),  # rounding, below zero too
                1e-290 * drawn(d, seed=1),
                1e290 * drawn(d, seed=2),
                10.0 ** -(24 * index / d),
            ]
        )
        .sort(1)
        .values
    )


def given(d, kinds, *, samples=50, m=None):
    values = torch.cat([spectra(d), spectra(d).flip(0)])[: kinds * len(spectra(d))]
    b = len(values) // kinds
    variance = values.flip(1).clamp_min(0.0)
    variance[0, : d // 3] = 0.0  # features without variance
    accumulated = 2.0 * variance[:b].sum(1)
    count = torch.full((b,), samples)
    count[-1], count[-2], count[0] = 1, 0, 3
    if m is not None:
        values = values[:, d - m :]
    return Values(values, variance, accumulated, count, by_features=m is not None)


def assert_same(found, want):
    torch.testing.assert_close(found.sigma, want.sigma, rtol=1e-14, atol=0.0, equal_nan=True)
    names = len(ranks.MEASURED)
    torch.testing.assert_close(found.table[:names], want.table[:names], rtol=1e-12, atol=0.0, equal_nan=True)
    bounds = slice(names, names + 2)
    torch.testing.assert_close(found.table[bounds], want.table[bounds], rtol=1e-9, atol=1e-15, equal_nan=True)
    assert torch.equal(found.table[-1], want.table[-1])


@pytest.mark.parametrize("kinds", [1, 2])
@pytest.mark.parametrize("d", [1, 2, 7, 33, 130, 300])
def test_one_table_of_awkward_spectra(impl, d, kinds):
    call = given(d, kinds)
    want = TABLE("reference", call)
    assert_same(TABLE(impl, call), want)
    assert want.table[:-1, -2:].isnan().all()
    assert want.sigma[-2:].isnan().all()
    assert bool((want.table[-1] == 1).all())


@pytest.mark.parametrize("samples", [2, 40])
def test_fewer_values_than_features(impl, samples):
    call = given(40, 2, samples=samples, m=9)
    assert_same(TABLE(impl, call), TABLE("reference", call))
    assert bool((TABLE(impl, call).sigma[:-2, 9:] == 0).all())


def test_a_table_is_what_the_registry_measures():
    """Whose names and their order the table has."""
    assert named("rank") == ranks.MEASURED
    call = given(33, 2)
    found, both, b = TABLE("reference", call), ranks.solved(call), len(call.samples)
    centred, raw = both.of(slice(b)), both.of(slice(b, None))
    constant = (centred.sigma[:, 0] == 0) & (raw.sigma[:, 0] > 0)
    assert constant.any()
    values, bounds = of_spectra(centred, raw, constant)
    assert tuple(bounds) == ranks.BOUNDED
    known = call.samples >= 2
    for row, value in zip(found.table, [*values.values(), *bounds.values()], strict=False):
        assert torch.equal(row[known], value[known])
    without, _ = of_spectra(centred, None, constant)
    alone = TABLE("reference", given(33, 1))
    assert torch.equal(alone.table[:5, known], torch.stack(list(without.values()))[:5, known])
    assert alone.table[[5, 6, 8]].isnan().all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_values_that_are_no_numbers_are_named(impl, bad):
    call = given(12, 2)
    call.values[9 + 3, 5] = bad
    found = TABLE(impl, call)
    assert found.table[-1].tolist() == [1, 1, 1, 0, 1, 1, 1, 1, 1]
    with pytest.raises(LinAlgError, match="eigvalsh gave NaN or infinity for matrix 3 of the batch"):
        ranks.check(found.table[-1])
    others = torch.arange(9) != 3
    assert torch.equal(
        found.table[:, others].nan_to_num(), TABLE(impl, given(12, 2)).table[:, others].nan_to_num()
    )


def test_the_kernel_is_one_launch_and_auto_takes_it_where_a_row_stands(emulated_gpu, monkeypatch):
    emulated_gpu.admit(TABLE)
    call = given(20, 2)
    assert TABLE.select("auto", call).name == "library"
    monkeypatch.setattr(measured, "refusal", lambda op, impl, device, size=None: None)
    monkeypatch.setattr(TABLE, "_chosen", {})
    assert TABLE.select("auto", call).name == "cuda"
    emulated_gpu.reset()
    emulated_gpu.seed(4)
    found = TABLE("auto", call)
    (launch,) = emulated_gpu.log("cuLaunchKernelEx")
    assert (launch["kernel"], launch["grid"]) == (KERNEL, [9, 1, 1])
    alone = TABLE(
        "cuda",
        Values(call.values[[4, 13]], call.variance[[4, 13]], call.accumulated[4:5], call.samples[4:5]),
    )
    assert torch.equal(alone.table[:, 0], found.table[:, 4])
    nothing = Values(call.values[:0], call.variance[:0], call.accumulated[:0], call.samples[:0])
    for impl in ("cuda", "library", "reference"):
        assert TABLE(impl, nothing).table.shape == (10, 0)
