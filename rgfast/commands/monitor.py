"""A monitor's file on the command line."""

from __future__ import annotations

import argparse
from typing import Any

from rgfast.commands.parser import add_json, print_json

__all__ = ["add_monitor"]


def add_monitor(commands: Any) -> None:
    """Add the subcommand ``monitor`` to ``commands`` (what ``add_subparsers`` returned)."""
    parser = commands.add_parser(
        "monitor",
        help="show what a monitor has measured so far, also while training runs",
        description="Read the file of an rgfast.Monitor, which grows as training goes: ranks by\n"
        "layer and step, and when each layer collapsed.",
        epilog="examples:\n"
        "  rgfast monitor run.jsonl\n"
        "  rgfast monitor run.jsonl --figure ranks.png --measure kernel_drift\n"
        "  rgfast monitor run.jsonl --report run.html",
    )
    parser.add_argument("source", metavar="FILE", help="what Monitor(path=...) writes")
    parser.add_argument(
        "--figure", metavar="FILE", help="draw a measure by layer and step (default: no figure)"
    )
    parser.add_argument(
        "--measure",
        metavar="NAME",
        default="effective_rank",
        help="of the figure: a rank or a drift (default: effective_rank)",
    )
    parser.add_argument("--views", metavar="NAME", nargs="+", help="of the figure (default: all)")
    parser.add_argument("--report", metavar="FILE", help="write one self-contained HTML page (default: none)")
    add_json(parser, "steps, layers, ranks by step and when each layer collapsed")
    parser.set_defaults(run=_monitor)


def _monitor(args: argparse.Namespace) -> None:
    from rgfast.monitor.result import MonitorResult

    result = MonitorResult.load(args.source)
    if args.figure:
        from rgfast.report.figures import plot_steps, save_figure

        save_figure(plot_steps(result, measure=args.measure, views=args.views), args.figure)
    if args.report:
        result.report(args.report)
    if args.json:
        print_json(_summary(result))
        return
    print(result)
    for path in (args.figure, args.report):
        if path:
            print(f"written to {path}")


def _summary(result: Any) -> dict[str, Any]:
    return {
        "steps": list(result.steps),
        "layers": list(result.layers),
        "notes": result.notes,
        "views": {
            view: {
                **{measure: result.by_step(measure, view).values for measure in result.measures},
                **(
                    {"collapsed_at": result.collapse(view).values}
                    if "effective_rank" in result.measures
                    else {}
                ),
            }
            for view in result.views
        },
    }
