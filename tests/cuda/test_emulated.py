"""Kernels run on this processor by the package's own way to the driver."""

import re

import emulated
import pytest
import torch

from rgfast.dispatch import Impl, ImplUnavailable, Op
from rgfast.runtime import cuda

CUDA = emulated.ROOT / "csrc" / "cuda"


def launch(gpu, kernel, *arguments, grid=1, block=32, shared=0, cluster=1):
    cuda.launch(kernel, (grid, 1, 1), block, shared, *arguments, device=gpu.device, cluster=cluster)


@pytest.mark.parametrize("count", [0, 1, 33, 257])
def test_a_kernel_writes_a_tensor_and_nothing_beside_it(emulated_gpu, count):
    x = torch.full((count + 2,), torch.nan, dtype=torch.float64)
    launch(emulated_gpu, "rgfast_fill", x[1:], count, 0.25, grid=2)
    assert torch.equal(x[1 : count + 1], torch.full((count,), 0.25, dtype=torch.float64))
    assert x[[0, -1]].isnan().all()
    (call,) = emulated_gpu.log("cuLaunchKernelEx")
    assert (call["kernel"], call["grid"]) == ("rgfast_fill", [2, 1, 1])


def test_every_device_source_is_in_the_package_and_in_the_library(emulated_gpu):
    sources = {path.name for path in CUDA.glob("*.cu")} - {"kernels.cu"}
    assert sources == set(re.findall(r'#include "(?:cuda/)?(\w+\.cu)"', (CUDA / "kernels.cu").read_text()))
    rooms = {re.match(r"rgfast_([a-z]+)", kernel)[1] for kernel in emulated_gpu.kernels()}
    assert rooms == {re.match(r"[a-z]+", name)[0] for name in sources} | {"fault"}


def test_shared_memory_and_barriers_are_those_of_the_launch(emulated_gpu):
    x, out = torch.randn(64, dtype=torch.float64), torch.empty(64, dtype=torch.float64)
    for seed in range(3):
        emulated_gpu.seed(seed)
        launch(emulated_gpu, "rgfast_fault_none", x, out, block=64, shared=64 * 8)
        assert torch.equal(out, x.roll(-1))


def test_a_missing_barrier_shows_as_what_was_never_written(emulated_gpu):
    x, out = torch.randn(64, dtype=torch.float64), torch.empty(64, dtype=torch.float64)
    launch(emulated_gpu, "rgfast_fault_missing_barrier", x, out, block=64, shared=64 * 8)
    assert out.isnan().any()


def test_a_kernel_that_hangs_is_an_error_that_says_where(emulated_gpu):
    out = torch.zeros(32, dtype=torch.float64)
    sentence = r"wait for each other forever; .*waiting in __syncthreads at faults\.cu:\d+: 31 threads"
    with pytest.raises(RuntimeError, match=sentence):
        launch(emulated_gpu, "rgfast_fault_skipped_barrier", out)
    launch(emulated_gpu, "rgfast_fill", out, 32, 2.0)
    assert out.eq(2).all()
    assert emulated_gpu.log()[-1]["call"] == "cuCtxPopCurrent"


def test_a_launch_that_no_gpu_takes_is_refused(emulated_gpu):
    with pytest.raises(ValueError, match="a cluster is 1 to 16 blocks"):
        launch(emulated_gpu, "rgfast_fill", torch.zeros(4, dtype=torch.float64), 4, 2.0, grid=32, cluster=32)
    with pytest.raises(RuntimeError, match="no kernel rgfast_nothing"):
        launch(emulated_gpu, "rgfast_nothing")


class Filled:
    device = torch.device("cpu")

    def shape_class(self):
        return "filled"


def test_an_implementation_for_gpus_runs_here_only_if_admitted(emulating_driver, tmp_path):
    def run(call):
        out = torch.empty(5, dtype=torch.float64)
        cuda.launch("rgfast_fill", (1, 1, 1), 32, 0, out, 5, 3.0, device=call.device)
        return out

    op = Op("filling", [Impl("cuda", run, devices=("cuda",), missing=cuda.missing)])
    with pytest.MonkeyPatch.context() as until:
        gpu = emulated.install(emulating_driver, tmp_path, until)
        with pytest.raises(ImplUnavailable, match="runs on the cuda, not on cpu"):
            op("cuda", Filled())
        gpu.admit(op)
        assert op("cuda", Filled()).eq(3).all()
    with pytest.raises(ImplUnavailable, match="runs on the cuda, not on cpu"):
        op("cuda", Filled())
