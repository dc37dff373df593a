"""Probes of models on one or two devices: nothing waits or is mixed up, and values are the CPU's."""

from contextlib import ExitStack, contextmanager

import pytest
import torch
from test_waiting import CASES, OWN, WIDTH, assert_alike, batch_of
from there import Making, There
from torch import nn
from waits import Made, Waits

import rgfast
from rgfast.probing import tally
from rgfast.probing.estimators import moment_measures
from rgfast.probing.estimators.moments import Moments
from rgfast.probing.measured import Measured, to_host
from rgfast.streaming import MomentAccumulator

# Without a library that takes them, products are the reference's, which says so.
pytestmark = pytest.mark.filterwarnings("ignore::rgfast.FallbackWarning")

BATCHES = 6
FIRST, SECOND = "meta:0", "meta:1"
PLACES = {"one": [SECOND] * 3, "two": [FIRST, SECOND, SECOND], "between": [SECOND, FIRST, SECOND]}
ON_DEVICES = [(name, "between") for name in CASES if name != "samples"]
ON_DEVICES += [(name, place) for name in ("default", "padded") for place in ("one", "two")]


class Blocks(nn.Module):
    """Blocks with a device each, where they take their input."""

    def __init__(self, devices, dtype, bias=True):
        super().__init__()
        torch.manual_seed(3)
        self.blocks = nn.ModuleList(Block(device, dtype, bias) for device in devices)

    def forward(self, x, attention_mask=None, hidden=None):
        for block in self.blocks:
            x = block(x)
        return x


class Block(nn.Module):
    def __init__(self, device, dtype, bias):
        super().__init__()
        plain = nn.Linear(WIDTH, WIDTH, bias=bias, dtype=dtype)
        self._device = torch.device(device)
        self.weight = self._placed(plain.weight.detach())
        self.bias = self._placed(plain.bias.detach()) if bias else None

    def _placed(self, x):
        x = x if self._device.type == "cpu" else There(x, self._device)
        return nn.Parameter(x, requires_grad=False)

    def forward(self, x):
        x = x.to(self._device, non_blocking=True)
        return torch.tanh(torch.nn.functional.linear(x, self.weight, self.bias))


@contextmanager
def devices(*modes):
    with ExitStack() as stack:
        for mode in (Making(), *modes):
            stack.enter_context(mode)
        yield


def opened(places, dtype=torch.float32, bias=True, **options):
    options = {"layers": [f"blocks.{k}" for k in range(3)], "route": "moments"} | options
    return rgfast.Probe(Blocks(places, dtype, bias), progress=False, **options)


def probed(case, places, watch=None, given="host"):
    """The result of a probe of blocks at these places, of whose forwards ``watch`` saw every operator."""
    options = {"route": "moments"} | {name: value for name, value in case.items() if name not in OWN}
    with devices():
        with opened(places, case.get("dtype", torch.float64), "scale" not in case, **options) as probe:
            for k in range(BATCHES):
                batch = batch_of(k, case)
                if given == "device":
                    batch = {name: x.to(places[0]) for name, x in batch.items()}
                with watch or Making():
                    probe.run(batch)
        return probe.result()


@pytest.mark.parametrize(("name", "place"), ON_DEVICES)
def test_nothing_waits_and_values_are_the_cpus(name, place):
    case = CASES[name]
    here = probed({"refine": False} | case, ["cpu"] * 3)
    watch = Waits()
    there = probed(case, PLACES[place], watch)
    assert watch.found == []
    assert_alike(there, here, rtol=1e-8)


def test_layers_on_the_cpu_and_on_a_device():
    case = CASES["default"]
    here = probed(case | {"refine": False}, ["cpu"] * 3)
    there = probed(case | {"refine": False}, ["cpu", SECOND, "cpu"])
    assert_alike(there, here, rtol=1e-8)


@pytest.mark.parametrize("name", ["padded", "scores to be added", "masked and padded", "targets", "first"])
def test_entries_that_are_on_the_device_are_checked_there(name):
    case = CASES[name]
    if name == "targets":
        case = case | {"targets": {"b": "vector", "d": lambda entries: entries["vector"]}}
    watch = Waits()
    there = probed(case, PLACES["two"], watch, given="device")
    assert watch.found == []
    assert_alike(there, probed({"refine": False} | case, ["cpu"] * 3), rtol=1e-8)


