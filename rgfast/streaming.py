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
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from rgfast.validation import as_real_tensor

__all__ = [
    "MomentAccumulator",
    "NonFiniteError",
    "PairMoments",
    "as_pairs",
    "block_rows",
    "check_finite",
    "pair_keys",
    "state_bytes",
]

Pairs = Literal["adjacent", "all"] | Sequence[tuple[int, int]]

_BLOCK_ROWS = 128
_PENDING_BYTES = 256 << 20
_WORK_BYTES = 64 << 20


class NonFiniteError(ValueError):
    """A row that counts holds NaN or infinity; ``layer``, ``position`` and ``count`` say where and how."""

    def __init__(self, layer: int, position: tuple[int, ...], count: int) -> None:
        where = f", position {position[0] if len(position) == 1 else position}" if position else ""
        super().__init__(f"layers must be finite, got {count} NaN or infinite values in layer {layer}{where}")
        self.layer, self.position, self.count = layer, position, count


@dataclass(frozen=True)
class PairMoments:
    """Centred sums over the n samples of two layers, in units of 2^exponent of each layer.

    ``cross`` is Σ x_c y_cᵀ ``[*, d_i, d_j]``; ``trace_i`` and ``trace_j`` are Σ|x_c|² and Σ|y_c|² ``[*]``;
    ``norm_product`` is Σ|x_c|²|y_c|² ``[*]``; ``count`` is n ``[*]``. All fp64. A true value is the value
    here times 2^exponent for every power of x (y) in it; in a ratio such as CKA the exponents cancel.
    """

    count: Tensor
    cross: Tensor
    trace_i: Tensor
    trace_j: Tensor
    norm_product: Tensor
    exponent_i: int
    exponent_j: int


def state_bytes(widths: Sequence[int], positions: int, pairs: Pairs = "adjacent") -> int:
    """Bytes that an accumulator over ``positions`` leading indices holds, without rows not yet summed."""
    keys = pair_keys(pairs, len(widths))
    entries = sum((widths[i] + 2) * (widths[j] + 2) for i, j in keys) + sum(widths)
    return 8 * positions * entries


