"""The same bits on any number of threads, wherever the data lie, and in blocks of any size."""

import pytest
import torch

import rgfast
from rgfast.ops.similarity import kernels, neighbors

F64 = torch.float64


@pytest.fixture
def restored():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def drawn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def calls(x, y):
    measures = [rgfast.mutual_knn(x, y), rgfast.mutual_knn(x, y, k=3, metric="euclidean")]
    measures += [rgfast.procrustes(x, y), rgfast.rsa(x, y), rgfast.intrinsic_dimension(x)]
    for name, options in (("cka", {}), ("mutual_knn", {"k": 4}), ("procrustes", {}), ("rsa", {})):
        found = rgfast.calibrate(name, [x, y], [y, x], null=3, **options)
        measures += [found.value, found.null]
    return measures


@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
def test_threads_and_addresses(restored, dtype):
    x, y = drawn(203, 97, dtype=dtype), drawn(203, 65, seed=1, dtype=dtype)
    torch.set_num_threads(1)
    wanted = calls(x, y)
    room = torch.empty(x.numel() + 3, dtype=dtype)
    room[3:] = x.flatten()
    for threads, first in ((2, x), (3, room[3:].view(x.shape)), (4, x.mT.contiguous().mT)):
        torch.set_num_threads(threads)
        for a, b in zip(wanted, calls(first, y), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_neighbors_in_blocks(metric, draw, tensor, monkeypatch):
    for x, y in (draw.related(0, 37, 5, 4), *draw.awkward(0, 37, 5, 4).values()):
        x, y = tensor(x), tensor(y)
        whole = rgfast.calibrate("mutual_knn", x, y, null=3, k=6, metric=metric)
        with monkeypatch.context() as patch:
            patch.setattr(neighbors, "_DISTANCE_BYTES", 8 * 37 * 5)
            patch.setattr(neighbors, "_FLAG_BYTES", 37 * 4)
            parts = rgfast.calibrate("mutual_knn", x, y, null=3, k=6, metric=metric)
        assert torch.equal(whole.value, parts.value)
        assert torch.equal(whole.null, parts.null)


def test_kernels_in_blocks(monkeypatch):
    x, y = drawn(41, 5), drawn(41, 3, seed=1)
    for name, options in (("rsa", {}), ("cka", {}), ("cka", {"debiased": False})):
        whole = rgfast.calibrate(name, x, y, null=5, **options)
        with monkeypatch.context() as patch:
            patch.setattr(kernels, "_ENTRIES", 97)
            patch.setattr(kernels, "_TOGETHER", 4)
            parts = rgfast.calibrate(name, x, y, null=5, **options)
        torch.testing.assert_close(whole.null, parts.null, rtol=0, atol=1e-13)
