"""rgfast: watch a residual stack coarse-grain, at every layer and position."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from rgfast import interrupts

if interrupts.is_command():
    interrupts.leave_quietly_while_importing()

# ruff: isort: split
from rgfast import wiring
from rgfast.chains import MarkovChain
from rgfast.dispatch import FallbackWarning, ImplUnavailable, explain, record
from rgfast.ops.cka import (
    CKAAccumulator,
    CKAResult,
    MinibatchCKAAccumulator,
    cka,
    cka_matrix,
    cka_null,
    hsic,
    kernel_change,
    kernel_drift,
    minibatch_cka,
)
from rgfast.ops.intrinsic_dimension import DimensionInfo, intrinsic_dimension
from rgfast.ops.residual_mlp import residual_mlp, residual_stack
from rgfast.ops.similarity import Calibrated, calibrate, mutual_knn, procrustes, rsa
from rgfast.ops.spectrum import (
    IsotropicBaseline,
    RankEstimate,
    RankMeasures,
    SecondMoments,
    SpectrumInfo,
    effective_rank,
    effective_rank_estimate,
    eigvalsh,
    isotropic_baseline,
    moment_operator,
    numerical_rank,
    participation_ratio,
    rank_measures,
    rank_measures_from_moment,
    singular_values,
    singular_values_from_moment,
    stable_rank,
)
from rgfast.runtime.known_answers import warmup
from rgfast.stack import MaskedTokenModel, ResidualStack
from rgfast.version import __version__

if TYPE_CHECKING:
    from rgfast import flow, report
    from rgfast.comparing import Comparison, compare
    from rgfast.experiments.decimation import decimate
    from rgfast.experiments.multiverse import multiverse
    from rgfast.experiments.observer import observe
    from rgfast.experiments.reproduce import Reproduction, reproduce
    from rgfast.experiments.setups import setups
    from rgfast.experiments.sweep import Sweep, sweep
    from rgfast.monitor import Monitor, MonitorResult
    from rgfast.probing import Forecast, Probe, ProbeResult, probe
    from rgfast.probing.cluster import plan_cluster
    from rgfast.probing.cluster_plan import ClusterOption, ClusterPlan, ClusterRates
    from rgfast.probing.forecast import plan
    from rgfast.probing.sources.activations import Activations

__all__ = [
    "Activations",
    "CKAAccumulator",
    "CKAResult",
    "Calibrated",
    "ClusterOption",
    "ClusterPlan",
    "ClusterRates",
    "Comparison",
    "DimensionInfo",
    "FallbackWarning",
    "Forecast",
    "ImplUnavailable",
    "IsotropicBaseline",
    "MarkovChain",
    "MaskedTokenModel",
    "MinibatchCKAAccumulator",
    "Monitor",
    "MonitorResult",
    "Probe",
    "ProbeResult",
    "RankEstimate",
    "RankMeasures",
    "Reproduction",
    "ResidualStack",
    "SecondMoments",
    "SpectrumInfo",
    "Sweep",
    "__version__",
    "calibrate",
    "cka",
    "cka_matrix",
    "cka_null",
    "compare",
    "decimate",
    "effective_rank",
    "effective_rank_estimate",
    "eigvalsh",
    "explain",
    "flow",
    "hsic",
    "intrinsic_dimension",
    "isotropic_baseline",
    "kernel_change",
    "kernel_drift",
    "minibatch_cka",
    "moment_operator",
    "multiverse",
    "mutual_knn",
    "numerical_rank",
    "observe",
    "participation_ratio",
    "plan",
    "plan_cluster",
    "probe",
    "procrustes",
    "rank_measures",
    "rank_measures_from_moment",
    "record",
    "report",
    "reproduce",
    "residual_mlp",
    "residual_stack",
    "rsa",
    "setups",
    "singular_values",
    "singular_values_from_moment",
    "stable_rank",
    "sweep",
    "warmup",
]

# Imported at first use: the ops need neither pandas nor xarray nor joblib, and load faster without.
_LAZY = {
    "Activations": "rgfast.probing.sources.activations",
    "ClusterOption": "rgfast.probing.cluster_plan",
    "ClusterPlan": "rgfast.probing.cluster_plan",
    "ClusterRates": "rgfast.probing.cluster_plan",
    "Comparison": "rgfast.comparing",
    "Forecast": "rgfast.probing",
    "Monitor": "rgfast.monitor",
    "MonitorResult": "rgfast.monitor",
    "Probe": "rgfast.probing",
    "ProbeResult": "rgfast.probing",
    "Reproduction": "rgfast.experiments.reproduce",
    "Sweep": "rgfast.experiments.sweep",
    "compare": "rgfast.comparing",
    "decimate": "rgfast.experiments.decimation",
    "multiverse": "rgfast.experiments.multiverse",
    "observe": "rgfast.experiments.observer",
    "plan": "rgfast.probing.forecast",
    "plan_cluster": "rgfast.probing.cluster",
    "probe": "rgfast.probing",
    "reproduce": "rgfast.experiments.reproduce",
    "setups": "rgfast.experiments.setups",
    "sweep": "rgfast.experiments.sweep",
}

# What a result can do with the help of packages above its own.
wiring.lend("rgfast.probing.merge", "merged")
wiring.lend("rgfast.probing.stages", "joined_stages")
wiring.lend("rgfast.flow.probed", "flow_of")
wiring.lend("rgfast.report.write", "write_report")
wiring.lend("rgfast.report.notebook", "as_html")
wiring.lend("rgfast.report.comparison", "comparison_as_html", "plot_matrix")
wiring.lend("rgfast.report.accessor", "plot_cka", "plot_drift", "plot_heat_map", "plot_rank", "plot_spectra")
wiring.lend("rgfast.report.accessor", "plot_monitor")
wiring.lend("rgfast.monitor.callbacks", "lightning_callback", "transformers_callback")


def __getattr__(name: str) -> Any:
    if name in ("flow", "report"):
        return import_module(f"rgfast.{name}")
    if name not in _LAZY:
        raise AttributeError(f"module 'rgfast' has no attribute {name!r}")
    value = getattr(import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
