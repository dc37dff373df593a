"""rgfast: watch a residual stack coarse-grain, at every layer and position."""

from rgfast.dispatch import FallbackWarning, ImplUnavailable, explain, record

__version__ = "0.1.0"

__all__ = ["FallbackWarning", "ImplUnavailable", "__version__", "explain", "record"]
