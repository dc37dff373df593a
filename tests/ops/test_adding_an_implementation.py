"""The worked example of CONTRIBUTING, "Adding an implementation": a file and its line in the room's `Op`.

The file is `added_mkl.py` beside this one. It is added in this process and, as a contributor would do it,
in a copy of the package.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import added_mkl
import pytest
import torch

import rgfast
from rgfast.dispatch import ImplUnavailable, implementations, walk
from rgfast.ops.moments import add_products
from rgfast.ops.moments.api import OP
from rgfast.ops.moments.call import Products

ROOT = Path(__file__).resolve().parents[2]
F64 = torch.float64

# What a contributor edits: the room's list. What a choice depends on is in `shape_class` already.
EDITS = {
    "rgfast/ops/moments/api.py": {
        "moments.impl import cuda, library, native\n": "moments.impl import cuda, library, mkl, native\n",
        "        native.MOMENTS,\n": "        native.MOMENTS,\n        mkl.MOMENTS,\n",
    },
}
IN_THE_COPY = """
import sys
from importlib.machinery import PathFinder
sys.meta_path.insert(0, PathFinder)  # an editable install finds its own package before PYTHONPATH is asked
import torch, rgfast
from rgfast.ops.moments import add_products
from rgfast.bench import moments as bench
from rgfast.dispatch import implementations

print(rgfast.__file__)
print(implementations("moments", "cpu"))
case = bench.Case(3, 2, 20, 4, "all")
print(bench.check(case, case.data(), "mkl").good)
for rows, width in ((20, 4), (300, 200)):
    case = bench.Case(3, 4, rows, width, "all")
    print(rgfast.explain(add_products, case.sums(), *case.data()).chosen)
"""


@pytest.fixture
def added(monkeypatch):
    monkeypatch.setattr(OP, "impls", {"mkl": added_mkl.MOMENTS, **OP.impls})
    monkeypatch.setattr(OP, "_chosen", {})
    monkeypatch.setattr(
        Products,
        "shape_class",
        lambda call: (call.device.type, *(x.shape[2] for x in call.rows), call.multiplications()),
    )


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator("cpu").manual_seed(seed), dtype=F64, device="cpu")


def arguments(*widths, positions=2, b=9):
    """Sums of every pair, zeros, with rows and shifts of layers so wide."""
    rows = [drawn(positions, b, d, seed=k) + 3.0 for k, d in enumerate(widths)]
    pairs = [(i, j) for j in range(len(widths)) for i in range(j + 1)]
    sums = {
        (i, j): torch.zeros(positions, widths[i] + 2, widths[j] + 2, dtype=F64, device="cpu")
        for i, j in pairs
    }
    return sums, rows, [x.mean(1) for x in rows]


def chosen(*args):
    with rgfast.record() as log:
        add_products(*args)
    return [entry.impl for entry in log]


@pytest.mark.parametrize("d", [1, 2, 3, 16, 17])
def test_its_values(added, d):
    sums, rows, shifts = arguments(d, d)
    keep = torch.ones(2, 9, dtype=torch.bool, device="cpu")
    keep[0, 3:5] = keep[1] = False
    rows[1][0, 4] = torch.nan
    with rgfast.record() as log:
        add_products(sums, rows, shifts, keep=keep, exponents=[1, -2], impl="mkl")
    assert [(entry.op, entry.impl) for entry in log] == [("moments", "mkl")]
    sides = []
    for x, shift, exponent in zip(rows, shifts, (1, -2), strict=True):
        y = (x[0] - shift[0])[keep[0]] * 2.0**-exponent
        sides.append(torch.cat([y, y.square().sum(1, keepdim=True), torch.ones_like(y[:, :1])], 1))
    for (i, j), total in sums.items():
        size = sides[i].abs().T @ sides[j].abs()
        assert ((total[0] - sides[i].T @ sides[j]).abs() <= 32 * 2.0**-52 * size).all()
        assert (total[1] == 0).all()


def test_auto_takes_it_while_it_costs_least(added):
    small, large = arguments(4, 4), arguments(100, 100, positions=4, b=300)
    assert chosen(*small) == chosen(*small) == ["mkl"]
    assert chosen(*large) == [_usual()]
    assert chosen(*arguments(4, 5)) == [_usual()]


def test_by_its_name_it_runs_or_says_why_not(added):
    large = arguments(100, 100, positions=4, b=300)
    with rgfast.record() as log:
        add_products(*large, impl="mkl")
    assert [entry.impl for entry in log] == ["mkl"]
    sums, rows, shifts = arguments(4, 5)
    refused = r"moments: impl='mkl' cannot run this input: layers must be equally wide, got widths \[4, 5\]"
    with pytest.raises(ImplUnavailable, match=refused):
        add_products(sums, rows, shifts, impl="mkl")
    assert all((total == 0).all() for total in sums.values())


def test_it_is_explained_and_listed(added):
    explained = rgfast.explain(add_products, *arguments(4, 4))
    assert explained.candidates[0] == ("mkl", None)
    assert explained.chosen == "mkl"
    assert explained.costs[0] < min(explained.costs[1:])
    assert "mkl        chosen" in str(explained)
    refused = rgfast.explain("moments", *arguments(4, 5))
    assert "mkl        no: layers must be equally wide, got widths [4, 5]" in str(refused)
    assert "mkl" in implementations("moments", "cpu")
    assert "mkl" not in implementations("moments", "cuda")


def test_a_probe_takes_it_too(added):
    torch.manual_seed(5)
    stack, x = rgfast.ResidualStack(6, 3, mixing="none"), drawn(80, 4, 6).float()
    options = {"route": "moments", "views": ["position"], "progress": False}
    with rgfast.record() as log:
        found = rgfast.probe(stack, x, **options)
    assert "mkl" in {entry.impl for entry in walk(log) if entry.op == "moments"}
    OP.impls.pop("mkl")
    OP._chosen.clear()
    with rgfast.record() as log:
        want = rgfast.probe(stack, x, **options)
    assert "mkl" not in {entry.impl for entry in walk(log)}
    for name in found.measures:
        torch.testing.assert_close(
            torch.from_numpy(found.variable(name, "position").values),
            torch.from_numpy(want.variable(name, "position").values),
            rtol=1e-9,
            atol=1e-12,
            equal_nan=True,
        )


def test_a_contributor_touches_two_files(tmp_path):
    shutil.copytree(ROOT / "rgfast", tmp_path / "rgfast", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(added_mkl.__file__, tmp_path / "rgfast/ops/moments/impl/mkl.py")
    for name, edits in EDITS.items():
        text = (tmp_path / name).read_text(encoding="utf-8")
        for before, after in edits.items():
            assert text.count(before) == 1, f"{name}: {before}"
            text = text.replace(before, after)
        (tmp_path / name).write_text(text, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-c", IN_THE_COPY],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    where, names, good, small, large = done.stdout.splitlines()
    assert Path(where) == tmp_path / "rgfast/__init__.py"
    assert names == str(("native", "mkl", "library", "reference"))
    assert (good, small, large) == ("True", "mkl", _usual())


def _usual():
    return "reference" if OP.impls["native"].missing() else "native"
