"""What `rgfast.plan` foresees beside what a probe then takes: the cases that the constants are fitted to.

    python benchmarks/plan_cost.py [--only WORD ...] [--rounds 3]

The share is the whole probe's time over the model's own forward of the same batches, taking turns; "off" is
measured over foreseen. Hugging Face models have random weights, and need transformers.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch

import rgfast
from rgfast.bench.probe import SHAPES, Case
from rgfast.probing.capture.batches import iterate

N = 1024
HUGGING_FACE = {"gpt2": (6, 384, 96, 64), "llama": (8, 512, 64, 80), "bert": (4, 256, 512, 48)}


def cases() -> Iterator[tuple[str, Any, Any, dict[str, Any]]]:
    """Name, model, batches and options."""
    for shape in SHAPES:
        at = "{}, {}, {}".format(*shape)
        foreign = Case.make("foreign", *shape, N, "cpu")
        yield f"plain, default, ({at})", foreign.model, foreign.x, {}
        loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(foreign.x), batch_size=64)
        yield f"plain, loader of 64, ({at})", foreign.model, loader, {}
        own = Case.make("none", *shape, N, "cpu")
        yield f"own, default, ({at})", own.model, own.x, {}
        options: dict[str, Any] = {"views": ["position"], "pairs": "all"}
        yield f"own, position view, all pairs, ({at})", own.model, own.x, options
        yield f"own, groups=8, ({at})", own.model, own.x, {**options, "groups": 8}
        yield f"own, all views, all pairs, ({at})", own.model, own.x, {"pairs": "all"}
    if importlib.util.find_spec("transformers"):
        for kind, (depth, width, n, length) in HUGGING_FACE.items():
            model, vocabulary = hugging_face(kind, depth, width, length)
            tokens = torch.randint(0, vocabulary, (n, length), generator=torch.Generator().manual_seed(0))
            mask = torch.ones_like(tokens)
            mask[n // 2 :, 3 * length // 4 :] = 0
            batch = {"input_ids": tokens, "attention_mask": mask}
            yield f"{kind}, default, {depth} x {width}, {n} x {length}", model, batch, {}


def hugging_face(kind: str, depth: int, width: int, length: int) -> tuple[Any, int]:
    import transformers

    torch.manual_seed(0)
    heads, vocabulary = width // 64, 1000
    if kind == "gpt2":
        config = transformers.GPT2Config(
            n_layer=depth, n_embd=width, n_head=heads, vocab_size=vocabulary, n_positions=length
        )
        return transformers.GPT2Model(config).eval(), vocabulary
    options = {
        "num_hidden_layers": depth,
        "hidden_size": width,
        "num_attention_heads": heads,
        "intermediate_size": 4 * width,
        "vocab_size": vocabulary,
        "max_position_embeddings": length,
    }
    if kind == "llama":
        return transformers.LlamaModel(transformers.LlamaConfig(**options)).eval(), vocabulary
    return transformers.BertModel(transformers.BertConfig(**options)).eval(), vocabulary


def forward(model: Any, batches: Any) -> None:
    with torch.no_grad():
        for batch in iterate(batches, 256):
            if isinstance(batch, dict):
                model(**batch)
            else:
                model(*batch) if isinstance(batch, (list, tuple)) else model(batch)


def timed(run: Any) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="*", default=[""], help="cases with one of these words in their name")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    print("| case | estimator | route taken | foreseen | measured | off |\n|---|---|---|---|---|---|")
    for name, model, batches, options in cases():
        if not any(word in name for word in args.only):
            continue
        found = rgfast.plan(model, batches, **options)
        bare, whole, result = [], [], None
        for turn in range(args.rounds + 1):  # the first one warms up
            own = timed(lambda model=model, batches=batches: forward(model, batches))
            start = time.perf_counter()
            result = rgfast.probe(model, batches, progress=False, **options)
            if turn or args.rounds == 1:
                bare.append(own)
                whole.append(time.perf_counter() - start)
        assert result is not None
        share = statistics.median(whole) / statistics.median(bare)
        route = result.dataset.attrs["route"]
        assert route == found.route, f"{name}: foreseen was {found.route}, taken {route}"
        assert found.share is not None
        off = share / found.share
        print(
            f"| {name} | {found.estimator} | {route} | {found.share:.2f} | {share:.2f} | {off:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
