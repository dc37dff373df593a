"""What a finite sample alone makes of a rank: the isotropic value beside it, and whether rows suffice."""

from __future__ import annotations

from dataclasses import dataclass

from rgfast.experiments.config import ReproduceConfig
from rgfast.masking import balanced_counts
from rgfast.ops.spectrum import isotropic_baseline
from rgfast.probing.assemble import SAMPLES_PER_FEATURE

__all__ = ["FiniteSample", "finite_sample"]


@dataclass(frozen=True)
class FiniteSample:
    """Rows and features behind one rank, and the effective rank of isotropic Gaussian data of that size.

    ``limited``: fewer than 16 rows a feature, so that the sample bends the rank.
    """

    rows: int
    features: int

    @property
    def isotropic_rank(self) -> float:
        return isotropic_baseline(self.rows, self.features).effective_rank

    @property
    def limited(self) -> bool:
        return self.rows < SAMPLES_PER_FEATURE * self.features


def finite_sample(config: ReproduceConfig) -> dict[str, FiniteSample]:
    """The sample behind the rank of every view of a run of ``config``."""
    sequences, length, width = config.probe_sequences, config.length, config.stream_width
    hidden, _ = balanced_counts(sequences, length, config.training.mask_rate)
    return {
        "visible": FiniteSample(sequences - hidden, width),
        "masked": FiniteSample(hidden, width),
        "position": FiniteSample(sequences, width),
        "pooled": FiniteSample(sequences * length, width),
        "mean_pooled": FiniteSample(sequences, width),
        "flattened": FiniteSample(sequences, length * width),
    }
