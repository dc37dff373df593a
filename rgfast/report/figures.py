"""Every figure as a function of a user's own result.

All take a ``source`` (what :func:`rgfast.report.write_report` takes, as far as the figure fits it) and
``ax``, the axes to draw on, one per panel, instead of a new figure; all return the figure. Units and n are on
the axes, and a color means the same thing in every one of them (:mod:`rgfast.report.palette`).

>>> import torch, rgfast
>>> from rgfast.report.figures import plot_order_parameter
>>> stack = rgfast.ResidualStack(4, 3, mixing="none")
>>> result = rgfast.probe(stack, torch.randn(64, 3, 4), progress=False)
>>> plot_order_parameter(result).axes[0].get_ylabel()
'effective rank (singular values), dimensions'
"""

from rgfast.report.canvas import save_figure
from rgfast.report.comparison import plot_comparison
from rgfast.report.depth import (
    plot_cka,
    plot_drift,
    plot_heat_map,
    plot_order_parameter,
    plot_spectra,
    plot_survival,
    plot_training,
)
from rgfast.report.steps import plot_steps
from rgfast.report.studies import (
    plot_decimation,
    plot_multiverse,
    plot_observer,
    plot_posterior_rank,
    plot_relevance,
    plot_setups,
    plot_xi,
)

__all__ = [
    "plot_cka",
    "plot_comparison",
    "plot_decimation",
    "plot_drift",
    "plot_heat_map",
    "plot_multiverse",
    "plot_observer",
    "plot_order_parameter",
    "plot_posterior_rank",
    "plot_relevance",
    "plot_setups",
    "plot_spectra",
    "plot_steps",
    "plot_survival",
    "plot_training",
    "plot_xi",
    "save_figure",
]
