"""Checks of the residual block and of a stack of them, in the manner of :mod:`ops`."""

import numpy as np
import torch
from draws import COUNTS
from judging import UNIT, impl_of, refused, tried

import rgfast
from rgfast.ops.residual_mlp.reference import residual_mlp_reference
from rgfast.validation import as_tensor

ORDER = ("x", "w1", "b1", "w2", "b2", "norm_weight", "norm_bias")


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
    return as_tensor(draw.laid_out(x), "x")


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
            tensors[name] = torch.ones(d, dtype=dtype, device="cpu")
    impl = impl_of(draw)

    def public(t, i="auto"):
        return rgfast.residual_mlp(
            t["x"], t["w1"], t["b1"], t["w2"], t["b2"], norm=norm, norm_weight=t["norm_weight"],
            norm_bias=t["norm_bias"], activation=activation, residual_scale=scale, across=across, impl=i,
        )  # fmt: skip

    if draw.chance(0.03):
        wrong = {**tensors, "w2": torch.zeros(size + 1, 3, dtype=dtype, device="cpu")}
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
