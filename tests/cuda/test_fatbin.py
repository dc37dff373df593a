"""What a fat binary holds, read from its bytes."""

import shutil
import subprocess

import fake_driver
import pytest

from rgfast.runtime import cuda, fatbin
from rgfast.runtime.fatbin import Images


def test_images_and_the_compilers_release_are_read():
    image = fake_driver.fat_binary((90, 80, 100), (80,), release="12.8")
    assert fatbin.read(image) == Images((80, 90, 100), (80,), (12, 8))


@pytest.mark.parametrize("cut", [0, 3, 15, 16, 100])
def test_what_is_no_fat_binary_is_refused(cut):
    with pytest.raises(ValueError, match=r"no fat binary|must have \d+ bytes, got"):
        fatbin.read(fake_driver.fat_binary()[:cut])
    with pytest.raises(ValueError, match="the file is no fat binary"):
        fatbin.read(b"\x7fELF" + bytes(100))


def test_images_are_spoken_of():
    assert str(Images((80, 90), (80,), (13, 0))) == "sm_80, sm_90 and PTX of sm_80"
    assert str(Images((90,), (), (13, 0))) == "sm_90"
    assert str(Images((), (), (0, 0))) == "none"


@pytest.mark.parametrize(
    ("capability", "image"),
    [
        ((7, 5), None),
        ((8, 0), "sm_80"),
        ((8, 9), "sm_86"),
        ((9, 0), "PTX of sm_80"),
        ((10, 0), "sm_100"),
        ((10, 3), "sm_100"),
        ((12, 1), "PTX of sm_80"),
    ],
)
def test_the_image_that_a_gpu_runs(capability, image):
    assert Images((80, 86, 100), (80,), (13, 0)).serving(capability) == image
    assert Images((), (), (13, 0)).serving(capability) is None


def test_the_compilers_own_file_is_read(tmp_path):
    """Of the package's kernels if it has any, else of a kernel compiled here, if there is a compiler."""
    held = cuda.images()
    if held is None:
        if shutil.which("nvcc") is None:
            pytest.skip("there is neither nvcc nor a file that it made")
        (tmp_path / "k.cu").write_text('extern "C" __global__ void k() {}')
        words = ["nvcc", "-fatbin", "--no-compress", "-arch=sm_90", "k.cu", "-o", "k.fatbin"]
        subprocess.run(words, cwd=tmp_path, check=True)
        held = fatbin.read((tmp_path / "k.fatbin").read_bytes())
    assert held.cubins
    assert held.ptx
    assert held.release >= (12, 0)
