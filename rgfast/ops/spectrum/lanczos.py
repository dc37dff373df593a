"""Effective rank of very wide second moments by stochastic Lanczos quadrature, with an interval."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from rgfast.ops.spectrum.krylov import Operator, lanczos, leading, off, product
from rgfast.ops.spectrum.measures import UNIT_ROUNDOFF
from rgfast.runtime.threads import aligned, one_thread
from rgfast.runtime.waiting import sent
from rgfast.validation import as_real_tensor, check_choice

__all__ = ["RankEstimate", "effective_rank_estimate", "moment_operator"]

_PROBES, _STEPS, _DEFLATE = 24, 64, 48  # by default
_BLOCK = 32  # columns of the block Krylov space in which the top of the spectrum is sought
_CONVERGED = 1e-3  # relative residual of a deflated pair; what it leaves out is of second order
_AT_ONCE = 1 << 28  # elements of Lanczos bases on a GPU
_U = UNIT_ROUNDOFF[torch.float64]


@dataclass(frozen=True)
class RankEstimate:
    """An effective rank with its 95% interval [`low`, `high`] and where the width comes from.

    `probe_error` is the jackknife standard error of the entropy over the probes; `depth_error` the larger of
    its change from half the Lanczos steps to all and half the distance between the Gauss and the Gauss-Radau
    rule, of which one overestimates and the other underestimates; `floor_error` what eigenvalues under the
    rounding error could add to it.
    """

    value: float
    low: float
    high: float
    probe_error: float
    depth_error: float
    floor_error: float
    deflated: int


def effective_rank_estimate(
    moment: Any,
    dim: int | None = None,
    *,
    spectrum: str = "singular",
    probes: int = _PROBES,
    steps: int = _STEPS,
    deflate: int = _DEFLATE,
    seed: int = 0,
) -> RankEstimate:
    """Effective rank of data with the second moment `moment`, as a `RankEstimate`, without its eigenvalues.

    `moment` is a symmetric positive semidefinite fp64 tensor `[d, d]` (any multiple of the second moment),
    or a function that applies it to fp64 `[d, k]`; then `dim` is d. With A that matrix, S = tr A^(1/2) and
    T = tr(A^(1/2) ln A^(1/2)) give the entropy H = ln S - T/S of the normalised singular values (Golub &
    Meurant 1994; Ubaru, Chen & Saad 2017): up to `deflate` leading eigenpairs by block Krylov, the rest by
    `probes` random vectors with `steps` Lanczos steps each, fully reorthogonalised. `spectrum="variance"`
    likewise with A. The same seed gives the same bits. 0 for a zero matrix. A `moment` on a GPU is estimated
    there in fp64, by torch's products and `eigh`, and read once at the end; it agrees with the CPU's to about
    1e-8. A function is given tensors on the CPU.

    Raises TypeError for a `moment` that is neither, ValueError for one that is not square or not finite, or
    sizes that make no sense.

    >>> import rgfast, torch
    >>> e = rgfast.effective_rank_estimate(torch.eye(300, dtype=torch.float64))
    >>> round(e.value, 6), e.low <= 300 <= e.high
    (300.0, True)
    """
    check_choice(spectrum, "spectrum", ("singular", "variance"))
    for name, number, least in (("probes", probes, 2), ("steps", steps, 2), ("deflate", deflate, 0)):
        if isinstance(number, bool) or not isinstance(number, int) or number < least:
            raise ValueError(f"{name} must be an integer of at least {least}, got {number!r}")
    workers = torch.get_num_threads()
    apply, size, device = _operator(moment, dim, workers)
    with one_thread():
        queued = _quadrature(apply, *_drawn(size, probes, seed, device), steps, deflate, workers)
        (found,) = _estimates(_Queued(*(each[None] for each in queued)), size, spectrum)
    if found is None:
        _refuse_nonfinite(moment)
    return found


def effective_rank_estimates(moments: Tensor, spectrum: str) -> list[RankEstimate | None]:
    """`effective_rank_estimate` of each of fp64 `moments[b, d, d]`, None for one that is not finite.

    On the CPU one after another, on other devices side by side; these are read once, at the end.
    """
    if not len(moments):
        return []
    workers, size = torch.get_num_threads(), moments.shape[-1]
    with one_thread():
        block, start = _drawn(size, _PROBES, 0, moments.device)

        def queue(a: Tensor) -> _Queued:
            lead, apply = a.shape[:-2], product(aligned(a), workers)
            first, probes = block.expand(*lead, *block.shape), start.expand(*lead, *start.shape)
            return _quadrature(apply, first, probes, _STEPS, _DEFLATE, workers)

        if moments.device.type == "cpu":
            queued = [queue(a) for a in moments]
            found = _Queued(*(torch.stack(each) for each in zip(*queued, strict=True)))
        else:
            most = max(1, _AT_ONCE // (_PROBES * _STEPS * size))
            queued = [queue(part) for part in torch.split(moments, most)]
            found = _Queued(*(torch.cat(each) for each in zip(*queued, strict=True)))
        return _estimates(found, size, spectrum)


def moment_operator(batches: Iterable[Tensor], d: int, *, centering: str = "mean") -> Operator:
    """The function V -> sum (x - mean)(x - mean)^T V over streamed rows, for `effective_rank_estimate`.

    `batches` yields the rows `[*, d]` of the same data at every iteration (a list, or an object with
    `__iter__`); it is read once here for the mean and once an application, and only one batch is held at a
    time.

    Raises ValueError for batches of another width or an unknown `centering`, TypeError for an iterator, which
    could be read only once.

    >>> import rgfast, torch
    >>> rows = torch.randn(40, 300).split(8)
    >>> rgfast.effective_rank_estimate(rgfast.moment_operator(rows, 300), 300).value < 40
    True
    """
    check_choice(centering, "centering", ("mean", "none"))
    if iter(batches) is batches:
        raise TypeError("batches must be iterable more than once, got an iterator")
    first = None
    total, count = torch.zeros(d, dtype=torch.float64, device="cpu"), 0
    for batch in batches:
        rows = as_real_tensor(batch, "batches", min_dim=2)
        if rows.shape[-1] != d:
            raise ValueError(f"batches must have {d} columns, got shape {tuple(rows.shape)}")
        wide = rows.detach().reshape(-1, d).double()
        if first is None and len(wide):
            first = wide[0].clone()
        if first is not None:
            with one_thread():
                total += (aligned(wide) - first).sum(0)
        count += len(wide)
    if first is None:
        raise ValueError("batches must hold at least one row, got none")
    mean = first + total / count if centering == "mean" else torch.zeros_like(first)

    def apply(v: Tensor) -> Tensor:
        result = torch.zeros_like(v)
        for batch in batches:
            y = aligned(as_real_tensor(batch, "batches").detach().reshape(-1, d).double()) - mean
            with one_thread():
                result += y.mT @ (y @ v)
        return result

    return apply


def _operator(moment: Any, dim: int | None, workers: int) -> tuple[Operator, int, torch.device]:
    if callable(moment) and not isinstance(moment, Tensor):
        if isinstance(dim, bool) or not isinstance(dim, int) or dim < 1:
            raise ValueError(f"dim must be the size of the operator, got {dim!r}")
        return moment, dim, torch.device("cpu")
    a = as_real_tensor(moment, "moment", min_dim=2).detach()
    if a.dtype != torch.float64:
        raise TypeError(f"moment must be float64, got {str(a.dtype).removeprefix('torch.')}")
    if a.dim() != 2 or a.shape[0] != a.shape[1] or a.shape[0] == 0 or dim not in (None, a.shape[0]):
        raise ValueError(f"moment must be one square matrix, got shape {tuple(a.shape)} and dim {dim!r}")
    if a.device.type == "cpu":  # elsewhere that would be a wait: the estimate comes out as not finite
        low, high = torch.aminmax(a)  # one pass, and NaN comes through
        if not (bool(torch.isfinite(low)) and bool(torch.isfinite(high))):
            _refuse_nonfinite(a)
    return product(aligned(a), workers), a.shape[0], a.device


def _refuse_nonfinite(moment: Any) -> NoReturn:
    bad = int((~torch.isfinite(moment)).sum()) if isinstance(moment, Tensor) else 0
    if bad:
        raise ValueError(f"moment must be finite, got {bad} NaN or infinite values")
    raise ValueError("moment must be finite, got NaN or infinite values from it")


class _Queued(NamedTuple):
    """What is known of moments in units of their largest eigenvalues. Nothing was read on their device."""

    known: Tensor  # [..., deflate], eigenvalues taken out, 0 for others
    small: Tensor  # [..., probes, steps, steps], tridiagonal matrices of the rest
    top: Tensor  # [...]
    finite: Tensor  # [...]


def _drawn(size: int, probes: int, seed: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The first block of the Krylov space, and the probes, `[size, *]`."""
    draw = torch.Generator().manual_seed(seed)
    block, start = (
        sent(torch.randn((size, width), generator=draw, dtype=torch.float64, device="cpu"), device)
        for width in (min(_BLOCK, size), probes)
    )
    return block, start


