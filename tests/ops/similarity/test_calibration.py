"""Calibration against its authors' package, brute force, and relations that are planted or not there."""

import functools

import numpy as np
import pytest
import torch
from scipy.stats import kstest

import rgfast
from rgfast.ops.similarity.permutations import orders

F64 = torch.float64
NAMES = ["cka", "mutual_knn", "procrustes", "rsa"]


@pytest.mark.parametrize("layers", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_score_p_and_threshold_are_those_of_calibrated_similarity(name, layers):
    """Of calibrated-similarity 0.1.1, which keeps fp32:

    g = np.random.default_rng(3)
    calibrate(x, y, measure, K=99, perm_fn=lambda n, device: torch.from_numpy(g.permutation(n)))

    and ``calibrate_layers(xs, ys, ...)`` likewise.
    """
    rng = np.random.default_rng(2)
    x = rng.standard_normal((60, 5))
    y = x[:, :4] + 3 * rng.standard_normal((60, 4))
    one = {
        "cka": (0.12301649898290634, 0.01, 0.04099632054567337),
        "mutual_knn": (0.06041666492819786, 0.01, 0.20000000298023224),
        "procrustes": (0.18370535969734192, 0.01, 0.27968844771385193),
        "rsa": (0.023543551564216614, 0.02, 0.08946911245584488),
    }
    best = {
        "cka": (0.1264704465866089, 0.01, 0.06884940713644028),
        "mutual_knn": (0.03218885138630867, 0.01, 0.22333332896232605),
        "procrustes": (0.1681278795003891, 0.01, 0.3069262206554413),
        "rsa": (0.0, 0.17, 0.14983083307743073),
    }
    if layers:
        xs = [x, x[:, :2], x[:, ::-1] + rng.standard_normal((60, 5))]
        found = rgfast.calibrate(name, xs, [y, y[:, 1:], y**2], null=99, seed=3).best()
    else:
        found = rgfast.calibrate(name, x, y, null=99, seed=3)
    wanted = (best if layers else one)[name]
    for number, value in zip((found.score, found.p, found.threshold), wanted, strict=True):
        assert number.dtype == F64
        assert float(number) == pytest.approx(value, abs=3e-7)


OPTIONS = [
    ("cka", {}),
    ("cka", {"debiased": False}),
    ("mutual_knn", {"k": 4}),
    ("mutual_knn", {"k": 7, "metric": "euclidean"}),
    ("procrustes", {}),
    ("rsa", {}),
]
KINDS = ["related", "whole numbers", "copies and zeros", "copies on both sides", "equidistant", "all alike"]


@pytest.mark.parametrize("impl", ["library", "reference"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("name", "options"), OPTIONS)
def test_nulls_are_the_measure_of_samples_in_another_order(name, options, kind, impl, draw):
    x, y = draw.related(0, 29, 5, 3) if kind == "related" else draw.awkward(0, 29, 5, 3)[kind]
    found = rgfast.calibrate(name, x, y, null=5, seed=4, impl=impl, **options)
    measure = getattr(rgfast, name)
    wanted = [measure(x, y[order], impl="reference", **options) for order in orders(29, 5, 4).numpy()]
    torch.testing.assert_close(found.null, torch.stack(wanted), rtol=0, atol=1e-12, equal_nan=True)
    value = measure(x, y, **options)
    torch.testing.assert_close(found.value, value, rtol=0, atol=1e-12, equal_nan=True)


def test_ties_that_both_sides_break_alike_are_no_evidence():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((2, 90, 4))
    x, y = x[rng.integers(0, 9, 90)], y[rng.integers(0, 9, 90)]  # tokens that repeat
    assert float(rgfast.calibrate("mutual_knn", np.ones((90, 3)), np.ones((90, 2)), k=5).p) == 1.0
    p = [float(rgfast.calibrate("mutual_knn", x[rng.permutation(90)], y, k=5, null=39).p) for _ in range(60)]
    assert 0.35 < np.mean(p) < 0.68


@pytest.mark.parametrize("shape", [(300, 3, 2), (40, 30, 50)], ids=str)
@pytest.mark.parametrize("debiased", [True, False])
def test_cka_by_features_and_by_kernels(shape, debiased, draw, monkeypatch):
    from rgfast.ops.similarity.impl import library

    x, y = draw.related(1, *shape)
    found = []
    for features in (True, False):
        monkeypatch.setattr(library, "_features_pay", lambda call, n, features=features: features)
        found.append(rgfast.calibrate("cka", [x, x**2], [y], null=4, debiased=debiased))
    torch.testing.assert_close(found[0].value, found[1].value, rtol=0, atol=1e-12)
    torch.testing.assert_close(found[0].null, found[1].null, rtol=0, atol=1e-12)
    wanted = rgfast.cka_matrix([*map(torch.from_numpy, (x, x**2))], [torch.from_numpy(y)], debiased=debiased)
    torch.testing.assert_close(found[0].value, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_layers_and_batches_share_their_permutations(name, draw, tensor, monkeypatch):
    from rgfast.ops.similarity.impl import library

    x, y = (tensor(z).view(2, 20, -1) for z in draw.related(2, 2 * 20, 6, 4))
    xs, ys = [x, x[..., :2], x**3], [y, y.flip(-2)]
    monkeypatch.setattr(library, "_PREPARED_BYTES", 1)  # one layer at a time
    found = rgfast.calibrate(name, xs, ys, null=6, seed=1)
    assert found.value.shape == (2, 3, 2)
    assert found.null.shape == (6, 2, 3, 2)
    monkeypatch.undo()
    for e in range(2):
        for i, a in enumerate(xs):
            for j, b in enumerate(ys):
                one = rgfast.calibrate(name, a[e], b[e], null=6, seed=1)
                torch.testing.assert_close(found.null[:, e, i, j], one.null, rtol=0, atol=1e-12)
                torch.testing.assert_close(found.value[e, i, j], one.value, rtol=0, atol=1e-12)


def test_a_function_is_called_for_every_permutation(draw, tensor):
    x, y = (tensor(z).view(2, 30, -1) for z in draw.related(3, 2 * 30, 5, 4))
    for function in (
        lambda x, y: rgfast.rsa(x, y, impl="reference"),
        lambda x, y: np.asarray([float(v) for v in rgfast.rsa(x, y)]),
        rgfast.rsa,
    ):
        found, wanted = (rgfast.calibrate(each, x, y, null=7) for each in (function, "rsa"))
        torch.testing.assert_close(found.null, wanted.null, rtol=0, atol=1e-12)
        torch.testing.assert_close(found.p, wanted.p)
    options = {"kernel": "rbf", "bandwidth": 2.0}
    rbf = rgfast.calibrate(rgfast.cka, [x, x], [y], null=3, **options)
    again = rgfast.calibrate(functools.partial(rgfast.cka, **options), x, y, null=3)
    torch.testing.assert_close(rbf.null[..., 1, 0], again.null)
    with pytest.raises(
        ValueError, match=r"measure must return a number or tensor of shape \(2,\), got shape"
    ):
        rgfast.calibrate(lambda x, y: x.mean(), x, y)


def test_our_functions_are_known_by_themselves(draw):
    x, y = draw.related(4, 20, 3, 3)
    for name in NAMES:
        options = {"k": 3} if name == "mutual_knn" else {}
        with rgfast.record() as log:
            rgfast.calibrate(getattr(rgfast, name), x, y, null=2, **options)
        assert [entry.op for entry in log] == ["similarity"]
    with rgfast.record() as log:
        rgfast.calibrate(rgfast.cka, x, y, null=2, kernel="rbf")
    assert [entry.op for entry in log] == ["cka"] * 3


def test_the_mean_null_of_biased_cka_is_the_formula(draw):
    rng = np.random.default_rng(5)
    x, y = rng.standard_normal((200, 100)), rng.standard_normal((200, 300))
    found = rgfast.calibrate("cka", x, y, null=50, debiased=False)
    assert float(found.null_mean) == pytest.approx(rgfast.cka_null(200, 100, 300), abs=0.01)
    assert float(rgfast.calibrate("cka", x, y, null=50).null_mean) == pytest.approx(0.0, abs=0.01)
    knn = rgfast.calibrate("mutual_knn", x, y, null=50)
    assert float(knn.null_mean) == pytest.approx(10 / 199, abs=0.005)


def uniform(p, null, seed):
    """p-values of a discrete test, spread evenly over their steps: uniform if these are equally likely."""
    return np.asarray(p) - np.random.default_rng(seed).random(len(p)) / (null + 1)


@pytest.mark.parametrize("name", NAMES)
def test_p_is_uniform_where_nothing_is_shared(name):
    """Kolmogorov–Smirnov over 500 draws; overlaps of neighbors are counts, which may be tied."""
    rng = np.random.default_rng(6)
    options = {"k": 5} if name == "mutual_knn" else {}
    p = []
    for seed in range(500):
        x, y = rng.standard_normal((24, 4)), rng.standard_t(2, (24, 3))
        p.append(float(rgfast.calibrate(name, x, y, null=19, seed=seed, **options).p))
    alternative = "less" if name == "mutual_knn" else "two-sided"
    assert kstest(uniform(p, 19, 0), "uniform", alternative=alternative).pvalue > 0.01
    assert min(p) == 0.05
    assert 0.45 < np.mean(p) < 0.56


@pytest.mark.parametrize("name", NAMES)
def test_what_is_shared_is_found(name):
    rng = np.random.default_rng(7)
    options = {"k": 5} if name == "mutual_knn" else {}
    for seed in range(20):
        x = rng.standard_normal((60, 4))
        y = np.c_[x[:, :2] + 0.3 * rng.standard_normal((60, 2)), rng.standard_normal(60)]
        found = rgfast.calibrate(name, x, y, seed=seed, **options)
        assert float(found.p) == pytest.approx(1 / 201)
        assert float(found.score) > 0.05
        assert float(found.value) > float(found.threshold) > float(found.null_mean)


def walks(rng, sequences, length, width):
    """Sequences ``[sequences * length, width]`` whose rows go on from each other."""
    steps = rng.standard_normal((sequences, length, width))
    return steps.cumsum(1).reshape(-1, width)


def test_sequences_are_permuted_whole():
    rng = np.random.default_rng(8)
    ids = np.repeat(np.arange(12), 6)
    whole, rows = [], []
    for seed in range(300):
        x, y = walks(rng, 12, 6, 3), walks(rng, 12, 6, 2)
        whole.append(float(rgfast.calibrate("rsa", x, y, null=19, seed=seed, sequences=ids).p))
        if seed < 100:
            rows.append(float(rgfast.calibrate("rsa", x, y, null=19, seed=seed).p))
    assert kstest(uniform(whole, 19, 1), "uniform").pvalue > 0.01
    assert np.mean(np.asarray(rows) == 0.05) > 0.2  # what it is there for


def test_orders_keep_sequences_together():
    ids = torch.tensor([7, 7, 3, 9, 3, 9, 4, 4, 4, 1])  # interleaved, with one that is alone with its length
    found = orders(10, 40, 0, ids)
    assert found.dtype == torch.int64
    assert (found.sort(1).values == torch.arange(10)).all()
    assert (found[:, 6:] == torch.arange(6, 10)).all()
    pairs = {tuple(row[rows].tolist()) for row in found for rows in ([0, 1], [2, 4], [3, 5])}
    assert pairs == {(0, 1), (2, 4), (3, 5)}
    assert len({tuple(row.tolist()) for row in found}) == 6
    assert torch.equal(found[:7], orders(10, 7, 0, ids.tolist()))
    assert not torch.equal(orders(10, 3, 0), orders(10, 3, 1))
    assert torch.equal(orders(10, 3, 5), orders(10, 9, 5)[:3])


def test_sequences_of_one_row_are_samples(draw):
    x, y = draw.related(9, 20, 3, 3)
    ids = np.random.default_rng(0).permutation(20)
    found = rgfast.calibrate("rsa", x, y, sequences=ids, null=50)
    assert 0 < float(found.p) <= 1
    assert len(found.null.unique()) == 50


def test_the_best_of_many_is_corrected():
    rng = np.random.default_rng(10)
    best, smallest, family = [], [], []
    for seed in range(300):
        xs, ys = ([rng.standard_normal((20, 3)) for _ in range(3)] for _ in range(2))
        found = rgfast.calibrate("cka", xs, ys, null=19, seed=seed)
        best.append(float(found.best().p))
        smallest.append(float(found.p.min()))
        family.append(float(found.corrected_p().min()))
    assert kstest(uniform(best, 19, 2), "uniform").pvalue > 0.01
    assert np.mean(np.asarray(smallest) <= 0.05) > 0.2
    assert best == family


def test_best_and_corrected_p_are_maxima():
    value = torch.tensor([[0.1, 0.7], [0.3, 0.2]], dtype=F64)
    null = torch.tensor(
        [[[0.6, 0.1], [0.0, 0.1]], [[0.2, 0.1], [0.4, 0.1]], [[0.0, 0.1], [0.0, 0.0]]], dtype=F64
    )
    found = rgfast.Calibrated(value, null)
    assert torch.equal(found.best().value, value[0, 1])
    assert torch.equal(found.best().null, torch.tensor([0.6, 0.4, 0.1], dtype=F64))
    assert torch.equal(found.best(-1).value, torch.tensor([0.7, 0.3], dtype=F64))
    assert torch.equal(found.best(1).null, null.amax(2))
    assert torch.equal(found.best(-2).null, null.amax(1))
    assert torch.equal(found.p, torch.tensor([[0.75, 0.25], [0.5, 0.25]], dtype=F64))
    assert torch.equal(found.corrected_p(), torch.tensor([[1.0, 0.25], [0.75, 0.75]], dtype=F64))
    assert torch.equal(found.corrected_p(-1), torch.tensor([[1.0, 0.25], [0.5, 0.5]], dtype=F64))
    assert torch.equal(found.null_mean, null.mean(0))
    for dims in ((2,), (-3,)):
        with pytest.raises(ValueError, match="dims must be of the 2 dimensions of value"):
            found.best(*dims)
    with pytest.raises(ValueError, match="dims must be of the 0 dimensions of value"):
        found.best().best()


def test_threshold_and_score():
    null = torch.arange(19, dtype=F64) / 20
    found = rgfast.Calibrated(torch.tensor(0.96, dtype=F64), null)
    assert float(found.threshold) == 0.9  # the 19th of 20
    assert float(found.score) == pytest.approx(0.6)
    assert float(rgfast.Calibrated(null[3], null).score) == 0.0
    half = rgfast.Calibrated(torch.tensor(0.96, dtype=F64), null, alpha=0.5, maximum=2.0)
    assert float(half.threshold) == 0.45
    assert float(half.score) == pytest.approx(0.51 / 1.55)
    top = rgfast.Calibrated(torch.ones((), dtype=F64), torch.ones(4, dtype=F64))
    assert (float(top.score), float(top.p)) == (0.0, 1.0)


def test_values_that_differ_by_rounding_are_equal():
    value = torch.tensor(0.3, dtype=F64)
    null = torch.tensor([0.3 - 1e-15, 0.3 - 1e-6], dtype=F64)
    assert float(rgfast.Calibrated(value, null).p) == pytest.approx(2 / 3)
    # Six permutations of three samples: the one that changes nothing comes up, in whatever order it is added.
    x = np.random.default_rng(0).standard_normal((3, 4))
    for name in ("procrustes", "rsa"):
        found = rgfast.calibrate(name, x, x, null=60)
        assert 0.1 < float(found.p) < 0.6


@pytest.mark.parametrize("name", ["cka", "procrustes", "rsa"])
def test_layers_without_variance_are_passed_over(name, draw, tensor):
    x, y = (tensor(z) for z in draw.related(11, 20, 4, 4))
    flat = torch.full((20, 2), 0.1, dtype=F64)
    found = rgfast.calibrate(name, [flat, x], [y, flat], null=9)
    undefined = torch.tensor([[True, True], [False, True]])
    for values in (found.value, found.p, found.score, found.threshold, found.corrected_p(), found.null[0]):
        assert torch.equal(values.isnan(), undefined)
    assert torch.equal(found.best().value, found.value[1, 0])
    assert torch.equal(found.best().p, found.p[1, 0])
    assert torch.equal(found.best(-1).p.isnan(), torch.tensor([True, False]))


def test_repr(draw):
    x, y = draw.related(12, 20, 3, 3)
    one = rgfast.calibrate("rsa", x, y, null=9)
    assert repr(one).startswith(f"<Calibrated value={float(one.value):.4g}, null_mean=")
    assert repr(one).endswith(", 9 permutations>")
    assert repr(rgfast.calibrate("rsa", [x, y], [y], null=9)) == "<Calibrated [2, 1], 9 permutations>"
