"""How torch's routines are run by implementations, and what they cost on a GPU for the rooms' models of time.

Rates of memory and products are an H100's, measured. Launches, waits and copies to the host are assumed.
A choice between implementations takes their ratios, which differ less from card to card than they do.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Protocol

import torch

from rgfast.runtime.threads import no_autocast, one_thread

__all__ = [
    "LAUNCH",
    "PRODUCTS",
    "STREAM",
    "TRANSFER",
    "WAIT",
    "between",
    "by_itself",
    "by_name_on_cpu",
    "cache_bytes",
    "memory_bytes",
    "seconds",
]

# Seconds per operator of eager PyTorch, bytes per second through memory and to the host, fp64 products per
# second of its batched GEMMs, and seconds that a wait for the device costs.
LAUNCH, STREAM, TRANSFER, PRODUCTS, WAIT = 4.5e-6, 2.9e12, 20e9, 30e12, 5e-5
_USUAL_CACHE, _USUAL_MEMORY = 40 << 20, 80 << 30


@contextmanager
def by_itself(kind: str) -> Iterator[None]:
    """Outside autocast, and on one thread of the CPU: the library's bits depend on their number."""
    with no_autocast(kind):
        if kind != "cpu":
            yield
            return
        with one_thread():
            yield


class _Placed(Protocol):
    @property
    def device(self) -> torch.device: ...


def by_name_on_cpu(call: _Placed) -> str | None:
    """Why `auto` does not take the library's products of a call, if it is on the CPU."""
    here = call.device.type == "cpu"
    return "on the CPU it multiplies as the reference does, which keeps the bits there" if here else None


def seconds(launches: float, moved: float, products: float = 0.0) -> float:
    """About how long so many operators take that move so many bytes and multiply so often in fp64.

    The host queues ahead of the device, so that the slower of the two counts.
    """
    return max(LAUNCH * launches, moved / STREAM + products / PRODUCTS)


def between(table: dict[int, tuple[float, ...]], d: int) -> tuple[float, ...]:
    """A row of a table, between two sizes along a power of the size; those of its ends beyond them."""
    sizes = sorted(table)
    d = min(max(d, sizes[0]), sizes[-1])
    above = next(size for size in sizes if size >= d)
    if d == above:
        return table[d]
    below = sizes[sizes.index(above) - 1]
    at = math.log(d / below) / math.log(above / below)
    return tuple(low ** (1 - at) * high**at for low, high in zip(table[below], table[above], strict=True))


def cache_bytes(device: torch.device) -> int:
    """Bytes of the second-level cache of a GPU: a usual size where torch does not know it."""
    return _sizes(device)[0]


def memory_bytes(device: torch.device) -> int:
    """Bytes of memory of a GPU: a usual size where torch does not know it."""
    return _sizes(device)[1]


def _sizes(device: torch.device) -> tuple[int, int]:
    if device.type != "cuda" or not torch.cuda.is_available():
        return _USUAL_CACHE, _USUAL_MEMORY
    return _sizes_of(torch.cuda.current_device() if device.index is None else device.index)


@lru_cache(maxsize=64)
def _sizes_of(index: int) -> tuple[int, int]:
    found = torch.cuda.get_device_properties(index)
    return int(getattr(found, "L2_cache_size", 0)) or _USUAL_CACHE, int(found.total_memory)