def _quadrature(
    apply: Operator, block: Tensor, start: Tensor, steps: int, deflate: int, workers: int
) -> _Queued:
    """Of moments `[..., size, size]`, from what was drawn, `[..., size, *]`."""
    value, vector, residual, finite = leading(apply, block, deflate)
    top = value[..., :1]
    value, vector, residual = value[..., :deflate], vector[..., :deflate], residual[..., :deflate]
    # Up to the first pair whose residual is not small.
    good = ((residual <= _CONVERGED * value) & (value > 1e-12 * top)).long().cumprod(-1) > 0
    unit = torch.where(top > 0, top, 1.0)
    known, vector = torch.where(good, value / unit, 0.0), torch.where(good[..., None, :], vector, 0.0)
    known = torch.nn.functional.pad(known, (0, deflate - known.shape[-1]))
    start = off(start, vector)
    start = (start / start.norm(dim=-2, keepdim=True).clamp_min(1e-300)).mT  # [..., q, d]
    steps = min(steps, start.shape[-1])
    small = lanczos(lambda v: off(apply(v), vector) / unit[..., None], start, steps, workers)
    whole = torch.isfinite(small)
    small = torch.where(whole, small, 0.0)  # a solver may refuse a whole batch for one
    return _Queued(known, small, top[..., 0], finite & whole.flatten(-3).all(-1))


