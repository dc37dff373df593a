"""Gradients of the measures by formula.

With x_c = U diag(sigma) V^T, d f / d x_c = U diag(df/dsigma) V^T for every function of the singular values;
the sum over equal singular values is the same for every basis, so that none is preferred.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rgfast.ops.spectrum import reference
from rgfast.ops.spectrum.top import top_eigenpair
from rgfast.runtime.threads import one_thread

__all__ = ["gradient"]

_U = 2.0**-53


def gradient(x: Tensor, grad: Tensor, measure: str, centering: str) -> Tensor:
    """Gradient `[..., n, d]` in the dtype of x, computed in fp64, matrix by matrix."""
    n, d = x.shape[-2:]
    rows = x.detach().reshape(-1, n, d)
    weight = grad.double().reshape(len(rows), *grad.shape[x.dim() - 2 :])
    result = torch.empty_like(rows, dtype=x.dtype, memory_format=torch.contiguous_format)
    with one_thread():
        for i in range(len(rows)):
            y, exponent = reference.scaled(rows[i : i + 1])
            y, _ = reference.centred(y, centering)
            limit = reference.rank_limit(y, centering)[0]
            tall = y[0] if n >= d else y[0].mT
            if measure == "participation_ratio":
                slope = _ratio_slope(tall)
            elif measure == "stable_rank":
                slope = _stable_slope(tall)
            else:
                slope = _spectral_slope(tall, int(limit), measure, weight[i])
            # The measures do not depend on scale, singular values are homogeneous of degree one.
            scale = 0 if measure == "singular_values" else -int(exponent)
            slope = slope if measure == "singular_values" else slope * weight[i]
            slope = (slope if n >= d else slope.mT) * 2.0 ** (scale // 2) * 2.0 ** (scale - scale // 2)
            result[i] = slope - slope.mean(0) if centering == "mean" else slope
    return result.reshape(x.shape)


def _ratio_slope(y: Tensor) -> Tensor:
    gram = y.mT @ y
    trace, square = gram.diagonal().sum(), gram.square().sum()
    if float(square) == 0:
        return torch.zeros_like(y)
    return (4 * trace / square) * (y - (trace / square) * (y @ gram))


def _stable_slope(y: Tensor) -> Tensor:
    gram = y.mT @ y
    top, vector = (t[0] for t in top_eigenpair(gram[None]))
    if float(top) == 0:
        return torch.zeros_like(y)
    trace = gram.diagonal().sum()
    return (2 / top) * (y - (trace / top) * torch.outer(y @ vector, vector))


def _spectral_slope(y: Tensor, limit: int, measure: str, weight: Tensor) -> Tensor:
    q, r = torch.linalg.qr(y)
    u, sigma, vh = torch.linalg.svd(r, full_matrices=False)
    # Below its own rounding error a singular value has no direction, and at zero the entropy has no slope.
    live = sigma > (len(sigma) + 50) * _U * y.norm()
    live[limit:] = False
    if not bool(live.any()):
        return torch.zeros_like(y)
    s = sigma[live]
    if measure == "singular_values":
        slope = weight[live]
    else:
        mass = s if measure == "effective_rank" else s.square()
        p = mass / mass.sum()
        entropy = torch.special.entr(p).sum()
        slope = -(p.log() + entropy) * entropy.exp() / mass.sum()
        if measure != "effective_rank":
            slope = 2 * s * slope
    total: Tensor = ((q @ u[:, live]) * slope) @ vh[live]
    return total
