"""What ``rgfast probe`` and ``rgfast compare`` read where no model is given: activations on disk."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rgfast.probing.sources.activations import Activations

__all__ = ["describe", "facts_of", "holds_model", "mask_of", "open_activations"]

_OF_MODELS = ("length", "limit", "control", "allow_pickle")


def holds_model(path: Path) -> bool:
    """Whether there is a model, for which inputs are to be given."""
    return (path / "config.json").is_file() or (path / "model.json").is_file()


def open_activations(args: argparse.Namespace, path: str) -> Activations:
    """The activations in ``path``. Raises ValueError for options that only a model has."""
    for name in _OF_MODELS:
        if getattr(args, name, None):
            raise ValueError(
                f"{name.replace('_', '-')} is of a model, and {path} is read as activations, since "
                "neither --text nor --inputs is given"
            )
    if args.device != "cpu":
        raise ValueError(f"device: saved activations are measured on the CPU, got {args.device!r}")
    return Activations(path, args.axes, files=args.files)


def mask_of(args: argparse.Namespace, acts: Activations) -> str | None:
    """The entry that says which tokens were hidden. Raises ValueError unless it is one."""
    if args.mask in (None, "none"):
        return None
    if args.mask not in acts.entries:
        raise ValueError(
            f"mask must be none or the name of an entry ({', '.join(acts.entries) or 'there is none'}), got "
            f"{args.mask!r}"
        )
    found: str = args.mask
    return found


def describe(args: argparse.Namespace, acts: Activations) -> dict[str, Any]:
    """Which activations MODEL is, and how a probe reads them."""
    facts = facts_of(args, args.model, acts)
    return {
        "model": {"folder": facts.pop("folder"), "kind": "activations", "layers": list(acts.layers)},
        "inputs": {**facts, "mask": args.mask},
    }


def facts_of(args: argparse.Namespace, where: str, acts: Activations) -> dict[str, Any]:
    """Which activations are in ``where``: files are known by their sizes and times."""
    path = Path(where)
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return {
        "folder": str(path),
        "sequences": len(acts),
        "files": [[x.name, x.stat().st_size, x.stat().st_mtime_ns] for x in files if x.is_file()],
        "axes": args.axes,
        "are": args.files,
    }
