"""Eigenvalues by the kernels of spectrum.cu, which run on this processor: see tests/cuda/emulated.py.

csrc/cuda/tests/spectrum*.cpp have every size and every kind of matrix; here is the way to them.
"""

import re

import numpy as np
import pytest
import torch
from torch.linalg import LinAlgError

import rgfast
from rgfast import ImplUnavailable
from rgfast.ops.spectrum import stages
from rgfast.ops.spectrum.call import Both, Rows, Symmetric
from rgfast.ops.spectrum.impl import cuda as room
from rgfast.ops.spectrum.impl import library
from rgfast.ops.spectrum.moments import centered_values, solved_values
from rgfast.ops.spectrum.rank_kernel import KERNEL
from rgfast.ops.spectrum.selection import BOTH, EIGVALSH, SPECTRUM
from rgfast.ops.spectrum.stages import BANDS, STAGES
from rgfast.runtime import known_answers, measured

F64, F32 = torch.float64, torch.float32
KERNELS = [(kernel, dtype) for dtype, kernels in room.KERNELS.items() for kernel in kernels]


@pytest.fixture
def gpu(emulated_gpu):
    emulated_gpu.admit(BOTH, EIGVALSH, SPECTRUM)
    return emulated_gpu


def drawn(*shape, seed=0, dtype=F64):
    made = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=made, dtype=F64).to(dtype)


def symmetric(*shape, dtype=F64):
    a = drawn(*shape, shape[-1], seed=shape[-1])
    return (a + a.mT).to(dtype)


def truth(a):
    """Rayleigh quotients of LAPACK's eigenvectors, in extended precision: they err by the square."""
    lower = a.double().tril().reshape(-1, *a.shape[-2:])
    full = lower + lower.tril(-1).mT
    vectors = torch.linalg.eigh(full).eigenvectors.numpy().astype(np.longdouble)
    wide = full.numpy().astype(np.longdouble)
    products = np.stack([m @ v for m, v in zip(wide, vectors, strict=True)])
    values = (products * vectors).sum(-2) / (vectors * vectors).sum(-2)
    return torch.from_numpy(np.sort(values, -1).astype(np.float64)).reshape(a.shape[:-1])


def error(values, a):
    """The worst in units of what is promised."""
    want = truth(a)
    allowed = max(50, a.shape[-1] / 2) * torch.finfo(a.dtype).eps / 2 * want.abs().amax(-1, keepdim=True)
    return float(((values.double() - want).abs() / allowed).max())


