"""A benchmark that a library in the place of a GPU can run."""

from typing import NamedTuple

import pytest
import torch

from rgfast import dispatch
from rgfast.bench import suite
from rgfast.bench.timing import Checked, Contest
from rgfast.runtime import measured


@pytest.fixture
def kernel(emulated_gpu, monkeypatch, tmp_path):
    """A benchmark of an op with a kernel that `auto` takes only if it was measured."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    measured._standing.cache_clear()

    class Call(NamedTuple):
        x: torch.Tensor

        @property
        def device(self):
            return self.x.device

        def shape_class(self):
            return None

    op = dispatch.Op(
        "toy",
        [
            dispatch.Impl(
                "cuda", lambda call: call.x + 1, devices=("cpu",),
                by_name_only=lambda call: measured.refusal("toy", "cuda", call.device),
            ),
            dispatch.Impl("library", lambda call: call.x + 1, cost=lambda call: 1.0),
        ],
    )  # fmt: skip

    def toy(x, impl="auto"):
        return op(impl, Call(x))

    contest = Contest(
        "ones",
        lambda: torch.ones(3),
        lambda x, impl: lambda: toy(x, impl),
        lambda x, impl: Checked("toy", float(toy(x, impl)[0]) - 2, 0.0),
        {"rival": lambda x: lambda: x + 1},
        "toy",
    )
    monkeypatch.setattr("rgfast.dispatch.explaining._OPS", {})
    monkeypatch.setattr("rgfast.dispatch.explaining._FUNCTIONS", {})
    dispatch.register(op, toy)
    for name, module in suite.BENCHMARKS.items():
        monkeypatch.setattr(
            module, "contests", lambda *_, name=name: iter([contest] if name == "cka" else [])
        )
    yield
    measured._standing.cache_clear()
