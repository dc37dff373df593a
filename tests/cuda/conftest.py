"""A library that stands for CUDA's driver, and the package made to use it."""

import fake_driver
import pytest
import torch

from rgfast.runtime import native


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    return fake_driver.build(tmp_path_factory.mktemp("fake_driver"))


@pytest.fixture
def fake(library):
    made = fake_driver.Fake(library)
    made.reset()
    yield made
    made.reset()


@pytest.fixture
def open_driver(fake):
    """Opens the library as the driver, for kernels that a compiler of CUDA 13.0 made."""

    def opened(path=None, holds="sm_90 and PTX of sm_90", release=(13, 0)):
        return native.load().CudaDriver(path or fake.path, b"an image", holds, release)

    return opened


@pytest.fixture
def package(fake, monkeypatch, tmp_path):
    """``rgfast.runtime.cuda`` on the library, with the CPU's tensors in place of a GPU's."""

    def fresh(image=None, *, there=True):
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.fatbin"
        path.write_bytes(fake_driver.fat_binary() if image is None else image)
        return fake_driver.install(monkeypatch, fake.path, path if there else None)

    return fresh


@pytest.fixture(scope="session")
def filling_library(tmp_path_factory):
    return fake_driver.build(tmp_path_factory.mktemp("filling_driver"), "filling.cpp")


@pytest.fixture
def filling(filling_library, monkeypatch, tmp_path):
    """The library that runs the package's simplest kernel, opened as the driver; nothing was tried there."""
    made = fake_driver.Fake(filling_library)
    made.reset()
    made.mistake(0)
    image = tmp_path / "filling.fatbin"
    image.write_bytes(fake_driver.fat_binary())
    fake_driver.install(monkeypatch, made.path, image)
    return made


@pytest.fixture
def here():
    return torch.device("cpu")
