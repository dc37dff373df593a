"""Every measure against brute force, SciPy, and values of other packages."""

import math

import numpy as np
import pytest
import torch

import rgfast
from rgfast.ops.similarity import similarity_matrix

F64 = torch.float64
IMPLS = ["library", "reference"]
OPTIONS = [
    ("mutual_knn", {"k": 1}),
    ("mutual_knn", {"k": 2, "metric": "euclidean"}),
    ("procrustes", {}),
    ("rsa", {}),
]
SHAPES = [(3, 1, 1), (4, 3, 2), (15, 2, 40), (17, 65, 1), (63, 16, 17), (65, 97, 63)]


def same(found, wanted, tol=1e-11):
    assert found.dtype == F64
    if math.isnan(wanted):
        assert found.isnan().all()
    else:
        assert float(found) == pytest.approx(wanted, abs=tol)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("name", "options"), OPTIONS)
def test_values_are_those_of_brute_force(name, options, shape, impl, truth, draw):
    x, y = draw.related(0, *shape)
    same(getattr(rgfast, name)(x, y, impl=impl, **options), truth[name](x, y, **options))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    "kind", ["whole numbers", "copies and zeros", "copies on both sides", "equidistant", "all alike"]
)
@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_ties_go_to_the_lower_index(metric, kind, impl, truth, draw):
    x, y = draw.awkward(1, 31, 5, 3)[kind]
    for k in (1, 4, 11, 30):
        wanted = truth["mutual_knn"](x, y, k, metric)
        assert float(rgfast.mutual_knn(x, y, k=k, metric=metric, impl=impl)) == wanted


@pytest.mark.parametrize("impl", IMPLS)
def test_distances_that_are_whole_numbers_are_tied_exactly(impl, truth, draw):
    x, y = draw.awkward(2, 40, 3, 2)["whole numbers"]
    x, y = x + 1000, y - 77
    for k in (1, 5, 20):
        wanted = truth["mutual_knn"](x, y, k, "euclidean")
        assert float(rgfast.mutual_knn(x, y, k=k, metric="euclidean", impl=impl)) == wanted
    same(rgfast.rsa(x, y, impl=impl), truth["rsa"](x, y))


def test_mutual_knn_is_that_of_scikit_learn():
    """Of scikit-learn 1.9.1:

    near = lambda x: NearestNeighbors(n_neighbors=k, metric=metric, algorithm="brute").fit(x).kneighbors(
        return_distance=False)
    np.mean([len(set(p) & set(q)) / k for p, q in zip(near(x), near(y))])
    """
    rng = np.random.default_rng(1)
    x = rng.standard_normal((120, 9))
    y = x[:, :6] + rng.standard_normal((120, 6))
    recorded = {
        (10, "cosine"): 0.21083333333333334,
        (10, "euclidean"): 0.19333333333333336,
        (3, "cosine"): 0.08055555555555555,
        (119, "cosine"): 1.0,
    }
    for (k, metric), wanted in recorded.items():
        assert float(rgfast.mutual_knn(x, y, k=k, metric=metric)) == pytest.approx(wanted, abs=1e-15)


def test_neighbors_of_close_clusters_far_away_keep_their_order(truth):
    rng = np.random.default_rng(3)
    x = np.repeat(rng.standard_normal((4, 6)), 12, 0) + 1e-9 * rng.standard_normal((48, 6))
    y = x + 1e-10 * rng.standard_normal((48, 6))
    x[0] = 1e4
    wanted = truth["mutual_knn"](x, y, 5, "euclidean")
    assert 0.3 < wanted < 1.0
    assert float(rgfast.mutual_knn(x, y, k=5, metric="euclidean")) == wanted


def test_procrustes_knows_rotations_offsets_and_scales(draw):
    x, _ = draw.related(4, 50, 7, 1)
    q, _ = np.linalg.qr(np.random.default_rng(5).standard_normal((7, 7)))
    same(rgfast.procrustes(x, 3 * x @ q + 1e3), 1.0)
    same(rgfast.procrustes(x * q[0], x), float(rgfast.procrustes(x, x * q[0])))
    assert float(rgfast.procrustes(x, x)) <= 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_half_numbers_are_widened_first(dtype, impl, draw, tensor):
    x, y = draw.related(6, 33, 6, 4)
    x, y = tensor(x, dtype), tensor(y, dtype)
    for name, options in OPTIONS:
        measure = getattr(rgfast, name)
        wide = measure(x.double(), y.double(), impl=impl, **options)
        assert torch.equal(measure(x, y, impl=impl, **options), wide)


