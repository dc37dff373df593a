"""A probe's result as one self-contained HTML page; :mod:`rgfast.report` makes it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rgfast.probing.result import ProbeResult

__all__ = ["as_page"]


def as_page(result: ProbeResult) -> str:
    """The HTML of ``result``, as :func:`rgfast.report.write_report` writes it."""
    from rgfast.report.probed import probe_page

    return probe_page(result).render()
