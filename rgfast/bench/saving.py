"""``rgfast bench --save``: kernels for GPUs timed against the others, so that `auto` takes them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence

import torch

from rgfast.bench.suite import BENCHMARKS, quiet
from rgfast.bench.timing import Call, Size, hold, ratio, turns
from rgfast.dispatch import ImplUnavailable, implementations
from rgfast.runtime.measured import Measured, architecture
from rgfast.version import __version__

__all__ = ["KERNELS", "measured"]

# The implementations that `auto` takes only where they were measured.
KERNELS = ("cuda", "triton")


def measured(
    only: Sequence[str], *, seconds: float, size: Size, tell: Callable[[str], object], device: str = "cuda"
) -> Iterator[Measured]:
    """A row for every case and kernel that runs it, against the fastest other implementation.

    Raises WrongResult if a value is wrong, ValueError if ``device`` is no GPU.
    """
    place = torch.device(device)
    here = architecture(place)
    if here is None:
        raise ValueError(f"device must be a GPU, got {device!r}")
    gpu = torch.cuda.get_device_name(place) if place.type == "cuda" else device
    for name in only:
        for contest in BENCHMARKS[name].contests(device, size):
            names = implementations(contest.op, device) if contest.op else ()
            if contest.op is None or not set(names) & {*KERNELS}:
                continue
            data, calls = contest.data(), dict[str, Call]()
            with quiet(device):
                for impl in names:
                    try:
                        hold(contest.check(data, impl))
                        calls[impl] = contest.ours(data, impl)
                    except ImplUnavailable as error:
                        tell(f"skipped: {contest.case}: {error}")
                others = [impl for impl in calls if impl not in KERNELS]
                if not others or len(others) == len(calls):
                    continue
                spent = turns(calls, seconds, device=device)
            against = min(others, key=lambda impl: statistics.median(spent[impl]))
            for impl in calls:
                if impl in KERNELS:
                    medians = statistics.median(spent[impl]), statistics.median(spent[against])
                    times = ratio(spent[against], spent[impl])
                    yield Measured(
                        contest.op, impl, here, gpu, contest.case, against, *times, *medians,
                        __version__, torch.__version__,
                    )  # fmt: skip
