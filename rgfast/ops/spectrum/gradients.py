"""Gradients of the measures by formula.

With x_c = U diag(sigma) V^T, d f / d x_c = U diag(df/dsigma) V^T for every function of the singular values;
the sum over equal singular values is the same for every basis, so that none is preferred. Likewise those of
eigenvalues. Values on a GPU are not looked at, but by torch's decompositions and, for the stable rank, once
per doubling of the Krylov space.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from rgfast.ops.device import by_itself
from rgfast.ops.spectrum import reference
from rgfast.ops.spectrum.top import top_eigenpair

__all__ = ["eigenvalue_gradient", "gradient"]

_U = 2.0**-53
_AT_ONCE = 1 << 24  # elements of fp64 copies on a GPU


def gradient(x: Tensor, grad: Tensor, measure: str, centering: str) -> Tensor:
    """Gradient `[..., n, d]` in the dtype of x, computed in fp64."""
    n, d = x.shape[-2:]
    rows = x.detach().reshape(-1, n, d)
    weight = grad.double().reshape(len(rows), *grad.shape[x.dim() - 2 :])
    result = torch.empty_like(rows, dtype=x.dtype, memory_format=torch.contiguous_format)
    with by_itself(x.device.type):
        for part in _parts(rows):
            y, exponent = reference.scaled(rows[part])
            y, _ = reference.centred(y, centering)
            tall = y if n >= d else y.mT
            if measure == "participation_ratio":
                slope = _ratio_slope(tall)
            elif measure == "stable_rank":
                slope = _stable_slope(tall)
            else:
                limit = reference.rank_limit(y, centering)
                slope = _spectral_slope(tall, limit, measure, weight[part])
            slope = slope if n >= d else slope.mT
            if measure != "singular_values":
                # These do not depend on scale, singular values are homogeneous of degree one.
                slope = slope * weight[part, None, None]
                half = -exponent // 2
                slope = slope * _power(half) * _power(-exponent - half)
            result[part] = slope - slope.mean(1, keepdim=True) if centering == "mean" else slope
    return result.reshape(x.shape)


def eigenvalue_gradient(a: Tensor, grad: Tensor) -> Tensor:
    """Gradient `[..., d, d]` in the dtype of symmetric a, computed in fp64: V diag(grad) V^T."""
    matrices = a.detach().reshape(math.prod(a.shape[:-2]), *a.shape[-2:])
    weight = grad.double().reshape(matrices.shape[:-1])
    result = torch.empty_like(matrices, memory_format=torch.contiguous_format)
    with by_itself(a.device.type):
        for part in _parts(matrices) if a.numel() else ():
            lower, _ = reference.scaled(matrices[part].tril())
            vectors = torch.linalg.eigh(lower).eigenvectors
            result[part] = (vectors * weight[part, None]) @ vectors.mT
    return result.reshape(a.shape)


def _parts(matrices: Tensor) -> Iterator[slice]:
    """One by one on the CPU, so that bits do not depend on the others; elsewhere as many as fit."""
    step = 1 if matrices.is_cpu else max(1, _AT_ONCE // max(1, matrices[:1].numel()))
    return (slice(start, start + step) for start in range(0, len(matrices), step))


def _power(exponent: Tensor) -> Tensor:
    return ((1023 + exponent) << 52).view(torch.float64)[:, None, None]


def _nonzero(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, 1.0)


def _ratio_slope(y: Tensor) -> Tensor:
    gram = y.mT @ y
    trace = gram.diagonal(dim1=1, dim2=2).sum(1)[:, None, None]
    square = _nonzero(gram.square().sum((1, 2)))[:, None, None]
    return (4 * trace / square) * (y - (trace / square) * (y @ gram))


def _stable_slope(y: Tensor) -> Tensor:
    gram = y.mT @ y
    top, vector = top_eigenpair(gram)
    top, vector = _nonzero(top)[:, None, None], vector[:, :, None]
    trace = gram.diagonal(dim1=1, dim2=2).sum(1)[:, None, None]
    return (2 / top) * (y - (trace / top) * ((y @ vector) @ vector.mT))


def _spectral_slope(y: Tensor, limit: Tensor, measure: str, weight: Tensor) -> Tensor:
    q, r = torch.linalg.qr(y)
    u, sigma, vh = torch.linalg.svd(r, full_matrices=False)
    m = sigma.shape[1]
    # Below its own rounding error a singular value has no direction, and at zero the entropy has no slope.
    live = sigma > (m + 50) * _U * torch.linalg.vector_norm(y, dim=(1, 2))[:, None]
    live &= torch.arange(m, dtype=torch.int64, device=y.device) < limit[:, None]
    if measure == "singular_values":
        slope = weight
    else:
        s = torch.where(live, sigma, 0.0)
        mass = s if measure == "effective_rank" else s.square()
        whole = _nonzero(mass.sum(1, keepdim=True))
        p = mass / whole
        entropy = torch.special.entr(p).sum(1, keepdim=True)
        slope = -(torch.where(live, p, 1.0).log() + entropy) * entropy.exp() / whole
        if measure != "effective_rank":
            slope = 2 * s * slope
    total: Tensor = ((q @ u) * torch.where(live, slope, 0.0)[:, None]) @ vh
    return total
