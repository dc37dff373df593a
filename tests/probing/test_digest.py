"""A digest of weights is the same wherever they are, and takes few transfers."""

import hashlib

import pytest
import torch
from test_on_devices import FIRST, PLACES, SECOND, Blocks, devices
from there import There
from torch import nn
from waits import Waits

import rgfast
from rgfast.probing import checkpoint

COPY = "_to_copy from meta to cpu"
KINDS = (torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool, torch.complex64)


class Weights(nn.Module):
    """Many tensors of several dtypes and sizes, empty, without dimensions and strided ones among them."""

    def __init__(self, place=lambda x, k: x):
        super().__init__()
        torch.manual_seed(0)
        for k in range(48):
            x = (5 * torch.randn(k % 7, 3 + k)).to(KINDS[k % len(KINDS)])
            x = x.T if k % 5 == 0 else x.sum() if k == 7 else x
            self.register_buffer(f"b{k}", place(x, k))


def transfers(model):
    """The digest of a model, and how often something was copied from a device for it."""
    watch = Waits()
    with watch:
        found = checkpoint.model_digest(model)
    assert {*watch.found} <= {COPY}
    return found, len(watch.found)


HERE = checkpoint.model_digest(Weights())
PLACED = {"one": lambda x, k: There(x, SECOND), "two": lambda x, k: There(x, FIRST if k < 20 else SECOND)}
PLACED["between"] = lambda x, k: There(x, SECOND) if 10 <= k < 30 else x


@pytest.mark.parametrize("place", PLACED)
def test_it_is_that_of_the_weights_on_the_cpu(place):
    with devices():
        found, number = transfers(Weights(PLACED[place]))
    assert found == HERE
    assert number == (2 if place == "two" else 1)


def test_what_it_takes_at_once_is_bounded(monkeypatch):
    whole = sum(x.nbytes for x in Weights().state_dict().values())
    largest = max(x.nbytes for x in Weights().state_dict().values())
    most = whole // 4
    assert largest < most
    monkeypatch.setattr(checkpoint, "_TRANSFER", most)
    with devices():
        found, number = transfers(Weights(PLACED["one"]))
    assert found == HERE
    assert 4 < number < 10
    monkeypatch.setattr(checkpoint, "_TRANSFER", 1)
    assert checkpoint.model_digest(Weights()) == HERE


def test_a_weight_that_differs_is_seen_on_a_device():
    with devices():
        model = Weights(PLACED["one"])
        model.b20.held[-1, -1] += 1
        assert transfers(model)[0] != HERE


def test_it_is_what_it_is_defined_as():
    want = hashlib.blake2b(b"Weights", digest_size=16)
    for name, value in Weights().state_dict().items():
        want.update(name.encode())
        want.update(f"{value.dtype}{tuple(value.shape)}".encode())
        data = value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b""
        if data:
            want.update(hashlib.sha1(data).digest())
    assert want.hexdigest() == HERE


def test_results_of_two_devices_merge():
    with devices():
        x = torch.randn(40, 3, 6)
        options = {"layers": [f"blocks.{k}" for k in range(3)], "route": "moments", "refine": False}
        here, there = (
            rgfast.probe(Blocks(places, torch.float32), x, progress=False, **options)
            for places in (["cpu"] * 3, PLACES["two"])
        )
    assert here.provenance["weights"] == there.provenance["weights"]
    assert here.merge(there).dataset.attrs["sequences"] == 80
