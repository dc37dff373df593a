"""Batched spectra and rank measures."""

from rgfast.ops.spectrum.api import (
    effective_rank,
    eigvalsh,
    numerical_rank,
    participation_ratio,
    rank_measures,
    singular_values,
    stable_rank,
)
from rgfast.ops.spectrum.baseline import IsotropicBaseline, isotropic_baseline
from rgfast.ops.spectrum.lanczos import RankEstimate, effective_rank_estimate, moment_operator
from rgfast.ops.spectrum.moments import rank_measures_from_moment, singular_values_from_moment
from rgfast.ops.spectrum.results import RankMeasures, SpectrumInfo
from rgfast.ops.spectrum.streaming import SecondMoments

__all__ = [
    "IsotropicBaseline",
    "RankEstimate",
    "RankMeasures",
    "SecondMoments",
    "SpectrumInfo",
    "effective_rank",
    "effective_rank_estimate",
    "eigvalsh",
    "isotropic_baseline",
    "moment_operator",
    "numerical_rank",
    "participation_ratio",
    "rank_measures",
    "rank_measures_from_moment",
    "singular_values",
    "singular_values_from_moment",
    "stable_rank",
]
