"""The ``rgfast`` command. Exit codes: 0 done, 2 wrong input (one sentence on stderr), 130 interrupted."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

__all__ = ["main"]


def _parser() -> argparse.ArgumentParser:
    from rgfast.version import __version__

    parser = argparse.ArgumentParser(
        prog="rgfast",
        description="Measure what a residual stack coarse-grains, at every layer and position.",
        epilog="Exit codes: 0 done, 2 wrong input, 130 interrupted.",
    )
    parser.add_argument("--version", action="version", version=f"rgfast {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    reproduce = commands.add_parser(
        "reproduce",
        help="run the paper's experiment and print its verdicts",
        description="Train stacks on Markov chains, probe every layer and position, print the verdicts. "
        "Leaves verdict.json, result.nc, summary.csv, figures and config.json in the output folder; "
        "an interrupted experiment goes on where it was.",
    )
    source = reproduce.add_mutually_exclusive_group()
    source.add_argument(
        "--preset", choices=("quick", "full", "sequel"), help="set-up to run (default: quick)"
    )
    source.add_argument("--config", metavar="FILE", help="repeat the run that this config.json records")
    reproduce.add_argument("--seeds", type=int, nargs="+", metavar="N", help="seeds, e.g. 0 1 2")
    reproduce.add_argument("--xi", type=float, nargs="+", metavar="XI", help="correlation lengths, e.g. 1 7")
    reproduce.add_argument(
        "--chain",
        nargs="+",
        metavar="LABEL",
        help="chains, e.g. two-scale two-scale:r=30 lazy, or one matrix.npy (its own xi is used)",
    )
    reproduce.add_argument("--jobs", type=int, metavar="N", help="processes at once (default: one per core)")
    reproduce.add_argument("--out", metavar="DIR", help="output folder (default: runs/reproduce-PRESET)")
    reproduce.set_defaults(run=_reproduce)

    from rgfast.experiments.commands import add_studies

    add_studies(commands)
    info = commands.add_parser("info", help="versions, compiled and active ISA, threads, GPUs, ops")
    info.set_defaults(run=_info)
    return parser


def _reproduce(args: argparse.Namespace) -> None:
    from rgfast.experiments.reproduce import reproduce

    result = reproduce(
        args.preset,
        seeds=args.seeds,
        xi=args.xi,
        chains=args.chain,
        config=args.config,
        out=args.out,
        jobs=args.jobs,
    )
    print(result)
    print(f"\nwritten to {result.out}: verdict.json result.nc summary.csv config.json and figures (*.png)")


def _info(args: argparse.Namespace) -> None:
    from rgfast.environment import describe

    print(describe())


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code."""
    args = _parser().parse_args(argv)
    try:
        args.run(args)
    except KeyboardInterrupt:
        print("rgfast: interrupted; finished runs are kept", file=sys.stderr)
        return 130
    except (ValueError, TypeError, OSError, ArithmeticError) as error:
        if args.debug:
            raise
        print(f"rgfast: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
