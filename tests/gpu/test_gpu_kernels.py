"""The package's kernels on a GPU: known answers, the same bits, threads, streams, graphs, every room by name.

On the CPU a few of them run, behind the library that stands for CUDA's driver.
"""

import math
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch

import rgfast
from rgfast import dispatch
from rgfast.bench import suite
from rgfast.bench.saving import kernels_of
from rgfast.dispatch import HandOff, ImplUnavailable
from rgfast.runtime import cuda, known_answers, measured

ANSWERS = {answer.kernels[0]: answer for answer in known_answers.registered()}
# The kernels of every room that has any.
ROOMS = {
    name: {kernel for contest in room.contests("cuda", "tiny") for kernel in kernels_of(contest, "cuda")}
    for name, room in suite.BENCHMARKS.items()
}
ROOMS = {name: kernels for name, kernels in ROOMS.items() if kernels}
# Of the package's file of kernels; others are Triton's, whose answers are compared on the host.
OURS = [name for name in ANSWERS if name.startswith("rgfast_")]
# For the CPU the first kernel of each room, and this many cases; tests/cuda and tests/ops have all of them.
FEW, CASES = {ANSWERS[name].room: name for name in reversed(OURS)}.values(), 3


class Gpu:
    """The current GPU, or a library that runs kernels on the CPU in its place."""

    device = torch.device("cuda", 0)

    def admit(self, *ops):
        """Let kernels of these ops run."""

    @contextmanager
    def beside(self):
        """On a stream of its own, beside one that has much to do; its end waits for what was queued."""
        torch.cuda._sleep(50_000_000)
        side = torch.cuda.Stream(self.device)
        with torch.cuda.stream(side):
            yield
        side.synchronize()

    def replayed(self, run):
        """What ``run`` returns when it is captured in a graph that then runs twice."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = run()
        for _ in range(2):
            found.zero_()
            graph.replay()
        return found


class Cpu:
    def __init__(self, emulated_gpu):
        self.device, self.admit = emulated_gpu.device, emulated_gpu.admit

    @contextmanager
    def beside(self):
        yield

    def replayed(self, run):
        return run()


@pytest.fixture
def place(request):
    if request.param == "cpu":
        return Cpu(request.getfixturevalue("emulated_gpu"))
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU that torch finds")
    return Gpu()


def answer_of(kernel, place):
    """The known answer of a kernel, unless this machine has not what it takes."""
    answer = ANSWERS[kernel]
    reason = answer.cannot_run(place.device)
    absent = cuda.device_refusal(place.device) if kernel in OURS else reason
    if absent is not None:
        pytest.skip(absent)
    assert reason is None
    return answer


def on_both(name, here, there):
    """Each of ``here`` on the CPU, each of ``there`` on a GPU."""
    cases = [pytest.param("cpu", each, id=f"cpu-{each}") for each in here]
    cases += [pytest.param("cuda", each, id=f"cuda-{each}", marks=pytest.mark.gpu) for each in there]
    return pytest.mark.parametrize(("place", name), cases, indirect=["place"])


def bits(x):
    return x.double().view(torch.int64).cpu()


@on_both("kernel", FEW, ANSWERS)
def test_the_answer_is_right(place, kernel):
    answer = answer_of(kernel, place)
    assert known_answers.unproven(place.device, *answer.kernels) is None


@on_both("kernel", FEW, ANSWERS)
def test_the_same_bits_run_after_run(place, kernel):
    answer = answer_of(kernel, place)
    first = answer.run(place.device)
    kept = [torch.full((1 << 16,), torch.nan, device=place.device) for _ in range(3)]  # others lie elsewhere
    again = answer.run(place.device)
    assert len(kept) == 3
    assert torch.equal(bits(first), bits(again))


@on_both("kernel", FEW, ANSWERS)
def test_the_same_bits_in_another_thread_on_a_stream_beside_a_busy_one(place, kernel):
    answer = answer_of(kernel, place)
    want = answer.run(place.device)

    def run():
        with place.beside():
            return answer.run(place.device)

    with ThreadPoolExecutor(1) as thread:
        assert torch.equal(bits(thread.submit(run).result()), bits(want))


@on_both("kernel", FEW, OURS)
def test_a_graph_gives_the_same_bits(place, kernel):
    answer = answer_of(kernel, place)
    if isinstance(place, Gpu) and answer.room == "cka":  # an implementation asks before it makes its table
        pytest.skip("a graph would read the kernels' table where it was on the host, when it is replayed")
    want = answer.run(place.device)
    try:
        found = place.replayed(lambda: answer.run(place.device))
    except HandOff as refused:  # an implementation may leave graphs to another one
        pytest.skip(str(refused))
    assert torch.equal(bits(found), bits(want))


@on_both("impl", ["reference"], ["triton"])
def test_a_graph_of_the_block_gives_the_same_bits(place, impl):
    drawn = torch.Generator().manual_seed(0)
    shapes = [(70, 64), (256, 64), (256,), (64, 256), (64,)]
    tensors = [(torch.randn(shape, generator=drawn) / 8).to(place.device) for shape in shapes]

    def run():
        return rgfast.residual_mlp(*tensors, impl=impl)

    try:
        want = run()
    except ImplUnavailable as refused:
        pytest.skip(str(refused))
    assert torch.equal(bits(place.replayed(run)), bits(want))


@on_both("room", [room for room, kernels in ROOMS.items() if "cuda" in kernels], ROOMS)
def test_every_case_by_name_against_the_truth(place, room):
    ran, refused = 0, []
    most = CASES if place.device.type == "cpu" else math.inf
    for contest in suite.BENCHMARKS[room].contests(place.device.type, "tiny"):
        if ran >= most:
            break
        for impl in kernels_of(contest, "cuda"):
            place.admit(dispatch.explaining._OPS[contest.op][0])
            data = contest.data()
            try:
                with suite.quiet("cuda"):
                    check = contest.check(data, impl)
                    first, again = (contest.ours(data, impl)() for _ in range(2))
            except ImplUnavailable as error:
                refused.append(str(error))
                continue
            assert check.good, f"{contest.case} by {impl}: {check}"
            if isinstance(first, torch.Tensor):
                assert torch.equal(bits(first), bits(again)), f"{contest.case} by {impl}"
            ran += 1
    assert ran, refused


@pytest.fixture
def rows(monkeypatch, tmp_path):
    """Puts rows of every kernel on the device's architecture into a user's table."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))

    def put(device):
        here = measured.architecture(device)
        measured.save(
            measured.Measured(op, impl, here, "", "", "", *[1.0] * 5, rgfast.__version__, "")
            for op in dispatch.registered()
            for impl in ("cuda", "triton")
        )

    yield put
    measured._standing.cache_clear()
    for op, _ in dispatch.explaining._OPS.values():
        op._chosen.clear()


@on_both("width", [7], [7, 40, 160])
def test_a_probe_that_may_take_kernels_gives_what_it_gives_without(place, width, rows, monkeypatch):
    if isinstance(place, Cpu):  # where the large ones take long
        monkeypatch.setattr(known_answers, "registered", lambda: [ANSWERS[kernel] for kernel in FEW])
    torch.manual_seed(3)
    model = torch.nn.Sequential(*(torch.nn.Linear(width, width, dtype=torch.float64) for _ in range(3)))
    x = torch.randn(4 * width, width, dtype=torch.float64)

    def probed(device):
        return rgfast.probe(
            model.to(device), x.to(device), layers=["0", "1", "2"], progress=False, route="moments"
        )

    here = probed("cpu")
    rows(place.device)
    place.admit(*(op for op, _ in dispatch.explaining._OPS.values() if "cuda" in op.impls))
    there = probed(place.device)
    for name in here.measures:
        want, found = (torch.from_numpy(each.dataset[name].values) for each in (here, there))
        torch.testing.assert_close(found, want, rtol=1e-6, atol=1e-9, equal_nan=True, msg=name)