@pytest.mark.parametrize(("kernel", "dtype"), [each for each in KERNELS if each[0].rows <= 64])
def test_a_kernel_is_tried_by_launches_of_the_table(gpu, kernel, dtype):
    assert known_answers.unproven(gpu.device, kernel.name) is None
    launches = gpu.log("cuLaunchKernelEx")
    assert [each["kernel"] for each in launches] == [kernel.name] * 2
    blocks = -(-(kernel.per_block + 4) // kernel.per_block)
    shared = kernel.shared_bytes(kernel.tried, dtype)
    for each in launches:
        assert (each["grid"], each["block"]) == ([blocks, 1, 1], [kernel.block, 1, 1])
        assert each["shared"] == shared


def test_the_sources_have_the_kernels_of_the_table(gpu):
    found = {name for name in gpu.kernels() if name.startswith("rgfast_spectrum_")}
    stages = {name for band in BANDS for name, _, _ in STAGES.launches(40, F64, band.rows)}
    assert found == {kernel.name for kernel, _ in KERNELS} | stages | {KERNEL}


@pytest.mark.parametrize("dtype", [F64, F32])
@pytest.mark.parametrize("d", [1, 2, 8, 9, 16, 17, 32, 33])
def test_eigenvalues_of_a_batch(gpu, d, dtype):
    a = symmetric(2, 3, d, dtype=dtype)
    with rgfast.record() as log:
        values = rgfast.eigvalsh(a, impl="cuda")
    assert [(each.op, each.impl) for each in log] == [("eigvalsh", "cuda")]
    assert values.dtype == dtype
    assert values.shape == a.shape[:-1]
    assert bool((values.diff(dim=-1) >= 0).all())
    assert error(values, a) <= 1
    kernel = room.kernel_for(d, dtype)
    assert gpu.log("cuLaunchKernelEx")[-1]["kernel"] == kernel.name
    assert kernel.rows >= d
    assert all(each.rows < d or each.rows >= kernel.rows for each in room.KERNELS[dtype])


def test_any_strides_and_no_batch(gpu):
    a = symmetric(6, 10)
    want = rgfast.eigvalsh(a, impl="cuda")
    for other in (a.mT, a.expand(2, 6, 10, 10), a[::2], a[0], a.flip(-1).flip(-1)):
        expected = want[0].expand(other.shape[:-1]) if other.dim() == 2 else want[:: 6 // len(other)]
        expected = want.expand(2, 6, 10) if other.dim() == 4 else expected
        assert torch.equal(rgfast.eigvalsh(other, impl="cuda"), expected)
    buffer = torch.full((6, 12, 15), torch.nan, dtype=F64)
    buffer[:, 1:11, 3:13] = a
    assert torch.equal(rgfast.eigvalsh(buffer[:, 1:11, 3:13], impl="cuda"), want)
    assert rgfast.eigvalsh(a[:0], impl="cuda").shape == (0, 10)
    assert BOTH("cuda", Both(a[:0], a[:0, 0])).shape == (2, 0, 10)


def test_only_the_lower_triangle_is_read(gpu):
    a = symmetric(3, 11)
    half = a.tril() + torch.full_like(a, torch.nan).triu(1)
    assert torch.equal(rgfast.eigvalsh(half, impl="cuda"), rgfast.eigvalsh(a, impl="cuda"))


@pytest.mark.parametrize(("d", "dtype"), [(5, F32), (14, F64), (30, F32), (40, F64)])
def test_the_same_bits_in_any_batch(gpu, d, dtype):
    a = symmetric(9, d, dtype=dtype)
    gpu.seed(3)
    values = rgfast.eigvalsh(a, impl="cuda")
    for part in (slice(0, 1), slice(4, 9), slice(8, 9)):
        assert torch.equal(rgfast.eigvalsh(a[part], impl="cuda"), values[part])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_matrix_that_is_not_finite_is_named(gpu, bad):
    a = symmetric(4, 12)
    want = rgfast.eigvalsh(a, impl="cuda")
    a[2, 7, 3] = bad
    values = EIGVALSH("cuda", Symmetric(a))
    assert values.isnan().all(1).tolist() == [False, False, True, False]
    assert torch.equal(values[[0, 1, 3]], want[[0, 1, 3]])
    with pytest.raises(LinAlgError, match="eigvalsh gave NaN or infinity for matrix 2 of the batch"):
        library.finite(values)


@pytest.mark.parametrize("dtype", [F64, F32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 30, 7), (2, 12, 20), (2, 60, 33), (2, 1, 4)])
def test_spectra_of_data(gpu, shape, dtype):
    x = (drawn(*shape) + 3).to(dtype)
    for centering in ("mean", "none"):
        with rgfast.record() as log:
            found = rgfast.effective_rank(x, centering=centering, impl="cuda")
        assert (log[0].op, log[0].impl) == ("spectrum", "cuda")
        torch.testing.assert_close(found, rgfast.effective_rank(x, centering=centering), rtol=2e-6, atol=0)


@pytest.mark.parametrize("offset", [0.0, 1.0, 1e4])
@pytest.mark.parametrize("shape", [(5, 30, 7), (2, 40, 21), (2, 50, 35), (1, 9, 1)])
def test_both_spectra_come_from_one_launch(gpu, shape, offset):
    x = drawn(*shape) + offset
    b, _, d = shape
    raw, means = torch.full((2, b, 2 * d), torch.nan, dtype=F64)[:, :, ::2]
    matrix = torch.full((b, d, d), torch.nan, dtype=F64)
    call = Rows(x, raw=raw, means=means, matrix=matrix)
    SPECTRUM.select("cuda", call)  # tries the kernel
    gpu.log()  # begins anew
    values, accumulated, exponent, limit = SPECTRUM("cuda", call)
    assert len(gpu.log("cuLaunchKernelEx")) == 1
    other_raw, other_matrix = torch.empty_like(raw), torch.empty_like(matrix)
    want = SPECTRUM("library", Rows(x, raw=other_raw, matrix=other_matrix))
    assert torch.equal(matrix, other_matrix)
    torch.testing.assert_close(accumulated, want[1], rtol=1e-14, atol=0)
    assert torch.equal(exponent, want[2])
    assert torch.equal(limit, want[3])
    for found, expected in ((values, want[0]), (raw, other_raw)):
        allowed = 100 * 2.0**-53 * expected.abs().amax(1, keepdim=True)
        assert bool(((found - expected).abs() <= allowed).all())


def slope_of(call, x):
    y = x.clone().requires_grad_()
    value = call(y)
    weight = torch.arange(1.0, 1 + value.numel(), dtype=value.dtype).reshape(value.shape)
    return torch.autograd.grad(value, y, weight)[0]


@pytest.mark.parametrize("dtype", [F64, F32])
@pytest.mark.parametrize("name", ["effective_rank", "of variances", "singular_values", "eigvalsh"])
def test_gradients_of_what_kernels_compute(gpu, name, dtype):
    call = {
        "effective_rank": rgfast.effective_rank,
        "of variances": lambda x, impl: rgfast.effective_rank(x, spectrum="variance", impl=impl),
        "singular_values": rgfast.singular_values,
        "eigvalsh": lambda x, impl: rgfast.eigvalsh(x[:, :9].mT + x[:, :9], impl=impl),
    }[name]
    x = (drawn(3, 30, 9) * torch.logspace(0, -2, 9, dtype=F64)).to(dtype)
    with rgfast.record() as log:
        found = slope_of(lambda y: call(y, impl="cuda"), x)
    assert {each.impl for each in log} == {"cuda"}
    assert gpu.log("cuLaunchKernelEx")
    want = slope_of(lambda y: call(y, impl="reference"), x.double())
    tight = {"rtol": 1e-9, "atol": 1e-11} if dtype == F64 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(found.double(), want, **tight)
    gpu.seed(5)
    assert torch.equal(slope_of(lambda y: call(y, impl="cuda"), x), found)
    if name != "eigvalsh":  # what a kernel gives is looked at where it is not the CPU's
        x[1, 3, 2] = torch.nan
        with pytest.raises(ValueError, match="x must be finite, got 1 NaN or infinite values in matrix 1 of"):
            call(x.requires_grad_(), impl="cuda")


def test_data_that_are_not_finite_are_named(gpu):
    x = drawn(4, 20, 6)
    x[2, 3, 1] = torch.inf
    with pytest.raises(
        ValueError, match="x must be finite, got 1 NaN or infinite values in matrix 2 of the batch"
    ):
        rgfast.effective_rank(x, impl="cuda")


@pytest.mark.parametrize("dtype", [F64, F32])
def test_larger_matrices_are_refused(gpu, dtype):
    a = torch.zeros(1, dtype=dtype).expand(2, 1025, 1025)
    sentence = "its kernels take matrices of up to 1024 rows, not of 1025"
    with pytest.raises(ImplUnavailable, match=re.escape(sentence)):
        rgfast.eigvalsh(a, impl="cuda")
    assert dict(rgfast.explain(rgfast.eigvalsh, a).candidates)["cuda"] == sentence
    if dtype == F64:
        x = torch.zeros(1).expand(2, 1100, 1025)
        assert dict(rgfast.explain(rgfast.effective_rank, x).candidates)["cuda"] == sentence


def test_a_gpu_with_less_shared_memory_takes_smaller_matrices(gpu):
    gpu.set(shared=101_376)  # of smaller cards
    refused = {
        d: EIGVALSH.impls["cuda"].refusal(Symmetric(torch.zeros(1, dtype=F32).expand(d, d)))
        for d in (192, 205, 206, 256)
    }
    assert refused[192] is None
    assert refused[205] is None
    assert "needs 101840 bytes of shared memory per block, and cuda:0 (sm_90) has 101376" in refused[206]
    assert refused[256] is None


def test_single_precision_is_the_reference_s(gpu):
    with pytest.raises(ImplUnavailable, match="precision='single' asks for float32"):
        rgfast.effective_rank(drawn(2, 8, 4), precision="single", impl="cuda")


def test_auto_takes_it_where_it_was_measured(gpu, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    measured._standing.cache_clear()
    a, x = symmetric(3, 6), drawn(2, 9, 5)
    reason = "it was not measured on sm_90 (rgfast bench --device cuda --save does that)"
    for what, argument in ((rgfast.eigvalsh, a), (rgfast.effective_rank, x)):
        assert dict(rgfast.explain(what, argument).candidates)["cuda"] == reason
    rows = [
        measured.Measured(
            op,
            "cuda",
            "sm_90",
            "a GPU",
            "a case",
            "library",
            2.0,
            1.9,
            2.1,
            1e-4,
            2e-4,
            rgfast.__version__,
            "2.13",
        )
        for op in ("eigvalsh", "spectrum")
    ]
    measured.save(rows)
    for what, argument in ((rgfast.eigvalsh, a), (rgfast.effective_rank, x)):
        assert dict(rgfast.explain(what, argument).candidates)["cuda"] is None
    measured._standing.cache_clear()


@pytest.mark.parametrize("band", BANDS, ids=lambda band: band.name)
def test_stages_take_batches_in_parts(gpu, band, monkeypatch):
    a = symmetric(3, 19)
    means = drawn(3, 19)
    values, raw = STAGES.launch(a, means, 3.0, like=band.rows)
    assert error(values, a) <= 1
    assert error(raw, a + 3.0 * means[:, :, None] * means[:, None]) <= 1
    monkeypatch.setattr(stages, "_WORK", 8 * 2 * stages.workspace_doubles(19) + 7)
    gpu.log()
    again = STAGES.launch(a, means, 3.0, like=band.rows)
    assert torch.equal(again[0], values)
    assert torch.equal(again[1], raw)
    chase = "chase_far" if band.rows > 512 else "chase"
    launched = [(each["kernel"], each["grid"][0]) for each in gpu.log("cuLaunchKernelEx")]
    parts = [2, 1]
    assert launched == [
        (f"rgfast_spectrum_{name}_f64", b) for b in parts for name in (band.name, chase, "count")
    ]
    monkeypatch.setattr(stages, "_WORK", 1)  # one at a time, whatever it takes
    assert torch.equal(STAGES.launch(a, means, 3.0, like=band.rows)[0], values)


def test_a_block_counts_128_eigenvalues(gpu):
    a = torch.eye(130, dtype=F64)[None] * torch.arange(130.0, dtype=F64)
    assert torch.equal(STAGES.launch(a)[0].round(), a[0].diagonal()[None])
    assert [each["grid"] for each in gpu.log("cuLaunchKernelEx")] == [[1, 1, 1], [1, 1, 1], [1, 2, 1]]


@pytest.mark.parametrize("dtype", [F64, F32])
def test_stages_solve_larger_matrices(gpu, dtype):
    d = 129 if dtype == F64 else 257
    a = symmetric(2, d, dtype=dtype) if dtype == F64 else symmetric(1, d, dtype=dtype)
    if dtype == F64:
        a[1, 7, 3] = torch.nan
    values = EIGVALSH("cuda", Symmetric(a))
    assert values.dtype == dtype
    assert error(values[:1], a[:1]) <= 1
    assert values.isnan().all(1).tolist() == [False, True][: len(a)]
    assert gpu.log("cuLaunchKernelEx")[-1]["kernel"] == "rgfast_spectrum_count_f64"


def test_ranks_of_wider_data_are_solved_in_stages(gpu):
    x = drawn(1, 150, 130)
    found = rgfast.rank_measures(x, impl="cuda")
    assert gpu.log("cuLaunchKernelEx")[-1]["kernel"] == "rgfast_spectrum_count_f64"
    want = rgfast.rank_measures(x, impl="reference")
    torch.testing.assert_close(found.effective_rank, want.effective_rank, rtol=1e-9, atol=0)
    torch.testing.assert_close(found.stable_rank, want.stable_rank, rtol=1e-9, atol=0)


@pytest.mark.parametrize(
    ("d", "band", "chase", "warps"),
    [
        (129, "band_narrow", "chase", 3),
        (272, "band_narrow", "chase", 4),
        (273, "band", "chase", 4),
        (512, "band", "chase", 9),
        (513, "band_wide", "chase_far", 9),
        (1024, "band_wide", "chase_far", 12),
    ],
)
def test_stages_depend_on_rows(gpu, d, band, chase, warps):
    assert room.kernel_for(d, F64) is STAGES
    launches = STAGES.launches(d, F64)
    assert [name for name, _, _ in launches] == [
        f"rgfast_spectrum_{name}_f64" for name in (band, chase, "count")
    ]
    threads = {"band_narrow": 128, "band": 256, "band_wide": 512}[band]
    assert [block for _, block, _ in launches] == [threads, 32 * warps, 128]
    gpu.set(shared=101_376)  # of smaller cards; an A100's 166,912 are enough for all
    assert all(shared <= 166_912 for _, _, shared in STAGES.launches(d, F64))
    refusal = EIGVALSH.impls["cuda"].refusal(Symmetric(torch.zeros(1, dtype=F64).expand(d, d)))
    assert (refusal is None) == (d < 300)


def test_a_workspace_has_the_size_that_kernels_expect():
    assert stages.workspace_doubles(193) == 66980  # as spectrum_workspace.cuh asserts
    assert [stages.workspace_doubles(d) for d in (1, 16, 17)] == [2084, 2084, 4676]


def test_stages_are_tried_first(gpu):
    names = {name for band in BANDS for name, _, _ in STAGES.launches(40, F64, band.rows)}
    assert all(known_answers.unproven(gpu.device, name) is None for name in names)
    assert {each["kernel"] for each in gpu.log("cuLaunchKernelEx")} == names


def test_its_time_grows_with_rows_and_matrices():
    def cost(d, count):
        return room.EIGVALSH.cost(Symmetric(torch.zeros(1, dtype=F64, device="cpu").expand(count, d, d)))

    assert cost(16, 400) < cost(32, 400) < cost(64, 400) < cost(128, 400) < cost(192, 400) < cost(1000, 400)
    assert cost(64, 1) < cost(64, 400) < cost(64, 4000)


@pytest.mark.parametrize("d", [1, 8, 21, 40, 193])
def test_both_spectra_of_moments(gpu, d):
    x = drawn(2, 2 * d, d, seed=d)
    a, mean = x.mT @ x, 9 * drawn(2, d, seed=d + 1)
    mean[1] = 0.0
    half = a.tril() + torch.full_like(a, torch.nan).triu(1)
    with rgfast.record() as log:
        values, raw = BOTH("cuda", Both(half, mean))
    assert [(each.op, each.impl) for each in log] == [("eigvalsh", "cuda")]
    assert error(values, a) <= 1
    assert error(raw, torch.baddbmm(a, mean[:, :, None], mean[:, None])) <= 1
    together = BOTH("auto", Both(half, mean))  # as one batch of matrices
    torch.testing.assert_close(together, torch.stack([values, raw]), rtol=0, atol=1e-11 * float(raw.amax()))


def test_auto_finds_both_where_a_row_stands(gpu, monkeypatch):
    call = Both(symmetric(2, 9), drawn(2, 9))
    assert BOTH.select("auto", call).name == "in one batch"
    monkeypatch.setattr(measured, "refusal", lambda op, impl, device, size=None: None)
    monkeypatch.setattr(BOTH, "_chosen", {})
    assert BOTH.select("auto", call).name == "cuda"
    assert BOTH.impls["cuda"].cost(call) < BOTH.impls["in one batch"].cost(call)


@pytest.mark.parametrize("offset", [0.0, 1.0, 1e4])
@pytest.mark.parametrize("kind", ["plain", "decaying", "rank one", "constant column", "one value"])
def test_singular_values_of_moments_are_within_their_bounds(gpu, monkeypatch, kind, offset):
    monkeypatch.setattr(measured, "refusal", lambda op, impl, device, size=None: None)
    n, d = 60, 12
    x = drawn(n, d, seed=3)
    if kind == "decaying":
        x *= 0.1 ** torch.arange(d)
    elif kind == "rank one":
        x = x[:, :1] * x[:1] + 1e-9 * x
    elif kind == "constant column":
        x[:, 3] = 7.0
    elif kind == "one value":
        x = x[:1].expand(n, d).clone()
    x += offset
    centred = x - x.mean(0)
    a, count = (centred.T @ centred)[None], torch.tensor([n])
    if kind == "one value":
        a.zero_()
    trace = a.diagonal(dim1=1, dim2=2).sum(1)
    found = solved_values(centered_values(a, count, trace, n**0.5 * x.mean(0)[None]))
    assert found.rank_limit.tolist() == [{"constant column": d - 1, "one value": 0}.get(kind, d), d]
    for row, truth_of in enumerate((centred, x)):
        true = torch.linalg.svdvals(truth_of)
        error = (found.sigma[row] - true).abs() if row or kind != "one value" else found.sigma[row]
        assert bool((error <= found.error[row] + 1e-14 * true[0]).all())
