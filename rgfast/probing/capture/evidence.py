"""What tells the axes of a layer: the batch's sizes, and what the modules of a block work on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from rgfast.probing.capture.recompute import Forwards

__all__ = ["Evidence", "Reading", "Sizes"]

# Modules of torch that hand their input on to their parts as it is.
_PASSING = (
    nn.MultiheadAttention,
    nn.RNNBase,
    nn.TransformerEncoderLayer,
    nn.TransformerDecoderLayer,
    nn.TransformerEncoder,
    nn.TransformerDecoder,
)


@dataclass(frozen=True)
class Sizes:
    """Sizes of a batch: ``batch`` is the number of sequences (None if unknown), ``firsts`` the sizes of the
    first axes of all entries, ``lengths`` how many tokens a sequence may have, ``shapes`` all shapes."""

    batch: int | None
    firsts: frozenset[int]
    lengths: frozenset[int]
    shapes: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, entries: Mapping[str, Any]) -> Sizes:
        """Those of the entries of a forward."""
        tensors = [x for x in entries.values() if isinstance(x, Tensor) and x.dim()]
        firsts = [x.size(0) for x in tensors]
        batch = Counter(firsts).most_common(1)[0][0] if firsts else None
        shapes = [tuple(x.shape) for x in tensors if not x.is_nested]
        tokens = [
            x.shape[1]
            for x in tensors
            if not x.is_nested
            and x.size(0) == batch
            and (x.dim() == 3 or (x.dim() == 2 and not x.is_floating_point()))
        ]
        return cls(batch, frozenset(firsts), frozenset(tokens), tuple(shapes))


@dataclass(frozen=True)
class Reading:
    """The layouts that are possible: one if it is clear, none if nothing speaks for any, several with
    ``why`` they contradict. ``note``: it was a close call."""

    layouts: tuple[str, ...] = ()
    why: str = ""
    note: bool = False


class Evidence:
    """What a module and its parts tell of the axes of what it puts out."""

    def __init__(self, module: nn.Module) -> None:
        self._passing = isinstance(module, _PASSING)
        self._sequence_first = [
            part
            for part in module.modules()
            if isinstance(part, (nn.MultiheadAttention, nn.RNNBase)) and not part.batch_first
        ]
        self._handles: list[Any] = []
        self._batches: set[int] = set()
        self._last, self._first = set[int](), set[int]()
        self._begins_first: bool | None = None
        for part in module.modules():
            self._learn(part)

    def _learn(self, part: nn.Module) -> None:
        widths: tuple[int, ...] = ()
        first = False
        name = type(part).__name__
        if isinstance(part, _ConvNd):
            widths, first = (part.in_channels, part.out_channels), True
        elif isinstance(part, nn.GroupNorm):
            widths, first = (part.num_channels,), True
        elif isinstance(part, _NormBase):
            widths, first = (part.num_features,), True
        elif isinstance(part, nn.Linear):
            widths = (part.in_features, part.out_features)
        elif "norm" in name.lower():
            weight = getattr(part, "weight", None)
            if isinstance(weight, Tensor) and weight.dim() == 1:
                widths = (len(weight),)
                first = "2d" in name.lower() or getattr(part, "data_format", "") == "channels_first"
            elif weight is None:
                shape = tuple(getattr(part, "normalized_shape", ()))
                widths = shape if len(shape) == 1 else ()
        if widths:
            (self._first if first else self._last).update(widths)
            if self._begins_first is None:
                self._begins_first = first

    def open(self) -> None:
        """Watch the parts with ``batch_first=False`` from now on: the size of their second axis is the
        batch's."""
        called = Forwards().hook(self._called)
        for part in self._sequence_first:
            self._handles.append(part.register_forward_pre_hook(called, with_kwargs=True))

    def close(self) -> None:
        """Stop watching."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.forget()

    @property
    def batches(self) -> frozenset[int]:
        """The numbers of samples that parts with ``batch_first=False`` were given in this forward."""
        return frozenset(self._batches)

    def forget(self) -> None:
        """Forget how parts were called, at the end of a forward."""
        self._batches.clear()

    def _called(self, part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = next((x for x in [*args, *kwargs.values()] if isinstance(x, Tensor)), None)
        if x is not None and x.dim() == 3:
            self._batches.add(x.shape[1])

    def reading(self, shape: tuple[int, ...], sizes: Sizes) -> Reading:
        """How a tensor of ``shape`` that the module put out, or was given, can be read."""
        if len(shape) == 3:
            return self._of_three(shape, sizes)
        if len(shape) not in (4, 5):
            return Reading()
        batch = sizes.batch
        first, last = ("N D H W", "N H W D") if len(shape) == 4 else ("N D T H W", "N T H W D")
        axis = self._feature_axis(shape, default=1)
        rest = [size for k, size in enumerate(shape) if k and k != (axis or 1) % len(shape)]
        if batch is not None and shape[0] not in sizes.firsts and batch in rest:
            return Reading((first, last), f"the batch has {batch} samples, and its first axis {shape[0]}")
        if axis == 0:
            if self._begins_first and len(shape) == 4:
                return Reading((first,), note=True)
            return Reading((first, last), "its modules have widths that fit both")
        return Reading() if axis is None else Reading((first if axis == 1 else last,))

    def _of_three(self, shape: tuple[int, ...], sizes: Sizes) -> Reading:
        plain, moved, channels = "N T D", "T N D", "N D T"
        axis = self._feature_axis(shape, default=2)
        votes = {*self._of_sizes(shape, sizes, axis)}
        if len(self._batches) == 1:
            (n,) = self._batches
            if shape[1] == n and (self._passing or shape[0] != n):
                votes.add(1)
            elif shape[0] == n and shape[1] != n:
                votes.add(0)
            elif shape[0] == n:
                return Reading((plain, moved), "a module in it has batch_first=False, and both axes fit")
        if len(votes) > 1:
            return Reading((plain, moved), "the batch's size or batch_first=False speaks for each of them")
        if 1 in votes:
            return Reading((moved,)) if axis != 1 else Reading((channels, moved), "widths contradict")
        if 2 in votes:
            return Reading((plain, "T D N"), f"only its last axis has the batch's size {sizes.batch}")
        if not votes and axis == -1 and shape[0] == shape[1]:
            return Reading()  # widths tell the features, and nothing which of the others is the samples
        if axis == 0:
            return Reading((plain, channels), "its modules have widths that fit both")
        return Reading() if axis is None else Reading((channels if axis == 1 else plain,))

    def _of_sizes(self, shape: tuple[int, ...], sizes: Sizes, features: int | None) -> list[int]:
        """The axes that the batch's size speaks for."""
        batch = sizes.batch
        if batch is None or (shape[0] == batch and shape[1] == batch):
            return []
        found = [0] * (shape[0] in sizes.firsts) + [1] * (shape[1] == batch)
        if found:
            return found
        return [2] if shape[2] == batch and features != -1 else []

    def _feature_axis(self, shape: tuple[int, ...], default: int) -> int | None:
        """1 or -1, None if no width tells, 0 if widths contradict each other."""
        at_1, at_end = shape[1] in self._first, shape[-1] in self._last
        also_1, also_end = shape[1] in self._last, shape[-1] in self._first
        if at_1 and at_end:
            return -1 if default == 2 and not self._begins_first else 0
        if at_1:
            return 0 if default == 2 and also_end else 1
        if at_end:
            return 0 if default == 1 and also_1 else -1
        if also_1 and also_end:
            return None
        if also_end:
            return -1
        return 1 if also_1 and default == 1 else None
