"""Kernels are tried on problems with known answers, and a wrong one gives nobody a number."""

import os
import subprocess
import sys
import threading
import warnings
from typing import NamedTuple

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import rgfast
from rgfast import FallbackWarning, ImplUnavailable, dispatch
from rgfast.dispatch import Impl, Op
from rgfast.runtime import cuda, known_answers
from rgfast.runtime.known_answers import KnownAnswer, register, unproven

FILL = "rgfast_fill"
MISTAKES = {
    1: r"off by 1.0e-09, more than 0.0e\+00",
    2: "not a number",
    3: r"off by 1.0e\+00, more than 0.0e\+00",
}


class Call(NamedTuple):
    x: torch.Tensor

    @property
    def device(self):
        return self.x.device

    def shape_class(self):
        return self.x.shape


def fill(call):
    cuda.launch(FILL, (1, 1, 1), 32, 0, call.x, call.x.numel(), 7.0, device=call.device)
    return call.x


@pytest.fixture
def op(filling, monkeypatch):
    """An op with the package's simplest kernel as an implementation, beside two of torch."""
    monkeypatch.setattr(dispatch.op, "_WARNED", set())
    monkeypatch.delenv("RGFAST_STRICT", raising=False)
    kernel = Impl(
        "cuda", fill, lambda call: cuda.refusal(FILL, call.device), devices=("cpu", "cuda"),
        missing=cuda.missing, unproven=lambda call: unproven(call.device, FILL),
    )  # fmt: skip
    return Op(
        "filling",
        [
            kernel,
            Impl("library", lambda call: call.x.fill_(7.0), cost=lambda call: 1.0),
            Impl("reference", lambda call: call.x.fill_(7.0), cost=lambda call: 2.0),
        ],
    )


@pytest.fixture
def answers(monkeypatch):
    """No kernel has a known answer."""
    monkeypatch.setattr(known_answers, "_ANSWERS", {})
    monkeypatch.setattr(known_answers, "_TRIED", {})


def empty():
    return Call(torch.full((5,), torch.nan, dtype=torch.float64))


def launches(filling):
    return len(filling.log("cuLaunchKernelEx"))


def test_a_kernel_with_a_right_answer_is_tried_once_and_taken(filling, op):
    with rgfast.record() as log:
        assert op("auto", empty()).tolist() == [7.0] * 5
    assert [entry.impl for entry in log] == ["cuda"]
    assert launches(filling) == 2
    op("auto", Call(torch.zeros(8, dtype=torch.float64)))
    op("cuda", empty())
    assert launches(filling) == 2


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_planted_mistake_gives_nobody_a_number(filling, op, mistake):
    filling.mistake(mistake)
    why = rf"rgfast_fill gave a wrong answer to a known problem on cpu: {MISTAKES[mistake]}"
    x = empty()
    with pytest.raises(ImplUnavailable, match=why):
        op("cuda", x)
    assert x.x.isnan().all()
    with pytest.warns(FallbackWarning, match=rf"filling: cuda cannot run \({why}\); using library"):
        assert op("auto", x).tolist() == [7.0] * 5
    assert dict(op.candidates(x))[op.impls["library"]] is None
    assert launches(filling) == 1
    filling.mistake(0)  # a kernel that was wrong once is not believed
    with pytest.raises(ImplUnavailable, match=why):
        op("cuda", x)


def test_a_failure_of_the_driver_makes_it_unavailable(filling, op):
    filling.fail("cuLaunchKernelEx", 719)
    with pytest.warns(FallbackWarning, match=r"rgfast_fill failed on cpu: launching rgfast_fill on cuda:0"):
        assert op("auto", empty()).tolist() == [7.0] * 5
    filling.fail("cuLaunchKernelEx", 0)
    with pytest.raises(ImplUnavailable, match="rgfast_fill failed on cpu"):
        op("cuda", empty())


def test_nothing_is_tried_while_a_graph_is_captured(filling, op):
    filling.set(capturing=1)
    why = r"rgfast_fill was not tried yet on cpu, .* captured: call rgfast.warmup\(\) before"
    with pytest.raises(ImplUnavailable, match=why):
        op("cuda", empty())
    with pytest.warns(FallbackWarning, match=why):
        op("auto", empty())
    with pytest.raises(RuntimeError, match="must be called before a CUDA graph is captured"):
        rgfast.warmup("cpu")
    assert launches(filling) == 0
    filling.set(capturing=0)
    assert rgfast.warmup("cpu")[FILL] is None
    filling.set(capturing=1)
    with rgfast.record() as log:
        op("auto", empty())
    assert [entry.impl for entry in log] == ["cuda"]


def test_warming_up_tries_every_kernel_and_warns_of_wrong_ones(filling, op):
    found = rgfast.warmup("cpu")
    assert found[FILL] is None
    assert launches(filling) >= 1
    assert rgfast.warmup("cpu") == found
    assert launches(filling) == 0
    known_answers._TRIED.clear()
    filling.mistake(1)
    with pytest.warns(
        FallbackWarning, match="rgfast_fill gave a wrong answer .*; it is not used there"
    ) as told:
        assert "wrong answer" in rgfast.warmup("cpu")[FILL]
    assert told[0].filename == __file__


