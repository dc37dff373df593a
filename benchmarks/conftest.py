"""``pytest benchmarks --benchmark-only``: every case of ``rgfast/bench/`` by every implementation and rival.

A file ``bench_<room>.py`` names its ROOM, and its test is made here for each case, device and contender.
Without a benchmark option, as in `make test`, the tiniest cases run once and nothing is timed.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import pytest
import torch

from rgfast.bench.suite import devices, quiet
from rgfast.bench.timing import Absent, Contest, hold, on_one_thread, wait
from rgfast.dispatch import ImplUnavailable, implementations
from rgfast.runtime import native
from rgfast.runtime.environment import facts

ONE_THREAD = " on one thread"


@dataclass(frozen=True, eq=False)
class Entry:
    """One contender in one case: "auto", the name of an implementation, or a rival."""

    contest: Contest
    device: str
    contender: str


def pytest_configure(config):
    # The project's options disable timing; asking for nothing else enables it.
    if config.option.benchmark_only:
        config.option.benchmark_disable = False


def pytest_benchmark_update_machine_info(config, machine_info):
    found = facts()
    machine_info |= {"processor": found["cpu"], "rgfast": found}


def pytest_generate_tests(metafunc):
    option = metafunc.config.option
    disabled = option.benchmark_disable and not option.benchmark_enable
    entries = {}
    for device in devices():
        for size in ("tiny",) if disabled else ("quick", "full"):
            for contest in metafunc.module.ROOM.contests(device, size):
                for contender in contenders(contest, device):
                    # A full case that is a quick one as well is timed once.
                    entries.setdefault((device, contest.case, contender), (size, contest))
    metafunc.parametrize(
        "entry",
        [
            pytest.param(Entry(contest, device, contender), id=f"{size}-{device}-{case}-{contender}")
            for (device, case, contender), (size, contest) in entries.items()
        ],
    )


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    """Bring the contenders of a case together again, whose input is made once."""
    first: dict[int, int] = {}
    place = {}
    for number, item in enumerate(items):
        entry = getattr(item, "callspec", None) and item.callspec.params.get("entry")
        place[item] = first.setdefault(id(entry.contest), number) if isinstance(entry, Entry) else number
    items.sort(key=place.__getitem__)


def contenders(contest: Contest, device: str) -> list[str]:
    named = implementations(contest.op, device) if contest.op else ()
    found = ["auto", *named]
    for rival in contest.rivals:
        found.append(rival)
        if contest.one_thread and torch.get_num_threads() > 1:
            found.append(rival + ONE_THREAD)
    return found


@lru_cache(maxsize=1)
def data_of(contest: Contest) -> Any:
    return contest.data()


@pytest.fixture
def time_checked(benchmark):
    """Time one entry, after its value was compared with the truth: a wrong one has no time."""

    def run(entry: Entry) -> None:
        contest, device, contender = entry.contest, entry.device, entry.contender
        data = data_of(contest)
        benchmark.group = f"{contest.case} on {device}"
        benchmark.name = contender
        benchmark.extra_info |= {"device": device, "threads": torch.get_num_threads()}
        rival = contest.rivals.get(contender.removesuffix(ONE_THREAD))
        with quiet(device):
            try:
                if rival is None:
                    checked = contest.check(data, contender)
                    hold(checked)
                    benchmark.extra_info |= {"isa": native.active_isa(), "error": checked.error}
                    call = contest.ours(data, contender)
                else:
                    call = rival(data)
            except (Absent, ImplUnavailable) as error:
                pytest.skip(f"{contender} {error}")
            if contender.endswith(ONE_THREAD):
                call = on_one_thread(call)

            def timed() -> None:
                call()
                wait(device)

            benchmark(timed)

    return run
