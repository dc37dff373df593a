"""Pages (:func:`write_report`) and figures (:mod:`rgfast.report.figures`) of saved results."""

from rgfast.report.write import write_report

__all__ = ["write_report"]
