"""``rgfast.runtime.cuda``: why kernels cannot run here, and how tensors get to them."""

import struct
import threading

import fake_driver
import pytest
import torch

from rgfast.runtime import native

FILL = "rgfast_fill"


@pytest.fixture
def fill(fake):
    fake.kernel(FILL, 3)
    return fake


def test_a_tensor_is_passed_as_its_address(fill, package, here):
    cuda = package()
    x = torch.zeros(5, dtype=torch.float64)
    cuda.launch(FILL, (3, 2, 1), 64, 512, x[2:], -7, 0.5, device=here, cluster=3)
    (call,) = fill.log("cuLaunchKernelEx")
    assert call["words"] == [
        x.data_ptr() + 16,
        *struct.unpack("<QQ", struct.pack("<qd", -7, 0.5)),
    ]
    assert (call["grid"], call["block"], call["shared"], call["cluster"]) == ([3, 2, 1], [64, 1, 1], 512, 3)


def test_a_tensor_elsewhere_is_refused(fill, package, here):
    cuda = package()
    with pytest.raises(ValueError, match="arguments of rgfast_fill must be on cpu, got a tensor on meta"):
        cuda.launch(FILL, (1, 1, 1), 32, 0, torch.zeros(1, device="meta"), 1, 1.0, device=here)
    assert fill.log("cuLaunchKernelEx") == []


def test_everything_is_there(fill, package, here):
    cuda = package()
    assert cuda.missing() is None
    assert cuda.device_refusal(here) is None
    assert cuda.refusal(FILL, here, block=256, shared=200_000, cluster=2) is None
    assert fill.log("cuLaunchKernelEx") == []
    assert (cuda.architecture(here), cuda.version()) == ("sm_90", "13.0")
    assert (cuda.shared_bytes(here), cuda.single_to_double(here), cuda.multiprocessors(here)) == (
        232448,
        2,
        132,
    )
    assert not cuda.capturing(here)
    fill.set(capturing=1)
    assert cuda.capturing(here)


def test_the_driver_is_opened_once_by_any_number_of_threads(fill, package):
    cuda = package()
    threads = [threading.Thread(target=cuda.missing) for _ in range(8)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert len(fill.log("cuInit")) == 1


def test_nothing_is_opened_without_the_file(fill, package, here):
    cuda = package(there=False)
    assert cuda.missing() == "the package was built without kernels for GPUs, for which it takes nvcc"
    assert cuda.images() is None
    assert cuda.version() is None
    assert cuda.refusal(FILL, here) == cuda.missing()
    with pytest.raises(RuntimeError, match="built without kernels for GPUs"):
        cuda.launch(FILL, (1, 1, 1), 32, 0, device=here)
    assert fill.log() == []


def test_without_the_compiled_module_it_says_so(fill, package, here, monkeypatch):
    cuda = package()
    monkeypatch.setattr(native, "unavailable_reason", lambda: "the native module is not importable (gone)")
    assert cuda.device_refusal(here) == "the native module is not importable (gone)"


def test_without_a_driver_it_says_so_once(fill, package, monkeypatch):
    cuda = package()
    monkeypatch.setenv("RGFAST_CUDA_DRIVER", "/no-such-driver.so")
    assert "there is no CUDA driver" in cuda.missing()
    monkeypatch.setenv("RGFAST_CUDA_DRIVER", fill.path)
    assert "there is no CUDA driver" in cuda.missing()


def test_a_driver_older_than_the_compiler_is_refused(fill, package):
    fill.set(version=12090)
    assert "built by nvcc 13.0: NVIDIA driver 580 or later is needed" in package().missing()
    assert package(fake_driver.fat_binary(release="12.8")).missing() is None


def test_an_architecture_without_an_image_is_named_with_those_present(fill, package, here):
    cuda = package(fake_driver.fat_binary((90, 100), (90,)))
    fill.set(major=8, minor=6)
    assert cuda.device_refusal(here) == (
        "the package has no kernels for sm_86 (it has sm_90, sm_100 and PTX of sm_90)"
    )
    assert cuda.refusal(FILL, here) == cuda.device_refusal(here)
    assert fill.log("cuLibraryLoadData") == []


def test_ptx_takes_a_driver_as_new_as_the_compiler(fill, package, here):
    cuda = package(fake_driver.fat_binary((80,), (80,), release="12.8"))
    fill.set(version=12040)
    assert cuda.device_refusal(here) == (
        "the package has no machine code for sm_90, only PTX of sm_80, which takes a driver for CUDA 12.8, "
        "and this one supports 12.4"
    )
    fill.set(major=8, minor=6)
    assert cuda.device_refusal(here) is None
    fill.set(major=9, minor=0, version=12080)
    assert package(fake_driver.fat_binary((80,), (80,), release="12.8")).device_refusal(here) is None


def test_a_kernel_that_does_not_fit_is_refused(fill, package, here):
    cuda = package()
    assert "needs 300000 bytes of shared memory per block" in cuda.refusal(FILL, here, shared=300_000)
    assert "blocks of at most 1024 threads, got 2048" in cuda.refusal(FILL, here, block=2048)
    assert "no kernel rgfast_gone for sm_90" in cuda.refusal("rgfast_gone", here)
    fill.set(clusters=0)
    assert "has room for none" in cuda.refusal(FILL, here, cluster=4)


def test_another_device_than_a_gpu_is_refused(fill, package):
    assert package().device_refusal(torch.device("meta")) == "it runs on CUDA devices, not on meta"
