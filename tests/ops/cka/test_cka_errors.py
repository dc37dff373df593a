import numpy as np
import pytest
import torch

import rgfast


@pytest.fixture
def x():
    return torch.randn(6, 3, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_not_finite_names_layer_position_and_count(x, value):
    layers = x.expand(4, 2, 5, 6, 3).clone()
    layers[2, 1, 3, 0, :2] = value
    message = r"layers must be finite, got 2 NaN or Inf values in layer 2 at position \(1, 3\)$"
    for function in (rgfast.cka_matrix, rgfast.kernel_drift, rgfast.kernel_change, rgfast.minibatch_cka):
        with pytest.raises(ValueError, match=message):
            function(layers)
    layers[2, 1, 4, 5, 1] = value
    with pytest.raises(ValueError, match=r"3 NaN or Inf values in layer 2 at position \(1, 3\) and 1 more"):
        rgfast.cka_matrix(layers)
    with pytest.raises(ValueError, match="other must be finite, got 3"):
        rgfast.cka_matrix(layers[:1], layers)
    bad = x.clone()
    bad[1, 1] = value
    for function in (rgfast.cka, rgfast.hsic):
        for options in ({}, {"kernel": "rbf"}, {"debiased": False}):
            with pytest.raises(ValueError, match=r"y must be finite, got 1 NaN or Inf values$"):
                function(x, bad, **options)


def test_large_finite_values_are_finite(x):
    assert rgfast.cka(x / x.abs().max() * 3.4e38, x).isfinite()


def test_shapes_and_types(x):
    with pytest.raises(TypeError, match=r"x must be a torch.Tensor or numpy array, got list"):
        rgfast.cka([[1.0]], x)
    with pytest.raises(TypeError, match="y must be one of float64"):
        rgfast.cka(x, x.long())
    with pytest.raises(ValueError, match="x must have at least 2 dimensions"):
        rgfast.cka(x[0], x)
    with pytest.raises(
        ValueError, match=r"y must have the leading dimensions and samples of x, \(6,\), got \(5,\)"
    ):
        rgfast.cka(x, x[:5])
    with pytest.raises(ValueError, match="layers must have at least 3 dimensions"):
        rgfast.cka_matrix(x)
    with pytest.raises(ValueError, match="layers must hold at least one layer"):
        rgfast.cka_matrix([])
    with pytest.raises(ValueError, match=r"got \(6, 3\) in layer 0 and \(5, 3\) in layer 1"):
        rgfast.cka_matrix([x, x[:5]])
    with pytest.raises(ValueError, match="other must have the leading dimensions and samples of layers"):
        rgfast.cka_matrix([x], [x[:5]])
    with pytest.raises(ValueError, match="layers must have at least one sample and one feature"):
        rgfast.kernel_drift([x, x[:, :0]])


def test_options(x):
    with pytest.raises(ValueError, match="kernel must be one of 'linear', 'rbf', got 'poly'"):
        rgfast.cka(x, x, kernel="poly")
    with pytest.raises(ValueError, match="threshold must be a positive number, got 0"):
        rgfast.cka(x, x, kernel="rbf", threshold=0.0)
    for given in ({"bandwidth": 2.0}, {"threshold": 0.5}):
        sentence = f"{next(iter(given))} is an option of kernel='rbf', and kernel is 'linear'"
        for function in (rgfast.cka, rgfast.hsic):
            with pytest.raises(ValueError, match=sentence):
                function(x, x, **given)
    for wrong in (
        lambda: rgfast.cka(x, x, debiased="no"),
        lambda: rgfast.cka_matrix([x, x], debiased="no"),
        lambda: rgfast.kernel_drift([x, x], debiased="no"),
    ):
        with pytest.raises(ValueError, match="debiased must be one of True, False, got 'no'"):
            wrong()
    with pytest.raises(ValueError, match="bandwidth must be a positive number, got nan"):
        rgfast.cka(x, x, kernel="rbf", bandwidth=float("nan"))
    with pytest.raises(ValueError, match="impl must be one of"):
        rgfast.cka(x, x, impl="fast")
    with pytest.raises(rgfast.ImplUnavailable, match="cuda"):
        rgfast.cka(x, x, impl="cuda")
    with pytest.raises(ValueError, match="sample_limit must be at least 1, got 0"):
        rgfast.cka_matrix([x], sample_limit=0)
    with pytest.raises(TypeError, match="batch_size must be a whole number"):
        rgfast.minibatch_cka([x], batch_size=4.5)


def test_which_implementation_runs_is_told(x):
    with rgfast.record() as log:
        rgfast.cka_matrix([x, x], impl="reference")
    assert [(entry.op, entry.impl) for entry in log] == [("cka", "reference")]
    assert rgfast.explain("cka", x, x).candidates[-1] == ("reference", None)
    assert rgfast.explain("cka", [x, x]).candidates[-1] == ("reference", None)


def test_numpy_arrays_are_taken(x):
    array = x.numpy()
    assert torch.equal(rgfast.cka(array, array), rgfast.cka(x, x))
    assert torch.equal(rgfast.kernel_drift(np.stack([array, array])), rgfast.kernel_drift([x, x]))
