"""One op, one room: the same leaf name in the package, the kernels, the bindings, tests and benchmarks."""

from pathlib import Path

import pytest

from rgfast import bench

ROOT = Path(__file__).resolve().parents[1]
ROOMS = sorted({path.parent.name for path in (ROOT / "rgfast" / "ops").glob("*/*.py")})
SHARED_KERNELS = {"isa", "parallel"}
SHARED_BINDINGS = {"module", "runtime"}


def missing(root: Path, op: str) -> list[str]:
    """What the room ``op`` lacks elsewhere in the tree, as paths."""
    room = root / "rgfast" / "ops" / op
    wanted = []
    if (room / "reference.py").exists() and not list((root / "tests" / "ops" / op).glob("test_*.py")):
        wanted.append(f"tests/ops/{op}/test_*.py")
    if (room / "native.py").exists():
        if not (root / "csrc" / "bind" / f"{op}.cpp").exists():
            wanted.append(f"csrc/bind/{op}.cpp")
        if not list((root / "csrc" / "kernels").glob(f"{op}*.cpp")):
            wanted.append(f"csrc/kernels/{op}*.cpp")
        if not list((root / "tests" / "ops" / op).glob("test_native*.py")):
            wanted.append(f"tests/ops/{op}/test_native*.py")
        for path in (f"rgfast/bench/{op}.py", f"benchmarks/bench_{op}.py"):
            if not (root / path).exists():
                wanted.append(path)
    return wanted


@pytest.mark.parametrize("op", ROOMS)
def test_every_room_is_mirrored(op: str) -> None:
    assert missing(ROOT, op) == []


def test_every_benchmark_of_the_command_is_one_of_pytest() -> None:
    files = {path.stem.removeprefix("bench_") for path in (ROOT / "benchmarks").glob("bench_*.py")}
    assert files == set(bench.ROOMS)


def test_no_kernel_or_binding_stands_without_a_room() -> None:
    native_rooms = {op for op in ROOMS if (ROOT / "rgfast" / "ops" / op / "native.py").exists()}
    bindings = {path.stem for path in (ROOT / "csrc" / "bind").glob("*.cpp")} - SHARED_BINDINGS
    assert bindings == native_rooms
    for path in (ROOT / "csrc" / "kernels").glob("*.cpp"):
        assert path.stem in SHARED_KERNELS or any(path.stem.startswith(op) for op in native_rooms), path.name


def test_a_hole_in_the_mirror_is_seen(tmp_path: Path) -> None:
    room = tmp_path / "rgfast" / "ops" / "spectrum"
    room.mkdir(parents=True)
    assert missing(tmp_path, "spectrum") == []
    (room / "reference.py").touch()
    assert missing(tmp_path, "spectrum") == ["tests/ops/spectrum/test_*.py"]
    (room / "native.py").touch()
    assert "csrc/bind/spectrum.cpp" in missing(tmp_path, "spectrum")
    assert {"rgfast/bench/spectrum.py", "benchmarks/bench_spectrum.py"} <= set(missing(tmp_path, "spectrum"))
