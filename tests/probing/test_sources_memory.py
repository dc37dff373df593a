"""What is read is more than what is held."""

import subprocess
import sys

import numpy as np
import pytest

# Blocks are cut to 8 MiB, so that dozens are read in a moment. The first run is of the same shapes.
READS = """
import resource, sys, numpy as np, torch, rgfast
from rgfast.probing.sources import activations as module
module._BLOCK = 8 << 20
torch.set_num_threads(1)

class Generated:
    dtype, shape = np.float32, (12000, 16, 256)
    def __getitem__(self, part):
        at = np.arange(*part.indices(self.shape[0]), dtype=np.float32)
        return np.sin(at[:, None, None] + np.arange(16)[:, None] * np.arange(256, dtype=np.float32))

def probe(source):
    options = {"positions": [0], "views": ["position"], "memory": "32MiB", "refine": False}
    return rgfast.probe(rgfast.Activations(source, "N T D"), progress=False, **options)

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

probe({"a": torch.randn(600, 16, 256), "b": torch.randn(600, 16, 256)})
before = peak()
SOURCE
print(peak() - before)
"""
SOURCES = {
    "generated": "assert int(probe({'a': Generated(), 'b': Generated()}).dataset.n.max()) == 12000",
    ".npy": "probe(sys.argv[1])",
    "memory map": "probe({k: np.load(f'{sys.argv[1]}/{k}.npy', mmap_mode='r') for k in 'ab'})",
    ".safetensors": "probe(sys.argv[1] + '/tensors')",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Layers of 98 MB each, as arrays and as tensors."""
    from safetensors.numpy import save_file

    path = tmp_path_factory.mktemp("layers")
    (path / "tensors").mkdir()
    for name in "ab":
        rows = np.sin(np.arange(6000 * 16 * 256, dtype=np.float32)).reshape(6000, 16, 256)
        np.save(path / f"{name}.npy", rows)
        save_file({name: rows}, path / "tensors" / f"{name}.safetensors")
    return path


@pytest.mark.parametrize("source", SOURCES)
def test_memory_does_not_depend_on_how_much_there_is(source, folder):
    code = READS.replace("SOURCE", SOURCES[source])
    command = [sys.executable, "-W", "error", "-c", code, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    assert int(done.stdout) < 64 << 20  # of 197 MB of files, or of 393 MB generated
