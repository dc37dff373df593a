"""Pages (:func:`write_report`) and figures (:mod:`rgfast.report.figures`) of saved results."""

# Before any other module imports matplotlib.
from rgfast.report import backend as _backend  # noqa: F401 (imported for what it does)
from rgfast.report.write import write_report

__all__ = ["write_report"]
