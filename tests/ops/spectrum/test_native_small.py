"""Moments that are formed in the lanes of the solver, against fp64 truth and those formed one by one."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from rgfast.ops.spectrum.call import Rows
from rgfast.ops.spectrum.impl import native as room
from rgfast.ops.spectrum.selection import SPECTRUM
from rgfast.runtime import native

# Around the sizes where terms are summed in stretches, where tiles end and where the lanes are left alone.
SHAPES = [(1, 1), (2, 2), (40, 1), (12, 12), (127, 3), (128, 16), (129, 16), (257, 5), (512, 16), (513, 16)]
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
UNIT = 2.0**-53


@pytest.fixture(params=native.available_isas() or ("the module is not built",))
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    with native.use_isa(request.param):
        yield request.param


def data(batch: int, n: int, d: int, dtype: torch.dtype) -> Tensor:
    draw = torch.Generator().manual_seed(1000 * n + d)
    scale = torch.logspace(0, -3, d, dtype=torch.float64)
    return (torch.randn(batch, n, d, generator=draw, dtype=torch.float64) * scale + 2).to(dtype)


def spectrum_of(x: Tensor, centering: str) -> Tensor:
    wide = x.double()
    if centering == "mean":
        wide = wide - wide[:, :1]
        wide = wide - wide.mean(1, keepdim=True)
    return torch.linalg.eigvalsh(wide.mT @ wide)


@pytest.mark.parametrize("centering", ["mean", "none"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_moments_in_lanes_are_those_of_one_at_a_time(
    isa: str, shape: tuple[int, int], dtype: torch.dtype, centering: str
) -> None:
    x = data(11, *shape, dtype)
    b, _, d = x.shape
    matrix, means = (torch.full(size, torch.nan, dtype=torch.float64) for size in ((b, d, d), (b, d)))
    values, *info = room.gram_spectrum(x, centering=centering, means=means, matrix=matrix)
    alone_means = torch.empty_like(means)
    alone, *alone_info = (
        torch.cat(each)
        for each in zip(
            *(room.gram(x[i : i + 1], centering=centering, means=alone_means[i : i + 1]) for i in range(b)),
            strict=True,
        )
    )
    assert torch.equal(matrix, alone)
    assert torch.equal(means, alone_means)
    assert all(torch.equal(one, other) for one, other in zip(info, alone_info, strict=True))
    assert torch.equal(values, room.eigvalsh(alone))
    factor = torch.exp2(2.0 * info[1].double())[:, None]
    wrong = (values * factor - spectrum_of(x, centering)).abs().amax(-1)
    allowed = (min(shape[0], 258) + 104 + shape[0]) * UNIT * (info[0] * factor[:, 0])
    assert bool((wrong <= allowed).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_both_spectra_in_lanes(isa: str, dtype: torch.dtype) -> None:
    x = data(13, 150, 14, dtype)
    means = torch.empty(13, 14, dtype=torch.float64)
    raw = torch.empty(13, 14, dtype=torch.float64)
    values, _, exponent, _ = SPECTRUM("native", Rows(x, raw=raw, means=means))
    factor = torch.exp2(2.0 * exponent.double())[:, None]
    torch.testing.assert_close(values * factor, spectrum_of(x, "mean"), rtol=0, atol=1e-12 * 150)
    torch.testing.assert_close(raw * factor, spectrum_of(x, "none"), rtol=0, atol=1e-12 * 150 * 14)
    found = torch.ldexp(means, exponent[:, None])
    torch.testing.assert_close(found, x.double().mean(1), rtol=1e-13, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_strides_threads_and_company(isa: str, dtype: torch.dtype) -> None:
    x = data(19, 70, 11, dtype)
    want = room.gram_spectrum(x)
    wide = torch.full((19, 140, 33), float("nan"), dtype=dtype)
    wide[:, ::2, ::3] = x
    long = torch.full((19, 70, 13), float("nan"), dtype=dtype)
    long[:, :, 1:12] = x
    for view in (wide[:, ::2, ::3], long[:, :, 1:12], x.mT.contiguous().mT):
        assert all(torch.equal(a, b) for a, b in zip(room.gram_spectrum(view), want, strict=True))
    order = torch.randperm(19, generator=torch.Generator().manual_seed(2))
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found = room.gram_spectrum(x[order])
            assert all(torch.equal(a, b[order]) for a, b in zip(found, want, strict=True))
    finally:
        torch.set_num_threads(before)


def test_lanes_do_not_share_scale_zeros_or_nan(isa: str) -> None:
    x = data(16, 40, 12, torch.float64)
    want, _, exponent, limit = room.gram_spectrum(x)
    y = x.clone()
    y[1] *= 2.0**500
    y[2] *= 2.0**-500
    y[3] = 0.0
    y[4, 7, 3] = torch.nan
    y[5, 0, 0] = torch.inf
    y[6, :, 2] = 1e4
    y[7] = y[7, :1]
    found, accumulated, scale, rank = room.gram_spectrum(y)
    assert (~torch.isfinite(accumulated)).nonzero().flatten().tolist() == [4, 5]
    assert bool(torch.isnan(found[4:6]).all())
    assert torch.equal(found[[0, 1, 2, *range(8, 16)]], want[[0, 1, 2, *range(8, 16)]])
    assert (scale - exponent)[:4].tolist() == [0, 500, -500, -int(exponent[3])]
    assert rank[[3, 6, 7]].tolist() == [0, int(limit[6]) - 1, 0]
    assert bool((found[[3, 7]] == 0).all())
    assert float(found[6, 0]) == pytest.approx(0.0, abs=1e-13 * float(accumulated[6]))


def test_an_offset_costs_nothing(isa: str) -> None:
    x = (data(9, 60, 10, torch.float64) - 2.0).mul(2.0**10).round().mul(2.0**-30)
    found, _, exponent, _ = room.gram_spectrum(x + 2.0**13)  # exact
    want = spectrum_of(x, "mean")
    factor = torch.exp2(2.0 * exponent.double())[:, None]
    torch.testing.assert_close(found * factor, want, rtol=0, atol=1e-13 * float(want.max()))
