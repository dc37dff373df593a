"""Figures and pages of saved results."""

from rgfast.report.write import write_report

__all__ = ["write_report"]
