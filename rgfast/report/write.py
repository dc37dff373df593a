"""Any saved result as one HTML file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rgfast.comparing.result import Comparison
from rgfast.files import write_text
from rgfast.monitor.result import MonitorResult
from rgfast.report.page import Page
from rgfast.report.sources import Experiment, Source, Study, load

__all__ = ["write_report"]


def write_report(source: Any, path: str | Path | None = None) -> Path:
    """Write one self-contained HTML page of a result; the path it was written to.

    The page holds verdicts with their definitions, robustness tables, interactive figures (pointing at a
    value tells layer, position, value and n), configuration and provenance. It opens offline: script, style
    and data are inside, and nothing is fetched.

    Args:
        source: a :class:`~rgfast.ProbeResult`, :class:`~rgfast.MonitorResult` or
            :class:`~rgfast.Comparison`, what :func:`rgfast.reproduce`, ``sweep``, ``multiverse``,
            ``decimate``, ``observe`` or ``setups`` returned, or the path of a saved result or of a folder.
        path: the file, written atomically; by default ``report.html`` in the folder, or the name of the file
            with ``.html``. A result in memory without a folder needs one.

    Raises TypeError for a source of another kind, FileNotFoundError where there is nothing, ValueError for a
    folder or file that holds none of these, a damaged one, and a missing ``path``.

    >>> import torch, tempfile, rgfast
    >>> stack = rgfast.ResidualStack(4, 2, mixing="none")
    >>> result = rgfast.probe(stack, torch.randn(64, 3, 4), progress=False)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     rgfast.report.write_report(result, folder + "/run.html").name
    'run.html'
    """
    found = load(source)
    target = _default(source, found) if path is None else Path(path)
    write_text(target, _page(found).render())
    return target


def _default(source: Any, found: Source) -> Path:
    folder = getattr(found, "folder", None)
    if isinstance(source, (str, Path)) and Path(source).is_file():
        return Path(source).with_suffix(".html")
    if isinstance(source, (str, Path)) or isinstance(folder, Path):
        return (folder if isinstance(folder, Path) else Path(source)) / "report.html"
    raise ValueError("path must be given for a result in memory, got None")


def _page(source: Source) -> Page:
    if isinstance(source, Experiment):
        from rgfast.report.experiment import experiment_page

        return experiment_page(source)
    if isinstance(source, Study):
        from rgfast.report.study import study_page

        return study_page(source)
    if isinstance(source, MonitorResult):
        from rgfast.report.monitored import monitor_page

        return monitor_page(source)
    if isinstance(source, Comparison):
        from rgfast.report.comparison import comparison_page

        return comparison_page(source)
    from rgfast.report.probed import probe_page

    return probe_page(source)
