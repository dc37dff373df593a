"""``rgfast bench --save``: kernels for GPUs timed against the others, so that `auto` takes them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence

import torch

from rgfast.bench.suite import BENCHMARKS, quiet
from rgfast.bench.timing import Call, Contest, Size, hold, ratio, turns
from rgfast.dispatch import ImplUnavailable, implementations
from rgfast.runtime.measured import Measured, architecture
from rgfast.version import __version__

__all__ = ["KERNELS", "kernels_of", "measured", "rows_of", "told_of"]

# The implementations that `auto` takes only where they were measured.
KERNELS = ("cuda", "triton")


def kernels_of(contest: Contest, device: str) -> list[str]:
    """The kernels for GPUs among the implementations of what the case times."""
    names = implementations(contest.op, device) if contest.op else ()
    return [name for name in names if name in KERNELS]


def measured(
    only: Sequence[str], *, seconds: float, size: Size, tell: Callable[[str], object], device: str = "cuda"
) -> Iterator[Measured]:
    """A row for every case and kernel that runs it, against the fastest other implementation.

    Raises WrongResult if a value is wrong, ValueError if ``device`` is no GPU.
    """
    for name in only:
        for contest in BENCHMARKS[name].contests(device, size):
            yield from rows_of(contest, seconds=seconds, tell=tell, device=device)


def rows_of(
    contest: Contest, *, seconds: float, tell: Callable[[str], object], device: str = "cuda"
) -> Iterator[Measured]:
    """As :func:`measured`, of one case."""
    place = torch.device(device)
    here = architecture(place)
    if here is None:
        raise ValueError(f"device must be a GPU, got {device!r}")
    if contest.op is None or not kernels_of(contest, device):
        return
    gpu = torch.cuda.get_device_name(place) if place.type == "cuda" else device
    data, calls = contest.data(), dict[str, Call]()
    with quiet(device):
        for impl in implementations(contest.op, device):
            if impl == "reference" and calls.keys() - {*KERNELS}:
                continue  # it comes last, and on a GPU it may take minutes
            try:
                hold(contest.check(data, impl))
                calls[impl] = contest.ours(data, impl)
            except ImplUnavailable as error:
                tell(f"skipped: {contest.case}: {error}")
        others = [impl for impl in calls if impl not in KERNELS]
        if not others or len(others) == len(calls):
            return
        spent = turns(calls, seconds, device=device)
    against = min(others, key=lambda impl: statistics.median(spent[impl]))
    for impl in calls:
        if impl in KERNELS:
            medians = statistics.median(spent[impl]), statistics.median(spent[against])
            times = ratio(spent[against], spent[impl])
            yield Measured(
                contest.op, impl, here, gpu, contest.case, against, *times, *medians,
                __version__, torch.__version__, contest.size,
            )  # fmt: skip


def told_of(row: Measured) -> str:
    """A row in words."""
    return f"{row.impl} of {row.op}, {row.case}: {row.times_faster:.2f} times as fast as {row.against}"
