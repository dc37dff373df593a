"""A measure beside its values under permutations of the samples."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

__all__ = ["Calibrated"]

# Two values that differ by less are equal: sums over samples in another order round otherwise.
_ROUNDING = 1e-12


@dataclass(frozen=True, eq=False)
class Calibrated:
    """A measure of representations, and what it is where samples have nothing to do with each other.

    ``value[...]`` is the measure itself, ``null[m, ...]`` the measure under each of m permutations; for lists
    of layers both end in ``[L, L']``. Values that are NaN (a layer without variance) have NaN everywhere.
    """

    value: Tensor
    null: Tensor
    alpha: float = 0.05
    maximum: float = 1.0

    @property
    def null_mean(self) -> Tensor:
        """The mean over permutations ``[...]``: what the measure shows of no relation at all."""
        return self.null.mean(0)

    @property
    def threshold(self) -> Tensor:
        """τ ``[...]``, the critical value: the ⌈(1 − α)(m + 1)⌉-th smallest of value and nulls together.

        For any m and data the value exceeds it with a probability of at most α if there is no relation.
        """
        everything = torch.cat([self.value[None], self.null])
        count = len(everything)
        at = min(max(math.ceil((1.0 - self.alpha) * count), 1), count) - 1
        return torch.where(self._undefined(), torch.nan, everything.sort(0).values[at])

    @property
    def score(self) -> Tensor:
        """(value − τ)/(maximum − τ) ``[...]``, at least 0 and at most 1: what is left above chance."""
        tau = self.threshold
        room = self.maximum - tau
        share = ((self.value - tau) / torch.where(room > 0, room, 1.0)).clamp(0.0, 1.0)
        return torch.where(self._undefined(), torch.nan, share)

    @property
    def p(self) -> Tensor:
        """(1 + #{null ≥ value})/(m + 1) ``[...]``; never below 1/(m + 1)."""
        return self._share_above(self.null)

    def best(self, *dims: int) -> Calibrated:
        """The largest value over ``dims`` (−2 and −1, all pairs of layers, if none are named), calibrated.

        The same maximum is taken under every permutation, so that p and score are corrected for the choice.
        ``best(-1)`` is every layer of x with the layer of y that it is most like. NaN is passed over, unless
        there is nothing else. Raises ValueError for dimensions that ``value`` lacks.
        """
        over = self._dims(dims)
        value, null = (_largest(values, over) for values in (self.value, self.null))
        return replace(self, value=value, null=null)

    def corrected_p(self, *dims: int) -> Tensor:
        """p ``[...]`` of every value against the maximum over ``dims`` of every permutation.

        Few of these are small by chance alone, however many values are read: with a probability of at most q
        any is q or less. ``dims`` and errors as in :meth:`best`.
        """
        most = _largest(self.null, self._dims(dims), keepdim=True)
        return self._share_above(most)

    def __repr__(self) -> str:
        if self.value.numel() != 1:
            return f"<Calibrated {list(self.value.shape)}, {len(self.null)} permutations>"
        numbers = {
            "value": self.value,
            "null_mean": self.null_mean,
            "threshold": self.threshold,
            "score": self.score,
            "p": self.p,
        }
        shown = ", ".join(f"{name}={float(number):.4g}" for name, number in numbers.items())
        return f"<Calibrated {shown}, {len(self.null)} permutations>"

    def _undefined(self) -> Tensor:
        return self.value.isnan() | self.null.isnan().any(0)

    def _share_above(self, null: Tensor) -> Tensor:
        equal = self.value - _ROUNDING * self.value.abs().clamp_min(1.0)
        share = (1.0 + (null >= equal).sum(0).to(torch.float64)) / (len(null) + 1.0)
        return torch.where(self._undefined(), torch.nan, share)

    def _dims(self, dims: tuple[int, ...]) -> tuple[int, ...]:
        count = self.value.dim()
        dims = dims or (-2, -1)
        if not all(-count <= d < count for d in dims):
            raise ValueError(f"dims must be of the {count} dimensions of value, got {dims}")
        return tuple(d if d < 0 else d - count for d in dims)


def _largest(values: Tensor, dims: tuple[int, ...], keepdim: bool = False) -> Tensor:
    most = values.masked_fill(values.isnan(), -torch.inf).amax(dims, keepdim=keepdim)
    return most.masked_fill(most == -torch.inf, torch.nan)
