"""Recorded calls of CKA, HSIC, drift and their streams."""

import torch
from calls_ops import FLOATS, HALVES, short
from registry import CONTRACT, add, call, normal

import rgfast


def depth(seed, layers, *shape, dtype=torch.float64, step=0.3, offset=0.0):
    """Layers ``[L, *shape]`` of a stream that moves by ``step`` at each."""
    x = [normal(seed, *shape) + offset]
    for layer in range(1, layers):
        x.append(x[-1] + step * normal(seed + layer, *shape))
    return torch.stack(x).to(dtype)


def both(function, *args, **options):
    return {debiased: function(*args, debiased=debiased, **options) for debiased in (True, False)}


PAIRS = (((4, 3), (4, 7)), ((17, 65), (17, 2)), ((65, 16), (65, 33)), ((2, 3, 40, 9), (2, 3, 40, 12)))
for one, two in PAIRS:
    for dtype in (*FLOATS, *HALVES):
        for impl in ("auto", "reference") if dtype in FLOATS else ("auto",):

            def pair(one=one, two=two, dtype=dtype, impl=impl):
                x, y = normal(50, *one, dtype=dtype), normal(51, *two, dtype=dtype)
                y[..., 0] += x[..., 0]
                return {"cka": both(rgfast.cka, x, y, impl=impl), "hsic": both(rgfast.hsic, x, y)}

            add(f"cka/pair/{'x'.join(map(str, one))}/{short(dtype)}/{impl}", pair, 1e-10)


@call("cka/rbf", 1e-10)
def rbf():
    x, y = normal(52, 2, 30, 5), normal(53, 2, 30, 8)
    y[..., :5] += x
    options = ({}, {"threshold": 0.5}, {"bandwidth": 2.0})
    return [both(f, x, y, kernel="rbf", **o) for f in (rgfast.cka, rgfast.hsic) for o in options]


for dtype in FLOATS:
    for precision in (None, "double", "single"):
        add(
            f"cka/matrix/{short(dtype)}/{precision}",
            lambda dtype=dtype, precision=precision: {
                "tall": both(rgfast.cka_matrix, depth(54, 4, 3, 70, 12, dtype=dtype), precision=precision),
                "wide": both(rgfast.cka_matrix, depth(55, 3, 24, 130, dtype=dtype), precision=precision),
                "drift": both(rgfast.kernel_drift, depth(54, 4, 3, 70, 12, dtype=dtype), precision=precision),
            },
            1e-10 if dtype == torch.float64 or precision == "double" else CONTRACT,
        )


@call("cka/matrix/other", 1e-10)
def other():
    first, second = depth(56, 3, 50, 8), [normal(57, 50, 5), normal(58, 50, 60), normal(56, 50, 8)]
    return {
        "other": both(rgfast.cka_matrix, first, second),
        "ragged": both(rgfast.cka_matrix, second, impl="reference"),
        "limit": both(rgfast.cka_matrix, first, sample_limit=10),
        "strided": rgfast.cka_matrix(first[:, ::2].mT.contiguous().mT, [x[::2] for x in second]),
    }


@call("cka/matrix/constant", 1e-10)
def constant():
    layers = depth(59, 3, 2, 20, 6)
    layers[1, 0] = 4.0
    return [both(f, layers) for f in (rgfast.cka_matrix, rgfast.kernel_drift)] + [
        rgfast.kernel_change(layers),
        rgfast.minibatch_cka(layers, batch_size=8),
    ]


@call("cka/null", 1e-14)
def null():
    return [rgfast.cka_null(*sizes) for sizes in ((256, 4096, 4096), (10, 3, 7))]


# A drift is half a squared distance of unit kernels: it keeps its own digits where it is small.
for step, offset in ((1e-1, 0.0), (1e-3, 0.0), (1e-5, 0.0), (1e-9, 0.0), (1e-3, 1e4)):
    for impl in ("auto", "reference"):
        add(
            f"drift/{step:g}/{offset:g}/{impl}",
            lambda step=step, offset=offset, impl=impl: {
                "fp64": both(
                    rgfast.kernel_drift, depth(60, 3, 2, 48, 10, step=step, offset=offset), impl=impl
                ),
                "change": rgfast.kernel_change(depth(60, 3, 2, 48, 10, step=step, offset=offset)),
            },
            CONTRACT if step > 1e-4 else 1e-3,
        )
