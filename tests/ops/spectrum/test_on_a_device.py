"""Public functions on another device: the CPU's values, errors by name, and how often it is read."""

import elsewhere
import numpy as np
import pytest
import torch
from waits import Waits

import rgfast
from rgfast.ops.spectrum.call import Again
from rgfast.ops.spectrum.equal_rows import limit_by_equal_rows
from rgfast.ops.spectrum.gradients import eigenvalue_gradient, gradient
from rgfast.ops.spectrum.rows import refine_spectra, spectra_of_rows
from rgfast.ops.spectrum.solve import REFINE, SVD

F64 = torch.float64
READ = "_to_copy from meta to cpu"


def drawn(*shape, seed=0, dtype=F64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def there(call, *tensors):
    """What `call` of tensors elsewhere returns, and what waited for their device."""
    with elsewhere.MakingElsewhere(), Waits() as watch:
        found = call(*(elsewhere.Elsewhere(x) for x in tensors))
    return found, watch.found


def hard(known, n, d, dtype=F64):
    """One matrix that a Gram matrix tells all of, others that it does not, and data without any variance."""
    m = min(n, d)
    made = [known.with_spectrum(of(m), n, d, seed=m) for of in known.spectra.values()]
    made += [np.zeros((n, d)), np.full((n, d), 0.3), known.with_spectrum(np.logspace(0, -9, m), n, d, seed=1)]
    return torch.from_numpy(np.stack(made)).to(dtype)


X = drawn(3, 40, 7) + 2
MOMENT = X.mT @ X
ONCE = {
    "effective_rank": lambda x: rgfast.effective_rank(x),
    "of variances": lambda x: rgfast.effective_rank(x, spectrum="variance"),
    "with info": lambda x: rgfast.effective_rank(x, return_info=True)[0],
    "singular_values": lambda x: rgfast.singular_values(x),
    "rank_measures": lambda x: rgfast.rank_measures(x).stable_rank,
    "at a small tol": lambda x: rgfast.rank_measures(x, tol=1e-12).numerical_rank,
    "numerical_rank": lambda x: rgfast.numerical_rank(x),
    "participation_ratio": lambda x: rgfast.participation_ratio(x),
    "stable_rank": lambda x: rgfast.stable_rank(x),
    "by the Gram matrix": lambda x: rgfast.effective_rank(x, method="gram"),
    "by SVD": lambda x: rgfast.rank_measures(x, method="svd").effective_rank,
    "in single precision": lambda x: rgfast.participation_ratio(x, precision="single"),
    "by Lanczos": lambda x: rgfast.effective_rank(x, method="lanczos"),
}


@pytest.mark.parametrize("name", ONCE)
def test_a_device_is_read_once(name):
    found, waits = there(ONCE[name], X)
    assert found.device == elsewhere.DEVICE
    torch.testing.assert_close(found.held, ONCE[name](X), rtol=1e-6, atol=1e-6)
    assert len(waits) == 1


@pytest.mark.parametrize("n", [40, torch.tensor([40, 9, 0])])
def test_moments_are_read_once(n):
    for call in (
        lambda a, *n: rgfast.rank_measures_from_moment(a, *n).effective_rank,
        rgfast.singular_values_from_moment,
    ):
        if isinstance(n, int):
            found, waits = there(lambda a, call=call: call(a, n), MOMENT)
        else:
            found, waits = there(call, MOMENT, n)
        torch.testing.assert_close(found.held, call(MOMENT, n), rtol=1e-12, atol=1e-9, equal_nan=True)
        assert waits == [READ]


def test_other_functions_are_read_once():
    found, waits = there(rgfast.eigvalsh, MOMENT)
    torch.testing.assert_close(found.held, rgfast.eigvalsh(MOMENT), rtol=1e-12, atol=0)
    assert len(waits) == 1
    found, waits = there(rgfast.effective_rank_estimate, MOMENT[0])
    assert found == rgfast.effective_rank_estimate(MOMENT[0])
    assert waits == [READ]


def test_a_stream_is_read_for_every_update_and_twice_at_its_end():
    def streamed(x):
        made = rgfast.SecondMoments()
        for rows in x[None].split(20, dim=2):
            made.update(rows)
        return made.rank_measures(0).effective_rank

    found, waits = there(streamed, X)
    torch.testing.assert_close(found.held, streamed(X), rtol=1e-12, atol=0)
    assert waits == ["_local_scalar_dense"] * 2 + [READ] * 2


@pytest.mark.parametrize("centering", ["mean", "none"])
@pytest.mark.parametrize(("shape", "dtype"), [((60, 20), F64), ((20, 60), F64), ((300, 9), torch.float32)])
def test_refinement_stays_there(known, shape, dtype, centering):
    x = hard(known, *shape, dtype)

    def measured(y, **options):
        return rgfast.singular_values(y, centering=centering, return_info=True, **options)

    want, known_of = measured(x, impl="reference")
    (found, told), waits = there(measured, x)
    assert told.path.tolist() == known_of.path.tolist()
    assert {*told.path} == {"gram", "refined"}
    sigma, error = found.held, told.singular_value_error.held
    assert bool(((sigma - want).abs() <= error + known_of.singular_value_error).all())
    for i, matrix in enumerate(x):
        truth = known.truth(matrix, centering)
        truth = truth[: int((sigma[i] > 0).sum())]  # others are zeros, of which it has the rounding
        lapack = 50 * 2.0**-53 * truth[:1]
        assert np.all(
            np.abs(sigma[i].numpy() - np.pad(truth, (0, len(sigma[i]) - len(truth))))
            <= error[i].numpy() + lapack.sum()
        )
        if len(truth):
            rank = known.rank_of(truth)
            assert abs(known.rank_of(sigma[i].numpy()) / rank - 1) <= float(told.error_bound.held[i]) <= 1e-6
    # Which go on to stages one and two, and which to an SVD.
    assert waits == [READ, "nonzero", "nonzero", READ]


@pytest.mark.parametrize("op", [REFINE, SVD])
def test_what_is_solved_again_is_not_looked_at(known, op):
    x = hard(known, 70, 24)
    at = torch.tensor([8, 2, 4, 9])
    found, waits = there(lambda y, i: op("library", Again(y, i, "mean")), x, at)
    want = op("library", Again(x, at, "mean"))
    assert waits == (["nonzero"] * 2 if op is REFINE else [])  # which matrices go on
    for name in ("exponent", "rank_limit", "path"):
        assert torch.equal(getattr(found, name).held, getattr(want, name))
    torch.testing.assert_close(found.sigma.held, want.sigma, rtol=1e-9, atol=1e-14)
    torch.testing.assert_close(found.error.held, want.error, rtol=1e-6, atol=0)


def test_some_are_solved_by_an_svd_there(known):
    x = torch.stack(
        [drawn(40, 12), torch.from_numpy(known.with_spectrum(np.logspace(0, -15, 12), 40, 12, 0))]
    )
    (found, told), waits = there(lambda y: rgfast.effective_rank(y, rtol=1e-10, return_info=True), x)
    assert told.path.tolist() == ["gram", "svd"]
    assert waits == [READ, "nonzero", "nonzero", READ]
    want = rgfast.effective_rank(x, method="svd")
    torch.testing.assert_close(found.held, want, rtol=1e-10, atol=0)


def test_a_probe_s_spectra_are_refined_there(known):
    """A few small values by inverse iteration, others by stages: one read for each way and each decision."""
    d = 96
    few = known.with_spectrum(np.where(np.arange(d) < d - 2, 1.0, 1e-7), 300, d, seed=0)
    many = known.with_spectrum(np.logspace(0, -9, d), 300, d, seed=1)
    x = torch.from_numpy(np.stack([few, many]))

    def refined(y, at):
        solved, _ = spectra_of_rows(y, uncentred=False)
        refine_spectra(y, solved, at, centering="mean")
        return solved

    at = torch.arange(2)
    found, waits = there(refined, x, at)
    assert found.path.held.tolist() == [1, 1]
    for i in range(2):
        assert known.rank_of(found.sigma.held[i].numpy()) == pytest.approx(
            known.rank_of(known.truth(x[i])), rel=1e-9
        )
    want = refined(x, at)
    assert bool(((found.sigma.held - want.sigma).abs() <= found.error.held + want.error).all())
    assert len(waits) == 7  # moments, which ways; which rows, stage 1, how good; stages 1 and 2


@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16])
def test_equal_rows_are_compared_there(dtype):
    draw = torch.Generator().manual_seed(0)
    tokens = drawn(12, 20, dtype=dtype)
    x = torch.stack([drawn(40, 20, dtype=dtype), tokens[torch.randint(12, (40,), generator=draw)]])
    x[1, 4:6] = x[1, 4]
    x[1, 5, 3] += 1.0  # in one feature alone

    def limited(y, at):
        solved, _ = spectra_of_rows(y, uncentred=False)
        limit_by_equal_rows(y, solved, at, centering="mean")
        return solved

    at = torch.arange(2)
    found, waits = there(limited, x, at)
    want = limited(x, at)
    assert want.rank_limit.tolist() == [20, len(torch.unique(x[1], dim=0)) - 1]
    assert torch.equal(found.rank_limit.held, want.rank_limit)
    assert torch.equal(found.sigma.held == 0, want.sigma == 0)
    assert waits[1:] == [READ, "unique_dim"]  # after the spectra


