"""``rgfast probe`` on activations that exist already."""

import json

import numpy as np
import pytest
import torch
import xarray as xr
from safetensors.torch import save_file

import rgfast
from rgfast import cli
from rgfast.commands import errors

N, T, D = 40, 5, 6


def run(*words):
    return cli.main(["probe", *map(str, words)])


@pytest.fixture
def saved(tmp_path):
    folder = tmp_path / "saved"
    folder.mkdir()
    generator = torch.Generator().manual_seed(3)
    for k in range(3):
        x = torch.randn(T, N, D, generator=generator)
        np.save(folder / f"layer{k}.npy", x.numpy())
    np.save(folder / "hidden.npy", (torch.rand(N, T, generator=generator) < 0.5).numpy())
    return folder


@pytest.fixture
def no_pictures(monkeypatch):
    monkeypatch.setattr("rgfast.commands.probe._draw", lambda path, draw: path.touch())
    monkeypatch.setattr(rgfast.ProbeResult, "report", lambda self, path: path.touch())


def test_the_numbers_are_those_of_the_function(saved, tmp_path, capsys):
    out = tmp_path / "out"
    words = [saved, "--axes", "T N D", "--mask", "hidden", "--groups", 4, "--out", out]
    assert run(*words) == errors.DONE
    acts = rgfast.Activations(saved, "T N D")
    want = rgfast.probe(acts, mask="hidden", groups=4, progress=False)
    found = rgfast.ProbeResult.load(out / "result.nc")
    for name in want.dataset.data_vars:
        xr.testing.assert_equal(found.dataset[name], want.dataset[name])
    assert (out / "report.html").stat().st_size > 10_000
    config = json.loads((out / "config.json").read_text())
    assert config["model"] == {"folder": str(saved), "kind": "activations", "layers": list(acts.layers)}
    assert config["inputs"]["sequences"] == N
    capsys.readouterr()
    assert run(*words) == errors.DONE
    assert "nothing was computed" in capsys.readouterr().out
    np.save(saved / "layer1.npy", np.ones((T, N, D), np.float32))
    assert run(*words) == errors.WRONG
    assert "holds another result" in capsys.readouterr().err


@pytest.mark.usefixtures("no_pictures")
def test_requests_by_axes_and_what_a_model_keeps(own_folder, own_tokens, tmp_path):
    folder = tmp_path / "requests"
    folder.mkdir()
    for k in range(12):
        rows = torch.randn(3 + k % 4, 2, D)
        save_file({"hidden_states": rows}, folder / f"{k}.safetensors")
    assert run(folder, "--axes", "T L D", "--out", tmp_path / "a") == errors.DONE
    found = rgfast.ProbeResult.load(tmp_path / "a" / "result.nc")
    assert found.layers == ("hidden_states.0", "hidden_states.1")
    assert found.ids == tuple(map(str, range(12)))
    kept = tmp_path / "kept"
    words = ["--inputs", own_tokens, "--mask", "none", "--keep", kept, "--keep-bytes", "10KiB"]
    assert run(own_folder, *words, "--out", tmp_path / "b") == errors.DONE
    assert run(kept, "--out", tmp_path / "c", "--json") == errors.DONE
    found = rgfast.ProbeResult.load(tmp_path / "c" / "result.nc")
    assert found.ids == rgfast.Activations(kept).ids


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--control", "random_weights"], "control is of a model, and"),
        (["--length", 3], "length cuts texts, and there is no --text"),
        (["--limit", 3], "limit is of a model, and"),
        (["--device", "cuda"], "saved activations are measured on the CPU, got 'cuda'"),
        (["--mask", "0.15"], "mask must be none or the name of an entry (hidden), got '0.15'"),
        (["--axes", "T N D", "--layers", "block"], "no layer is called 'block'"),
        (["--axes", "N T D"], "'N T D' gives 'layer0' of"),
        (["--axes", "N T"], "axes must hold D (features)"),
    ],
)
def test_wrong_options_are_one_sentence(saved, tmp_path, words, message, capsys):
    words = words if "--axes" in words else [*words, "--axes", "T N D"]
    assert run(saved, *words, "--out", tmp_path / "out") == errors.WRONG
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_folders_that_are_no_activations(own_folder, own_tokens, tmp_path, capsys):
    assert run(own_folder) == errors.WRONG
    assert "one of --text and --inputs must say what the model in" in capsys.readouterr().err
    assert run(tmp_path / "nowhere") == errors.WRONG
    assert "there is no" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert run(tmp_path / "empty") == errors.WRONG
    assert "holds no .npy and no .safetensors file" in capsys.readouterr().err
    words = [own_folder, "--inputs", own_tokens, "--files", "layers", "--out", tmp_path / "out"]
    assert run(*words) == errors.WRONG
    assert "files is of saved activations" in capsys.readouterr().err
