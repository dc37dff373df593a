"""One check a public op: draws its input, and compares with brute force or expects the documented error.

A check returns what came of it ("right", "refused" with the documented error, "undefined": NaN where the
measure is) and the largest error in units of what is allowed. It raises where neither holds.
"""

import numpy as np
import torch
import truths
from draws import layers_of
from judging import ILL, UNIT, excess, impl_of, judged, kind_of, poisoned, refused, tried
from ops_residual_mlp import residual_mlp, residual_stack
from ops_streams import cka_stream, minibatch_stream, moments, second_moments

import rgfast

SINGLE = 1e-6  # what fp32 products may cost a CKA


def spectrum(draw):
    dtype = draw.dtype()
    values, _ = draw.values((*draw.lead(), draw.count(), draw.count(97)), dtype)
    x, centering = draw.laid_out(values), draw.choose(("mean", "none"))
    measure = draw.choose(
        ("effective_rank", "effective_rank", "variance", "participation_ratio", "stable_rank",
         "singular_values", "numerical_rank", "rank_measures", "single")
    )  # fmt: skip
    impl = impl_of(draw)
    functions = {"variance": rgfast.effective_rank, "single": rgfast.rank_measures}
    function = functions.get(measure) or getattr(rgfast, measure)
    if draw.chance(0.05):
        return refused(lambda: function(poisoned(draw, x), centering=centering), ValueError, "finite")
    if draw.chance(0.02):
        empty = torch.zeros(draw.choose(((0, 3), (3, 0), (2, 0, 5))), dtype=torch.float32, device="cpu")
        return refused(lambda: function(empty), ValueError, "at least one")
    sigmas = [truths.sigma(m, centering == "mean") for m in truths.matrices(x)]
    lead = tuple(x.shape[:-2])

    def shaped(values):
        return np.array(values).reshape(lead)

    ranks = shaped([truths.rank_of(s) for s in sigmas])
    if measure == "effective_rank":
        got, info = tried(lambda i: function(x, centering=centering, impl=i, return_info=True), impl)
        bound = info.error_bound.numpy()
        within = excess(got, ranks, ranks * np.minimum(bound, 1e6) + 1e-11, "bound")
        return "right", max(within, excess(got, ranks, 1e-6 * np.maximum(ranks, 1) + 1e-11, measure))
    variance = shaped([truths.rank_of(s, 2) for s in sigmas])
    precise = 1e-12 if dtype != torch.float64 else 1e-9
    if measure == "variance":
        got = tried(lambda i: function(x, spectrum="variance", centering=centering, impl=i), impl)
        return "right", excess(got, variance, precise * np.maximum(variance, 1) + 1e-12, measure)
    ratio = shaped([truths.energy_ratio(s) for s in sigmas])
    if measure == "participation_ratio":
        got = tried(lambda i: function(x, centering=centering, impl=i), impl)
        return "right", excess(got, ratio, 1e-10 * np.maximum(ratio, 1), measure)
    stable = shaped([truths.energy_ratio(s, top=True) for s in sigmas])
    if measure == "stable_rank":
        got = tried(lambda i: function(x, centering=centering, impl=i), impl)
        return "right", excess(got, stable, 1e-9 * np.maximum(stable, 1), measure)
    want = np.array(sigmas).reshape(*lead, -1)
    if measure == "singular_values":
        got, info = tried(lambda i: function(x, centering=centering, impl=i, return_info=True), impl)
        own = 50 * UNIT[torch.float64] * want.max(-1, keepdims=True) + 1e-300
        return "right", excess(got, want, info.singular_value_error.numpy() + own, measure)
    if measure == "numerical_rank":
        tol = draw.choose((None, 1e-3, 1e-6, 1e-9))
        got = tried(lambda i: function(x, tol=tol, centering=centering, impl=i), impl).numpy()
        eps = torch.finfo(dtype if dtype.itemsize > 2 else torch.float32).eps
        tol = max(x.shape[-2:]) * eps if tol is None else tol
        top = want.max(-1, keepdims=True)
        least, most = ((want > factor * tol * top).sum(-1) for factor in (4.0, 0.25))
        assert ((least <= got) & (got <= most)).all(), (got, least, most)
        return "right", 0.0
    precision = "single" if measure == "single" else "double"
    found = tried(lambda i: function(x, centering=centering, precision=precision, impl=i), impl)
    if precision == "single":
        loss = excess(found.participation_ratio, ratio, 1e-5 * np.maximum(ratio, 1), "single")
        return "right", max(
            loss, excess(found.effective_rank_variance, variance, 1e-3 * np.maximum(variance, 1), "single")
        )
    losses = [
        excess(found.effective_rank, ranks, 1e-6 * np.maximum(ranks, 1) + 1e-11, "rank"),
        excess(
            found.effective_rank_variance, variance, precise * np.maximum(variance, 1) + 1e-12, "variance"
        ),
        excess(found.participation_ratio, ratio, 1e-9 * np.maximum(ratio, 1), "ratio"),
        excess(found.stable_rank, stable, 1e-9 * np.maximum(stable, 1), "stable"),
    ]
    return "right", max(losses)


