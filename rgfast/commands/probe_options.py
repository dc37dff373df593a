"""What the words of ``rgfast probe`` ask :func:`rgfast.probe` for."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

__all__ = ["numbered", "options_of"]


def options_of(args: argparse.Namespace) -> dict[str, Any]:
    """What ``rgfast.probe`` is asked, checked as far as it can be before anything is loaded."""
    from rgfast.probing.spec import ProbeSpec
    from rgfast.validation import check_integer, check_positive_int

    for name in ("groups", "batch_size", "checkpoint_every", "limit", "length"):
        if getattr(args, name) is not None:
            check_positive_int(getattr(args, name), name.replace("_", "-"))
    check_integer(args.seed, "seed", least=0, most=2**63 - 1)
    for name in ("text", "inputs"):
        path = getattr(args, name)
        if path is not None and not Path(path).is_file():
            raise ValueError(f"{name} must be a file, and {path} is none")
    if args.length is not None and args.text is None:
        raise ValueError("length cuts texts, and there is no --text")
    of_model = args.text is not None or args.inputs is not None
    if args.files != "auto" and of_model:
        raise ValueError("files is of saved activations, which take neither --text nor --inputs")
    options = {
        "layers": numbered(args.layers),
        "positions": _positions(args.positions),
        "origin": args.origin,
        "padding": None if args.padding == "none" else args.padding,
        **({"axes": args.axes} if of_model else {}),
        "pairs": _pairs(args.pairs),
        "views": args.views,
        "groups": args.groups,
        "memory": args.memory,
        "refine": args.refine,
        **({} if args.rows is None else {"rows": _rows(args.rows)}),
        **({} if args.control is None else {"control": args.control, "control_seed": args.seed}),
        # Only moments can be merged later.
        "route": "moments" if args.moments else "auto",
    }
    ProbeSpec(**options)  # refuses what it can now
    return options


def numbered(words: list[str]) -> Any:
    """Names of layers, those that are whole numbers as such; one by itself."""
    layers = [int(word) if re.fullmatch(r"-?\d+", word) else word for word in words]
    return layers[0] if len(layers) == 1 else layers


def _positions(words: list[str]) -> str | list[int | str]:
    if words in (["auto"], ["all"]):
        return words[0]
    if not all(re.fullmatch(r"-?\d+|first|last", word) for word in words):
        raise ValueError(f"positions must be auto, all, first, last or indices, got {' '.join(words)}")
    return [word if word in ("first", "last") else int(word) for word in words]


def _rows(words: list[str]) -> dict[str, Any]:
    found = [re.fullmatch(r"([^=]+)=([^:]+)(?::(-?\d+(?:,-?\d+)*))?", word) for word in words]
    rows = {
        part[1]: (part[2], [int(n) for n in part[3].split(",")]) if part[3] else part[2]
        for part in found
        if part
    }
    if len(rows) < len(words):
        raise ValueError(
            "rows must be such as nouns=is_noun verbs=pos_tags:3,4 ends=last, each of another name, got "
            f"{' '.join(words)}"
        )
    return rows


def _pairs(words: list[str]) -> str | list[tuple[int, int]]:
    if words in (["adjacent"], ["all"]):
        return words[0]
    found = [re.fullmatch(r"(\d+)-(\d+)", word) for word in words]
    pairs = [(int(pair[1]), int(pair[2])) for pair in found if pair]
    if len(pairs) < len(words):
        raise ValueError(f"pairs must be adjacent, all or such as 0-3 2-5, got {' '.join(words)}")
    return pairs
