"""Second and cross moments of many layers at once, streamed: one Gram serves spectra, CKA and drift.

Rows are summed in blocks that begin at fixed sample indices, so the bits of a result depend neither on how
the samples were cut into batches nor on the number of threads. What the sums are is told in :mod:`.sums`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from rgfast.runtime.waiting import read, sent, waits_for
from rgfast.streaming.block import OpenBlock
from rgfast.streaming.finite import check_finite
from rgfast.streaming.merging import add_sums
from rgfast.streaming.pairs import PairMoments
from rgfast.streaming.pooling import pooled
from rgfast.streaming.sizes import BLOCK_ROWS, Pairs, as_pairs, block_rows, first_block, pair_keys
from rgfast.streaming.sums import Sums
from rgfast.validation import as_bool_mask, as_real_tensor, check_choice

__all__ = ["MomentAccumulator", "settle"]

_PENDING_BYTES = 256 << 20


class MomentAccumulator:
    """Streaming fp64 moments of L layers, ``[*, rows, d_l]`` each, for every leading index.

    ``pairs`` names the cross moments to keep: ``"adjacent"``, ``"all"``, or (i, j) index pairs. The widths,
    the leading shape and the number of layers are fixed by the first :meth:`update`. ``pending_bytes`` bounds
    the rows held back until a block is full, of 128 to 1,024 rows per position by their number and width.
    ``factors`` names layers of which triangular factors are kept as well, where their rows are ill
    conditioned (see :mod:`.factors`).

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
        self._few: tuple[list[Tensor], Tensor | None] | None = None
        self._sums = Sums.empty((), [], 0, [torch.device("cpu")])
        self._block = OpenBlock((), 0, BLOCK_ROWS, torch.device("cpu"))

    @property
    def lead(self) -> tuple[int, ...]:
        """The leading shape ``*``, () before the first update."""
        return self._lead or ()

    @property
    def widths(self) -> tuple[int, ...]:
        """d_l of every layer, () before the first update."""
        return self._sums.widths

    @property
    def positions(self) -> int:
        """How many leading indices there are."""
        return self._sums.positions

    @property
    def device(self) -> torch.device:
        """Where all sums are, once they are settled."""
        return self._sums.begun.device

    @property
    def pairs(self) -> tuple[tuple[int, int], ...]:
        """The (i, j), i < j, whose cross moments are kept."""
        return tuple(key for key in pair_keys(self._asked, len(self.widths)) if key[0] != key[1])

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
    def few(self) -> tuple[list[Tensor], Tensor | None] | None:
        """All rows so far ``[P, b, d_l]`` and which of them count ``[P, b]``, if they are on a device and one
        block, whose memory still holds them; to be read before more are added."""
        self.flush()
        return self._few

    @property
    def nbytes(self) -> int:
        """Bytes held now, rows of the open block included."""
        return self._sums.nbytes + self._block.nbytes

    def update(
        self,
        layers: Sequence[Tensor] | Tensor,
        mask: Tensor | None = None,
        *,
        finite: bool = False,
        narrow: bool = False,
    ) -> MomentAccumulator:
        """Itself, with the rows of one batch added.

        ``layers[l]`` is ``[*, rows, d_l]`` of any float dtype; all share ``*`` and rows. ``mask[*, rows]``
        (bool) keeps the rows where it is True; None keeps all. Rows that are not kept may hold anything.
        ``finite=True`` says that the caller has looked for NaN and infinity, ``narrow=True`` that fp64 rows
        are within fp32's range, so that a device need not look for their unit.
        Raises TypeError or ValueError for wrong kinds or shapes and :class:`NonFiniteError` for NaN or
        infinity in a row that counts; after an error nothing of the batch has been added.
        """
        flat, keep = self._checked(layers, mask, finite)
        self._sums.place([x.device for x in flat])
        self._sums.narrow = narrow and (self._sums.narrow or not (self._sums.summed or self._block.filled))
        rows, at = flat[0].shape[1], 0
        while at < rows:
            self._few = None
            take = min(rows - at, self._block.size - self._block.filled)
            piece, kept = flat, keep
            if take < rows:
                piece = [x[:, at : at + take] for x in flat]
                kept = None if keep is None else keep[:, at : at + take]
            if take == self._block.size and not self._may_be_few:
                self._sums.add(piece, kept)
            else:
                self._block.hold(piece, kept)
                if self._block.filled == self._block.size:
                    self.flush()
            at += take
        return self

    @property
    def _may_be_few(self) -> bool:
        """Whether a whole block is held all the same, since it may be all there is."""
        wide = 2 * self._block.size <= min(self.widths)
        return wide and not self._sums.summed and waits_for(self._sums.begun.device)

    def add_block(self, layers: Sequence[Tensor]) -> None:
        """Add finite rows ``layers[l][P, b, d_l]`` as one block, whatever their number."""
        self.flush()
        if self._lead is None:
            self._begin((len(layers[0]),), tuple(x.shape[2] for x in layers), [x.device for x in layers])
        self._few = None
        self._sums.add(layers, None)

    @classmethod
    def of_sums(
        cls, pairs: Pairs, shifts: Sequence[Tensor], moments: Mapping[tuple[int, int], Tensor]
    ) -> MomentAccumulator:
        """One with leading shape ``[P]`` of given sums: ``moments[i, j][P, d_i + 2, d_j + 2]`` of
        ``[x, |x|², 1]`` of rows less ``shifts[l][P, d_l]``, every position with some."""
        made = cls(pairs=pairs)
        widths, positions = [shift.shape[1] for shift in shifts], len(shifts[0])
        sums = Sums.empty(widths, [], positions, [shift.device for shift in shifts])
        sums.begun.fill_(True)
        sums.summed = True
        sums.exponents, sums.shift, sums.moment = [0] * len(widths), list(shifts), dict(moments)
        return made._made((positions,), sums)

    @property
    def asked(self) -> list[Tensor]:
        """What :func:`settle` reads."""
        self.flush()
        return self._sums.asked()

    def told(self, values: Sequence[Tensor]) -> None:
        """What was :attr:`asked`, read."""
        self._sums.settle([each for value in values for each in value.reshape(-1).tolist()])

    def settled(self) -> Sums:
        """All sums, in units that are known here; to be read only."""
        settle([self])
        return self._sums

    def flush(self) -> None:
        """Sum the rows of the open block now. The next block begins at the next sample.

        Every finalizer and :meth:`merge` does this, so bits depend on where results were read (though not on
        the batches in between); :meth:`state_dict` does not.
        """
        if self._block.filled:
            first, (rows, keep) = not self._sums.summed, self._block.take()
            self._sums.add(rows, keep)
            self._few = (rows, keep) if first and waits_for(self._sums.begun.device) else None

    def merge(self, other: MomentAccumulator) -> MomentAccumulator:
        """Itself, with all that ``other`` has seen added; exact for different shifts. ``other`` is unchanged
        but for its open block being summed. Raises ValueError where layers, widths or positions differ."""
        if other._lead is None:
            return self
        other.flush()
        keys = set(other._sums.moment)
        if self._lead is None:
            if keys != set(pair_keys(self._asked, len(other.widths))):
                raise ValueError(f"other must keep the pairs {self._asked!r}, got {other._asked!r}")
            self._check_factored(other)
            return self._made(other._lead, other._sums.at(slice(None), factors=bool(self._factored)))
        if (self._lead, self.widths, set(self._sums.moment)) != (other._lead, other.widths, keys):
            raise ValueError(
                f"other must have leading shape {self.lead}, widths {self.widths} and the same pairs, "
                f"got {other.lead}, {other.widths}"
            )
        self._check_factored(other)
        settle([self, other])
        self._few = None
        add_sums(self._sums, other._sums)
        return self

    def pooled(self) -> MomentAccumulator:
        """A new accumulator with leading shape (): the samples of all leading indices as one cloud."""
        if self._lead is None:
            return self._like()
        return self._like()._made((), pooled(self.settled(), self._factored))

    def at(self, index: int) -> MomentAccumulator:
        """A new accumulator with leading shape (): a copy of flattened leading index ``index``."""
        self.flush()
        part = slice(index, index + 1)
        return self._like()._made((), self._sums.at(part, factors=bool(self._factored)))

    def only(self, layers: Sequence[int]) -> MomentAccumulator:
        """A view of some layers, numbered in the order given. It shares memory: it is only to be read."""
        self.flush()
        new = {layer: k for k, layer in enumerate(layers)}
        pairs = [(new[i], new[j]) for i, j in self.pairs if i in new and j in new]
        factored = sorted(new[layer] for layer in self._factored if layer in new)
        part = MomentAccumulator(pairs=pairs, factors=factored)._made(self._lead, self._sums.only(layers))
        if self._few is not None:
            rows, keep = self._few
            part._few = [rows[layer] for layer in layers], keep
        return part

    @property
    def count(self) -> Tensor:
        """Number of rows that counted ``[*]``, int64."""
        self.flush()
        return self._shaped(self._sums.count()).to(torch.int64)

    def mean(self, layer: int) -> Tensor:
        """Mean over samples of a layer ``[*, d]``, fp64; NaN where nothing was counted."""
        return self._shaped(self.settled().mean(layer))

    def exponent(self, layer: int) -> int:
        """Exponent of the power of two that is a layer's unit: 0 but for data so far from 1 that squares of
        them might not be fp64 numbers. What is asked for ``scaled`` comes in this unit."""
        return self.settled().exponent(layer)

    def scatter(
        self, layer: int, *, centering: Literal["mean", "none"] = "mean", scaled: bool = False
    ) -> Tensor:
        """Σ (x−μ)(x−μ)ᵀ over samples of a layer ``[*, d, d]``, fp64; ``centering="none"`` gives Σ x xᵀ."""
        return self._product(layer, layer, centering, scaled)

    def accumulated(self, layer: int, *, scaled: bool = False) -> Tensor:
        """Σ|x−shift|² over samples of a layer ``[*]``, fp64: what its rounding errors scale with."""
        return self._shaped(self.settled().accumulated(layer, scaled=scaled))

    def cross(self, i: int, j: int, *, centering: Literal["mean", "none"] = "mean") -> Tensor:
        """Σ (x−μ_x)(y−μ_y)ᵀ of layers i and j ``[*, d_i, d_j]``, fp64; ``centering="none"`` gives Σ x yᵀ.

        Raises ValueError for a pair that is not kept.
        """
        return self._product(i, j, centering, False)

    def factor(
        self, layer: int, *, centering: Literal["mean", "none"] = "mean", scaled: bool = False
    ) -> Tensor | None:
        """R of a layer, fp64, with RᵀR its scatter and singular values good to a few u of the largest.

        ``[*, d, d]``, or ``[*, d + 1, d]`` for ``centering="none"``; NaN at positions where none was needed,
        None for a layer that ``factors`` does not name.
        """
        if self._lead is None or layer not in self._factored:
            return None
        check_choice(centering, "centering", ("mean", "none"))
        return self._shaped(self.settled().factor(layer, centred=centering == "mean", scaled=scaled))

    def pair(self, i: int, j: int) -> PairMoments:
        """All centred sums of two layers (i = j allowed) that biased and debiased HSIC are made of."""
        self._check_kept(i, j)
        sums = self.settled()
        return PairMoments(
            count=self._shaped(sums.count()).to(torch.int64),
            cross=self._shaped(sums.cross(i, j)),
            trace_i=self._shaped(sums.trace(i)),
            trace_j=self._shaped(sums.trace(j)),
            norm_product=self._shaped(sums.norm_product(i, j)),
            exponent_i=sums.exponent(i),
            exponent_j=sums.exponent(j),
        )

    def state_dict(self) -> dict[str, np.ndarray[Any, Any]]:
        """Everything as named arrays (copies), open block included: restoring continues with equal bits."""
        self.told(read(self._sums.asked()))
        held, keep = self._block.contents()
        arrays: dict[str, np.ndarray[Any, Any]] = {
            "lead": np.array([-1] if self._lead is None else self._lead, dtype=np.int64),
            "widths": np.array(self.widths, dtype=np.int64),
            "block": np.array([self._block.size, self._block.filled], dtype=np.int64),
            "keep": keep.cpu().numpy().copy(),
        }
        for layer in range(len(self.widths)):
            rows = held[layer] if self._block.filled else torch.zeros(0, dtype=torch.float64, device="cpu")
            arrays[f"rows.{layer}"] = rows.cpu().to(torch.float64).numpy().copy()
        arrays.update(self._sums.state_dict())
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

        at = [torch.device(device)] * len(widths)
        self._made(lead, Sums.empty(widths, [], math.prod(lead), at, self._factored))
        self._sums.load_state_dict(arrays)
        size, filled = (int(v) for v in arrays["block"])
        self._block = OpenBlock(widths, self._sums.positions, size, self._sums.begun.device)
        if filled:
            self._block.hold([tensor(f"rows.{layer}") for layer in range(len(widths))], tensor("keep"))

    def _like(self) -> MomentAccumulator:
        """An empty one with the same options."""
        return MomentAccumulator(pairs=self._asked, pending_bytes=self._pending_bytes, factors=self._factored)

    def _check_factored(self, other: MomentAccumulator) -> None:
        if self._factored and self._factored != other._factored:
            raise ValueError(
                f"other must keep factors of the layers {list(self._factored)}, got {list(other._factored)}"
            )

    def _check_kept(self, i: int, j: int) -> None:
        if not self._sums.keeps(i, j):
            raise ValueError(f"the pair {(i, j)} is not kept: this accumulator was made with {self._asked!r}")

    def _made(self, lead: tuple[int, ...] | None, sums: Sums) -> MomentAccumulator:
        """Itself, empty until now, of these sums."""
        self._lead, self._sums, self._few = lead, sums, None
        launched = waits_for(sums.begun.device)
        most = first_block(sums.positions, self.widths, self._factored, launched=launched)
        size = block_rows(sums.positions, self.widths, self._pending_bytes, most)
        self._block = OpenBlock(self.widths, sums.positions, size, sums.begun.device)
        return self

    def _checked(
        self, layers: Sequence[Tensor] | Tensor, mask: Tensor | None, finite: bool
    ) -> tuple[list[Tensor], Tensor | None]:
        if isinstance(layers, (list, tuple)):
            seq = [as_real_tensor(x, f"layers[{k}]", min_dim=2) for k, x in enumerate(layers)]
        else:
            seq = list(as_real_tensor(layers, "layers", min_dim=3).unbind(0))
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
        if self._lead is not None and (lead, widths) != (self._lead, self.widths):
            raise ValueError(
                f"layers must keep leading shape {self._lead} and widths {self.widths} of the first update, "
                f"got {lead} and {widths}"
            )
        if mask is not None:
            mask = as_bool_mask(mask, "mask")
            if tuple(mask.shape) != (*lead, rows):
                raise ValueError(f"mask must have shape {(*lead, rows)}, got {tuple(mask.shape)}")
            mask = sent(mask, seq[0].device)
        if not finite:
            for k, x in enumerate(seq):
                check_finite(x, mask, k)
        if self._lead is None:
            self._begin(lead, widths, [x.device for x in seq])
        positions = math.prod(lead)
        flat = [x.detach() if x.dim() == 3 else x.detach().reshape(positions, rows, x.shape[-1]) for x in seq]
        return flat, None if mask is None else mask.reshape(positions, rows)

    def _begin(self, lead: tuple[int, ...], widths: tuple[int, ...], devices: Sequence[torch.device]) -> None:
        keys = pair_keys(self._asked, len(widths))
        self._made(lead, Sums.empty(widths, keys, math.prod(lead), devices, self._factored))
        if self._sums.factors is not None:
            self._sums.factors.place(devices)

    def _product(self, i: int, j: int, centering: str, scaled: bool) -> Tensor:
        check_choice(centering, "centering", ("mean", "none"))
        self._check_kept(i, j)
        return self._shaped(self.settled().product(i, j, centred=centering == "mean", scaled=scaled))

    def _shaped(self, x: Tensor) -> Tensor:
        return x.reshape((*self.lead, *x.shape[1:]))


def settle(accumulators: Sequence[MomentAccumulator]) -> None:
    """Read, in one transfer, all that was left on the device while rows came."""
    accumulators = [each for each in accumulators if each._block.filled or not each._sums.at_rest]
    if not accumulators:
        return
    asked = [accumulator.asked for accumulator in accumulators]
    values = iter(read([value for some in asked for value in some]))
    for accumulator, some in zip(accumulators, asked, strict=True):
        accumulator.told([next(values) for _ in some])
