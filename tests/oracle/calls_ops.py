"""Recorded calls of spectra, ranks, CKA and drift."""

import numpy as np
import torch
from registry import CONTRACT, FP32, FP64, add, call, normal, with_spectrum

import rgfast

HALVES = (torch.bfloat16, torch.float16)
FLOATS = (torch.float64, torch.float32)
CENTERINGS = ("mean", "none")


def short(dtype):
    return str(dtype).removeprefix("torch.")


def all_ranks(x, **options):
    """Every rank of ``x`` by its own function, and the spectrum."""
    plain = {name: value for name, value in options.items() if name not in ("method", "rtol")}
    return {
        "singular": rgfast.effective_rank(x, **options),
        "variance": rgfast.effective_rank(x, spectrum="variance", **options),
        "participation": rgfast.participation_ratio(x, **plain),
        "stable": rgfast.stable_rank(x, **plain),
        "numerical": rgfast.numerical_rank(x, tol=1e-3, **options),
        "sigma": rgfast.singular_values(x, **options),
    }


def centred_or_not(x, **options):
    return {centering: all_ranks(x, centering=centering, **options) for centering in CENTERINGS}


SHAPES = (
    (1, 4),
    (2, 3),
    (3, 3),
    (16, 15),
    (17, 65),
    (65, 17),
    (97, 33),
    (3, 5, 63),
    (2, 3, 40, 9),
    (130, 129),
)
for shape in SHAPES:
    for dtype in FLOATS:
        seed = sum(shape)
        add(
            f"spectrum/shape/{'x'.join(map(str, shape))}/{short(dtype)}",
            lambda seed=seed, shape=shape, dtype=dtype: centred_or_not(normal(seed, *shape, dtype=dtype)),
            CONTRACT if shape[-2] <= 3 else 1e-10,
        )
for dtype in HALVES:
    add(
        f"spectrum/half/{short(dtype)}",
        lambda dtype=dtype: centred_or_not(normal(7, 2, 33, 20, dtype=dtype)),
        1e-10,
    )
for impl in ("native", "reference"):
    for precision in ("double",) if impl == "native" else ("double", "single"):
        for dtype in FLOATS:
            add(
                f"spectrum/{impl}/{precision}/{short(dtype)}",
                lambda dtype=dtype, impl=impl, precision=precision: centred_or_not(
                    normal(11, 3, 40, 24, dtype=dtype) + 0.5, impl=impl, precision=precision
                ),
                1e-10 if precision == "double" else FP32,
            )


def hard(kind):
    """Matrices on which a Gram alone would fail."""
    i = np.arange(1, 49, dtype=float)
    if kind == "dead":
        x = normal(20, 60, 48)
        x[:, 5] = 3.0
        x[:, 9] = x[:, 8]
        return x
    if kind == "constant":
        return normal(21, 1, 48).expand(60, 48)
    if kind == "zero":
        return torch.zeros(60, 48, dtype=torch.float64)
    if kind == "offset":
        return normal(22, 60, 48) + 1e4
    if kind == "huge":
        return 1e150 * normal(23, 60, 48)
    if kind == "tiny":
        return 1e-18 * normal(24, 60, 48, dtype=torch.float32)
    if kind == "noisy":
        return normal(25, 60, 1) * normal(26, 48) + 1e-5 * normal(27, 60, 48)
    if kind == "rank1":
        return normal(28, 60, 1) * normal(29, 48)
    sigma = {"inverse": 1 / i, "square": 1 / i**2, "fourth": 1 / i**4, "condition": 10 ** (-8 * (i - 1) / 47)}
    return with_spectrum(30, 60, sigma[kind])


def path_of(x, method, centering):
    sigma, info = rgfast.singular_values(x, method=method, centering=centering, return_info=True)
    rank = rgfast.effective_rank(x, method=method, centering=centering)
    return {"sigma": sigma, "rank": rank, "path": info.path, "bound": info.error_bound}


KINDS = ("inverse", "square", "fourth", "condition", "noisy", "rank1", "dead", "constant", "zero", "offset")
for kind in (*KINDS, "huge", "tiny"):
    add(
        f"spectrum/hard/{kind}",
        lambda kind=kind: {
            f"{method}.{centering}": path_of(hard(kind), method, centering)
            for method in ("auto", "gram", "svd")
            for centering in CENTERINGS
        },
        # Squared, singular values below 1e-8 of the largest are rounding.
        1e-6,
    )
add("spectrum/rtol", lambda: [path_of(hard(k), "auto", "mean") for k in ("square", "noisy")], CONTRACT)
add("spectrum/numerical/tol", lambda: [rgfast.numerical_rank(hard("condition"), tol=t) for t in (1e-9, 1e-4)])
add("spectrum/measures/fp64", lambda: rgfast.rank_measures(normal(31, 2, 70, 33)), 1e-10)
add("spectrum/measures/fp32", lambda: rgfast.rank_measures(normal(32, 50, 64, dtype=torch.float32)), 1e-10)


def large():
    return normal(33, 400, 300, dtype=torch.float32)


