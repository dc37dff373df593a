"""Run by test_probe_distributed under torchrun: nothing here knows of ranks but which data are this one's."""

import os
import sys
from pathlib import Path

import torch

import rgfast


def build():
    torch.manual_seed(1)
    return rgfast.ResidualStack(width=6, depth=2, mixing="none", w2_scale=0.5).double()


def data():
    return torch.randn(130, 3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, part = Path(sys.argv[1]), data().split(50)[int(os.environ["RANK"]) :: 2]
    result = rgfast.probe(build(), part, groups=2, checkpoint=folder / "run.checkpoint", timeout=30)
    result.save(folder / "run.nc")
    result.report(folder / f"report{os.environ['RANK']}.html")
    print(result.dataset.attrs["sequences"])
