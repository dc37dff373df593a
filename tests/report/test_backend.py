"""Figures under any MPLBACKEND, in fresh processes: a notebook sets its own for all that it starts."""

import os
import subprocess
import sys

import pytest

PROBED = """
import sys, torch, rgfast
stack = rgfast.ResidualStack(8, 3, mixing="none")
result = rgfast.probe(stack, torch.randn(64, 3, 8), progress=False)
"""
ABSENT = ["module://matplotlib_inline.backend_inline", "module://no_such.backend", "no_such", "qtagg", ""]


def run(code, backend, *words, path=None):
    environment = {k: v for k, v in os.environ.items() if k not in ("DISPLAY", "WAYLAND_DISPLAY")}
    environment["MPLBACKEND"] = backend
    if path is not None:
        environment["PYTHONPATH"] = os.pathsep.join([str(path), environment.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROBED + code, *map(str, words)],
        capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("backend", ABSENT)
def test_a_backend_that_is_absent_is_no_error(backend, tmp_path):
    code = """
from pathlib import Path
folder = Path(sys.argv[1])
result.save(folder / "a.nc")
result.report(folder / "a.html")
from rgfast import cli
assert cli.main(["report", str(folder / "a.nc"), "--out", str(folder / "b.html")]) == 0
from rgfast.report.figures import plot_order_parameter, save_figure
save_figure(plot_order_parameter(result), folder / "a.png")
for draw in (result.plot_rank, result.plot_drift, result.plot_cka, result.plot_spectra, result.plot_heat_map):
    draw().figure.savefig(folder / f"{draw.__name__}.png")
import os
print(os.environ["MPLBACKEND"])
"""
    assert run(code, backend, tmp_path).splitlines()[-1:] == [backend]
    assert len(list(tmp_path.glob("*.png"))) == 6


def test_a_probe_by_the_command_draws_its_figures(own_model, tmp_path):
    code = """
from rgfast import cli
assert cli.main(["probe", sys.argv[1], "--inputs", sys.argv[2], "--out", sys.argv[3]]) == 0
"""
    run(code, ABSENT[0], own_model / "own", own_model / "tokens.npy", tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").glob("*.png")} >= {"drift.png", "cka.png"}


@pytest.fixture
def own_model(tmp_path):
    import numpy as np

    import rgfast

    rgfast.MaskedTokenModel(5, 4, width=8, depth=2).save(tmp_path / "model" / "own")
    np.save(tmp_path / "model" / "tokens.npy", np.random.default_rng(0).integers(0, 6, (100, 4)))
    return tmp_path / "model"


@pytest.mark.parametrize("backend", ["svg", "Agg", "module://their_backend"])
def test_a_backend_that_is_there_is_honored(backend, tmp_path):
    (tmp_path / "their_backend.py").write_text("from matplotlib.backends.backend_agg import *\n")
    code = """
axes = result.plot_rank()
from matplotlib import pyplot
print(pyplot.get_backend(), pyplot.fignum_exists(axes.figure.number))
"""
    assert run(code, backend, path=tmp_path).lower() == f"{backend.lower()} true\n"
