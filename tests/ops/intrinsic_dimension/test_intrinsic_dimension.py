"""TwoNN against brute force, scikit-dimension and data of a known dimension."""

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist

import rgfast
from rgfast.ops.similarity import neighbors

F64 = torch.float64
IMPLS = ["library", "reference"]


def truth(x):
    x = np.unique(x, axis=0)
    distances = np.sort(cdist(x, x), axis=1)
    return (len(x) - 1) / np.log(distances[:, 2] / distances[:, 1]).sum()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", [(3, 1), (4, 2), (15, 40), (65, 1), (97, 63), (160, 17)], ids=str)
def test_values_are_those_of_brute_force(shape, impl):
    x = np.random.default_rng(0).standard_normal(shape)
    found = rgfast.intrinsic_dimension(x, impl=impl)
    assert found.dtype == F64
    assert float(found) == pytest.approx(truth(x), rel=1e-10)


def test_values_are_those_of_scikit_dimension():
    """Of scikit-dimension 0.5.0: ``skdim.id.TwoNN(method="mle", discard_fraction=0.0).fit(x).dimension_``."""
    rng = np.random.default_rng(0)
    gaussian = rng.standard_normal((800, 5)) @ rng.standard_normal((5, 12))
    cube = rng.random((500, 10))
    t = 1.5 * np.pi * (1 + 2 * rng.random(1000))
    roll = np.stack([t * np.cos(t), 21 * rng.random(1000), t * np.sin(t)], 1)
    recorded = {4.746248078219904: gaussian, 8.951388227368225: cube, 1.8936786217648856: roll}
    for wanted, x in recorded.items():
        assert float(rgfast.intrinsic_dimension(x)) == pytest.approx(wanted, rel=1e-11)


@pytest.mark.parametrize("dimension", [1, 2, 5])
def test_data_of_a_known_dimension(dimension):
    rng = np.random.default_rng(dimension)
    flat = rng.random((3000, dimension)) @ rng.standard_normal((dimension, 30))
    found = float(rgfast.intrinsic_dimension(flat))
    assert found == pytest.approx(dimension, rel=0.1)
    bent = np.c_[np.cos(flat), np.sin(flat)]
    assert float(rgfast.intrinsic_dimension(bent)) == pytest.approx(dimension, rel=0.1)


@pytest.mark.parametrize("impl", IMPLS)
def test_copies_are_dropped_and_counted(impl):
    rng = np.random.default_rng(1)
    x = rng.standard_normal((50, 4))
    again = np.concatenate([x[:7], x, x[:3], -0.0 * x[:1], 0.0 * x[:2]])
    found, info = rgfast.intrinsic_dimension(again, return_info=True, impl=impl)
    assert (int(info.samples), int(info.duplicates)) == (51, 12)
    assert float(found) == pytest.approx(truth(again), rel=1e-10)
    half = torch.from_numpy(x).to(torch.bfloat16)
    assert rgfast.intrinsic_dimension(half, impl=impl) == rgfast.intrinsic_dimension(half.double(), impl=impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_what_is_undefined(impl):
    x = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    found, info = rgfast.intrinsic_dimension(x, return_info=True, impl=impl)
    assert found.isnan()
    assert (int(info.samples), int(info.duplicates)) == (2, 2)
    assert rgfast.intrinsic_dimension(torch.ones(9, 3), impl=impl).isnan()
    assert rgfast.intrinsic_dimension(torch.eye(5), impl=impl) == torch.inf


@pytest.mark.parametrize("impl", IMPLS)
def test_scales_offsets_and_close_pairs(impl):
    rng = np.random.default_rng(2)
    x = rng.standard_normal((60, 6))
    wanted = pytest.approx(truth(x), rel=1e-9)
    for scale in (1e-150, 1e-18, 1e18, 1e150):
        assert float(rgfast.intrinsic_dimension(x * scale, impl=impl)) == wanted
    close = np.repeat(x[:6], 10, 0) + 1e-9 * x
    assert float(rgfast.intrinsic_dimension(close, impl=impl)) == pytest.approx(truth(close), rel=1e-6)
    close[0] = 1e5
    assert float(rgfast.intrinsic_dimension(close, impl=impl)) == pytest.approx(truth(close), rel=1e-6)


def test_blocks_give_the_same(monkeypatch):
    x = np.random.default_rng(3).standard_normal((67, 5))
    wanted = float(rgfast.intrinsic_dimension(x))
    monkeypatch.setattr(neighbors, "_DISTANCE_BYTES", 8 * 67 * 4)
    assert float(rgfast.intrinsic_dimension(x)) == pytest.approx(wanted, rel=1e-13)


@pytest.mark.parametrize("impl", IMPLS)
def test_batches_and_strides(impl):
    x = torch.randn(2, 3, 20, 5, generator=torch.Generator().manual_seed(0))
    x[1, 2, 4] = x[1, 2, 5]
    found, info = rgfast.intrinsic_dimension(x.mT.contiguous().mT, return_info=True, impl=impl)
    assert found.shape == (2, 3)
    assert info.duplicates.tolist() == [[0, 0, 0], [0, 0, 1]]
    for at in np.ndindex(2, 3):
        assert torch.equal(found[at], rgfast.intrinsic_dimension(x[at], impl=impl))
    assert rgfast.intrinsic_dimension(x[:0], impl=impl).shape == (0, 3)
    assert not rgfast.intrinsic_dimension(x.requires_grad_(), impl=impl).requires_grad


def test_errors():
    x = torch.ones(5, 2)
    with pytest.raises(TypeError, match="x must be one of float64"):
        rgfast.intrinsic_dimension(x.long())
    for bad in (x[:2], x[:, :0]):
        with pytest.raises(ValueError, match="x must have at least 3 samples and one feature, got shape"):
            rgfast.intrinsic_dimension(bad)
    with pytest.raises(ValueError, match="x must have at least 2 dimensions"):
        rgfast.intrinsic_dimension(x[0])
    with pytest.raises(ValueError, match="method must be one of 'twonn', got 'mle'"):
        rgfast.intrinsic_dimension(x, method="mle")
    x[3, 1] = torch.nan
    with pytest.raises(ValueError, match=r"x must be finite, got 1 NaN or Inf values$"):
        rgfast.intrinsic_dimension(x)


def test_which_implementation_runs():
    x = torch.randn(9, 2, generator=torch.Generator().manual_seed(0))
    with rgfast.record() as log:
        rgfast.intrinsic_dimension(x)
        rgfast.intrinsic_dimension(x, impl="reference")
    assert [(entry.op, entry.impl) for entry in log] == [
        ("intrinsic_dimension", "library"), ("intrinsic_dimension", "reference"),
    ]  # fmt: skip
    assert rgfast.explain("intrinsic_dimension", x).chosen == "library"
