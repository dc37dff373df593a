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
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rgfast.ops import moments
from rgfast.ops.moments import Centered
from rgfast.runtime.threads import one_thread
from rgfast.runtime.waiting import sent, waits_for
from rgfast.streaming.algebra import (
    NONE,
    centred_cross,
    centred_norm_product,
    centred_trace,
    exponent_of,
    in_late_units,
    in_parts,
    place_of_both,
    rescaled,
    scale_exponent,
    sizes_of_sums,
    times_power,
    together,
)
from rgfast.streaming.factors import TriangularFactors

__all__ = ["Centered", "Sums", "centered"]

_WORK_BYTES = 64 << 20


@dataclass
class Sums:
    """The sums of layers of ``widths`` d_l at P positions, fp64, each layer in units of 2^exponent.

    ``shift`` holds ``[P, d_l]`` of every layer, in true units, and ``begun[P]`` where it is set; ``moment``
    the products ``[P, d_i + 2, d_j + 2]`` of pairs (i, j), i ≤ j; ``exponents`` has None for a layer that was
    zero so far.

    A layer's sums are where its rows are, those of two layers at :func:`place_of_both`. On a device no
    exponent is read while rows come: fp64 rows are summed in a unit that the device knows, ``late[layer]``,
    and squares of squares of narrower ones are numbers of fp64 in any. ``unread`` are the layers of which
    :meth:`settle` has to be told the exponent before anything but adding and copying is done.
    """

    widths: tuple[int, ...]
    begun: Tensor
    exponents: list[int | None]
    shift: list[Tensor]
    moment: dict[tuple[int, int], Tensor]
    factors: TriangularFactors | None
    settled: bool = False  # whether it is known without looking that all positions have begun
    summed: bool = False  # whether a block was added
    narrow: bool = False  # whether fp64 rows are within fp32's range
    at_rest: bool = False  # whether nothing came since :meth:`settle`
    late: dict[int, Tensor] = field(default_factory=dict)
    unread: set[int] = field(default_factory=set)

    @classmethod
    def empty(
        cls,
        widths: Sequence[int],
        keys: Sequence[tuple[int, int]],
        positions: int,
        devices: Sequence[torch.device],
        factored: Sequence[int] = (),
    ) -> Sums:
        """Those of no rows on these devices, for the pairs ``keys``, with triangular factors of the layers
        ``factored``."""
        zero: dict[torch.device, Tensor] = {}

        def zeros(device: torch.device, *shape: int) -> Tensor:
            if not waits_for(device):
                return torch.zeros(shape, dtype=torch.float64, device=device)
            if device not in zero:
                zero[device] = torch.zeros((), dtype=torch.float64, device=device)
            return zero[device].expand(shape)  # the first rows bring memory

        return cls(
            widths=tuple(widths),
            begun=torch.zeros(positions, dtype=torch.bool, device=devices[0]),
            exponents=[None] * len(widths),
            shift=[zeros(at, positions, d) for d, at in zip(widths, devices, strict=False)],
            moment={
                (i, j): zeros(place_of_both(devices[i], devices[j]), positions, widths[i] + 2, widths[j] + 2)
                for i, j in keys
            },
            factors=TriangularFactors(factored, widths, positions, devices[0]) if factored else None,
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
        """Add one block ``[P, b, d_l]``, each layer's rows on the device of its sums."""
        self.at_rest = False
        b = rows[0].shape[1]
        rows = self._in_units(rows, keep)
        self._settle_shift(rows, keep)
        bare = {} if self.summed else {key: x for key, x in self.moment.items() if not any(x.stride())}
        try:
            self._add_products(rows, keep, self._with_memory(bare))
        except BaseException:
            self.moment.update(bare)  # what has memory now may hold anything
            raise
        if self.factors is not None:
            for layer in self.factors.followed:
                self._add_to_factor(layer, rows[layer], keep)
        self.begun |= True if keep is None else keep.any(1)
        self.settled, self.summed = self.settled or keep is None, True
        if self.factors is not None:
            self.factors.advance(b)

    def _add_products(self, rows: Sequence[Tensor], keep: Tensor | None, fresh: set[torch.device]) -> None:
        for device, moment in self._by_device().items():
            layers = sorted({layer for key in moment for layer in key})
            new = {layer: k for k, layer in enumerate(layers)}
            moments.add_products(
                {(new[i], new[j]): total for (i, j), total in moment.items()},
                [sent(rows[layer], device) for layer in layers],
                [sent(self.shift[layer], device) for layer in layers],
                keep=None if keep is None else sent(keep, device),
                exponents=[self.exponent(layer) for layer in layers],
                fresh=device in fresh,
            )

    def _by_device(self) -> dict[torch.device, dict[tuple[int, int], Tensor]]:
        """The moments on each device."""
        parts: dict[torch.device, dict[tuple[int, int], Tensor]] = {}
        for key, total in self.moment.items():
            parts.setdefault(total.device, {})[key] = total
        return parts

    def _with_memory(self, bare: Mapping[tuple[int, int], Tensor]) -> set[torch.device]:
        """Give memory to moments that have none yet; on the devices returned all hold anything."""
        held = {total.device for key, total in self.moment.items() if key not in bare}
        for key, total in bare.items():
            make = torch.zeros_like if total.device in held else torch.empty_like
            self.moment[key] = make(total, memory_format=torch.contiguous_format)
        return {total.device for total in bare.values()} - held

    def _in_units(self, rows: Sequence[Tensor], keep: Tensor | None) -> list[Tensor]:
        """The rows of every layer, of which the exponent is known from now on, or is on the device."""
        at: dict[torch.device, list[int]] = {}
        new: dict[torch.device, Tensor] = {}
        rows = list(rows)
        for layer, x in enumerate(rows):
            if self.exponents[layer] is not None:
                continue
            if not waits_for(x.device):
                self.exponents[layer] = scale_exponent(x, keep)
                continue
            if layer not in self.unread and x.dtype == torch.float64 and not self.narrow:
                if x.device not in new:
                    new[x.device] = torch.full((), NONE, dtype=torch.int64, device=x.device)
                self.late[layer] = new[x.device]
            self.unread.add(layer)
            if layer in self.late:
                at.setdefault(x.device, []).append(layer)
        for device, layers in at.items():
            before = torch.stack([self.late[layer] for layer in layers])
            kept = None if keep is None else sent(keep, device)
            found = in_late_units([rows[layer] for layer in layers], kept, before)
            for layer, x, late in zip(layers, *found, strict=True):
                rows[layer], self.late[layer] = x, late
        return rows

    def asked(self) -> list[Tensor]:
        """What :meth:`settle` has to be told of the layers in ``unread``, in their order, in one tensor or
        several: those exponents that the device knows, and of other layers the size of their rows."""
        found = dict(self.late)
        alike: dict[tuple[int, torch.device, torch.device], list[int]] = {}
        for layer in sorted(self.unread - {*self.late}):
            place = self.widths[layer], self.shift[layer].device, self.moment[layer, layer].device
            alike.setdefault(place, []).append(layer)
        for layers in alike.values():
            sizes = sizes_of_sums(
                [self.shift[layer] for layer in layers], [self.moment[layer, layer] for layer in layers]
            )
            if len(layers) == len(self.unread):
                return [sizes]
            found |= zip(layers, sizes.unbind(), strict=True)
        return [found[layer] for layer in sorted(self.unread)]

    def settle(self, told: Sequence[float]) -> None:
        """Bring all layers into units that are known here, and all sums to one device."""
        scale = [1.0] * len(self.widths)
        for layer, value in zip(sorted(self.unread), told, strict=True):
            if layer in self.late and value != NONE:
                self.exponents[layer] = int(value)
                self.shift[layer] = times_power(self.shift[layer], int(value))
            elif layer not in self.late and (exponent := exponent_of(value)) is not None:
                self.exponents[layer] = exponent
                scale[layer] = math.ldexp(1.0, -exponent)
        self.late.clear()
        self.unread.clear()
        if any(unit != 1.0 for unit in scale):
            for (i, j), moment in self.moment.items():
                self.moment[i, j] = rescaled(moment, scale[i], scale[j])
            if self.factors is not None:
                self.factors.rescale(scale)
        self.place([self.begun.device] * len(self.widths))
        self.at_rest = True

    def place(self, devices: Sequence[torch.device]) -> None:
        """Have every layer's sums on the device of its rows."""
        if [shift.device for shift in self.shift] == list(devices):
            return
        self.at_rest = False
        self.begun = sent(self.begun, devices[0])
        self.shift = [sent(shift, device) for shift, device in zip(self.shift, devices, strict=True)]
        for (i, j), moment in self.moment.items():
            self.moment[i, j] = sent(moment, place_of_both(devices[i], devices[j]))
        self.late = {layer: sent(exponent, devices[layer]) for layer, exponent in self.late.items()}
        if self.factors is not None:
            self.factors.place(devices)

    def at(self, part: slice, *, factors: bool) -> Sums:
        """A copy of some positions, with or without the factors."""
        return Sums(
            widths=self.widths,
            begun=self.begun[part].clone(),
            exponents=list(self.exponents),
            shift=[s[part].clone() for s in self.shift],
            moment={key: m[part].clone() for key, m in self.moment.items()},
            factors=self.factors.at(part) if factors and self.factors is not None else None,
            summed=self.summed,
            late=dict(self.late),
            unread=set(self.unread),
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
            summed=self.summed,
            late={new[layer]: exponent for layer, exponent in self.late.items() if layer in new},
            unread={new[layer] for layer in self.unread if layer in new},
        )

    def count(self) -> Tensor:
        """Number of rows that counted ``[P]``, fp64."""
        return (
            self.moment[0, 0].select(2, -1).select(1, -1)
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

    def means(self, layers: Sequence[int]) -> Tensor:
        """:meth:`mean` ``[K, P, d]`` of layers of one width, in few launches."""
        found, unit = self.columns(layers) / self.count()[:, None], self.units(layers)
        shift = torch.stack([self.shift[layer] for layer in layers])
        return shift + (found if unit is None else found * unit)

    def columns(self, layers: Sequence[int]) -> Tensor:
        """Σ(x−shift) ``[K, P, d]`` of layers of one width, in their units."""
        return torch.stack([self.moment[layer, layer].select(2, -1) for layer in layers])[..., :-2]

    def units(self, layers: Sequence[int]) -> Tensor | None:
        """The layers' units ``[K, 1, 1]``, None if all are 1."""
        exponents = [float(self.exponent(layer)) for layer in layers]
        if not any(exponents):
            return None
        return sent(torch.from_numpy(np.exp2(exponents)), self.begun.device)[:, None, None]

    def keeps(self, i: int, j: int) -> bool:
        """Whether the products of two layers are there."""
        return (i, j) in self.moment or (j, i) in self.moment

    def pooled(
        self, keys: Sequence[tuple[int, int]], left: Sequence[Tensor], right: Sequence[Tensor]
    ) -> Sequence[Tensor]:
        """The moments ``[1, d_i + 2, d_j + 2]`` of all positions together of pairs of the same widths, whose
        shifts are moved by ``left[k]`` and ``right[k]`` ``[P, d]``."""
        found = moments.pooled([self.moment[key] for key in keys], left, right)
        return found[:, None].unbind()

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
            mean_i, mean_j = (times_power(self.mean(k), -self.exponent(k)) for k in (i, j))
            product = product + mean_i[:, :, None] * mean_j[:, None, :] * count
        if not scaled:
            product = times_power(product, self.exponent(i) + self.exponent(j))
        return (product + product.transpose(1, 2)) / 2 if i == j else product

    def accumulated(self, layer: int, *, scaled: bool) -> Tensor:
        """Σ|x−shift|² ``[P]``, in true units, or in the layer's for ``scaled``."""
        trace = self.moment[layer, layer][:, -2, -1]
        return trace if scaled else times_power(trace, 2 * self.exponent(layer))

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
            shift = times_power(self.shift[layer], -exponent)
            found = torch.addcmul(whole[:, :, 1:], whole[:, :, :1], shift[:, None])
        return found if scaled else times_power(found, exponent)

    def state_dict(self) -> dict[str, np.ndarray[Any, Any]]:
        """Everything as named arrays (copies)."""
        arrays: dict[str, np.ndarray[Any, Any]] = {
            "pairs": np.array(sorted(self.moment), dtype=np.int64).reshape(-1, 2),
            "begun": self.begun.cpu().numpy().copy(),
            "exponent": np.array([NONE if e is None else e for e in self.exponents], dtype=np.int64),
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

        self.begun, self.summed = tensor("begun"), bool(arrays["begun"].any())
        self.exponents = [None if e == NONE else int(e) for e in arrays["exponent"]]
        self.shift = [tensor(f"shift.{layer}") for layer in range(len(self.widths))]
        pairs = [(int(i), int(j)) for i, j in arrays["pairs"]]
        self.moment = {(i, j): tensor(f"moment.{i}.{j}") for i, j in pairs}
        if self.factors is not None:
            self.factors.load_state_dict(arrays)

    def _settle_shift(self, rows: Sequence[Tensor], keep: Tensor | None) -> None:
        """Shift of positions that see their first rows: the mean of these, exact for constant columns."""
        if self.settled:
            return
        if keep is None and not self.summed and waits_for(self.begun.device):
            whole = together(rows)
            if whole is None:
                self.shift = [moments.first_mean(x) for x in rows]
            else:
                shifts = moments.first_mean(whole.flatten(0, 1))
                self.shift = list(shifts.view(len(rows), self.positions, -1).unbind())
            return
        new = ~self.begun
        if keep is not None:
            new = new & keep.any(1)
        if any(waits_for(x.device) for x in rows):  # which positions are new is not known here
            self._settle_some(rows, keep, new)
            return
        self.shift = [shift.contiguous() for shift in self.shift]  # with memory, if it has none yet
        for at in in_parts(new, rows, _WORK_BYTES):
            for layer, x in enumerate(rows):
                self.shift[layer][at] = moments.first_mean(x[at], None if keep is None else keep[at])

    def _settle_some(self, rows: Sequence[Tensor], keep: Tensor | None, new: Tensor) -> None:
        """Shift of those positions that are ``new``, layers of one kind in few launches.

        Means of all rows cost as much as their products: a later position's shift is its first row.
        """
        alike: dict[tuple[torch.device, torch.dtype, int], list[int]] = {}
        for layer, x in enumerate(rows):
            alike.setdefault((x.device, x.dtype, x.shape[2]), []).append(layer)
        for (device, *_), layers in alike.items():
            some, kept = [rows[layer] for layer in layers], None if keep is None else sent(keep, device)
            if self.summed:
                found = moments.first_rows(some, kept)
            else:
                found = torch.stack([moments.first_mean(x, kept) for x in some])
            before = torch.stack([self.shift[layer] for layer in layers])
            shifts = torch.where(sent(new, device)[:, None], found, before)
            for layer, shift in zip(layers, shifts.unbind(), strict=True):
                self.shift[layer] = shift

    def _add_to_factor(self, layer: int, rows: Tensor, keep: Tensor | None) -> None:
        """In chunks of positions, so that work space is bounded."""
        assert self.factors is not None
        positions, b, d = rows.shape
        keep = None if keep is None else sent(keep, rows.device)
        step = max(1, _WORK_BYTES // (8 * b * (d + 1)))
        for start in range(0, positions, step):
            part = slice(start, min(start + step, positions))
            kept = None if keep is None else keep[part]
            z = torch.empty(part.stop - start, b, d + 1, dtype=torch.float64, device=rows.device)
            z[..., 0] = 1.0 if kept is None else kept.to(torch.float64)
            moments.shifted(rows[part], self.shift[layer][part], kept, self.exponent(layer), out=z[..., 1:])
            self.factors.update(layer, z, part)


def centered(parts: Sequence[Sums], keys: Sequence[tuple[int, int]], layers: Sequence[int] = ()) -> Centered:
    """Sums about means of pairs of the same widths at the positions of all parts, which have the same units;
    with matrices of ``layers``, of which the first pairs are."""
    return moments.centered(
        [[part.moment[key] for part in parts] for key in keys],
        shifts=[[part.shift[layer] for part in parts] for layer in layers],
        units=[math.ldexp(1.0, -parts[0].exponent(layer)) for layer in layers],
    )
