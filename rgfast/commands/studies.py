"""The studies on the command line."""

from __future__ import annotations

import argparse
import json
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from rgfast.commands.parser import add_json, print_json

__all__ = ["add_studies"]

_RESUME = (
    "Every finished point is a file in DIR/points: a study that was stopped goes\n"
    "on where it was when it is started again, and points computed elsewhere can\n"
    "be merged."
)


def add_studies(commands: Any) -> None:
    """Add a subcommand for every study to ``commands`` (what ``add_subparsers`` returned)."""
    sweep = commands.add_parser(
        "sweep",
        help="run a grid of chain, correlation length, width and seed",
        description="Train and probe one stack for every point of a grid, and print and save the\n"
        "table: where the flow ends, and what decides it.\n\n"
        "designs:\n"
        "  xi         four kinds of chain at seven correlation lengths from 0.5 to\n"
        "             10, 3 seeds: R by correlation length and chain\n"
        "  relevance  27 cells (two-scale chains of 2, 4, 8 clusters with 3 exponents\n"
        "             at 3 correlation lengths) at widths 16 and 48, 2 seeds: is the\n"
        "             final rank that of the exact Bayes posterior?\n\n" + _RESUME,
        epilog="examples:\n"
        "  rgfast sweep --design xi --quick\n"
        "  rgfast sweep --design relevance --seeds 0 1 --jobs 2 --out runs/relevance\n"
        "  rgfast sweep --design relevance --out runs/all --merge runs/a runs/b",
    )
    sweep.add_argument("--design", choices=("xi", "relevance"), default="xi", help="the grid (default: xi)")
    _common(sweep, "sweep-DESIGN", "a reduced grid with short training")
    sweep.set_defaults(run=_sweep)

    many = commands.add_parser(
        "multiverse",
        help="run every finding in 64 set-ups",
        description="Vary initialisation, norm, mixing, width, mask rate and learning rate\n"
        "together, and give each finding's effect in every set-up with its interval,\n"
        "sorted, the default marked: does a finding hang on choices that the source\n"
        "does not tell?\n\n" + _RESUME,
        epilog="examples:\n  rgfast multiverse --quick\n  rgfast multiverse --jobs 2 --out runs/multiverse",
    )
    _common(many, "multiverse", "4 set-ups")
    many.set_defaults(run=partial(_study, "multiverse", "multiverse"))

    known = commands.add_parser(
        "setups",
        help="run set-ups that the papers may have had, and tell what each can show",
        description="Train and probe stacks without and with mixing across positions, at the size\n"
        "of arXiv 2607.15449: which of the two papers' statements can hold together?\n\n"
        "parts, in the order in which they run:\n"
        "  a  the exact null: no mixing, one target per sequence\n"
        "  b  no mixing, on a chain whose stationary distribution moves with ξ\n"
        "  c  no mixing, one-hot → linear, PyTorch's initialization, MASK and BERT\n"
        "  d  mixing across positions: mixer and flat\n\n" + _RESUME,
        epilog="examples:\n"
        "  rgfast setups --quick\n"
        "  rgfast setups --part a b --jobs 2 --out runs/setups\n"
        "  rgfast setups --part none --out runs/setups",
    )
    _common(known, "setups", "every part")
    known.add_argument(
        "--part",
        nargs="+",
        choices=("a", "b", "c", "d", "none"),
        metavar="PART",
        help="run these parts alone, or none: what is finished is read and drawn (default: all)",
    )
    known.set_defaults(run=_setups)

    spaced = commands.add_parser(
        "decimate",
        help="show one trained network only every k-th token: every correlation length at the same weights",
        description="Train one stack at correlation length 7 with random mask rates, then probe it\n"
        "with every k-th token shown (a chain of correlation length 7/k), and with as\n"
        "many tokens side by side.\n\n" + _RESUME,
        epilog="examples:\n  rgfast decimate --quick\n  rgfast decimate --seeds 0 1 2 --out runs/decimation",
    )
    _common(spaced, "decimation", "two spacings with short training")
    spaced.set_defaults(run=partial(_study, "decimation", "decimate"))

    ideal = commands.add_parser(
        "observe",
        help="compare each layer with ideal observers who see only so far",
        description="CKA between every layer and the exact posterior from the visible tokens\n"
        "within each radius, and the slope of the ridge: does depth integrate scale?\n\n" + _RESUME,
        epilog="examples:\n  rgfast observe --quick\n  rgfast observe --seeds 0 1 2 --out runs/observer",
    )
    _common(ideal, "observer", "four radii with short training")
    ideal.set_defaults(run=partial(_study, "observer", "observe"))


def _common(parser: argparse.ArgumentParser, out: str, quick: str) -> None:
    parser.add_argument("--quick", action="store_true", help=f"{quick}, to see that it runs; no result")
    parser.add_argument(
        "--seeds", type=int, nargs="+", metavar="N", help="seeds, e.g. 0 1 2 (default: the design's)"
    )
    parser.add_argument("--jobs", type=int, metavar="N", help="processes at once (default: one per core)")
    parser.add_argument("--out", metavar="DIR", help=f"output folder (default: runs/{out})")
    parser.add_argument(
        "--merge",
        nargs="+",
        default=(),
        metavar="DIR",
        help="take over the points in these folders of the same study first (default: none)",
    )
    add_json(parser, "what the study found")


def _options(args: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(args, name) for name in ("quick", "seeds", "jobs", "out", "merge")}


def _sweep(args: argparse.Namespace) -> None:
    from rgfast.experiments.sweep import FORMAT, sweep

    done = sweep(args.design, **_options(args))
    if args.json:
        test = None if done.test is None else done.test.to_dict()
        points = done.table.to_dict("records")
        print_json({"format": FORMAT, "out": str(done.out), "points": points, "test": test})
    else:
        _tell(done)


def _setups(args: argparse.Namespace) -> None:
    if args.part and "none" in args.part and len(args.part) > 1:
        raise ValueError(f"--part none goes alone, got {' '.join(args.part)}")
    parts = None if args.part is None else [part for part in args.part if part != "none"]
    _study("setups", "setups", args, parts=parts)


def _study(module: str, name: str, args: argparse.Namespace, **more: Any) -> None:
    """Run the study that is the function ``name`` of a module, which is slow to import."""
    done = getattr(import_module(f"rgfast.experiments.{module}"), name)(**_options(args), **more)
    if args.json:
        out: Path = done.out
        summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
        print_json({**summary, "out": str(out)})
    else:
        _tell(done)


def _tell(done: Any) -> None:
    print(done)
    print(f"\nwritten to {done.out}")
