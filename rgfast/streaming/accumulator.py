"""Second and cross moments of many layers at once, streamed: one Gram serves spectra, CKA and drift.

For every layer and every leading index ("position") the rows are extended by two columns before anything is
summed: ``z = [x - shift, |x - shift|^2, 1]``. One product ``z_i^T z_j`` per pair of layers then holds all
the running sums there are: the (cross) moment, column sums, the squared norms a_i with their sums and
products that the exact one-pass debiased HSIC needs, and the count. Moving the shift is a congruence
``T^T M T``, which is how accumulators with different shifts merge exactly (Chan, Golub and LeVeque 1979, in
matrix form) and how moments are centred at the end.

Rows are summed in blocks that begin at fixed sample indices, so the bits of a result depend neither on how
the samples were cut into batches nor on the number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

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
from rgfast.streaming.block import OpenBlock
from rgfast.streaming.factors import TriangularFactors
from rgfast.streaming.finite import check_finite
from rgfast.streaming.pairs import PairMoments
from rgfast.streaming.sizes import BLOCK_ROWS, Pairs, as_pairs, block_rows, first_block, pair_keys
from rgfast.validation import as_real_tensor, check_choice

__all__ = ["MomentAccumulator"]

_PENDING_BYTES = 256 << 20
_WORK_BYTES = 64 << 20
_NONE = -(1 << 40)


class MomentAccumulator:
    """Streaming fp64 moments of L layers, ``[*, rows, d_l]`` each, for every leading index.

    ``pairs`` names the cross moments to keep: ``"adjacent"``, ``"all"``, or (i, j) index pairs. The widths,
    the leading shape and the number of layers are fixed by the first :meth:`update`. ``pending_bytes`` bounds
    the rows held back until a block of (at most 128) rows per position is full. ``factors`` names layers of
    which triangular factors are kept as well, where their rows are ill conditioned (see :mod:`.factors`).

    >>> import torch
    >>> x = torch.arange(12.0, dtype=torch.float64).reshape(2, 6, 1)[..., [0, 0]]
    >>> acc = MomentAccumulator()
    >>> acc.update([x, 2 * x]).count
    tensor([6, 6])
    >>> acc.cross(0, 1)[0, 0, 0]
    tensor(35., dtype=torch.float64)
    """

    def __init__(
        self,
        *,
        pairs: Pairs = "adjacent",
        pending_bytes: int = _PENDING_BYTES,
        factors: Sequence[int] = (),
    ) -> None:
        self._asked = as_pairs(pairs)
        self._pending_bytes = int(pending_bytes)
        self._factored = tuple(factors)
        self._clear()

    def _clear(self) -> None:
        self._lead: tuple[int, ...] | None = None
        self._widths: tuple[int, ...] = ()
        self._block = OpenBlock((), 0, BLOCK_ROWS, torch.device("cpu"))
        self._factors: TriangularFactors | None = None
        self._shift: list[Tensor] = []  # [P, d_l] each
        self._begun = torch.zeros(0, dtype=torch.bool)  # [P]: the shift is set
        self._exponent: list[int | None] = []
        self._moment: dict[tuple[int, int], Tensor] = {}  # [P, d_i + 2, d_j + 2]

    @property
    def lead(self) -> tuple[int, ...]:
        """The leading shape ``*``, () before the first update."""
        return self._lead or ()

    @property
    def widths(self) -> tuple[int, ...]:
        """d_l of every layer, () before the first update."""
        return self._widths

    @property
    def pairs(self) -> tuple[tuple[int, int], ...]:
        """The (i, j), i < j, whose cross moments are kept."""
        return tuple(key for key in pair_keys(self._asked, len(self._widths)) if key[0] != key[1])

    @property
    def pairs_asked(self) -> Pairs:
        """``pairs`` as it was given."""
        return self._asked

    @property
    def factored(self) -> tuple[int, ...]:
        """The layers that ``factors`` named."""
        return self._factored

    @property
    def rows_at_once(self) -> int:
        """Rows per position that are summed at once."""
        return self._block.size

    @property
    def nbytes(self) -> int:
        """Bytes held now, rows of the open block included."""
        factors = 0 if self._factors is None else self._factors.nbytes
        held = sum(t.numel() * t.element_size() for t in (*self._shift, *self._moment.values()))
        return held + self._block.nbytes + factors

    def update(
        self, layers: Sequence[Tensor] | Tensor, mask: Tensor | None = None, *, finite: bool = False
    ) -> MomentAccumulator:
        """Itself, with the rows of one batch added.

        ``layers[l]`` is ``[*, rows, d_l]`` of any float dtype; all share ``*`` and rows. ``mask[*, rows]``
        (bool) keeps the rows where it is True; None keeps all. Rows that are not kept may hold anything.
        ``finite=True`` says that the caller has looked for NaN and infinity.
        Raises TypeError or ValueError for wrong kinds or shapes and :class:`NonFiniteError` for NaN or
        infinity in a row that counts; after an error nothing of the batch has been added.
        """
        flat, keep = self._checked(layers, mask, finite)
        rows, at = flat[0].shape[1], 0
        while at < rows:
            take = min(rows - at, self._block.size - self._block.filled)
            piece = [x[:, at : at + take] for x in flat]
            kept = None if keep is None else keep[:, at : at + take]
            if take == self._block.size:
                self._sum(piece, kept)
            else:
                self._block.hold(piece, kept)
                if self._block.filled == self._block.size:
                    self.flush()
            at += take
        return self

    def flush(self) -> None:
        """Sum the rows of the open block now. The next block begins at the next sample.

        Every finalizer and :meth:`merge` does this, so bits depend on where results were read (though not on
        the batches in between); :meth:`state_dict` does not.
        """
        if self._block.filled:
            self._sum(*self._block.take())

    def merge(self, other: MomentAccumulator) -> MomentAccumulator:
        """Itself, with all that ``other`` has seen added; exact for different shifts. ``other`` is unchanged
        but for its open block being summed. Raises ValueError where layers, widths or positions differ."""
        if other._lead is None:
            return self
        other.flush()
        if self._lead is None:
            if set(other._moment) != set(pair_keys(self._asked, len(other._widths))):
                raise ValueError(f"other must keep the pairs {self._asked!r}, got {other._asked!r}")
            self._check_factored(other)
            return self._take(other, slice(None), other._lead)
        if (self._lead, self._widths) != (other._lead, other._widths) or set(self._moment) != set(
            other._moment
        ):
            raise ValueError(
                f"other must have leading shape {self.lead}, widths {self._widths} and the same pairs, "
                f"got {other.lead}, {other._widths}"
            )
        self._check_factored(other)
        self.flush()
        mine, theirs = self._count(), other._count()
        move_a, move_b, rescale = [], [], []
        for layer in range(len(self._widths)):
            target = joint_mean(self._mean(layer), mine, other._mean(layer), theirs)
            self._exponent[layer], down_a, down_b = common_exponent(
                self._exponent[layer], other._exponent[layer]
            )
            unit = math.ldexp(1.0, -(self._exponent[layer] or 0))
            move_a.append((self._shift[layer] - target) * unit)
            move_b.append((other._shift[layer] - target) * unit)
            rescale.append((down_a, down_b))
            self._shift[layer] = target
        for (i, j), moment in self._moment.items():
            a = recentred(rescaled(moment, rescale[i][0], rescale[j][0]), move_a[i], move_a[j])
            b = rescaled(other._moment[i, j], rescale[i][1], rescale[j][1])
            self._moment[i, j] = a.add_(recentred(b, move_b[i], move_b[j]))
        self._begun = self._begun | other._begun
        if self._factors is not None:
            assert other._factors is not None
            self._factors.merge(other._factors, (move_a, move_b), rescale)
        return self

    def pooled(self) -> MomentAccumulator:
        """A new accumulator with leading shape (): the samples of all leading indices as one cloud."""
        self.flush()
        if self._lead is None:
            return self._like()
        one = self._like()
        one._begin((), self._widths, self._begun.device)
        one._exponent = list(self._exponent)
        one._begun = self._begun.any().reshape(1)
        count = self._count()[:, None]
        moves = []
        for layer in range(len(self._widths)):
            mean = self._mean(layer)
            base = mean[count[:, 0] > 0][:1]  # differences from it vanish exactly for a constant column
            if not len(base):
                return one
            weighed = torch.where(count > 0, (mean - base) * count, 0.0).sum(0) / count.sum()
            one._shift[layer] = base + weighed
            unit = math.ldexp(1.0, -(self._exponent[layer] or 0))
            moves.append((self._shift[layer] - one._shift[layer]) * unit)
        for (i, j), moment in self._moment.items():
            one._moment[i, j] = recentred(moment, moves[i], moves[j]).sum(0, keepdim=True)
        if self._factors is not None and one._factors is not None:
            self._factors.pooled(moves, one._factors, count[:, 0] > 0)
        return one

    def at(self, index: int) -> MomentAccumulator:
        """A new accumulator with leading shape (): a copy of flattened leading index ``index``."""
        self.flush()
        return self._like()._take(self, slice(index, index + 1), ())

    def only(self, layers: Sequence[int]) -> MomentAccumulator:
        """A view of some layers, numbered in the order given. It shares memory: it is only to be read."""
        self.flush()
        part = MomentAccumulator(pairs=[])
        new = {layer: k for k, layer in enumerate(layers)}
        part._asked = [(new[i], new[j]) for i, j in self.pairs if i in new and j in new]
        part._lead, part._widths = self._lead, tuple(self._widths[layer] for layer in layers)
        part._begun = self._begun
        part._exponent = [self._exponent[layer] for layer in layers]
        part._shift = [self._shift[layer] for layer in layers]
        for (i, j), moment in self._moment.items():
            if i in new and j in new:
                a, b = new[i], new[j]
                part._moment[min(a, b), max(a, b)] = moment if a <= b else moment.transpose(1, 2)
        part._factored = tuple(sorted(new[layer] for layer in self._factored if layer in new))
        if self._factors is not None:
            part._factors = self._factors.only(layers)
        return part

    @property
    def count(self) -> Tensor:
        """Number of rows that counted ``[*]``, int64."""
        self.flush()
        return self._shaped(self._count()).to(torch.int64)

    def mean(self, layer: int) -> Tensor:
        """Mean over samples of a layer ``[*, d]``, fp64; NaN where nothing was counted."""
        self.flush()
        return self._shaped(self._mean(layer))

    def exponent(self, layer: int) -> int:
        """Exponent of the power of two that is a layer's unit: 0 but for data so far from 1 that squares of
        them might not be fp64 numbers. What is asked for ``scaled`` comes in this unit."""
        return self._exponent[layer] or 0

    def scatter(
        self, layer: int, *, centering: Literal["mean", "none"] = "mean", scaled: bool = False
    ) -> Tensor:
        """Σ (x−μ)(x−μ)ᵀ over samples of a layer ``[*, d, d]``, fp64; ``centering="none"`` gives Σ x xᵀ."""
        self.flush()
        return self._shaped(self._product(layer, layer, centering, scaled))

    def accumulated(self, layer: int, *, scaled: bool = False) -> Tensor:
        """Σ|x−shift|² over samples of a layer ``[*]``, fp64: what its rounding errors scale with."""
        self.flush()
        trace = self._moment[layer, layer][:, -2, -1]
        return self._shaped(trace if scaled else _times_power(trace, 2 * self.exponent(layer)))

    def cross(self, i: int, j: int, *, centering: Literal["mean", "none"] = "mean") -> Tensor:
        """Σ (x−μ_x)(y−μ_y)ᵀ of layers i and j ``[*, d_i, d_j]``, fp64; ``centering="none"`` gives Σ x yᵀ.

        Raises ValueError for a pair that is not kept.
        """
        self.flush()
        return self._shaped(self._product(i, j, centering, False))

    def factor(
        self, layer: int, *, centering: Literal["mean", "none"] = "mean", scaled: bool = False
    ) -> Tensor | None:
        """R of a layer, fp64, with RᵀR its scatter and singular values good to a few u of the largest.

        ``[*, d, d]``, or ``[*, d + 1, d]`` for ``centering="none"``; NaN at positions where none was needed,
        None for a layer that ``factors`` does not name.
        """
        self.flush()
        if self._factors is None or layer not in self._factored:
            return None
        check_choice(centering, "centering", ("mean", "none"))
        whole, exponent = self._factors.factor(layer), self.exponent(layer)
        found = whole[:, 1:, 1:]
        if centering == "none":
            shift = _times_power(self._shift[layer], -exponent)
            found = torch.addcmul(whole[:, :, 1:], whole[:, :, :1], shift[:, None])
        return self._shaped(found if scaled else _times_power(found, exponent))

    def pair(self, i: int, j: int) -> PairMoments:
        """All centred sums of two layers (i = j allowed) that biased and debiased HSIC are made of."""
        self.flush()
        return PairMoments(
            count=self._shaped(self._count()).to(torch.int64),
            cross=self._shaped(self._cross(i, j)),
            trace_i=self._shaped(centred_trace(self._kept(i, i))),
            trace_j=self._shaped(centred_trace(self._kept(j, j))),
            norm_product=self._shaped(centred_norm_product(self._kept(i, j))),
            exponent_i=self._exponent[i] or 0,
            exponent_j=self._exponent[j] or 0,
        )

    def state_dict(self) -> dict[str, np.ndarray[Any, Any]]:
        """Everything as named arrays (copies), open block included: restoring continues with equal bits."""
        held, keep = self._block.contents()
        arrays: dict[str, np.ndarray[Any, Any]] = {
            "lead": np.array([-1] if self._lead is None else self._lead, dtype=np.int64),
            "widths": np.array(self._widths, dtype=np.int64),
            "pairs": np.array(sorted(self._moment), dtype=np.int64).reshape(-1, 2),
            "block": np.array([self._block.size, self._block.filled], dtype=np.int64),
            "begun": self._begun.cpu().numpy().copy(),
            "exponent": np.array([_NONE if e is None else e for e in self._exponent], dtype=np.int64),
            "keep": keep.cpu().numpy().copy(),
        }
        for layer, shift in enumerate(self._shift):
            arrays[f"shift.{layer}"] = shift.cpu().numpy().copy()
            rows = held[layer] if self._block.filled else torch.zeros(0)
            arrays[f"rows.{layer}"] = rows.cpu().to(torch.float64).numpy().copy()
        for (i, j), moment in self._moment.items():
            arrays[f"moment.{i}.{j}"] = moment.cpu().numpy().copy()
        if self._factors is not None:
            arrays.update(self._factors.state_dict())
        return arrays

    def load_state_dict(
        self, arrays: Mapping[str, np.ndarray[Any, Any]], device: torch.device | str = "cpu"
    ) -> None:
        """Replace everything by what :meth:`state_dict` returned. Raises ValueError for other pairs."""
        widths = tuple(int(d) for d in arrays["widths"])
        lead = tuple(int(n) for n in arrays["lead"])
        if lead == (-1,):
            self._clear()
            return
        keys = [(int(i), int(j)) for i, j in arrays["pairs"]]
        if set(keys) != set(pair_keys(self._asked, len(widths))):
            raise ValueError(f"state must hold the pairs {self._asked!r}, got {keys}")

        def tensor(name: str) -> Tensor:
            return torch.from_numpy(np.array(arrays[name])).to(device)

        self._begin(lead, widths, torch.device(device))
        size, filled = (int(v) for v in arrays["block"])
        self._block = OpenBlock(widths, len(self._begun), size, self._begun.device)
        self._begun = tensor("begun")
        self._exponent = [None if e == _NONE else int(e) for e in arrays["exponent"]]
        self._shift = [tensor(f"shift.{layer}") for layer in range(len(widths))]
        self._moment = {(i, j): tensor(f"moment.{i}.{j}") for i, j in keys}
        if self._factors is not None:
            self._factors.load_state_dict(arrays)
        if filled:
            self._block.hold([tensor(f"rows.{layer}") for layer in range(len(widths))], tensor("keep"))

    def _take(self, other: MomentAccumulator, part: slice, lead: tuple[int, ...]) -> MomentAccumulator:
        """Itself, made a copy of some flattened positions of ``other``."""
        self._lead, self._widths = lead, other._widths
        self._begun = other._begun[part].clone()
        self._block = self._new_block(len(self._begun), self._begun.device)
        self._exponent = list(other._exponent)
        self._shift = [s[part].clone() for s in other._shift]
        self._moment = {key: m[part].clone() for key, m in other._moment.items()}
        if self._factored and other._factors is not None:
            self._factors = other._factors.at(part)
        return self

    def _like(self) -> MomentAccumulator:
        """An empty one with the same options."""
        return MomentAccumulator(pairs=self._asked, pending_bytes=self._pending_bytes, factors=self._factored)

    def _check_factored(self, other: MomentAccumulator) -> None:
        if self._factored and self._factored != other._factored:
            raise ValueError(
                f"other must keep factors of the layers {list(self._factored)}, got {list(other._factored)}"
            )

    def _new_block(self, positions: int, device: torch.device) -> OpenBlock:
        most = first_block(self._widths, self._factored)
        size = block_rows(positions, self._widths, self._pending_bytes, most)
        return OpenBlock(self._widths, positions, size, device)

    def _checked(
        self, layers: Sequence[Tensor] | Tensor, mask: Tensor | None, finite: bool
    ) -> tuple[list[Tensor], Tensor | None]:
        seq = [as_real_tensor(x, f"layers[{k}]", min_dim=2) for k, x in enumerate(layers)]
        if not seq:
            raise ValueError("layers must hold at least one layer, got none")
        lead, rows = tuple(seq[0].shape[:-2]), seq[0].shape[-2]
        for k, x in enumerate(seq):
            if tuple(x.shape[:-1]) != (*lead, rows):
                raise ValueError(
                    f"layers must agree in all but the last dimension: layers[0] is {tuple(seq[0].shape)}, "
                    f"layers[{k}] is {tuple(x.shape)}"
                )
        widths = tuple(x.shape[-1] for x in seq)
        if self._lead is not None and (lead, widths) != (self._lead, self._widths):
            raise ValueError(
                f"layers must keep leading shape {self._lead} and widths {self._widths} of the first update, "
                f"got {lead} and {widths}"
            )
        if mask is not None:
            if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
                raise TypeError(
                    f"mask must be a bool tensor, got {getattr(mask, 'dtype', type(mask).__name__)}"
                )
            if tuple(mask.shape) != (*lead, rows):
                raise ValueError(f"mask must have shape {(*lead, rows)}, got {tuple(mask.shape)}")
            mask = mask.to(seq[0].device)
        if not finite:
            for k, x in enumerate(seq):
                check_finite(x, mask, k)
        if self._lead is None:
            self._begin(lead, widths, seq[0].device)
        positions = math.prod(lead)
        flat = [x.detach().reshape(positions, rows, x.shape[-1]) for x in seq]
        return flat, None if mask is None else mask.reshape(positions, rows)

    def _begin(self, lead: tuple[int, ...], widths: tuple[int, ...], device: torch.device) -> None:
        keys = pair_keys(self._asked, len(widths))
        positions = math.prod(lead)
        self._lead, self._widths = lead, widths
        self._block = self._new_block(positions, device)
        self._begun = torch.zeros(positions, dtype=torch.bool, device=device)
        self._exponent = [None] * len(widths)
        f64 = torch.float64
        self._shift = [torch.zeros(positions, d, dtype=f64, device=device) for d in widths]
        self._moment = {
            (i, j): torch.zeros(positions, widths[i] + 2, widths[j] + 2, dtype=f64, device=device)
            for i, j in keys
        }
        if self._factored:
            self._factors = TriangularFactors(self._factored, widths, positions, device)

    def _sum(self, rows: list[Tensor], keep: Tensor | None) -> None:
        """Add one block ``[P, b, d_l]``: in chunks of positions, so that work space is bounded."""
        positions, b = rows[0].shape[0], rows[0].shape[1]
        for layer, x in enumerate(rows):
            if self._exponent[layer] is None:
                self._exponent[layer] = scale_exponent(x, keep)
        per_position = 8 * b * sum(d + 2 for d in self._widths)
        chunk = max(1, _WORK_BYTES // per_position)
        for start in range(0, positions, chunk):
            part = slice(start, min(start + chunk, positions))
            kept = None if keep is None else keep[part]
            self._settle_shift([x[part] for x in rows], kept, part)
            z = [self._extended(layer, x[part], kept, part) for layer, x in enumerate(rows)]
            for (i, j), moment in self._moment.items():
                moment[part].baddbmm_(z[i].transpose(1, 2), z[j])
            for layer in self._factored:
                assert self._factors is not None
                self._factors.update(layer, z[layer], part)
        self._begun |= True if keep is None else keep.any(1)
        if self._factors is not None:
            self._factors.advance(b)

    def _settle_shift(self, rows: list[Tensor], keep: Tensor | None, part: slice) -> None:
        """Shift of positions that see their first rows: the mean of these, exact for constant columns."""
        new = ~self._begun[part]
        if keep is not None:
            new = new & keep.any(1)
        if not bool(new.any()):
            return
        for layer, x in enumerate(rows):
            fresh = x[new].to(torch.float64)  # [m, b, d]
            if keep is None:
                first, number = fresh[:, :1], torch.tensor(float(x.shape[1]))
                off = fresh - first
            else:
                kept = keep[new]
                first = fresh[torch.arange(len(fresh), device=x.device), kept.to(torch.uint8).argmax(1)][
                    :, None
                ]
                number = kept.sum(1, keepdim=True).to(torch.float64)
                off = (fresh - first).masked_fill_(~kept[..., None], 0.0)
            self._shift[layer][part][new] = first[:, 0] + off.sum(1) / number.to(x.device)

    def _extended(self, layer: int, rows: Tensor, keep: Tensor | None, part: slice) -> Tensor:
        """``[x − shift, |x − shift|², 1]`` of a block in the layer's units, rows not kept zero."""
        d = self._widths[layer]
        z = torch.empty(*rows.shape[:2], d + 2, dtype=torch.float64, device=rows.device)
        body = z[..., :d]
        body.copy_(rows)
        body.sub_(self._shift[layer][part][:, None])
        if keep is None:
            z[..., d + 1] = 1.0
        else:
            body.masked_fill_(~keep[..., None], 0.0)
            z[..., d + 1] = keep.to(torch.float64)
        if self._exponent[layer]:
            body.mul_(math.ldexp(1.0, -int(self._exponent[layer] or 0)))
        torch.sum(body.square(), -1, out=z[..., d])
        return z

    def _count(self) -> Tensor:
        return self._moment[0, 0][:, -1, -1] if self._moment else torch.zeros(0, dtype=torch.float64)

    def _mean(self, layer: int) -> Tensor:
        """[P, d] in true units."""
        d = self._widths[layer]
        unit = math.ldexp(1.0, self._exponent[layer] or 0)
        return self._shift[layer] + self._moment[layer, layer][:, :d, -1] / self._count()[:, None] * unit

    def _kept(self, i: int, j: int) -> Tensor:
        if (i, j) in self._moment:
            return self._moment[i, j]
        if (j, i) in self._moment:
            return self._moment[j, i].transpose(1, 2)
        raise ValueError(f"the pair {(i, j)} is not kept: this accumulator was made with {self._asked!r}")

    def _cross(self, i: int, j: int) -> Tensor:
        """Σ x_c y_cᵀ ``[P, d_i, d_j]``, in the layers' units."""
        if (i, j) not in self._moment and (j, i) in self._moment:
            return self._cross(j, i).transpose(1, 2)
        return centred_cross(self._kept(i, j))

    def _product(self, i: int, j: int, centering: str, scaled: bool) -> Tensor:
        check_choice(centering, "centering", ("mean", "none"))
        product = self._cross(i, j)
        if centering == "none":
            count = self._count()[:, None, None]
            mean_i, mean_j = (_times_power(self._mean(k), -self.exponent(k)) for k in (i, j))
            product = product + mean_i[:, :, None] * mean_j[:, None, :] * count
        if not scaled:
            product = _times_power(product, self.exponent(i) + self.exponent(j))
        return (product + product.transpose(1, 2)) / 2 if i == j else product

    def _shaped(self, x: Tensor) -> Tensor:
        return x.reshape((*self.lead, *x.shape[1:]))


def _times_power(x: Tensor, exponent: int) -> Tensor:
    """x · 2^exponent, infinite or zero where that is no fp64 number."""
    half = exponent // 2  # 2^exponent itself may be none
    return x * math.ldexp(1.0, half) * math.ldexp(1.0, exponent - half) if exponent else x
