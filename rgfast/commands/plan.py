"""``rgfast plan``: what a probe of a large model takes, from its numbers alone."""

from __future__ import annotations

import argparse
import re
from typing import Any

from rgfast.commands.parser import add_json, print_json

__all__ = ["add_plan"]


def add_plan(commands: Any) -> None:
    """Add the subcommand to ``commands`` (what ``add_subparsers`` returned)."""
    plan = commands.add_parser(
        "plan",
        help="what a probe of a large model takes on several GPUs, from its numbers",
        description="Count memory per rank, bytes over the network and operations of a probe from\n"
        "the numbers of a model, without the model, and name the option to take. A rank\n"
        "is a process with a GPU of its own. Times are predictions by ceilings that were\n"
        "measured on an H100, and by two assumed rates of the network; give your own\n"
        "with --rate.",
        epilog="examples:\n"
        "  rgfast plan --layers 81 --width 8192 --tokens 1e6 --ranks 8\n"
        "  rgfast plan --layers 81 --width 8192 --tokens 1e6 --ranks 64 --sharded\n"
        "  rgfast plan --layers 13 --width 768 --tokens 65536 --rate network=5e9 --json",
    )
    add = plan.add_argument
    add("--layers", type=int, required=True, metavar="N", help="points of the residual stream: blocks + 1")
    add("--width", type=int, required=True, metavar="N", help="features of each")
    add("--tokens", type=float, required=True, metavar="N", help="all tokens, such as 1e6")
    add("--ranks", type=int, default=1, metavar="N", help="processes that share them (default: 1)")
    add("--length", type=int, default=2048, metavar="T", help="tokens of a sequence (default: 2048)")
    add("--views", nargs="+", metavar="VIEW", help="position, pooled, mean_pooled, flattened (default: all)")
    add(
        "--positions",
        nargs="+",
        default=["auto"],
        metavar="T",
        help="indices, all, or auto (default: auto, all that fit the memory, else log-spaced)",
    )
    add("--groups", type=int, default=1, metavar="N", help="groups for standard errors (default: 1, none)")
    add("--memory", default="48GiB", metavar="SIZE", help="of one rank, for the state (default: 48GiB)")
    add(
        "--parameters",
        type=float,
        metavar="N",
        help="of the model, of 2 bytes each (default: 12 blocks width²)",
    )
    add("--batch", type=int, default=16384, metavar="N", help="tokens of a forward (default: 16384)")
    add("--activation-bytes", type=int, default=2, metavar="N", help="of a number of it (default: 2)")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="what ranks compute on (default: cuda)")
    add("--sharded", action="store_true", help="weights lie on all ranks in parts (FSDP2)")
    add(
        "--rate",
        nargs="+",
        default=[],
        metavar="NAME=WHAT",
        help="per second: forward, products (operations), copies, network, weights (bytes), "
        "eigenvalues (matrices of 1,024 rows) (default: an H100's)",
    )
    add_json(plan, "the plan")
    plan.set_defaults(run=_plan)


def _plan(args: argparse.Namespace) -> None:
    from rgfast.probing.cluster import plan_cluster

    found = plan_cluster(
        layers=args.layers,
        width=args.width,
        tokens=args.tokens,
        ranks=args.ranks,
        length=args.length,
        views=args.views,
        positions=_positions(args.positions),
        groups=args.groups,
        memory=args.memory,
        parameters=args.parameters,
        batch=args.batch,
        sharded=args.sharded,
        activation_bytes=args.activation_bytes,
        device=args.device,
        rates=dict(_rate(word) for word in args.rate),
    )
    if args.json:
        print_json(found.to_json())
    else:
        print(found)


def _positions(words: list[str]) -> str | list[int | str]:
    if words in (["auto"], ["all"]):
        return words[0]
    return [int(word) if re.fullmatch(r"-?\d+", word) else word for word in words]


def _rate(word: str) -> tuple[str, float]:
    name, _, value = word.partition("=")
    try:
        return name, float(value)
    except ValueError:
        raise ValueError(f"rate must be NAME=VALUE such as network=5e9, got {word}") from None
