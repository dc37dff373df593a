"""Reports on the command line."""

from __future__ import annotations

import argparse
from typing import Any

__all__ = ["add_report"]


def add_report(commands: Any) -> None:
    """Add the subcommand ``report`` to ``commands`` (what ``add_subparsers`` returned)."""
    parser = commands.add_parser(
        "report",
        help="write one self-contained HTML page of a saved result",
        description="Write one HTML page of a saved result: verdicts with their definitions in\n"
        "words, robustness tables, interactive figures (pointing at a value tells\n"
        "layer, position, value and n), configuration and provenance. It opens\n"
        "offline: everything is inside.",
        epilog="examples:\n"
        "  rgfast report runs/reproduce-quick\n"
        "  rgfast report runs/multiverse --out multiverse.html\n"
        "  rgfast report run.nc",
    )
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="a saved probe (.nc), a result.nc, or the folder of reproduce or a study",
    )
    parser.add_argument(
        "--out", metavar="FILE", help="the page (default: report.html in the folder, or SOURCE with .html)"
    )
    parser.set_defaults(run=_report)


def _report(args: argparse.Namespace) -> None:
    from rgfast.report import write_report

    print(f"written to {write_report(args.source, args.out)}")
