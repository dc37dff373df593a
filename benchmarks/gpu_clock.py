"""A model of the time that operators of torch take on an H100, by their bytes, products and launches."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rgfast.ops.device import LAUNCH, STREAM, TRANSFER, WAIT

__all__ = ["STAND_IN", "VIEW", "Clock", "Cost", "Row", "print_beside", "timed", "uncounted"]

# No number of layers or rows that stands beside it is a multiple of it, or of it and one or two more.
STAND_IN = 53
# Measured on an H100: fp32 products (SIMT) and half-precision ones, fp64 ones by the width of a tile, passes
# over memory that compute something, and the rows of a LayerNorm, which gets a thread block each (eager block
# at D = 64 and 128).
FP32, HALF, PASS, NORM = 51e12, 762e12, 2.5e12, 1.3e-9
FP64 = {16: 28e12, 64: 28.4e12, 128: 55.2e12, 256: 60.4e12}
# One thread block's step through the terms of a product, of the inner products of 7 kernels by samples.
STEP = 7e-9
# Half-precision attention with a mask, by torch's memory-efficient kernel. Assumed.
ATTENTION = 250e12
# A view has no kernel, but the host makes it. Assumed.
VIEW, LEAST_KERNEL = 1e-6, 2e-6
VIEWS = {
    *(
        "view",
        "_unsafe_view",
        "slice",
        "select",
        "transpose",
        "t",
        "permute",
        "unsqueeze",
        "squeeze",
        "expand",
    ),
    *(
        "detach",
        "alias",
        "diagonal",
        "as_strided",
        "split",
        "split_with_sizes",
        "unbind",
        "empty",
        "new_empty",
    ),
    *("empty_like", "empty_strided", "lift_fresh", "promote_types", "result_type", "reshape", "unfold"),
    *("_reshape_alias", "is_same_size", "sym_size", "_conj", "resolve_conj"),
}
READS = {"_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select"}
MULTIPLY = {"mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1, "baddbmm_": 1, "addmm_": 1}
UNKNOWN = {
    "geqrf",
    "linalg_qr",
    "_linalg_svd",
    "linalg_svd",
    "ormqr",
    "linalg_householder_product",
}


@dataclass(frozen=True)
class Row:
    """A figure that was measured, and the model's."""

    name: str
    measured: float
    predicted: float

    @property
    def ratio(self) -> float:
        return self.predicted / self.measured

    @property
    def close(self) -> bool:
        """Within a quarter."""
        return 0.75 <= self.ratio <= 1.25


def print_beside(measured: str, rows: Iterable[Row]) -> None:
    """A table of what was ``measured`` and the model's figures, with those marked that are not close."""
    print(f"| {measured} | measured | model | model / measured | |\n|---|---|---|---|---|")
    for row in rows:
        mark = "" if row.close else "OFF BY MORE THAN A QUARTER"
        print(f"| {row.name} | {row.measured:.4g} | {row.predicted:.4g} | {row.ratio:.2f} | {mark} |")


@dataclass
class Cost:
    """Seconds of the host and of the device, and what was not counted."""

    host: float = 0.0
    device: float = 0.0
    waits: int = 0
    kernels: int = 0
    unknown: Counter[str] = field(default_factory=Counter)

    @property
    def seconds(self) -> float:
        """The host queues ahead until it has to wait."""
        return max(self.host, self.device) + self.waits * WAIT


_RUNNING: list[Clock] = []


