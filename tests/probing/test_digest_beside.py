"""The digest of weights on a GPU, taken by a thread beside the forwards: the CPU stands for the GPU here, and
its copies are made when they are waited for."""

import threading
from collections import defaultdict
from contextlib import contextmanager

import pytest
import torch
from test_digest import Weights
from torch import nn
from tqdm import TMonitor

import rgfast
from rgfast.probing import beside, checkpoint
from rgfast.probing.beside import Beside, on_gpus
from rgfast.runtime import copies

PART = 16


class Device:
    """A stand-in for a GPU whose copies are queued until ``go`` is set and someone waits for them."""

    def __init__(self):
        self.go, self.log, self.buffers, self.fault = threading.Event(), [], [], None
        self.queued, self.now = defaultdict(list), "main"
        self.go.set()


@pytest.fixture
def gpu(monkeypatch):
    device = Device()
    copy = torch.Tensor.copy_

    class Stream:
        def __init__(self, place):
            self.name = f"beside {place}"

        def wait_stream(self, other):
            device.log.append(f"{self.name} waits for {other}")

    class Event:
        def __init__(self, blocking):
            assert blocking

        def record(self, stream):
            self.due, device.queued[stream.name] = device.queued[stream.name], []

        def synchronize(self):
            assert threading.current_thread().name == "rgfast-weights"
            assert device.go.wait(30)
            if device.fault is not None:
                raise device.fault
            for to, x in self.due:
                copy(to, x)

    @contextmanager
    def on(stream):
        before, device.now = device.now, stream.name
        yield
        device.now = before

    def queue(to, x, non_blocking=False):
        if not non_blocking:
            return copy(to, x)
        assert device.now.startswith("beside")
        device.queued[device.now].append((to, x))
        return to

    def pinned(size):
        device.buffers.append(size)
        return torch.full((size,), 255, dtype=torch.uint8)

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda place: "main")
    monkeypatch.setattr(torch.Tensor, "copy_", queue)
    monkeypatch.setattr(copies, "_pinned", pinned)
    monkeypatch.setattr(beside, "_on_a_gpu", lambda x: True)
    yield device
    device.go.set()


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(5, 7), nn.Linear(7, 5)
        self.register_buffer("scale", torch.ones(3))
        self.register_buffer("unsaved", torch.ones(3), persistent=False)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x))) * self.scale[0]


def probing(model, **options):
    return rgfast.Probe(model, layers=["first", "second"], route="moments", progress=False, **options)


@pytest.fixture
def alone(monkeypatch):
    """How often a digest was taken in the foreground."""
    taken = []
    real = checkpoint.model_digest

    def counted(model):
        taken.append(model)
        return real(model)

    monkeypatch.setattr(checkpoint, "model_digest", counted)
    return taken


@pytest.mark.parametrize("most", [1, 4, 1 << 20])
def test_it_is_the_digest_however_the_weights_are_cut(gpu, most, monkeypatch):
    monkeypatch.setattr(checkpoint, "PART", PART)
    monkeypatch.setattr(beside, "_PINNED", most * PART)
    model = Weights()
    assert Beside(model).digest() == checkpoint.model_digest(model)
    whole = sum(x.nbytes for x in model.state_dict().values())
    assert gpu.buffers == [min(most * PART, whole)] * (1 if most * PART > whole else 2)
    assert gpu.log == ["beside cpu waits for main"]


def test_a_model_without_weights_has_none_on_gpus(gpu):
    assert not on_gpus(nn.Tanh())
    assert on_gpus(Small())


def test_a_probe_takes_it_beside_its_forwards(gpu, alone):
    model = Small().eval()
    want = checkpoint.model_digest(Small())
    alone.clear()
    gpu.go.clear()
    with probing(model) as probe, torch.no_grad():
        for _ in range(2):
            model(torch.randn(10, 5))
        gpu.go.set()
    assert probe.result().provenance["weights"] == want
    assert probe.result().provenance["weights"] == want
    assert alone == []


