"""Triangular factors of a stream's rows: the small singular values that second moments cannot hold.

A second moment knows singular values to √u σ₁; the factor R of a QR decomposition to a small multiple of u σ₁
(Householder QR is backward stable: Higham 2002, Accuracy and Stability of Numerical Algorithms, ch. 19), and
R of all rows is R of [R of the rows so far; the new rows]. Rows are ``[1, x − shift]``: with the column of
ones first, what lies below R's first row is R of the centred rows, and moving the shift adds a multiple of
the first column to the others.

A decomposition costs several times a product, and most layers do not need it. Singular values only grow when
rows are added, so once a position's rows are well conditioned (often after the first block) its factor is
dropped: its moments will do. What stays is what is deficient but for rounding (a LayerNorm's output, more
features than there are tokens), and what has few rows.

LAPACK's bits may depend on threads and on how its operands lie. It runs on one thread here, and PyTorch hands
it new copies (of rows stacked here, which are new tensors themselves), whose layout follows from the shapes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rgfast.runtime.threads import one_thread
from rgfast.runtime.waiting import Later, sent, waits_for

__all__ = ["TriangularFactors"]

# ‖R‖ ‖R⁻¹‖ (Frobenius) up to which moments give effective ranks to 1e-12, however the rows were summed up.
_WELL_CONDITIONED = 4e3
_WORK_BYTES = 64 << 20


class TriangularFactors:
    """R with RᵀR = Σ zᵀz over the rows ``z = [1, x − shift]`` of some layers, at P positions each.

    Every method that takes a layer does nothing for one that is not followed.
    """

    def __init__(
        self, layers: Sequence[int], widths: Sequence[int], positions: int, device: torch.device
    ) -> None:
        self._positions, self._device = positions, device
        self._width = {layer: widths[layer] for layer in layers}
        self._r = {layer: self._zeros(layer) for layer in layers}
        self._kept = {
            layer: torch.ones(positions, dtype=torch.bool, device=device) for layer in layers
        }  # [P]
        self._seen = 0
        self._check_at = {layer: 2 * width for layer, width in self._width.items()}
        # Where it would wait to look whether a factor is kept at any position: that, on its way.
        self._any: dict[int, Later] = {}

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        held = [*self._r.values(), *self._kept.values()]
        return sum(x.numel() * x.element_size() for x in held)

    @property
    def followed(self) -> list[int]:
        """The layers that still have a factor at some position."""
        return list(self._r)

    def update(self, layer: int, z: Tensor, part: slice) -> None:
        """Add the rows ``z[m, b, d + 1]``, each 1 (0 where a row does not count) and the row less its shift,
        at the positions ``part``."""
        if layer in self._any and self._any[layer].ready() and not self._any.pop(layer).value.any():
            self._r.pop(layer, None)
        if layer not in self._r:
            return
        if waits_for(z.device):  # where a factor is kept is not known here
            r = self._r[layer][part]
            r.copy_(_triangle(torch.cat([r, z], 1)))
            return
        if not self._seen and z.shape[1] >= 2 * self._width[layer]:
            self._kept[layer][part] &= ~_plainly_well_conditioned(z[..., 1:])
        kept = self._kept[layer][part]
        at = kept.nonzero()[:, 0] + part.start
        if not len(at):
            return
        rows = z if len(at) == len(z) else z[kept]
        stacked = torch.cat([self._r[layer][at], rows], 1)
        self._r[layer][at] = _triangle(stacked)

    def advance(self, rows: int) -> None:
        """Count ``rows`` more samples, and drop at every doubling of them what is well conditioned."""
        self._seen += rows
        for layer, check_at in self._check_at.items():
            if self._seen >= check_at and layer in self._r:
                self._check_at[layer] = 2 * self._seen
                well = _well_conditioned(self._r[layer][:, 1:, 1:])
                self._keep(layer, self._kept[layer] & ~well)

    def factor(self, layer: int) -> Tensor:
        """R ``[P, d + 1, d + 1]`` of ``[1, x − shift]``, NaN where it was dropped."""
        size = self._width[layer] + 1
        found = self._r.get(layer)
        if found is None:
            return torch.full(
                (self._positions, size, size), torch.nan, dtype=torch.float64, device=self._device
            )
        return found.masked_fill(~self._kept[layer][:, None, None], torch.nan)

    def merge(
        self,
        other: TriangularFactors,
        moves: tuple[Sequence[Tensor], Sequence[Tensor]],
        scales: Sequence[tuple[float, float]],
    ) -> None:
        """Add the rows of ``other``, after scaling both and moving both to one shift; in the order of layers.

        Kept is what both have kept: where one of them is well conditioned, so are the two together.
        """
        self._seen += other._seen
        for layer in list(self._r):
            self._check_at[layer] = max(self._check_at[layer], other._check_at[layer])
            if layer not in other._r:
                self._keep(layer, torch.zeros_like(self._kept[layer]))
                continue
            mine = _moved(self._r[layer], moves[0][layer], scales[layer][0])
            theirs = _moved(other._r[layer], moves[1][layer], scales[layer][1])
            self._r[layer] = _triangle(torch.cat([mine, theirs], 1))
            self._keep(layer, self._kept[layer] & other._kept[layer])

    def pooled(self, moves: Sequence[Tensor], one: TriangularFactors, counted: Tensor) -> None:
        """Make ``one``, of a single position, that of all positions after moving them to one shift.

        ``counted[P]`` says which positions have rows.
        """
        for layer, r in self._r.items():
            if waits_for(r.device):  # rows of zeros stand for positions without any
                flat = torch.where(counted[:, None, None], _moved(r, moves[layer], 1.0), 0.0).flatten(0, 1)
                step = max(r.shape[1], _WORK_BYTES // (8 * r.shape[2]))
                for some in torch.split(flat, step):
                    one._r[layer] = _triangle(torch.cat([one._r[layer], some[None]], 1))
                one._kept[layer] = (self._kept[layer] | ~counted).all().reshape(1)
                continue
            if not bool((self._kept[layer] | ~counted).all()):
                one._keep(layer, torch.zeros_like(one._kept[layer]))
                continue
            whole = _moved(r, moves[layer], 1.0)[counted]
            step = max(1, _WORK_BYTES // (8 * r.shape[1] * r.shape[2]))
            for some in torch.split(whole, step):
                one._r[layer] = _triangle(torch.cat([one._r[layer], some.flatten(0, 1)[None]], 1))
        for layer in set(self._width) - set(self._r):
            one._keep(layer, torch.zeros_like(one._kept[layer]))
        one._seen, one._check_at = self._seen, dict(self._check_at)

    def at(self, part: slice) -> TriangularFactors:
        """A copy of some positions."""
        one = TriangularFactors([], [], len(range(*part.indices(self._positions))), self._device)
        one._seen, one._width, one._check_at = self._seen, dict(self._width), dict(self._check_at)
        one._r = {layer: r[part].clone() for layer, r in self._r.items()}
        one._kept = {layer: kept[part].clone() for layer, kept in self._kept.items()}
        return one

    def only(self, layers: Sequence[int]) -> TriangularFactors:
        """Some layers, numbered in the order given. It shares memory: it is only to be read."""
        one = TriangularFactors([], [], self._positions, self._device)
        one._seen = self._seen
        for new, layer in enumerate(layers):
            if layer in self._width:
                one._width[new], one._check_at[new] = self._width[layer], self._check_at[layer]
                one._kept[new] = self._kept[layer]
            if layer in self._r:
                one._r[new] = self._r[layer]
        return one

    def rescale(self, scales: Sequence[float]) -> None:
        """Have the rows of every layer in another unit, a power of two."""
        for layer, r in self._r.items():
            if scales[layer] != 1.0:
                self._r[layer] = torch.cat([r[:, :, :1], r[:, :, 1:] * scales[layer]], 2)

    def place(self, devices: Sequence[torch.device]) -> None:
        """Have every layer's factors on its device."""
        for held in (self._r, self._kept):
            for layer, x in held.items():
                held[layer] = sent(x, devices[layer])

    def state_dict(self) -> dict[str, np.ndarray[Any, Any]]:
        """Everything as named arrays: the factors that are kept, where, and when to look at them again."""
        layers = sorted(self._width)
        checks = [self._check_at[layer] for layer in layers]
        arrays = {"factors": np.array([self._seen, *checks], dtype=np.int64)}
        for layer in layers:
            kept = self._kept[layer]
            if layer in self._r and (not waits_for(kept.device) or bool(kept.any())):
                arrays[f"factor_kept.{layer}"] = kept.cpu().numpy().copy()
                arrays[f"factor.{layer}"] = self._r[layer][kept].cpu().numpy()
        return arrays

    def load_state_dict(self, arrays: Mapping[str, np.ndarray[Any, Any]]) -> None:
        """Replace everything by what :meth:`state_dict` returned; where there is nothing, nothing is kept."""
        layers = sorted(self._width)
        self._any.clear()
        if "factors" in arrays:
            self._seen, *checks = (int(v) for v in arrays["factors"])
            self._check_at = dict(zip(layers, checks, strict=True))
        for layer in layers:
            self._r.pop(layer, None)
            if f"factor.{layer}" not in arrays:
                continue
            kept = torch.from_numpy(np.array(arrays[f"factor_kept.{layer}"])).to(self._device)
            self._r[layer], self._kept[layer] = self._zeros(layer), kept
            self._r[layer][kept] = torch.from_numpy(np.array(arrays[f"factor.{layer}"])).to(self._device)

    def _zeros(self, layer: int) -> Tensor:
        size = self._width[layer] + 1
        return torch.zeros(self._positions, size, size, dtype=torch.float64, device=self._device)

    def _keep(self, layer: int, kept: Tensor) -> None:
        self._kept[layer] = kept
        if waits_for(kept.device):
            self._any[layer] = Later(kept.any())
        elif not bool(kept.any()):
            self._r.pop(layer, None)