def eigvalsh(draw):
    d, dtype = draw.count(130), draw.choose((torch.float64, torch.float32))
    values, _ = draw.values((*draw.lead(), d, d), dtype)
    a, impl = draw.laid_out(values), impl_of(draw)
    if draw.chance(0.05):
        bad = poisoned(draw, a)
        lower = bad.tril()
        if not bool(torch.isfinite(lower).all()):
            return refused(lambda: rgfast.eigvalsh(bad), ValueError, "finite")
    if draw.chance(0.02):
        return refused(
            lambda: rgfast.eigvalsh(torch.zeros(d, d + 1, dtype=torch.float32, device="cpu")),
            ValueError,
            "square",
        )
    if draw.chance(0.02):
        return refused(
            lambda: rgfast.eigvalsh(torch.zeros(d, d, dtype=torch.bfloat16, device="cpu")), TypeError, "float"
        )
    got = tried(lambda i: rgfast.eigvalsh(a, impl=i), impl)
    assert got.dtype == kind_of(a)
    worst = 0.0
    for matrix, found in zip(truths.matrices(a), got.double().numpy().reshape(-1, d), strict=True):
        lower = np.tril(matrix)
        top = np.abs(lower).max()
        unit = 2.0 ** np.frexp(top)[1] if top > 0 else 1.0
        want = np.linalg.eigvalsh(lower / unit) * unit
        allowed = (max(50, d / 2) * UNIT[dtype] + 50 * 2.0**-53) * np.abs(want).max() + 1e-320
        worst = max(worst, excess(found, want, allowed, "eigenvalues"))
    return "right", worst


def pair_truth(function, x, y, debiased):
    """``function`` of every position, and the magnification, as arrays of the leading shape."""
    found = [function(a, b, debiased) for a, b in zip(truths.matrices(x), truths.matrices(y), strict=True)]
    lead = tuple(x.shape[:-2])
    return (np.array([f[k] for f in found]).reshape(lead) for k in range(2))


def allowed_cka(layers, magnified):
    exact = all(kind_of(x) == torch.float64 for x in layers)
    return np.where(magnified > ILL, np.inf, (1e-10 if exact else SINGLE) * np.maximum(magnified, 1))


def too_few(draw, debiased, n, call):
    return refused(call, ValueError, "at least 4 samples") if debiased and n < 4 else None


def cka(draw):
    (x, y, *_), _ = layers_of(draw, 3)
    debiased, impl = draw.chance(0.5), impl_of(draw)
    if draw.chance(0.05):
        return refused(
            lambda: rgfast.cka(poisoned(draw, x), y, debiased=False, impl=impl), (ValueError), "finite"
        )
    few = too_few(draw, debiased, x.shape[-2], lambda: rgfast.cka(x, y))
    if few:
        return few
    want, magnified = pair_truth(truths.cka, x, y, debiased)
    got = tried(lambda i: rgfast.cka(x, y, debiased=debiased, impl=i), impl)
    return judged(got, want, magnified, allowed_cka((x, y), magnified), "cka")


