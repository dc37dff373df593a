"""Compare two source trees by `rgfast bench --quick` in turns: `compare_checkouts.py OLD NEW [--rounds N]`.

Every round runs OLD, then NEW, each in a fresh process with its own interpreter (by default the tree's
`.venv/bin/python`, or else this one). Per case it prints the median over rounds of the ratio of our times,
NEW over OLD in the same round (above 1, NEW is slower), the ratio's range, and at the end the geometric mean
over cases. Rivals are not compared. Timings never change the exit code; a wrong value of either tree does.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

RUN = """
import sys
from pathlib import Path
import rgfast
home, tree = Path(rgfast.__file__).resolve().parents[1], Path(sys.argv.pop(1))
if home != tree:
    sys.exit(f"{sys.executable} imports rgfast from {home}, not from {tree}")
from rgfast.cli import main
sys.exit(main())
"""


def measured(tree: Path, python: str, words: list[str]) -> tuple[str | None, dict[str, float]]:
    """The instruction set of the compiled kernels, and our seconds in each case by its name."""
    with tempfile.TemporaryDirectory() as folder:
        command = [python, "-c", RUN, str(tree), "bench", "--quick", *words, "--json", "--out", folder]
        environment = os.environ | {"PYTHONPATH": str(tree)}
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{tree} failed:\n{done.stderr}")
    report = json.loads(done.stdout)
    spent = {
        f"{row['benchmark']}: {row['case']} on {row['device']}": row["seconds"] for row in report["rows"]
    }
    return report["machine"]["native"]["active"], spent


def table(old: list[dict[str, float]], new: list[dict[str, float]]) -> str:
    """A line per case that both trees have, and the geometric mean of the medians."""
    lines = ["| case | old, ms | new, ms | new / old | range |", "|---|---|---|---|---|"]
    medians = {}
    common = [case for case in old[0] if case in new[0]]
    if not common:
        sys.exit("the two trees have no case in common")
    for case in common:
        ratios = [after[case] / before[case] for before, after in zip(old, new, strict=True)]
        medians[case] = statistics.median(ratios)
        before, after = (1e3 * statistics.median(run[case] for run in runs) for runs in (old, new))
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        lines.append(f"| {case} | {before:.3g} | {after:.3g} | {medians[case]:.3f} | {spread} |")
    lines += [
        "",
        f"geometric mean {statistics.geometric_mean(medians.values()):.3f} over {len(medians)} cases",
    ]
    slower = [case for case, ratio in medians.items() if ratio > 1.1]
    lines.append(f"slower by more than 10%: {'; '.join(slower) or 'none'}")
    for name, mine, other in (("OLD", old[0], new[0]), ("NEW", new[0], old[0])):
        if alone := [case for case in mine if case not in other]:
            lines.append(f"only in {name}, not compared: {'; '.join(alone)}")
    return "\n".join(lines)


def interpreter(tree: Path) -> str:
    own = tree / ".venv" / "bin" / "python"
    return str(own) if own.exists() else sys.executable


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("old", type=Path, metavar="OLD")
    parser.add_argument("new", type=Path, metavar="NEW")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--python-old", metavar="PYTHON")
    parser.add_argument("--python-new", metavar="PYTHON")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="benchmarks (default: all)")
    parser.add_argument("--seconds", type=float, default=0.5, help="time for each case, rivals included")
    parser.add_argument("--threads", type=int, help="default: torch's own number")
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {args.rounds}")
    words = ["--seconds", str(args.seconds)]
    words += ["--only", *args.only] if args.only else []
    words += ["--threads", str(args.threads)] if args.threads else []
    trees = [(args.old.resolve(), args.python_old), (args.new.resolve(), args.python_new)]
    runs: tuple[list[dict[str, float]], list[dict[str, float]]] = ([], [])
    for number in range(args.rounds):
        kernels = []
        for (tree, python), kept in zip(trees, runs, strict=True):
            isa, spent = measured(tree, python or interpreter(tree), words)
            kernels.append(isa)
            kept.append(spent)
        if kernels[0] != kernels[1]:
            sys.exit(f"compiled kernels: OLD runs {kernels[0]}, NEW {kernels[1]}, which cannot be compared")
        print(f"round {number + 1} of {args.rounds} done", file=sys.stderr, flush=True)
    print(table(*runs))


if __name__ == "__main__":
    main()
