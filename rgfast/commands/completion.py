"""``rgfast completion``: a script for the user's shell, made from the parser itself."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from rgfast.commands.parser import Parser

__all__ = ["SHELLS", "add_completion"]

# What a value is, by the name that the help has for it; anything else is not completed.
_KINDS = {"DIR": "folders", "MODEL": "folders", "FILE": "files", "LABEL": "files", "SOURCE": "files"}
_MANY = ("+", "*")


def add_completion(commands: Any, build: Callable[[], Parser]) -> None:
    """Add the subcommand to ``commands`` (from ``add_subparsers``); ``build`` makes the whole parser."""
    completion = commands.add_parser(
        "completion",
        help="print a script that completes commands and options in bash, zsh or fish",
        description="Print a completion script: commands, options, their choices, files and\nfolders.",
        epilog="examples:\n"
        "  rgfast completion bash >> ~/.bashrc\n"
        "  rgfast completion zsh > ~/.zfunc/_rgfast    (a folder of $fpath)\n"
        "  rgfast completion fish > ~/.config/fish/completions/rgfast.fish",
    )
    completion.add_argument("shell", choices=tuple(SHELLS), help="the shell to complete in")
    completion.set_defaults(run=partial(_completion, build))


def _completion(build: Callable[[], Parser], args: argparse.Namespace) -> None:
    parser = build()
    summaries = parser.summaries()
    commands = [_Command.of(name, summaries[name], each) for name, each in parser.commands().items()]
    print(SHELLS[args.shell](commands), end="")


@dataclass(frozen=True)
class _Option:
    """An option or, with an empty ``flag``, a positional argument."""

    flag: str
    help: str
    takes: str
    many: bool
    choices: tuple[str, ...]

    @property
    def kind(self) -> str:
        """``files``, ``folders`` or nothing."""
        return _KINDS.get(self.takes, "")

    @classmethod
    def of(cls, action: argparse.Action) -> list[_Option]:
        """One for every long name of an option (``--refine``, ``--no-refine``)."""
        takes = "" if action.nargs == 0 else str(action.metavar or action.dest)
        choices = tuple(str(choice) for choice in action.choices or ())
        flags = [flag for flag in action.option_strings if flag.startswith("--")] or [""]
        text = " ".join((action.help or "").split())
        return [cls(flag, text, takes, action.nargs in _MANY, choices) for flag in flags]


@dataclass(frozen=True)
class _Command:
    name: str
    help: str
    options: tuple[_Option, ...]

    @classmethod
    def of(cls, name: str, summary: str, parser: Parser) -> _Command:
        options = [option for action in parser.options() for option in _Option.of(action)]
        return cls(name, summary, (*options, _DEBUG))

    @property
    def flags(self) -> list[str]:
        return [option.flag for option in self.options if option.flag]

    @property
    def words(self) -> tuple[str, ...]:
        """What may stand as a positional argument, where that is known."""
        return next((option.choices for option in self.options if not option.flag), ())


_DEBUG = _Option("--debug", "show the traceback of an error", "", False, ())
_TOP = ("--help", "--version", "--debug")


def _bash(commands: list[_Command]) -> str:
    values, offers = [], []
    for command in commands:
        for option in command.options:
            if not option.takes or not option.flag:
                continue
            if option.choices:
                offer = f'_rgfast_words "{" ".join(option.choices)}"'
            else:
                offer = {"files": "_rgfast_files -f", "folders": "_rgfast_files -d"}.get(option.kind, ":")
            # What an option takes is over where the next one begins.
            many = "*" if option.many else "0"
            values.append(f"    '{command.name} {option.flag} '{many}) {offer}; return ;;")
        words = " ".join([*command.words, *command.flags])
        offers.append(f'    {command.name}) offered="{words}" ;;')
    names = " ".join(command.name for command in commands)
    return f"""# bash completion for rgfast: made by 'rgfast completion bash'
