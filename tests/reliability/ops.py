"""One check a public op: draws its input, and compares with brute force or expects the documented error.

A check returns what came of it ("right", "refused" with the documented error, "undefined": NaN where the
measure is) and the largest error in units of what is allowed. It raises where neither holds.
"""

from itertools import pairwise

import numpy as np
import torch
import truths
from draws import COUNTS

import rgfast
from rgfast.ops.residual_mlp.reference import residual_mlp_reference
from rgfast.streaming import MomentAccumulator

UNIT = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
CENTERING = ("mean", "none")
SINGLE = 1e-6  # what fp32 products may cost a CKA
ILL = 1e7  # magnification of rounding errors beyond which a value says nothing


def kind_of(x):
    return torch.from_numpy(x).dtype if isinstance(x, np.ndarray) else x.dtype


def refused(call, error, words):
    """The outcome where ``call`` raises ``error`` with ``words`` in its message."""
    try:
        call()
    except error as raised:
        if words in str(raised):
            return "refused", 0.0
        raise
    raise AssertionError(f"expected {error.__name__} with {words!r}, got a value")


def excess(got, want, allowed, what=""):
    """|got − want| in units of ``allowed``; raises where that is over 1, or where only one of them is NaN."""
    got = np.asarray(got.double() if isinstance(got, torch.Tensor) else got, dtype=np.float64)
    want = np.asarray(want, dtype=np.float64)
    assert got.shape == want.shape, (what, got.shape, want.shape)
    assert np.array_equal(np.isnan(got), np.isnan(want)), (what, got, want)
    error = np.abs(got - want) / np.broadcast_to(allowed, want.shape)
    found = float(np.nan_to_num(error, nan=0.0, posinf=np.inf).max(initial=0.0))
    assert found <= 1, (what, found, got, want)
    return found


def impl_of(draw):
    return draw.choose(("auto", "auto", "auto", "native", "reference"))


def tried(call, impl):
    """``call(impl)``, or with "auto" where a named implementation says that it cannot."""
    try:
        return call(impl)
    except rgfast.ImplUnavailable:
        if impl == "auto":
            raise
        return call("auto")


def poisoned(draw, x):
    """A copy of ``x`` with NaN or infinity somewhere."""
    bad = torch.as_tensor(x).clone(memory_format=torch.contiguous_format)
    bad.view(-1)[int(draw.rng.integers(bad.numel()))] = draw.choose((torch.nan, torch.inf, -torch.inf))
    return bad


def spectrum(draw):
    dtype = draw.dtype()
    values, _ = draw.values((*draw.lead(), draw.count(), draw.count(97)), dtype)
    x, centering = draw.laid_out(values), draw.choose(CENTERING)
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
        empty = torch.zeros(draw.choose(((0, 3), (3, 0), (2, 0, 5))))
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
        return refused(lambda: rgfast.eigvalsh(torch.zeros(d, d + 1)), ValueError, "square")
    if draw.chance(0.02):
        return refused(lambda: rgfast.eigvalsh(torch.zeros(d, d).bfloat16()), TypeError, "float")
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


def layers_of(draw, most=4):
    """Layers ``[*lead, n, d_l]`` of one dtype, each in its own layout, mostly correlated; and whether one of
    them is so far from 1 that a product of four of its values is no fp64 number."""
    lead, n, dtype = draw.lead(), draw.count(), draw.dtype()
    first, kind = draw.values((*lead, n, draw.count(65)), dtype)
    layers, kinds = [first], {kind}
    for _ in range(draw.choose(range(1, most))):
        last = layers[-1].double()
        scale = last.abs().max().item() or 1.0
        if draw.chance(0.7):
            step = scale * draw.choose((1e-9, 1e-4, 0.3)) * torch.from_numpy(draw.normal(*last.shape))
            limit = torch.finfo(dtype).max / 2
            layers.append((last + step).clamp(-limit, limit).to(dtype))
        else:
            other, kind = draw.values((*lead, n, draw.count(65)), dtype)
            layers.append(other)
            kinds.add(kind)
    return [draw.laid_out(x) for x in layers], bool(kinds & {"tiny", "huge"})


def pair_truth(function, x, y, debiased):
    """``function`` of every position, and the magnification, as arrays of the leading shape."""
    found = [function(a, b, debiased) for a, b in zip(truths.matrices(x), truths.matrices(y), strict=True)]
    lead = tuple(x.shape[:-2])
    return (np.array([f[k] for f in found]).reshape(lead) for k in range(2))


