import json

import numpy as np
import pandas as pd
import pytest
import torch

import rgfast
from rgfast import cli
from rgfast.commands import errors


def run(*words):
    return cli.main(["compare", *map(str, words)])


@pytest.fixture(scope="module")
def other_folder(tmp_path_factory):
    """A model of other width and depth than the own one, of the same tokens."""
    folder = tmp_path_factory.mktemp("models") / "other"
    generator = torch.Generator().manual_seed(1)
    rgfast.MaskedTokenModel(5, 4, width=6, depth=2, w2_scale=0.5, generator=generator).save(folder)
    return folder


@pytest.fixture(scope="module")
def done(own_folder, other_folder, own_tokens, tmp_path_factory):
    """A finished comparison."""
    out = tmp_path_factory.mktemp("done") / "out"
    words = ["--inputs", own_tokens, "--measures", "cka", "rsa", "--null", 9, "--sample-limit", 60]
    assert run(own_folder, other_folder, *words, "--out", out) == errors.DONE
    return out, words


def test_the_folder_is_complete_and_the_numbers_are_those_of_the_function(
    done, own_folder, other_folder, own_tokens
):
    out, _ = done
    names = {"result.nc", "summary.csv", "report.html", "config.json", "cka.png", "rsa.png"}
    assert {path.name for path in out.iterdir()} == names
    tokens = torch.from_numpy(np.load(own_tokens))
    models = [rgfast.MaskedTokenModel.load(folder) for folder in (own_folder, other_folder)]
    expected = rgfast.compare(
        *models, {"tokens": tokens}, measures=["cka", "rsa"], null=9, sample_limit=60, progress=False
    )
    found = rgfast.Comparison.load(out / "result.nc")
    assert found.views == ("pooled", "mean_pooled")
    for name in expected.dataset.data_vars:
        assert np.array_equal(found.dataset[name], expected.dataset[name], equal_nan=True)
    assert len(pd.read_csv(out / "summary.csv")) == len(expected.to_dataframe())
    config = json.loads((out / "config.json").read_text(), parse_constant=pytest.fail)
    assert config["a"]["folder"] == str(own_folder)
    assert config["options"]["null"] == 9


def test_the_same_command_computes_nothing_again_and_another_is_refused(
    done, own_folder, other_folder, capsys, monkeypatch
):
    out, words = done
    monkeypatch.setattr("rgfast.commands.compare._run", lambda *_: pytest.fail("it ran"))
    assert run(own_folder, other_folder, *words, "--out", out) == errors.DONE
    assert "nothing was computed" in capsys.readouterr().out
    assert run(other_folder, own_folder, *words, "--out", out) == errors.WRONG
    assert "holds another result" in capsys.readouterr().err
    assert cli.main(["report", str(out), "--out", str(out.parent / "again.html")]) == errors.DONE
    assert "Best matches" in (out.parent / "again.html").read_text(encoding="utf-8")


