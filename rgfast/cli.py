"""The ``rgfast`` command: its parser, and what becomes of an error (see :mod:`rgfast.commands.errors`)."""

from __future__ import annotations

import io
import os
import sys
import traceback
from collections.abc import Sequence

from rgfast.commands.errors import DONE, EXIT_CODES, INTERRUPTED, READER_GONE, UNEXPECTED, WRONG, sentence
from rgfast.commands.parser import Parser, parse

__all__ = ["build_parser", "main"]


def build_parser() -> Parser:
    """The parser of the whole command line."""
    from rgfast.commands.bench import add_bench
    from rgfast.commands.completion import add_completion
    from rgfast.commands.info import add_info
    from rgfast.commands.probe import add_probe
    from rgfast.commands.report import add_report
    from rgfast.commands.reproduce import add_reproduce
    from rgfast.commands.studies import add_studies
    from rgfast.version import __version__

    parser = Parser(
        prog="rgfast",
        description="Measure what a residual stack coarse-grains, at every layer and position.\n"
        "'rgfast COMMAND --help' explains a command, its options and their defaults.",
        epilog=EXIT_CODES,
    )
    parser.add_argument("-V", "--version", action="version", version=f"rgfast {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", title="commands")
    add_probe(commands)
    add_reproduce(commands)
    add_studies(commands)
    add_report(commands)
    add_bench(commands)
    add_info(commands)
    add_completion(commands, build_parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal without Greek is no reason to fail
            stream.reconfigure(errors="replace")
    args = parse(build_parser(), argv)
    try:
        code = args.run(args)
        sys.stdout.flush()
        return DONE if code is None else int(code)
    except KeyboardInterrupt as stop:
        print(f"rgfast: interrupted; {str(stop) or 'what was finished is kept'}", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever reads our output has closed it; Python would complain once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return READER_GONE
    except Exception as error:
        if args.debug:
            traceback.print_exc()
        told = sentence(error)
        if told is not None:
            print(f"rgfast: {' '.join(told.split())}", file=sys.stderr)
            return WRONG
        told = " ".join(f"{type(error).__name__}: {error}".split())
        print(f"rgfast: unexpected {told} (--debug shows where it comes from)", file=sys.stderr)
        return UNEXPECTED


if __name__ == "__main__":
    sys.exit(main())