def _triangle(rows: Tensor) -> Tensor:
    """R ``[m, k, k]`` of ``rows[m, r, k]``, r ≥ k."""
    with one_thread():  # LAPACK's bits depend on the number of threads
        reduced: Tensor = torch.geqrf(rows)[0]
    return reduced[:, : rows.shape[2]].triu()


def _plainly_well_conditioned(x: Tensor) -> Tensor:
    """Where the first rows ``x[m, b, d]``, less their mean, are well conditioned as far as a moment tells.

    It tells that much: what it loses is a hundred million times smaller than the largest singular value.
    """
    with one_thread():
        lower, failed = torch.linalg.cholesky_ex(x.mT @ x)
    well: Tensor = (failed == 0) & _well_conditioned(lower.mT)
    return well


def _moved(r: Tensor, move: Tensor, scale: float) -> Tensor:
    """R of ``[1, scale·x + move]`` from that of ``[1, x]``: no longer triangular."""
    moved = r.clone()
    moved[:, :, 1:] = torch.addcmul(r[:, :, 1:] * scale, r[:, :, :1], move[:, None])
    return moved


def _well_conditioned(r: Tensor) -> Tensor:
    """Where ‖R‖ ‖R⁻¹‖ is small ``[P]``; a factor with a zero on its diagonal is not."""
    size = r.shape[-1]
    identity = torch.eye(size, dtype=r.dtype, device=r.device)
    well = torch.zeros(len(r), dtype=torch.bool, device=r.device)
    solvable = (r.diagonal(dim1=1, dim2=2) != 0).all(1)
    step = max(1, _WORK_BYTES // (8 * size * size))
    if waits_for(r.device):
        for some, out in zip(torch.split(r, step), torch.split(well, step), strict=True):
            out.copy_(_condition(some, identity) <= _WELL_CONDITIONED)  # NaN or infinite if not solvable
        return well & solvable
    at = solvable.nonzero()[:, 0]
    with one_thread():
        for some in torch.split(at, step):
            well[some] = _condition(r[some], identity) <= _WELL_CONDITIONED
    return well


def _condition(r: Tensor, identity: Tensor) -> Tensor:
    inverse = torch.linalg.solve_triangular(r, identity.expand(len(r), -1, -1), upper=True)
    found: Tensor = torch.linalg.matrix_norm(r) * torch.linalg.matrix_norm(inverse)
    return found
