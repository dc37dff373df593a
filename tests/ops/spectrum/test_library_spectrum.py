"""Spectra by torch's own routines: fp64 truth on awkward shapes, and no read on the way that a GPU takes."""

import importlib.util
from pathlib import Path

import guards
import pytest
import torch
from torch.linalg import LinAlgError

import rgfast
from rgfast import ImplUnavailable
from rgfast.ops.spectrum.call import Rows, Symmetric
from rgfast.ops.spectrum.impl import library
from rgfast.ops.spectrum.moments import solved_moment
from rgfast.ops.spectrum.selection import EIGVALSH, GRAM, SPECTRUM

_SPEC = importlib.util.spec_from_file_location("elsewhere", Path(__file__).parents[1] / "elsewhere.py")
elsewhere = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(elsewhere)

F64, F32 = torch.float64, torch.float32
SIZES = [1, 2, 3, 15, 16, 17, 63, 65, 97]


def drawn(*shape, seed=0, dtype=F64):
    made = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(*shape, generator=made, dtype=F64, device="cpu").to(dtype)


def symmetric(b, d, dtype=F64):
    a = drawn(b, d, d, seed=d)
    return (a + a.mT).to(dtype)


def there(call, *tensors):
    """``call`` of tensors that say they are on another device; what it returns is on the CPU."""
    with elsewhere.MakingElsewhere():
        return call(*(elsewhere.Elsewhere(x) for x in tensors)).held


@pytest.mark.parametrize("dtype", [F64, F32])
@pytest.mark.parametrize("d", SIZES)
def test_eigenvalues_off_the_cpu(d, dtype):
    a = symmetric(5, d, dtype)
    values = there(library.eigenvalues, a)
    want = torch.linalg.eigvalsh(a.double())
    assert values.dtype == dtype
    bound = max(50, d / 2) * torch.finfo(dtype).eps / 2 * want.abs().amax(1, keepdim=True)
    assert ((values.double() - want).abs() <= 2 * bound).all()


@pytest.mark.parametrize(
    ("dtype", "scale"), [(F64, 1e150), (F64, 1e-150), (F32, 1e18), (F32, 1e-18), (F64, 0.0)]
)
def test_eigenvalues_at_any_scale(dtype, scale):
    a = symmetric(3, 6).mul(scale).to(dtype)
    values = there(library.eigenvalues, a).double()
    want = torch.linalg.eigvalsh(symmetric(3, 6).to(dtype).double()) * scale
    torch.testing.assert_close(values, want, rtol=50 * torch.finfo(dtype).eps, atol=1e-5 * scale)


def test_only_the_lower_triangle_is_read():
    a = symmetric(2, 7)
    want = torch.linalg.eigvalsh(a)
    a[:, 2, 5] = torch.nan
    torch.testing.assert_close(there(library.eigenvalues, a), want, rtol=1e-12, atol=1e-12)


def test_batches_go_in_parts(monkeypatch):
    calls, solve = [], torch.linalg.eigvalsh
    monkeypatch.setattr(torch.linalg, "eigvalsh", lambda a: calls.append(len(a)) or solve(a))
    monkeypatch.setattr(library, "_MOST", 4)
    a = symmetric(10, 3).reshape(2, 5, 3, 3)
    values = there(library.eigenvalues, a)
    assert calls == [4, 4, 2]
    torch.testing.assert_close(values, solve(a), rtol=1e-12, atol=1e-12)
    monkeypatch.undo()
    assert library.at_once(16, torch.device("cuda")) == 16_384
    assert 64 <= library.at_once(1024, torch.device("cuda")) < 400


@pytest.mark.parametrize(
    "wrong",
    [
        lambda v: v * (1 + 1e-9),
        lambda v: torch.where(torch.arange(v.shape[1]) == 1, v + 1e-9, v),
        lambda v: torch.cat([v[:, :1] - 1e-9, v[:, 1:-1], v[:, -1:] + 1e-9], 1),
        lambda v: torch.zeros_like(v),
        lambda v: torch.full_like(v, torch.nan),
    ],
)
def test_a_solver_that_is_wrong_without_an_error_is_found_out(wrong, monkeypatch):
    solve = torch.linalg.eigvalsh
    a = symmetric(4, 12)

    def sometimes(a):
        values = solve(a)
        values[2] = wrong(values)[2]
        return values

    monkeypatch.setattr(torch.linalg, "eigvalsh", sometimes)
    values = there(library.eigenvalues, a)
    assert values.isnan().all(1).tolist() == [False, False, True, False]
    with pytest.raises(LinAlgError, match="eigvalsh gave NaN or infinity for matrix 2 of the batch"):
        library.finite(values)
    monkeypatch.undo()
    assert torch.isfinite(there(library.eigenvalues, a)).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_is_nan_and_the_rest_is_right(bad):
    a = symmetric(3, 5)
    want = torch.linalg.eigvalsh(a)
    a[1, 3, 1] = bad
    values = there(library.eigenvalues, a)
    assert values.isnan().all(1).tolist() == [False, True, False]
    torch.testing.assert_close(values[::2], want[::2], rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="a must be finite, got 1 NaN or infinite values in matrix 1"):
        there(rgfast.eigvalsh, a)


