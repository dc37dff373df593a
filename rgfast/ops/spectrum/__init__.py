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
from rgfast.ops.spectrum.moments import rank_measures_from_moment, singular_values_from_moment
from rgfast.ops.spectrum.results import RankMeasures, SpectrumInfo

__all__ = [
    "IsotropicBaseline",
    "RankMeasures",
    "SpectrumInfo",
    "effective_rank",
    "eigvalsh",
    "isotropic_baseline",
    "numerical_rank",
    "participation_ratio",
    "rank_measures",
    "rank_measures_from_moment",
    "singular_values",
    "singular_values_from_moment",
    "stable_rank",
]
