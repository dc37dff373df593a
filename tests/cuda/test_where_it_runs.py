"""On which stream, device and process kernels run, and when those of a probe are tried."""

import os
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import rgfast
from rgfast.runtime import known_answers, measured
from rgfast.runtime.known_answers import KnownAnswer, prepare, register, unproven

FILL = "rgfast_fill"
FIRST, SECOND = (torch.device("cuda", k) for k in range(2))


@pytest.fixture
def two(fake, package, monkeypatch):
    """The package on two GPUs, the second of which is torch's current one, each with a stream of its own."""
    fake.kernel(FILL, 3)
    fake.set(devices=2)
    streams = {0: 70, 1: 71}
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", streams.__getitem__, raising=False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    return package()


def launched(fake):
    return [(each["context"], each["stream"]) for each in fake.log("cuLaunchKernelEx")]


def test_a_kernel_is_queued_on_torchs_current_stream_of_its_device(fake, two):
    for device in (FIRST, SECOND, torch.device("cuda")):
        two.launch(FILL, (1, 1, 1), 32, 0, 0, 1, 1.0, device=device)
    assert launched(fake) == [(0, 70), (1, 71), (1, 71)]
    two.capturing(FIRST)
    (asked,) = fake.log("cuStreamIsCapturing")
    assert (asked["context"], asked["stream"]) == (0, 70)


def test_a_tensor_on_another_gpu_is_refused(fake, two):
    with FakeTensorMode():
        x = torch.empty(3, device="cuda:0")
    for device in (SECOND, torch.device("cuda")):
        with pytest.raises(ValueError, match=rf"must be on {device}, got a tensor on cuda:0"):
            two.launch(FILL, (1, 1, 1), 32, 0, x, 1, 1.0, device=device)
    assert launched(fake) == []


def test_what_a_kernel_was_granted_on_one_gpu_is_asked_for_on_the_other(fake, two):
    for _ in range(2):
        for device in (FIRST, SECOND):
            two.launch(FILL, (2, 1, 1), 32, 100_000, 0, 1, 1.0, device=device, cluster=2)
    once = ("cuFuncSetAttribute", "cuKernelGetFunction", "cuOccupancyMaxActiveClusters")
    log = fake.log(*once)
    asked = sorted((each["call"], each["context"]) for each in log)
    assert asked == [(name, context) for name in once for context in (0, 1)]


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_after_a_fork_the_child_has_the_reason_and_the_parent_goes_on(fake, two):
    two.launch(FILL, (1, 1, 1), 32, 0, 0, 1, 1.0, device=FIRST)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            absent = two.facts()["absent"]
            reasons = (two.missing(), two.device_refusal(FIRST), two.refusal(FILL, SECOND), absent)
            forked = "forked from one that had opened the CUDA driver"
            code = 0 if all(forked in str(reason) for reason in reasons) else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert two.missing() is None


@pytest.fixture
def answers(monkeypatch):
    """No kernel has a known answer, and none was tried."""
    monkeypatch.setattr(known_answers, "_ANSWERS", {})
    monkeypatch.setattr(known_answers, "_TRIED", {})


def test_an_answer_is_computed_and_read_on_a_stream_of_its_own(answers, monkeypatch):
    """What is read there waits for nothing that the user has queued, and nobody else sees its memory."""
    now = ["the user's"]

    @contextmanager
    def on(stream):
        before, now[0] = now[0], stream
        yield
        now[0] = before

    class Found:
        """A result that notes where it is read."""

        def detach(self):
            return self

        def to(self, *_):
            read.append(now[0])
            return torch.ones(1, dtype=torch.float64)

    read = []
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: f"one of {device}")
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(known_answers, "_capturing", lambda device: False)
    register(KnownAnswer(("k",), lambda device: read.append(now[0]) or Found(), (1.0,)))
    assert unproven(SECOND, "k") is None
    assert read == ["one of cuda:1"] * 2
    assert now == ["the user's"]


@pytest.fixture
def tried(answers, package, monkeypatch, tmp_path):
    """Kernels that note when they are tried; the CPU stands for a GPU on which some op was measured."""
    package()
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    measured._standing.cache_clear()
    row = measured.Measured("eigvalsh", "cuda", "sm_90", "", "", "", *[1.0] * 5, rgfast.__version__, "")
    measured.save([row])
    found = []

    def answer(name):
        return KnownAnswer(
            (name,), lambda device: found.append(name) or torch.ones(1), (1.0,), refusal=lambda device: None
        )

    register(*(answer(f"rgfast_{room}_toy") for room in ("moments", "spectrum", "cka", "similarity")))
    yield found
    measured._standing.cache_clear()


def test_a_probe_tries_its_kernels_before_its_first_forward(tried):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model.register_forward_pre_hook(lambda *_: tried.append("forward"))
    for _ in range(2):
        with rgfast.Probe(model, layers=["0", "1"], progress=False) as probe:
            probe.run(torch.randn(5, 4))
    assert tried == ["rgfast_moments_toy", "rgfast_spectrum_toy", "rgfast_cka_toy", "forward", "forward"]


def test_kernels_are_prepared_only_where_some_may_be_taken(fake, tried, here):
    prepare([torch.device("meta")], ["moments"])
    fake.set(minor=3)  # an architecture without a row
    prepare([here], ["moments"])
    fake.set(minor=0, capturing=1)
    prepare([here], ["moments"])
    assert tried == []
    fake.set(capturing=0)
    prepare([here, here], ["moments"])
    assert tried == ["rgfast_moments_toy"]


def test_an_answer_that_cannot_be_tried_is_not_prepared(tried, here):
    register(KnownAnswer(("rgfast_moments_wide",), lambda device: pytest.fail("it ran"), (1.0,)))
    prepare([here], ["moments"])  # the driver knows no such kernel
    assert tried == ["rgfast_moments_toy"]
    assert known_answers.registered()[-1].room == "moments"
