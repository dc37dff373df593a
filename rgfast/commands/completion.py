"""``rgfast completion``: a script for the user's shell, made from the parser by shtab."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

from rgfast.commands.parser import Parser

__all__ = ["add_completion"]

_SHELLS = ("bash", "zsh", "fish", "tcsh", "powershell")
# What a value is, by the name that the help has for it; anything else is not completed.
_FILES, _FOLDERS = ("FILE", "LABEL", "SOURCE"), ("DIR", "MODEL", "A", "B")


def add_completion(commands: Any, build: Callable[[], Parser]) -> None:
    """Add the subcommand to ``commands`` (from ``add_subparsers``); ``build`` makes the whole parser."""
    completion = commands.add_parser(
        "completion",
        help="print a script that completes commands and options in a shell",
        description="Print a completion script: commands, options, their choices, files and\nfolders.",
        epilog="examples:\n"
        "  rgfast completion bash >> ~/.bashrc\n"
        "  rgfast completion zsh > ~/.zfunc/_rgfast    (a folder of $fpath)\n"
        "  rgfast completion fish > ~/.config/fish/completions/rgfast.fish",
    )
    completion.add_argument("shell", choices=_SHELLS, help="the shell to complete in")
    completion.set_defaults(run=partial(_completion, build))


def _completion(build: Callable[[], Parser], args: argparse.Namespace) -> None:
    import shtab

    parser = build()
    for command in (parser, *parser.commands().values()):
        _describe(command)
    print(shtab.complete(parser, args.shell))


def _describe(parser: Parser) -> None:
    """Say of every value of ``parser``'s options and arguments whether it is a file or a folder."""
    import shtab

    for action in parser.options():
        if action.nargs != 0 and not action.choices:
            kinds = {**dict.fromkeys(_FILES, shtab.FILE), **dict.fromkeys(_FOLDERS, shtab.DIRECTORY)}
            kind = kinds.get(str(action.metavar))
            if kind is not None:
                action.complete = kind  # type: ignore[attr-defined]  # shtab's own