@pytest.mark.parametrize("dtype", [F64, F32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("centering", ["mean", "none"])
@pytest.mark.parametrize("shape", [(3, 12, 5), (2, 5, 12), (2, 300, 17), (2, 1, 4), (2, 2, 2), (1, 700, 65)])
def test_moments_and_spectra(shape, centering, dtype):
    b, n, d = shape
    x = (3 * drawn(*shape) + 7).to(dtype)
    means = torch.empty(b, d, dtype=F64)
    rest = GRAM("library", Rows(x, centering, means=means))
    wide = x.double()
    y = wide - wide.mean(1, keepdim=True) if centering == "mean" else wide
    truth = y.mT @ y if n >= d else y @ y.mT
    unit = torch.exp2(-rest[2].double())[:, None, None]
    size = float((wide * unit).square().sum((1, 2)).max())
    torch.testing.assert_close(rest[0], truth * unit.square(), rtol=0, atol=1e-13 * size)
    torch.testing.assert_close(means, wide.mean(1) * unit[:, 0], rtol=1e-13, atol=0)
    assert (rest[1] >= rest[0].diagonal(dim1=1, dim2=2).sum(1) * (1 - 1e-12)).all()
    values, *again = SPECTRUM("library", Rows(x, centering))
    assert all(torch.equal(a, b) for a, b in zip(rest[1:], again, strict=True))
    want = torch.linalg.eigvalsh(rest[0])
    torch.testing.assert_close(values, want, rtol=0, atol=1e-13 * size)


@pytest.mark.parametrize("shape", [(2, 60, 12), (3, 40, 5)])
def test_raw_spectra_means_and_matrix(shape):
    x, (b, _, d) = drawn(*shape) + 2, shape
    raw, means = torch.empty(b, d, dtype=F64), torch.empty(b, d, dtype=F64)
    matrix = torch.empty(b, d, d, dtype=F64)
    _, _, exponent, _ = SPECTRUM("library", Rows(x, raw=raw, means=means, matrix=matrix))
    y = x * torch.exp2(-exponent.double())[:, None, None]
    torch.testing.assert_close(raw, torch.linalg.eigvalsh(y.mT @ y), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(means, y.mean(1), rtol=1e-12, atol=0)
    centred = y - y.mean(1, keepdim=True)
    torch.testing.assert_close(matrix, centred.mT @ centred, rtol=1e-12, atol=1e-12)


TRAPS = {
    "offset": drawn(2, 60, 8, seed=1) + 1e4,
    "offset fp32": (drawn(2, 60, 8, seed=1) + 1e4).float(),
    "large": drawn(2, 60, 8) * 1e150,
    "small": drawn(2, 60, 8) * 1e-150,
    "large fp32": (drawn(2, 60, 8) * 1e18).float(),
    "rank one": (drawn(2, 60, 1) * drawn(2, 1, 8, seed=3)),
    "decaying": drawn(2, 60, 12) * torch.arange(1.0, 13.0, dtype=F64) ** -4,
    "zero": torch.zeros(2, 9, 4),
    "dead columns": drawn(2, 30, 6) * torch.tensor([1.0, 0, 1, 0, 1, 1]),
    "constant columns": drawn(2, 30, 6) * torch.tensor([1.0, 0, 1, 0, 1, 1]) + 0.1,
    "duplicated": drawn(2, 30, 3).repeat(1, 1, 2),
    "wide": drawn(2, 5, 40),
    "one sample": drawn(2, 1, 6),
    "two samples": drawn(2, 2, 6),
    "bf16": drawn(2, 40, 6, dtype=torch.bfloat16),
    "stride 0": drawn(1, 40, 6).expand(2, 40, 6),
}


@pytest.mark.parametrize("centering", ["mean", "none"])
@pytest.mark.parametrize("name", TRAPS)
def test_ranks_within_their_promise(name, centering):
    x = TRAPS[name]
    truth = rgfast.effective_rank(x, centering=centering, method="svd")
    for found in (
        rgfast.effective_rank(x, centering=centering, impl="library"),
        there(lambda x: rgfast.effective_rank(x, centering=centering), x),
        there(lambda x: rgfast.rank_measures(x, centering=centering).effective_rank, x),
    ):
        torch.testing.assert_close(found, truth, rtol=1e-6, atol=0)


def test_nan_and_infinity_name_the_matrix():
    x = drawn(3, 9, 4)
    x[1, 2, 3] = torch.nan
    for call in (lambda: rgfast.effective_rank(x, impl="library"), lambda: there(rgfast.effective_rank, x)):
        with pytest.raises(ValueError, match="x must be finite, got 1 NaN or infinite values in matrix 1 of"):
            call()


def test_single_precision_is_refused():
    with pytest.raises(
        ImplUnavailable, match="it computes in float64, and precision='single' asks for float32"
    ):
        rgfast.effective_rank(drawn(9, 4), precision="single", impl="library")


def test_auto_leaves_the_cpu_as_it_was():
    reason = "on the CPU it multiplies as the reference does, which keeps the bits there"
    for call in (rgfast.effective_rank, rgfast.participation_ratio):
        told = rgfast.explain(call, drawn(9, 4))
        assert dict(told.candidates)["library"] == reason
        assert told.chosen != "library"


def test_moments_that_cannot_be_solved_are_an_error_off_the_cpu():
    a = symmetric(3, 4)
    a = a @ a
    a[1, 2, 1] = a[1, 1, 2] = torch.nan
    with pytest.raises(LinAlgError, match="for matrix 1 of the batch"), elsewhere.MakingElsewhere():
        solved_moment(elsewhere.Elsewhere(a), elsewhere.Elsewhere(torch.tensor([9, 9, 9])), "mean")


@pytest.mark.parametrize("dtype", [F64, F32, torch.bfloat16])
def test_on_a_fake_gpu_auto_takes_it_and_nothing_is_read(dtype):
    with guards.fake_gpu(), guards.Waits() as watch, rgfast.record() as log:
        x = torch.empty(5, 700, 12, dtype=dtype, device="cuda")
        raw = torch.empty(5, 12, dtype=F64, device="cuda")
        for centering in ("mean", "none"):
            values, trace, exponent, limit = SPECTRUM("auto", Rows(x, centering))
            matrix = GRAM("auto", Rows(x, centering))[0]
        SPECTRUM("auto", Rows(x, raw=raw))
        assert values.shape == (5, 12)
        assert matrix.shape == (5, 12, 12)
        assert {t.device.type for t in (values, trace, exponent, limit, matrix)} == {"cuda"}
        for each in (matrix, matrix.to(F32)):
            assert library.eigenvalues(each).dtype == each.dtype
    assert {entry.impl for entry in log} == {"library"}
    assert watch.found == []


def versions(monkeypatch, version):
    monkeypatch.setattr(torch, "__version__", version)
    monkeypatch.setattr(EIGVALSH, "_chosen", {})


@pytest.mark.parametrize(("version", "looped"), [("2.8.0", True), ("2.11.0+cu130", True), ("2.12.1", False)])
def test_an_older_torch_hands_batches_to_the_cpu(version, looped, monkeypatch):
    versions(monkeypatch, version)
    with guards.fake_gpu():
        told = rgfast.explain(rgfast.eigvalsh, torch.empty(400, 64, 64, dtype=F64, device="cuda"))
        one = rgfast.explain(rgfast.eigvalsh, torch.empty(1, 4, 4, dtype=F64, device="cuda"))
    costs = dict(zip((name for name, _ in told.candidates), told.costs, strict=True))
    assert (costs["library"] > 0.1) == looped
    if EIGVALSH.impls["native"].missing() is None:
        assert told.chosen == ("on the CPU" if looped else "library")
        assert one.chosen == "library"  # a wait costs more than solving it
    refused = dict(told.candidates)["on the CPU"]
    assert looped or refused == "torch solves whole batches on the GPU"


def test_what_is_handed_over_comes_back_and_is_recorded():
    hand_over = EIGVALSH.impls["on the CPU"]
    a = symmetric(4, 6)
    with elsewhere.MakingElsewhere(), rgfast.record() as log:
        values = EIGVALSH.run(hand_over, Symmetric(elsewhere.Elsewhere(a)), named=False)
    assert values.device == elsewhere.DEVICE
    torch.testing.assert_close(values.held, torch.linalg.eigvalsh(a), rtol=1e-12, atol=1e-12)
    (entry,) = log
    assert entry.impl == "on the CPU"
    assert [each.impl for each in entry.nested] == [rgfast.explain(rgfast.eigvalsh, a).chosen]


MEASURED = [(400, 16, 0.47), (400, 64, 2.9), (400, 128, 11.1), (2048, 128, 9.8), (64, 256, 229)]
MEASURED += [(400, 256, 79), (400, 384, 191), (64, 512, 622), (400, 512, 351), (64, 1024, 2203)]


@pytest.mark.parametrize(("count", "d", "microseconds"), MEASURED)
def test_the_model_of_time_gives_back_what_was_measured(count, d, microseconds, monkeypatch):
    versions(monkeypatch, "2.13.0")
    found = library.solving(count, d, F64, torch.device("cuda")) / count
    assert abs(found * 1e6 / microseconds - 1) < 0.25 or found * count < 4e-4


def test_costs_grow_with_the_size_and_the_number(monkeypatch):
    for version in ("2.11.0", "2.13.0"):
        versions(monkeypatch, version)
        by_size = [library.solving(64, d, F64, torch.device("cuda")) for d in range(1, 3000, 37)]
        assert by_size == sorted(by_size)
        by_count = [library.solving(n, 100, F64, torch.device("cuda")) for n in (0, 1, 10, 1000, 10**6)]
        assert by_count == sorted(by_count)
