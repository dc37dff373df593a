"""What the compiled module asks of CUDA's driver, and its sentence for everything that may go wrong there."""

import math
import os
import struct
import subprocess
import sys
import threading

import pytest

from rgfast.runtime import native

FILL = "rgfast_fill"


def launch(
    driver, *arguments, kernel=FILL, device=0, stream=0, grid=(2, 1, 1), block=128, shared=0, cluster=1
):
    driver.launch(kernel, device, stream, grid, block, shared, cluster, list(arguments))


@pytest.fixture
def fill(fake):
    fake.kernel(FILL, 3)
    return fake


def test_a_launch_arrives_as_it_was_asked_for(fill, open_driver):
    driver = open_driver()
    launch(driver, 1 << 47, -3, math.pi, stream=77, grid=(5, 6, 7), block=96, shared=1000)
    (call,) = fill.log("cuLaunchKernelEx")
    assert (call["kernel"], call["grid"], call["block"]) == (FILL, [5, 6, 7], [96, 1, 1])
    assert (call["shared"], call["stream"], call["cluster"], call["context"]) == (1000, 77, 1, 0)
    assert [struct.pack("<Q", word) for word in call["words"]] == [
        struct.pack("<Q", 1 << 47), struct.pack("<q", -3), struct.pack("<d", math.pi),
    ]  # fmt: skip


def test_the_primary_context_is_current_for_a_launch_and_not_after(fill, open_driver):
    driver = open_driver()
    launch(driver, 1, 2, 3.0)
    calls = [each["call"] for each in fill.log()]
    assert calls[0] == "cuInit"
    assert calls.index("cuDevicePrimaryCtxRetain") < calls.index("cuCtxPushCurrent")
    assert calls[-2:] == ["cuLaunchKernelEx", "cuCtxPopCurrent"]
    launch(driver, 1, 2, 3.0)
    assert [each["call"] for each in fill.log()] == [
        "cuCtxPushCurrent",
        "cuLaunchKernelEx",
        "cuCtxPopCurrent",
    ]
    fill.fail("cuLaunchKernelEx", 1)
    with pytest.raises(RuntimeError):
        launch(driver, 1, 2, 3.0)
    assert fill.log()[-1]["call"] == "cuCtxPopCurrent"


def test_threads_and_devices_share_one_library_and_have_their_own_contexts(fill, open_driver):
    fill.set(devices=2)
    driver = open_driver()
    assert driver.device_count() == 2
    threads = [
        threading.Thread(target=launch, args=(driver, 1, 2, 3.0), kwargs={"device": k % 2}) for k in range(8)
    ]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    log = fill.log()
    assert sum(each["call"] == "cuLibraryLoadData" for each in log) == 1
    functions = [each["context"] for each in log if each["call"] == "cuKernelGetFunction"]
    assert sorted(functions) == [0, 1]
    retained = [each["device"] for each in log if each["call"] == "cuDevicePrimaryCtxRetain"]
    assert sorted(retained) == [0, 1]
    launched = [each["context"] for each in log if each["call"] == "cuLaunchKernelEx"]
    assert sorted(launched) == [0] * 4 + [1] * 4


def test_what_a_device_is_comes_from_the_driver(fill, open_driver):
    fill.set(major=8, minor=6, shared=101376, ratio=64, clusters=84)
    driver = open_driver()
    assert driver.version() == 13000
    assert driver.device_name(0) == "Fake GPU 0"
    assert driver.capability(0) == (8, 6)
    assert (driver.shared_bytes(0), driver.single_to_double(0), driver.multiprocessors(0)) == (101376, 64, 84)
    assert driver.resources(0, FILL) == (32, 0, 0, 1024)


def test_a_kernel_asks_for_shared_memory_beyond_48_kb_once(fill, open_driver):
    driver = open_driver()
    for shared in (48 << 10, 100_000, 90_000, 100_000):
        launch(driver, 1, 2, 3.0, shared=shared)
    asked = fill.log("cuFuncSetAttribute")
    assert [(each["attribute"], each["value"]) for each in asked] == [(8, 100_000)]


def test_static_shared_memory_counts(fill, open_driver):
    fill.kernel("static", 0, shared=2000)
    driver = open_driver()
    launch(driver, kernel="static", shared=(48 << 10) - 2000)
    assert fill.log("cuFuncSetAttribute") == []
    launch(driver, kernel="static", shared=(48 << 10) - 1000)
    assert len(fill.log("cuFuncSetAttribute")) == 1
    with pytest.raises(
        RuntimeError, match=r"static needs 233448 bytes of shared memory per block, and cuda:0"
    ):
        launch(driver, kernel="static", shared=231448)