def hsic(draw):
    (x, y, *_), extreme = layers_of(draw, 3)
    debiased, impl = draw.chance(0.5), impl_of(draw)
    n = x.shape[-2]
    few = too_few(draw, debiased, n, lambda: rgfast.hsic(x, y))
    if few:
        return few
    if extreme or n < 2:  # the value itself may be no fp64 number, and divides by (n-1)²
        rgfast.hsic(x, y, debiased=debiased)
        return "undefined", 0.0
    want, size = pair_truth(truths.hsic, x, y, debiased)
    got = tried(lambda i: rgfast.hsic(x, y, debiased=debiased, impl=i), impl)
    exact = all(kind_of(v) == torch.float64 for v in (x, y))
    return "right", excess(got, want, (1e-10 if exact else SINGLE) * size + 1e-300, "hsic")


def cka_matrix(draw):
    layers, _ = layers_of(draw)
    debiased, impl = draw.chance(0.5), impl_of(draw)
    options = {"precision": draw.choose((None, "single", "double")), "sample_limit": draw.choose((1, 4096))}
    if draw.chance(0.05):
        bad = [*layers[:-1], poisoned(draw, layers[-1])]
        return refused(lambda: rgfast.cka_matrix(bad, debiased=False, **options), ValueError, "finite")
    few = too_few(draw, debiased, layers[0].shape[-2], lambda: rgfast.cka_matrix(layers))
    if few:
        return few

    def call(chosen):
        return rgfast.cka_matrix(layers, debiased=debiased, impl=chosen, **options)

    got = tried(call, impl).numpy()
    worst, outcomes = 0.0, set()
    for i, x in enumerate(layers):
        for j, y in enumerate(layers):
            want, magnified = pair_truth(truths.cka, x, y, debiased)
            outcome, found = judged(
                got[..., i, j], want, magnified, allowed_cka((x, y), magnified), f"cka {i} {j}"
            )
            outcomes.add(outcome)
            worst = max(worst, found)
    return ("right" if "right" in outcomes else "undefined"), worst


def kernel_drift(draw):
    layers, _ = layers_of(draw)
    debiased, impl = draw.chance(0.3), impl_of(draw)
    few = too_few(draw, debiased, layers[0].shape[-2], lambda: rgfast.kernel_drift(layers, debiased=True))
    if few:
        return few
    got = tried(lambda i: rgfast.kernel_drift(layers, debiased=debiased, impl=i), impl).numpy()
    worst, outcomes = 0.0, set()
    for step in range(len(layers) - 1):
        x, y = layers[step : step + 2]
        want, magnified = pair_truth(truths.drift, x, y, debiased)
        allowed = allowed_cka((x, y), magnified)
        outcome, found = judged(got[..., step], want, magnified, allowed, f"drift {step}")
        outcomes.add(outcome)
        worst = max(worst, found)
    return ("right" if "right" in outcomes else "undefined"), worst


def minibatch_cka(draw):
    layers, extreme = layers_of(draw, 3)
    size, impl = draw.choose((4, 5, 16, 64)), impl_of(draw)
    n = layers[0].shape[-2]
    if n < 4:
        return refused(lambda: rgfast.minibatch_cka(layers, batch_size=size), ValueError, "at least 4")
    got = tried(lambda i: rgfast.minibatch_cka(layers, batch_size=size, impl=i), impl).numpy()
    if extreme:
        return "undefined", 0.0
    x, y = layers[0], layers[-1]
    number = min(-(-n // size), n // 4)
    cut = [slice(n * k // number, n * (k + 1) // number) for k in range(number)]
    want, magnified = pair_truth(lambda a, b, _: truths.minibatch_cka(a, b, cut), x, y, True)
    last = len(layers) - 1
    return judged(got[..., 0, last], want, magnified, allowed_cka((x, y), magnified), "minibatch")


CHECKS = [
    (function.__name__, function)
    for function in (
        spectrum, spectrum, spectrum, eigvalsh, cka, hsic, cka_matrix, cka_matrix, kernel_drift,
        minibatch_cka, residual_mlp, residual_mlp, residual_stack, moments, second_moments, cka_stream,
        minibatch_stream,
    )
]  # fmt: skip
