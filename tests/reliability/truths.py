"""What the measures are, by brute force in fp64 and longer; nothing of the package is used here."""

import numpy as np
import torch


def as_array(x):
    return np.asarray(x.detach().to(torch.float64)) if isinstance(x, torch.Tensor) else x.astype(np.float64)


def matrices(x):
    """``[..., n, d]`` as a list of fp64 matrices."""
    x = as_array(x)
    return list(x.reshape(-1, *x.shape[-2:]))


def sigma(x, centred=True):
    """Singular values of a matrix; n rows that are centred have no more than n − 1 (the rest is zero)."""
    x = np.asarray(x, dtype=np.float64)
    top = np.abs(x).max()
    if top == 0:
        return np.zeros(min(x.shape))
    x = x / 2.0 ** np.frexp(top)[1]  # exact, and keeps sums of squares in range
    if centred:
        x = x - x[:1]
        x = x - x.mean(0) * (x != 0).any(0)
        found = np.linalg.svd(x, compute_uv=False)
        found[len(x) - 1 :] = 0.0
    else:
        found = np.linalg.svd(x, compute_uv=False)
    return found * 2.0 ** np.frexp(top)[1]


def rank_of(values, power=1):
    """exp of the entropy of ``values**power``."""
    if values.max(initial=0.0) == 0:
        return 0.0
    weight = (values / values.max()) ** power
    p = weight[weight > 0] / weight.sum()
    return float(np.exp(-(p * np.log(p)).sum()))


def energy_ratio(values, *, top=False):
    """(Σσ²)²/Σσ⁴, or Σσ²/σ₁²."""
    if values.max(initial=0.0) == 0:
        return 0.0
    share = (values / values.max()) ** 2
    return float(share.sum() if top else share.sum() ** 2 / (share**2).sum())


def kernel(x, debiased):
    """The centred (or U-centred) linear kernel of a matrix in long double, of data scaled to 1, and how much
    of the centred one is left in it: ‖K_c‖/‖K_U‖, what rounding errors are magnified by."""
    x = np.asarray(x, dtype=np.longdouble)
    x = x - x[:1]
    x = x - x.mean(0)
    top = np.abs(x).max()
    x = x / top if top > 0 else x
    k = x @ x.T
    size, n = float(np.sqrt((k * k).sum())), len(k)
    if debiased:
        k = k - np.diag(np.diag(k))
        rows = k.sum(1)
        k = k - rows[:, None] / (n - 2) - rows[None] / (n - 2) + rows.sum() / ((n - 1) * (n - 2))
        k = k - np.diag(np.diag(k))
    left = float(np.sqrt((k * k).sum()))
    return k, (size / left if left > 0 else np.inf), float(top)


def cka(x, y, debiased):
    """CKA of two matrices, and what rounding errors in it are magnified by (infinite: there is none)."""
    (k, a, _), (m, b, _) = kernel(x, debiased), kernel(y, debiased)
    if not np.isfinite(a) or not np.isfinite(b):
        return np.nan, np.inf
    return float((k * m).sum() / np.sqrt((k * k).sum() * (m * m).sum())), a * b


def drift(x, y, debiased):
    """1 − CKA of two matrices, without cancellation, and its magnification."""
    (k, a, _), (m, b, _) = kernel(x, debiased), kernel(y, debiased)
    if not np.isfinite(a) or not np.isfinite(b):
        return np.nan, np.inf
    k, m = k / np.sqrt((k * k).sum()), m / np.sqrt((m * m).sum())
    return float(((k - m) ** 2).sum() / 2), a * b


def hsic(x, y, debiased):
    """HSIC_1, or HSIC_0, and the size of the terms that it is the sum of."""
    (k, _, s), (m, _, t) = kernel(x, debiased), kernel(y, debiased)
    (a, _, _), (b, _, _) = kernel(x, False), kernel(y, False)
    n, unit = len(x), (s * t) ** 2
    over = n * (n - 3) if debiased else (n - 1) ** 2
    size = float(np.sqrt((a * a).sum() * (b * b).sum()))
    return float((k * m).sum()) / over * unit, size / over * unit


def minibatch_cka(x, y, cut):
    """CKA of HSIC_1 summed over the slices ``cut`` of the rows, and its magnification."""
    pairs = {"xy": (x, y), "xx": (x, x), "yy": (y, y)}
    found = {name: [hsic(a[rows], b[rows], True) for rows in cut] for name, (a, b) in pairs.items()}
    value = {name: sum(v for v, _ in part) for name, part in found.items()}
    terms = {name: sum(t for _, t in part) for name, part in found.items()}
    if not (value["xx"] > 0 and value["yy"] > 0):
        return np.nan, np.inf
    magnified = terms["xx"] / value["xx"] * terms["yy"] / value["yy"]
    return value["xy"] / np.sqrt(value["xx"] * value["yy"]), magnified