BAD = X.clone()
BAD[1, 3, 2] = torch.nan
NAMED = {
    **{name: ("x must be finite, got 1 NaN", call) for name, call in ONCE.items()},
    "gradients": ("x must be finite, got 1 NaN", lambda x: rgfast.effective_rank(x.requires_grad_())),
    "eigvalsh": ("a must be finite, got 13 NaN", lambda x: rgfast.eigvalsh(x.mT @ x)),
    "eigvalsh's gradients": (
        "a must be finite, got 13 NaN",
        lambda x: rgfast.eigvalsh((x.mT @ x).requires_grad_()),
    ),
    "a moment": (
        "scatter must be finite, got 13 NaN",
        lambda x: rgfast.rank_measures_from_moment(x.mT @ x, 40),
    ),
    "above the diagonal of a moment": (
        "scatter must be finite, got 6 NaN",
        lambda x: rgfast.rank_measures_from_moment(above(x.mT @ x), 40),
    ),
}


def above(a):
    """``a`` with what is not finite only above the diagonal."""
    return torch.where(torch.ones_like(a).triu(1) > 0, a, a.nan_to_num())


@pytest.mark.parametrize("name", NAMED)
def test_data_that_are_not_finite_are_named(name):
    sentence, call = NAMED[name]
    with pytest.raises(ValueError, match=f"^{sentence} or infinite values in matrix 1 of the batch$"):
        there(call, BAD)


