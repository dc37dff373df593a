"""Which implementations ran, where that is recorded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

__all__ = ["RECORDING", "Record", "record", "walk"]


@dataclass(frozen=True)
class Record:
    """One op that ran: its name, the implementation, the instruction set where one was chosen.

    ``nested`` are the ops and implementations that it handed a part to.
    """

    op: str
    impl: str
    isa: str | None = None
    nested: list[Record] = field(default_factory=list, hash=False)


def walk(log: Iterable[Record]) -> Iterator[Record]:
    """Every entry of what :func:`record` collected, nested ones after the one they are nested in."""
    for entry in log:
        yield entry
        yield from walk(entry.nested)


RECORDING: ContextVar[list[Record] | None] = ContextVar("rgfast_record", default=None)


@contextmanager
def record() -> Iterator[list[Record]]:
    """Collect which implementation (and which ISA) of every op runs inside the ``with`` block.

    What ``auto`` handed to another op or implementation is nested in the entry of the one that ran first.

    >>> import rgfast, torch
    >>> with rgfast.record() as log:
    ...     _ = rgfast.effective_rank(torch.randn(8, 4), impl="reference")
    >>> log[0].op, log[0].impl
    ('spectrum', 'reference')
    """
    log: list[Record] = []
    token = RECORDING.set(log)
    try:
        yield log
    finally:
        RECORDING.reset(token)
