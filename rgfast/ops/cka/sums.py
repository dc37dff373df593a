"""What implementations of CKA by products of all layers share: which pairs, and values from their sums."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from rgfast.ops.cka.call import Call

__all__ = ["TASKS", "Sums", "Wanted", "mirrored", "wanted_by"]

TASKS = ("cka", "matrix", "drift", "alignment")
# HSIC(K, K) below this fraction of (tr K)²/n is rounding, not variance.
_NO_VARIANCE = 1e-13


@dataclass(frozen=True)
class Wanted:
    """Which inner products of ``layers`` layers: of neighbours, of all, or of the first with the rest."""

    layers: int
    first: int
    near: bool

    def of(self, i: int) -> Iterator[slice]:
        """Layers that layer i is multiplied by, itself among them, none twice."""
        if self.near:
            yield slice(i, min(i + 2, self.layers))
        elif self.first < self.layers:
            yield slice(i, i + 1)
            if i < self.first:
                yield slice(self.first, self.layers)
        else:
            yield slice(i, self.layers)

    @property
    def pairs(self) -> int:
        """How many products there are."""
        return sum(part.stop - part.start for i in range(self.layers) for part in self.of(i))

    def each(self) -> list[tuple[int, int]]:
        """All of them."""
        return [
            (i, j) for i in range(self.layers) for part in self.of(i) for j in range(part.start, part.stop)
        ]


def wanted_by(call: Call) -> Wanted:
    sides = call.sides
    first, layers = len(sides[0]), sum(len(side) for side in sides)
    adjacent = call.task == "alignment" and dict(call.options)["adjacent"]
    return Wanted(layers, first, call.task == "drift" or adjacent)


@dataclass(frozen=True)
class Sums:
    """Of p positions: Σ_{i≠j} K_ij L_ij ``off`` and Σ_i K_ii L_ii ``same`` ``[p, L, L]``, traces ``[p, L]``.

    NaN where a product was not wanted.
    """

    off: Tensor
    same: Tensor
    trace: Tensor
    n: int

    @property
    def finite(self) -> Tensor:
        """Whether rows were finite ``[p]``."""
        return torch.isfinite(self.trace).all(1)

    def inner(self, debiased: bool) -> Tensor:
        """Inner products of the (U-)centred kernels."""
        if not debiased:
            return self.off + self.same
        n, both = self.n, self.trace[:, :, None] * self.trace[:, None]
        return self.off - 2.0 * self.same / (n - 2) + both / ((n - 1) * (n - 2))

    def own(self, inner: Tensor) -> Tensor:
        """Their diagonal, NaN for layers without variance."""
        own = inner.diagonal(0, 1, 2)
        return torch.where(own > _NO_VARIANCE * self.trace.square() / self.n, own, torch.nan)

    def ratio(self, debiased: bool) -> Tensor:
        """CKA ``[p, L, L]``, NaN beside layers without variance."""
        inner = self.inner(debiased)
        own = self.own(inner)
        # The root of the product, not the product of roots: identical layers then have a CKA of exactly 1.
        return inner / (own[:, :, None] * own[:, None]).sqrt()


def mirrored(upper: Tensor) -> Tensor:
    """``upper[..., L, L]`` with its upper triangle in the lower one, too."""
    layers = upper.shape[-1]
    lower = torch.ones(layers, layers, dtype=torch.bool, device=upper.device).tril(-1)
    return torch.where(lower, upper.mT, upper)