def test_clusters_are_asked_for_and_counted_once(fill, open_driver):
    driver = open_driver()
    for _ in range(2):
        launch(driver, 1, 2, 3.0, grid=(4, 1, 1), cluster=2)
    log = fill.log("cuOccupancyMaxActiveClusters", "cuLaunchKernelEx", "cuFuncSetAttribute")
    assert [each["call"] for each in log] == [
        "cuOccupancyMaxActiveClusters",
        "cuLaunchKernelEx",
        "cuLaunchKernelEx",
    ]
    assert {each["cluster"] for each in log} == {2}
    launch(driver, 1, 2, 3.0, grid=(16, 1, 1), cluster=16)
    (asked,) = fill.log("cuFuncSetAttribute")
    assert (asked["attribute"], asked["value"]) == (14, 1)


def test_a_part_of_a_gpu_may_have_room_for_no_cluster(fill, open_driver):
    fill.set(clusters=0)
    sentence = r"rgfast_fill needs clusters of 2 blocks, of which cuda:0 \(sm_90\) has room for none"
    with pytest.raises(RuntimeError, match=sentence):
        launch(open_driver(), 1, 2, 3.0, cluster=2)
    fill.set(clusters=132, major=8, minor=0)
    with pytest.raises(
        RuntimeError, match=r"clusters of 2 blocks, of which cuda:0 \(sm_80\) has room for none"
    ):
        launch(open_driver(), 1, 2, 3.0, cluster=2)
    assert fill.log("cuLaunchKernelEx") == []


def test_a_check_refuses_what_a_launch_would_and_launches_nothing(fill, open_driver):
    driver = open_driver()
    driver.check(FILL, 0, (1, 1, 1), 128, 1000, 1)
    with pytest.raises(RuntimeError, match="bytes of shared memory"):
        driver.check(FILL, 0, (1, 1, 1), 128, 1_000_000, 1)
    assert fill.log("cuLaunchKernelEx") == []


@pytest.mark.parametrize("status", [0, 1, 2])
def test_a_capture_is_seen(fill, open_driver, status):
    fill.set(capturing=status)
    driver = open_driver()
    assert driver.capturing(0, 5) == (status != 0)
    (asked,) = fill.log("cuStreamIsCapturing")
    assert (asked["stream"], asked["context"]) == (5, 0)


def test_the_default_stream_says_by_an_error_that_another_one_is_captured(fill, open_driver):
    fill.fail("cuStreamIsCapturing", 906)
    assert open_driver().capturing(0, 0)


@pytest.mark.parametrize(
    ("function", "code", "sentence"),
    [
        ("cuInit", 100, "the CUDA driver finds no GPU"),
        ("cuInit", 3, r"cannot start in this process, which was forked from one that had used it: .*'spawn'"),
        ("cuInit", 34, "is a stub to link against and no CUDA driver"),
        ("cuInit", 803, "of different versions: restart the machine"),
        (
            "cuInit",
            999,
            r"starting the CUDA driver failed: CUDA_ERROR_FAKE \(999\): what the driver says of it",
        ),
        ("cuDeviceGetCount", 999, "counting GPUs failed"),
        ("cuDevicePrimaryCtxRetain", 46, "cuda:0 is in use by another process"),
        ("cuDevicePrimaryCtxRetain", 2, "taking the context of cuda:0 failed"),
        ("cuCtxPushCurrent", 201, "making the device's context current failed"),
        ("cuLibraryLoadData", 209, r"no kernels for sm_90 \(it has sm_90 and PTX of sm_90\)"),
        ("cuKernelGetFunction", 209, r"no kernels for sm_90 \(it has sm_90 and PTX of sm_90\)"),
        ("cuLibraryLoadData", 200, r"no kernels for sm_90 \(it has sm_90 and PTX of sm_90\)"),
        (
            "cuLibraryLoadData",
            222,
            "too old to compile the PTX for sm_90: it needs one that supports CUDA 13.0",
        ),
        ("cuKernelGetFunction", 222, "too old to compile the PTX for sm_90"),
        ("cuKernelGetFunction", 500, "no kernel rgfast_fill for sm_90"),
        ("cuLibraryGetKernel", 999, "looking up rgfast_fill failed"),
        ("cuFuncGetAttribute", 999, "asking about rgfast_fill failed"),
        ("cuFuncSetAttribute", 1, "asking for 100000 bytes of shared memory for rgfast_fill failed"),
        (
            "cuLaunchKernelEx",
            701,
            r"more registers or shared memory than the GPU has for blocks of 128 threads",
        ),
        ("cuLaunchKernelEx", 2, "launching rgfast_fill on cuda:0 failed: the GPU is out of memory"),
        (
            "cuLaunchKernelEx",
            700,
            r"failed, since a kernel before it did: CUDA_ERROR_ILLEGAL_ADDRESS \(700\)",
        ),
        ("cuLaunchKernelEx", 999, r"launching rgfast_fill on cuda:0 failed: CUDA_ERROR_FAKE \(999\)"),
    ],
)
def test_every_failure_is_a_sentence(fill, open_driver, function, code, sentence):
    fill.fail(function, code)
    with pytest.raises(RuntimeError, match=sentence):
        launch(open_driver(), 1, 2, 3.0, shared=100_000)


