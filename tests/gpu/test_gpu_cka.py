"""The kernels of CKA by name: on a GPU, and on this processor in place of one."""

import pytest
import torch

import rgfast
from rgfast.ops.cka.api import OP, alignment

F64 = torch.float64


@pytest.fixture(params=["emulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def gpu(request):
    if request.param == "emulated":
        emulated = request.getfixturevalue("emulated_gpu")
        emulated.admit(OP)
        return emulated.device, {"features": (4, 2, 80, 66), "samples": (3, 1, 66, 70)}
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU that torch finds")
    return torch.device("cuda"), {"features": (9, 16, 1500, 130), "samples": (9, 16, 700, 800)}


@pytest.mark.parametrize("way", ["features", "samples"])
@pytest.mark.parametrize("debiased", [True, False])
@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_all_pairs_and_neighbors(gpu, dtype, debiased, way):
    (device, shapes), made = gpu, torch.Generator().manual_seed(0)
    shape = shapes[way]
    x = (torch.randn(*shape, generator=made, dtype=F64).cumsum(0) + 30).to(dtype)
    there = x.to(device)
    for call in (rgfast.cka_matrix, rgfast.kernel_drift):
        found, again = (call(there, debiased=debiased, impl="cuda").cpu() for _ in range(2))
        assert torch.equal(found, again)
        wanted = call(there, debiased=debiased, impl="reference").cpu()  # on the CPU it takes half a minute
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("way", ["features", "samples"])
@pytest.mark.parametrize("dtype", [F64, torch.float32], ids=str)
def test_without_groups_over_batches_and_tiny_drifts(gpu, dtype, way):
    (device, shapes), made = gpu, torch.Generator().manual_seed(0)
    _, positions, n, d = shapes[way]
    x = (torch.randn(3, positions, n, d, generator=made, dtype=F64).cumsum(0) + 30).to(dtype)
    x[2, 0] = x[1, 0]
    for call in (
        lambda layers, impl: alignment([*layers], adjacent=False, groups=2, impl=impl),
        lambda layers, impl: rgfast.minibatch_cka(layers, batch_size=n // 3, impl=impl),
        lambda layers, impl: rgfast.kernel_drift(layers, impl=impl),
    ):
        found, again, wanted = (call(x.to(device), impl).cpu() for impl in ("cuda", "cuda", "reference"))
        assert torch.equal(found, again)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
