"""A whole probe of a residual stack against the bare forward of the same weights, measuring nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rgfast
from rgfast.bench.cka import gram_einsum, pair_loop
from rgfast.bench.spectrum import svd_rank
from rgfast.bench.timing import Call, Checked, Contest, Size
from rgfast.probing.spec import Route

__all__ = [
    "KINDS",
    "ON_A_GPU",
    "SHAPES",
    "Case",
    "check",
    "checks",
    "contests",
    "gate",
    "last",
    "probed",
    "stack",
    "states",
    "stored",
]

# Depth, positions and width of what is timed; n = 1,024 sequences.
SHAPES = ((6, 64, 64), (12, 32, 128), (24, 16, 256))
# On a GPU, of the call without options: larger ones with their number of sequences, too.
ON_A_GPU = (*((*shape, 1024) for shape in SHAPES), (24, 16, 512, 2048), (48, 4, 1024, 4096))
# Of the position view: "none" is a stack without mixing; "collapsed" layers, from the input on, are of rank
# one but for noise; "groups" adds a jackknife over 8 groups; "mixer" mixes across positions; "foreign" is a
# plain torch module of the stack's blocks, of which only neighbors are compared. The call without options:
# "default" is of the plain module and a whole array, "loader" of its batches of 64, "own" of the stack, and
# "views" of the stack and all pairs of layers.
KINDS = ("none", "collapsed", "groups", "mixer", "foreign", "default", "loader", "own", "views")
_PLAIN, _EVERY_VIEW = ("foreign", "default", "loader"), ("default", "loader", "own", "views")
_LOADED = 64
_NOISE = 1e-5
_EPS = 1e-5


class Plain(nn.Module):
    """A block of a stack as anyone would write it."""

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(mlp.w1.shape[1], dtype=torch.float32, device="cpu")
        self.up, self.down = (
            nn.Linear(w.shape[1], w.shape[0], dtype=torch.float32, device="cpu") for w in (mlp.w1, mlp.w2)
        )
        with torch.no_grad():
            for linear, weight, bias in ((self.up, mlp.w1, mlp.b1), (self.down, mlp.w2, mlp.b2)):
                linear.weight.copy_(weight)
                linear.bias.copy_(bias)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.down(F.gelu(self.up(self.norm(x))))
        return out


@dataclass(frozen=True)
class Case:
    """A model, its input ``[n, T, d]`` and the options of its probe."""

    model: Any
    x: Tensor
    options: dict[str, Any]
    batches: Any = None

    @classmethod
    def make(cls, kind: str, depth: int, length: int, width: int, n: int, device: str) -> Case:
        """One of KINDS with ``n`` sequences."""
        mixing = "mixer" if kind == "mixer" else "none"
        model = stack(depth, length, width, device, mixing=mixing, collapsed=kind == "collapsed")
        if kind in _PLAIN:
            model = nn.Sequential(*(Plain(block.mlp) for block in model.blocks)).to(device).eval()
        draw = torch.Generator().manual_seed(1)
        x = torch.randn(n, length, width, generator=draw, dtype=torch.float32, device="cpu")
        if kind == "collapsed":
            x = x[..., :1] * x[0, 0] + _NOISE * x
        x = x.to(device)
        if kind in _EVERY_VIEW:
            batches = [*torch.split(x, _LOADED)] if kind == "loader" else x
            return cls(model, x, {"pairs": "all"} if kind == "views" else {}, batches)
        options: dict[str, Any] = {"views": ["position"], "batch_size": n}
        options |= {"pairs": "adjacent" if kind == "foreign" else "all"}
        return cls(model, x, options | ({"groups": 8} if kind == "groups" else {}), x)


def gate(device: str) -> Iterator[Checked]:
    """Ranks and CKA of a small stack, and of one that has collapsed, against stored activations.

    By either route: few samples would else be summed up, and many are not.
    """
    routes: tuple[Route, ...] = ("moments", "samples") if device == "cpu" else ("moments",)
    for route in routes:
        for kind in ("none", "collapsed"):
            case = Case.make(kind, 3, 5, 12, 100, device)
            case.options["route"] = route
            yield from checks(case, f"{kind}, {route}", list(range(5)))


def contests(device: str, size: Size) -> Iterator[Contest]:
    """Forward, ranks at every position, drift and CKA; n = 1,024. Quick ones are of plain stacks."""
    if device != "cpu" and size != "tiny":
        yield from _on_a_gpu(device)
        return
    shapes = {"tiny": ((2, 3, 8),), "quick": SHAPES[:2], "full": SHAPES}[size]
    for kind in KINDS[: 1 if size == "quick" else None]:
        for shape in shapes:
            rivals: dict[str, Callable[[Case], Call]] = {
                "bare eager forward, nothing measured": lambda case: partial(last, case.model, case.x)
            }
            if kind == "none" and (size != "quick" or shape == shapes[0]):
                rivals["stored activations, torch SVD, loop over pairs"] = lambda case: partial(
                    stored, case.model, case.x
                )
            n = 64 if size == "tiny" else 1024
            name = "L={} T={} d={} n={}".format(*shape, n)
            yield Contest(
                name if kind == "none" else f"{kind}, {name}",
                partial(Case.make, kind, *shape, n, device),
                lambda case, impl: partial(probed, case),
                check,
                rivals,
            )


def _on_a_gpu(device: str) -> Iterator[Contest]:
    """The call without options, of plain modules, against their bare forward."""
    for depth, length, width, n in ON_A_GPU:
        yield Contest(
            f"default, L={depth} T={length} d={width} n={n}",
            partial(Case.make, "default", depth, length, width, n, device),
            lambda case, impl: partial(probed, case),
            check_last,
            {"bare eager forward, nothing measured": lambda case: partial(last, case.model, case.x)},
        )


def stack(
    depth: int, length: int, width: int, device: str, *, mixing: Any = "none", collapsed: bool = False
) -> Any:
    """A residual stack; ``collapsed`` layers are of rank one but for noise."""
    generator = torch.Generator().manual_seed(0)
    model = rgfast.ResidualStack(
        width,
        depth,
        mixing=mixing,
        length=length,
        w2_scale=0.5,
        generator=generator,
        dtype=torch.float32,
        device="cpu",
    )
    if collapsed:
        with torch.no_grad():
            for block in model.blocks:
                w2: Tensor = block.mlp.w2  # type: ignore[union-attr, assignment]
                w2.copy_(30.0 * torch.outer(w2[:, 0], w2[0]) + 1e-3 * w2)
    return model.to(device).eval()


def probed(case: Case) -> rgfast.ProbeResult:
    """The whole probe."""
    return rgfast.probe(case.model, case.batches, progress=False, **case.options)


def states(model: Any, x: Tensor) -> Iterator[Tensor]:
    """The input and the output of every block, by eager PyTorch on the model's own weights."""
    yield x
    for block in getattr(model, "blocks", model):
        if isinstance(block, Plain):
            x = block(x)
        else:
            if block.mix is not None:
                x = x + _mlp(block.mix, _normed(block.mix, x).mT).mT
            x = x + _mlp(block.mlp, _normed(block.mlp, x))
        yield x


