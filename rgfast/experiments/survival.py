"""Which modes of the chain a layer still holds: streamed cross-validated linear R² by eigenspace."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from rgfast.chains import MarkovChain
from rgfast.flow.saved import FIRST_LAYER
from rgfast.ops.spectrum import effective_rank
from rgfast.probing import probe
from rgfast.stack import MaskedTokenModel

__all__ = ["FROM_LAYER", "PROCESSES", "ModeSurvival", "mode_survival", "posterior_rank"]

PROCESSES = ("visible", "masked")
FROM_LAYER = {process: FIRST_LAYER[process] for process in PROCESSES}

# A probability below it counts as it, so that a state the posterior excludes has a finite logarithm.
_SMALLEST = 1e-12


@dataclass(frozen=True)
class ModeSurvival:
    """Linear R² on held-out sequences ``[process, mode, layer]``, and the modulus of each mode's eigenvalue.

    Modes are the chain's eigenspaces but the constant one, slowest first; processes are :data:`PROCESSES`.
    """

    r2: NDArray[np.float64]
    modulus: NDArray[np.float64]


def mode_survival(
    model: MaskedTokenModel,
    chain: MarkovChain,
    tokens: Tensor,
    mask: Tensor,
    *,
    folds: int = 5,
    batch: int = 512,
    positions: Sequence[int] | None = None,
) -> ModeSurvival:
    """How well each layer linearly predicts each eigenspace of the chain; the mean over positions.

    From ``X_l[:, t, :]`` to the eigenfunctions of a mode (white under the stationary distribution): those of
    the own token on visible rows, their expectation under the exact Bayes posterior on masked rows. Least
    squares with intercept, folds by sequence (number i in fold i mod ``folds``); R² = 1 − Σ SSE / Σ SST over
    folds, SST about the training mean. 0 says nothing, negative values stay, NaN where a target is constant.

    Args:
        tokens: int64 ``[n, T]``, the true tokens.
        mask: bool ``[n, T]``, True where the model sees MASK.
        positions: those averaged over; all by default.

    Computed from the streamed fp64 cross moments of :func:`rgfast.probe`. Raises ValueError for fewer than 2
    folds or fewer than 2 sequences a fold.
    """
    if folds < 2 or len(tokens) < 2 * folds:
        raise ValueError(f"folds must lie in 2..{len(tokens) // 2} for {len(tokens)} sequences, got {folds}")
    spaces = chain.eigenspaces()[1:]
    # One-hot where visible, so that one target serves both processes.
    posterior = chain.bayes_posterior(tokens, mask)
    result = probe(
        model,
        {"tokens": tokens.masked_fill(mask, model.mask_token), "mask": mask},
        mask="mask",
        targets={str(mode): posterior @ space.basis for mode, space in enumerate(spaces)},
        groups=folds,
        positions="all" if positions is None else positions,
        views=PROCESSES,
        measures=("participation_ratio",),
        pairs=(),
        progress=False,
        distributed=False,
        batch_size=batch,
    )
    found = [[result.target_r2(str(mode), view).values for mode in range(len(spaces))] for view in PROCESSES]
    return ModeSurvival(np.array(found), np.array([space.modulus for space in spaces]))


def posterior_rank(
    chain: MarkovChain, tokens: Tensor, mask: Tensor, positions: Sequence[int] | None = None
) -> tuple[float, float]:
    """Effective rank of the exact Bayes posterior and of its centred logarithm, on masked rows.

    In the convention of the order parameter: singular values, centred over samples, by position, then the
    mean over positions. The logarithm is centred over states too: a head's logits are free up to that.
    """
    posterior = chain.bayes_posterior(tokens, mask)
    logs = posterior.clamp_min(_SMALLEST).log()
    logs -= logs.mean(-1, keepdim=True)
    where = range(tokens.shape[1]) if positions is None else positions
    ranks = [
        [float(effective_rank(x[mask[:, t], t])) for t in where if bool(mask[:, t].any())]
        for x in (posterior, logs)
    ]
    return float(np.mean(ranks[0])), float(np.mean(ranks[1]))
