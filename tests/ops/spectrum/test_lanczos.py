"""Stochastic Lanczos quadrature: intervals that hold the truth, operators, streams, refusals."""

import math

import elsewhere
import guards
import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException
from waits import Waits

import rgfast
from rgfast.ops.spectrum import krylov, lanczos

D = 256
NUMBERS = torch.arange(1, D + 1, dtype=torch.float64)
SPECTRA = {
    "isotropic": torch.from_numpy(
        np.linalg.svd(np.random.default_rng(0).standard_normal((D, 2 * D)), compute_uv=False)
    ),
    "1/i": 1 / NUMBERS,
    "1/i^2": NUMBERS**-2,
    "exponential": torch.exp(-20 * NUMBERS / D),
    "low rank + noise": torch.cat([torch.linspace(2, 1, 8), 1e-2 * torch.linspace(1, 0.5, D - 8)]).double(),
}


def dense(sigma, seed=0):
    q, _ = torch.linalg.qr(
        torch.randn(D, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    )
    return (q * sigma.square()) @ q.mT


def truth(sigma, power=1):
    p = sigma**power / (sigma**power).sum()
    return math.exp(float(torch.special.entr(p).sum()))


def test_interval_holds_the_truth():
    held = trials = 0
    for k, sigma in enumerate(SPECTRA.values()):
        a = dense(sigma, k)
        for seed in range(6):
            for spectrum, power in (("singular", 1), ("variance", 2)):
                e = rgfast.effective_rank_estimate(a, spectrum=spectrum, seed=seed, probes=8, steps=32)
                assert e.low <= e.value <= e.high
                held += e.low <= truth(sigma, power) <= e.high
                trials += 1
    assert held >= 0.9 * trials


@pytest.mark.parametrize("spectrum", ["singular", "variance"])
def test_a_batch_has_the_estimates_of_each(spectrum):
    moments = torch.stack([dense(SPECTRA["1/i"]), torch.zeros(D, D).double(), dense(SPECTRA["isotropic"])])
    each = [rgfast.effective_rank_estimate(a, spectrum=spectrum) for a in moments]
    assert lanczos.effective_rank_estimates(moments, spectrum) == each
    assert lanczos.effective_rank_estimates(moments[:0], spectrum) == []
    moments[2, 3, 4] = moments[2, 4, 3] = math.nan
    found = lanczos.effective_rank_estimates(moments, spectrum)
    assert found == [*each[:2], None, *each[3:]]
    with pytest.raises(ValueError, match="moment must be finite, got 2 NaN or infinite values"):
        rgfast.effective_rank_estimate(moments[2], spectrum=spectrum)


def test_a_product_that_overflows_is_refused():
    moment = torch.full((40, 40), 1e308, dtype=torch.float64)
    with pytest.raises(ValueError, match="moment must be finite, got NaN or infinite values from it"):
        rgfast.effective_rank_estimate(moment)


def test_a_gpu_is_read_once_for_a_batch():
    with guards.fake_gpu(), guards.Waits() as watch, pytest.raises(DataDependentOutputException):
        lanczos.effective_rank_estimates(
            torch.empty(2, 24, 24, dtype=torch.float64, device="cuda"), "singular"
        )
    # The block and the probes, and the numbers on the host, which fake tensors do not have.
    assert watch.found == ["_to_copy between devices"] * 3 + ["_local_scalar_dense"]


def test_estimates_elsewhere_are_those_of_the_cpu(monkeypatch):
    """Side by side, by other orthonormal vectors of the same spaces; whatever is held of them at a time."""
    moments = torch.stack([dense(SPECTRA["exponential"]), torch.zeros(D, D).double(), dense(SPECTRA["1/i"])])

    def there():
        with elsewhere.MakingElsewhere(), Waits() as watch:
            found = lanczos.effective_rank_estimates(elsewhere.Elsewhere(moments), "singular")
        assert watch.found == ["_to_copy from meta to cpu"]
        return found

    found = there()
    for ours, theirs in zip(found, lanczos.effective_rank_estimates(moments, "singular"), strict=True):
        for field in ("value", "low", "high"):
            assert getattr(ours, field) == pytest.approx(getattr(theirs, field), rel=1e-8)
        assert ours.deflated == theirs.deflated
    moments[1, 3, 4] = math.nan
    monkeypatch.setattr(lanczos, "_AT_ONCE", 2 * 24 * 64 * D)
    first, none, last = there()
    assert none is None
    assert (first.value, last.value) == pytest.approx((found[0].value, found[2].value), rel=1e-8)


@pytest.mark.parametrize("name", SPECTRA)
def test_estimate_is_close_and_knows_it(name):
    sigma = SPECTRA[name]
    e = rgfast.effective_rank_estimate(dense(sigma))
    assert e.value == pytest.approx(truth(sigma), rel=0.06)
    assert e.high - e.low < 0.3 * e.value
    rougher = rgfast.effective_rank_estimate(dense(sigma), probes=4, steps=8, deflate=0)
    assert rougher.deflated == 0
    assert rougher.high - rougher.low > e.high - e.low


def test_error_terms_answer_to_what_they_measure():
    a = dense(SPECTRA["exponential"])
    short = rgfast.effective_rank_estimate(a, steps=8, deflate=0)
    long = rgfast.effective_rank_estimate(a, steps=128, deflate=0)
    assert short.depth_error > 4 * long.depth_error
    few = rgfast.effective_rank_estimate(dense(SPECTRA["1/i"]), probes=4)
    many = rgfast.effective_rank_estimate(dense(SPECTRA["1/i"]), probes=64)
    assert few.probe_error > many.probe_error > 0
    deep = torch.exp(-60 * NUMBERS / D)
    assert rgfast.effective_rank_estimate(dense(deep)).floor_error > 0


def test_exact_cases():
    assert rgfast.effective_rank_estimate(torch.zeros(9, 9, dtype=torch.float64)).value == 0
    one = torch.outer(NUMBERS, NUMBERS)
    assert rgfast.effective_rank_estimate(one).value == pytest.approx(1, abs=1e-6)
    for d in (1, 2, 3, 17):
        e = rgfast.effective_rank_estimate(torch.eye(d, dtype=torch.float64) * 1e-3)
        assert e.value == pytest.approx(d, rel=1e-9)
        assert e.low <= d <= e.high
    small = torch.diag(torch.tensor([4.0, 1.0, 0.25], dtype=torch.float64))
    assert rgfast.effective_rank_estimate(small).value == pytest.approx(
        truth(torch.tensor([2.0, 1.0, 0.5], dtype=torch.float64)), rel=1e-9
    )


def test_same_seed_same_bits_on_any_thread_count():
    a = dense(SPECTRA["1/i"])
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = rgfast.effective_rank_estimate(a)
        torch.set_num_threads(2)
        assert rgfast.effective_rank_estimate(a) == one
    finally:
        torch.set_num_threads(before)
    assert rgfast.effective_rank_estimate(a, seed=1).value != one.value


@pytest.mark.parametrize("centering", ["mean", "none"])
def test_streamed_operator_is_the_second_moment(centering):
    x = torch.randn(90, 40, generator=torch.Generator().manual_seed(0)) + 1e3
    operator = rgfast.moment_operator(x.split(17), 40, centering=centering)
    y = x.double() - x.double().mean(0) if centering == "mean" else x.double()
    v = torch.randn(40, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.testing.assert_close(operator(v), y.mT @ (y @ v), rtol=1e-11, atol=1e-9)
    e = rgfast.effective_rank_estimate(operator, 40)
    want = float(rgfast.effective_rank(x, centering=centering))
    assert e.low <= want <= e.high


def test_method_of_the_public_function(known):
    x = torch.randn(2, 300, 200, generator=torch.Generator().manual_seed(0)) * torch.logspace(0, -1, 200) + 5
    for spectrum in ("singular", "variance"):
        want = rgfast.effective_rank(x, spectrum=spectrum)
        got, info = rgfast.effective_rank(x, spectrum=spectrum, method="lanczos", return_info=True)
        assert info.path.tolist() == ["lanczos"] * 2
        bound = info.error_bound if spectrum == "singular" else info.variance_error_bound
        assert bool(((got / want - 1).abs() <= 1.5 * bound).all())
        assert float(bound.max()) < 0.1
        assert torch.equal(got, rgfast.effective_rank(x, spectrum=spectrum, method="lanczos"))
    wide = rgfast.effective_rank(x.mT.contiguous(), method="lanczos", centering="none")
    torch.testing.assert_close(wide, rgfast.effective_rank(x.mT, centering="none"), rtol=0.05, atol=0)
    assert float(rgfast.effective_rank(torch.ones(5, 3), method="lanczos")) == 0
    assert rgfast.effective_rank(torch.ones(0, 5, 3), method="lanczos").shape == (0,)


def test_no_full_eigenproblem_is_solved(monkeypatch):
    sizes = []
    for name in ("eigvalsh", "eigh", "svdvals", "svd"):
        inner = getattr(torch.linalg, name)

        def counted(a, *args, inner=inner, **kwargs):
            sizes.append(a.shape[-1])
            return inner(a, *args, **kwargs)

        monkeypatch.setattr(torch.linalg, name, counted)
    d = 600
    rgfast.effective_rank_estimate(torch.diag(torch.linspace(1, 2, d, dtype=torch.float64)))
    assert max(sizes) <= lanczos._BLOCK * krylov.DEPTH < d


@pytest.mark.parametrize(
    ("call", "kind", "match"),
    [
        (lambda: rgfast.effective_rank_estimate(torch.eye(3)), TypeError, "moment must be float64"),
        (lambda: rgfast.effective_rank_estimate(torch.ones(2, 3).double()), ValueError, "one square matrix"),
        (lambda: rgfast.effective_rank_estimate(lambda v: v), ValueError, "dim must be the size"),
        (
            lambda: rgfast.effective_rank_estimate(torch.eye(3).double(), probes=1),
            ValueError,
            "probes must be",
        ),
        (
            lambda: rgfast.effective_rank_estimate(torch.eye(3).double(), steps=True),
            ValueError,
            "steps must be",
        ),
        (
            lambda: rgfast.effective_rank_estimate(torch.eye(3).double() * torch.nan),
            ValueError,
            "finite, got 9",
        ),
        (lambda: rgfast.effective_rank_estimate(lambda v: v * torch.nan, 9), ValueError, "must be finite"),
        (
            lambda: rgfast.effective_rank_estimate(torch.eye(3).double(), spectrum="x"),
            ValueError,
            "spectrum must",
        ),
        (lambda: rgfast.moment_operator(iter([torch.ones(2, 3)]), 3), TypeError, "iterable more than once"),
        (lambda: rgfast.moment_operator([torch.ones(2, 4)], 3), ValueError, "3 columns"),
        (lambda: rgfast.moment_operator([], 3), ValueError, "at least one row"),
        (lambda: rgfast.singular_values(torch.ones(4, 3), method="lanczos"), ValueError, "not single values"),
        (
            lambda: rgfast.rank_measures(torch.ones(4, 3), method="lanczos"),
            ValueError,
            "method must be one of",
        ),
    ],
)
def test_refusals(call, kind, match):
    with pytest.raises(kind, match=match):
        call()


@pytest.mark.parametrize("batch", [False, True])
def test_all_threads_work_on_the_cpu(monkeypatch, batch):
    """Products and what keeps probes orthogonal are shared out, although torch has one thread inside."""
    seen = []
    spread = krylov.spread

    def counted(function, parts, workers):
        seen.append(workers)
        return spread(function, parts, workers)

    monkeypatch.setattr(krylov, "spread", counted)
    moment = torch.eye(2 * krylov.TILE, dtype=torch.float64)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        if batch:
            lanczos.effective_rank_estimates(moment[None], "singular")
        else:
            rgfast.effective_rank_estimate(moment, steps=4)
    finally:
        torch.set_num_threads(before)
    assert {*seen} == {2}