class MomentAccumulator:
    """Streaming fp64 moments of L layers, ``[*, rows, d_l]`` each, for every leading index.

    ``pairs`` names the cross moments to keep: ``"adjacent"``, ``"all"``, or (i, j) index pairs. The widths,
    the leading shape and the number of layers are fixed by the first :meth:`update`. ``pending_bytes`` bounds
    the rows held back until a block of (at most 128) rows per position is full.

    >>> import torch
    >>> x = torch.arange(12.0, dtype=torch.float64).reshape(2, 6, 1)[..., [0, 0]]
    >>> acc = MomentAccumulator()
    >>> acc.update([x, 2 * x]).count
    tensor([6, 6])
    >>> acc.cross(0, 1)[0, 0, 0]
    tensor(35., dtype=torch.float64)
    """

    def __init__(self, *, pairs: Pairs = "adjacent", pending_bytes: int = _PENDING_BYTES) -> None:
        self._asked = as_pairs(pairs)
        self._pending_bytes = int(pending_bytes)
        self._clear()

    def _clear(self) -> None:
        self._lead: tuple[int, ...] | None = None
        self._widths: tuple[int, ...] = ()
        self._block = _BLOCK_ROWS
        self._shift: list[Tensor] = []  # [P, d_l] each
        self._begun = torch.zeros(0, dtype=torch.bool)  # [P]: the shift is set
        self._exponent: list[int | None] = []
        self._moment: dict[tuple[int, int], Tensor] = {}  # [P, d_i + 2, d_j + 2]
        self._rows: list[Tensor] = []  # [P, block, d_l]: rows of the open block
        self._keep = torch.zeros(0, 0, dtype=torch.bool)  # [P, block]
        self._filled = 0

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
    def rows_at_once(self) -> int:
        """Rows per position that are summed at once."""
        return self._block

    @property
    def nbytes(self) -> int:
        """Bytes held now, rows of the open block included."""
        held = [*self._shift, *self._moment.values(), *self._rows, self._keep]
        return sum(t.numel() * t.element_size() for t in held)

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
            take = min(rows - at, self._block - self._filled)
            piece = [x[:, at : at + take] for x in flat]
            kept = None if keep is None else keep[:, at : at + take]
            if take == self._block:
                self._sum(piece, kept)
            else:
                self._hold(piece, kept)
            at += take
        return self

    def flush(self) -> None:
        """Sum the rows of the open block now. The next block begins at the next sample.

        Every finalizer and :meth:`merge` does this, so bits depend on where results were read (though not on
        the batches in between); :meth:`state_dict` does not.
        """
        if self._filled:
            filled, self._filled = self._filled, 0
            keep = self._keep[:, :filled]
            self._sum([x[:, :filled] for x in self._rows], None if bool(keep.all()) else keep)

    def merge(self, other: MomentAccumulator) -> MomentAccumulator:
        """Itself, with all that ``other`` has seen added; exact for different shifts. ``other`` is unchanged
        but for its open block being summed. Raises ValueError where layers, widths or positions differ."""
        if other._lead is None:
            return self
        other.flush()
        if self._lead is None:
            if set(other._moment) != set(pair_keys(self._asked, len(other._widths))):
                raise ValueError(f"other must keep the pairs {self._asked!r}, got {other._asked!r}")
            return self._take(other, slice(None), other._lead)
        if (self._lead, self._widths) != (other._lead, other._widths) or set(self._moment) != set(
            other._moment
        ):
            raise ValueError(
                f"other must have leading shape {self.lead}, widths {self._widths} and the same pairs, "
                f"got {other.lead}, {other._widths}"
            )
        self.flush()
        mine, theirs = self._count(), other._count()
        move_a, move_b, rescale = [], [], []
        for layer in range(len(self._widths)):
            target = _joint_mean(self._mean(layer), mine, other._mean(layer), theirs)
            self._exponent[layer], down_a, down_b = _common(self._exponent[layer], other._exponent[layer])
            unit = math.ldexp(1.0, -(self._exponent[layer] or 0))
            move_a.append((self._shift[layer] - target) * unit)
            move_b.append((other._shift[layer] - target) * unit)
            rescale.append((down_a, down_b))
            self._shift[layer] = target
        for (i, j), moment in self._moment.items():
            a = _recentred(_rescaled(moment, rescale[i][0], rescale[j][0]), move_a[i], move_a[j])
            b = _rescaled(other._moment[i, j], rescale[i][1], rescale[j][1])
            self._moment[i, j] = a.add_(_recentred(b, move_b[i], move_b[j]))
        self._begun = self._begun | other._begun
        return self

    def pooled(self) -> MomentAccumulator:
        """A new accumulator with leading shape (): the samples of all leading indices as one cloud."""
        self.flush()
        if self._lead is None:
            return MomentAccumulator(pairs=self._asked)
        one = MomentAccumulator(pairs=self._asked, pending_bytes=self._pending_bytes)
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
            one._moment[i, j] = _recentred(moment, moves[i], moves[j]).sum(0, keepdim=True)
        return one

    def at(self, index: int) -> MomentAccumulator:
        """A new accumulator with leading shape (): a copy of flattened leading index ``index``."""
        self.flush()
        one = MomentAccumulator(pairs=self._asked, pending_bytes=self._pending_bytes)
        return one._take(self, slice(index, index + 1), ())

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

    def scatter(self, layer: int, *, centering: Literal["mean", "none"] = "mean") -> Tensor:
        """Σ (x−μ)(x−μ)ᵀ over samples of a layer ``[*, d, d]``, fp64; ``centering="none"`` gives Σ x xᵀ."""
        self.flush()
        return self._shaped(self._product(layer, layer, centering))

    def accumulated(self, layer: int) -> Tensor:
        """Σ|x−shift|² over samples of a layer ``[*]``, fp64: what its rounding errors scale with."""
        self.flush()
        d = self._widths[layer]
        unit = math.ldexp(1.0, 2 * (self._exponent[layer] or 0))
        return self._shaped(self._moment[layer, layer][:, d, d + 1] * unit)

    def cross(self, i: int, j: int, *, centering: Literal["mean", "none"] = "mean") -> Tensor:
        """Σ (x−μ_x)(y−μ_y)ᵀ of layers i and j ``[*, d_i, d_j]``, fp64; ``centering="none"`` gives Σ x yᵀ.

        Raises ValueError for a pair that is not kept.
        """
        self.flush()
        return self._shaped(self._product(i, j, centering))

    def pair(self, i: int, j: int) -> PairMoments:
        """All centred sums of two layers (i = j allowed) that biased and debiased HSIC are made of."""
        self.flush()
        return PairMoments(
            count=self._shaped(self._count()).to(torch.int64),
            cross=self._shaped(self._cross(i, j)),
            trace_i=self._shaped(self._trace(i)),
            trace_j=self._shaped(self._trace(j)),
            norm_product=self._shaped(self._norm_product(i, j)),
            exponent_i=self._exponent[i] or 0,
            exponent_j=self._exponent[j] or 0,
        )

    def state_dict(self) -> dict[str, np.ndarray[Any, Any]]:
        """Everything as named arrays (copies), open block included: restoring continues with equal bits."""
        arrays: dict[str, np.ndarray[Any, Any]] = {
            "lead": np.array([-1] if self._lead is None else self._lead, dtype=np.int64),
            "widths": np.array(self._widths, dtype=np.int64),
            "pairs": np.array(sorted(self._moment), dtype=np.int64).reshape(-1, 2),
            "block": np.array([self._block, self._filled], dtype=np.int64),
            "begun": self._begun.cpu().numpy().copy(),
            "exponent": np.array([_NONE if e is None else e for e in self._exponent], dtype=np.int64),
            "keep": self._keep[:, : self._filled].cpu().numpy().copy(),
        }
        for layer, shift in enumerate(self._shift):
            arrays[f"shift.{layer}"] = shift.cpu().numpy().copy()
            rows = self._rows[layer][:, : self._filled] if self._filled else torch.zeros(0)
            arrays[f"rows.{layer}"] = rows.cpu().to(torch.float64).numpy().copy()
        for (i, j), moment in self._moment.items():
            arrays[f"moment.{i}.{j}"] = moment.cpu().numpy().copy()
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
        self._block, self._filled = (int(v) for v in arrays["block"])
        self._begun = tensor("begun")
        self._exponent = [None if e == _NONE else int(e) for e in arrays["exponent"]]
        self._shift = [tensor(f"shift.{layer}") for layer in range(len(widths))]
        self._moment = {(i, j): tensor(f"moment.{i}.{j}") for i, j in keys}
        if self._filled:
            self._open([torch.float64] * len(widths))
            self._keep[:, : self._filled] = tensor("keep")
            for layer, rows in enumerate(self._rows):
                rows[:, : self._filled] = tensor(f"rows.{layer}")

    def _take(self, other: MomentAccumulator, part: slice, lead: tuple[int, ...]) -> MomentAccumulator:
        """Itself, made a copy of some flattened positions of ``other``."""
        self._lead, self._widths = lead, other._widths
        self._begun = other._begun[part].clone()
        self._block = block_rows(len(self._begun), self._widths, self._pending_bytes)
        self._exponent = list(other._exponent)
        self._shift = [s[part].clone() for s in other._shift]
        self._moment = {key: m[part].clone() for key, m in other._moment.items()}
        return self

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
        self._block = block_rows(positions, widths, self._pending_bytes)
        self._begun = torch.zeros(positions, dtype=torch.bool, device=device)
        self._exponent = [None] * len(widths)
        f64 = torch.float64
        self._shift = [torch.zeros(positions, d, dtype=f64, device=device) for d in widths]
        self._moment = {
            (i, j): torch.zeros(positions, widths[i] + 2, widths[j] + 2, dtype=f64, device=device)
            for i, j in keys
        }
        self._rows, self._filled = [], 0
        self._keep = torch.zeros(positions, 0, dtype=torch.bool, device=device)

    def _open(self, dtypes: Iterable[torch.dtype]) -> None:
        positions, device = len(self._begun), self._begun.device
        self._rows = [
            torch.empty(positions, self._block, d, dtype=dtype, device=device)
            for d, dtype in zip(self._widths, dtypes, strict=True)
        ]
        self._keep = torch.empty(positions, self._block, dtype=torch.bool, device=device)

    def _hold(self, piece: list[Tensor], keep: Tensor | None) -> None:
        if not self._rows or not self._keep.shape[1]:
            self._open(x.dtype for x in piece)
        take = slice(self._filled, self._filled + piece[0].shape[1])
        for layer, x in enumerate(piece):
            wide = torch.promote_types(self._rows[layer].dtype, x.dtype)
            self._rows[layer] = self._rows[layer].to(wide)
            self._rows[layer][:, take] = x
        self._keep[:, take] = True if keep is None else keep
        self._filled = take.stop
        if self._filled == self._block:
            self.flush()

    def _sum(self, rows: list[Tensor], keep: Tensor | None) -> None:
        """Add one block ``[P, b, d_l]``: in chunks of positions, so that work space is bounded."""
        positions, b = rows[0].shape[0], rows[0].shape[1]
        for layer, x in enumerate(rows):
            if self._exponent[layer] is None:
                self._exponent[layer] = _scale_exponent(x, keep)
        per_position = 8 * b * sum(d + 2 for d in self._widths)
        chunk = max(1, _WORK_BYTES // per_position)
        for start in range(0, positions, chunk):
            part = slice(start, min(start + chunk, positions))
            kept = None if keep is None else keep[part]
            self._settle_shift([x[part] for x in rows], kept, part)
            z = [self._extended(layer, x[part], kept, part) for layer, x in enumerate(rows)]
            for (i, j), moment in self._moment.items():
                moment[part].baddbmm_(z[i].transpose(1, 2), z[j])
        self._begun |= True if keep is None else keep.any(1)

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
        moment, di, dj = self._kept(i, j), self._widths[i], self._widths[j]
        off = -moment[:, :di, dj + 1] / self._count()[:, None]
        return torch.addcmul(moment[:, :di, :dj], off[:, :, None], moment[:, di + 1, None, :dj])

    def _norm_product(self, i: int, j: int) -> Tensor:
        """Σ|x_c|²|y_c|² ``[P]``: |x + e|² = a + 2 e·x + |e|² in every row, with e the negative mean."""
        m, di, dj, n = self._kept(i, j), self._widths[i], self._widths[j], self._count()
        sum_x, sum_y = m[:, :di, dj + 1], m[:, di + 1, :dj]
        sum_a, sum_b = m[:, di, dj + 1], m[:, di + 1, dj]
        e, f = -sum_x / n[:, None], -sum_y / n[:, None]
        ee, ff = e.square().sum(1), f.square().sum(1)
        ex, fy = (e * sum_x).sum(1), (f * sum_y).sum(1)
        xy = (torch.bmm(e[:, None], m[:, :di, :dj])[:, 0] * f).sum(1)
        with_y = m[:, di, dj] + 2 * (m[:, di, :dj] * f).sum(1) + ff * sum_a
        with_x = 2 * (m[:, :di, dj] * e).sum(1) + 4 * xy + 2 * ff * ex
        return with_y + with_x + ee * (sum_b + 2 * fy + ff * n)

    def _trace(self, layer: int) -> Tensor:
        """Σ|x_c|² ``[P]``, in the layer's units."""
        moment, d = self._moment[layer, layer], self._widths[layer]
        return moment[:, d, d + 1] - moment[:, :d, d + 1].square().sum(-1) / self._count()

    def _product(self, i: int, j: int, centering: str) -> Tensor:
        if centering not in ("mean", "none"):
            raise ValueError(f"centering must be 'mean' or 'none', got {centering!r}")
        product = self._cross(i, j)
        product = product * math.ldexp(1.0, (self._exponent[i] or 0) + (self._exponent[j] or 0))
        if centering == "none":
            count = self._count()[:, None, None]
            product = product + self._mean(i)[:, :, None] * self._mean(j)[:, None, :] * count
        return (product + product.transpose(1, 2)) / 2 if i == j else product

    def _shaped(self, x: Tensor) -> Tensor:
        return x.reshape((*self.lead, *x.shape[1:]))


_NONE = -(1 << 40)


def as_pairs(pairs: Any) -> Pairs:
    """``pairs`` checked: "adjacent", "all" or a list of (i, j). Raises ValueError for anything else."""
    if pairs == "adjacent":
        return "adjacent"
    if pairs == "all":
        return "all"
    if not isinstance(pairs, str):
        try:
            return [(int(i), int(j)) for i, j in pairs]
        except (TypeError, ValueError):
            pass
    raise ValueError(f"pairs must be 'adjacent', 'all' or a sequence of (i, j), got {pairs!r}")


def pair_keys(pairs: Pairs, layers: int) -> list[tuple[int, int]]:
    """Sorted (i, j), i ≤ j, every layer with itself included."""
    if pairs == "adjacent":
        asked = [(i, i + 1) for i in range(layers - 1)]
    elif pairs == "all":
        asked = [(i, j) for i in range(layers) for j in range(i + 1, layers)]
    else:
        asked = [(min(int(i), int(j)), max(int(i), int(j))) for i, j in pairs]
        for i, j in asked:
            if layers and not 0 <= i <= j < layers:
                raise ValueError(f"pairs must name layers 0 to {layers - 1}, got {(i, j)}")
    return sorted({(i, i) for i in range(layers)} | set(asked))


def block_rows(positions: int, widths: Sequence[int], budget: int) -> int:
    """Rows per position that an accumulator with ``pending_bytes=budget`` sums at once: 128, or fewer."""
    rows = _BLOCK_ROWS
    while rows > 8 and 8 * rows * positions * sum(widths) > budget:
        rows //= 2
    return rows


def check_finite(x: Tensor, mask: Tensor | None, layer: int) -> None:
    """Raise :class:`NonFiniteError` where a row of ``x[*, rows, d]`` that ``mask`` keeps is not finite."""
    if not x.numel():
        return
    low, high = torch.aminmax(x)  # one pass, and NaN comes through
    if bool(torch.isfinite(low)) and bool(torch.isfinite(high)):
        return
    bad = ~torch.isfinite(x)
    if mask is not None:
        bad &= mask[..., None]
    if not bool(bad.any()):
        return
    per_position = bad.flatten(-2).sum(-1)  # [*]
    worst = tuple(int(v) for v in per_position.nonzero()[0]) if per_position.dim() else ()
    raise NonFiniteError(layer, worst, int(per_position[worst]))


def _scale_exponent(x: Tensor, keep: Tensor | None) -> int | None:
    """Binary exponent of the largest entry that counts, as LAPACK scales before squaring; None for all zero.

    Only exponents that could overflow or underflow a fourth power are used: others would change nothing.
    """
    if keep is not None:
        x = x.masked_fill(~keep[..., None], 0.0)
    low, high = torch.aminmax(x)
    largest = max(-float(low), float(high))
    if largest == 0.0:
        return None
    exponent = math.frexp(largest)[1]
    return exponent if abs(exponent) > 32 else 0


def _common(a: int | None, b: int | None) -> tuple[int | None, float, float]:
    """The larger exponent, and the factors that bring sums of each into its units."""
    if a is None or b is None:
        return (b if a is None else a), 1.0, 1.0
    top = max(a, b)
    return top, math.ldexp(1.0, max(a - top, -1000)), math.ldexp(1.0, max(b - top, -1000))


def _joint_mean(mean_a: Tensor, n_a: Tensor, mean_b: Tensor, n_b: Tensor) -> Tensor:
    """Mean of both, exactly the common value where the two agree; the one mean where the other is empty."""
    mean_a = torch.where(n_a[:, None] > 0, mean_a, mean_b)
    mean_b = torch.where(n_b[:, None] > 0, mean_b, mean_a)
    both = torch.where(n_a + n_b > 0, n_b / (n_a + n_b), torch.zeros_like(n_a))
    target = mean_a + both[:, None] * (mean_b - mean_a)
    return torch.where((n_a + n_b > 0)[:, None], target, torch.zeros_like(target))


def _rescaled(moment: Tensor, left: float, right: float) -> Tensor:
    """diag(c I, c², 1) M diag(c' I, c'², 1): the sums in other units, exact for powers of two."""
    if left == right == 1.0:
        return moment
    rows = moment.new_full((moment.shape[1],), left)
    rows[-2:] = moment.new_tensor([left * left, 1.0])
    cols = moment.new_full((moment.shape[2],), right)
    cols[-2:] = moment.new_tensor([right * right, 1.0])
    return moment * rows[:, None] * cols


def _recentred(moment: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """The sums of ``[x + left, |x + left|², 1]`` and ``[y + right, …]`` from those of x and y: Tᵀ M T'."""
    moved = _move_columns(moment, right)
    return _move_columns(moved.transpose(1, 2), left).transpose(1, 2)


def _move_columns(moment: Tensor, delta: Tensor) -> Tensor:
    d = delta.shape[1]
    body, square, one = moment[..., :d], moment[..., d], moment[..., d + 1]
    out = torch.empty(moment.shape, dtype=moment.dtype, device=moment.device)
    torch.addcmul(body, one[..., None], delta[:, None], out=out[..., :d])
    out[..., d] = square + (body * (2 * delta[:, None])).sum(-1) + delta.square().sum(-1)[:, None] * one
    out[..., d + 1] = one
    return out
