"""rgfast: watch a residual stack coarse-grain, at every layer and position."""

from rgfast import flow
from rgfast.chains import MarkovChain
from rgfast.dispatch import FallbackWarning, ImplUnavailable, explain, record
from rgfast.experiments.decimation import decimate
from rgfast.experiments.multiverse import multiverse
from rgfast.experiments.observer import observe
from rgfast.experiments.reproduce import Reproduction, reproduce
from rgfast.experiments.sweep import Sweep, sweep
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
from rgfast.ops.residual_mlp import residual_mlp
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
from rgfast.probing import Probe, ProbeResult, probe
from rgfast.stack import MaskedTokenModel, ResidualStack
from rgfast.version import __version__

__all__ = [
    "CKAAccumulator",
    "CKAResult",
    "FallbackWarning",
    "ImplUnavailable",
    "IsotropicBaseline",
    "MarkovChain",
    "MaskedTokenModel",
    "MinibatchCKAAccumulator",
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
    "cka",
    "cka_matrix",
    "cka_null",
    "decimate",
    "effective_rank",
    "effective_rank_estimate",
    "eigvalsh",
    "explain",
    "flow",
    "hsic",
    "isotropic_baseline",
    "kernel_change",
    "kernel_drift",
    "minibatch_cka",
    "moment_operator",
    "multiverse",
    "numerical_rank",
    "observe",
    "participation_ratio",
    "probe",
    "rank_measures",
    "rank_measures_from_moment",
    "record",
    "reproduce",
    "residual_mlp",
    "singular_values",
    "singular_values_from_moment",
    "stable_rank",
    "sweep",
]
