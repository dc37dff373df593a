"""The probe on a device: every view against the CPU and the truth, the same bits, no wait in a forward."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

import rgfast
from rgfast.probing.checkpoint import model_digest
from rgfast.runtime import waiting

F64 = torch.float64
DEPTH, LENGTH, WIDTH, N = 3, 4, 12, 96
LAYERS = [f"blocks.{k}" for k in range(DEPTH)]
# What makes the host wait for a device: operators that read a value, calls of the driver, copies to the host.
OPERATORS = {f"aten::{name}" for name in ("item", "_local_scalar_dense", "nonzero", "masked_select")}
CALLS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "DtoH")
BEFORE, LAST = 9, 14


class Blocks(nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(3)
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH, dtype=dtype) for _ in range(DEPTH))

    def forward(self, x, attention_mask=None, hidden=None):
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        return x


def batch(kind, seed=0, n=N, dtype=torch.float32):
    made = torch.Generator("cpu").manual_seed(seed)
    given = {"x": torch.randn(n, LENGTH, WIDTH, generator=made, dtype=F64, device="cpu").to(dtype)}
    if kind == "padded":
        lengths = torch.randint(2, LENGTH + 1, (n, 1), generator=made, dtype=torch.int64, device="cpu")
        given["attention_mask"] = (torch.arange(LENGTH, device="cpu") < lengths).to(torch.int64)
    if kind == "masked":
        given["hidden"] = torch.rand(n, LENGTH, generator=made, dtype=F64, device="cpu") < 0.4
    return given


OPTIONS = {
    "plain": {"views": ["position", "pooled", "mean_pooled", "flattened"]},
    "padded": {"views": ["position", "pooled", "mean_pooled"]},
    "masked": {"views": ["visible", "masked"], "mask": "hidden"},
    "groups": {"views": ["position", "pooled"], "groups": 4},
    "all pairs": {"views": ["position"], "pairs": "all"},
}


def probed(device, kind, model=None, dtype=torch.float32, **options):
    model = (model or Blocks(dtype)).to(device)
    whole = batch(kind, dtype=dtype)
    given = [{name: x[at].to(device) for name, x in whole.items()} for at in torch.arange(N).split(32)]
    options = {"route": "moments", **OPTIONS[kind], **options}
    return rgfast.probe(model, given, layers=LAYERS, progress=False, **options)


def values_of(result, name):
    return torch.from_numpy(result.dataset[name].values.astype(float))


@pytest.mark.parametrize("kind", OPTIONS)
def test_every_view_and_measure_is_the_cpus_within_their_bounds(device, kind):
    # In fp64, so that both see the same activations but for rounding.
    here, there = (probed(at, kind, dtype=F64) for at in ("cpu", device))
    assert set(here.dataset.data_vars) == set(there.dataset.data_vars)
    for name in here.measures:
        got, want = values_of(there, name), values_of(here, name)
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-9, equal_nan=True, msg=f"{kind} {name}")


def test_the_fingerprint_of_weights_is_the_cpus(device):
    model, x = Blocks().to(device).eval(), batch("plain")["x"].to(device)
    with rgfast.Probe(model, layers=LAYERS, progress=False) as probe, torch.no_grad():
        model(x)
        assert probe.result().provenance["weights"] == model_digest(Blocks())
    with rgfast.Probe(model, layers=LAYERS, progress=False) as probe, torch.no_grad():
        model(x)
        model.blocks[0].weight.mul_(2.0)
        found = probe.result().provenance["weights"]
    on_cpu = torch.device(device).type == "cpu"  # read when the block was entered
    assert found == model_digest(Blocks() if on_cpu else model.cpu())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ranks_at_every_position_against_the_truth(device, dtype):
    model = Blocks(dtype).to(device)
    result = probed(device, "plain", model, dtype=dtype)
    stored = {}

    def keep(name):
        return lambda module, args, out: stored.__setitem__(name, out.detach())

    hooks = [block.register_forward_hook(keep(k)) for k, block in enumerate(model.blocks)]
    with torch.no_grad():
        model(batch("plain", dtype=dtype)["x"].to(device))
    for hook in hooks:
        hook.remove()
    for k in range(DEPTH):
        rows = stored[k].to(F64).cpu().transpose(0, 1)
        want = rgfast.effective_rank(rows, method="svd", impl="reference")
        found = torch.from_numpy(result.variable("effective_rank", "position").isel(layer=k).values)
        torch.testing.assert_close(found, want, rtol=1e-4 if dtype == torch.float32 else 2e-2, atol=0)


@pytest.mark.parametrize("kind", ["plain", "padded"])
def test_the_same_bits_run_after_run(device, kind):
    first, again = probed(device, kind), probed(device, kind)
    for name in first.measures:
        a, b = values_of(first, name), values_of(again, name)
        assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)), name


def test_what_is_not_finite_is_said(device):
    model = Blocks().to(device)
    x = batch("plain")["x"].to(device)
    x[3, 2, 1] = torch.nan
    with pytest.raises(ValueError, match="activations must be finite"):
        rgfast.probe(model, {"x": x}, layers=LAYERS, progress=False, route="moments")


def waits(events, within):
    """Names of what made the host wait inside ranges of that name, which a device has as well, but later."""
    host = [e for e in events if e.name == within and e.device_type == DeviceType.CPU]
    ranges = [(e.time_range.start, e.time_range.end) for e in host]
    assert ranges
    found = []
    for event in events:
        waiting = event.name in OPERATORS or any(word in event.name for word in CALLS)
        start = event.time_range.start
        if waiting and any(low <= start <= high for low, high in ranges):
            found.append(event.name)
    return found


def test_what_comes_while_a_device_is_behind_is_not_in_the_hosts_range():
    def event(name, device, start, end):
        return SimpleNamespace(
            name=name, device_type=device, time_range=SimpleNamespace(start=start, end=end)
        )

    events = [
        event("a forward", DeviceType.CPU, 0, 10),
        event("cudaStreamSynchronize", DeviceType.CPU, 5, 6),
        event("a forward", DeviceType.CUDA, 8, 30),
        event("cudaDeviceSynchronize", DeviceType.CPU, 20, 31),
    ]
    assert waits(events, "a forward") == ["cudaStreamSynchronize"]


def traced(device, probe, run):
    """What a profiler saw of ``run(k)`` for forwards that come after the first blocks have been summed up."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    for k in range(BEFORE):
        run(k)
    with profile(activities=activities) as seen:
        for k in range(BEFORE, LAST):
            with record_function("a forward"):
                run(k)
        if device == "cuda":
            torch.cuda.synchronize()
    return seen.events()


@pytest.mark.parametrize("kind", ["plain", "padded", "masked", "groups"])
def test_no_forward_waits(device, kind, monkeypatch):
    if device == "cpu":
        monkeypatch.setattr(waiting, "_EVERYWHERE", True)
    model = Blocks().to(device)
    batches = [{name: x.to(device) for name, x in batch(kind, k, 64).items()} for k in range(LAST)]
    with rgfast.Probe(model, layers=LAYERS, progress=False, route="moments", **OPTIONS[kind]) as probe:
        events = traced(device, probe, lambda k: probe.run(batches[k]))
        assert waits(events, "a forward") == []
    assert probe.result().measures


def test_the_trace_shows_a_wait(device):
    x = torch.ones(3, device=device)
    events = traced(device, None, lambda k: bool((x > 0).any()))
    assert "aten::_local_scalar_dense" in waits(events, "a forward")
    if device == "cuda":
        assert {"cudaStreamSynchronize"} & {*waits(events, "a forward")}
