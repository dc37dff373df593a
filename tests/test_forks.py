"""Every public op in a forked child of a process whose libraries have threads: an answer, never a wait."""

import os
import subprocess
import sys

import pytest

CODE = """
import os
import sys
import time
import warnings

warnings.simplefilter("ignore")  # Python warns of fork beside threads, which is what this is about
import numpy as np
import torch
import rgfast
from rgfast import chains

torch.set_num_threads(2)
draw = torch.Generator().manual_seed(0)
x = torch.randn(600, 64, generator=draw)
y = x + torch.randn(600, 64, generator=draw)
layers, many = torch.stack([x, y]), torch.randn(40, 300, 64, generator=draw)
up, down = torch.randn(128, 64, generator=draw) / 8, torch.randn(64, 128, generator=draw) / 8
rows = torch.softmax(torch.randn(300, 300, generator=draw, dtype=torch.float64), -1)
chain = rgfast.MarkovChain(rows)
hidden = torch.rand(3000, 12, generator=draw) < 0.3
stack = rgfast.ResidualStack(width=64, depth=2, mixing="none")
model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Tanh(), torch.nn.Linear(64, 64))
lags = np.arange(50_000)


def gradient(function):
    leaf = x.clone().requires_grad_()
    function(leaf).sum().backward()
    return leaf.grad


def posterior():
    tokens = chain.sample(3000, 12, torch.Generator().manual_seed(1))
    return chain.bayes_posterior(tokens, hidden)


def probed(module, data, **options):
    found = rgfast.probe(module, data, progress=False, **options).dataset
    return torch.from_numpy(found.effective_rank.values.copy())


OPS = {
    "effective_rank": lambda: rgfast.effective_rank(many),
    "effective_rank by the reference": lambda: rgfast.effective_rank(many, impl="reference"),
    "effective_rank in single precision": lambda: rgfast.effective_rank(many, precision="single"),
    "effective_rank by Lanczos": lambda: rgfast.effective_rank(x, method="lanczos"),
    "effective_rank by SVD": lambda: rgfast.effective_rank(x, method="svd"),
    "singular_values": lambda: rgfast.singular_values(many),
    "participation_ratio": lambda: rgfast.participation_ratio(many),
    "stable_rank": lambda: rgfast.stable_rank(many),
    "numerical_rank": lambda: rgfast.numerical_rank(many),
    "rank_measures": lambda: rgfast.rank_measures(many).stable_rank,
    "eigvalsh": lambda: rgfast.eigvalsh(many[:, :64] + many[:, :64].mT),
    "moments": lambda: rgfast.rank_measures_from_moment(x.double().mT @ x.double(), 600).effective_rank,
    "effective_rank_estimate": lambda: torch.tensor(
        rgfast.effective_rank_estimate(rgfast.moment_operator([x, y], 64), 64).value
    ),
    "isotropic_baseline": lambda: torch.tensor(rgfast.isotropic_baseline(20, 20).effective_rank),
    "SecondMoments": lambda: rgfast.SecondMoments().update(layers).rank_measures(0).effective_rank,
    "cka": lambda: rgfast.cka(x, y),
    "cka by the reference": lambda: rgfast.cka(x, y, impl="reference"),
    "RBF": lambda: rgfast.cka(x, y, kernel="rbf"),
    "hsic": lambda: rgfast.hsic(x, y),
    "cka_matrix": lambda: rgfast.cka_matrix(layers),
    "kernel_drift": lambda: rgfast.kernel_drift(layers),
    "kernel_change": lambda: rgfast.kernel_change(layers),
    "minibatch_cka": lambda: rgfast.minibatch_cka(layers, batch_size=64),
    "CKAAccumulator": lambda: rgfast.CKAAccumulator(pairs="all").update(layers).finalize().matrix,
    "CKAAccumulator by features": lambda: (
        rgfast.CKAAccumulator(route="features").update(layers).finalize().drift
    ),
    "MinibatchCKAAccumulator": lambda: (
        rgfast.MinibatchCKAAccumulator(batch_size=64).update(layers).finalize()
    ),
    "residual_mlp": lambda: rgfast.residual_mlp(x, up, None, down, None),
    "residual_mlp by the reference": lambda: rgfast.residual_mlp(x, up, None, down, None, impl="reference"),
    "residual_stack": lambda: rgfast.residual_stack(x, [up, up], None, [down, down], None),
    "gradient of a rank": lambda: gradient(rgfast.effective_rank),
    "gradient of CKA": lambda: gradient(lambda leaf: rgfast.cka(leaf, y)),
    "gradient of a block": lambda: gradient(lambda leaf: rgfast.residual_mlp(leaf, up, None, down, None)),
    "a chain": lambda: torch.tensor(rgfast.MarkovChain(rows).relaxation_time),
    "autocorrelation": lambda: chain.autocorrelation(lags),
    "mutual_information": lambda: torch.tensor(chain.mutual_information(3)),
    "sample": lambda: chain.sample(5000, 12, torch.Generator().manual_seed(1)),
    "posterior": posterior,
    "captured_fraction": lambda: chains.captured_fraction(
        posterior().log(), posterior(), hidden, chain.stationary
    ),
    "ResidualStack": lambda: stack(many).detach(),
    "probe": lambda: probed(model, many, layers=["0", "2"]),
    "probe of targets": lambda: probed(model, x, layers=["0", "2"], targets={"y": y}),
    "probe by samples": lambda: probed(stack, many, views=["position"]),
}
torch.randn(1000, 1000) @ torch.randn(1000, 1000)
torch.randn(1 << 20).exp().sum()
np.ones((500, 500)) @ np.ones((500, 500))
want = {name: run() for name, run in OPS.items()}
assert torch.get_num_threads() == 2
failed = []
for name, run in OPS.items():
    child = os.fork()
    if child == 0:
        torch.manual_seed(0)
        os._exit(0 if torch.allclose(run(), want[name], rtol=1e-5, atol=1e-6, equal_nan=True) else 1)
    end = time.monotonic() + 60
    done, status = os.waitpid(child, os.WNOHANG)
    while not done and time.monotonic() < end:
        time.sleep(0.01)
        done, status = os.waitpid(child, os.WNOHANG)
    if not done:
        os.kill(child, 9)
        os.waitpid(child, 0)
        failed.append(f"{name} waits")
    elif status:
        failed.append(f"{name} ended with {status}")
assert torch.get_num_threads() == 2
print(failed)
"""

LOCKED = """
import os
import threading
import warnings

warnings.simplefilter("ignore")
import torch
from rgfast.runtime import threads

torch.set_num_threads(2)
inside, leave = threading.Event(), threading.Event()


def work():
    with threads.one_thread():
        inside.set()
        leave.wait()


worker = threading.Thread(target=work)
worker.start()
inside.wait()
child = os.fork()
if child == 0:
    with threads.one_thread():
        os._exit(0 if torch.get_num_threads() == 1 else 1)
status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
leave.set()
worker.join()
print(status, torch.get_num_threads())
"""


def run(code, timeout):
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=timeout, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_every_op_answers_in_a_forked_child():
    assert run(CODE, 500) == "[]"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_lock_that_another_thread_had_is_free_in_the_child():
    assert run(LOCKED, 60) == "0 2"
