"""Data of this room's tests, and their truth: NumPy's loops and SciPy."""

from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.spatial import procrustes
from scipy.spatial.distance import cdist, pdist
from scipy.stats import spearmanr

import rgfast


def _near(x, k, metric):
    """Neighbors of every row by a stable sort, ties to the lower index; whole numbers are exact."""
    if metric == "euclidean":
        away = cdist(x, x, "sqeuclidean")
    else:
        # sign(cos) cos² |a|², which is in order for one row a.
        if (x == x.round()).all():
            x = np.vectorize(Fraction, otypes=[object])(x)
        else:
            x = np.sign(x) if x.shape[1] == 1 else x.astype(np.longdouble)
        squares = [(row * row).sum() for row in x]
        dots = (x[:, None] * x).sum(-1)
        away = [[-d * abs(d) / (squares[j] or 1) for j, d in enumerate(row)] for row in dots]
    found = []
    for i, row in enumerate(away):
        order = sorted((j for j in range(len(x)) if j != i), key=lambda j, row=row: row[j])
        found.append(set(order[:k]))
    return found


def _mutual_knn(x, y, k=10, metric="cosine"):
    pairs = zip(_near(x, k, metric), _near(y, k, metric), strict=True)
    return sum(len(a & b) for a, b in pairs) / (len(x) * k)


def _procrustes(x, y):
    width = max(x.shape[1], y.shape[1])
    x, y = (np.pad(z, ((0, 0), (0, width - z.shape[1]))) for z in (x, y))
    return float(np.sqrt(max(0.0, 1.0 - procrustes(x, y)[2])))


def _rsa(x, y):
    return float(spearmanr(pdist(x), pdist(y)).statistic)


def _cka(x, y, debiased=True):
    return float(rgfast.cka(x, y, debiased=debiased))


@pytest.fixture
def truth():
    """Each measure of two arrays by brute force."""
    return {"cka": _cka, "mutual_knn": _mutual_knn, "procrustes": _procrustes, "rsa": _rsa}


@pytest.fixture
def draw():
    """``draw(seed, n, d, e)``: related arrays ``x[n, d]``, ``y[n, e]``; ``awkward``: hard ones."""

    def related(seed, n, d, e):
        rng = np.random.default_rng(seed)
        x = rng.standard_normal((n, d))
        return x, x[:, :1] + rng.standard_normal((n, e))

    def awkward(seed, n, d, e):
        x, y = related(seed, n, d, e)
        copied = x.copy()
        copied[::3], copied[1] = copied[0], 0.0
        return {
            "whole numbers": ((2 * x).round(), (2 * y).round()),
            "copies and zeros": (copied, y),
            "copies on both sides": (copied, copied[:, ::-1] * 2.0),
            "equidistant": (np.eye(n), y),
            "all alike": (np.ones((n, d)), np.ones((n, e))),
        }

    return SimpleNamespace(related=related, awkward=awkward)


@pytest.fixture
def tensor():
    return lambda x, dtype=torch.float64: torch.from_numpy(np.ascontiguousarray(x)).to(dtype)