def test_negative_counts_are_refused():
    with pytest.raises(ValueError, match="n must not be negative, got -1"):
        there(rgfast.rank_measures_from_moment, MOMENT, torch.tensor([3, -1, 4]))


MEASURES = {
    "effective_rank": (rgfast.effective_rank, lambda s: torch.special.entr(s / s.sum()).sum().exp()),
    "effective_rank_variance": (
        lambda x: rgfast.effective_rank(x, spectrum="variance"),
        lambda s: torch.special.entr(s**2 / (s**2).sum()).sum().exp(),
    ),
    "participation_ratio": (rgfast.participation_ratio, lambda s: (s**2).sum() ** 2 / (s**4).sum()),
    "stable_rank": (rgfast.stable_rank, lambda s: (s**2).sum() / s[0] ** 2),
    "singular_values": (rgfast.singular_values, lambda s: s.sum()),
}


def slope(call, x, weight):
    """Gradient of a weighted sum over the batch, by autograd."""
    x = x.requires_grad_()
    value = call(x)
    found = value * weight.reshape(-1, *[1] * (value.dim() - 1))
    (slope,) = torch.autograd.grad(found.sum(), x)
    return slope


@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize("shape", [(3, 40, 7), (2, 6, 15)])
@pytest.mark.parametrize("name", MEASURES)
def test_gradients_there_are_those_of_the_definition(name, shape, dtype):
    call, definition = MEASURES[name]
    x = (drawn(*shape) * torch.logspace(0, -2, shape[-1], dtype=F64) + 5).to(dtype)
    weight = torch.arange(1.0, 1 + len(x), dtype=F64)
    found, _ = there(lambda y, w: slope(call, y, w), x.clone(), weight)
    again, _ = there(lambda y, w: slope(call, y, w), x.clone(), weight)
    assert found.dtype == dtype
    assert torch.equal(found.held, again.held)
    for i in range(len(x)):
        y = x[i].double().requires_grad_()
        sigma = torch.linalg.svdvals(y - y.mean(0))[: min(shape[1] - 1, shape[2])]
        (want,) = torch.autograd.grad(weight[i] * definition(sigma), y)
        tight = {"rtol": 1e-7, "atol": 1e-9} if dtype == F64 else {"rtol": 1e-5, "atol": 1e-6}
        torch.testing.assert_close(found.held[i].double(), want, **tight)