@pytest.mark.parametrize("scale", [1e-18, 1e18, 1e-150, 1e150])
def test_scale_and_offset(scale, draw, truth):
    x, y = draw.related(7, 30, 5, 4)
    for name, options in OPTIONS:
        measure = getattr(rgfast, name)
        same(measure(x * scale, y / scale, **options), truth[name](x, y, **options))
    for name in ("procrustes", "rsa"):
        same(getattr(rgfast, name)(x + 1e4, y), truth[name](x, y), 1e-8)


@pytest.mark.parametrize("impl", IMPLS)
def test_batches_and_strides(impl, draw, tensor):
    x, y = draw.related(8, 2 * 3 * 20, 6, 4)
    x, y = tensor(x).view(2, 3, 20, 6), tensor(y).view(2, 3, 20, 4)
    strided = x.movedim(0, -1).contiguous().movedim(-1, 0)
    expanded = y[:1].expand(2, 3, 20, 4)
    for name, options in OPTIONS:
        measure = getattr(rgfast, name)
        found = measure(strided, expanded, impl=impl, **options)
        assert found.shape == (2, 3)
        for at in np.ndindex(2, 3):
            assert torch.equal(found[at], measure(x[at], y[0, at[1]], impl=impl, **options)), name
        assert measure(x[:0], y[:0], impl=impl, **options).shape == (0, 3)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_layer_without_variance_has_no_rotation_and_no_distances(impl, draw, tensor):
    x = tensor(draw.related(9, 12, 3, 1)[0])
    flat = torch.full((12, 4), 7.3, dtype=F64)
    for name in ("procrustes", "rsa"):
        assert getattr(rgfast, name)(x, flat, impl=impl).isnan()
        assert getattr(rgfast, name)(flat, x, impl=impl).isnan()
    assert rgfast.rsa(torch.eye(4), x[:4], impl=impl).isnan()  # all distances are equal


def test_the_matrix_of_layers_is_that_of_pairs(draw, tensor):
    x, y = draw.related(10, 2 * 15, 6, 4)
    xs = [tensor(x).view(2, 15, 6)[..., :d] for d in (6, 3, 1)]
    ys = [tensor(y).view(2, 15, 4), tensor(x).view(2, 15, 6)]
    for name, options in [*OPTIONS, ("cka", {}), ("cka", {"debiased": False})]:
        found = similarity_matrix(name, xs, ys, **options)
        assert found.shape == (2, 3, 2)
        for i, a in enumerate(xs):
            for j, b in enumerate(ys):
                wanted = getattr(rgfast, name)(a, b, **options)
                torch.testing.assert_close(found[:, i, j], wanted, rtol=0, atol=1e-12)


def test_nothing_is_differentiated(draw, tensor):
    x, y = (tensor(z).requires_grad_() for z in draw.related(11, 12, 3, 3))
    for name, options in OPTIONS:
        assert not getattr(rgfast, name)(x, y, **options).requires_grad


def test_which_implementation_runs(draw):
    x, y = draw.related(12, 12, 3, 3)
    with rgfast.record() as log:
        rgfast.rsa(x, y)
        rgfast.rsa(x, y, impl="reference")
        rgfast.calibrate("mutual_knn", x, y, k=3, null=2)
    assert [(entry.op, entry.impl) for entry in log] == [
        ("similarity", "library"), ("similarity", "reference"), ("similarity", "library"),
    ]  # fmt: skip
    assert rgfast.explain(rgfast.mutual_knn, x, y, k=3).chosen == "library"
    assert rgfast.explain("similarity", x, y, k=3).candidates == (("library", None), ("reference", None))
    with pytest.raises(rgfast.ImplUnavailable, match="there is no 'native' implementation"):
        rgfast.rsa(x, y, impl="native")
