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

    spaced = commands.add_parser(
        "decimate",
        help="show one trained network only every k-th token: every correlation length at the same weights",
        description="A stack trained at ξ = 7 with random mask rates is probed with every k-th token shown, "
        "and with as many tokens side by side. Resumable as sweep is.",
    )
    spaced.add_argument("--quick", action="store_true", help="short training to see that it runs; no result")
    _common(spaced, "decimation")
    spaced.set_defaults(run=_decimate)

    ideal = commands.add_parser(
        "observe",
        help="compare each layer with ideal observers who see only so far",
        description="CKA between every layer and the exact posterior from visible tokens within each radius, "
        "and the slope of the ridge. Resumable as sweep is.",
    )
    ideal.add_argument("--quick", action="store_true", help="short training to see that it runs; no result")
    _common(ideal, "observer")
    ideal.set_defaults(run=_observe)


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


def _decimate(args: argparse.Namespace) -> None:
    from rgfast.experiments.decimation import decimate

    done = decimate(quick=args.quick, **_options(args))
    print(done)
    print(f"\nwritten to {done.out}")


def _observe(args: argparse.Namespace) -> None:
    from rgfast.experiments.observer import observe

    done = observe(quick=args.quick, **_options(args))
    print(done)
    print(f"\nwritten to {done.out}")
