import pytest
import torch

import rgfast
from rgfast.experiments.config import ReproduceConfig
from rgfast.training import TrainingConfig

TINY = ReproduceConfig(
    seeds=(0, 1),
    states=8,
    length=4,
    width=4,
    depth=5,
    hidden=8,
    training=TrainingConfig(steps=60, batch=32, lr=1e-2, warmup=2, log_every=20, log_sequences=64),
    probe_sequences=320,
)


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A small reproduction, with its folder."""
    out = tmp_path_factory.mktemp("finished") / "run"
    return rgfast.reproduce(config=TINY, out=out, jobs=1, progress=False)


@pytest.fixture(scope="session")
def probed():
    """A probe with every view, every pair and error bars."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 5, 6, generator=generator)
    mask = torch.rand(200, 5, generator=generator) < 0.3
    stack = rgfast.ResidualStack(6, 5, mixing="none", w2_scale=0.5, generator=generator)
    batch = {"x": x, "mask": mask}
    return rgfast.probe(stack, batch, mask="mask", pairs="all", groups=4, progress=False)
