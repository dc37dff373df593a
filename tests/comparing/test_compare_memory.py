"""What a comparison holds does not depend on how many sequences come."""

import gc

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor

import rgfast


class Counting:
    """Batches made as they are asked for, and the most bytes of tensors alive when one is made."""

    def __init__(self, batches, make):
        self._batches, self._make = batches, make
        self.most = 0

    def __iter__(self):
        for number in range(self._batches):
            if number in (self._batches // 2, self._batches - 1):
                self.most = max(self.most, alive())
            yield self._make(number)


def alive():
    """Bytes of all tensors, each memory once."""
    gc.collect()
    found = {}
    for thing in gc.get_objects():
        # isinstance() asks lazy objects for their class; sparse and fake tensors, which other tests leave in
        # torch's caches, have no memory of their own.
        if not issubclass(type(thing), torch.Tensor) or issubclass(type(thing), FakeTensor):
            continue
        if thing.layout == torch.strided and thing.device.type == "cpu":
            storage = thing.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


@pytest.mark.parametrize("views", [None, ["position", "pooled", "mean_pooled"]])
def test_peak_memory_at_n_and_eight_times_n(kit, views):
    a, b = kit.Encoder(24, 4), kit.Encoder(16, 3, seed=1)

    def make(number):
        generator = torch.Generator().manual_seed(number)
        return {"input_ids": torch.randint(1, 30, (16, 6), generator=generator)}

    most = []
    for batches in (16, 128):
        counting = Counting(batches, make)
        rgfast.compare(a, b, counting, views=views, progress=False)
        most.append(counting.most)
    assert most[0] > 0
    assert abs(most[1] / most[0] - 1) <= 0.05


def test_a_sample_is_bounded_too(kit):
    a, b = kit.Mlp(5, 16, 2), kit.Mlp(5, 12, 2, seed=1)

    def make(number):
        return torch.randn(64, 5, generator=torch.Generator().manual_seed(number))

    most = []
    for batches in (16, 128):
        counting = Counting(batches, make)
        rgfast.compare(a, b, counting, measures=["procrustes"], sample_limit=100, progress=False)
        most.append(counting.most)
    assert abs(most[1] / most[0] - 1) <= 0.05
