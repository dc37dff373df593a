"""Small singular values that a Gram matrix loses, recovered from the data (derivation in the README)."""

from __future__ import annotations

import torch
from torch import Tensor

from rgfast.ops.spectrum import reference
from rgfast.ops.spectrum.measures import UNIT_ROUNDOFF, entropy_error

__all__ = ["gram_error", "refined"]

_U = UNIT_ROUNDOFF[torch.float64]
_SMALL = 1e-6  # eigenvalues under this share of the largest are computed again
_LEVELS = 3  # beyond, what is left is under u sigma_1 and no algorithm knows it


def gram_error(unit: float, terms: Tensor, accumulated: Tensor, top: Tensor, m: int) -> Tensor:
    """Bound on every eigenvalue of a moment summed over `terms` rows in tiles and then solved."""
    chain = torch.minimum(terms, reference.TILE + torch.ceil(terms / reference.TILE)) + 4
    return unit * (chain * accumulated + max(50, m / 2) * top)


def refined(tall: Tensor, accumulated: Tensor, limit: Tensor, rtol: float) -> tuple[Tensor, Tensor]:
    """Singular values `[m]` of fp64 `tall[n, m]`, descending, and a bound `[m]` on the error of each.

    The eigenvectors V_s of the Gram matrix with small eigenvalues span what it has lost; the data times V_s
    have a Gram matrix of their own, in which the same values are large. Again, until the bound on the
    relative error of the effective rank is under `rtol` or nothing is left to gain.
    """
    n, m = tall.shape
    terms = torch.tensor(float(n), dtype=torch.float64, device=tall.device)
    frobenius = accumulated.sqrt()
    part, floor = tall, 2 * _U * frobenius
    coupling: list[tuple[Tensor, Tensor]] = []
    sigma: list[Tensor] = []
    error: list[Tensor] = []
    for level in range(_LEVELS):
        matrix = _gram(part)
        trace = accumulated if level == 0 else matrix.diagonal().sum()
        width = part.shape[1]
        if level == 0:
            value, vector = torch.linalg.eigh(matrix)
        else:
            value, vector = torch.linalg.eigvalsh(matrix), None
        value = value.clamp_min(0).flip(0)
        epsilon = gram_error(_U, terms, trace, value[0], width)
        s, e = value.sqrt(), _root_error(value, epsilon) + floor
        for gap_from, strength in coupling:
            shift = torch.minimum(strength, strength.square() / (gap_from - value).clamp_min(0))
            e = e + _root_error(value, shift)
        done, doubt = torch.cat([*sigma, s]), torch.cat([*error, e])
        small = int((value < _SMALL * value[0]).sum())
        if level > 0:
            live = torch.arange(m, device=tall.device) < limit
            bound = entropy_error(done * live, doubt * live, limit)
            if small == 0 or level == _LEVELS - 1 or bool(bound <= rtol):
                break
            vector = torch.linalg.eigh(matrix).eigenvectors
        if small == 0:
            break
        assert vector is not None
        sigma.append(s[: width - small])
        error.append(e[: width - small])
        coupling.append((value[width - small - 1], epsilon))
        part = part @ vector[:, :small]
        # Every entry of the product is a sum of `width` terms; the rest is what V lacks in orthogonality.
        floor = floor + width * _U * (small**0.5) * (frobenius if level == 0 else trace.sqrt())
    order = done.argsort(descending=True)
    live = torch.arange(m, device=tall.device) < limit
    return torch.where(live, done[order], 0.0), torch.where(live, doubt[order], 0.0)


def _gram(part: Tensor) -> Tensor:
    total = torch.zeros((part.shape[1], part.shape[1]), dtype=part.dtype, device=part.device)
    for row in range(0, part.shape[0], reference.TILE):
        rows = part[row : row + reference.TILE]
        total = torch.addmm(total, rows.mT, rows)
    return total


def _root_error(value: Tensor, error: Tensor) -> Tensor:
    """Bound on the square root of what errs by `error`: |a - b| / (sqrt a + sqrt b), and sqrt|a - b|."""
    return torch.minimum(error / value.sqrt(), error.sqrt()).nan_to_num(0.0)
