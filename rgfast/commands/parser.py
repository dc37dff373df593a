"""The parser all subcommands share: near misses are named, and an error shows the subcommand's own usage."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

__all__ = ["Parser", "add_json", "parse", "print_json"]


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that keeps the lines of its texts, takes no abbreviations and names near misses."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def error(self, message: str) -> NoReturn:
        wrong = re.search(r"argument (\S+): invalid choice: '([^']*)'", message)
        if wrong:
            action = next((a for a in self._actions if _named(a, wrong[1])), None)
            message += _near(wrong[2], action.choices if action and action.choices else ())
        super().error(message)

    def options(self) -> list[argparse.Action]:
        """Its options and positional arguments, without hidden ones."""
        return [action for action in self._actions if action.help != argparse.SUPPRESS]

    def commands(self) -> dict[str, Parser]:
        """Its subcommands by name."""
        return {name: parser for group in self._groups() for name, parser in group.choices.items()}

    def summaries(self) -> dict[str, str]:
        """The line that the help has for each subcommand."""
        return {each.dest: each.help or "" for group in self._groups() for each in group._choices_actions}

    def _groups(self) -> list[argparse._SubParsersAction[Parser]]:
        return [action for action in self._actions if isinstance(action, argparse._SubParsersAction)]


def parse(parser: Parser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments; ``debug`` may stand before or after the subcommand. Exits with code 2 on wrong usage."""
    for name, command in parser.commands().items():
        command.add_argument(
            "--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error"
        )
        command.set_defaults(command=name)
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        chosen = parser.commands()[args.command]
        known = [option for action in chosen.options() for option in action.option_strings]
        first = next((word for word in unknown if word.startswith("-")), unknown[0])
        hint = _near(first.partition("=")[0], known) if first.startswith("-") else ""
        chosen.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
    return args


def add_json(parser: argparse.ArgumentParser, what: str) -> None:
    """Give ``parser`` the option ``--json``, which prints ``what`` on stdout and nothing else."""
    parser.add_argument("--json", action="store_true", help=f"print {what} as JSON on stdout, nothing else")


def print_json(document: Any) -> None:
    """Print what JSON can hold of ``document``; NaN and infinity are null."""
    from rgfast.files import as_json

    print(as_json(document), end="")


def _named(action: argparse.Action, name: str) -> bool:
    return name in (action.dest, action.metavar) or name in "/".join(action.option_strings).split("/")


def _near(word: str, known: Iterable[Any]) -> str:
    found = difflib.get_close_matches(word, [str(each) for each in known], n=1, cutoff=0.6)
    return f" (did you mean {found[0]}?)" if found else ""
