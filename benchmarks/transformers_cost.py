"""The default probe of Hugging Face models with random weights and padding, over their own forward.

    python benchmarks/transformers_cost.py [--only gpt2-small ...] [--rounds 5] [--threads N]

One batch, of which every sequence lacks up to half of its positions. Forward and probe take turns; medians of
wall time. Ranks of some layers, at two positions and pooled, are compared with an SVD in fp64 first. Each
model has a process of its own: what one leaves of its memory would be the next one's.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import rgfast

# kind, layers, width, sequences, positions
CASES = {
    "gpt2-small": ("gpt2", 6, 384, 96, 64),
    "llama-small": ("llama", 8, 512, 64, 80),
    "bert-small": ("bert", 4, 256, 512, 48),
    "bert-minilm": ("bert", 6, 384, 512, 32),
    "gpt2": ("gpt2", 12, 768, 96, 64),
    "llama": ("llama", 12, 768, 96, 64),
    "bert": ("bert", 12, 768, 96, 64),
}


def made(kind: str, layers: int, width: int) -> nn.Module:
    import transformers as hf

    heads = width // 64
    torch.manual_seed(0)
    if kind == "gpt2":
        model = hf.GPT2Model(hf.GPT2Config(n_layer=layers, n_embd=width, n_head=heads))
    elif kind == "llama":
        model = hf.LlamaModel(
            hf.LlamaConfig(
                num_hidden_layers=layers,
                hidden_size=width,
                intermediate_size=width * 8 // 3 // 64 * 64,
                num_attention_heads=heads,
                num_key_value_heads=heads,
            )
        )
    else:
        config = hf.BertConfig(
            num_hidden_layers=layers,
            hidden_size=width,
            num_attention_heads=heads,
            intermediate_size=4 * width,
        )
        model = hf.BertModel(config, add_pooling_layer=False)
    found: nn.Module = model.eval()
    return found


def batch_of(n: int, length: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 30_000, (n, length), generator=draw)
    lacking = torch.randint(0, length // 2 + 1, (n, 1), generator=draw)
    return {"input_ids": ids, "attention_mask": (torch.arange(length) < length - lacking).long()}


def rank(x: Tensor) -> float:
    x = x.double()
    sigma = torch.linalg.svdvals(x - x.mean(0))
    p = sigma / sigma.sum()
    return float(torch.special.entr(p).sum().exp())


@torch.no_grad()
def error(result: rgfast.ProbeResult, model: nn.Module, batch: dict[str, Tensor]) -> float:
    """The largest relative error of ranks of two layers; the last state has passed the final norm."""
    found, keep = result.dataset.effective_rank, batch["attention_mask"] > 0
    states = model(**batch, output_hidden_states=True).hidden_states
    worst = 0.0
    for layer in (0, len(states) - 2):
        x = states[layer]
        for t in (0, x.shape[1] - 3):
            got = float(found.sel(view="position", position=t)[layer])
            worst = max(worst, abs(got / rank(x[:, t][keep[:, t]]) - 1))
        got = float(found.sel(view="pooled", position=-1)[layer])
        worst = max(worst, abs(got / rank(x[keep]) - 1))
    return worst


def seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def measure(name: str, rounds: int) -> None:
    kind, layers, width, n, length = CASES[name]
    model, batch = made(kind, layers, width), batch_of(n, length)

    def forward() -> None:
        with torch.no_grad():
            model(**batch)

    def probe() -> rgfast.ProbeResult:
        return rgfast.probe(model, [batch], progress=False)

    forward()
    off = error(probe(), model, batch)
    if off > 1e-6:
        sys.exit(f"{name}: effective ranks are off by {off:.1e}")
    times = [(seconds(forward), seconds(probe)) for _ in range(rounds)]
    ratios = sorted(ours / bare for bare, ours in times)
    bare = statistics.median(each for each, _ in times)
    print(
        f"| {name}: {layers} x {width}, {n} x {length} tokens | {statistics.median(ratios):.2f} "
        f"({ratios[0]:.2f} to {ratios[-1]:.2f}) | {bare:.2f} s | {off:.0e} |",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=CASES, help="these models (default: all)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--here", choices=CASES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.here:
        measure(args.here, args.rounds)
        return
    print("| model | probe over forward | forward | error of ranks |\n|---|---|---|---|", flush=True)
    for name in args.only or CASES:
        words = ["--here", name, "--rounds", str(args.rounds), "--threads", str(args.threads)]
        subprocess.run([sys.executable, __file__, *words], check=True)


if __name__ == "__main__":
    main()
