"""``rgfast probe`` on encoder-decoders: the encoder runs, unless inputs have something for the decoder."""

import shutil

import numpy as np
import pytest
import xarray as xr

import rgfast
from rgfast import cli
from rgfast.commands import errors

pytestmark = pytest.mark.usefixtures("no_network", "no_pictures")


@pytest.fixture
def no_pictures(monkeypatch):
    monkeypatch.setattr("rgfast.commands.probe._draw", lambda path, draw: path.touch())
    monkeypatch.setattr(rgfast.ProbeResult, "report", lambda self, path: path.touch())


def run(*words):
    return cli.main(["probe", *map(str, words)])


@pytest.mark.parametrize("name", ["t5", "bart", "encoder"])
def test_the_encoder_runs_on_a_text(name, seq2seq_folders, text_file, tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    folder, out = seq2seq_folders[name], tmp_path / "out"
    assert run(folder, "--text", text_file, "--out", out) == errors.DONE
    told = capsys.readouterr().err
    assert (
        told == ""
        if name == "encoder"
        else told.startswith(f"rgfast: the encoder of {name.capitalize()[:1]}")
    )
    found = rgfast.ProbeResult.load(out / "result.nc")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(text_file.read_text().splitlines(), padding=True, return_tensors="pt")
    kind = transformers.AutoModel if name == "bart" else transformers.T5EncoderModel
    encoder = kind.from_pretrained(folder).get_encoder().eval()
    expected = rgfast.probe(
        encoder, {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}, progress=False
    )
    assert len(found.layers) == 3
    for measure in ("effective_rank", "cka", "n"):
        xr.testing.assert_identical(found.dataset[measure], expected.dataset[measure])


def test_positions_that_are_relative_have_no_limit(seq2seq_folders, text_file, tmp_path, capsys):
    words = ["--text", text_file, "--length", 500, "--out", tmp_path / "out"]
    assert run(seq2seq_folders["t5"], *words) == errors.DONE
    capsys.readouterr()
    assert run(seq2seq_folders["bart"], *words) == errors.WRONG
    assert "length must be at most 32" in capsys.readouterr().err


def test_arrays_for_the_decoder_run_both(seq2seq_folders, tmp_path, capsys):
    tokens = np.random.default_rng(0).integers(3, 18, (50, 6))
    np.savez(tmp_path / "both.npz", input_ids=tokens, decoder_input_ids=tokens[:, :4])
    np.save(tmp_path / "ids.npy", tokens)
    words = [seq2seq_folders["t5"], "--inputs", tmp_path / "both.npz", "--out", tmp_path / "both"]
    assert run(*words) == errors.WRONG
    assert "decoder.block.0" in capsys.readouterr().err  # which of the two stacks, it asks
    assert run(*words, "--layers", "decoder.block.*") == errors.DONE
    assert capsys.readouterr().err == ""
    found = rgfast.ProbeResult.load(tmp_path / "both" / "result.nc")
    assert found.layers == ("decoder.block.0", "decoder.block.1")
    words = ["--inputs", tmp_path / "ids.npy", "--out", tmp_path / "ids"]
    assert run(seq2seq_folders["t5"], *words) == errors.DONE
    assert "the encoder of T5Model is probed" in capsys.readouterr().err
    words = ["--inputs", tmp_path / "both.npz", "--out", tmp_path / "alone"]
    assert run(seq2seq_folders["encoder"], *words) == errors.WRONG
    assert "has no use for decoder_input_ids" in capsys.readouterr().err


def test_half_a_decoder_does_not_fit(seq2seq_folders, text_file, tmp_path, capsys):
    safetensors = pytest.importorskip("safetensors.torch")
    folder = shutil.copytree(seq2seq_folders["t5"], tmp_path / "half")
    weights = safetensors.load_file(folder / "model.safetensors")
    kept = {name: value for name, value in weights.items() if not name.startswith("decoder.block.1")}
    safetensors.save_file(kept, folder / "model.safetensors", {"format": "pt"})
    assert run(folder, "--text", text_file, "--out", tmp_path / "out") == errors.WRONG
    assert "do not fit its config.json" in capsys.readouterr().err
