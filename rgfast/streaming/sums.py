"""The running sums of many layers at many positions: adding, moving, merging and centring them.

For every layer and every position the rows are extended by two columns before anything is summed:
``z = [x - shift, |x - shift|^2, 1]``. One product ``z_i^T z_j`` per pair of layers then holds all the running
sums there are: the (cross) moment, column sums, the squared norms a_i with their sums and products that the
exact one-pass debiased HSIC needs, and the count. Moving the shift is a congruence ``T^T M T``, which is how
sums with different shifts merge exactly (Chan, Golub and LeVeque 1979, in matrix form) and how moments are
centred at the end.

Adding a block is the op of `rgfast.ops.moments`. Every other sum here is of new tensors, whose layout follows
from the shapes, on one thread.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rgfast.ops import moments
from rgfast.runtime.threads import one_thread
from rgfast.runtime.waiting import waits_for
from rgfast.streaming.algebra import (
    centred_cross,
    centred_norm_product,
    centred_trace,
    common_exponent,
    joint_mean,
    recentred,
    rescaled,
    scale_exponent,
)
from rgfast.streaming.factors import TriangularFactors

__all__ = ["Sums"]

_WORK_BYTES = 64 << 20
_NONE = -(1 << 40)


@dataclass
class Sums:
    """The sums of layers of ``widths`` d_l at P positions, fp64, each layer in units of 2^exponent.

    ``shift`` holds ``[P, d_l]`` of every layer, in true units, and ``begun[P]`` where it is set; ``moment``
    the products ``[P, d_i + 2, d_j + 2]`` of pairs (i, j), i ≤ j; ``exponents`` has None for a layer that was
    zero so far.
    """

    widths: tuple[int, ...]
    begun: Tensor
    exponents: list[int | None]
    shift: list[Tensor]
    moment: dict[tuple[int, int], Tensor]
    factors: TriangularFactors | None
    settled: bool = False  # whether it is known without looking that all positions have begun

    @classmethod
    def empty(
        cls,
        widths: Sequence[int],
        keys: Sequence[tuple[int, int]],
        positions: int,
        device: torch.device,
        factored: Sequence[int] = (),
    ) -> Sums:
        """Those of no rows, for the pairs ``keys``, with triangular factors of the layers ``factored``."""
        f64 = torch.float64
        return cls(
            widths=tuple(widths),
            begun=torch.zeros(positions, dtype=torch.bool, device=device),
            exponents=[None] * len(widths),
            shift=[torch.zeros(positions, d, dtype=f64, device=device) for d in widths],
            moment={
                (i, j): torch.zeros(positions, widths[i] + 2, widths[j] + 2, dtype=f64, device=device)
                for i, j in keys
            },
            factors=TriangularFactors(factored, widths, positions, device) if factored else None,
        )

    @property
    def positions(self) -> int:
        return len(self.begun)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        factors = 0 if self.factors is None else self.factors.nbytes
        return sum(t.numel() * t.element_size() for t in (*self.shift, *self.moment.values())) + factors

    def add(self, rows: Sequence[Tensor], keep: Tensor | None) -> None:
        """Add one block ``[P, b, d_l]``."""
        b = rows[0].shape[1]
        for layer, x in enumerate(rows):
            if self.exponents[layer] is None:
                self.exponents[layer] = scale_exponent(x, keep)
        self._settle_shift(rows, keep)
        moments.add_products(
            self.moment, rows, self.shift, keep=keep, exponents=[self.exponent(k) for k in range(len(rows))]
        )
        if self.factors is not None:
            for layer in self.factors.followed:
                self._add_to_factor(layer, rows[layer], keep)
        self.begun |= True if keep is None else keep.any(1)
        self.settled = self.settled or keep is None
        if self.factors is not None:
            self.factors.advance(b)

    @one_thread()
    def merge(self, other: Sums) -> None:
        """Add all of ``other``, of the same layers, pairs and positions; exact for different shifts."""
        mine, theirs = self.count(), other.count()
        move_a, move_b, rescale = [], [], []
        for layer in range(len(self.widths)):
            target = joint_mean(self.mean(layer), mine, other.mean(layer), theirs)
            self.exponents[layer], down_a, down_b = common_exponent(
                self.exponents[layer], other.exponents[layer]
            )
            unit = math.ldexp(1.0, -self.exponent(layer))
            move_a.append((self.shift[layer] - target) * unit)
            move_b.append((other.shift[layer] - target) * unit)
            rescale.append((down_a, down_b))
            self.shift[layer] = target
        for (i, j), moment in self.moment.items():
            a = recentred(rescaled(moment, rescale[i][0], rescale[j][0]), move_a[i], move_a[j])
            b = rescaled(other.moment[i, j], rescale[i][1], rescale[j][1])
            self.moment[i, j] = a.add_(recentred(b, move_b[i], move_b[j])).contiguous()
        self.begun = self.begun | other.begun
        if self.factors is not None:
            assert other.factors is not None
            self.factors.merge(other.factors, (move_a, move_b), rescale)

    @one_thread()
    def pooled(self, factored: Sequence[int]) -> Sums:
        """Those of the samples of all positions as one cloud, at a single position."""
        one = Sums.empty(self.widths, list(self.moment), 1, self.begun.device, factored)
        one.exponents = list(self.exponents)
        one.begun = self.begun.any().reshape(1)
        count = self.count()[:, None]
        moves = []
        for layer in range(len(self.widths)):
            mean = self.mean(layer)
            base = mean[count[:, 0] > 0][:1]  # differences from it vanish exactly for a constant column
            if not len(base):
                return one
            weighed = torch.where(count > 0, (mean - base) * count, 0.0).sum(0) / count.sum()
            one.shift[layer] = base + weighed
            unit = math.ldexp(1.0, -self.exponent(layer))
            moves.append((self.shift[layer] - one.shift[layer]) * unit)
        for (i, j), moment in self.moment.items():
            one.moment[i, j] = recentred(moment, moves[i], moves[j]).sum(0, keepdim=True).contiguous()
        if self.factors is not None and one.factors is not None:
            self.factors.pooled(moves, one.factors, count[:, 0] > 0)
        return one

    def at(self, part: slice, *, factors: bool) -> Sums:
        """A copy of some positions, with or without the factors."""
        return Sums(
            widths=self.widths,
            begun=self.begun[part].clone(),
            exponents=list(self.exponents),
            shift=[s[part].clone() for s in self.shift],
            moment={key: m[part].clone() for key, m in self.moment.items()},
            factors=self.factors.at(part) if factors and self.factors is not None else None,
        )

    def only(self, layers: Sequence[int]) -> Sums:
        """Some layers, numbered in the order given. It shares memory: it is only to be read."""
        new = {layer: k for k, layer in enumerate(layers)}
        moment = {}
        for (i, j), m in self.moment.items():
            if i in new and j in new:
                a, b = new[i], new[j]
                moment[min(a, b), max(a, b)] = m if a <= b else m.transpose(1, 2)
        return Sums(
            widths=tuple(self.widths[layer] for layer in layers),
            begun=self.begun,
            exponents=[self.exponents[layer] for layer in layers],
            shift=[self.shift[layer] for layer in layers],
            moment=moment,
            factors=None if self.factors is None else self.factors.only(layers),
        )

    def count(self) -> Tensor:
        """Number of rows that counted ``[P]``, fp64."""
        return (
            self.moment[0, 0][:, -1, -1]
            if self.moment
            else torch.zeros(0, dtype=torch.float64, device=self.begun.device)
        )

    def exponent(self, layer: int) -> int:
        """Exponent of the power of two that is a layer's unit."""
        return self.exponents[layer] or 0

    def mean(self, layer: int) -> Tensor:
        """``[P, d]`` in true units; NaN where nothing was counted."""
        d = self.widths[layer]
        unit = math.ldexp(1.0, self.exponent(layer))
        return self.shift[layer] + self.moment[layer, layer][:, :d, -1] / self.count()[:, None] * unit

    def keeps(self, i: int, j: int) -> bool:
        """Whether the products of two layers are there."""
        return (i, j) in self.moment or (j, i) in self.moment

    def cross(self, i: int, j: int) -> Tensor:
        """Σ x_c y_cᵀ ``[P, d_i, d_j]``, in the layers' units."""
        if (i, j) not in self.moment:
            return centred_cross(self.moment[j, i]).transpose(1, 2)
        return centred_cross(self.moment[i, j])

    def product(self, i: int, j: int, *, centred: bool, scaled: bool) -> Tensor:
        """Σ x_c y_cᵀ, or Σ x yᵀ, ``[P, d_i, d_j]`` in true units, or in the layers' for ``scaled``."""
        product = self.cross(i, j)
        if not centred:
            count = self.count()[:, None, None]
            mean_i, mean_j = (_times_power(self.mean(k), -self.exponent(k)) for k in (i, j))
            product = product + mean_i[:, :, None] * mean_j[:, None, :] * count
        if not scaled:
            product = _times_power(product, self.exponent(i) + self.exponent(j))
        return (product + product.transpose(1, 2)) / 2 if i == j else product

    def accumulated(self, layer: int, *, scaled: bool) -> Tensor:
        """Σ|x−shift|² ``[P]``, in true units, or in the layer's for ``scaled``."""
        trace = self.moment[layer, layer][:, -2, -1]
        return trace if scaled else _times_power(trace, 2 * self.exponent(layer))

    @one_thread()
    def trace(self, layer: int) -> Tensor:
        """Σ|x_c|² ``[P]``, in the layer's units."""
        return centred_trace(self.moment[layer, layer])

    @one_thread()
    def norm_product(self, i: int, j: int) -> Tensor:
        """Σ|x_c|²|y_c|² ``[P]``, in the layers' units."""
        moment = self.moment[i, j] if (i, j) in self.moment else self.moment[j, i].transpose(1, 2)
        return centred_norm_product(moment)

    def factor(self, layer: int, *, centred: bool, scaled: bool) -> Tensor:
        """R of a layer ``[P, d, d]``, or ``[P, d + 1, d]`` if not ``centred``; NaN where it was dropped."""
        assert self.factors is not None
        whole, exponent = self.factors.factor(layer), self.exponent(layer)
        found = whole[:, 1:, 1:]
        if not centred:
            shift = _times_power(self.shift[layer], -exponent)
            found = torch.addcmul(whole[:, :, 1:], whole[:, :, :1], shift[:, None])
        return found if scaled else _times_power(found, exponent)

    def state_dict(self) -> dict[str, np.ndarray[Any, Any]]:
        """Everything as named arrays (copies)."""
        arrays: dict[str, np.ndarray[Any, Any]] = {
            "pairs": np.array(sorted(self.moment), dtype=np.int64).reshape(-1, 2),
            "begun": self.begun.cpu().numpy().copy(),
            "exponent": np.array([_NONE if e is None else e for e in self.exponents], dtype=np.int64),
        }
        for layer, shift in enumerate(self.shift):
            arrays[f"shift.{layer}"] = shift.cpu().numpy().copy()
        for (i, j), moment in self.moment.items():
            arrays[f"moment.{i}.{j}"] = moment.cpu().numpy().copy()
        if self.factors is not None:
            arrays.update(self.factors.state_dict())
        return arrays

    def load_state_dict(self, arrays: Mapping[str, np.ndarray[Any, Any]]) -> None:
        """Replace everything by what :meth:`state_dict` returned for the same layers, pairs and positions."""

        def tensor(name: str) -> Tensor:
            # A copy in memory of torch's own: the library's bits depend on how its operands are aligned.
            return torch.from_numpy(np.array(arrays[name])).to(self.begun.device, copy=True)

        self.begun = tensor("begun")
        self.exponents = [None if e == _NONE else int(e) for e in arrays["exponent"]]
        self.shift = [tensor(f"shift.{layer}") for layer in range(len(self.widths))]
        self.moment = {(i, j): tensor(f"moment.{i}.{j}") for i, j in self.moment}
        if self.factors is not None:
            self.factors.load_state_dict(arrays)

    def _settle_shift(self, rows: Sequence[Tensor], keep: Tensor | None) -> None:
        """Shift of positions that see their first rows: the mean of these, exact for constant columns."""
        if self.settled:
            return
        new = ~self.begun
        if keep is not None:
            new = new & keep.any(1)
        if waits_for(new.device):  # means of all positions, since which ones are new is not known here
            for layer, x in enumerate(rows):
                shift = self.shift[layer]
                shift.copy_(torch.where(new[:, None], moments.first_mean(x, keep), shift))
            return
        for at in _split(new, rows):
            for layer, x in enumerate(rows):
                self.shift[layer][at] = moments.first_mean(x[at], None if keep is None else keep[at])

    def _add_to_factor(self, layer: int, rows: Tensor, keep: Tensor | None) -> None:
        """In chunks of positions, so that work space is bounded."""
        assert self.factors is not None
        positions, b, d = rows.shape
        step = max(1, _WORK_BYTES // (8 * b * (d + 1)))
        for start in range(0, positions, step):
            part = slice(start, min(start + step, positions))
            kept = None if keep is None else keep[part]
            z = torch.empty(part.stop - start, b, d + 1, dtype=torch.float64, device=rows.device)
            z[..., 0] = 1.0 if kept is None else kept.to(torch.float64)
            moments.shifted(rows[part], self.shift[layer][part], kept, self.exponent(layer), out=z[..., 1:])
            self.factors.update(layer, z, part)


def _split(which: Tensor, rows: Sequence[Tensor]) -> Sequence[Tensor]:
    """Indices where ``which[P]`` is True, in chunks whose rows ``rows[l][P, b, d]`` take bounded memory."""
    at = which.nonzero()[:, 0]
    widest = max((x.shape[2] for x in rows), default=1)
    return torch.split(at, max(1, _WORK_BYTES // max(1, 8 * rows[0].shape[1] * widest))) if len(at) else ()


def _times_power(x: Tensor, exponent: int) -> Tensor:
    """x · 2^exponent, infinite or zero where that is no fp64 number."""
    half = exponent // 2  # 2^exponent itself may be none
    return x * math.ldexp(1.0, half) * math.ldexp(1.0, exponent - half) if exponent else x
