"""The reference against the formula written out a second time, in numpy and fp64."""

import numpy as np
import pytest
import torch
from scipy.special import erf

import rgfast

NORMS = ["layer", "rms", None]
ACTIVATIONS = ["gelu", "gelu_tanh", "relu", "silu", "tanh"]


def written_out(x, w1, b1, w2, b2, norm_weight, norm_bias, norm, activation, scale, eps):
    if norm == "layer":
        n = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps)
    elif norm == "rms":
        n = x / np.sqrt((x * x).mean(-1, keepdims=True) + eps)
    else:
        n = x
    n = n * (1 if norm_weight is None else norm_weight) + (0 if norm_bias is None else norm_bias)
    u = n @ w1.T + (0 if b1 is None else b1)
    h = {
        "gelu": lambda: u * 0.5 * (1 + erf(u / np.sqrt(2))),
        "gelu_tanh": lambda: 0.5 * u * (1 + np.tanh(np.sqrt(2 / np.pi) * (u + 0.044715 * u**3))),
        "relu": lambda: np.maximum(u, 0),
        "silu": lambda: u / (1 + np.exp(-u)),
        "tanh": lambda: np.tanh(u),
    }[activation]()
    return x + scale * (h @ w2.T + (0 if b2 is None else b2))


def arguments(rng, lead, d, h, *, norm="layer", biases=True):
    draw = rng.standard_normal
    return {
        "x": draw((*lead, d)) + 0.5,
        "w1": draw((h, d)) / np.sqrt(d),
        "b1": draw(h) if biases else None,
        "w2": draw((d, h)) / np.sqrt(h),
        "b2": draw(d) if biases else None,
        "norm_weight": draw(d) if biases and norm else None,
        "norm_bias": draw(d) if biases and norm else None,
    }


def call(args, **options):
    positional = [args[name] for name in ("x", "w1", "b1", "w2", "b2")]
    extra = {name: args[name] for name in ("norm_weight", "norm_bias")}
    return rgfast.residual_mlp(*positional, **extra, **options)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("biases", [True, False])
def test_formula(norm, activation, biases):
    args = arguments(np.random.default_rng(3), (4, 5), 7, 11, norm=norm, biases=biases)
    got = call(args, norm=norm, activation=activation, residual_scale=-0.7, eps=1e-3, impl="reference")
    want = written_out(**args, norm=norm, activation=activation, scale=-0.7, eps=1e-3)
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("lead", [(), (0,), (1,), (3, 0, 2), (2, 3, 4)])
@pytest.mark.parametrize(("d", "h"), [(1, 1), (1, 4), (3, 1), (17, 5)])
def test_any_leading_dimensions(lead, d, h):
    args = arguments(np.random.default_rng(5), lead, d, h)
    got = call(args, impl="reference")
    assert got.shape == (*lead, d)
    want = written_out(**args, norm="layer", activation="gelu", scale=1.0, eps=1e-5)
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_are_storage_only(dtype):
    args = arguments(np.random.default_rng(7), (9,), 33, 65)
    halves = {k: torch.from_numpy(v).to(dtype) for k, v in args.items()}
    got = call(halves, impl="reference")
    want = call({k: v.float() for k, v in halves.items()}, impl="reference").to(dtype)
    assert got.dtype == dtype
    assert torch.equal(got, want)


def test_half_stream_with_fp32_parameters():
    args = {
        k: torch.from_numpy(v).float() for k, v in arguments(np.random.default_rng(8), (9,), 5, 6).items()
    }
    half = args | {"x": args["x"].bfloat16()}
    want = call(args | {"x": half["x"].float()}, impl="reference").bfloat16()
    assert torch.equal(call(half, impl="reference"), want)


def test_every_gradient_of_the_reference():
    args = {
        k: torch.from_numpy(v).requires_grad_()
        for k, v in arguments(np.random.default_rng(9), (3,), 4, 5).items()
    }

    def run(*values):
        return call(dict(zip(args, values, strict=True)), residual_scale=0.5, impl="reference")

    assert torch.autograd.gradcheck(run, tuple(args.values()))


def test_autocast_does_not_reach_inside():
    args = {
        k: torch.from_numpy(v).float() for k, v in arguments(np.random.default_rng(4), (6,), 8, 9).items()
    }
    want = call(args, impl="reference")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(call(args, impl="reference"), want)


def test_non_contiguous_and_expanded_inputs():
    args = {k: torch.from_numpy(v) for k, v in arguments(np.random.default_rng(6), (6,), 8, 9).items()}
    odd = {k: torch.stack([v, v], -1)[..., 0] for k, v in args.items()}
    assert not odd["w1"].is_contiguous()
    assert torch.equal(call(odd, impl="reference"), call(args, impl="reference"))
    expanded = args | {"x": args["x"][:1].expand(5, -1), "b1": torch.ones(1, dtype=torch.float64).expand(9)}
    got = call(expanded, impl="reference")
    assert torch.equal(got, call({k: v.contiguous() for k, v in expanded.items()}, impl="reference"))
    # a product may sum its last rows in another order than its first
    torch.testing.assert_close(got, got[:1].expand(5, -1), rtol=1e-13, atol=1e-14)
