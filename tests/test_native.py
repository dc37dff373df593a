"""The compiled module itself: choosing an instruction set, the thread pool, forking, and doing without it."""

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from rgfast.runtime import native

ROOT = Path(__file__).resolve().parents[1]


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {key: value for key, value in os.environ.items() if key != "RGFAST_ISA"} | environment
    return subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120, check=False
    )


def tool(name: str) -> str:
    path = shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    assert path is not None, f"{name} is in the dev extra"
    return path


def test_the_module_is_built() -> None:
    assert native.unavailable_reason() is None
    assert native.active_isa() in native.available_isas()
    assert set(native.available_isas()) <= set(native.compiled_isas())
    assert native.available_isas()[0] == "baseline"


@pytest.mark.parametrize("isa", native.available_isas() or ("the module is not built",))
def test_every_isa_can_be_forced_from_python_and_from_the_environment(isa: str) -> None:
    before = native.active_isa()
    with native.use_isa(isa):
        assert native.active_isa() == isa
    assert native.active_isa() == before
    done = run_python("from rgfast.runtime import native; print(native.active_isa())", RGFAST_ISA=isa)
    assert done.stdout.strip() == isa, done.stderr


def test_use_isa_nests_and_is_undone_by_an_exception() -> None:
    before = native.active_isa()

    def fail() -> None:
        with native.use_isa("baseline"):
            with native.use_isa(native.available_isas()[-1]):
                pass
            assert native.active_isa() == "baseline"
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert native.active_isa() == before


def test_an_isa_that_cannot_run_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"isa must be one of .*baseline.*got 'sse9'"):
        native.load().set_isa("sse9")
    done = run_python("from rgfast.runtime import native; native.load()", RGFAST_ISA="sse9")
    assert done.returncode != 0
    assert "RGFAST_ISA must be one of" in done.stderr
    assert "got 'sse9'" in done.stderr


def test_the_pool_computes_the_same_on_any_number_of_threads() -> None:
    want = [i * i for i in range(1000)]
    for threads in (1, 2, 3, 16):
        for lengthy in (False, True):
            assert native.load().pool_squares(1000, threads, lengthy=lengthy) == want
    assert native.load().pool_squares(0, 4) == []


def test_the_pool_refuses_no_threads() -> None:
    with pytest.raises(ValueError, match="threads must be at least 1, got 0"):
        native.load().pool_squares(3, 0)


@pytest.mark.parametrize("lengthy", [False, True])
@pytest.mark.parametrize("threads", [1, 4])
def test_an_exception_of_a_task_arrives_and_the_pool_survives(threads: int, lengthy: bool) -> None:
    module = native.load()
    with pytest.raises(RuntimeError, match="task 7 failed"):
        module.pool_squares(50, threads, fail_at=7, lengthy=lengthy)
    assert module.pool_squares(5, threads) == [0, 1, 4, 9, 16]


def test_several_python_threads_may_call_at_once() -> None:
    module = native.load()
    want = [i * i for i in range(500)]
    results: list[bool] = []

    def call() -> None:
        results.extend(module.pool_squares(500, 4, lengthy=round % 2 == 1) == want for round in range(20))

    callers = [threading.Thread(target=call) for _ in range(6)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert results == [True] * 120


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_child_uses_the_pool_and_everybody_exits() -> None:
    code = """
import os
import warnings

warnings.simplefilter("ignore")  # Python warns of fork beside threads, which is what this is about
import torch
from rgfast.runtime import native

module = native.load()
want = [i * i for i in range(100)]
torch.set_num_threads(4)
torch.ones(300, 300) @ torch.ones(300, 300)  # OpenMP now has threads that a child lacks
for _ in range(3):
    child = os.fork()
    if child == 0:
        good = module.pool_squares(100, 4, lengthy=True) == want and module.pool_squares(100, 4) == want
        grandchild = os.fork()
        if grandchild == 0:
            os._exit(0 if module.pool_squares(100, 2) == want else 1)
        good = good and os.waitstatus_to_exitcode(os.waitpid(grandchild, 0)[1]) == 0
        os._exit(0 if good else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert module.pool_squares(100, 4, lengthy=True) == want and module.pool_squares(100, 4) == want
print("done")
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "done"


def test_a_tensor_is_passed_without_a_copy() -> None:
    x = torch.zeros(3, 4, dtype=torch.bfloat16).T
    assert native.tensor(x) == (x.data_ptr(), (4, 3), (1, 4), 2)
    assert native.threads() == torch.get_num_threads()


def test_without_the_module_the_package_imports_and_says_why() -> None:
    code = """
import sys

sys.modules["rgfast._native"] = None
import rgfast
from rgfast.runtime import native

assert "rgfast._native" in native.unavailable_reason()
assert native.active_isa() is None
assert native.available_isas() == () == native.compiled_isas()
try:
    native.load()
except rgfast.ImplUnavailable as error:
    assert "not importable" in str(error)
else:
    raise SystemExit("loaded a blocked module")
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not (ROOT / "CMakeLists.txt").exists(), reason="runs in a source tree")
def test_a_machine_without_a_compiler_configures_without_the_module(tmp_path: Path) -> None:
    empty = tmp_path / "bin"
    empty.mkdir()
    command = [tool("cmake"), "-S", str(ROOT), "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}"]
    env = {"PATH": str(empty), "CXX": str(empty / "no-compiler")}

    def configure(folder: str, *options: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, "-B", str(tmp_path / folder), *options],
            env=env,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    left_out = configure("optional")
    assert left_out.returncode == 0, left_out.stderr
    assert "there is no C++ compiler" in left_out.stderr
    refused = configure("required", "-DRGFAST_REQUIRE_NATIVE=ON")
    assert refused.returncode != 0
    assert "cannot be built" in refused.stderr