def deep(depth, dtype=torch.float64, **options):
    """A probe of layers on two devices in turns."""
    places = [FIRST, SECOND] * (depth // 2)
    asked = {"layers": [f"blocks.{k}" for k in range(depth)], "route": "moments", "views": ["position"]}
    return places, rgfast.Probe(Blocks(places, dtype), progress=False, **asked | options)


def test_sums_are_on_their_layers_devices_and_meet_at_the_end():
    """Only rows of neighbors are sent while batches come; depth adds nothing to what the end waits for."""
    reads = []
    for depth in (4, 8):
        places, probe = deep(depth, groups=2)
        watch = Waits()
        with devices():
            with probe, watch:
                for k in range(BATCHES):
                    probe.run(batch_of(k, {}))
            assert watch.found == []
            for state in probe._tally._moments._groups:
                for sums in (accumulator._sums for accumulator in state.values()):
                    assert_placed(sums, places)
            with watch:
                probe.result().dataset.load()
        reads.append(watch.found)
    assert reads[0] == reads[1]


def assert_placed(sums, places):
    assert [str(x.device) for x in sums.shift] == places
    for (i, j), x in sums.moment.items():
        assert str(x.device) in (places[i], places[j])


def test_a_snapshot_of_layers_on_two_devices_goes_on_where_they_are():
    places, whole = deep(4)
    _, begun = deep(4)
    _, ended = deep(4)
    batches = [batch_of(k, {}) for k in range(BATCHES)]
    with devices():
        with whole:
            for batch in batches:
                whole.run(batch)
        with begun:
            for batch in batches[:2]:
                begun.run(batch)
        with ended:
            ended.restore(*begun.snapshot())
            for batch in batches[2:]:
                ended.run(batch)
        for accumulator in ended._tally._moments._groups[0].values():
            assert_placed(accumulator._sums, places)
        assert_alike(ended.result(), whole.result())


def test_tensors_of_two_devices_are_not_mixed():
    x, y = (There(torch.ones(2), device) for device in (FIRST, SECOND))
    with pytest.raises(RuntimeError, match="expected all tensors to be on the same device"):
        x + y
    with pytest.raises(RuntimeError, match="expected all tensors to be on the same device"):
        x + torch.ones(2)
    with devices(), pytest.raises(AssertionError, match="a buffer on meta must name its device"):
        torch.zeros(2, device="meta")


FAULTS = {
    "_local_scalar_dense": lambda x: x.sum().item(),
    "nonzero": lambda x: x[:, 0, 0].nonzero(),
    "index with a mask": lambda x: x[x > 0],
    "_to_copy from meta to cpu": lambda x: x.cpu(),
    "_to_copy from cpu to meta": lambda x: torch.ones(2).to(x.device),
    "copy_ from meta to cpu": lambda x: torch.empty(x.shape, dtype=x.dtype).copy_(x),
}


@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.parametrize("where", ["add", "merge", "measured"])
def test_a_planted_fault_is_seen(name, where, monkeypatch):
    was = MomentAccumulator.update if where == "add" else getattr(Moments, where)
    x = There(torch.ones(2, 3, 4), SECOND)

    def faulty(self, *args, **kwargs):
        FAULTS[name](x)
        return was(self, *args, **kwargs)

    owner, method = (MomentAccumulator, "update") if where == "add" else (Moments, where)
    monkeypatch.setattr(owner, method, faulty)
    watch = Waits()
    with devices():
        states = []
        for _ in range(2):
            mode = watch if where == "add" else Making()
            with opened(PLACES["one"], views=["position"]) as probe, mode:
                probe.run(batch_of(0, {"dtype": torch.float32}))
            states.append(probe._tally._moments)
        if where == "merge":
            with watch:
                states[0].merge(states[1])
        if where == "measured":
            states[0].measures()
            with watch:
                states[0].measured("position")
    assert name in watch.found
    if where == "add":
        assert {*watch.found} == {name}


def test_what_is_kept_between_forwards_does_not_grow():
    state = (WIDTH + 2) ** 2 * 8
    made, kept = [], []
    case = {"dtype": torch.float32}
    with devices(), opened(PLACES["two"], views=["position", "pooled", "mean_pooled"]) as probe:
        for k in range(12):
            batch = batch_of(k, case)
            mode = Made(state)
            with mode:
                probe.run(batch)
            made.append(sorted(mode.bytes))
            kept.append(probe.nbytes)
    # Blocks of 128 rows: every second forward of 64 sums one up.
    assert kept[1] == kept[-1]
    assert all(made[k] == made[k - 2] for k in range(4, 12))


@pytest.mark.parametrize("memory", ["1MiB", "4GiB"])
@pytest.mark.parametrize("place", ["cpu", "one", "two"])
@pytest.mark.parametrize("views", [["position"], ["position", "pooled", "mean_pooled"]])
def test_what_is_held_is_what_was_planned(memory, place, views):
    places = PLACES.get(place, ["cpu"] * 3)
    case = {"dtype": torch.float64, "needs": ["attention_mask"]}
    with devices(), opened(places, torch.float64, views=views, memory=memory, refine=False) as probe:
        kept = []
        for k in range(3):
            probe.run(batch_of(k, case))
            kept.append(probe.nbytes)
        planned = probe.plan.state_bytes
        accumulators = probe._tally._moments._groups[0].values()
        blocks = [one.rows_at_once for one in accumulators]
    assert max(kept) <= planned <= (1 << 20 if memory == "1MiB" else 1 << 32)
    if len(views) == 1:  # else there is room for rows at positions that are not followed, of which are none
        assert max(kept) > 0.9 * planned
    assert (max(blocks) == 1024) == (memory == "4GiB")


SAMPLES = {
    "all views": {"views": ["position", "pooled", "mean_pooled", "flattened"]},
    "default": {},
    "all pairs": {"pairs": "all", "views": ["position", "pooled"]},
    "groups": {"groups": 3, "views": ["position", "pooled", "mean_pooled"]},
    "float32": {"dtype": torch.float32},
    "bfloat16": {"dtype": torch.bfloat16, "views": ["position"]},
}


@pytest.mark.parametrize("name", SAMPLES)
def test_rows_are_held_and_measured_where_they_are(name):
    case = SAMPLES[name] | {"route": "samples"}
    watch = Waits()
    there = probed(case, PLACES["one"], watch)
    assert watch.found == []
    assert there.dataset.attrs["route"] == "samples"
    here = probed(case, ["cpu"] * 3)
    # Products of the CPU's kernels are fp32, which keeps CKA to 1e-6.
    assert_alike(there, here, rtol=1e-6)
    assert there.moments.keys() == here.moments.keys()


def test_rows_on_several_devices_or_padded_are_summed_up_instead():
    for case, places, why in (
        (CASES["plain"], PLACES["two"], "layers are on several devices"),
        (CASES["padded"], PLACES["one"], "rows that do not count are told apart on the CPU only"),
    ):
        with pytest.raises(ValueError, match=f"'samples' cannot be taken, since {why}"):
            probed(case | {"route": "samples"}, places)


def test_the_route_is_taken_unasked_where_anything_but_the_reference_takes_rows(monkeypatch):
    for takes, route in ((True, "samples"), (False, "moments")):
        monkeypatch.setattr(tally, "takes_rows", lambda x, takes=takes: takes)
        monkeypatch.setattr(tally, "worthwhile", lambda plan, sequences: True)
        assert probed({"route": "auto"}, PLACES["one"]).dataset.attrs["route"] == route


def count_matrices(monkeypatch):
    """A list that every call of a solver appends its number of matrices to, twice that of both spectra."""
    calls, alone, both = [], moment_measures.solved_moment, moment_measures.centered_values

    def counted(scatter, *args):
        calls.append(len(scatter))
        return alone(scatter, *args)

    def counted_both(a, *args):
        calls.append(2 * len(a))
        return both(a, *args)

    monkeypatch.setattr(moment_measures, "solved_moment", counted)
    monkeypatch.setattr(moment_measures, "centered_values", counted_both)
    return calls


def test_layers_of_one_width_are_solved_together(monkeypatch):
    calls = count_matrices(monkeypatch)
    case = {"views": ["position"], "refine": False}
    probed(case, PLACES["one"])
    together, calls[:] = list(calls), []
    probed(case, ["cpu"] * 3)
    assert together == [2 * 15]  # centered and as they are
    assert calls == [5] * 6  # where the number of matrices decides their last bits


def test_views_are_measured_together(monkeypatch):
    """Off the CPU, where each launch takes longer than what it does for the mean of a few positions."""
    calls = count_matrices(monkeypatch)
    case = {"views": ["position", "pooled", "mean_pooled"], "refine": False}
    there = probed(case, PLACES["one"])
    together, calls[:] = list(calls), []
    here = probed(case, ["cpu"] * 3)
    assert together == [2 * 3 * (5 + 1 + 1)]
    assert calls == [5] * 6 + [1] * 12
    assert_alike(there, here)


def test_a_view_is_read_in_one_transfer():
    found = Measured(
        count=There(torch.full((2, 3), 2**40 + 1), FIRST),
        values={"cka": There(torch.rand(3, 2, 2, dtype=torch.float64).permute(1, 2, 0), FIRST)},
        bounds={"effective_rank": There(torch.full((2, 3), torch.nan, dtype=torch.float64), FIRST)},
        refined=There(torch.tensor([[True, False, True]] * 2), FIRST),
        spectrum=There(torch.rand(2, 3, 5, dtype=torch.float64), FIRST),
    )
    watch = Waits()
    with devices(watch):
        there = to_host(found)
    assert watch.found == ["_to_copy from meta to cpu"]
    assert (there["n_by_layer"] == 2**40 + 1).all()
    assert there["n_by_layer"].dtype == "int64"
    assert (there["refined"] == [[True, False, True]] * 2).all()
    assert there["refined"].dtype == "bool"
    assert (there["cka"] == found.values["cka"].held.numpy()).all()
    assert (there["singular_values"] == found.spectrum.held.numpy()).all()
    assert torch.from_numpy(there["effective_rank_bound"]).isnan().all()