add("spectrum/large/fp32", lambda: rgfast.rank_measures(large()), 1e-10)
add(
    "varies/participation",
    lambda: [rgfast.participation_ratio(large(), centering=c) for c in CENTERINGS],
    1e-10,
)
add("spectrum/large/wide", lambda: centred_or_not(normal(34, 64, 1024)), 1e-10)
add("spectrum/lanczos", lambda: rgfast.effective_rank(normal(35, 300, 280), method="lanczos"), CONTRACT)


@call("spectrum/strides", 1e-10)
def strides():
    x = normal(36, 40, 30)
    return {
        "transposed": all_ranks(x.T),
        "every other": all_ranks(x[::2, ::3]),
        "expanded": all_ranks(x[:1, :].expand(9, 30), centering="none"),
        "array": all_ranks(x.numpy()[:, :7]),
    }


@call("spectrum/gradients", 1e-9)
def rank_gradients():
    found = {}
    for name in ("effective_rank", "participation_ratio", "stable_rank", "singular_values"):
        for centering in CENTERINGS:
            x = normal(37, 2, 12, 7).requires_grad_()
            getattr(rgfast, name)(x, centering=centering).square().sum().backward()
            found[f"{name}.{centering}"] = x.grad
    x = normal(37, 2, 12, 7, dtype=torch.float32).requires_grad_()
    rgfast.effective_rank(x, spectrum="variance").sum().backward()
    return {**found, "variance.fp32": x.grad}


for size in (1, 2, 3, 16, 33, 65, 130, 257):
    for dtype in FLOATS:
        for impl in ("auto", "reference") if size in (33, 130) else ("auto",):

            def eigenvalues(size=size, dtype=dtype, impl=impl):
                a = normal(size, 2, size, size, dtype=dtype)
                return rgfast.eigvalsh(a + a.mT, impl=impl)

            add(
                f"eigvalsh/{size}/{short(dtype)}/{impl}",
                eigenvalues,
                FP64 if dtype == torch.float64 else FP32,
            )


@call("moments", 1e-10)
def moments():
    x = normal(40, 3, 50, 12)
    x = x - x.mean(-2, keepdim=True)
    scatter, n = x.mT @ x, torch.tensor([50, 50, 1])
    return {
        "measures": rgfast.rank_measures_from_moment(scatter, 50, tol=1e-4),
        "counts": rgfast.rank_measures_from_moment(scatter, n, accumulated=torch.full((3,), 1e4)),
        "sigma": rgfast.singular_values_from_moment(scatter, 50, centering="none", impl="reference"),
    }


@call("baseline", 1e-9)
def baseline():
    sizes = ((1, 5), (2, 2), (5, 40), (40, 9), (256, 256), (1000, 64))
    return {
        f"{n}x{d}.{c}": rgfast.isotropic_baseline(n, d, centering=c) for n, d in sizes for c in CENTERINGS
    }


@call("estimate", CONTRACT)
def estimate():
    rows = normal(41, 90, 200)
    operator = rgfast.moment_operator(rows.split(40), 200)
    fast = {"probes": 6, "steps": 20, "deflate": 8}
    return {
        "formed": rgfast.effective_rank_estimate(rows.T @ rows, seed=3, **fast),
        "variance": rgfast.effective_rank_estimate(rows.T @ rows, spectrum="variance", **fast),
        "operator": rgfast.effective_rank_estimate(operator, 200, **fast),
    }


def streamed(splits, dtype=torch.float64, mask=None, pending=256 << 20):
    layers = [normal(42, 4, 300, 8, dtype=dtype) + 3, normal(43, 4, 300, 21, dtype=dtype)]
    stream, at = rgfast.SecondMoments(pending_bytes=pending), 0
    for rows in splits:
        kept = None if mask is None else mask[:, at : at + rows]
        stream.update([x[:, at : at + rows] for x in layers], kept)
        at += rows
    return stream


def of_stream(stream):
    return [
        {
            "count": stream.count,
            "mean": stream.mean(layer),
            "scatter": stream.scatter(layer),
            "raw": stream.scatter(layer, centering="none"),
            "measures": stream.rank_measures(layer),
            "sigma": stream.singular_values(layer, centering="none"),
        }
        for layer in (0, 1)
    ]


@call("second moments/stream", 1e-10)
def second_moments():
    mask = normal(44, 4, 300) > 0
    mask[2] = False
    return {
        "even": of_stream(streamed([100, 100, 100])),
        "ragged": of_stream(streamed([1, 3, 129, 167], pending=1 << 14)),
        "masked": of_stream(streamed([77, 223], torch.float32, mask)),
        "half": of_stream(streamed([300], torch.bfloat16)),
    }


@call("second moments/merge", 1e-10)
def second_moments_merged():
    one, two, back = streamed([50, 91]), streamed([211], torch.float32), rgfast.SecondMoments()
    back.load_state_dict(one.state_dict())
    return of_stream(back.update([normal(45, 4, 9, 8), normal(46, 4, 9, 21)]).merge(two))
