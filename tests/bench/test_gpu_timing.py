"""The benchmark of `make gpu-check`, on the CPU: what is left of it if kernels or time give out."""

import json

import gpu_timing as timing
import pytest

from rgfast import dispatch
from rgfast.bench import suite
from rgfast.bench.timing import Checked, Contest
from rgfast.runtime import measured


class OutOfResources(Exception):
    """As Triton's, which is no RuntimeError."""


@pytest.fixture
def small(monkeypatch):
    """A benchmark of three cases, the last of which is wrong, and of one that raises."""

    def contests(device, size):
        right = Checked("right", 0.0, 1.0)
        for name in ("first", "second"):
            yield Contest(
                name, lambda: 1, lambda x, impl: int, lambda x, impl: right, {"rival": lambda x: int}
            )
        wrong = Checked("it is off", 2.0, 1.0)
        yield Contest("bad", lambda: 1, lambda x, impl: int, lambda x, impl: wrong, {"rival": lambda x: int})

    def broken(device, size):
        def check(x, impl):
            raise OutOfResources("out of resource: shared memory\nand what one can do")

        yield Contest("broken", lambda: 1, lambda x, impl: int, check, {})

    chosen = {"spectrum": contests, "moments": broken}
    for name, module in suite.BENCHMARKS.items():
        monkeypatch.setattr(module, "contests", chosen.get(name, lambda *_: iter(())))


def test_the_benchmark_writes_as_it_goes_and_names_what_is_wrong(small, tmp_path):
    log = timing.Log(tmp_path / "timing.json")
    assert timing.benchmark(log, 2e9, "cpu", 0.001) == timing.DONE
    found = json.loads((tmp_path / "timing.json").read_text())
    assert [row["case"] for row in found["rows"]] == ["first", "second"]
    assert [check["name"] for check in found["gate"]] == ["it is off"]
    assert found["failed"] == {"moments: broken, rivals": "OutOfResources: out of resource: shared memory"}
    assert found["not_run"] == []
    assert not log.green


def test_what_does_not_fit_the_time_is_said(small, tmp_path):
    log = timing.Log(tmp_path / "timing.json")
    assert timing.benchmark(log, 0.0, "cpu", 0.001) == timing.DONE
    assert sorted(log.state["not_run"]) == [
        "moments: broken, rivals",
        *(f"spectrum: {name}, rivals" for name in ("bad", "first", "second")),
    ]
    assert log.state["rows"] == []
    assert log.green


def test_a_process_goes_on_where_one_died(small, tmp_path, monkeypatch):
    path, dead = tmp_path / "timing.json", [True]
    monkeypatch.setattr(timing, "_dead", lambda device: dead[0])
    assert timing.benchmark(timing.Log(path), 2e9, "cpu", 0.001) == timing.AGAIN
    log = timing.Log(path)
    assert log.begin("killed")  # and the process with it
    log = timing.Log(path)
    assert log.state["failed"]["killed"] == "the process died"
    assert not log.begin("killed")
    assert timing.benchmark(log, 2e9, "cpu", 0.001) == timing.DONE
    assert [row["case"] for row in log.state["rows"]] == ["first", "second"]
    assert log.begin("late")
    assert timing.Log(path, stopped=True).state["not_run"] == ["late"]


def test_kernels_are_timed_first_and_then_taken_by_auto(kernel, tmp_path):
    log = timing.Log(tmp_path / "timing.json")
    assert timing.benchmark(log, 2e9, "cpu", 0.001) == timing.AGAIN
    assert log.state["rows"] == []
    assert timing.benchmark(log, 2e9, "cpu", 0.001) == timing.DONE
    assert log.green, log.state
    (row,) = log.state["kernels"]
    assert (row["op"], row["impl"], row["against"], row["architecture"]) == (
        "toy",
        "cuda",
        "library",
        "sm_90",
    )
    assert [each._asdict() for each in measured.saved()] == [row]
    # That `auto` takes it from now on, unless this machine was busier for one than for the other.
    if row["high"] >= 1:
        assert [each["impl"] for each in log.state["rows"]] == ["cuda"]


def test_kernels_of_a_room_are_timed(emulated_gpu, monkeypatch, tmp_path):
    """Eigenvalues by the kernel itself, on this processor, beside the other implementations and the rival."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    emulated_gpu.admit(*(op for op, _ in dispatch.explaining._OPS.values() if op.name == "eigvalsh"))
    (first, *_) = suite.BENCHMARKS["spectrum"].contests("cpu", "tiny")
    for name, module in suite.BENCHMARKS.items():
        monkeypatch.setattr(module, "contests", lambda *_, name=name: [first] if name == "spectrum" else [])
    log = timing.Log(tmp_path / "timing.json")
    for code in (timing.AGAIN, timing.DONE):
        assert timing.benchmark(log, 2e9, "cpu", 0.001, "tiny") == code
    measured._standing.cache_clear()
    assert log.green, log.state
    (row,) = log.state["kernels"]
    assert (row["op"], row["impl"], row["case"]) == ("eigvalsh", "cuda", first.case)
    assert {each["against"] for each in log.state["rows"]} == {"torch.linalg.eigvalsh"}
