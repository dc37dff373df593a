"""The compiled second moment, and its eigenvalues, against extended precision and the reference."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

import rgfast
from rgfast.ops.spectrum import reference
from rgfast.ops.spectrum.call import Rows
from rgfast.ops.spectrum.impl import native as room
from rgfast.ops.spectrum.measures import effective_rank_of
from rgfast.ops.spectrum.selection import SPECTRUM, _in_parts
from rgfast.ops.spectrum.solve import from_eigenvalues
from rgfast.runtime import native

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SHAPES = [
    (1, 1),
    (1, 5),
    (5, 1),
    (2, 3),
    (3, 2),
    (16, 16),
    (17, 33),
    (33, 17),
    (65, 8),
    (300, 24),
    (24, 300),
    (515, 9),
]
UNIT = 2.0**-53


@pytest.fixture(params=native.available_isas() or ("the module is not built",))
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    with native.use_isa(request.param):
        yield request.param


def data(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=draw, dtype=torch.float64)
    return (x * torch.linspace(0.1, 2, shape[-1], dtype=torch.float64) + 3).to(dtype)


def truth(x: Tensor, exponent: Tensor, centering: str) -> np.ndarray:
    """The moments in extended precision of the data times 2**-exponent."""
    wide = (
        x.double().numpy().astype(np.longdouble)
        * np.exp2(-exponent.numpy().astype(np.longdouble))[:, None, None]
    )
    if centering == "mean":
        wide = wide - wide.mean(-2, keepdims=True)
    left = wide if x.shape[-2] < x.shape[-1] else wide.transpose(0, 2, 1)
    return np.stack([m @ m.T for m in left])


@pytest.mark.parametrize("centering", ["mean", "none"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_within_the_bound_that_python_states(
    isa: str, shape: tuple[int, int], dtype: torch.dtype, centering: str
) -> None:
    x = data(5, *shape, dtype=dtype, seed=shape[0])
    matrix, accumulated, exponent, limit = room.gram(x, centering=centering)
    m, terms = min(shape), max(shape)
    assert matrix.shape == (5, m, m)
    assert torch.equal(matrix, matrix.mT)
    wrong = np.abs(matrix.numpy() - truth(x, exponent, centering)).max((-2, -1)).astype(np.float64)
    chain = min(terms, reference.TILE + -(-terms // reference.TILE)) + 4
    assert bool((torch.from_numpy(wrong) <= chain * UNIT * accumulated).all())
    _, accumulated_too, exponent_too, limit_too = reference.gram(x, centering=centering)
    torch.testing.assert_close(accumulated, accumulated_too, rtol=1e-12, atol=0)
    assert torch.equal(exponent, exponent_too)
    assert torch.equal(limit, limit_too)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_eigenvalues_are_those_of_the_moment(
    isa: str, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    x = data(11, *shape, dtype=dtype, seed=shape[1])
    values, accumulated, exponent, limit = room.gram_spectrum(x)
    matrix, *rest = room.gram(x)
    assert torch.equal(values, room.eigvalsh(matrix))
    alone = room.gram_spectrum(x[:1])[0]
    assert torch.equal(alone, room.eigvalsh(matrix[:1]))
    assert all(torch.equal(a, b) for a, b in zip((accumulated, exponent, limit), rest, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_strides(isa: str, dtype: torch.dtype) -> None:
    for n, d in ((23, 10), (10, 23), (16, 16)):
        x = data(6, n, d, dtype=dtype)
        want = room.gram_spectrum(x)
        wide = torch.full((6, 2 * n, 3 * d), float("nan"), dtype=dtype)
        wide[:, ::2, ::3] = x
        views = [wide[:, ::2, ::3], x.mT.contiguous().mT, x.transpose(0, 1).contiguous().transpose(0, 1)]
        for view in views:
            assert all(torch.equal(a, b) for a, b in zip(room.gram_spectrum(view), want, strict=True))
        same = room.gram_spectrum(x[:1].expand(6, n, d))
        assert all(torch.equal(a, b[:1].expand_as(a)) for a, b in zip(same, want, strict=True))
        flat = room.gram_spectrum(x[:, :1].expand(6, n, d))  # every sample the same
        assert bool((flat[0] == 0).all())
        assert bool((flat[3] == 0).all())


@pytest.mark.parametrize("shape", [(9, 40, 12), (37, 70, 33), (5, 300, 130), (3, 20, 300)])
def test_bits_do_not_depend_on_threads_or_company(isa: str, shape: tuple[int, int, int]) -> None:
    x = data(*shape, dtype=torch.float32)
    x[1] *= 1e-20
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        want = room.gram_spectrum(x)
        for threads in (2, 5):
            torch.set_num_threads(threads)
            assert all(torch.equal(a, b) for a, b in zip(room.gram_spectrum(x), want, strict=True))
    finally:
        torch.set_num_threads(before)
    order = torch.randperm(shape[0], generator=torch.Generator().manual_seed(1))
    assert all(torch.equal(a, b[order]) for a, b in zip(room.gram_spectrum(x[order]), want, strict=True))
    for i in range(0, shape[0], 2):
        alone = room.gram(x[i : i + 1])
        assert all(torch.equal(a, b[i : i + 1]) for a, b in zip(alone, room.gram(x), strict=True))


def test_matrices_too_large_for_the_solver() -> None:
    x = data(2, 40, 30)
    want = room.gram_spectrum(x)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(room, "_LARGEST", 0)
        values, *rest = room.gram_spectrum(x)
    torch.testing.assert_close(values, want[0], rtol=0, atol=1e-13 * float(want[0].max()))
    assert all(torch.equal(a, b) for a, b in zip(rest, want[1:], strict=True))


KINDS = {
    "offset": lambda x: x + 5,
    "far off": lambda x: x - 1e4,
    "centred": lambda x: x - x.mean(1, keepdim=True),
    "along the first axis": lambda x: x - x.mean(1, keepdim=True) - 7 * torch.eye(x.shape[-1])[0],
    "one row over and over": lambda x: x[:, :1].expand_as(x),
    "rank one": lambda x: x[..., :1] * x[:, :1],
    "zero": torch.zeros_like,
    "small beside a constant": lambda x: torch.cat([torch.ones_like(x[..., :1]), x[..., 1:] * 1e-120], -1),
}


@pytest.mark.parametrize("batch", [1, 2, 3, 21])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shape", [(1, 1), (6, 1), (2, 2), (16, 16), (33, 17), (300, 24), (70, 65)])
def test_both_spectra_from_one_reduction(
    isa: str, shape: tuple[int, int], dtype: torch.dtype, batch: int
) -> None:
    n, d = shape
    for kind, made in KINDS.items():
        x = made(data(batch, n, d, seed=n)).to(dtype)
        raw = torch.full((batch, d), float("nan"), dtype=torch.float64)
        values, accumulated, exponent, limit = room.gram_spectrum(x, raw=raw)
        for found, centering in ((values, "mean"), (raw, "none")):
            want = truth(x, exponent, centering).astype(np.float64)
            largest = np.maximum(np.trace(want, axis1=1, axis2=2), accumulated.numpy())[:, None]
            off = np.abs(found.numpy() - np.linalg.eigvalsh(want))
            # The solver's, LAPACK's and the sums' roundings.
            assert (off <= (2 * max(50, d / 2) + 2 * n + 16) * UNIT * largest).all(), (kind, centering)
        plain = torch.full_like(raw, float("nan"))
        again = reference.gram_spectrum(x, raw=plain)
        assert torch.equal(limit, again[3])
        assert torch.equal(exponent, again[2])
        tolerance = 2e-14 * float(max(plain.max(), accumulated.max()))
        torch.testing.assert_close(raw, plain, rtol=0, atol=tolerance)


def test_both_spectra_do_not_depend_on_threads_company_or_neighbours(isa: str) -> None:
    for shape in ((9, 40, 12), (37, 70, 33), (5, 300, 130)):
        x = data(*shape, dtype=torch.float32)
        x[1] *= 1e-20

        def both(x: Tensor) -> tuple[Tensor, Tensor]:
            raw = torch.empty(len(x), x.shape[2], dtype=torch.float64)
            return room.gram_spectrum(x, raw=raw)[0], raw

        before = torch.get_num_threads()
        try:
            torch.set_num_threads(1)
            want = both(x)
            for threads in (2, 5):
                torch.set_num_threads(threads)
                assert all(torch.equal(a, b) for a, b in zip(both(x), want, strict=True))
        finally:
            torch.set_num_threads(before)
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(1))
        assert all(torch.equal(a, b[order]) for a, b in zip(both(x[order]), want, strict=True))
        x[3, 1, 2] = torch.nan
        others = [i for i in range(len(x)) if i != 3]
        assert all(torch.equal(a[others], b[others]) for a, b in zip(both(x), want, strict=True))
        assert torch.isnan(both(x)[1][3]).all()


def test_both_spectra_of_matrices_too_large_for_the_solver() -> None:
    x = data(3, 40, 30)
    x[1, 2, 3] = torch.inf
    raw, too = (torch.empty(3, 30, dtype=torch.float64) for _ in range(2))
    want, *_ = room.gram_spectrum(x, raw=raw)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(room, "_LARGEST", 0)
        values, *_ = room.gram_spectrum(x, raw=too)
    for at in (0, 2):
        torch.testing.assert_close(values[at], want[at], rtol=0, atol=1e-13 * float(want[at].max()))
        torch.testing.assert_close(too[at], raw[at], rtol=0, atol=1e-13 * float(raw[at].max()))


@pytest.mark.parametrize(("centred", "solve", "n"), [(False, True, 5), (True, True, 3), (True, False, 5)])
def test_raw_goes_with_eigenvalues_of_centred_tall_data(centred: bool, solve: bool, n: int) -> None:
    x = torch.zeros(2, n, 4)
    m = min(n, 4)
    result = torch.zeros(2, m, dtype=torch.float64) if solve else torch.zeros(2, m, m, dtype=torch.float64)
    info = torch.zeros(8, dtype=torch.int64).data_ptr()
    with pytest.raises(ValueError, match="raw goes with eigenvalues of centred x"):
        native.load().moments(
            native.tensor(x), centred, solve, native.tensor(result), info, (info, info, info, 0), 1
        )


@pytest.mark.parametrize("scale", [1e150, 1e-150, 1e300, 1e-300])
def test_scale_does_not_matter(isa: str, scale: float) -> None:
    x = data(3, 40, 12)
    values, _, exponent, _ = room.gram_spectrum(x * scale)
    want = room.gram_spectrum(x)
    moved = values.log2() + 2 * exponent[:, None]
    want_moved = want[0].log2() + 2 * want[2][:, None] + 2 * np.log2(scale)
    torch.testing.assert_close(moved, want_moved, rtol=0, atol=1e-9)


def test_an_offset_costs_nothing(isa: str) -> None:
    x = data(4, 200, 16) - 3
    plain, _, small, _ = room.gram_spectrum(x)
    shifted, _, large, _ = room.gram_spectrum(x + 1e4)
    # Adding 1e4 itself rounds the data by 1e-12.
    units = (4.0 ** (large - small).double())[:, None]
    torch.testing.assert_close(shifted * units, plain, rtol=1e-10, atol=0)


def test_dead_and_constant_columns_are_exact_zeros(isa: str) -> None:
    x = data(3, 50, 9, dtype=torch.float32)
    x[..., 4] = 0.1
    x[..., 7] = 0
    matrix, _, _, limit = room.gram(x)
    for column in (4, 7):
        assert bool((matrix[:, column] == 0).all())
    assert limit.tolist() == [7, 7, 7]
    assert room.gram(x, centering="none")[3].tolist() == [8, 8, 8]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("shape", [(30, 12), (12, 30)])
def test_nonfinite_data_are_reported_and_spoil_no_neighbour(
    isa: str, bad: float, shape: tuple[int, int]
) -> None:
    x = data(12, *shape, dtype=torch.float32)
    want = room.gram_spectrum(x)[0]
    x[7, 3, 2] = bad
    values, accumulated, _, _ = room.gram_spectrum(x)
    assert torch.isfinite(accumulated).tolist() == [i != 7 for i in range(12)]
    others = [i for i in range(12) if i != 7]
    assert torch.equal(values[others], want[others])
    with pytest.raises(ValueError, match="matrix 7"):
        rgfast.effective_rank(x, impl="native")


def test_half_precision_is_widened_exactly() -> None:
    bits = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        every = bits.view(dtype)
        every = every[torch.isfinite(every)]
        x = every.abs()[None, :, None]
        if dtype == torch.bfloat16:
            x = x[:, (x[0, :, 0] > 1e-15) & (x[0, :, 0] < 1e15)]
        for value in x[0, ::97, 0]:
            got = room.gram(value.reshape(1, 1, 1), centering="none")[0]
            assert float(got) == float(value) ** 2


def test_what_is_not_supported_says_why() -> None:
    x = data(2, 5, 3)
    for function in (rgfast.effective_rank, rgfast.rank_measures, rgfast.stable_rank):
        with pytest.raises(rgfast.ImplUnavailable, match="precision='single'"):
            function(x, precision="single", impl="native")
        with pytest.raises(rgfast.ImplUnavailable, match="it runs on the cpu, not on meta"):
            function(x.to("meta"), impl="native")
    with pytest.raises(rgfast.ImplUnavailable, match="svd: there is no 'native' implementation"):
        rgfast.effective_rank(x, method="svd", impl="native")


def test_large_moments_are_solved_by_lapack_and_record_says_so() -> None:
    x = data(1, 1150, 1150, dtype=torch.float32)[0]
    assert rgfast.explain(rgfast.effective_rank, x).chosen == "parts"
    assert rgfast.explain(rgfast.effective_rank, x[:1144]).chosen == "native"
    with rgfast.record() as log:
        rank = rgfast.effective_rank(x)
    (entry,) = log
    assert (entry.op, entry.impl) == ("spectrum", "parts")
    assert [(r.op, r.impl) for r in entry.nested] == [("gram", "native"), ("eigvalsh", "library")]
    with rgfast.record() as log:
        torch.testing.assert_close(rgfast.effective_rank(x, impl="native"), rank, rtol=1e-9, atol=0)
    assert [(r.impl, r.nested) for r in log] == [("native", [])]


@pytest.mark.parametrize("impl", ["auto", "native", "reference"])
def test_what_is_refined_is_recorded(impl: str) -> None:
    x = data(3, 40, 8) * torch.tensor([1.0] * 7 + [1e-9], dtype=torch.float64)
    with rgfast.record() as log:
        rgfast.effective_rank(x, impl=impl)
        rgfast.effective_rank(x, impl="auto", method="svd")
    ran, refining = ("reference", "library") if impl == "reference" else ("native", "native")
    assert [(r.op, r.impl) for r in log] == [("spectrum", ran), ("refine", refining), ("svd", "library")]


def test_auto_takes_the_compiled_path_and_agrees_with_the_reference() -> None:
    x = data(7, 60, 20, dtype=torch.float32)
    with rgfast.record() as log:
        rank = rgfast.effective_rank(x)
        ratio = rgfast.participation_ratio(x)
    assert [(entry.op, entry.impl) for entry in log] == [("spectrum", "native"), ("gram", "native")]
    torch.testing.assert_close(rank, rgfast.effective_rank(x, impl="reference"), rtol=1e-12, atol=0)
    torch.testing.assert_close(ratio, rgfast.participation_ratio(x, impl="reference"), rtol=1e-13, atol=0)


@pytest.mark.parametrize(
    ("x", "result", "solve", "said"),
    [
        (torch.zeros(3, 4), torch.zeros(3, 3), True, "x must have from 3"),
        (torch.zeros(2, 0, 4), torch.zeros(2, 0), True, "at least one sample"),
        (torch.zeros(2, 3, 4), torch.zeros(2, 3), True, "result must be contiguous float64"),
        (torch.zeros(2, 3, 4), torch.zeros(2, 4, 4, dtype=torch.float64), False, "result must be contiguous"),
        (torch.zeros(2, 3, 4), torch.zeros(2, 6, dtype=torch.float64)[:, ::2], True, "result must be"),
    ],
)
def test_the_binding_checks(x: Tensor, result: Tensor, solve: bool, said: str) -> None:
    info = torch.zeros(6, dtype=torch.int64).data_ptr()
    with pytest.raises(ValueError, match=said):
        native.load().moments(
            native.tensor(x), True, solve, native.tensor(result), 0, (info, info, info, 0), 1
        )


def test_matrices_beside_the_result_come_with_eigenvalues_alone() -> None:
    x, matrix = torch.zeros(2, 3, 4), torch.zeros(2, 3, 3, dtype=torch.float64)
    info = torch.zeros(8, dtype=torch.int64).data_ptr()
    with pytest.raises(ValueError, match="matrices beside the result come with eigenvalues"):
        native.load().moments(
            native.tensor(x), True, False, native.tensor(matrix), 0, (info, info, info, 0), 1, 0, info
        )


@pytest.mark.parametrize("uncentred", [True, False])
@pytest.mark.parametrize("impl", ["native", "parts", "reference"])
@pytest.mark.parametrize("shape", [(9, 40, 12), (2, 300, 17), (3, 5, 5), (1, 600, 300)])
def test_moments_and_means_beside_the_eigenvalues(
    shape: tuple[int, int, int], impl: str, uncentred: bool
) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)) + 2.0
    b, _, d = shape
    matrix, means = (torch.full(size, torch.nan, dtype=torch.float64) for size in ((b, d, d), (b, d)))
    raw = torch.empty(b, d, dtype=torch.float64) if uncentred else None
    call = Rows(x, raw=raw, means=means, matrix=matrix)
    values, *_ = _in_parts(call) if impl == "parts" else SPECTRUM(impl, call)
    wide = x.double() - x.double().mean(1, keepdim=True)
    torch.testing.assert_close(matrix, wide.mT @ wide, rtol=0, atol=1e-10 * shape[1])
    torch.testing.assert_close(means, x.double().mean(1), rtol=1e-12, atol=0)
    torch.testing.assert_close(values, torch.linalg.eigvalsh(matrix), rtol=0, atol=1e-9 * shape[1])
    if raw is not None:
        want = torch.linalg.eigvalsh(x.double().mT @ x.double())
        torch.testing.assert_close(raw, want, rtol=0, atol=1e-9 * shape[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(40, 12), (12, 40), (700, 5), (1, 4)])
def test_means(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x = (torch.randn(3, *shape, generator=torch.Generator().manual_seed(1)) + 1e4).to(dtype)
    if dtype == torch.float64:
        x = x * 2.0**300
    want = x[:, 0].double() + (x.double() - x[:, :1].double()).mean(1)
    for gram in (room.gram, reference.gram):
        means = torch.full((3, shape[1]), torch.nan, dtype=torch.float64)
        exponent = gram(x, means=means)[2]
        torch.testing.assert_close(torch.ldexp(means, exponent[:, None]), want, rtol=1e-14, atol=0)


@pytest.mark.parametrize("centering", ["mean", "none"])
@pytest.mark.parametrize("shape", [(40, 12), (12, 40), (700, 5), (30, 30), (1, 4), (2, 2), (9, 1)])
def test_ranks_and_their_bound_in_one_call(isa: str, shape: tuple[int, int], centering: str) -> None:
    x = data(70, *shape, dtype=torch.float32, seed=sum(shape))
    x[3] = 0
    x[4] = x[4, :1]
    x[5] *= torch.logspace(0, -9, shape[1])
    x[6:] *= torch.logspace(0, -1, shape[1])
    for part in (x, x[5:6], x[6:]):
        values, accumulated, exponent, limit = room.gram_spectrum(part, centering=centering)
        solved = from_eigenvalues(
            values, accumulated.numpy(), exponent.numpy(), limit.numpy(), samples=max(shape)
        )
        bound = float(solved.bound().max())
        for kind in ("singular", "variance"):
            options = {"centering": centering, "variance": kind == "variance"}
            ranks = room.effective_ranks(part, rtol=bound * (1 + 1e-9), **options)
            assert isinstance(ranks, Tensor)
            want = effective_rank_of(solved.sigma, spectrum=kind)
            torch.testing.assert_close(ranks, want, rtol=1e-14, atol=0)
            rest = room.effective_ranks(part, rtol=bound * (1 - 1e-9), **options)
            assert isinstance(rest, tuple)
            for a, b in zip(rest, (values, accumulated, exponent, limit), strict=True):
                assert torch.equal(a, b)
