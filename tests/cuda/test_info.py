"""What ``rgfast info`` says of kernels for GPUs."""

import fake_driver

from rgfast.runtime.environment import describe, facts


def told(text):
    return [line.removeprefix("cuda").strip() for line in text.splitlines() if line.startswith("cuda ")]


def test_kernels_driver_and_gpus_are_named(fake, package):
    package(fake_driver.fat_binary((80, 90), (80,)))
    fake.set(devices=2)
    assert told(describe()) == [
        "kernels for sm_80, sm_90 and PTX of sm_80, built by nvcc 13.0",
        "driver for CUDA 13.0",
        "Fake GPU 0 (sm_90) runs sm_90",
        "Fake GPU 1 (sm_90) runs sm_90",
    ]
    found = facts()["cuda"]
    assert (found["absent"], found["driver"], found["nvcc"]) == (None, "13.0", "13.0")
    assert found["gpus"][1] == {
        "name": "Fake GPU 1", "architecture": "sm_90", "image": "sm_90", "refusal": None,
    }  # fmt: skip


def test_a_gpu_without_an_image_says_why(fake, package):
    package()
    fake.set(major=7, minor=5)
    assert told(describe())[-1] == (
        "Fake GPU 0 (sm_75) cannot run: the package has no kernels for sm_75 (it has sm_90 and PTX of sm_90)"
    )


def test_without_kernels_or_a_driver_it_says_so(fake, package):
    package()
    fake.set(devices=0)
    assert told(describe()) == [
        "kernels for sm_90 and PTX of sm_90, built by nvcc 13.0",
        "cannot run: the CUDA driver finds no GPU",
    ]
    package(there=False)
    assert told(describe()) == ["the package was built without kernels for GPUs, for which it takes nvcc"]
    assert facts()["cuda"] == {
        "absent": "the package was built without kernels for GPUs, for which it takes nvcc",
        "compiled": None, "nvcc": None, "driver": None, "gpus": [],
    }  # fmt: skip
