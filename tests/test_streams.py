"""What is asked of CUDA's streams, graphs and memory, by a stand-in for them."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import rgfast
from rgfast.probing import first
from rgfast.probing.capture import positions
from rgfast.probing.estimators.moments import Moments
from rgfast.runtime import memory, streams, waiting
from rgfast.runtime.streams import Home

GIB = 1 << 30
CUDA = torch.device("cuda:1")


class Stream:
    """Notes what it is told."""

    def __init__(self, name, log, device=CUDA):
        self.name, self._log, self.device = name, log, device

    def __repr__(self):
        return self.name

    def wait_stream(self, other):
        self._log.append(f"{self} waits for {other}")

    def record_event(self):
        self._log.append(f"event on {self}")
        return SimpleNamespace(query=lambda: True)


class Activation:
    """A tensor, as far as streams go."""

    device = CUDA

    def __init__(self, log):
        self._log = log

    def record_stream(self, stream):
        self._log.append(f"kept until {stream}")


@pytest.fixture
def cuda(monkeypatch):
    """A stand-in whose ``now`` is the current stream."""
    log = []
    found = SimpleNamespace(log=log, now=Stream("main", log), activation=Activation(log))

    @contextmanager
    def on(stream):
        before, found.now = found.now, stream
        log.append(f"on {stream}")
        yield
        found.now = before

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: found.now)
    monkeypatch.setattr(torch.cuda, "stream", on)
    return found


def test_on_one_stream_nothing_waits(cuda):
    home = Home()
    for _ in range(2):
        with home.reading([(cuda.activation, streams.stream_of(cuda.activation))]):
            cuda.log.append("read")
    assert cuda.log == ["on main", "read"] * 2


def test_positions_are_sent_once_by_every_stream(cuda, monkeypatch):
    monkeypatch.setattr(positions, "numbers", lambda values, device: torch.tensor(values, dtype=torch.int64))
    positions._index_of.cache_clear()
    first = positions.index_of((0, 2), CUDA)
    assert positions.index_of((0, 2), CUDA) is first
    cuda.now = Stream("side", cuda.log)
    assert positions.index_of((0, 2), CUDA) is not first
    positions._index_of.cache_clear()


def test_activations_of_another_stream_are_waited_for_and_kept(cuda):
    side = Stream("side", cuda.log)
    with Home().reading([(cuda.activation, cuda.now), (cuda.activation, side)]):
        cuda.log.append("read")
    assert cuda.log == ["kept until main", "main waits for side", "on main", "read", "side waits for main"]


def test_later_forwards_on_another_stream_are_read_on_the_first_ones(cuda):
    home, side = Home(), Stream("side", cuda.log)
    with home.reading([(cuda.activation, cuda.now)]):
        pass
    cuda.log.clear()
    cuda.now = side
    with home.reading([(cuda.activation, side)]):
        cuda.log.append("read")
        assert cuda.now.name == "main"
    assert cuda.now is side
    assert cuda.log == ["kept until main", "main waits for side", "on main", "read", "side waits for main"]
    cuda.log.clear()
    with home.own():
        assert cuda.now.name == "main"
    assert cuda.log == ["on main"]


def test_every_device_has_a_home_of_its_own(cuda, monkeypatch):
    other = Activation(cuda.log)
    other.device = torch.device("cuda:0")
    current = {CUDA: cuda.now, other.device: Stream("other", cuda.log, other.device)}
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current[device])
    with Home().reading([(cuda.activation, current[CUDA]), (other, current[other.device])]):
        cuda.log.append("read")
    assert cuda.log == ["on main", "on other", "read"]


def test_the_cpu_has_no_streams(cuda):
    x = torch.ones(2)
    assert streams.stream_of(x) is None
    with Home().reading([(x, None)]):
        pass
    assert cuda.log == []


@pytest.mark.parametrize("mixed", [False, True])
def test_a_probe_reads_every_layer_on_the_stream_that_made_it(mixed, monkeypatch):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    now, came = ["main"], []
    monkeypatch.setattr("rgfast.probing.capture.watcher.stream_of", lambda x: now[0])
    if mixed:
        model[0].register_forward_pre_hook(lambda *_: now.__setitem__(0, "side"))
        model[1].register_forward_pre_hook(lambda *_: now.__setitem__(0, "main"))

    @contextmanager
    def reading(self, given):
        came.extend(stream for _, stream in given)
        yield

    monkeypatch.setattr(Home, "reading", reading)
    with rgfast.Probe(model, layers=["0", "1"], progress=False) as probe:
        model(torch.randn(5, 4))
    assert came == (["side", "main"] if mixed else ["main", "main"])
    assert probe.nbytes > 0 or probe.plan is not None


def test_a_graph_that_is_captured_is_refused_and_others_are_left_alone(monkeypatch):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    capturing = [True]
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    with rgfast.Probe(model, layers=["0", "1"], progress=False) as probe:
        with pytest.raises(RuntimeError, match="cannot measure a forward that goes into a CUDA graph"):
            model(torch.randn(5, 4))
        capturing[0] = False
        model(torch.randn(5, 4))
    assert probe.result().dataset.attrs["sequences"] == 5
    capturing[0] = True
    model(torch.randn(5, 4))  # nobody watches


def test_without_cuda_nothing_is_asked(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: pytest.fail("asked"))
    assert not streams.capturing()


def test_what_a_card_has_free(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10 * GIB, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 9 * GIB)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 5 * GIB)
    assert memory.free_bytes(CUDA) == 14 * GIB
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 30 * GIB)
    assert memory.free_bytes(CUDA) == 0
    assert memory.free_bytes(torch.device("cpu")) is None


class Wide(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(64, 64) for _ in range(2))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def planned(**options):
    with rgfast.Probe(Wide(), layers=["blocks.0", "blocks.1"], progress=False, **options) as probe:
        probe.model(torch.randn(3, 40, 64))
    return probe


def test_a_probe_takes_no_more_than_the_card_has(monkeypatch):
    options = {"route": "moments", "refine": False, "views": ["position"]}
    whole = planned(**options)
    assert len(whole.plan.positions) == 40
    free = whole.plan.state_bytes // 4
    monkeypatch.setattr(first, "free_bytes", lambda device: free)
    some = planned(**options)
    assert some.plan.state_bytes <= free
    assert 0 < len(some.plan.positions) < 40
    assert any("free, less than memory= allows" in note for note in some.plan.notes)
    monkeypatch.setattr(first, "free_bytes", lambda device: 1000)
    with pytest.raises(ValueError, match="memory: 1 position of 2 layers need"):
        planned(**options)
    monkeypatch.setattr(first, "free_bytes", lambda device: 64 * GIB)
    assert planned(**options).plan == whole.plan


def test_rows_are_held_as_long_as_the_card_has_room(monkeypatch):
    held = planned(route="samples")
    assert held._tally._rows is not None
    monkeypatch.setattr(first, "free_bytes", lambda device: 1000)
    with pytest.raises(
        ValueError, match="'samples' cannot be taken, since the rows of all layers do not fit"
    ):
        planned(route="samples")


@pytest.mark.parametrize("refine", [None, True, False])
def test_factors_are_left_out_where_they_would_cost_most(refine, monkeypatch):
    monkeypatch.setattr(waiting, "_EVERYWHERE", True)
    plan = planned(route="moments", refine=refine).plan
    assert plan.refine is bool(refine)
    assert any("not refined" in note for note in plan.notes) is (refine is None)


def test_a_value_on_its_way_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(waiting, "_EVERYWHERE", True)
    later = waiting.Later(torch.tensor([True]))
    assert not later.ready()
    assert later.ready()
    assert later.value.tolist() == [True]
    monkeypatch.setattr(waiting, "_EVERYWHERE", False)
    assert waiting.Later(torch.tensor(3)).ready()
    assert not waiting.Later(torch.empty(2, device="meta")).ready()


def test_one_transfer_reads_all_that_is_asked():
    values = [torch.tensor([[1, -(1 << 40)]]), torch.tensor(True), torch.tensor(2.5, dtype=torch.float64)]
    found = waiting.read(values)
    assert [x.dtype for x in found] == [x.dtype for x in values]
    assert [x.tolist() for x in found] == [x.tolist() for x in values]
    assert waiting.read([]) == []
    (whole,) = waiting.read([torch.tensor([2**60 + 1])])  # of one kind, nothing is made a number of fp64
    assert int(whole) == 2**60 + 1


def test_moments_read_everything_at_once(monkeypatch):
    from rgfast.streaming import accumulator

    monkeypatch.setattr(waiting, "_EVERYWHERE", True)
    probe = planned(route="moments", refine=False)
    asked, read = [], waiting.read
    monkeypatch.setattr(accumulator, "read", lambda values: asked.append(len(values)) or read(values))
    moments = probe._tally._moments
    assert isinstance(moments, Moments)
    moments.measures()
    assert len([n for n in asked if n]) == 1
    moments.measured("position")
    assert len([n for n in asked if n]) == 1
