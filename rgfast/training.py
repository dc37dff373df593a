"""Masked-token training of a residual stack on sequences of a Markov chain."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rgfast.chains import MarkovChain, captured_fraction
from rgfast.masking import balanced_mask, corrupt, exact_mask, iid_mask
from rgfast.stack import MaskedTokenModel
from rgfast.validation import check_choice, check_positive_int

__all__ = ["TrainingConfig", "TrainingLog", "captured", "seeded_generator", "train"]

Stream = Literal["weights", "tokens", "masks", "targets", "evaluation", "probe", "corruption"]
_STREAMS: tuple[Stream, ...] = (
    "weights", "tokens", "masks", "targets", "evaluation", "probe", "corruption",
)  # fmt: skip
Masking = Literal["iid", "exact", "one"]
Replacement = Literal["mask", "bert"]


def seeded_generator(seed: int, stream: Stream) -> torch.Generator:
    """A CPU generator for one purpose of one seed; streams of a seed are independent of each other.

    The chain does not enter: at two correlation lengths the same seed means the same weights and draws.
    """
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or seed < 0:
        raise ValueError(f"seed must be a whole number >= 0, got {seed!r}")
    sequence = np.random.SeedSequence([int(seed), _STREAMS.index(stream)])
    return torch.Generator().manual_seed(int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1)))


@dataclass(frozen=True)
class TrainingConfig:
    """How a model is trained: AdamW without decay, linear warm-up, then cosine to ``final_lr_fraction``.

    ``mask_rate`` is the chance of each position to be hidden (at least one per sequence is); the loss is the
    cross-entropy at hidden positions. Fresh sequences at every step.

    ``masking="exact"`` hides exactly ``round(mask_rate * T)`` positions of each sequence (at least one),
    ``"one"`` exactly one, and ``mask_rate`` is then that of evaluation and probes alone. Tokens of a sequence
    are correlated, so that only with one of each are the targets of a batch independent of each other.
    ``mask_rate_max`` draws each sequence's own rate uniformly between ``mask_rate`` and it (``"iid"`` only).
    ``replacement="bert"`` shows 80% of the hidden tokens as MASK, 10% as a random token and 10% as they are,
    in training alone: evaluation and probes show MASK for all, so that the exact Bayes posterior applies.
    """

    steps: int = 600
    batch: int = 128
    lr: float = 3e-3
    warmup: int = 50
    final_lr_fraction: float = 0.02
    clip: float = 1.0
    mask_rate: float = 0.2
    log_every: int = 50
    log_sequences: int = 512
    masking: Masking = "iid"
    replacement: Replacement = "mask"
    mask_rate_max: float | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "log_every", "log_sequences"):
            check_positive_int(getattr(self, name), name)
        if isinstance(self.warmup, bool) or not isinstance(self.warmup, int) or self.warmup < 0:
            raise ValueError(f"warmup must be a whole number >= 0, got {self.warmup!r}")
        for name in ("lr", "clip"):
            value = getattr(self, name)
            if not math.isfinite(value) or value <= 0:
                raise ValueError(f"{name} must be a finite number > 0, got {value}")
        if not 0 < self.mask_rate < 1:
            raise ValueError(f"mask_rate must lie between 0 and 1, got {self.mask_rate}")
        if not 0 <= self.final_lr_fraction <= 1:
            raise ValueError(f"final_lr_fraction must lie in [0, 1], got {self.final_lr_fraction}")
        check_choice(self.masking, "masking", ("iid", "exact", "one"))
        check_choice(self.replacement, "replacement", ("mask", "bert"))
        if self.mask_rate_max is not None:
            if not self.mask_rate <= self.mask_rate_max <= 1:
                raise ValueError(
                    f"mask_rate_max must lie between mask_rate {self.mask_rate:g} and 1, "
                    f"got {self.mask_rate_max}"
                )
            if self.masking != "iid":
                raise ValueError(f"mask_rate_max needs masking='iid', got {self.masking!r}")

    @property
    def mean_mask_rate(self) -> float:
        """The expected share of hidden positions, at which training is evaluated."""
        return self.mask_rate if self.mask_rate_max is None else (self.mask_rate + self.mask_rate_max) / 2

    def lr_at(self, step: int) -> float:
        """Learning rate of step 0, 1, …"""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        cosine = 0.5 * (1 + math.cos(math.pi * done))
        return self.lr * (self.final_lr_fraction + (1 - self.final_lr_fraction) * cosine)

    def draw_mask(self, n: int, length: int, generator: torch.Generator) -> Tensor:
        """The mask of a training batch, bool ``[n, length]``, True where hidden."""
        if self.masking == "one":
            return exact_mask(n, length, 1, generator)
        if self.masking == "exact":
            return exact_mask(n, length, min(length, max(1, round(self.mask_rate * length))), generator)
        if self.mask_rate_max is None:
            return iid_mask(n, length, self.mask_rate, generator)
        low, high, device = self.mask_rate, self.mask_rate_max, generator.device
        rate = low + (high - low) * torch.rand(n, 1, dtype=torch.float64, device=device, generator=generator)
        mask = torch.rand(n, length, dtype=torch.float64, device=device, generator=generator) < rate
        spare = torch.randint(length, (n,), dtype=torch.int64, device=device, generator=generator)
        mask[torch.arange(n, dtype=torch.int64, device=device), spare] |= ~mask.any(1)
        return mask

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class TrainingLog:
    """The log: after ``step[i]`` steps, losses (nats per hidden token) and the captured fraction.

    ``loss`` is that of the step's batch. ``evaluation_loss`` is the expected cross-entropy on held-out
    sequences, taken under the exact Bayes posterior instead of the drawn tokens, so that it lies above
    ``bayes_loss`` by exactly the mean KL(posterior‖model). ``bayes_loss`` and ``stationary_loss`` are those
    of the posterior and of π on the same sequences: the best possible loss, and that of knowing no context.
    """

    step: tuple[int, ...]
    loss: tuple[float, ...]
    captured: tuple[float, ...]
    evaluation_loss: tuple[float, ...]
    bayes_loss: float
    stationary_loss: float


def captured(model: MaskedTokenModel, chain: MarkovChain, tokens: Tensor, mask: Tensor) -> float:
    """The fraction of what Bayes could predict that the model predicts, at hidden positions.

    1 − E[KL(posterior‖model)] / E[KL(posterior‖π)] with the exact posterior of ``chain``; NaN where nothing
    can be predicted (i.i.d. tokens).

    Args:
        model: in either mode; evaluated without gradients.
        tokens: int64 ``[n, T]``, the true tokens.
        mask: bool ``[n, T]``, True where hidden.
    """
    log_probs = _log_probabilities(model, tokens, mask)
    posterior = chain.bayes_posterior(tokens, mask)
    return float(captured_fraction(log_probs, posterior, mask, chain.stationary))


def _device(model: torch.nn.Module) -> torch.device:
    first = next(model.parameters(), None)
    return torch.device("cpu") if first is None else first.device


def _log_probabilities(model: MaskedTokenModel, tokens: Tensor, mask: Tensor) -> Tensor:
    with torch.no_grad():
        logits = model(tokens.masked_fill(mask, model.mask_token).to(_device(model)))
    return torch.log_softmax(logits.to(tokens.device).double(), dim=-1)


def _loss(model: MaskedTokenModel, shown: Tensor, mask: Tensor, targets: Tensor) -> Tensor:
    """The cross-entropy at hidden positions, of a batch on the CPU; the model may be elsewhere."""
    device = _device(model)
    if device.type == "cpu":
        return F.cross_entropy(model.logits_at(shown, mask), targets[mask])
    # By places, which are known here: by a mask the host would wait for the device to count them.
    where = tuple(at.to(device, non_blocking=True) for at in mask.nonzero(as_tuple=True))
    logits = model.logits_at(shown.to(device, non_blocking=True), where)
    return F.cross_entropy(logits, targets[mask].to(device, non_blocking=True))


def _step(
    model: MaskedTokenModel,
    optimiser: torch.optim.Optimizer,
    shown: Tensor,
    mask: Tensor,
    targets: Tensor,
    clip: float,
) -> Tensor:
    """One step; the loss before it."""
    loss = _loss(model, shown, mask, targets)
    optimiser.zero_grad(set_to_none=True)
    torch.autograd.backward(loss)
    torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimiser.step()
    return loss.detach()


def _expected_loss(posterior: Tensor, log_probs: Tensor) -> float:
    """Mean of −Σ p ln q over rows, where p = 0 counts 0 even against ln 0; nats."""
    return -float(torch.where(posterior > 0, posterior * log_probs, 0).sum(-1).mean())


def train(
    model: MaskedTokenModel,
    chain: MarkovChain,
    config: TrainingConfig | None = None,
    *,
    seed: int = 0,
    permute_targets: bool = False,
    on_log: Callable[[int, float, float], None] | None = None,
) -> TrainingLog:
    """Train ``model`` in place on masked sequences of ``chain``; losses and captured fraction by step.

    Args:
        model: a :class:`MaskedTokenModel` with as many states as the chain, on any device: sequences are
            drawn on the CPU and brought there.
        config: see :class:`TrainingConfig`.
        seed: of tokens and masks (the model brings its own weights).
        permute_targets: the trained control: every sequence is asked for another one's tokens, so that there
            is nothing to learn but π.
        on_log: called with (steps done, loss, captured) at every log point.

    Deterministic by seed for a fixed number of torch threads. Raises ValueError where the states differ, and
    FloatingPointError where the loss is no longer finite.
    """
    config = config or TrainingConfig()
    if chain.states != model.states:
        raise ValueError(f"model must have the chain's {chain.states} states, got {model.states}")
    tokens_from = seeded_generator(seed, "tokens")
    masks_from = seeded_generator(seed, "masks")
    targets_from = seeded_generator(seed, "targets")
    corruption = seeded_generator(seed, "corruption")
    evaluation = seeded_generator(seed, "evaluation")
    eval_tokens = chain.sample(config.log_sequences, model.length, evaluation)
    eval_mask = balanced_mask(config.log_sequences, model.length, config.mean_mask_rate, evaluation)
    posterior = chain.bayes_posterior(eval_tokens, eval_mask)
    hidden = posterior[eval_mask]  # [hidden, V]

    optimiser = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=0.0, fused=True)
    rows: list[tuple[int, float, float, float]] = []
    model.train()
    for step in range(config.steps):
        tokens = chain.sample(config.batch, model.length, tokens_from)
        mask = config.draw_mask(config.batch, model.length, masks_from)
        targets = tokens
        if permute_targets:
            targets = tokens[
                torch.randperm(config.batch, generator=targets_from, dtype=torch.int64, device="cpu")
            ]
        for group in optimiser.param_groups:
            group["lr"] = config.lr_at(step)
        shown = corrupt(tokens, mask, model.mask_token, model.states, config.replacement, corruption)
        loss = _step(model, optimiser, shown, mask, targets, config.clip)
        if (step + 1) % config.log_every == 0 or step + 1 == config.steps:
            value = float(loss)
            if not math.isfinite(value):
                raise FloatingPointError(
                    f"the training loss is {value} after {step + 1} steps (lr {config.lr})"
                )
            log_probs = _log_probabilities(model, eval_tokens, eval_mask)
            fraction = float(captured_fraction(log_probs, posterior, eval_mask, chain.stationary))
            rows.append((step + 1, value, fraction, _expected_loss(hidden, log_probs[eval_mask])))
            if on_log is not None:
                on_log(*rows[-1][:3])
    model.eval()
    steps, losses, fractions, expected = zip(*rows, strict=True)
    return TrainingLog(
        steps,
        losses,
        fractions,
        expected,
        bayes_loss=_expected_loss(hidden, hidden.log()),
        stationary_loss=_expected_loss(hidden, chain.stationary.log().expand_as(hidden)),
    )