def allowed_cka(layers, magnified):
    exact = all(kind_of(x) == torch.float64 for x in layers)
    return np.where(magnified > ILL, np.inf, (1e-10 if exact else SINGLE) * np.maximum(magnified, 1))


def judged(got, want, magnified, allowed, what):
    """As :func:`excess`; where the value is lost in rounding it may be anything, NaN included."""
    got, lost = torch.as_tensor(got).double().numpy().copy(), magnified > ILL
    got[lost], want = 0.0, np.where(lost, 0.0, want)
    return ("undefined" if lost.all() else "right"), excess(got, want, np.where(lost, 1.0, allowed), what)


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
    call = lambda i: rgfast.cka_matrix(layers, debiased=debiased, impl=i, **options)  # noqa: E731
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
    want, magnified, flat = [], [], [truths.matrices(v) for v in (x, y)]
    number = min(-(-n // size), n // 4)
    cut = [slice(n * k // number, n * (k + 1) // number) for k in range(number)]
    for a, b in zip(*flat, strict=True):
        sums = {
            names: [truths.hsic(left[rows], right[rows], True) for rows in cut]
            for names, left, right in (("xy", a, b), ("xx", a, a), ("yy", b, b))
        }
        value = {names: sum(v for v, _ in found) for names, found in sums.items()}
        terms = {names: sum(s for _, s in found) for names, found in sums.items()}
        product = value["xx"] * value["yy"]
        fine = value["xx"] > 0 and value["yy"] > 0
        want.append(value["xy"] / np.sqrt(product) if fine else np.nan)
        magnified.append(terms["xx"] / value["xx"] * terms["yy"] / value["yy"] if fine else np.inf)
    lead = tuple(x.shape[:-2])
    want, magnified = np.array(want).reshape(lead), np.array(magnified).reshape(lead)
    last = len(layers) - 1
    return judged(got[..., 0, last], want, magnified, allowed_cka((x, y), magnified), "minibatch")


def block_of(draw, d, dtype, norm):
    h = draw.count(130)

    def drawn(*shape, scale=1.0, offset=0.0):
        return torch.from_numpy(draw.normal(*shape) * scale + offset).to(dtype)

    return {
        "w1": draw_tensor(draw, drawn(h, d, scale=d**-0.5)),
        "b1": drawn(h, scale=0.3) if draw.chance(0.7) else None,
        "w2": draw_tensor(draw, drawn(d, h, scale=h**-0.5)),
        "b2": drawn(d, scale=0.3) if draw.chance(0.7) else None,
        "norm_weight": drawn(d, scale=0.2, offset=1.0) if norm and draw.chance(0.7) else None,
        "norm_bias": drawn(d, scale=0.2) if norm and draw.chance(0.5) else None,
    }


def draw_tensor(draw, x):
    """In some layout, as a tensor (gradients are wanted)."""
    return torch.as_tensor(draw.laid_out(x))


def in_dtype(tensors, dtype):
    return {k: None if t is None else t.detach().to(dtype).requires_grad_() for k, t in tensors.items()}


def with_gradients(function, tensors, weight):
    y = function(tensors)
    names = [k for k, t in tensors.items() if t is not None]
    found = torch.autograd.grad(y, [tensors[k] for k in names], weight.to(y.dtype))
    return {"y": y.detach(), **dict(zip(names, found, strict=True))}


def nudged(draw, tensors, dtype):
    """``tensors`` in fp64, every number off by about a unit of rounding of what is computed in."""
    unit = UNIT[dtype if dtype.itemsize > 2 else torch.float32]
    return {
        k: None if t is None else t.double() * (1 + unit * torch.from_numpy(draw.normal(*t.shape)))
        for k, t in tensors.items()
    }


def budget(got, truth, own, dtype, nearby):
    """Errors in units of what is allowed: twice those of the reference in its own precision, a few units of
    rounding, and a few times what rounding the input makes of the truth (``nearby``)."""
    worst = 0.0
    for name, want in truth.items():
        assert got[name].shape == want.shape, name
        assert bool(torch.isfinite(got[name]).all()), name
        error = (got[name].double() - want).norm().item()
        # The truth is no better than fp64 either.
        floor = 1e-13 * (1 + want.norm().item()) * max(want.numel(), 1) ** 0.5
        moved = (nearby[name] - want).norm().item()
        allowed = 2 * (own[name].double() - want).norm().item() + 4 * UNIT[dtype] * want.norm().item()
        allowed += 4 * moved + floor
        assert error <= allowed, (name, error, allowed)
        worst = max(worst, error / allowed)
    return worst


ORDER = ("x", "w1", "b1", "w2", "b2", "norm_weight", "norm_bias")


def residual_mlp(draw):
    dtype, norm = draw.dtype(), draw.choose(("layer", "rms", None))
    activation = draw.choose(("gelu", "gelu_tanh", "relu", "silu", "tanh"))
    scale, across = draw.choose((1.0, 0.5, -2.0)), draw.choose(("features", "features", "positions"))
    lead, n, d = draw.lead(), draw.choose((0, *COUNTS)), draw.count(97)
    across = "features" if n == 0 else across
    values, _ = draw.values(
        (*lead, n, d), dtype, draw.choose(("plain", "offset", "decaying")) if n else "plain"
    )
    values = values.clamp(-100, 100)
    size = d if across == "features" else n
    tensors = {"x": draw_tensor(draw, values), **block_of(draw, size, dtype, norm)}
    for name in ("norm_weight", "norm_bias"):
        if tensors[name] is not None and across == "positions":
            tensors[name] = torch.ones(d, dtype=dtype)
    impl = impl_of(draw)

    def public(t, i="auto"):
        return rgfast.residual_mlp(
            t["x"], t["w1"], t["b1"], t["w2"], t["b2"], norm=norm, norm_weight=t["norm_weight"],
            norm_bias=t["norm_bias"], activation=activation, residual_scale=scale, across=across, impl=i,
        )  # fmt: skip

    if draw.chance(0.03):
        wrong = {**tensors, "w2": torch.zeros(size + 1, 3, dtype=dtype)}
        return refused(lambda: public(wrong), ValueError, "w2")

    def reference(t):
        return residual_mlp_reference(*(t[k] for k in ORDER), norm, activation, scale, 1e-5, across)

    weight = torch.from_numpy(draw.normal(*values.shape)).to(dtype)
    truth = with_gradients(reference, in_dtype(tensors, torch.float64), weight.double())
    own = with_gradients(reference, in_dtype(tensors, dtype), weight)
    leaves = {k: None if t is None else t.detach().requires_grad_() for k, t in tensors.items()}
    near = nudged(draw, {**tensors, "weight": weight}, dtype)
    near_weight = near.pop("weight")
    nearby = with_gradients(reference, in_dtype(near, torch.float64), near_weight)
    got = tried(lambda i: with_gradients(lambda t: public(t, i), leaves, weight), impl)
    with torch.no_grad():
        plain = tried(lambda i: public(tensors, i), impl)
    worst = budget(got, truth, own, dtype, nearby)
    return "right", max(worst, budget({"y": plain}, {"y": truth["y"]}, {"y": own["y"]}, dtype, nearby))


def residual_stack(draw):
    dtype, norm = draw.choose((torch.float32, torch.float32, *UNIT)), draw.choose(("layer", "rms", None))
    d, depth, n = draw.count(97), draw.choose((1, 2, 4)), draw.choose((0, *COUNTS))
    shape = (n, *((draw.choose((1, 3)),) if draw.chance(0.4) else ()), d)
    values, _ = draw.values(shape, dtype, "plain" if n == 0 else draw.choose(("plain", "decaying")))
    x = draw_tensor(draw, values)
    blocks = [block_of(draw, d, dtype, norm) for _ in range(depth)]
    activation, scale = draw.choose(("gelu", "relu", "tanh")), draw.choose((1.0, 0.5))
    seen, impl = [], impl_of(draw)
    watch, tile = draw.chance(0.6), draw.choose((None, 1, 5, 40))

    def consumer(first, states):
        seen.append((first, states.clone()))

    def public(i):
        seen.clear()
        return rgfast.residual_stack(
            x, *([b[k] for b in blocks] for k in ORDER[1:5]), norm=norm,
            norm_weight=[b["norm_weight"] for b in blocks], norm_bias=[b["norm_bias"] for b in blocks],
            activation=activation, residual_scale=scale, consumer=consumer if watch else None, tile=tile,
            impl=i,
        )  # fmt: skip

    def streams(dtype, x, blocks):
        stream = [x.to(dtype)]
        for block in blocks:
            wide = {k: None if t is None else t.to(dtype) for k, t in block.items()}
            rest = [wide[k] for k in ORDER[1:]]
            stream.append(residual_mlp_reference(stream[-1], *rest, norm, activation, scale, 1e-5))
        return torch.stack(stream)

    with torch.no_grad():
        got = tried(public, impl)
        truth, own = streams(torch.float64, x, blocks), streams(dtype, x, blocks)
        near = nudged(draw, {"x": x}, dtype)["x"], [nudged(draw, block, dtype) for block in blocks]
        nearby = streams(torch.float64, *near)
    worst = budget({"y": got}, {"y": truth[-1]}, {"y": own[-1]}, dtype, {"y": nearby[-1]})
    if watch:
        assert sum(states.shape[1] for _, states in seen) == n
        assert [first for first, _ in seen] == list(np.cumsum([0, *(s.shape[1] for _, s in seen)][:-1]))
        if seen:
            whole = torch.cat([states for _, states in seen], 1)
            for layer in range(depth + 1):
                found = ({"y": v[layer]} for v in (whole, truth, own))
                worst = max(worst, budget(*found, dtype, {"y": nearby[layer]}))
    return "right", worst


def streamed(draw, make, layers, mask):
    """An accumulator, or the merger of two, that was given the layers in random batches."""
    streams = [make() for _ in range(draw.choose((1, 2)))]
    n = layers[0].shape[-2]
    cuts = sorted({0, n, *draw.rng.integers(0, n + 1, draw.choose((0, 1, 4))).tolist()})
    for k, (first, last) in enumerate(pairwise(cuts)):
        part = [x[..., first:last, :] for x in layers]
        streams[k * len(streams) // max(1, len(cuts) - 1)].update(
            part, None if mask is None else mask[..., first:last]
        )
    for other in streams[1:]:
        streams[0].merge(other)
    return streams[0]


def masked_layers(draw, most=3):
    """Layers as tensors, a mask or None, the rows that count of every layer at every position, and as above.

    What does not count is NaN.
    """
    layers, extreme = layers_of(draw, most)
    layers = [torch.as_tensor(x) for x in layers]
    mask = draw.mask(tuple(layers[0].shape[:-1])) if draw.chance(0.7) else None
    if mask is not None:
        layers = [x.masked_fill(~mask[..., None], torch.nan) for x in layers]
    keep = torch.ones(layers[0].shape[:-1], dtype=torch.bool) if mask is None else mask
    rows = [
        [m[k] for m, k in zip(truths.matrices(x), keep.reshape(-1, keep.shape[-1]).numpy(), strict=True)]
        for x in layers
    ]
    return layers, mask, rows, extreme


def moments(draw):
    layers, mask, rows, _ = masked_layers(draw)
    if draw.chance(0.05) and (mask is None or bool(mask.all())):
        bad = [*layers[:-1], poisoned(draw, layers[-1])]
        return refused(lambda: MomentAccumulator(pairs="all").update(bad, mask), ValueError, "finite")
    factors = tuple(range(len(layers))) if draw.chance(0.5) else ()
    budget = draw.choose((1, 256 << 20))
    stream = streamed(
        draw, lambda: MomentAccumulator(pairs="all", pending_bytes=budget, factors=factors), layers, mask
    )
    counts = [len(m) for m in rows[0]]
    assert stream.count.reshape(-1).tolist() == counts
    worst = 0.0
    last = len(layers) - 1
    for position, number in enumerate(counts):
        if not number:
            continue
        unit = [2.0 ** stream.exponent(k) for k in (0, last)]
        scaled = zip((0, last), unit, strict=True)
        x, y = (np.asarray(rows[k][position], dtype=np.longdouble) / u for k, u in scaled)
        centred = [v - v[:1] - (v - v[:1]).mean(0) for v in (x, y)]
        want = (centred[0].T @ centred[1]).astype(np.float64)
        pair = stream.pair(0, last)
        got = pair.cross.reshape(-1, *pair.cross.shape[-2:])[position].numpy()
        # Rounding goes with what was summed: the spread about the shift, a mean of earlier rows.
        spread = [float((v - v[:1]).astype(np.float64).__pow__(2).sum()) for v in (x, y)]
        size = [float((np.abs(v).max() * 2.0**-52) ** 2) * v.size for v in (x, y)]
        allowed = 1e-12 * np.sqrt((spread[0] + size[0]) * (spread[1] + size[1])) + 1e-300
        worst = max(worst, excess(got, want, allowed, "cross"))
        mean = stream.mean(0).reshape(len(counts), -1)[position].numpy()
        top = np.abs(rows[0][position]).max()
        exact = rows[0][position].astype(np.longdouble).mean(0).astype(np.float64)
        worst = max(worst, excess(mean, exact, 1e-13 * top + 1e-300, "mean"))
    return ("right" if any(counts) else "undefined"), worst


def second_moments(draw):
    layers, mask, rows, _ = masked_layers(draw)
    stream = streamed(draw, rgfast.SecondMoments, layers, mask)
    centering = draw.choose(CENTERING)
    found = stream.rank_measures(0, centering=centering)
    counts, worst = [len(m) for m in rows[0]], 0.0
    for position, number in enumerate(counts):
        got, bound = (float(v.reshape(-1)[position]) for v in (found.effective_rank, found.error_bound))
        if number == 0:
            assert np.isnan(got), got
            continue
        sigma = truths.sigma(rows[0][position], centering == "mean")
        want = truths.rank_of(sigma)
        worst = max(worst, excess(got, want, want * min(bound, 1e6) + 1e-10, "rank"))
        ratio = float(found.participation_ratio.reshape(-1)[position])
        if bound < 1e-2:
            worst = max(worst, excess(ratio, truths.energy_ratio(sigma), 1e-6 * (1 + ratio), "ratio"))
    return ("right" if any(counts) else "undefined"), worst


def cka_stream(draw):
    layers, mask, rows, _ = masked_layers(draw)
    debiased = draw.chance(0.5)
    options = {"pairs": "all", "route": draw.choose(("auto", "sample", "features"))}
    options["sample_limit"] = draw.choose((8, 4096))
    stream = streamed(draw, lambda: rgfast.CKAAccumulator(**options), layers, mask)
    counts = [len(m) for m in rows[0]]
    least = 4 if debiased else 1
    if max(counts, default=0) < least:
        return refused(lambda: stream.finalize(debiased=debiased), ValueError, "at least")
    matrix = stream.finalize(debiased=debiased).matrix
    last = len(layers) - 1
    got = matrix[..., 0, last].reshape(-1).numpy()
    want, magnified = np.full(len(counts), np.nan), np.full(len(counts), np.inf)
    for position, number in enumerate(counts):
        if number >= least:
            want[position], magnified[position] = truths.cka(
                rows[0][position], rows[last][position], debiased
            )
        else:
            assert np.isnan(got[position])
    # A feature-route sum is of moments about an earlier mean: translation costs digits there.
    return judged(got, want, magnified, 1e-6 * np.maximum(magnified, 1), "stream")


def minibatch_stream(draw):
    layers, mask, rows, extreme = masked_layers(draw)
    size = draw.choose((4, 16, 64))
    n = layers[0].shape[-2]
    stream = rgfast.MinibatchCKAAccumulator(batch_size=size)
    for first in range(0, n, 11):
        part = [x[..., first : first + 11, :] for x in layers]
        stream.update(part, None if mask is None else mask[..., first : first + 11])
    counts = [len(m) for m in rows[0]]
    if max(counts, default=0) < 4:
        return refused(stream.finalize, ValueError, "at least 4")
    found = stream.finalize()
    if extreme:
        return "undefined", 0.0
    last = len(layers) - 1
    got = found[..., 0, last].reshape(-1).numpy()
    want, magnified = np.full(len(counts), np.nan), np.full(len(counts), np.inf)
    for position, number in enumerate(counts):
        a, b = rows[0][position], rows[last][position]
        cut = [slice(k, k + size) for k in range(0, number, size) if min(number, k + size) - k >= 4]
        sums = {
            name: [truths.hsic(u[rows], v[rows], True) for rows in cut]
            for name, u, v in (("xy", a, b), ("xx", a, a), ("yy", b, b))
        }
        value = {name: sum(v for v, _ in part) for name, part in sums.items()}
        terms = {name: sum(t for _, t in part) for name, part in sums.items()}
        if cut and value["xx"] > 0 and value["yy"] > 0:
            want[position] = value["xy"] / np.sqrt(value["xx"] * value["yy"])
            magnified[position] = terms["xx"] / value["xx"] * terms["yy"] / value["yy"]
    return judged(got, want, magnified, 1e-6 * np.maximum(magnified, 1), "minibatch stream")


CHECKS = [
    (function.__name__, function)
    for function in (
        spectrum, spectrum, spectrum, eigvalsh, cka, hsic, cka_matrix, cka_matrix, kernel_drift,
        minibatch_cka, residual_mlp, residual_mlp, residual_stack, moments, second_moments, cka_stream,
        minibatch_stream,
    )
]  # fmt: skip