def test_text_goes_through_each_models_tokenizer(bert_folder, text_file, tmp_path, capsys, no_network):
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(bert_folder)
    config = transformers.MPNetConfig(
        vocab_size=40, hidden_size=12, num_hidden_layers=3, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=20,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.MPNetModel(config).save_pretrained(tmp_path / "mpnet")
    tokenizer.save_pretrained(tmp_path / "mpnet")
    words = [bert_folder, tmp_path / "mpnet", "--text", text_file, "--json"]
    assert run(*words, "--out", tmp_path / "same") == errors.DONE
    told = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert (len(told["layers_a"]), len(told["layers_b"])) == (3, 4)
    assert list(told["views"]) == ["pooled", "mean_pooled"]
    assert np.array(told["views"]["pooled"]["cka"]["matrix"]).shape == (3, 4)
    assert told["views"]["pooled"]["cka"]["p"] == [None] * 3
    assert told["sequences"] == 60

    tokenizer.add_tokens(["zzz"])
    changed = json.loads((tmp_path / "mpnet" / "tokenizer.json").read_text())
    vocabulary = changed["model"]["vocab"]
    vocabulary["flow"], vocabulary["stack"] = vocabulary["stack"], vocabulary["flow"]
    (tmp_path / "mpnet" / "tokenizer.json").write_text(json.dumps(changed))
    assert run(*words, "--out", tmp_path / "other") == errors.DONE
    told = json.loads(capsys.readouterr().out)
    assert list(told["views"]) == ["mean_pooled"]
    assert any("other tokens" in note for note in told["notes"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["missing", "--text", "no.txt"], "text must be a file, and no.txt is none"),
        (["missing", "--inputs", "{tokens}"], "B must be a folder on disk, and missing is none"),
        (["{own}", "--inputs", "{tokens}", "--length", "3"], "length cuts texts"),
        (["{own}", "--inputs", "{tokens}", "--groups", "0"], "groups must be at least 1"),
        (["{own}", "--inputs", "{tokens}", "--layers-b", "nine"], "layers_b: there is no module 'nine'"),
        (["{own}", "--inputs", "{tokens}", "--inputs-b", "{few}"], "200 of them, got 50"),
        (["{own}", "--inputs", "{tokens}", "--memory", "1 kB", "--views", "position"], "memory: "),
    ],
)
def test_wrong_input_is_one_sentence(words, message, own_folder, own_tokens, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save(tmp_path / "few.npy", np.load(own_tokens)[:50])
    places = {"tokens": own_tokens, "own": own_folder, "few": tmp_path / "few.npy"}
    words = [word.format(**places) for word in words]
    assert run(own_folder, *words) == errors.WRONG
    told = capsys.readouterr()
    assert message in told.err
    assert told.err.count("\n") == 1
    assert not list(tmp_path.glob("runs/*"))


@pytest.fixture
def stores(tmp_path):
    """Two folders of activations of the same sequences."""
    for seed, name in enumerate("ab"):
        (tmp_path / name).mkdir()
        generator = np.random.default_rng(seed)
        for layer in ("first", "last"):
            np.save(tmp_path / name / f"{layer}.npy", generator.standard_normal((40, 3, 4 + seed)))
        np.save(tmp_path / name / "ids.npy", np.arange(40))
    return tmp_path / "a", tmp_path / "b"


def test_folders_of_activations_are_compared_without_text(stores, tmp_path, capsys):
    words = [*stores, "--axes", "N T D", "--layers-b", "last", "--out", tmp_path / "out"]
    assert run(*words, "--json") == errors.DONE
    told = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    want = rgfast.compare(
        *(rgfast.Activations(path, "N T D") for path in stores), layers_b="last", progress=False
    )
    assert np.array_equal(told["views"]["pooled"]["cka"]["matrix"], want.matrix("cka", "pooled"))
    assert (told["layers_a"], told["layers_b"], told["notes"]) == (["first", "last"], ["last"], [])
    assert run(*words) == errors.DONE
    assert "nothing was computed" in capsys.readouterr().out
    np.save(stores[1] / "last.npy", np.ones((40, 3, 6)))
    assert run(*words) == errors.WRONG
    assert "holds another result" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{a}", "{b}", "--length", "3"], "length cuts texts, and there is no --text"),
        (["{a}", "{b}", "--limit", "9"], "limit is of a model, and {a} is read as activations"),
        (["{a}", "{b}", "--device", "cuda"], "device: saved activations are measured on the CPU"),
        (["{a}", "{own}"], "one of --text and --inputs must say what the model in {own} runs on"),
        (["{own}", "{own}", "--inputs", "{tokens}", "--axes", "N T D"], "axes is of saved activations"),
        (["{own}", "{own}", "--inputs", "{tokens}", "--files", "layers"], "files is of saved activations"),
        (["{a}", "{other}"], "sequence 0 is 0 in a and 39 in b"),
    ],
)
def test_wrong_words_about_activations_are_one_sentence(
    words, message, stores, own_folder, own_tokens, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other").mkdir()
    np.save(tmp_path / "other" / "first.npy", np.zeros((40, 3, 4)))
    np.save(tmp_path / "other" / "ids.npy", np.arange(40)[::-1])
    places = {"a": stores[0], "b": stores[1], "own": own_folder, "tokens": own_tokens}
    places["other"] = tmp_path / "other"
    assert run(*(word.format(**places) for word in words)) == errors.WRONG
    told = capsys.readouterr()
    assert message.format(**places) in told.err
    assert told.err.count("\n") == 1
    assert not list(tmp_path.glob("runs/*"))
