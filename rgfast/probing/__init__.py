"""Watch the residual stream of any torch model: every layer and position, one pass, bounded memory."""

from rgfast.probing.forecast import Forecast
from rgfast.probing.ranks import RankError
from rgfast.probing.result import ProbeResult
from rgfast.probing.run import probe
from rgfast.probing.watch import Probe

__all__ = ["Forecast", "Probe", "ProbeResult", "RankError", "probe"]
