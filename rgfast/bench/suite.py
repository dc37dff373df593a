"""All benchmarks in one go: the gate, then the contests, one table and one JSON document."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib import import_module
from types import ModuleType
from typing import Any

import torch

from rgfast.bench import ROOMS
from rgfast.bench.timing import Checked, Row, WrongResult, run_contest
from rgfast.dispatch import FallbackWarning
from rgfast.runtime.environment import facts

__all__ = ["BENCHMARKS", "Report", "check_all", "devices", "quiet", "run"]

BENCHMARKS: dict[str, ModuleType] = {name: import_module(f"rgfast.bench.{name}") for name in ROOMS}
_HEAD = (
    "benchmark",
    "case",
    "device",
    "impl",
    "against",
    "times faster",
    "quartiles",
    "ours, ms",
    "theirs, ms",
)


def devices(asked: str | None = None) -> list[str]:
    """Where the cases run: the CPU, and a GPU if torch finds one; or the one that is asked for alone.

    Raises ValueError if that is a GPU, and torch finds none.
    """
    here = torch.cuda.is_available()
    if asked is None:
        return ["cpu", "cuda"] if here else ["cpu"]
    if asked == "cuda" and not here:
        raise ValueError(f"device must be cpu, got 'cuda': torch {torch.__version__} finds no GPU here")
    return [asked]


@dataclass
class Report:
    """What was checked, timed and skipped, and on which machine."""

    command: str
    quick: bool
    devices: list[str] = field(default_factory=devices)
    machine: dict[str, Any] = field(default_factory=facts)
    gate: list[Checked] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def green(self) -> bool:
        """Whether every value was right."""
        return all(check.good for check in self.gate)

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON can hold it."""
        return {
            "format": "rgfast.bench/1",
            "command": self.command,
            "quick": self.quick,
            "devices": self.devices,
            "machine": self.machine,
            "green": self.green,
            "gate": [{**asdict(check), "good": check.good} for check in self.gate],
            "rows": [asdict(row) for row in self.rows],
            "skipped": self.skipped,
        }

    def head(self) -> str:
        """A sentence on the machine and on how to read the table."""
        found = self.machine
        native = found["native"]["active"] or f"none ({found['native']['absent']})"
        gpus = f", {', '.join(found['gpus'])}" if found["gpus"] else ""
        return (
            f"`{self.command}`: {found['cpu']}{gpus}, compiled kernels {native}, {found['threads']} threads, "
            f"torch {found['versions']['torch']}, rgfast {found['versions']['rgfast']}. Medians of calls in "
            "turns in one process, each value checked against fp64 first; below 1 the other is faster."
        )

    def markdown(self) -> str:
        """The table, with its head and what was skipped."""
        lines = [self.head(), "", table_line(_HEAD), table_line(["---"] * len(_HEAD))]
        lines += [row_line(row) for row in self.rows]
        lines += [""] * bool(self.skipped) + [
            f"- skipped: {name} {why}" for name, why in self.skipped.items()
        ]
        return "\n".join(lines) + "\n"


def check_all(report: Report, only: Sequence[str], tell: Callable[[str], object]) -> None:
    """Fill the report's gate; every check is told."""
    for name in only:
        for device in report.devices:
            with quiet(device):
                for check in BENCHMARKS[name].gate(device):
                    report.gate.append(check)
                    tell(f"{'ok ' if check.good else 'RED'} {name} on {device}: {check}")


def run(
    report: Report, only: Sequence[str], *, seconds: float, tell: Callable[[str], object]
) -> Iterator[Row]:
    """Time everything, a row at a time; rows and what was skipped go into the report as well.

    A value that turns out wrong on a case's own data goes into the gate as red, and ends it.
    """

    def skip(rival: str, why: str) -> None:
        if rival not in report.skipped:
            tell(f"skipped: {rival} {why}")
        report.skipped[rival] = why

    for name in only:
        for device in report.devices:
            with quiet(device):
                for contest in BENCHMARKS[name].contests(device, "quick" if report.quick else "full"):
                    try:
                        rows = run_contest(name, contest, seconds, device=device, skip=skip)
                    except WrongResult as error:
                        report.gate.append(error.check)
                        return
                    report.rows += rows
                    yield from rows


def row_line(row: Row) -> str:
    """A row of the table."""
    return table_line(
        (
            row.benchmark,
            row.case,
            row.device,
            row.impl,
            row.against,
            f"{row.times_faster:.2f}",
            f"{row.low:.2f} to {row.high:.2f}",
            f"{1e3 * row.seconds:.3g}",
            f"{1e3 * row.rival_seconds:.3g}",
        )
    )


def table_line(cells: Sequence[str]) -> str:
    """Cells as a line of a Markdown table."""
    return f"| {' | '.join(cells)} |"


@contextlib.contextmanager
def quiet(device: str) -> Iterator[None]:
    """On a GPU the reference may be what is timed, and the table says so: no warning that it was taken."""
    with warnings.catch_warnings():
        if device != "cpu":
            warnings.simplefilter("ignore", FallbackWarning)
        yield
