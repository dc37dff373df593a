"""Which tokens are hidden, and what stands in their place.

Every function draws from ``generator`` alone (default: torch's global one), on its device, so the same seed
gives the same masks whatever the number of threads.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rgfast.validation import check_choice, check_integer, check_number, kind_of

__all__ = ["balanced_counts", "balanced_mask", "corrupt", "exact_mask", "iid_mask"]


def iid_mask(
    n: int, length: int, rate: float, generator: torch.Generator | None = None, at_least_one: bool = True
) -> Tensor:
    """A mask, bool ``[n, length]``, True (hidden) with probability ``rate`` at each position independently.

    ``at_least_one``: a sequence that would have none gets one, at a position drawn uniformly.

    Raises TypeError or ValueError unless n and length are integers >= 1 and 0 <= rate <= 1.

    >>> import torch
    >>> from rgfast.masking import iid_mask
    >>> bool(iid_mask(100, 12, 0.2, torch.Generator().manual_seed(0)).any(1).all())
    True
    """
    _check(n, length, generator)
    _check_rate(rate, positive=False)
    device = _device(generator)
    mask = torch.rand(n, length, dtype=torch.float64, device=device, generator=generator) < rate
    if at_least_one:
        # Drawn for every sequence, so that what follows from the generator does not depend on what was drawn.
        spare = torch.randint(length, (n,), dtype=torch.int64, device=device, generator=generator)
        mask[torch.arange(n, dtype=torch.int64, device=device), spare] |= ~mask.any(1)
    return mask


def exact_mask(n: int, length: int, k: int, generator: torch.Generator | None = None) -> Tensor:
    """A mask, bool ``[n, length]``, with exactly ``k`` hidden positions in each sequence, uniform among all
    such.

    Raises TypeError or ValueError unless n and length are integers >= 1 and k an integer in 0..length.

    >>> import torch
    >>> from rgfast.masking import exact_mask
    >>> exact_mask(3, 12, 2, torch.Generator().manual_seed(0)).sum(1)
    tensor([2, 2, 2])
    """
    _check(n, length, generator)
    check_integer(k, "k", least=0)
    if k > length:
        raise ValueError(f"k must be at most {length}, the length, got {k}")
    return _ranks(n, length, generator, dim=1) < k


def balanced_mask(n: int, length: int, rate: float, generator: torch.Generator | None = None) -> Tensor:
    """A mask, bool ``[n, length]``, that hides every position equally often and something in every sequence.

    Each position is hidden in exactly round(rate n) sequences. Where that is too few to hide something in
    every sequence, max(n, round(rate n length)) tokens are hidden in all, each position equally often to
    within one. Which sequences a position is hidden in is drawn independently of the other positions, as in
    :func:`iid_mask`; then each sequence left with nothing takes over one hidden position, drawn at random, of
    a sequence that has several.

    Raises TypeError or ValueError unless n and length are integers >= 1 and 0 < rate <= 1.

    >>> import torch
    >>> from rgfast.masking import balanced_mask
    >>> balanced_mask(2048, 12, 0.2, torch.Generator().manual_seed(0)).sum(0).unique()
    tensor([410])
    """
    _check(n, length, generator)
    _check_rate(rate, positive=True)
    device = _device(generator)
    each, extra = balanced_counts(n, length, rate)
    counts = torch.full((length,), each, dtype=torch.int64, device=device)
    if (each, extra) != (math.floor(rate * n + 0.5), 0):
        counts = counts + (_ranks(1, length, generator, dim=1)[0] < extra)
    mask = _ranks(n, length, generator, dim=0) < counts
    empty = (~mask.any(1)).nonzero()[:, 0]
    # All but one hidden token of each sequence, chosen at random, may move down its column to an empty
    # sequence.
    score = torch.rand(n, length, dtype=torch.float64, device=device, generator=generator).masked_fill_(
        ~mask, 2.0
    )
    mask_spare = mask.scatter(1, score.argmin(1, keepdim=True), False)
    rows, columns = mask_spare.nonzero(as_tuple=True)
    taken = score[rows, columns].argsort(stable=True)[: len(empty)]
    mask[rows[taken], columns[taken]] = False
    mask[empty, columns[taken]] = True
    return mask


def balanced_counts(n: int, length: int, rate: float) -> tuple[int, int]:
    """In how many sequences :func:`balanced_mask` hides a position, and at how many positions in one more.

    >>> from rgfast.masking import balanced_counts
    >>> balanced_counts(2048, 12, 0.2), balanced_counts(10, 4, 0.1)
    ((410, 0), (2, 2))
    """
    each = math.floor(rate * n + 0.5)
    if each * length >= n:
        return each, 0
    return divmod(max(n, math.floor(rate * n * length + 0.5)), length)


def corrupt(
    tokens: Tensor,
    mask: Tensor,
    mask_token: int,
    states: int,
    scheme: str = "mask",
    generator: torch.Generator | None = None,
) -> Tensor:
    """The tokens as a model gets to see them: a copy of ``tokens`` with the hidden ones replaced.

    ``tokens`` integers of any shape, ``mask`` bool of the same shape. ``scheme="mask"``: hidden tokens become
    ``mask_token``. ``scheme="bert"`` (Devlin et al., 2019): of the hidden tokens 80% become ``mask_token``,
    10% a token drawn uniformly from 0..states-1, 10% stay as they are.

    Raises TypeError for other dtypes, ValueError for other shapes or schemes, states below 1 or a negative
    ``mask_token``.

    >>> import torch
    >>> from rgfast.masking import corrupt
    >>> corrupt(torch.tensor([3, 1, 2]), torch.tensor([False, True, False]), 16, 16)
    tensor([ 3, 16,  2])
    """
    if (
        not isinstance(tokens, Tensor)
        or tokens.is_floating_point()
        or tokens.is_complex()
        or tokens.dtype == torch.bool
    ):
        raise TypeError(f"tokens must be an integer torch.Tensor, got {kind_of(tokens)}")
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"mask must be a bool torch.Tensor, got {kind_of(mask)}")
    if mask.shape != tokens.shape:
        raise ValueError(
            f"mask must have the shape of tokens, {tuple(tokens.shape)}, got {tuple(mask.shape)}"
        )
    check_choice(scheme, "scheme", ("mask", "bert"))
    for name, value, least in (("mask_token", mask_token, 0), ("states", states, 1)):
        check_integer(value, name, least=least)
    if scheme == "mask":
        return tokens.masked_fill(mask, mask_token)
    device = tokens.device if generator is None else generator.device
    u = torch.rand(tokens.shape, dtype=torch.float64, device=device, generator=generator).to(tokens.device)
    other = torch.randint(states, tokens.shape, dtype=torch.int64, device=device, generator=generator).to(
        tokens.device, tokens.dtype
    )
    out = tokens.masked_fill(mask & (u < 0.8), mask_token)
    return torch.where(mask & (u >= 0.8) & (u < 0.9), other, out)


def _ranks(n: int, length: int, generator: torch.Generator | None, dim: int) -> Tensor:
    """A uniformly random permutation of 0.. along ``dim``, int64 ``[n, length]``."""
    u = torch.rand(n, length, dtype=torch.float64, device=_device(generator), generator=generator)
    return u.argsort(stable=True, dim=dim)


def _device(generator: torch.Generator | None) -> torch.device:
    return torch.device("cpu") if generator is None else generator.device


def _check(n: int, length: int, generator: torch.Generator | None) -> None:
    check_integer(n, "n", least=1)
    check_integer(length, "length", least=1)
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator or None, got {type(generator).__name__}")


def _check_rate(rate: float, *, positive: bool) -> None:
    check_number(rate, "rate")
    if not (rate > 0 if positive else rate >= 0) or rate > 1:
        raise ValueError(
            f"rate must {'be above 0 and' if positive else 'be at least 0 and'} at most 1, got {rate!r}"
        )
