"""Arguments, routes, results and refusals of the public functions."""

import dataclasses

import numpy as np
import pytest
import torch

import rgfast
from rgfast.ops.spectrum import reference


@pytest.mark.parametrize(
    ("call", "kind", "match"),
    [
        (
            lambda: rgfast.effective_rank([[1.0]]),
            TypeError,
            "x must be a torch.Tensor or numpy array, got list",
        ),
        (lambda: rgfast.effective_rank(torch.ones(3, 3, dtype=torch.int64)), TypeError, "got int64"),
        (lambda: rgfast.effective_rank(torch.ones(3)), ValueError, "at least 2 dimensions"),
        (lambda: rgfast.effective_rank(torch.ones(0, 3)), ValueError, "at least one sample and one feature"),
        (lambda: rgfast.participation_ratio(torch.ones(2, 3, 0)), ValueError, "at least one sample and one"),
        (
            lambda: rgfast.effective_rank(torch.ones(3, 3), spectrum="x"),
            ValueError,
            "spectrum must be one of",
        ),
        (
            lambda: rgfast.effective_rank(torch.ones(3, 3), centering="x"),
            ValueError,
            "centering must be one of",
        ),
        (
            lambda: rgfast.stable_rank(torch.ones(3, 3), precision="half"),
            ValueError,
            "precision must be one of",
        ),
        (lambda: rgfast.singular_values(torch.ones(3, 3), method="qr"), ValueError, "method must be one of"),
        (
            lambda: rgfast.effective_rank(torch.ones(3, 3), method="qr"),
            ValueError,
            "'svd', 'lanczos', got 'qr'",
        ),
        (
            lambda: rgfast.singular_values(torch.ones(3, 3), rtol=0),
            ValueError,
            "rtol must be a positive number",
        ),
        (lambda: rgfast.singular_values(torch.ones(3, 3), rtol=float("nan")), ValueError, "rtol must be"),
        (lambda: rgfast.singular_values(torch.ones(3, 3), impl="fast"), ValueError, "impl must be one of"),
        (lambda: rgfast.singular_values(torch.ones(3, 3), impl="cuda"), rgfast.ImplUnavailable, "cuda"),
        (
            lambda: rgfast.singular_values(torch.ones(3, 3), method="svd", precision="single"),
            ValueError,
            "precision must be 'double'",
        ),
        (
            lambda: rgfast.numerical_rank(torch.ones(3, 3), tol=1.0),
            ValueError,
            "tol must be at least 0 and less",
        ),
        (lambda: rgfast.eigvalsh(torch.ones(3, 4)), ValueError, "square"),
        (lambda: rgfast.eigvalsh(torch.ones(3, 3, dtype=torch.float16)), TypeError, "float64 or float32"),
        (lambda: rgfast.isotropic_baseline(0, 3), ValueError, "n must be at least 1, got 0"),
        (lambda: rgfast.isotropic_baseline(3, 2.0), TypeError, "d must be an integer, got float"),
    ],
)
def test_bad_input_is_one_sentence(call, kind, match):
    with pytest.raises(kind, match=match):
        call()


