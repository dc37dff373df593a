import pytest
import torch

import rgfast


@pytest.fixture(scope="session")
def probed():
    """A probe with every view, every pair and error bars."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 5, 6, generator=generator)
    mask = torch.rand(200, 5, generator=generator) < 0.3
    stack = rgfast.ResidualStack(6, 5, mixing="none", w2_scale=0.5, generator=generator)
    batch = {"x": x, "mask": mask}
    return rgfast.probe(stack, batch, mask="mask", pairs="all", groups=4, progress=False)