def last(model: Any, x: Tensor) -> Tensor:
    """The output of the bare forward."""
    with torch.no_grad():
        for state in states(model, x):
            out = state
    return out


def stored(model: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Effective ranks ``[L, T]`` and biased CKA ``[T, L * L]`` of stored activations, as one writes it."""
    with torch.no_grad():
        layers = torch.stack([state.transpose(0, 1) for state in states(model, x)])
    return svd_rank(layers), pair_loop(layers, False)


def checks(case: Case, name: str, places: list[int]) -> Iterator[Checked]:
    """Errors of ranks and of biased CKA at some positions, and of pooled rows where there are such views,
    against an eager fp64 forward."""
    found = probed(case).dataset
    with torch.no_grad():
        truth = states(copy.deepcopy(case.model).double(), case.x.double())
        layers = torch.stack([state[:, places].transpose(0, 1) for state in truth]).cpu()
    yield from _compared(case, f"position, {name}", layers, found.sel(view="position", position=places))
    for view in ("pooled", "mean_pooled"):
        if view not in found.view.values:
            continue
        with torch.no_grad():
            each = states(copy.deepcopy(case.model).double(), case.x.double())
            rows = [x.flatten(0, 1) if view == "pooled" else x.mean(1) for x in each]
        at = found.sel(view=view, position=[-1])
        yield from _compared(case, f"{view}, {name}", torch.stack(rows)[:, None].cpu(), at)


def _compared(case: Case, name: str, layers: Tensor, at: Any) -> Iterator[Checked]:
    """Errors of what was found at the positions of ``layers[L, P, n, d]``."""
    ranks = svd_rank(layers)
    got = torch.from_numpy(at.effective_rank.transpose("layer", "position").values)
    # The probe saw what an fp32 forward puts out.
    yield Checked(f"probe, effective rank, {name}", float(((got - ranks).abs() / ranks).max()), 1e-4)
    adjacent = case.options.get("pairs", "adjacent") == "adjacent"
    matrix = torch.from_numpy(at.cka_biased.transpose("position", "layer", "other_layer").values)
    pairs = matrix.diagonal(1, -2, -1) if adjacent else matrix
    off = (pairs - _truth(layers, adjacent)).abs().max()
    yield Checked(f"probe, CKA, {name}", float(off), 1e-4)


def _truth(layers: Tensor, adjacent: bool) -> Tensor:
    """Biased CKA of ``layers[L, P, n, d]``; over features where a Gram of the samples would not fit."""
    if layers.shape[2] <= 2048:
        return gram_einsum(layers, adjacent)
    found = pair_loop(layers, adjacent)
    return found if adjacent else found.reshape(-1, len(layers), len(layers))


def check(case: Case, impl: str = "auto") -> Checked:
    """The first check that is not good, or else the first."""
    found = list(checks(case, "two positions", [0, case.x.shape[1] - 1]))
    return next((each for each in found if not each.good), found[0])


def check_last(case: Case, impl: str = "auto") -> Checked:
    """Ranks and CKA of the last two layers at the first position, which wide stacks have time for."""
    found = probed(case).dataset
    with torch.no_grad():
        before = end = torch.empty(0, dtype=torch.float64, device=case.x.device)
        for state in states(copy.deepcopy(case.model).double(), case.x[:, :1].double()):
            before, end = end, state[:, 0]
    layers = torch.stack([before, end])[:, None].cpu()
    at = found.sel(view="position", position=[0]).isel(layer=slice(-2, None), other_layer=slice(-2, None))
    each = list(_compared(case, "position 0, last layers", layers, at))
    return next((one for one in each if not one.good), each[0])


def _normed(mlp: Any, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], mlp.norm.weight, mlp.norm.bias, _EPS)


def _mlp(mlp: Any, x: Tensor) -> Tensor:
    return F.linear(F.gelu(F.linear(x, mlp.w1, mlp.b1)), mlp.w2, mlp.b2)
