"""The Bayes posterior of hidden tokens of a Markov chain, and the loss measured against it."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rgfast.validation import kind_of

__all__ = ["bayes_posterior", "captured_fraction"]

_ROUNDING = 1e-12


def bayes_posterior(
    transition: NDArray[np.float64],
    stationary: NDArray[np.float64],
    tokens: Tensor,
    mask: Tensor,
    radius: int | None,
) -> Tensor:
    """Posterior fp64 ``[n, T, V]``; see :meth:`MarkovChain.bayes_posterior`, which checks the arguments."""
    n, length = tokens.shape
    states = len(stationary)
    device = tokens.device
    if tokens.numel() == 0:
        return torch.zeros(n, length, states, dtype=torch.float64, device=device)
    where = torch.arange(length, dtype=torch.int64, device=device)
    shown = ~mask
    known = torch.where(mask, 0, tokens)
    left = torch.where(shown, where, -1).cummax(1).values  # [n, T]: last visible position <= t, or -1
    right = torch.where(shown, where, length).flip(1).cummin(1).values.flip(1)  # first visible >= t, or T
    before = torch.cat([left.new_full((n, 1), -1), left[:, :-1]], 1)  # last visible position < t, or -1
    gap = torch.where(shown & (before >= 0), where - before, 0)
    after = torch.where(left >= 0, where - left, 0)
    ahead = torch.where(right < length, right - where, 0)
    reach = int(torch.stack([gap.max(), after.max(), ahead.max()]).max())
    powers = torch.from_numpy(_powers(transition, reach)).to(device)  # [reach + 1, V, V]
    prior = torch.from_numpy(stationary.copy()).to(device)
    _check_evidence(powers, prior, known, shown, before, gap)

    rows, columns = mask.nonzero(as_tuple=True)
    left, right = left[rows, columns], right[rows, columns]
    has_left, has_right = left >= 0, right < length
    if radius is not None:
        has_left &= columns - left <= radius
        has_right &= right - columns <= radius
    # The evidence nearest on either side is all that a Markov chain needs: the forward message is a row of
    # P^a, or the prior, and the backward message a column of P^b, or one. Each is scaled by its largest entry
    # so that the product of two rare events does not underflow.
    forward = torch.cat([powers.flatten(0, 1), prior[None]])
    backward = torch.cat([powers.mT.flatten(0, 1), torch.ones_like(prior)[None]])
    none = len(forward) - 1
    forward = forward / forward.amax(1, keepdim=True)
    peak = backward.amax(1, keepdim=True)
    backward = backward / torch.where(peak > 0, peak, 1)
    token_left = known[rows, left.clamp(min=0)]
    token_right = known[rows, right.clamp(max=length - 1)]
    index_left = torch.where(has_left, (columns - left) * states + token_left, none)
    index_right = torch.where(has_right, (right - columns) * states + token_right, none)
    hidden = forward[index_left].mul_(backward[index_right])
    hidden /= hidden.sum(1, keepdim=True)

    out = torch.zeros(n, length, states, dtype=torch.float64, device=device)
    out.scatter_(2, known[..., None], shown[..., None].to(torch.float64))
    out[rows, columns] = hidden
    return out


def _powers(transition: NDArray[np.float64], reach: int) -> NDArray[np.float64]:
    out = np.empty((reach + 1, *transition.shape))
    out[0] = np.eye(len(transition))
    for k in range(reach):
        np.matmul(out[k], transition, out=out[k + 1])
    return out


def _check_evidence(
    powers: Tensor, prior: Tensor, known: Tensor, shown: Tensor, before: Tensor, gap: Tensor
) -> None:
    """Raise ValueError where visible tokens cannot follow each other, or the first cannot occur."""
    source = known.gather(1, before.clamp(min=0))
    chance = torch.where(before >= 0, powers[gap, source, known], prior[known])
    bad = shown & (chance <= 0)
    if not bool(bad.any()):
        return
    row, column = (int(i) for i in bad.nonzero()[0])
    told = f"token {int(known[row, column])} at position {column} of sequence {row}"
    if int(before[row, column]) >= 0:
        told += f" after token {int(source[row, column])} at position {int(before[row, column])}"
    raise ValueError(f"tokens must be possible under the chain, got {told}, which has probability 0")


def captured_fraction(log_probs: Tensor, posterior: Tensor, mask: Tensor, stationary: Tensor) -> Tensor:
    """1 - E[KL(posterior || model)] / E[KL(posterior || stationary)] over the masked positions, an fp64
    scalar.

    1 is a model that predicts the Bayes posterior, 0 one that predicts the stationary distribution
    everywhere; worse models are negative. NaN where the posterior says nothing that the stationary
    distribution does not (an i.i.d. chain: mean KL below 1e-12 nats).

    ``log_probs`` ``[..., V]``: the model's normalised log-probabilities (``log_softmax``), any floating
    dtype; ``posterior`` ``[..., V]``: from :meth:`MarkovChain.bayes_posterior`; ``mask`` ``[...]``: bool,
    True where the token was hidden; ``stationary`` ``[V]``. Computed in fp64, on the device of ``log_probs``.

    Raises TypeError for other dtypes, ValueError when shapes disagree, nothing is masked, or ``log_probs``
    are not normalised (logits, say) at a masked position.

    >>> import torch
    >>> from rgfast import MarkovChain
    >>> from rgfast.chains import captured_fraction
    >>> chain = MarkovChain.from_correlation_length(7)
    >>> tokens = chain.sample(8, 12, torch.Generator().manual_seed(0))
    >>> mask = torch.zeros(8, 12, dtype=torch.bool)
    >>> mask[:, 5] = True
    >>> posterior = chain.bayes_posterior(tokens, mask)
    >>> round(float(captured_fraction(posterior.log(), posterior, mask, chain.stationary)), 6)
    1.0
    """
    for name, value in (("log_probs", log_probs), ("posterior", posterior), ("stationary", stationary)):
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise TypeError(f"{name} must be a floating torch.Tensor, got {kind_of(value)}")
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"mask must be a bool torch.Tensor, got {kind_of(mask)}")
    if log_probs.dim() < 1 or posterior.shape != log_probs.shape:
        raise ValueError(
            f"posterior must have the shape of log_probs, {tuple(log_probs.shape)}, "
            f"got {tuple(posterior.shape)}"
        )
    if mask.shape != log_probs.shape[:-1]:
        raise ValueError(f"mask must have shape {tuple(log_probs.shape[:-1])}, got {tuple(mask.shape)}")
    if stationary.shape != log_probs.shape[-1:]:
        raise ValueError(
            f"stationary must have shape {tuple(log_probs.shape[-1:])}, got {tuple(stationary.shape)}"
        )
    device = log_probs.device
    mask = mask.to(device)
    if not bool(mask.any()):
        raise ValueError("mask must select at least one position, got none")
    model = log_probs[mask].to(torch.float64)
    truth = posterior.to(device)[mask].to(torch.float64)
    off = float((model.logsumexp(1)).abs().max())
    # Half-precision log-probabilities are off by a few 1e-2; logits by whole numbers.
    if not off <= 0.1:
        raise ValueError(f"log_probs must be normalised log-probabilities, got log-sum-exp {off:.3g}")
    prior = stationary.to(device, torch.float64).log()
    entropy = torch.xlogy(truth, truth).sum(1)
    lost = (entropy - _cross(truth, model)).mean()
    known = (entropy - _cross(truth, prior)).mean()
    return torch.where(known > _ROUNDING, 1 - lost / known, torch.nan)


def _cross(truth: Tensor, logs: Tensor) -> Tensor:
    """sum p ln q, where p = 0 counts 0 even against ln 0."""
    return torch.where(truth > 0, truth * logs, 0).sum(1)
