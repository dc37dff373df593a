"""What the public function refuses, in which words, and what it routes where."""

import numpy as np
import pytest
import torch

import rgfast

X, W1, B1, W2, B2 = (torch.zeros(s) for s in [(5, 4), (6, 4), (6,), (4, 6), (4,)])


def test_defaults_are_layer_norm_and_exact_gelu():
    generator = torch.Generator().manual_seed(0)
    args = [torch.randn(t.shape, generator=generator) for t in (X, W1, B1, W2, B2)]
    explicit = rgfast.residual_mlp(*args, norm="layer", activation="gelu", residual_scale=1.0, eps=1e-5)
    assert torch.equal(rgfast.residual_mlp(*args), explicit)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"x": [1.0]}, TypeError, "x must be a torch.Tensor or numpy array, got list"),
        ({"x": torch.zeros(5, 4, dtype=torch.int64)}, TypeError, "x must be one of .*, got int64"),
        ({"x": torch.tensor(1.0)}, ValueError, r"x must have at least 1 dimensions, got shape \(\)"),
        ({"x": torch.zeros(5, 0)}, ValueError, r"x must have at least one feature .*, got shape \(5, 0\)"),
        ({"w1": torch.zeros(6, 5)}, ValueError, r"w1 must have shape \[H, 4\] .*, got \(6, 5\)"),
        ({"w1": torch.zeros(0, 4)}, ValueError, r"w1 must have shape \[H, 4\] with H >= 1, got \(0, 4\)"),
        ({"w1": torch.zeros(24)}, ValueError, r"w1 must have shape \[H, 4\] .*, got \(24,\)"),
        ({"w1": None}, TypeError, "w1 must be a torch.Tensor or numpy array, got NoneType"),
        ({"w2": torch.zeros(6, 4)}, ValueError, r"w2 must have shape \[4, 6\], got \(6, 4\)"),
        ({"b1": torch.zeros(4)}, ValueError, r"b1 must have shape \[6\] or be None, got \(4,\)"),
        ({"b1": torch.zeros(6, 1)}, ValueError, r"b1 must have shape \[6\] or be None, got \(6, 1\)"),
        ({"b2": torch.zeros(6)}, ValueError, r"b2 must have shape \[4\] or be None, got \(6,\)"),
        ({"b2": 0.0}, TypeError, "b2 must be a torch.Tensor or numpy array, got float"),
        ({"norm": "batch"}, ValueError, "norm must be one of 'layer', 'rms', None, got 'batch'"),
        ({"norm_weight": torch.zeros(6)}, ValueError, r"norm_weight must have shape \[4\] or be None"),
        ({"norm_bias": torch.zeros(6)}, ValueError, r"norm_bias must have shape \[4\] or be None"),
        (
            {"norm": None, "norm_weight": B2},
            ValueError,
            r"norm_weight must be None where norm=None, got .*\(4,\)",
        ),
        ({"norm": None, "norm_bias": B2}, ValueError, "norm_bias must be None where norm=None"),
        ({"activation": "swish"}, ValueError, "activation must be one of 'gelu', .*, got 'swish'"),
        ({"activation": ["gelu"]}, ValueError, "activation must be one of 'gelu', .*"),
        ({"residual_scale": float("nan")}, ValueError, "residual_scale must be finite, got nan"),
        ({"residual_scale": True}, TypeError, "residual_scale must be a number, got bool"),
        ({"residual_scale": torch.tensor(1.0)}, TypeError, "residual_scale must be a number, got Tensor"),
        ({"eps": -1e-5}, ValueError, "eps must not be negative, got -1e-05"),
        ({"eps": float("inf")}, ValueError, "eps must be finite, got inf"),
        (
            {"w1": torch.zeros(6, 4, dtype=torch.float64)},
            TypeError,
            "w1 must be float32 like x .* got float64",
        ),
        (
            {"x": torch.zeros(5, 4, dtype=torch.float64)},
            TypeError,
            "w1 must be float64 like x .* got float32",
        ),
        ({"w2": torch.zeros(4, 6, device="meta")}, ValueError, "w2 must be on cpu like x, got meta"),
        ({"w1": torch.zeros(6, 4).to_sparse()}, TypeError, "w1 must be a dense .* tensor, got layout"),
        ({"impl": "fastest"}, ValueError, "impl must be one of .*, got 'fastest'"),
        ({"impl": "cuda"}, rgfast.ImplUnavailable, "residual_mlp: .*cuda"),
    ],
)
def test_refusals(change, error, words):
    args = {"x": X, "w1": W1, "b1": B1, "w2": W2, "b2": B2} | change
    positional = [args.pop(name) for name in ("x", "w1", "b1", "w2", "b2")]
    with pytest.raises(error, match=words) as caught:
        rgfast.residual_mlp(*positional, **args)
    assert "\n" not in str(caught.value)


def test_numpy_arrays_and_number_types():
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal(s) for s in [(5, 4), (6, 4), (6,), (4, 6), (4,)]]
    got = rgfast.residual_mlp(*arrays, residual_scale=np.float32(0.5), eps=0)
    want = rgfast.residual_mlp(*map(torch.from_numpy, arrays), residual_scale=0.5, eps=0.0)
    assert got.dtype == torch.float64
    assert torch.equal(got, want)


def test_record_and_explain():
    with rgfast.record() as log:
        rgfast.residual_mlp(X, W1, B1, W2, B2, impl="reference")
    assert [(r.op, r.impl) for r in log] == [("residual_mlp", "reference")]
    told = rgfast.explain("residual_mlp", X, W1, None, W2, None, norm=None)
    assert told.candidates[-1][0] == "reference"
    with pytest.raises(ValueError, match="w2 must have shape"):
        rgfast.explain("residual_mlp", X, W1, None, W1, None)