def test_a_failure_is_not_kept(fill, open_driver):
    driver = open_driver()
    for function in ("cuDevicePrimaryCtxRetain", "cuLibraryLoadData", "cuKernelGetFunction"):
        fill.fail(function, 2)
        with pytest.raises(RuntimeError):
            launch(driver, 1, 2, 3.0)
        fill.fail(function, 0)
    launch(driver, 1, 2, 3.0)


def test_without_a_driver_or_with_one_that_is_too_old_it_says_what_is_needed(fill, open_driver):
    with pytest.raises(RuntimeError, match=r"there is no CUDA driver \(.*no-such-driver"):
        open_driver("/no-such-driver.so")
    with pytest.raises(
        RuntimeError, match=r"has no cuGetProcAddress_v2: NVIDIA driver 525 or later is needed"
    ):
        open_driver(native.load().__file__)
    fill.lacks("cuLibraryLoadData")
    with pytest.raises(
        RuntimeError, match=r"has no cuLibraryLoadData of CUDA 12.0: NVIDIA driver 525 or later"
    ):
        open_driver()
    fill.reset()
    fill.set(version=12040)
    sentence = (
        r"supports CUDA 12.4, and the kernels were built by nvcc 13.0: NVIDIA driver 580 or later is needed"
    )
    with pytest.raises(RuntimeError, match=sentence):
        open_driver()
    assert open_driver(release=(12, 8)).version() == 12040


def test_without_a_gpu_it_says_so(fill, open_driver):
    fill.set(devices=0)
    with pytest.raises(RuntimeError, match="finds no GPU"):
        open_driver()


def test_what_is_asked_for_is_checked_before_the_driver_sees_it(fill, open_driver):
    driver = open_driver()
    with pytest.raises(RuntimeError, match=r"grid must have no side of 0, got \(0, 1, 1\) for rgfast_fill"):
        launch(driver, 1, 2, 3.0, grid=(0, 1, 1))
    with pytest.raises(RuntimeError, match="block must be at least 1, got 0"):
        launch(driver, 1, 2, 3.0, block=0)
    with pytest.raises(RuntimeError, match="cluster must divide the grid's first side, 2, got 3"):
        launch(driver, 1, 2, 3.0, cluster=3)
    with pytest.raises(
        RuntimeError, match="device must be one of the 1 that the CUDA driver finds, got cuda:1"
    ):
        launch(driver, 1, 2, 3.0, device=1)
    with pytest.raises(RuntimeError, match="rgfast_fill takes 3 arguments, got 2"):
        launch(driver, 1, 2)
    with pytest.raises(RuntimeError, match="runs in blocks of at most 1024 threads, got 1056"):
        launch(driver, 1, 2, 3.0, block=1056)
    with pytest.raises(RuntimeError, match="no kernel rgfast_nothing for sm_90"):
        launch(driver, kernel="rgfast_nothing")
    with pytest.raises(TypeError, match="arguments must be int or float, got str"):
        launch(driver, 1, 2, "3")
    with pytest.raises(ValueError, match="arguments must be integers of 64 bits, got 9223372036854775808"):
        launch(driver, 1, 1 << 63, 3.0)
    assert fill.log("cuLaunchKernelEx") == []


def test_a_driver_before_12_4_cannot_count_arguments_and_launches(fill, open_driver):
    fill.set(version=12000)
    launch(open_driver(release=(12, 0)), 1, 2, 3.0)
    assert len(fill.log("cuLaunchKernelEx")) == 1


FORK = """
import os, sys
from ctypes import CDLL
from importlib.util import module_from_spec, spec_from_file_location

spec = spec_from_file_location("_native", sys.argv[1])
native = module_from_spec(spec)
spec.loader.exec_module(native)
CDLL(sys.argv[2]).fake_kernel(b"rgfast_fill", 0, 0)
driver = native.CudaDriver(sys.argv[2], b"", "", (13, 0))
launch = lambda: driver.launch("rgfast_fill", 0, 0, (1, 1, 1), 32, 0, 1, [])
launch()
child = os.fork()
if child == 0:
    try:
        launch()
    except RuntimeError as error:
        print(error, flush=True)
        os._exit(3)
    os._exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
launch()
print("the parent goes on")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_child_is_refused_and_the_parent_goes_on(library):
    done = subprocess.run(
        [sys.executable, "-c", FORK, native.load().__file__, str(library)],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told, after = done.stdout.splitlines()
    assert (
        told == "this process was forked from one that had opened the CUDA driver: start processes by 'spawn'"
    )
    assert after == "the parent goes on"
