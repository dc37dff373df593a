"""Writing activations while a probe measures them: a sample of sequences within a budget of bytes."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from rgfast.files import as_json, write_bytes, write_text
from rgfast.probing.capture.rows import RowBatch
from rgfast.probing.options import human_bytes
from rgfast.probing.sources.activations import KEEP
from rgfast.probing.sources.finding import FORMAT, MANIFEST, PART, VERSION
from rgfast.version import __version__

__all__ = ["MASKED", "Keeper"]

# The entry that says which tokens were hidden.
MASKED = "masked"
# Bytes of sequences that wait for others, so that parts are no tiny files.
_PENDING = 64 << 20


@dataclass
class _Part:
    """Sequences that are written together: their numbers, in the order of their rows. Those still to be
    written are ``waiting``."""

    numbers: list[int] = field(default_factory=list)
    waiting: list[dict[str, Tensor]] = field(default_factory=list)
    shapes: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    nbytes: int = 0


class Keeper:
    """Writes the rows of some sequences to ``folder``, which is to be empty and no store before :meth:`end`.

    Every sequence draws a number from ``seed``, in their order, and those of the lowest numbers stay, as many
    as ``budget`` bytes hold: a sample without replacement that does not depend on how batches are cut. What
    is dropped again is deleted from time to time, so that files take up to twice the budget meanwhile.
    """

    def __init__(self, folder: Path, budget: int, seed: int) -> None:
        self._folder, self._budget = folder, budget
        self._draws = np.random.default_rng(seed)
        self._seen, self._threshold = 0, 2.0
        self._alive: dict[int, int] = {}  # bytes of every sequence that stays
        self._highest: list[tuple[float, int]] = []
        self._total = self._dead = 0
        self._parts: list[_Part] = []
        self._names: tuple[str, ...] = ()

    def add(self, batch: RowBatch, names: Sequence[str]) -> None:
        """Keep some of the sequences of a batch whose layers have these names.

        Raises ValueError if a layer did not run, if layers differ in which positions count, and if the
        budget does not hold two sequences.
        """
        rows = self._checked(batch, names)
        draws = self._draws.random(batch.sequences)
        chosen = np.flatnonzero(draws < self._threshold)
        first, self._seen = self._seen, self._seen + batch.sequences
        if not len(chosen):
            return
        size = sum(x[0].nbytes for x in rows.values())
        if 2 * size > self._budget:
            raise ValueError(
                f"keep_bytes must hold at least 2 sequences of {human_bytes(size)} each, got "
                f"{human_bytes(self._budget)}"
            )
        for k in chosen:
            self._alive[first + int(k)] = size
            heapq.heappush(self._highest, (-float(draws[k]), first + int(k)))
            self._total += size
        if stays := self._drop(chosen, first):
            at = torch.tensor(stays, dtype=torch.int64, device="cpu")
            self._wait(
                {name: x.detach().index_select(0, at.to(x.device)).cpu() for name, x in rows.items()},
                [first + k for k in stays],
            )
        if self._dead > self._budget:
            self._write()
            self._compact()

    def _checked(self, batch: RowBatch, names: Sequence[str]) -> dict[str, Tensor]:
        if batch.missing:
            raise ValueError(
                f"keep: {names[batch.missing[0]]} did not run in a forward, so that some sequences lack it; "
                "leave it out of layers="
            )
        keep = batch.keeps[0]
        if not all(_alike(keep, other) for other in batch.keeps):
            raise ValueError(
                "keep: layers differ in the positions that count; keep those of one kind, chosen by layers="
            )
        if {KEEP, MASKED} & {*names}:
            raise ValueError(f"keep: a layer cannot be called {KEEP} or {MASKED}, got {', '.join(names)}")
        self._names = tuple(names)
        rows = {str(number): x for number, x in enumerate(batch.present)}
        if keep is not None:
            rows[KEEP] = keep
        if batch.masked is not None:
            rows[MASKED] = batch.masked
        return rows

    def _drop(self, chosen: np.ndarray[Any, Any], first: int) -> list[int]:
        """Drop the sequences of the highest numbers beyond the budget; those of ``chosen`` that stay."""
        while self._total > self._budget:
            draw, number = heapq.heappop(self._highest)
            self._threshold = -draw
            size = self._alive.pop(number)
            self._total -= size
            if number < first:
                self._dead += size
        return [int(k) for k in chosen if first + int(k) in self._alive]

    def _wait(self, rows: dict[str, Tensor], numbers: list[int]) -> None:
        shapes = {name: (*x.shape[1:], x.dtype) for name, x in rows.items()}
        if not self._parts or not self._parts[-1].waiting or self._parts[-1].shapes != shapes:
            self._write()
            self._parts.append(_Part(shapes=shapes))
        part = self._parts[-1]
        part.waiting.append(rows)
        part.numbers += numbers
        part.nbytes += sum(x.nbytes for x in rows.values())
        if part.nbytes > _PENDING:
            self._write()

    def _write(self) -> None:
        """Write what waits."""
        if self._parts and (waiting := self._parts[-1].waiting):
            rows = {name: torch.cat([one[name] for one in waiting]) for name in waiting[0]}
            self._parts[-1].waiting = []
            self._save(len(self._parts) - 1, rows)

    def _path(self, number: int) -> Path:
        return self._folder / f"part-{number:06d}.safetensors"

    def _save(self, number: int, rows: Mapping[str, Tensor]) -> None:
        """Write the sequences of a part that stay."""
        part = self._parts[number]
        stay = [k for k, one in enumerate(part.numbers) if one in self._alive]
        part.numbers = [part.numbers[k] for k in stay]
        if not stay:
            self._path(number).unlink(missing_ok=True)
            return
        at = torch.tensor(stay, dtype=torch.int64, device="cpu")
        named = {self._name(key): x.index_select(0, at).contiguous() for key, x in rows.items()}
        write_bytes(self._path(number), save(named, {"format": PART}))

    def _name(self, key: str) -> str:
        return self._names[int(key)] if key.isdecimal() else key

    def _compact(self) -> None:
        """Rewrite the parts of which something was dropped."""
        for number, part in enumerate(self._parts):
            if any(one not in self._alive for one in part.numbers):
                self._save(number, self._load(number))
        self._dead = 0

    def _load(self, number: int) -> dict[str, Tensor]:
        keys = {name: str(k) for k, name in enumerate(self._names)}
        return {keys.get(name, name): x for name, x in load_file(self._path(number)).items()}

    def _fill_masks(self) -> None:
        """Let all parts say which positions count, if some do."""
        lacking = [n for n, part in enumerate(self._parts) if part.numbers and KEEP not in part.shapes]
        if len(lacking) < sum(bool(part.numbers) for part in self._parts):
            for number in lacking:
                rows = self._load(number)
                self._save(
                    number, {**rows, KEEP: torch.ones(rows["0"].shape[:2], dtype=torch.bool, device="cpu")}
                )

    def end(self, ids: Sequence[int | str] | None) -> None:
        """Make the folder a store: ``ids`` are those of all sequences, by default their numbers."""
        self._write()
        self._compact()
        self._fill_masks()
        written = [number for number, part in enumerate(self._parts) if part.numbers]
        numbers = [one for number in written for one in self._parts[number].numbers]
        said = {
            "format": FORMAT,
            "format_version": VERSION,
            "rgfast": __version__,
            "axes": "N T D",
            "layers": self._names,
            "of_sequences": self._seen,
            "parts": [self._path(number).name for number in written],
            "ids": numbers if ids is None else [ids[one] for one in numbers],
        }
        write_text(self._folder / MANIFEST, as_json(said))


def _alike(keep: Tensor | None, other: Tensor | None) -> bool:
    if keep is other:
        return True
    return keep is not None and other is not None and torch.equal(keep, other)