def test_every_measure_is_fp64_whatever_comes():
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        x = torch.randn(2, 9, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
        m = rgfast.rank_measures(x)
        for field in ("effective_rank", "effective_rank_variance", "participation_ratio", "stable_rank",
                      "numerical_rank", "error_bound", "variance_error_bound"):  # fmt: skip
            value = getattr(m, field)
            assert value.dtype == torch.float64
            assert value.shape == (2,)
        assert m.singular_values.dtype == torch.float64
        assert rgfast.participation_ratio(x).dtype == rgfast.stable_rank(x).dtype == torch.float64


def test_result_is_frozen_and_complete():
    m = rgfast.rank_measures(torch.randn(3, 20, 6, generator=torch.Generator().manual_seed(0)))
    with pytest.raises(dataclasses.FrozenInstanceError):
        m.n = 3
    assert (m.n, m.d) == (20, 6)
    assert m.baseline == rgfast.isotropic_baseline(20, 6)
    assert m.path.shape == (3,)
    assert set(m.path.tolist()) <= {"gram", "refined", "svd"}


def test_info_tells_the_path(known):
    easy = torch.randn(200, 16, generator=torch.Generator().manual_seed(0))
    hard = torch.from_numpy(known.with_spectrum(known.spectra["condition 1e12"](16), 200, 16, seed=0))
    x = torch.stack([easy.double(), hard, easy.double()])
    _, info = rgfast.effective_rank(x, return_info=True)
    assert info.path[0] == info.path[2] == "gram"
    assert info.path[1] in ("refined", "svd")
    assert bool((info.error_bound <= 1e-6).all())
    _, gram = rgfast.effective_rank(x, method="gram", return_info=True)
    assert gram.path.tolist() == ["gram"] * 3
    assert float(gram.error_bound[1]) > 1e-6
    _, svd = rgfast.singular_values(x, method="svd", return_info=True)
    assert svd.path.tolist() == ["svd"] * 3
    assert info.singular_value_error.shape == (3, 16)
    # a looser tolerance is taken at its word
    _, loose = rgfast.effective_rank(x, rtol=10.0, return_info=True)
    assert loose.path.tolist() == ["gram"] * 3


def test_routes_are_recorded():
    x = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
    for function, op in (
        (rgfast.effective_rank, "spectrum"),
        (rgfast.rank_measures, "spectrum"),
        (rgfast.participation_ratio, "gram"),
        (rgfast.stable_rank, "gram"),
    ):
        with rgfast.record() as log:
            function(x, impl="reference")
        assert [(r.op, r.impl) for r in log] == [(op, "reference")]
    with rgfast.record() as log:
        rgfast.eigvalsh(torch.eye(3), impl="reference")
    assert [(r.op, r.impl) for r in log] == [("eigvalsh", "reference")]
    assert rgfast.explain("spectrum", x).candidates[-1] == ("reference", None)
    assert rgfast.explain("gram", x).candidates[-1] == ("reference", None)
    assert rgfast.explain("eigvalsh", torch.eye(3)).candidates[-1] == ("reference", None)


def test_trace_measures_solve_no_eigenproblem(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("an eigenproblem was solved")

    for name in ("eigvalsh", "eigh", "svd", "svdvals", "eig", "eigvals", "matrix_norm", "qr"):
        monkeypatch.setattr(torch.linalg, name, refuse)
    x = torch.randn(2, 50, 20, generator=torch.Generator().manual_seed(0))
    rgfast.participation_ratio(x)
    rgfast.stable_rank(x)


@pytest.mark.parametrize("name", ["flat", "1/i", "condition 1e8", "rank 1 + 1e-9", "low rank + 1e-7"])
@pytest.mark.parametrize("shape", [(400, 150), (60, 300)])
def test_stable_rank_converges(known, name, shape):
    x = known.with_spectrum(known.spectra[name](min(shape)), *shape, seed=1)
    noise = np.random.default_rng(0).standard_normal(shape)
    for y in (x, noise):
        sigma = np.linalg.svd(y - y.mean(0), compute_uv=False)
        want = (sigma**2).sum() / sigma[0] ** 2
        assert float(rgfast.stable_rank(y)) == pytest.approx(want, rel=1e-9)


def test_reference_measures_are_the_definitions(known):
    x = torch.randn(1, 30, 9, generator=torch.Generator().manual_seed(5)).double() + 3
    sigma = known.truth(x[0])
    assert float(reference.effective_rank(x)) == pytest.approx(known.rank_of(sigma), rel=1e-13)
    assert float(reference.effective_rank(x, spectrum="variance")) == pytest.approx(
        known.rank_of(sigma, "variance"), rel=1e-13
    )
    assert float(reference.participation_ratio(x)) == pytest.approx(known.ratio_of(sigma), rel=1e-13)
    assert float(reference.stable_rank(x)) == pytest.approx((sigma**2).sum() / sigma[0] ** 2, rel=1e-13)
    assert float(reference.numerical_rank(x, tol=0.5)) == (sigma > 0.5 * sigma[0]).sum()
    np.testing.assert_allclose(reference.singular_values(x)[0].numpy(), sigma, rtol=1e-13)


@pytest.mark.parametrize("shape", [(700, 40), (40, 700), (3, 300, 220), (60, 20, 12)])
def test_same_bits_on_any_thread_count(shape):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    x[..., 1:5] *= 1e-6  # some of it takes the accurate path
    before = torch.get_num_threads()
    seen = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            m = rgfast.rank_measures(x)
            seen.append(
                (m.singular_values, m.effective_rank, rgfast.participation_ratio(x), rgfast.stable_rank(x))
            )
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    for other in seen[1:]:
        for a, b in zip(seen[0], other, strict=True):
            assert torch.equal(a, b)


def test_baseline_against_simulation():
    draw = np.random.default_rng(11)
    for n, d, trials in (
        (3, 2, 4000),
        (6, 9, 2000),
        (20, 12, 1000),
        (40, 36, 400),
        (34, 120, 200),
        (150, 100, 60),
    ):
        x = torch.from_numpy(draw.standard_normal((trials, n, d)))
        m = rgfast.rank_measures(x, method="gram")
        want = rgfast.isotropic_baseline(n, d)
        for name, relative in (("effective_rank", 5e-3), ("effective_rank_variance", 5e-3),
                               ("participation_ratio", 5e-3), ("stable_rank", 1.5e-2)):  # fmt: skip
            seen = getattr(m, name)
            error = 4 * float(seen.std()) / trials**0.5
            assert abs(float(seen.mean()) - getattr(want, name)) <= relative * float(seen.mean()) + error, (
                n,
                d,
                name,
            )


def test_baseline_of_the_published_sizes():
    for n, want in ((256, (205, 154.5, 127.5)), (4096, (254, 248, 241))):
        b = rgfast.isotropic_baseline(n, 256)
        assert (b.effective_rank, b.effective_rank_variance, b.participation_ratio) == pytest.approx(
            want, abs=0.6
        )
    assert rgfast.isotropic_baseline(1, 5).participation_ratio == 0
    assert rgfast.isotropic_baseline(1, 5, centering="none").participation_ratio == pytest.approx(1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("scale", ["small", "one", "large"])
@pytest.mark.parametrize("d", [1, 2, 3, 17, 64])
def test_eigvalsh(dtype, scale, d):
    factor = {"one": 1.0, "small": 1e-18, "large": 1e18}[scale]
    if dtype == torch.float64 and scale != "one":
        factor = 1e150 if scale == "large" else 1e-150
    a = torch.randn(4, d, d, generator=torch.Generator().manual_seed(d), dtype=torch.float64)
    a = (((a + a.mT) / 2) * factor).to(dtype)
    want = np.linalg.eigvalsh(a.double().numpy() / factor)
    got = rgfast.eigvalsh(a)
    assert got.dtype == dtype
    unit = 2.0**-53 if dtype == torch.float64 else 2.0**-24
    norm = np.abs(want).max(-1, keepdims=True)
    assert np.all(np.abs(got.double().numpy() / factor - want) <= 1.01 * max(50, d / 2) * unit * norm)
    upper = a.clone()
    upper[:, torch.triu(torch.ones(d, d, dtype=torch.bool), 1)] = 7.0 * factor
    assert torch.equal(rgfast.eigvalsh(upper), got)


def test_eigvalsh_names_what_is_not_finite():
    a = torch.eye(3).repeat(2, 2, 1, 1)
    a[1, 0, 2, 1] = float("nan")
    with pytest.raises(
        ValueError, match=r"a must be finite, got 1 NaN or infinite values in matrix \(1, 0\)"
    ):
        rgfast.eigvalsh(a)
