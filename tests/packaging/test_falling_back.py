"""In a fresh process without triton, or without the compiled module as well: everything imports and runs."""

import json
import os
import subprocess
import sys

import pytest

CODE = """
import json
import os
import sys
import warnings

for name in {blocked}:
    sys.modules[name] = None  # an import of it is a ModuleNotFoundError

import torch
import rgfast

for name in rgfast.__all__:
    getattr(rgfast, name)

x = torch.randn(3, 40, 8, generator=torch.Generator().manual_seed(0))
found = {{}}
with warnings.catch_warnings(record=True) as told, rgfast.record() as log:
    warnings.simplefilter("always")
    for _ in range(2):
        found["effective_rank"] = rgfast.effective_rank(x).tolist()
        found["eigvalsh"] = rgfast.eigvalsh(x.mT @ x).flatten().tolist()
        found["cka"] = rgfast.cka_matrix(x).flatten().tolist()
        found["residual_mlp"] = rgfast.residual_mlp(
            x, torch.full((32, 8), 0.1), torch.zeros(32), torch.full((8, 32), 0.1), torch.zeros(8)
        ).flatten().tolist()


def refusal(**options):
    try:
        rgfast.effective_rank(x, **options)
    except rgfast.ImplUnavailable as error:
        return str(error)


refused = refusal(impl="native")
os.environ["RGFAST_STRICT"] = "1"
strict = refusal()
print(json.dumps({{
    "found": found,
    "ran": sorted({{each.impl for each in log}}),
    "told": [str(each.message) for each in told if each.category is rgfast.FallbackWarning],
    "refused": refused,
    "strict": strict,
}}))
"""


def measured(*blocked: str) -> dict:
    env = {name: value for name, value in os.environ.items() if not name.startswith("RGFAST_")}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", CODE.format(blocked=blocked)],
        env=env, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def whole() -> dict:
    return measured("triton")


def test_without_triton_nothing_is_missed(whole):
    assert whole["refused"] is whole["strict"] is None
    assert whole["told"] == []
    assert "native" in whole["ran"]


def test_without_the_compiled_module_and_triton_every_op_runs_its_reference_and_says_so_once(whole):
    plain = measured("rgfast._native", "triton")
    assert plain["ran"] == [
        "library",
        "reference",
    ]  # eigenvalues are torch's own in any case
    assert all("using reference" in each and "rgfast._native" in each for each in plain["told"])
    ops = [each.partition(":")[0] for each in plain["told"]]
    assert len(ops) == len(set(ops))
    assert set(ops) == {"spectrum", "cka", "residual_mlp"}
    assert "impl='native' cannot run this input" in plain["refused"]
    assert "RGFAST_STRICT=1 forbids" in plain["strict"]
    for name, values in whole["found"].items():
        assert values == pytest.approx(plain["found"][name], rel=2e-5, abs=1e-6), name