def _estimates(queued: _Queued, size: int, spectrum: str) -> list[RankEstimate | None]:
    """The estimates of moments `[b]` of one size, None for one that was not finite. Reads the device once."""
    known, small, top, finite = queued
    floor = 16 * size**0.5 * _U  # eigenvalues under it are the moment's rounding error
    power = 0.5 if spectrum == "singular" else 1.0
    probes, steps = small.shape[1:3]
    taken = known > 0
    good = taken.sum(-1)
    known = torch.where(taken, known, 1.0) ** power
    base_s, base_t = ((taken * each).sum(-1, keepdim=True) for each in (known, known * known.log()))

    def sums(t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        theta, s = torch.linalg.eigh(t)
        weight = s[..., 0, :].square() * (size - good)[:, None, None]
        seen = theta > floor
        p = torch.where(seen, theta, 1.0) ** power
        mass = (weight * seen * p).sum(-1)
        return mass, (weight * seen * p * p.log()).sum(-1), (weight * ~seen).sum(-1)

    def entropy(s: Tensor, t: Tensor) -> Tensor:
        s, t = base_s + s, base_t + t
        return s.log() - t / s

    def both(t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        s_high, t_high, hidden = sums(t)
        s_low, t_low, _ = sums(_with_node_at_zero(t))
        return s_high, t_high, s_low, t_low, hidden

    def middle(s_high: Tensor, t_high: Tensor, s_low: Tensor, t_low: Tensor) -> tuple[Tensor, Tensor]:
        high, low = entropy(s_high, t_high), entropy(s_low, t_low)
        return (high + low) / 2, (high - low).abs() / 2

    *each, hidden = both(small)
    half = max(steps // 2, 1)
    *each_half, _ = both(small[..., :half, :half])
    centre, bracket = middle(*(v.mean(-1, keepdim=True) for v in each))
    centre_half, _ = middle(*(v.mean(-1, keepdim=True) for v in each_half))
    left_out, _ = middle(*((v.sum(-1, keepdim=True) - v) / (probes - 1) for v in each))
    spread = (left_out - left_out.mean(-1, keepdim=True)).square().sum(-1)
    probe = ((probes - 1) / probes * spread).sqrt()
    depth = torch.maximum((centre - centre_half).abs(), bracket)
    share = hidden.mean(-1) * floor**power / (base_s[:, 0] + each[0].mean(-1))
    columns = (centre[:, 0], probe, depth[:, 0], share, good.double(), top, finite.double())
    return [_estimate(size, probes, *row) for row in torch.stack(columns, -1).cpu().tolist()]


def _estimate(
    size: int,
    probes: int,
    entropy: float,
    probe: float,
    depth: float,
    share: float,
    deflated: float,
    top: float,
    finite: float,
) -> RankEstimate | None:
    if not (finite and math.isfinite(top)):
        return None
    if top <= 0:
        return RankEstimate(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0)
    share = min(0.5, share)
    hide = share * math.log(size) + _binary_entropy(share) if share > 0 else 0.0
    from scipy.special import stdtrit  # here, since few need it; scipy.stats would take 40 MB more

    width = float(stdtrit(probes - 1, 0.975)) * probe + depth + hide + 1e-10
    low, high = math.exp(entropy - width), math.exp(entropy + width)
    return RankEstimate(math.exp(entropy), low, high, probe, depth, hide, int(deflated))


def _with_node_at_zero(t: Tensor) -> Tensor:
    """The Gauss-Radau matrices: last diagonal entries of `t[..., k, k]` changed so that 0 is an eigenvalue.

    The even derivatives of the functions summed here are negative and the odd ones positive, so that the
    Gauss rule of `t` overestimates and this one underestimates.
    """
    t = t.clone()
    k = t.shape[-1]
    if k == 1:
        return t
    pivot = t[..., 0, 0].clone()
    for j in range(1, k - 1):
        pivot = t[..., j, j] - t[..., j, j - 1].square() / torch.where(pivot > 0, pivot, torch.inf)
    last = t[..., k - 1, k - 2]
    usable = (last > 0) & (pivot > 0)
    moved = last.square() / torch.where(usable, pivot, 1.0)
    t[..., k - 1, k - 1] = torch.where(
        usable, torch.minimum(moved, t[..., k - 1, k - 1]), t[..., k - 1, k - 1]
    )
    return t


def _binary_entropy(p: float) -> float:
    return -p * math.log(p) - (1 - p) * math.log1p(-p)
