"""``rgfast info``."""

from __future__ import annotations

import argparse
from typing import Any

from rgfast.commands.parser import add_json, print_json

__all__ = ["add_info"]


def add_info(commands: Any) -> None:
    """Add the subcommand to ``commands`` (what ``add_subparsers`` returned)."""
    info = commands.add_parser(
        "info",
        help="show versions, compiled and active instruction sets, threads, GPUs",
        description="Show what this installation can run: versions of rgfast and of what it\n"
        "stands on, whether the compiled module loads (else why not), instruction\n"
        "sets compiled, available and active, threads, GPUs, ops, and the\n"
        "environment variables that change any of it.",
        epilog="example:\n  rgfast info --json",
    )
    add_json(info, "all of it")
    info.set_defaults(run=_info)


def _info(args: argparse.Namespace) -> None:
    from rgfast.runtime.environment import describe, facts

    if args.json:
        print_json(facts())
    else:
        print(describe())
