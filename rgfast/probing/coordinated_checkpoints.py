"""Checkpoints of ranks that share out the layers, which are good only together.

They write them at the same time, numbered alike, and each keeps the last but one until all have the last: a
run that was stopped in the midst goes on from the newest that all of them have.
"""

from __future__ import annotations

from pathlib import Path

from rgfast.probing import checkpoint as checkpoints
from rgfast.probing.ranks import Ranks

__all__ = ["before", "choose", "make_room"]


def before(path: Path) -> Path:
    """Where the last but one of the checkpoints at ``path`` is: among what its name begins, which goes if one
    deletes that to start anew."""
    name, dot, rank = path.name.rpartition(".rank")
    return path.with_name(f"{name}.before{dot}{rank}" if dot else f"{path.name}.before")


def make_room(path: Path) -> None:
    """Move the checkpoint at ``path`` aside before the next is written."""
    if path.exists():
        path.replace(before(path))


def choose(ranks: Ranks, path: Path | None) -> None:
    """Leave at ``path`` the newest checkpoint that all ranks have, if theirs are good together; nothing there
    if they have none. All ranks call this together, with None if they are to write none.

    Raises ValueError, the same on every rank, if files of some are missing.
    """
    places = () if path is None else (before(path), path)
    mine = {_number(place): place for place in places if place.exists()}
    found = [{int(number) for number in some} for some in ranks.gather("saved", [*mine])]
    if not any(number for some in found for number in some):
        return
    newest = max(set.intersection(*({0, *some} for some in found)))
    if any(0 in some for some in found) or not newest:
        lacking = [rank for rank, some in enumerate(found) if not some or 0 in some]
        who = ", ".join(map(str, lacking or range(ranks.size)))
        raise ValueError(
            f"checkpoint must have files of all {ranks.size} ranks that were written together, and rank "
            f"{who} has none that goes with the others'; delete them all to start anew"
        )
    for number, place in mine.items():
        if number != newest:
            place.unlink()
    if newest and path is not None:
        mine[newest].replace(path)


def _number(path: Path) -> int:
    """Which of the checkpoints that ranks wrote together it is; 0 for one of a rank by itself."""
    owned = checkpoints.read_header(path).get("owned")
    return 0 if owned is None else int(owned["saved"])
