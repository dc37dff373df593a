"""``rgfast bench``: what is how fast on this machine, after a check that it is right."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rgfast.bench import ROOMS
from rgfast.commands.errors import DONE, FAILED
from rgfast.commands.parser import add_json, print_json

if TYPE_CHECKING:
    from rgfast.bench.suite import Report

__all__ = ["add_bench"]


def add_bench(commands: Any) -> None:
    """Add the subcommand to ``commands`` (what ``add_subparsers`` returned)."""
    bench = commands.add_parser(
        "bench",
        help="check every op against the truth, then time it on this machine",
        description="First a correctness gate: every op on small inputs against fp64 truth. Where\n"
        "a value is wrong nothing is timed, and the exit code is 1. Then each case in\n"
        "turns with its rivals in one process: plain PyTorch, and pytorch-cka and\n"
        "torch.compile where they are there (else skipped by name). On a GPU, where\n"
        "there is one, the same cases run once more; --device takes one of the two.\n\n"
        "Prints one Markdown table, the cases where we lose included, and leaves it in\n"
        "DIR as bench.md, and as bench.json with versions, instruction set and threads.\n\n"
        "benchmarks:\n" + "\n".join(f"  {name:<13} {what}" for name, what in ROOMS.items()),
        epilog="examples:\n"
        "  rgfast bench --quick\n"
        "  rgfast bench --only cka probe --threads 1 --out runs/bench-one\n"
        "  rgfast bench --device cuda --only spectrum moments\n"
        "  rgfast bench --device cuda --save\n"
        "  RGFAST_ISA=avx2 rgfast bench --json > bench.json",
    )
    bench.add_argument("--quick", action="store_true", help="few and small cases: under two minutes")
    bench.add_argument(
        "--only", nargs="+", choices=tuple(ROOMS), metavar="NAME", help=f"{', '.join(ROOMS)} (default: all)"
    )
    bench.add_argument(
        "--device", choices=("cpu", "cuda"), help="where the cases run (default: both, if there is a GPU)"
    )
    bench.add_argument(
        "--save",
        action="store_true",
        help="time our kernels for GPUs, too, and save that for this user: auto takes a kernel only on an "
        "architecture where it was measured (with --device cuda)",
    )
    bench.add_argument("--threads", type=int, metavar="N", help="threads (default: torch's own number)")
    bench.add_argument(
        "--seconds", type=float, metavar="S", help="time for each case (default: 1.5, with --quick 0.5)"
    )
    bench.add_argument(
        "--out", metavar="DIR", default="runs/bench", help="output folder (default: runs/bench)"
    )
    add_json(bench, "the JSON document")
    bench.set_defaults(run=_bench)


def _bench(args: argparse.Namespace) -> int:
    import torch

    from rgfast.bench import suite
    from rgfast.bench.timing import threads
    from rgfast.files import as_json, write_text
    from rgfast.runtime.measured import saved
    from rgfast.validation import check_integer

    if args.threads is not None:
        check_integer(args.threads, "threads", least=1, most=os.cpu_count())
    if args.save and args.device != "cuda":
        raise ValueError("save must come with device cuda: what is saved are times of kernels for GPUs")
    where = suite.devices(args.device)
    if args.save:
        saved()  # a file that cannot be read is refused before anything is timed
    seconds = (0.5 if args.quick else 1.5) if args.seconds is None else args.seconds
    if not 0 < seconds < 3600:
        raise ValueError(f"seconds must lie between 0 and 3600, got {seconds:g}")
    out = Path(args.out)
    if out.exists() and not out.is_dir():
        raise ValueError(f"out must be a folder, and {out} is a file")
    out.mkdir(parents=True, exist_ok=True)
    only = tuple(name for name in ROOMS if args.only is None or name in args.only)

    with threads(args.threads or torch.get_num_threads()):
        report = suite.Report(shlex.join(["rgfast", "bench", *_said(args)]), args.quick, where)
        suite.check_all(report, only, _aside)
        if report.green:
            if not args.json:
                print("\n".join(report.markdown().splitlines()[:4]), flush=True)
            try:
                for row in suite.run(report, only, seconds=seconds, tell=_aside):
                    if not args.json:
                        print(suite.row_line(row), flush=True)
                if args.save and report.green:
                    _save(report, only, seconds)
            except KeyboardInterrupt as stop:
                stop.args = ("nothing was written",)
                raise
    write_text(out / "bench.json", as_json(report.to_dict()))
    if report.green:
        write_text(out / "bench.md", report.markdown())
    else:
        # The table of an earlier run is not borne out by this one.
        (out / "bench.md").unlink(missing_ok=True)
    if args.json:
        print_json(report.to_dict())
    if not report.green:
        red = "; ".join(str(check) for check in report.gate if not check.good)
        _aside(f"rgfast: the correctness gate is red, so nothing more is timed: {red}")
        return FAILED
    _aside(f"\nwritten to {out}: bench.md bench.json")
    return DONE


def _save(report: Report, only: Sequence[str], seconds: float) -> None:
    """Time kernels against other implementations, and put that into the user's table unless one is wrong."""
    from rgfast.bench.saving import measured, told_of
    from rgfast.bench.timing import WrongResult
    from rgfast.runtime.measured import save

    rows = []
    try:
        for row in measured(only, seconds=seconds, size="quick" if report.quick else "full", tell=_aside):
            _aside(told_of(row))
            rows.append(row)
    except WrongResult as error:
        report.gate.append(error.check)
        return
    _aside(f"saved to {save(rows)}" if rows else "nothing was saved: no kernel for GPUs ran")


def _said(args: argparse.Namespace) -> list[str]:
    """The options that decide what is measured, as they were given."""
    words = ["--quick"] if args.quick else []
    words += ["--only", *args.only] if args.only else []
    words += ["--device", args.device] if args.device else []
    words += ["--save"] if args.save else []
    words += ["--threads", str(args.threads)] if args.threads else []
    return words + (["--seconds", f"{args.seconds:g}"] if args.seconds else [])


def _aside(line: str) -> None:
    """What is no part of the result goes to stderr."""
    print(line, file=sys.stderr, flush=True)
