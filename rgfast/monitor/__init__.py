"""A model through its training: the probe of a fixed batch at every so many steps."""

from rgfast.monitor.result import MonitorResult
from rgfast.monitor.watching import Monitor

__all__ = ["Monitor", "MonitorResult"]
