"""Probe a digits classifier before and after training: `python examples/probe_digits.py [--out DIR]`.

A residual MLP in plain PyTorch learns scikit-learn's 8x8 digits. The probe follows its stream through the
blocks: effective rank, drift, spectra, and how much of the digit a linear map reads off each layer. Needs
scikit-learn. Writes `digits.png`, and `trained.nc` and `untrained.nc`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from matplotlib import pyplot as plt
from sklearn.datasets import load_digits
from torch import Tensor, nn

import rgfast


class Block(nn.Module):
    """x + W2 gelu(W1 norm(x))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


def build(width: int = 48, depth: int = 6) -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, width), *(Block(width) for _ in range(depth)), nn.Linear(width, 10))


def train(model: nn.Sequential, images: Tensor, digits: Tensor, epochs: int) -> None:
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(epochs):
        for part in torch.randperm(len(images)).split(64):
            optimiser.zero_grad()
            nn.functional.cross_entropy(model(images[part]), digits[part]).backward()
            optimiser.step()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/digits"))
    parser.add_argument("--epochs", type=int, default=40)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)

    torch.manual_seed(0)
    data = load_digits()
    images = torch.tensor(data.images.reshape(-1, 64) / 16, dtype=torch.float32)
    digits = torch.tensor(data.target)
    shuffled = torch.randperm(len(images))
    images, digits = images[shuffled], digits[shuffled]
    model = build()
    results = {}
    for stage in ("untrained", "trained"):
        if stage == "trained":
            train(model, images[:1200], digits[:1200], options.epochs)
        results[stage] = rgfast.probe(
            model, images, pairs="all", groups=8, targets={"digit": digits}, progress=False
        )
        results[stage].save(options.out / f"{stage}.nc")
        right = (model(images[1200:]).argmax(1) == digits[1200:]).float().mean()
        rank = results[stage].order_parameter()
        read = results[stage].target_r2("digit")
        print(
            f"{stage:>9}: accuracy on unseen images {float(right):.3f}; "
            f"effective rank {float(rank[0]):.1f} → {float(rank[-1]):.1f}; "
            f"R² of the digit {float(read[0]):.2f} → {float(read[-1]):.2f}"
        )
    draw(results, options.out / "digits.png")
    print(f"wrote {options.out / 'digits.png'}")


def draw(results: dict[str, rgfast.ProbeResult], path: Path) -> None:
    figure, axes = plt.subplots(2, 2, figsize=(10, 7.5), layout="constrained")
    for stage, colour in (("untrained", "#777777"), ("trained", "#0072B2")):
        data = results[stage].dataset.sel(view="pooled", position=-1)
        layers = data.layer.values
        axes[0, 0].errorbar(
            layers, data.effective_rank, yerr=data.effective_rank_se, color=colour, marker="o", label=stage
        )
        axes[0, 1].errorbar(
            layers,
            data.target_r2.sel(target="digit"),
            yerr=data.target_r2_se.sel(target="digit"),
            color=colour,
            marker="o",
            label=stage,
        )
        steps = data.transition.values
        axes[1, 0].semilogy(steps, data.kernel_drift, color=colour, marker="o", label=stage)
        axes[1, 0].set_xticks(steps, [f"{step}→{step + 1}" for step in steps])
    axes[0, 0].plot(layers, data.effective_rank_baseline, "k:", lw=1, label="isotropic, same n and d")
    axes[0, 0].set(xlabel="layer", ylabel="effective rank, pooled rows", ylim=(0, None))
    axes[0, 1].set(xlabel="layer", ylabel="held-out R² of the digit", ylim=(0, 1))
    axes[1, 0].set(xlabel="transition between layers", ylabel="kernel drift 1 − CKA")
    for ax in axes.flat[:3]:
        ax.grid(alpha=0.25)
        ax.legend(fontsize="small")
    results["trained"].plot_spectra(ax=axes[1, 1])
    axes[1, 1].set_title("spectra, trained")
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()
