"""The benchmark of `make gpu-check`, in a process of its own, which a kernel may take down.

First every kernel against the fastest other implementation, which makes measured rows; then, since `auto`
takes kernels by those, every case against its rivals.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from rgfast.bench import saving, suite
from rgfast.bench.timing import Contest, WrongResult, run_contest
from rgfast.runtime import measured

__all__ = ["AGAIN", "DONE", "Log", "benchmark"]

# AGAIN: another process has to go on.
DONE, AGAIN = 0, 4
_KERNELS, _RIVALS = "kernels", "rivals"
_SHARE = 0.5  # of the time, for kernels


class Log:
    """What was timed so far, in a file that outlives the process.

    The case that ran when the last one ended has failed, unless that was ``stopped`` for want of time.
    """

    def __init__(self, path: Path, *, stopped: bool = False) -> None:
        self._path = path
        self.state: dict[str, Any] = {
            "rows": [], "kernels": [], "gate": [], "skipped": {}, "failed": {}, "not_run": [],
            "begun": [], "running": None,
        }  # fmt: skip
        if path.exists():
            self.state = json.loads(path.read_text(encoding="utf-8"))
            if stopped and self.state["running"] is not None:
                self.late()
            elif self.state["running"] is not None:
                self.end("the process died")

    @property
    def green(self) -> bool:
        """Whether nothing went wrong."""
        return not self.state["failed"] and all(check["good"] for check in self.state["gate"])

    def begin(self, case: str) -> bool:
        """Note that a case begins; False if it has before."""
        if case in self.state["begun"]:
            return False
        self.state["begun"].append(case)
        self.state["running"] = case
        self._write()
        return True

    def end(self, failure: str | None = None) -> None:
        """Note that the case is over."""
        if failure is not None:
            self.state["failed"][self.state["running"]] = failure
        self.state["running"] = None
        self._write()

    def late(self) -> None:
        """Note that there is no time for the case."""
        self.state["not_run"].append(self.state["running"])
        self.end()

    def _write(self) -> None:
        new = self._path.with_suffix(".new")
        new.write_text(json.dumps(self.state), encoding="utf-8")
        new.replace(self._path)


def benchmark(log: Log, until: float, device: str, seconds: float, size: Any = "quick") -> int:
    """Time every case that fits. Returns DONE, or AGAIN: a kernel took the process down, or rows are new."""
    kernels_until, new = time.time() + _SHARE * (until - time.time()), False
    for phase, end in ((_KERNELS, kernels_until), (_RIVALS, until)):
        if phase == _RIVALS and log.state["kernels"]:
            measured.save(measured.Measured(**row) for row in log.state["kernels"])
            if new:  # what was chosen without them is kept
                return AGAIN
        # Of the rivals the probe first: it is what all of this is for.
        for name in sorted(suite.BENCHMARKS, key=lambda name: (phase == _KERNELS) == (name == "probe")):
            for contest in suite.BENCHMARKS[name].contests(device, size):
                if phase == _KERNELS and not saving.kernels_of(contest, device):
                    continue
                case = f"{name}: {contest.case}, {phase}"
                if not log.begin(case):
                    continue
                if time.time() > end:
                    log.late()
                    continue
                new = new or phase == _KERNELS
                failure = _timed(log, phase, name, contest, device, seconds)
                log.end(failure)
                if failure is not None and _dead(device):
                    return AGAIN
    return DONE


def _timed(log: Log, phase: str, name: str, contest: Contest, device: str, seconds: float) -> str | None:
    """Put a case into the log, or say what went wrong."""
    try:
        if phase == _KERNELS:
            told: list[str] = []
            for each in saving.rows_of(contest, seconds=seconds, tell=told.append, device=device):
                log.state["kernels"].append(each._asdict())
                print(saving.told_of(each), flush=True)
            log.state["skipped"].update((line.removeprefix("skipped: "), "") for line in told)
            return None
        with suite.quiet(device):
            rows = run_contest(name, contest, seconds, device=device, skip=log.state["skipped"].__setitem__)
        for row in rows:
            log.state["rows"].append(asdict(row))
            print(suite.row_line(row), flush=True)
    except WrongResult as error:
        log.state["gate"].append({**asdict(error.check), "good": False})
    except Exception as error:  # of the driver, of torch, of Triton's compiler, or for want of memory
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"
    return None


def _dead(device: str) -> bool:
    """Whether an earlier error of a kernel is that of every call from now on."""
    if device != "cuda":
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False
