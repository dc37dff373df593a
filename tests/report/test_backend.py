"""Figures under any MPLBACKEND, each in a process that has not imported matplotlib: a notebook sets its own
for all that it starts."""

import json
import os
import subprocess
import sys

import pytest

ABSENT = ["module://matplotlib_inline.backend_inline", "module://no_such.backend", "no_such", "qtagg", ""]
THERE = ["svg", "Agg", "module://their_backend"]
PROBED = """
import torch
torch.set_num_threads(1)
stack = rgfast.ResidualStack(8, 3, mixing="none")
result = rgfast.probe(stack, torch.randn(64, 3, 8), progress=False)
"""
DRAWS_ALL = """
from pathlib import Path
folder = Path(folder)
result.save(folder / "a.nc")
result.report(folder / "a.html")
from rgfast import cli
assert cli.main(["report", str(folder / "a.nc"), "--out", str(folder / "b.html")]) == 0
from rgfast.report.figures import plot_order_parameter, save_figure
save_figure(plot_order_parameter(result), folder / "a.png")
for draw in (result.plot_rank, result.plot_drift, result.plot_cka, result.plot_spectra, result.plot_heat_map):
    draw().figure.savefig(folder / f"{draw.__name__}.png")
print(os.environ["MPLBACKEND"])
"""
DRAWS_ONE = """
axes = result.plot_rank()
from matplotlib import pyplot
print(pyplot.get_backend(), pyplot.fignum_exists(axes.figure.number))
"""
# Everything but matplotlib is imported once, then each backend has a child of its own.
FORKS = """
import json, os, sys, traceback
import pandas, xarray
import rgfast, rgfast.probing
assert "matplotlib" not in sys.modules
for backend, (code, folder) in json.loads(sys.argv[1]).items():
    child = os.fork()
    if child == 0:
        os.environ["MPLBACKEND"] = backend
        code_of_exit = 1
        with open(f"{folder}/said", "w") as said:
            os.dup2(said.fileno(), 1)
            os.dup2(said.fileno(), 2)
            try:
                exec(code, {"folder": folder, "os": os, "rgfast": rgfast})
                code_of_exit = 0
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code_of_exit)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def run(code, backend, *words, path=""):
    environment = {k: v for k, v in os.environ.items() if k not in ("DISPLAY", "WAYLAND_DISPLAY")}
    environment |= {"MPLBACKEND": backend, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(path), environment.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *map(str, words)],
        capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """For each backend whether its process went well, its folder, and what it said."""
    if not hasattr(os, "fork"):
        pytest.skip("this system has no fork")
    top = tmp_path_factory.mktemp("backends")
    (top / "their_backend.py").write_text("from matplotlib.backends.backend_agg import *\n")
    cases = {}
    for number, backend in enumerate([*ABSENT, *THERE]):
        folder = top / str(number)
        folder.mkdir()
        cases[backend] = (PROBED + (DRAWS_ALL if backend in ABSENT else DRAWS_ONE), str(folder))
    codes = run(FORKS, "", json.dumps(cases), path=top).split()
    return {
        backend: (code, top / str(number), (top / str(number) / "said").read_text())
        for number, (backend, code) in enumerate(zip(cases, codes, strict=True))
    }


@pytest.mark.parametrize("backend", ABSENT)
def test_a_backend_that_is_absent_is_no_error(backend, said):
    code, folder, told = said[backend]
    assert code == "0", told
    assert told.splitlines()[-1:] == [backend]
    assert len(list(folder.glob("*.png"))) == 6


@pytest.mark.parametrize("backend", THERE)
def test_a_backend_that_is_there_is_honored(backend, said):
    code, _, told = said[backend]
    assert code == "0", told
    assert told.lower() == f"{backend.lower()} true\n"


def test_a_probe_by_the_command_draws_its_figures(own_model, tmp_path):
    code = """
import sys
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
