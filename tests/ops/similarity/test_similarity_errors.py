import numpy as np
import pytest
import torch

import rgfast
from rgfast.ops.similarity import similarity_matrix


@pytest.fixture
def x():
    return torch.randn(12, 3, generator=torch.Generator().manual_seed(0))


MEASURES = [rgfast.mutual_knn, rgfast.procrustes, rgfast.rsa]
NAMES = ["cka", "mutual_knn", "procrustes", "rsa"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_not_finite_is_named(x, value):
    bad = x.repeat(2, 2, 1, 1)
    bad[1, 0, 3, :2] = value
    for measure in MEASURES:
        with pytest.raises(
            ValueError, match=r"y must be finite, got 2 NaN or Inf values at position \(1, 0\)$"
        ):
            measure(x.repeat(2, 2, 1, 1), bad)
    good = torch.zeros_like(bad)
    for name in NAMES:
        with pytest.raises(ValueError, match=r"x must be finite, got 2 NaN or Inf values in layer 1 at "):
            rgfast.calibrate(name, [good, bad], [good])


@pytest.mark.parametrize("measure", MEASURES, ids=lambda f: f.__name__)
def test_shapes_and_types(measure, x):
    with pytest.raises(TypeError, match=r"x must be a torch.Tensor or numpy array, got list"):
        measure([[1.0]], x)
    with pytest.raises(TypeError, match="y must be one of float64"):
        measure(x, x.long())
    with pytest.raises(ValueError, match="x must have at least 2 dimensions"):
        measure(x[0], x)
    with pytest.raises(ValueError, match=r"samples of x, \(12,\), got \(5,\)"):
        measure(x, x[:5])
    with pytest.raises(ValueError, match=r"samples of x, \(1, 12\), got \(2, 12\)"):
        measure(x[None], x.repeat(2, 1, 1))
    with pytest.raises(ValueError, match="y must have at least one sample and one feature"):
        measure(x, x[:, :0])
    with pytest.raises(ValueError, match="impl must be one of"):
        measure(x, x, impl="fast")


def test_few_samples(x):
    for k, n in ((12, 12), (13, 12), (1, 1)):
        with pytest.raises(ValueError, match=f"k must be less than the {n} samples, got {k}$"):
            rgfast.mutual_knn(x[:n], x[:n], k=k)
    with pytest.raises(ValueError, match="x must have at least 2 samples, got 1"):
        rgfast.procrustes(x[:1], x[:1])
    with pytest.raises(ValueError, match="x must have at least 3 samples, got 2"):
        rgfast.rsa(x[:2], x[:2])
    with pytest.raises(ValueError, match="layers must have at least 3 samples, got 2"):
        similarity_matrix("rsa", [x[:2]], [x[:2]])
    with pytest.raises(ValueError, match="x must have at least 4 samples for a debiased estimate, got 3"):
        rgfast.calibrate("cka", x[:3], x[:3])
    many = torch.zeros(70_000, 1)
    with pytest.raises(ValueError, match="x must have at most 65536 samples for RSA, got 70000"):
        rgfast.rsa(many, many)
    assert float(rgfast.mutual_knn(x[:2], x[:2], k=1)) == 1.0
    assert float(rgfast.procrustes(x[:2], x[2:4])) == pytest.approx(1.0)


def test_options(x):
    for k in (0, -1):
        with pytest.raises(ValueError, match=f"k must be at least 1, got {k}"):
            rgfast.mutual_knn(x, x, k=k)
    for k in (2.0, True, "3"):
        with pytest.raises(TypeError, match="k must be a whole number"):
            rgfast.mutual_knn(x, x, k=k)
    with pytest.raises(ValueError, match="metric must be one of 'cosine', 'euclidean', got 'l1'"):
        rgfast.mutual_knn(x, x, k=2, metric="l1")
    with pytest.raises(ValueError, match=r"measure must be one of 'cka', .*, got 'ckb'"):
        similarity_matrix("ckb", [x], [x])
    with pytest.raises(TypeError, match="options of rsa are none, got 'k'"):
        similarity_matrix("rsa", [x], [x], k=3)
    with pytest.raises(ValueError, match="other must have the leading dimensions and samples of layers"):
        similarity_matrix("rsa", [x], [x[1:]])


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"measure": "ckb"}, ValueError, "measure must be one of 'cka', .* or a function, got 'ckb'"),
        ({"measure": 3}, TypeError, "measure must be a name or a function, got int"),
        ({"null": 0}, ValueError, "null must be at least 1, got 0"),
        ({"null": 2.5}, TypeError, "null must be a whole number"),
        ({"seed": -1}, ValueError, "seed must be at least 0, got -1"),
        ({"seed": None}, TypeError, "seed must be a whole number"),
        ({"alpha": 1.0}, ValueError, "alpha must lie between 0 and 1, got 1.0"),
        ({"alpha": float("nan")}, ValueError, "alpha must lie between 0 and 1, got nan"),
        ({"alpha": "5%"}, TypeError, "alpha must be a number"),
        ({"maximum": 0}, ValueError, "maximum must be a positive number, got 0"),
        ({"k": 3}, TypeError, "options of cka are debiased, got 'k'"),
        ({"debiased": "no"}, ValueError, "debiased must be one of True, False, got 'no'"),
        (
            {"sequences": [0, 1]},
            ValueError,
            r"sequences must be one id per sample, shape \(12,\), got \(2,\)",
        ),
        ({"sequences": np.zeros(12)}, TypeError, "sequences must be whole numbers, got torch.float64"),
        ({"sequences": ["a"] * 12}, TypeError, "sequences must hold numbers"),
        ({"sequences": [0] * 12}, ValueError, "which can change places, got 1 sequences of 1 lengths"),
        ({"sequences": [0] * 5 + [1] * 7}, ValueError, "got 2 sequences of 2 lengths"),
    ],
    ids=str,
)
def test_calibration(x, options, kind, message):
    with pytest.raises(kind, match=message):
        rgfast.calibrate(**{"measure": "cka", "x": x, "y": x, **options})


def test_lists_of_layers(x):
    with pytest.raises(
        TypeError, match="y must be of the kind of x, a list of layers, got one representation"
    ):
        rgfast.calibrate("cka", [x], x)
    with pytest.raises(
        TypeError, match="y must be of the kind of x, one representation, got a list of layers"
    ):
        rgfast.calibrate("cka", x, (x,))
    with pytest.raises(ValueError, match="y must hold at least one layer, got none"):
        rgfast.calibrate("cka", [x], [])
    with pytest.raises(ValueError, match=r"got \(12, 3\) in layer 0 and \(5, 3\) in layer 1"):
        rgfast.calibrate("cka", [x, x[:5]], [x])
    with pytest.raises(ValueError, match=r"samples of x, \(12,\), got \(11,\)"):
        rgfast.calibrate("cka", [x], [x[1:]])
