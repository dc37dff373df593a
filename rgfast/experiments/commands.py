"""The studies on the command line."""

from __future__ import annotations

import argparse
from typing import Any

__all__ = ["add_studies"]


def add_studies(commands: Any) -> None:
    """Add a subcommand for every study to ``commands`` (what ``add_subparsers`` returned)."""
    sweep = commands.add_parser(
        "sweep",
        help="run a grid of chain, correlation length, width and seed",
        description="Every finished point is a file in OUT/points: a sweep that was stopped goes on where it "
        "was, and points computed elsewhere can be merged.",
    )
    sweep.add_argument("--design", choices=("xi", "relevance"), default="xi", help="the grid (default: xi)")
    sweep.add_argument("--quick", action="store_true", help="a reduced grid to see that it runs; no result")
    _common(sweep, "sweep-DESIGN")
    sweep.set_defaults(run=_sweep)

    many = commands.add_parser(
        "multiverse",
        help="run every finding in 64 set-ups",
        description="Initialisation, norm, mixing, width, mask rate and learning rate varied together: each "
        "finding's effect with its interval, sorted, the default marked. Resumable as sweep is.",
    )
    many.add_argument("--quick", action="store_true", help="4 set-ups to see that it runs; no result")
    _common(many, "multiverse")
    many.set_defaults(run=_multiverse)


def _common(parser: argparse.ArgumentParser, out: str) -> None:
    parser.add_argument("--seeds", type=int, nargs="+", metavar="N", help="seeds instead of the design's")
    parser.add_argument("--jobs", type=int, metavar="N", help="processes at once (default: one per core)")
    parser.add_argument("--out", metavar="DIR", help=f"output folder (default: runs/{out})")
    parser.add_argument(
        "--merge", nargs="+", default=(), metavar="DIR", help="take over the points in these folders first"
    )


def _options(args: argparse.Namespace) -> dict[str, Any]:
    return {"seeds": args.seeds, "jobs": args.jobs, "out": args.out, "merge": args.merge}


def _sweep(args: argparse.Namespace) -> None:
    from rgfast.experiments.sweep import sweep

    done = sweep(args.design, quick=args.quick, **_options(args))
    print(done)
    print(f"\nwritten to {done.out}")


def _multiverse(args: argparse.Namespace) -> None:
    from rgfast.experiments.multiverse import multiverse

    done = multiverse(quick=args.quick, **_options(args))
    print(done)
    print(f"\nwritten to {done.out}")
