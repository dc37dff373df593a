"""One op, one room: the same leaf name in the package, the kernels, the bindings, tests and benchmarks."""

import ast
import typing
from pathlib import Path

import pytest

from rgfast import bench
from rgfast.dispatch import ImplName

ROOT = Path(__file__).resolve().parents[1]
ROOMS = sorted({path.parent.name for path in (ROOT / "rgfast" / "ops").glob("*/api.py")})
IMPLS = sorted((ROOT / "rgfast" / "ops").glob("*/impl/[!_]*.py"))
SHARED_KERNELS = {"isa", "parallel"}
SHARED_BINDINGS = {"cuda", "module", "runtime"}
BENCHED = ("rgfast/bench/{op}.py", "benchmarks/bench_{op}.py")
# What each implementation is made of, beside its file; what needs a compiler has a benchmark, too.
SOURCES = {
    "library": (),
    "native": ("csrc/bind/{op}.cpp", "csrc/kernels/{op}*.cpp", *BENCHED),
    "mkl": ("csrc/bind/{op}.cpp", "csrc/kernels/{op}_library*.cpp", *BENCHED),
    "triton": BENCHED,
    "cuda": ("csrc/cuda/{op}*.cu", *BENCHED),
}


def missing(root: Path, op: str) -> list[str]:
    """What the room ``op`` lacks elsewhere in the tree, as paths."""
    room = root / "rgfast" / "ops" / op
    wanted = [f"rgfast/ops/{op}/{name}" for name in ("api.py", "call.py", "reference.py", "README.md")]
    wanted.append(f"tests/ops/{op}/test_*.py")
    for impl in sorted(room.glob("impl/[!_]*.py")):
        wanted += [each.format(op=op) for each in SOURCES[impl.stem]]
        if SOURCES[impl.stem]:
            wanted.append(f"tests/ops/{op}/test_{impl.stem}*.py")
    return [each for each in dict.fromkeys(wanted) if not list(root.glob(each))]


def strays(path: Path) -> list[str]:
    """Modules that an implementation imports and must not: other implementations, references."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        found += [
            name
            for name in names
            if name.startswith("rgfast.ops.") and (".impl" in name or "reference" in name.split("."))
        ]
    return found


@pytest.mark.parametrize("op", ROOMS)
def test_every_room_is_mirrored(op: str) -> None:
    assert missing(ROOT, op) == []


@pytest.mark.parametrize("path", IMPLS, ids=lambda path: "-".join(path.parts[-3::2]))
def test_no_implementation_imports_another_or_the_reference(path: Path) -> None:
    assert path.stem in typing.get_args(ImplName)
    assert strays(path) == []


def test_every_benchmark_of_the_command_is_one_of_pytest() -> None:
    files = {path.stem.removeprefix("bench_") for path in (ROOT / "benchmarks").glob("bench_*.py")}
    assert files == set(bench.ROOMS)


def test_no_kernel_or_binding_stands_without_a_room() -> None:
    native_rooms = {path.parts[-3] for path in IMPLS if path.stem == "native"}
    bindings = {path.stem for path in (ROOT / "csrc" / "bind").glob("*.cpp")} - SHARED_BINDINGS
    assert bindings == native_rooms
    for path in (ROOT / "csrc" / "kernels").glob("*.cpp"):
        assert path.stem in SHARED_KERNELS or any(path.stem.startswith(op) for op in native_rooms), path.name


def test_only_the_rooms_know_which_implementation_runs() -> None:
    """Other packages ask ``rgfast.ops.fast`` or the ops, not the compiled module, a device or a name."""
    for path in (ROOT / "rgfast").rglob("*.py"):
        inside = path.relative_to(ROOT / "rgfast").parts[0]
        if inside in ("ops", "runtime"):
            continue
        text = path.read_text(encoding="utf-8")
        for word in ("unavailable_reason", ".is_cpu", '.name == "native"', 'impl == "native"'):
            assert word not in text, f"{path}: {word}"


def test_a_hole_in_the_mirror_is_seen(tmp_path: Path) -> None:
    room = tmp_path / "rgfast" / "ops" / "spectrum"
    (room / "impl").mkdir(parents=True)
    for name in ("api", "call", "reference", "impl/__init__"):
        (room / f"{name}.py").touch()
    assert missing(tmp_path, "spectrum") == ["rgfast/ops/spectrum/README.md", "tests/ops/spectrum/test_*.py"]
    (room / "impl" / "native.py").touch()
    assert "csrc/bind/spectrum.cpp" in missing(tmp_path, "spectrum")
    assert "csrc/kernels/spectrum*.cpp" in missing(tmp_path, "spectrum")
    assert {"rgfast/bench/spectrum.py", "benchmarks/bench_spectrum.py"} <= set(missing(tmp_path, "spectrum"))
    assert "tests/ops/spectrum/test_native*.py" in missing(tmp_path, "spectrum")


@pytest.mark.parametrize(
    "line",
    [
        "from rgfast.ops.cka import reference",
        "from rgfast.ops.cka.reference import drift",
        "import rgfast.ops.cka.reference",
        "from rgfast.ops.cka.impl import library",
        "from rgfast.ops.cka.impl.library import run",
    ],
)
def test_a_stray_import_is_seen(line: str, tmp_path: Path) -> None:
    path = tmp_path / "native.py"
    path.write_text(f"import torch\nfrom rgfast.ops.cka.call import Call\n{line}\n", encoding="utf-8")
    assert strays(path)
