"""The blocks of a stack: an MLP on features, across positions, or on both, added to the stream."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rgfast.ops.residual_mlp import residual_mlp
from rgfast.ops.residual_mlp.api import Across, Activation

__all__ = [
    "EPS",
    "Block",
    "FeatureMLP",
    "FlatMLP",
    "Initialization",
    "Norm",
    "Normalization",
    "PositionMLP",
    "normal_parameter",
    "uniform_parameter",
]

Norm = Literal["layer", "rms"] | None
Initialization = Literal["normal", "torch"]

EPS = 1e-5


def normal_parameter(
    shape: tuple[int, ...],
    std: float,
    generator: torch.Generator | None,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
) -> nn.Parameter:
    # Drawn in fp32 on the generator's device, so that a seed means one network in every dtype, everywhere.
    source = torch.device("cpu") if generator is None else generator.device
    drawn = torch.randn(shape, dtype=torch.float32, device=source, generator=generator).mul_(std)
    return nn.Parameter(torch.empty(shape, dtype=dtype, device=device).copy_(drawn))


def uniform_parameter(
    shape: tuple[int, ...],
    fan_in: int,
    generator: torch.Generator | None,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
) -> nn.Parameter:
    """Uniform within ±1/sqrt(fan_in), as ``torch.nn.Linear`` starts its weight and its bias."""
    source = torch.device("cpu") if generator is None else generator.device
    drawn = torch.rand(shape, dtype=torch.float32, device=source, generator=generator).mul_(2).sub_(1)
    drawn.div_(math.sqrt(fan_in))
    return nn.Parameter(torch.empty(shape, dtype=dtype, device=device).copy_(drawn))


class Normalization(nn.Module):
    """LayerNorm, RMSNorm or nothing over the last dimension, with learned weight (and bias for LayerNorm)."""

    def __init__(
        self, width: int, norm: Norm, dtype: torch.dtype | None, device: torch.device | str | None
    ) -> None:
        super().__init__()
        self.norm = norm
        one, zero = (torch.full((width,), v, dtype=dtype, device=device) for v in (1.0, 0.0))
        self.weight = nn.Parameter(one) if norm else None
        self.bias = nn.Parameter(zero) if norm == "layer" else None

    def reset_parameters(self) -> None:
        """Weight one and bias zero, as at the start."""
        with torch.no_grad():
            if self.weight is not None:
                self.weight.fill_(1.0)
            if self.bias is not None:
                self.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        if self.norm == "layer":
            return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, EPS)
        if self.norm == "rms":
            return F.rms_norm(x, x.shape[-1:], self.weight, EPS)
        return x


class _MLP(nn.Module):
    """Parameters of one two-layer MLP ``size -> hidden -> size`` and of the norm before it."""

    def __init__(
        self,
        size: int,
        hidden: int,
        normalised: int,
        norm: Norm,
        activation: Activation,
        w2_scale: float,
        generator: torch.Generator | None,
        dtype: torch.dtype | None,
        device: torch.device | str | None,
        initialization: Initialization,
    ) -> None:
        super().__init__()
        self.activation: Activation = activation
        self.w2_scale, self.initialization = w2_scale, initialization
        self.norm = Normalization(normalised, norm, dtype, device)
        if initialization == "torch":
            rest = (generator, dtype, device)
            self.w1 = uniform_parameter((hidden, size), size, *rest)
            self.b1 = uniform_parameter((hidden,), size, *rest)
            self.w2 = uniform_parameter((size, hidden), hidden, *rest)
            self.b2 = uniform_parameter((size,), hidden, *rest)
            return
        self.w1 = normal_parameter((hidden, size), 1 / math.sqrt(size), generator, dtype, device)
        self.b1 = nn.Parameter(torch.zeros(hidden, dtype=dtype, device=device))
        # Drawn even when scaled to zero, so that every w2_scale sees the same later draws.
        self.w2 = normal_parameter((size, hidden), w2_scale / math.sqrt(hidden), generator, dtype, device)
        self.b2 = nn.Parameter(torch.zeros(size, dtype=dtype, device=device))

    def reset_parameters(self) -> None:
        """Draw weights as at the start, with torch's global generator; the norm is a module of its own."""
        with torch.no_grad():
            if self.initialization == "torch":
                for weight, bias in ((self.w1, self.b1), (self.w2, self.b2)):
                    bound = 1 / math.sqrt(weight.shape[1])
                    weight.uniform_(-bound, bound)
                    bias.uniform_(-bound, bound)
                return
            self.w1.normal_(std=1 / math.sqrt(self.w1.shape[1]))
            self.w2.normal_(std=self.w2_scale / math.sqrt(self.w2.shape[1]))
            self.b1.zero_()
            self.b2.zero_()


class FeatureMLP(_MLP):
    """x + MLP_D(norm(x)) on the last dimension: the op ``residual_mlp``."""

    across: Across = "features"

    def forward(self, x: Tensor) -> Tensor:
        return residual_mlp(
            x,
            self.w1,
            self.b1,
            self.w2,
            self.b2,
            norm=self.norm.norm,
            norm_weight=self.norm.weight,
            norm_bias=self.norm.bias,
            activation=self.activation,
            eps=EPS,
            across=self.across,
        )


class PositionMLP(FeatureMLP):
    """x + MLP_T(norm(x)) across positions: the norm is over features, the MLP over T."""

    across: Across = "positions"


class FlatMLP(FeatureMLP):
    """x + MLP(norm(x)) on all positions and features of a sequence as one vector of T·D."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(-2)).reshape(x.shape)


class Block(nn.Module):
    """One layer of the stack: mixing across positions (where there is any), then the feature MLP."""

    def __init__(self, mix: PositionMLP | None, mlp: FeatureMLP) -> None:
        super().__init__()
        self.mix = mix
        self.mlp = mlp

    def forward(self, x: Tensor) -> Tensor:
        if self.mix is not None:
            x = self.mix(x)
        y: Tensor = self.mlp(x)
        return y