class Clock(TorchDispatchMode):
    """Adds up what the operators inside would cost, their stand-in sizes read as ``width``."""

    def __init__(self, width: int | None = None) -> None:
        super().__init__()
        self.width, self.cost, self.aside = width, Cost(), False
        self._patched = mock.patch.object(Tensor, "cpu", self._sent_by(Tensor.cpu))

    def __enter__(self) -> Any:
        self._patched.start()
        _RUNNING.append(self)
        return super().__enter__()

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        _RUNNING.remove(self)
        self._patched.stop()

    def _sent_by(self, cpu: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """``cpu``, which is a transfer that is waited for."""

        def sent(x: Tensor) -> Tensor:
            self.cost.waits += 1
            self.cost.device += self.bytes(x) / TRANSFER
            return cpu(x)

        return sent

    def size(self, n: int) -> int:
        """What a size of a stand-in stands for."""
        if self.width is None or n < STAND_IN:
            return n
        for extra in (0, 2, 1):
            if n % (STAND_IN + extra) == 0:
                return n // (STAND_IN + extra) * (self.width + extra)
        return n

    def numel(self, x: Tensor) -> float:
        """Elements in memory: a dimension of stride 0 has one."""
        count = 1.0
        for n, stride in zip(self.shape(x), x.stride(), strict=True):
            count *= n if stride or n <= 1 else 1
        return count

    def shape(self, x: Tensor) -> list[int]:
        """The real one. Only the last two dimensions are of features."""
        return [self.size(n) if k >= x.dim() - 2 else n for k, n in enumerate(x.shape)]

    def bytes(self, tensors: Any) -> float:
        """Of all tensors in a tree; what is given twice is read once."""
        found: dict[Any, float] = {}
        for x in tree_leaves(tensors):
            if isinstance(x, Tensor):
                key = x.untyped_storage()._cdata, x.storage_offset()
                found[key] = max(found.get(key, 0.0), self.numel(x) * x.element_size())
        return sum(found.values())

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        found = function(*args, **(kwargs or {}))
        if self.aside:
            return found
        cost = self.cost
        if name in READS:
            cost.waits += 1
        elif name in UNKNOWN:
            cost.unknown[name] += 1
        elif name in VIEWS or name == "_linalg_eigh":  # spectra have a model of their own
            cost.host += VIEW
        else:
            cost.host += LAUNCH
            cost.kernels += 1
            cost.device += max(LEAST_KERNEL, self.kernel(name, args, kwargs or {}, found))
        return found

    def kernel(self, name: str, args: Any, kwargs: Any, found: Any) -> float:
        """Seconds of one operator on the device."""
        moved = self.bytes((args, kwargs))
        if kwargs.get("out") is None:
            moved += self.bytes(found)
        if name == "native_layer_norm":
            return max(moved / PASS, self.numel(args[0]) / self.size(args[0].shape[-1]) * NORM)
        if name.startswith("_scaled_dot_product"):
            *batch, length, width = self.shape(args[0])
            return 4.0 * math.prod(batch) * length * self.size(args[1].shape[-2]) * width / ATTENTION
        if name not in MULTIPLY:
            return moved / PASS
        left, right = args[MULTIPLY[name] : MULTIPLY[name] + 2]
        *batch, m, k = self.shape(left)
        n = self.size(right.shape[-1])
        count = batch[0] if batch else 1
        if left.dtype != torch.float64:
            rate = FP32 if left.dtype == torch.float32 else HALF
            return 2.0 * count * m * n * k / rate + moved / STREAM
        m, n = _padded(m), _padded(n)
        return max(2.0 * count * m * n * k / _rate(min(m, n)), moved / STREAM, k * STEP)


@contextmanager
def uncounted(*, host: float = 0.0, device: float = 0.0, kernels: int = 0, waits: int = 0) -> Iterator[None]:
    """Inside, a clock that runs adds this up in place of what operators cost."""
    counting = [clock for clock in _RUNNING if not clock.aside]
    for clock in counting:
        clock.cost.host += host
        clock.cost.device += device
        clock.cost.kernels += kernels
        clock.cost.waits += waits
        clock.aside = True
    try:
        yield
    finally:
        for clock in counting:
            clock.aside = False


def _padded(n: int) -> int:
    """To whole tiles."""
    return 16 if n <= 16 else 32 if n <= 32 else -(-n // 64) * 64


def _rate(width: int) -> float:
    return FP64[max(size for size in FP64 if size <= max(width, 16))]


def timed(call: Callable[[], Any], width: int | None = None) -> Cost:
    """What ``call`` costs."""
    with Clock(width) as clock, torch.no_grad():
        call()
    return clock.cost