CHANGES = {
    "written to": lambda m: m.first.weight.detach().mul_(2.0),
    "a buffer": lambda m: m.scale.add_(1.0),
    "other data": lambda m: setattr(m.first.weight, "data", m.first.weight.data * 2),
    "another parameter": lambda m: setattr(m.first, "weight", nn.Parameter(2 * m.first.weight.detach())),
    "laid out otherwise": lambda m: setattr(m.first.weight, "data", m.first.weight.data.view(5, 7)),
    "loaded": lambda m: m.load_state_dict({k: 2 * x for k, x in m.state_dict().items()}),
    "one more": lambda m: m.register_buffer("more", torch.ones(2)),
    "one less": lambda m: delattr(m, "scale"),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("late", [False, True])
def test_weights_that_change_are_read_as_they_are_when_forwards_end(gpu, alone, change, late):
    model = Small().eval()
    if not late:
        gpu.go.clear()
    with probing(model) as probe, torch.no_grad():
        model(torch.randn(10, 5))
        if late:
            probe._tally._weights._beside._thread.join()
        CHANGES[change](model)
        gpu.go.set()
    found = probe.result().provenance["weights"]
    assert len(alone) == 1
    assert found == checkpoint.model_digest(model) != checkpoint.model_digest(Small())


@pytest.mark.parametrize("change", [*CHANGES, "behind its version"])
def test_weights_may_change_after_the_forwards(gpu, alone, change, monkeypatch):
    monkeypatch.setattr(checkpoint, "PART", PART)
    monkeypatch.setattr(beside, "_PINNED", PART)
    model = Small().eval()
    want = checkpoint.model_digest(model)
    alone.clear()
    gpu.go.clear()
    with probing(model) as probe, torch.no_grad():
        model(torch.randn(10, 5))
        threading.Timer(0.05, gpu.go.set).start()
    if change in CHANGES:
        CHANGES[change](model)
    else:
        for p in model.parameters():
            p.data.copy_(2 * p)
    assert probe.result().provenance["weights"] == want
    assert alone == []


def test_an_interrupt_while_it_is_waited_for_loses_nothing(gpu, alone, monkeypatch):
    model = Small().eval()
    want = checkpoint.model_digest(model)
    alone.clear()
    with probing(model) as probe, torch.no_grad():
        model(torch.randn(10, 5))
        with monkeypatch.context() as patched:
            patched.setattr(Beside, "digest", interrupted)
            with pytest.raises(KeyboardInterrupt):
                probe.result()
        assert probe.result().provenance["weights"] == want
    assert alone == []


def interrupted(self):
    raise KeyboardInterrupt


def test_what_is_not_saved_may_change(gpu, alone):
    model = Small().eval()
    with probing(model) as probe, torch.no_grad():
        model(torch.randn(10, 5))
        model.unsaved.add_(1.0)
    assert probe.result().provenance["weights"] == checkpoint.model_digest(Small())
    assert len(alone) == 1  # that of this test


def test_a_copy_that_fails_is_made_again(gpu, alone):
    gpu.fault = RuntimeError("CUDA error: out of memory")
    model = Small().eval()
    with probing(model) as probe, torch.no_grad():
        model(torch.randn(10, 5))
    found = probe.result().provenance["weights"]
    assert len(alone) == 1
    assert found == checkpoint.model_digest(model)


def test_forwards_that_fail_end_the_thread(gpu, monkeypatch):
    monkeypatch.setattr(checkpoint, "PART", PART)
    monkeypatch.setattr(beside, "_PINNED", PART)
    gpu.go.clear()
    model = Small().eval()
    probe = probing(model)

    def fails():
        with probe, torch.no_grad():
            model(torch.randn(10, 5))
            threading.Timer(0.05, gpu.go.set).start()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert not [each for each in threading.enumerate() if each.name == "rgfast-weights"]
    assert not probe._tally._weights._beside._weights
    assert probe.result().provenance["weights"] == checkpoint.model_digest(model)


def test_weights_that_the_forward_trains_are_read_before_it(gpu, alone):
    model = Small()
    want = checkpoint.model_digest(model)
    alone.clear()
    with probing(model) as probe:
        model(torch.randn(10, 5)).sum().backward()
        assert len(alone) == 1
        with torch.no_grad():
            for p in model.parameters():
                p.sub_(p.grad)
    assert probe.result().provenance["weights"] == want
    assert len(alone) == 1


def test_weights_of_another_kind_are_read_at_once(gpu, alone):
    model = Small().eval()
    model.register_buffer("sparse", torch.eye(3).to_sparse())
    assert not on_gpus(model)
    model = Small().eval()
    model.first._register_state_dict_hook(
        lambda m, state, prefix, local: state.update({prefix + "w": torch.ones(2)})
    )
    assert on_gpus(model)
    with probing(model) as probe, torch.no_grad():
        model(torch.randn(10, 5))
    assert probe.result().provenance["weights"] == checkpoint.model_digest(model)
    assert len(alone) == 2


def test_weights_that_cannot_be_read_have_none(gpu):
    class Secret(Small):
        def state_dict(self, *args, **kwargs):
            raise RuntimeError("secret")

    model = Secret().eval()
    with probing(model) as probe, torch.no_grad():
        model(torch.randn(10, 5))
    assert probe.result().provenance["weights"] is None


def test_a_checkpoint_goes_on(gpu, tmp_path):
    model, x = Small().eval(), torch.randn(60, 5)
    options = {"layers": ["first", "second"], "route": "moments", "batch_size": 20, "progress": False}
    path = tmp_path / "state"
    whole = rgfast.probe(model, x, **options)
    first = rgfast.probe(model, x, checkpoint=path, **options)
    again = rgfast.probe(model, x, checkpoint=path, **options)
    for found in (first, again):
        assert found.provenance["weights"] == whole.provenance["weights"] == checkpoint.model_digest(model)
    with torch.no_grad():
        model.scale.add_(1.0)
    with pytest.raises(ValueError, match="a model with other weights"):
        rgfast.probe(model, x, checkpoint=path, **options)


@pytest.fixture
def left():
    """The threads that were not there before."""
    before = {*threading.enumerate()}
    return lambda: {*threading.enumerate()} - before


class Failing(Small):
    """Raises in its forward number ``at``."""

    def __init__(self, at, error):
        super().__init__()
        self.at, self.error, self.runs = at, error, 0

    def forward(self, x):
        out = super().forward(x)
        self.runs += 1
        if self.runs == self.at:
            raise self.error
        return out


def plan(model, batches):
    return rgfast.plan(model, batches, layers=["first", "second"], route="moments")


def probe(model, batches):
    return rgfast.probe(model, batches, layers=["first", "second"], route="moments", progress=False)


@pytest.fixture
def begun(gpu, monkeypatch):
    """How many threads have begun to copy weights; the copies end a little later."""
    taken, real = [], Beside._take
    gpu.go.clear()

    def take(self, *args):
        taken.append(threading.current_thread())
        threading.Timer(0.05, gpu.go.set).start()
        real(self, *args)

    monkeypatch.setattr(Beside, "_take", take)
    yield taken
    assert not any(thread.is_alive() for thread in taken)


def of_ours(threads):
    """Their names; tqdm has one for as long as the process lives."""
    return [thread.name for thread in threads if not isinstance(thread, (threading.Timer, TMonitor))]


@pytest.mark.parametrize("run", [plan, probe])
def test_no_thread_is_left(begun, left, run):
    batches = [torch.randn(40, 5, generator=torch.Generator().manual_seed(k)) for k in range(3)]
    run(Small().eval(), batches)
    assert begun
    assert of_ours(left()) == []


@pytest.mark.parametrize("run", [plan, probe])
@pytest.mark.parametrize("error", [ZeroDivisionError(), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("at", [1, 2])
def test_no_thread_is_left_by_a_forward_that_fails(begun, left, run, error, at):
    batches = [torch.randn(40, 5, generator=torch.Generator().manual_seed(k)) for k in range(3)]
    with pytest.raises(type(error)):
        run(Failing(at, error).eval(), batches)
    assert begun
    assert of_ours(left()) == []


def lacking(k):
    """Batches of which number ``k`` cannot be had, or is not finite."""
    for number in range(3):
        if number == abs(k):
            if k > 0:
                raise ZeroDivisionError
            yield torch.full((40, 5), float("nan"))
        yield torch.randn(40, 5, generator=torch.Generator().manual_seed(number))


@pytest.mark.parametrize(("k", "error"), [(1, ZeroDivisionError), (-1, ValueError), (-2, ValueError)])
def test_no_thread_is_left_by_batches_that_fail(begun, left, k, error):
    with pytest.raises(error):
        probe(Small().eval(), lacking(k))
    assert begun
    assert of_ours(left()) == []