@pytest.mark.parametrize("name", MEASURES)
def test_gradients_of_degenerate_spectra_there(name):
    call, _ = MEASURES[name]
    repeated = torch.cat([torch.eye(6), -torch.eye(6)]).double()
    x = torch.stack([repeated, torch.zeros(12, 6), torch.full((12, 6), 0.1), drawn(12, 6)]).double()
    x[3, :, 2], x[3, :, 4] = 3.0, x[3, :, 5]
    found, _ = there(lambda y: slope(call, y, torch.ones(4)), x)
    assert bool(torch.isfinite(found.held).all())
    assert not found.held[1:3].any()
    if name.startswith("effective_rank"):  # all singular values equal: the maximum
        assert float(found.held[0].abs().max()) < 1e-12


@pytest.mark.parametrize("name", MEASURES)
def test_a_gradient_does_not_look_at_the_device(name):
    last = (7,) if name == "singular_values" else ()
    grad = drawn(3, *last, seed=1)
    found, waits = there(lambda x, g: gradient(x, g, name, "mean"), X, grad)
    torch.testing.assert_close(found.held, gradient(X, grad, name, "mean"), rtol=1e-12, atol=1e-14)
    assert waits == []
    _, waits = there(eigenvalue_gradient, MOMENT, drawn(3, 7))
    assert waits == []


def test_the_top_is_looked_at_once_per_doubling():
    x = drawn(3, 60, 40)
    for call in (
        rgfast.stable_rank,
        lambda y: gradient(y, torch.ones_like(y[:, 0, 0]), "stable_rank", "mean"),
    ):
        found, waits = there(call, x)
        torch.testing.assert_close(found.held, call(x), rtol=1e-12, atol=1e-14)
        assert waits.count("index with a mask") == 2  # 16 and 32 steps; 40 are all there are
        assert len(waits) <= 3


def test_gradients_there_are_taken_once():
    def twice(x):
        x = x.requires_grad_()
        (slope,) = torch.autograd.grad(rgfast.effective_rank(x).square().sum(), x, create_graph=True)
        slope.sum().backward()

    sentence = "trying to differentiate twice a function that is differentiable once"
    with pytest.raises(RuntimeError, match=sentence):
        twice(X.clone())
    with pytest.raises(RuntimeError, match=sentence):
        there(twice, X.clone())
