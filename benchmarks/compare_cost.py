"""A comparison of two models over pytorch-cka's compute_cka, in turns, and over both bare forwards.

    python benchmarks/compare_cost.py [--only resnet ...] [--rounds 5] [--threads 1]

needs pip install pytorch-cka==1.1.3. Processor time, so that other work on the machine counts little; quote
ratios of medians. Ours is the exact debiased CKA of all rows, checked against the definition first; theirs
averages HSIC over batches, of each sequence flattened, in fp32. Cases "defaults" leave the layers to each
package: theirs takes every module, ours the residual stream.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import rgfast


class Block(nn.Module):
    """A residual block of two convolutions, as in ResNets for small images."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.short = nn.Identity() if stride == 1 else nn.Conv2d(inputs, outputs, 1, stride, bias=False)
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(self.relu1(self.norm1(self.conv1(x)))))
        return self.relu2(y + self.short(x))


def resnet(seed: int, width: int = 16) -> nn.Module:
    torch.manual_seed(seed)
    sizes = [width] * 3 + [2 * width] * 3 + [4 * width] * 3
    blocks = [
        Block(before, after, 1 if before == after else 2)
        for before, after in zip([width, *sizes], sizes, strict=False)
    ]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, 10)]
    return nn.Sequential(nn.Conv2d(3, width, 3, 1, 1), nn.Sequential(*blocks), *head)


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


def mixer(seed: int, width: int = 32, depth: int = 6) -> nn.Module:
    """Blocks on ``[B, T, D]``: a cheap forward of wide activations."""
    torch.manual_seed(seed)
    return nn.Sequential(*(Residual(width) for _ in range(depth)))


@dataclass(frozen=True)
class Case:
    """Two models, their inputs, and the layers that both packages take (None: each its own defaults)."""

    make: Callable[[int], nn.Module]
    inputs: tuple[int, ...]
    batch: int
    ours: Any = "auto"
    theirs: Any = None
    views: Any = None


CASES = {
    "resnet, defaults": Case(resnet, (256, 3, 32, 32), 64, ours="1"),
    "resnet, same layers": Case(
        resnet, (256, 3, 32, 32), 64, [f"1.{k}" for k in range(9)], [f"1.{k}" for k in range(9)]
    ),
    "tokens, defaults": Case(mixer, (256, 128, 32), 256),
    "tokens, same layers": Case(
        mixer, (256, 128, 32), 256, [str(k) for k in range(6)], [str(k) for k in range(6)]
    ),
    "tokens, means, defaults": Case(mixer, (256, 128, 32), 256, views=["mean_pooled"]),
    "tokens, means, batches of 1024": Case(mixer, (1024, 128, 32), 1024, views=["mean_pooled"]),
}


def check(a: nn.Module, b: nn.Module, x: Tensor, layers: Any) -> None:
    """Ours against the definition: n × n kernels of sequences' means in fp64, the last layers of both."""
    found = rgfast.compare(a, b, x, layers_a=layers, layers_b=layers, views=["mean_pooled"], progress=False)
    seen: list[Tensor] = []
    name = found.layers_a[-1].removesuffix(":input")
    for model in (a, b):
        module = dict(model.named_modules())[name]
        handle = module.register_forward_hook(lambda _, args, out: seen.append(out.double()))
        with torch.no_grad():
            model.eval()(x)
        handle.remove()
    means = [out.mean((2, 3)) if out.dim() == 4 else out.mean(1) for out in seen]
    kernels = []
    for rows in means:
        rows = rows - rows.mean(0)
        kernel = (rows @ rows.T).fill_diagonal_(0.0)
        n, sums = len(kernel), kernel.sum(1) / (len(kernel) - 2)
        kernel = kernel - sums[:, None] - sums + kernel.sum() / ((n - 1) * (n - 2))
        kernels.append(kernel.fill_diagonal_(0.0))
    k, m = kernels
    truth = float((k * m).sum() / ((k * k).sum() * (m * m).sum()).sqrt())
    error = abs(float(found.matrix("cka").values[-1, -1]) - truth)
    if error > 1e-8:
        raise SystemExit(f"wrong by {error:.2g}: nothing is timed")


def timed(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", default=list(CASES), metavar="CASE")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    try:
        from cka.cka import compute_cka
    except ImportError:
        raise SystemExit("this needs pip install pytorch-cka==1.1.3") from None
    print(
        f"{'case':<32}{'bare forwards':>14}{'pytorch-cka':>13}{'ours':>9}{'theirs/ours':>13}{'ours/bare':>11}"
    )
    for name, case in CASES.items():
        if not any(name.startswith(word) for word in options.only):
            continue
        a, b = case.make(0).eval(), case.make(1).eval()
        x = torch.randn(case.inputs, generator=torch.Generator().manual_seed(0))
        loader: Any = torch.utils.data.DataLoader(x, batch_size=case.batch)
        check(a, b, x[:64], case.ours)

        def bare(a: nn.Module = a, b: nn.Module = b, loader: Any = loader) -> None:
            with torch.inference_mode():
                for batch in loader:
                    a(batch)
                    b(batch)

        def theirs(a: nn.Module = a, b: nn.Module = b, loader: Any = loader, case: Case = case) -> None:
            compute_cka(a, b, loader, layers=case.theirs, device="cpu", progress=False)

        def ours(a: nn.Module = a, b: nn.Module = b, loader: Any = loader, case: Case = case) -> None:
            layers = {"layers_a": case.ours, "layers_b": case.ours}
            rgfast.compare(a, b, loader, views=case.views, progress=False, **layers)

        contenders = [bare, theirs, ours]
        for call in contenders:
            call()
        seconds: list[list[float]] = [[] for _ in contenders]
        for turn in range(options.rounds):
            for k in range(len(contenders)):
                at = (k + turn) % len(contenders)
                seconds[at].append(timed(contenders[at]))
        forward, rival, own = (statistics.median(each) for each in seconds)
        ratios = f"{rival / own:>13.2f}{own / forward:>11.2f}"
        print(f"{name:<32}{forward:>13.2f}s{rival:>12.2f}s{own:>8.2f}s{ratios}", flush=True)


if __name__ == "__main__":
    main()
