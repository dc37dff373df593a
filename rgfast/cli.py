"""The ``rgfast`` command: its parser, and what becomes of an error (see :mod:`rgfast.commands.errors`)."""

from __future__ import annotations

import argparse
import errno
import io
import os
import sys
import traceback
from collections.abc import Sequence

from rgfast import interrupts
from rgfast.commands.errors import DONE, EXIT_CODES, INTERRUPTED, READER_GONE, UNEXPECTED, WRONG, sentence
from rgfast.commands.parser import Parser, parse

__all__ = ["build_parser", "main"]


def build_parser() -> Parser:
    """The parser of the whole command line."""
    from rgfast.commands.bench import add_bench
    from rgfast.commands.compare import add_compare
    from rgfast.commands.completion import add_completion
    from rgfast.commands.info import add_info
    from rgfast.commands.monitor import add_monitor
    from rgfast.commands.plan import add_plan
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
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    add_probe(commands)
    add_plan(commands)
    add_compare(commands)
    add_reproduce(commands)
    add_studies(commands)
    add_monitor(commands)
    add_report(commands)
    add_bench(commands)
    add_info(commands)
    add_completion(commands, build_parser)
    for command in parser.commands().values():  # before or after the subcommand
        command.add_argument(
            "--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error"
        )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code."""
    try:
        with interrupts.heeded(to_the_end=argv is None):
            for stream in (sys.stdout, sys.stderr):
                if isinstance(stream, io.TextIOWrapper):  # a terminal without Greek is no reason to fail
                    stream.reconfigure(errors="replace")
            parser = build_parser()
            args = parse(parser, argv)
            if args.command is None:
                parser.print_help()
                return _flushed(DONE)
            return _run(args)
    except KeyboardInterrupt as stop:
        terminated = isinstance(stop, interrupts.Terminated)
        told = f"; {stop}" if str(stop) else ""
        print(f"rgfast: {'terminated' if terminated else 'interrupted'}{told}", file=sys.stderr)
        return _flushed(stop.code if isinstance(stop, interrupts.Terminated) else INTERRUPTED)


def _run(args: argparse.Namespace) -> int:
    try:
        code = args.run(args)
        return _flushed(DONE if code is None else int(code))
    except BrokenPipeError:
        return _flushed(READER_GONE)
    except Exception as error:
        if args.debug:
            traceback.print_exc()
        told = sentence(error)
        if told is not None:
            print(f"rgfast: {' '.join(told.split())}", file=sys.stderr)
            return _flushed(WRONG)
        told = " ".join(f"{type(error).__name__}: {error}".split())
        print(f"rgfast: unexpected {told} (--debug shows where it comes from)", file=sys.stderr)
        return _flushed(UNEXPECTED)


def _flushed(code: int) -> int:
    """The exit code, ``code`` if stdout takes all that was printed."""
    try:
        sys.stdout.flush()
    except OSError as error:
        # Python would try again at exit, and complain in its own words.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if error.errno == errno.EPIPE:
            return READER_GONE
        if code == DONE:
            print(f"rgfast: stdout: {error.strerror}", file=sys.stderr)
            return WRONG
    return code


if __name__ == "__main__":
    sys.exit(main())