_rgfast_words() {{
  COMPREPLY=($(compgen -W "$1" -- "$cur"))
}}
_rgfast_files() {{
  local IFS=$'\\n'
  COMPREPLY=($(compgen "$1" -- "$cur"))
  compopt -o filenames 2>/dev/null
}}
_rgfast() {{
  local cur=${{COMP_WORDS[COMP_CWORD]}} command= option= after=0 word offered=
  for word in "${{COMP_WORDS[@]:1:COMP_CWORD-1}}"; do
    case "$word" in
      -*) option=$word after=0 ;;
      *) if [[ -z $command ]]; then command=$word option=; else after=$((after + 1)); fi ;;
    esac
  done
  COMPREPLY=()
  case "$command" in
    '') offered="{names} {" ".join(_TOP)}" ;;
{chr(10).join(offers)}
  esac
  if [[ $cur == -* ]]; then
    _rgfast_words "$offered"
    return
  fi
  case "$command $option $after" in
{chr(10).join(values)}
  esac
{_bash_folders(commands)}  _rgfast_words "$offered"
}}
complete -F _rgfast rgfast
"""


def _bash_folders(commands: list[_Command]) -> str:
    """Lines for the commands whose positional argument is a file or folder."""
    lines = ""
    for command in commands:
        for option in command.options:
            if not option.flag and option.kind:
                what = "-d" if option.kind == "folders" else "-f"
                lines += (
                    f"  [[ $command == {command.name} && -n $cur ]] && {{ _rgfast_files {what}; return; }}\n"
                )
    return lines


def _zsh(commands: list[_Command]) -> str:
    def quoted(text: str) -> str:
        for special in "\\:[]":
            text = text.replace(special, "\\" + special)
        return text

    def spec(option: _Option) -> str:
        if option.choices:
            values = f"({' '.join(option.choices)})"
        else:
            values = {"files": "_files", "folders": "_files -/"}.get(option.kind, "")
        if not option.flag:
            return shlex.quote(f":{quoted(option.takes)}:{values}")
        text = f"{option.flag}[{quoted(option.help)}]"
        if option.takes:
            until_next_option = "*-*:" if option.many else ""
            text += f":{until_next_option}{quoted(option.takes)}:{values}"
        return shlex.quote(text)

    listed = "\n".join(f"    {shlex.quote(f'{c.name}:{quoted(c.help)}')}" for c in commands)
    cases = "\n".join(
        f"    {c.name}) _arguments {' '.join(spec(option) for option in c.options)} ;;" for c in commands
    )
    return f"""#compdef rgfast
# zsh completion for rgfast: made by 'rgfast completion zsh'
_rgfast() {{
  local -a commands=(
{listed}
  )
  while [[ $words[2] == --debug ]]; do shift words; (( CURRENT-- )); done
  if (( CURRENT == 2 )); then
    _describe command commands
    _arguments {" ".join(f"'{flag}'" for flag in _TOP)}
    return
  fi
  local command=$words[2]
  shift words
  (( CURRENT-- ))
  case $command in
{cases}
  esac
}}
if [[ $funcstack[1] == _rgfast ]]; then _rgfast "$@"; else compdef _rgfast rgfast; fi
"""


def _fish(commands: list[_Command]) -> str:
    names = " ".join(command.name for command in commands)
    lines = ["# fish completion for rgfast: made by 'rgfast completion fish'"]
    for command in commands:
        first = f"complete -c rgfast -n 'not __fish_seen_subcommand_from {names}'"
        lines.append(f"{first} -f -a {command.name} -d {_fish_quoted(command.help)}")
        inside = f"complete -c rgfast -n '__fish_seen_subcommand_from {command.name}'"
        for option in command.options:
            text = inside
            if option.flag:
                text += f" -l {option.flag.removeprefix('--')} -d {_fish_quoted(option.help)}"
            if option.choices:
                text += f" {'-x' if option.flag else '-f'} -a {_fish_quoted(' '.join(option.choices))}"
            elif option.kind == "folders":
                text += f" {'-x' if option.flag else '-f'} -a '(__fish_complete_directories)'"
            elif option.takes and option.flag:
                text += " -r" if option.kind else " -x"
            lines.append(text)
    return "\n".join(lines) + "\n"


def _fish_quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


SHELLS: dict[str, Callable[[list[_Command]], str]] = {"bash": _bash, "zsh": _zsh, "fish": _fish}
