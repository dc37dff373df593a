"""The parser all subcommands share: near misses are named, and an error shows the subcommand's own usage."""

from __future__ import annotations

import argparse
import difflib
import re
import sys
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

    def option_names(self) -> list[str]:
        """What its options are called, long and short."""
        return [name for action in self.options() for name in action.option_strings]

    def commands(self) -> dict[str, Parser]:
        """Its subcommands by name."""
        groups = (action for action in self._actions if isinstance(action, argparse._SubParsersAction))
        return {name: parser for group in groups for name, parser in group.choices.items()}


def parse(parser: Parser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments. Exits with code 2 on wrong usage.

    Unknown options are reported before missing ones: the one may be meant for the other.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    at, chosen = _chosen(parser, words)
    _check_options(parser, words[:at], after=chosen)
    if chosen is not None:
        _check_options(chosen, words[at:])
    args, unknown = parser.parse_known_args(words)
    if unknown:
        parser.commands()[args.command].error(f"unrecognized arguments: {' '.join(unknown)}")
    return args


def _chosen(parser: Parser, words: Sequence[str]) -> tuple[int, Parser | None]:
    """Where the subcommand stands among ``words``, and its parser; the end and None if there is none."""
    at = next((k for k, word in enumerate(words) if not word.startswith("-")), len(words))
    return at, parser.commands().get(words[at]) if at < len(words) else None


def _check_options(parser: Parser, words: Sequence[str], after: Parser | None = None) -> None:
    """Exit with code 2 if there are options among ``words`` that ``parser`` does not know.

    ``after``: the parser of the subcommand that they stand before, which may know them.
    """
    known, unknown = parser.option_names(), []
    for word in words:
        if word == "--":
            break
        name = word.partition("=")[0]
        if not re.match(r"--?[A-Za-z]", name) or " " in name or name in known:
            continue  # a value, such as a negative number, or an option that there is
        if after is not None and name in after.option_names():
            unknown.append(f"{name} (it goes after {after.prog.split()[-1]})")
        else:
            unknown.append(name + _near(name, known))
    if unknown:
        parser.error(f"unrecognized arguments: {', '.join(unknown)}")


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
    """A hint at the name that begins with ``word``, if there is one, or else that is most like it."""
    names = {str(each).strip("-").lower(): str(each) for each in known}
    asked = word.strip("-").lower()
    begun = [name for name in names if name.startswith(asked)]
    found = begun if len(begun) == 1 else difflib.get_close_matches(asked, names, n=1, cutoff=0.6)
    return f" (did you mean {names[found[0]]}?)" if found else ""
