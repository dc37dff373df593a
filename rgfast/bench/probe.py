"""A whole probe of a residual stack against the bare forward of the same weights, measuring nothing."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import rgfast
from rgfast.bench.cka import pair_loop
from rgfast.bench.spectrum import svd_rank
from rgfast.bench.timing import Call, Checked, Contest
from rgfast.native import unavailable_reason
from rgfast.probing.spec import Route

__all__ = ["check", "contests", "gate", "probed", "stack", "states", "stored"]

# Depth, positions and width of what is timed; n = 1,024 sequences.
SHAPES = ((6, 64, 64), (12, 32, 128), (24, 16, 256))
_EPS = 1e-5


def gate(device: str) -> Iterator[Checked]:
    """Ranks, drift and CKA of a small stack, and of one that has collapsed, against stored activations.

    By either route: few samples would else be summed up, and many are not.
    """
    routes: tuple[Route, ...] = ("moments", "samples") if device == "cpu" else ("moments",)
    for route in routes:
        for collapsed in (False, True):
            model = stack(3, 5, 12, device, collapsed=collapsed)
            name = f"{'collapsed' if collapsed else 'spread'}, {route}"
            yield from check(model, _data(100, 5, 12, device), name, route)


def contests(device: str, quick: bool) -> Iterator[Contest]:
    """Forward, ranks at every position, drift and CKA of all pairs; n = 1,024."""
    for depth, length, width in SHAPES[: 2 if quick else None]:
        model, x = stack(depth, length, width, device), _data(1024, length, width, device)
        rivals: dict[str, tuple[Call, ...]] = {
            "bare eager forward, nothing measured": (partial(_last, model, x),)
        }
        if not quick or (depth, length, width) == SHAPES[0]:
            rivals["stored activations, torch SVD, loop over pairs"] = (partial(stored, model, x),)
        name = f"L={depth} T={length} d={width} n={len(x)}"
        # Positions do not see each other: two stand for all, by the route that all of them take.
        route: Route = "samples" if device == "cpu" and unavailable_reason() is None else "moments"
        checks = (partial(_worst, model, x[:, :2].contiguous(), route),)
        yield Contest(name, partial(probed, model, x, route), rivals, checks)


def stack(depth: int, length: int, width: int, device: str, *, collapsed: bool = False) -> Any:
    """A position-wise residual stack; ``collapsed`` layers are of rank one but for noise."""
    generator = torch.Generator().manual_seed(0)
    model = rgfast.ResidualStack(
        width, depth, mixing="none", length=length, w2_scale=0.5, generator=generator
    )
    if collapsed:
        with torch.no_grad():
            for block in model.blocks:
                w2: Tensor = block.mlp.w2  # type: ignore[union-attr, assignment]
                w2.copy_(30.0 * torch.outer(w2[:, 0], w2[0]) + 1e-3 * w2)
    return model.to(device).eval()


def probed(model: Any, x: Tensor, route: Route = "auto") -> rgfast.ProbeResult:
    """The whole probe."""
    return rgfast.probe(
        model, x, pairs="all", views=["position"], batch_size=len(x), route=route, progress=False
    )


def states(model: Any, x: Tensor) -> Iterator[Tensor]:
    """The input and the output of every block, by eager PyTorch on the stack's own weights."""
    yield x
    for block in model.blocks:
        mlp = block.mlp
        normed = F.layer_norm(x, x.shape[-1:], mlp.norm.weight, mlp.norm.bias, _EPS)
        x = x + F.linear(F.gelu(F.linear(normed, mlp.w1, mlp.b1)), mlp.w2, mlp.b2)
        yield x


def stored(model: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Effective ranks ``[L, T]`` and biased CKA ``[T, L * L]`` of stored activations, as one writes it."""
    with torch.no_grad():
        layers = torch.stack([state.transpose(0, 1) for state in states(model, x)])
    return svd_rank(layers), pair_loop(layers, False)


def check(model: Any, x: Tensor, name: str, route: Route = "auto") -> Iterator[Checked]:
    """Errors of a probe's ranks, biased CKA and drift, against fp64 on the activations it saw."""
    found = probed(model, x, route).dataset
    with torch.no_grad():
        layers = torch.stack([state.transpose(0, 1) for state in states(model.double(), x.double())]).cpu()
    model.float()
    ranks, pairs = svd_rank(layers), pair_loop(layers, False)
    got = torch.from_numpy(found.effective_rank.sel(view="position").values)[:, found.position.values >= 0]
    # The probe saw what an fp32 forward puts out.
    yield Checked(f"probe, effective rank, {name}", float(((got - ranks).abs() / ranks).max()), 1e-4)
    kept = found.isel(position=found.position.values >= 0).sel(view="position")
    matrix = torch.from_numpy(kept.cka_biased.transpose("position", "layer", "other_layer").values).flatten(1)
    yield Checked(f"probe, CKA, {name}", float((matrix - pairs).abs().max()), 1e-4)


def _worst(model: Any, x: Tensor, route: Route) -> Checked:
    """A check that is not good, or else the first."""
    found = list(check(model, x, "two positions", route))
    return next((each for each in found if not each.good), found[0])


def _last(model: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        for state in states(model, x):
            last = state
    return last


def _data(n: int, length: int, width: int, device: str) -> Tensor:
    return torch.randn(n, length, width, generator=torch.Generator().manual_seed(1)).to(device)