def test_warming_up_says_why_kernels_cannot_run(package, monkeypatch):
    package(there=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for device in (None, "cuda", "cuda:1"):
        assert "built without kernels for GPUs" in rgfast.warmup(device)[FILL]
    with pytest.raises(ValueError, match="device must be a CUDA device, got 'meta'"):
        rgfast.warmup("meta")


def test_every_kernel_of_the_package_has_an_answer_and_gives_it(emulated_gpu):
    found = rgfast.warmup(emulated_gpu.device)
    kernels = [name for name in emulated_gpu.kernels() if not name.startswith("rgfast_fault_")]
    assert {name: found[name] for name in kernels} == dict.fromkeys(kernels)


def test_any_number_of_threads_try_it_once(filling, op):
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(unproven(torch.device("cpu"), FILL))) for _ in range(8)
    ]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert found == [None] * 8
    assert launches(filling) == 1


def test_each_device_is_tried(answers):
    tried = []

    def run(device):
        tried.append(device)
        return torch.full((1,), float(device.index))

    register(KnownAnswer(("k",), run, (0.0,)))
    first, second = (torch.device("cpu", k) for k in range(2))
    assert unproven(first, "k") is None
    assert "wrong answer to a known problem on cpu:1" in unproven(second, "k")
    unproven(first, "k")
    assert tried == [first, second]


def test_an_answer_may_go_through_the_implementation_that_asks(answers, here):
    def run(device):
        assert unproven(device, "k") is None
        return torch.ones(2)

    register(KnownAnswer(("k", "l"), run, (1.0, 1.0)))
    assert unproven(here, "l", "k") is None


@pytest.mark.parametrize(
    ("found", "why"),
    [
        (torch.ones(3), "3 numbers instead of 2"),
        (torch.tensor([1.0, torch.nan]), "not a number"),
        (torch.tensor([1.0, 1.2]), "off by 2.0e-01, more than 1.0e-01"),
        (torch.tensor([1.0, torch.inf]), "off by inf"),
    ],
)
def test_what_is_no_answer_is_wrong(answers, here, found, why):
    register(KnownAnswer(("k", "l"), lambda device: found, (1.0, 1.0), 0.1))
    wrong = unproven(here, "k")
    assert wrong.startswith("k with those it goes with gave a wrong answer to a known problem on cpu: ")
    assert why in wrong
    assert not wrong.passing


def test_a_gpu_without_memory_is_no_wrong_answer(answers, here):
    left = [torch.OutOfMemoryError("2 GB are wanted")]

    def run(device):
        if left:
            raise left.pop()
        return torch.ones(1)

    register(KnownAnswer(("k",), run, (1.0,)))
    assert unproven(here, "k").passing
    assert unproven(here, "k") is None


def test_a_kernel_has_one_answer(answers):
    answer = KnownAnswer(("k",), lambda device: torch.ones(1), (1.0,))
    register(answer)
    with pytest.raises(ValueError, match="k has a known answer already"):
        register(answer)


def test_nothing_is_left_in_autograd_and_autocast_does_not_matter(answers, here):
    seen = []

    def run(device):
        seen.append((torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))
        return torch.ones(1)

    register(KnownAnswer(("k",), run, (1.0,)))
    with torch.autocast("cpu"):
        assert unproven(here, "k") is None
    assert seen == [(False, False)]


def test_tensors_without_data_around_it_do_not_matter(filling, here):
    with FakeTensorMode():
        assert unproven(here, FILL) is None
    assert launches(filling) == 1


def test_a_graph_is_traced_with_what_was_found(filling, here):
    def choose(x):
        return x + 1 if unproven(x.device, FILL) is None else x + 2

    traced = torch.compile(choose, backend="eager", fullgraph=True)
    assert traced(torch.zeros(1)).item() == 1
    known_answers._TRIED.clear()
    filling.mistake(1)
    torch._dynamo.reset()
    assert torch.compile(choose, backend="eager", fullgraph=True)(torch.zeros(1)).item() == 2


FORK = """
import os, threading, torch
from rgfast.runtime import known_answers
from rgfast.runtime.known_answers import KnownAnswer, register, unproven

here, tried = torch.device("cpu"), []
register(KnownAnswer(("k",), lambda device: tried.append(device) or torch.ones(1), (1.0,)))
assert unproven(here, "k") is None and len(tried) == 1
begun, done = threading.Event(), threading.Event()

def hold():
    with known_answers._LOCK:
        begun.set()
        done.wait()

thread = threading.Thread(target=hold)
thread.start()
begun.wait()
child = os.fork()
if child == 0:
    os._exit(0 if unproven(here, "k") is None and len(tried) == 2 else 1)
done.set()
thread.join()
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert unproven(here, "k") is None and len(tried) == 1
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_child_tries_anew_and_waits_for_no_thread():
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORK], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr


def test_without_a_kernel_for_gpus_importing_and_warming_up_say_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if not torch.cuda.is_available():
            assert all(rgfast.warmup().values())