add("drift/fp32", lambda: both(rgfast.kernel_drift, depth(61, 4, 90, 33, dtype=torch.float32)), CONTRACT)
add("drift/bf16", lambda: both(rgfast.kernel_drift, depth(62, 3, 90, 33, dtype=torch.bfloat16)), CONTRACT)
add("drift/few", lambda: rgfast.kernel_drift(depth(63, 3, 2, 3, 5)), 1e-10)
add(
    "minibatch",
    lambda: (
        [rgfast.minibatch_cka(depth(64, 3, 2, 61, 9), batch_size=b) for b in (4, 16, 60, 256)]
        + [rgfast.minibatch_cka(depth(65, 2, 33, 9), depth(66, 3, 33, 5), batch_size=16)]
    ),
    1e-10,
)


@call("cka/gradients", 1e-9)
def cka_gradients():
    found = {}
    for name, function in {
        "cka": lambda x: rgfast.cka(x[0], x[1]),
        "biased": lambda x: rgfast.cka(x[0], x[1], debiased=False),
        "rbf": lambda x: rgfast.cka(x[0], x[1], kernel="rbf"),
        "hsic": lambda x: rgfast.hsic(x[0], x[1]),
        "drift": rgfast.kernel_drift,
        "change": rgfast.kernel_change,
        "matrix": rgfast.cka_matrix,
    }.items():
        x = depth(67, 3, 14, 5).requires_grad_()
        function(x).sum().backward()
        found[name] = x.grad
    return found


def stream(accumulator, layers, splits, mask=None):
    at = 0
    for rows in splits:
        accumulator.update(
            layers[..., at : at + rows, :], None if mask is None else mask[..., at : at + rows]
        )
        at += rows
    return accumulator


def finalized(accumulator):
    return {debiased: accumulator.finalize(debiased=debiased) for debiased in (True, False)}


for route in ("sample", "features", "auto"):
    for pairs in ("all", "adjacent"):
        for dtype in FLOATS:

            def accumulated(route=route, pairs=pairs, dtype=dtype):
                layers = depth(70, 3, 2, 150, 9, dtype=dtype)
                options = {"route": route, "pairs": pairs, "sample_limit": 100}
                one = stream(rgfast.CKAAccumulator(**options), layers, [1, 33, 30])
                two = stream(rgfast.CKAAccumulator(**options), layers[..., 64:, :], [86])
                mask = normal(71, 2, 150) > -0.5
                masked = stream(rgfast.CKAAccumulator(**options), layers, [75, 75], mask)
                before = finalized(one)
                return {"before": before, "merged": finalized(one.merge(two)), "masked": finalized(masked)}

            tol = 1e-10 if dtype == torch.float64 or route == "features" else CONTRACT
            add(f"stream/cka/{route}/{pairs}/{short(dtype)}", accumulated, tol)


@call("stream/cka/reasons", 1e-10)
def reasons():
    layers = depth(72, 3, 2, 40, 6)
    layers[1] = 1.0
    mask = torch.ones(2, 40, dtype=torch.bool)
    mask[1, 3:] = False
    result = stream(rgfast.CKAAccumulator(), layers, [40], mask).finalize()
    return [result, [result.reason(layer, position) for layer in range(3) for position in (0, 1)]]


@call("stream/minibatch", 1e-10)
def minibatch_stream():
    layers, mask = depth(73, 3, 2, 70, 6), normal(74, 2, 70) > -0.5
    one = stream(rgfast.MinibatchCKAAccumulator(batch_size=16), layers, [5, 30, 35])
    two = stream(rgfast.MinibatchCKAAccumulator(batch_size=16), layers, [70], mask)
    found = [one.finalize(), one.left_out, two.finalize(), two.left_out]
    return [*found, one.merge(two).finalize(), one.left_out]
