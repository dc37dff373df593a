import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr

import rgfast
from rgfast import cli
from rgfast.commands import errors

FILES = {"result.nc", "summary.csv", "report.html", "config.json"}
FIGURES = {"order_parameter.png", "drift.png", "cka.png", "spectra.png"}


def run(*words):
    return cli.main(["probe", *map(str, words)])


@pytest.fixture
def no_pictures(monkeypatch):
    """Drawing takes most of the time of a small probe."""
    monkeypatch.setattr("rgfast.commands.probe._draw", lambda path, draw: path.touch())
    monkeypatch.setattr(rgfast.ProbeResult, "report", lambda self, path: path.touch())


@pytest.fixture(scope="module")
def done(own_folder, own_tokens, tmp_path_factory):
    """A finished probe of the small model."""
    out = tmp_path_factory.mktemp("done") / "new" / "out"
    assert (
        run(own_folder, "--inputs", own_tokens, "--pairs", "all", "--groups", 2, "--out", out) == errors.DONE
    )
    return out


def test_the_folder_is_complete_and_the_numbers_are_those_of_the_function(done, own_folder, own_tokens):
    assert {path.name for path in done.iterdir()} == FILES | FIGURES
    assert list(done.parent.iterdir()) == [done]
    tokens = torch.from_numpy(np.load(own_tokens))
    model = rgfast.MaskedTokenModel.load(own_folder)
    batch = {"tokens": tokens, "mask": tokens == model.mask_token}
    expected = rgfast.probe(model, batch, mask="mask", pairs="all", groups=2, progress=False)
    found = rgfast.ProbeResult.load(done / "result.nc")
    for name in expected.dataset.data_vars:
        xr.testing.assert_identical(found.dataset[name], expected.dataset[name])
    table = pd.read_csv(done / "summary.csv")
    assert len(table) == len(expected.to_dataframe())
    assert "<h1>" in (done / "report.html").read_text()
    config = json.loads((done / "config.json").read_text(), parse_constant=pytest.fail)
    assert config["options"]["pairs"] == "all"
    assert config["inputs"]["arrays"]["tokens"] == [200, 4]
    assert config["environment"]["versions"]["rgfast"] == rgfast.__version__


def test_the_same_command_computes_nothing_again_and_another_is_refused(
    done, own_folder, own_tokens, capsys, monkeypatch
):
    before = {path.name: path.stat().st_mtime_ns for path in done.iterdir()}
    same = [own_folder, "--inputs", own_tokens, "--pairs", "all", "--groups", 2, "--out", done]
    monkeypatch.setattr("rgfast.commands.probe._run", lambda *_: pytest.fail("it ran"))
    assert run(*same) == errors.DONE
    told = capsys.readouterr()
    assert "nothing was computed" in told.out
    assert told.err == ""
    assert run(own_folder, "--inputs", own_tokens, "--out", done) == errors.WRONG
    assert "holds another result" in capsys.readouterr().err
    assert run(*same, "--limit", 100) == errors.WRONG
    assert "holds another result" in capsys.readouterr().err
    assert {path.name: path.stat().st_mtime_ns for path in done.iterdir()} == before


@pytest.mark.usefixtures("no_pictures")
def test_json_is_all_that_is_printed(own_folder, own_tokens, tmp_path, capsys):
    words = [own_folder, "--inputs", own_tokens, "--mask", "none", "--limit", 50, "--json"]
    assert run(*words, "--out", tmp_path / "out") == errors.DONE
    told = capsys.readouterr()
    found = json.loads(told.out, parse_constant=pytest.fail)
    assert told.err == ""
    assert found["sequences"] == 50
    assert list(found["views"]) == ["position", "pooled", "mean_pooled", "flattened"]
    assert found["views"]["pooled"]["n"] == [200, 200]
    result = rgfast.ProbeResult.load(tmp_path / "out" / "result.nc")
    np.testing.assert_array_equal(
        found["views"]["position"]["effective_rank"], result.order_parameter("position").values
    )
    assert run(*words, "--out", tmp_path / "out") == errors.DONE
    assert json.loads(capsys.readouterr().out) == found


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("control", ["random_weights", "shuffled_tokens"])
def test_a_control_is_probed_in_the_models_stead(
    own_folder, own_tokens, tmp_path, capsys, monkeypatch, control
):
    monkeypatch.chdir(tmp_path)
    words = [own_folder, "--inputs", own_tokens, "--control", control, "--seed", 3]
    assert run(*words) == errors.DONE
    assert f"with {control.replace('_', ' ')}: 200 sequences" in capsys.readouterr().out
    (out,) = (tmp_path / "runs").iterdir()
    assert out.name == f"probe-{own_folder.name}-{control}"
    found = rgfast.ProbeResult.load(out / "result.nc")
    assert (found.dataset.attrs["control"], found.dataset.attrs["control_seed"]) == (control, 3)
    tokens = torch.from_numpy(np.load(own_tokens))
    model = rgfast.MaskedTokenModel.load(own_folder)
    batch = {"tokens": tokens, "mask": tokens == model.mask_token}
    expected = rgfast.probe(model, batch, mask="mask", control=control, control_seed=3, progress=False)
    xr.testing.assert_identical(found.dataset.effective_rank, expected.dataset.effective_rank)
    config = json.loads((out / "config.json").read_text())
    assert config["options"]["control"] == control


@pytest.mark.usefixtures("no_pictures")
def test_a_share_is_hidden_at_every_position_alike(own_folder, tmp_path, capsys):
    np.save(tmp_path / "seen.npy", np.random.default_rng(1).integers(0, 5, (100, 4), dtype=np.uint8))
    words = [own_folder, "--inputs", tmp_path / "seen.npy", "--mask", "0.3", "--json", "--seed", 3]
    assert run(*words, "--out", tmp_path / "out") == errors.DONE
    views = json.loads(capsys.readouterr().out)["views"]
    assert views["masked"]["n"] == [30, 30]
    assert views["visible"]["n"] == [70, 70]
    assert views["masked"]["effective_rank"][0] == 0  # hidden tokens are alike before the first block


@pytest.mark.usefixtures("no_pictures")
def test_floats_enter_the_stack_itself(own_folder, tmp_path, capsys):
    stream = np.random.default_rng(2).normal(size=(60, 4, 8)).astype(np.float32)
    np.save(tmp_path / "stream.npy", stream)
    words = ["--views", "position", "--layers", "0", "3", "--no-refine", "--json"]
    assert (
        run(own_folder, "--inputs", tmp_path / "stream.npy", *words, "--out", tmp_path / "out") == errors.DONE
    )
    found = json.loads(capsys.readouterr().out)
    stack = rgfast.MaskedTokenModel.load(own_folder).stack
    expected = rgfast.probe(stack, torch.from_numpy(stream), layers=[0, 3], views=["position"], refine=False,
                            progress=False)  # fmt: skip
    assert (
        found["views"]["position"]["effective_rank"] == expected.order_parameter("position").values.tolist()
    )


@pytest.mark.usefixtures("no_pictures")
def test_views_of_rows_that_arrays_select(own_folder, tmp_path, capsys):
    rng = np.random.default_rng(4)
    arrays = {
        "tokens": rng.integers(0, 5, (80, 4)),
        "is_noun": rng.random((80, 4)) < 0.4,
        "pos_tags": rng.integers(0, 9, (80, 4)),
    }
    np.savez(tmp_path / "all.npz", **arrays)
    rows = {"nouns": "is_noun", "verbs": ("pos_tags", [3, 4]), "ends": "last"}
    words = ["--rows", "nouns=is_noun", "verbs=pos_tags:3,4", "ends=last", "--views", "pooled", *rows]
    words = [own_folder, "--inputs", tmp_path / "all.npz", *words, "--json"]
    assert run(*words, "--out", tmp_path / "out") == errors.DONE
    found = json.loads(capsys.readouterr().out)["views"]
    model = rgfast.MaskedTokenModel.load(own_folder)
    batch = {name: torch.from_numpy(value) for name, value in arrays.items()}
    want = rgfast.probe(model, batch, rows=rows, views=["pooled", *rows], progress=False)
    assert list(found) == ["pooled", *rows]
    for view in rows:
        assert found[view]["effective_rank"] == want.order_parameter(view).values.tolist()
    assert found["verbs"]["n"][0] == int(np.isin(arrays["pos_tags"], [3, 4]).sum())


@pytest.mark.usefixtures("no_pictures")
def test_named_arrays_with_a_mask_and_padding(own_folder, tmp_path, capsys):
    rng = np.random.default_rng(3)
    arrays = {
        "tokens": rng.integers(0, 5, (80, 4)),
        "hidden": rng.random((80, 4)) < 0.4,
        "attention_mask": (np.arange(4) < rng.integers(2, 5, (80, 1))).astype(np.int32),
    }
    np.savez(tmp_path / "all.npz", **arrays)
    words = [own_folder, "--inputs", tmp_path / "all.npz", "--mask", "hidden", "--json"]
    assert run(*words, "--out", tmp_path / "out") == errors.DONE
    assert (
        json.loads(capsys.readouterr().out)["views"]["pooled"]["n"]
        == [int(arrays["attention_mask"].sum())] * 2
    )
    counts = rgfast.ProbeResult.load(tmp_path / "out" / "result.nc").dataset.n
    kept = arrays["attention_mask"] != 0
    assert (
        counts.sel(view="masked", position=range(4)).values.tolist()
        == (arrays["hidden"] & kept).sum(0).tolist()
    )
    # An array that nothing reads is a mistake, most likely in its name.
    assert run(*words[:-3], "--out", tmp_path / "other") == errors.WRONG
    assert "no use for hidden" in capsys.readouterr().err


@pytest.mark.parametrize(
    "more", [["--layers", "0"], ["--views", "flattened"], ["--layers", "stack.blocks.*"]]
)
def test_one_layer_and_one_view_are_enough(own_folder, own_tokens, tmp_path, more):
    out = tmp_path / "out"
    assert run(own_folder, "--inputs", own_tokens, "--limit", 40, *more, "--out", out) == errors.DONE
    assert {path.name for path in out.iterdir()} >= FILES


def damaged(path):
    np.savez(path, tokens=np.zeros((50, 4), dtype=np.int64))
    path.write_bytes(path.read_bytes()[:300])


def bad_header(path):
    np.save(path, np.zeros((9, 4), dtype=int))
    path.write_bytes(path.read_bytes()[:10] + b"{" * 118)


def no_array(path):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("tokens.txt", "hello")


def endless(path):
    header = b"{'descr': '<i8', 'fortran_order': False, 'shape': (100000000000, 5), }"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("tokens.npy", b"\x93NUMPY\x01\x00v\x00" + header.ljust(117) + b"\n")


WRONG_ARRAYS = {
    "brackets.npy": (bad_header, "is damaged"),
    "files.npz": (no_array, "holds files that are none (tokens.txt)"),
    "endless.npz": (endless, "inputs must fit into memory"),
    "images.npy": (lambda path: np.save(path, np.zeros((9, 2, 4, 8))), "must be [B, D] or [B, T, D]"),
    "shape.npy": (lambda path: np.save(path, np.zeros((9, 3), dtype=int)), "does not take tokens [9, 3]"),
    "vocabulary.npy": (lambda path: np.save(path, np.full((9, 4), 6)), "tokens must lie in 0..5"),
    "negative.npy": (lambda path: np.save(path, np.full((9, 4), -1)), "tokens must lie in 0..5"),
    "one.npy": (lambda path: np.save(path, np.zeros((1, 4), dtype=int)), "at least 2 sequences"),
    "none.npy": (lambda path: np.save(path, np.zeros((0, 4), dtype=int)), "at least 2 sequences"),
    "scalar.npy": (lambda path: np.save(path, np.int64(3)), "one row a sequence"),
    "vector.npy": (lambda path: np.save(path, np.arange(4)), "whole numbers [n, T]"),
    "complex.npy": (lambda path: np.save(path, np.zeros((9, 4), dtype=complex)), "holds complex128"),
    "words.npy": (lambda path: np.save(path, np.array(["a", "b"])), "holds <U1"),
    "nan.npy": (lambda path: np.save(path, np.full((9, 4, 8), np.nan)), "288 NaN or infinite"),
    "width.npy": (lambda path: np.save(path, np.zeros((9, 4, 7))), "does not take x [9, 4, 7]"),
    "pickled.npy": (
        lambda path: np.save(path, np.array([{}, None]), allow_pickle=True),
        "holds pickled objects, which are not read",
    ),
    "pickled.npz": (lambda path: np.savez(path, tokens=np.array([{}, None])), "holds pickled objects"),
    "text.npy": (lambda path: path.write_text("hello"), "of another kind or empty"),
    "header.npy": (lambda path: path.write_bytes(b"\x93NUMPY\x01\x00\x10"), "is damaged"),
    "truncated.npz": (damaged, "is damaged"),
    "empty.npy": (lambda path: path.touch(), "of another kind or empty"),
    "empty.npz": (lambda path: np.savez(path), "at least one array"),
    "name.npz": (lambda path: np.savez(path, a=np.zeros((9, 4)), b=np.zeros((9, 4))), "takes tokens, x"),
    "rows.npz": (
        lambda path: np.savez(path, tokens=np.zeros((9, 4), dtype=int), hidden=np.zeros((8, 4), dtype=bool)),
        "as many rows in every array",
    ),
    "data.pt": (lambda path: path.touch(), "must be an .npy or .npz file"),
}


@pytest.mark.parametrize("name", WRONG_ARRAYS)
def test_wrong_arrays_are_one_sentence(name, own_folder, tmp_path, capsys):
    make, message = WRONG_ARRAYS[name]
    make(tmp_path / name)
    assert run(own_folder, "--inputs", tmp_path / name, "--out", tmp_path / "out") == errors.WRONG
    told = capsys.readouterr()
    assert message in told.err
    assert told.out == ""
    assert told.err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("kind", [">i8", "u2", ">u4"])
def test_files_of_every_byte_order_and_width(kind, done, own_folder, own_tokens, tmp_path, no_pictures):
    path, out = tmp_path / "tokens.npy", tmp_path / "out"
    np.save(path, np.load(own_tokens).astype(kind))
    assert run(own_folder, "--inputs", path, "--pairs", "all", "--groups", 2, "--out", out) == errors.DONE
    found, want = (rgfast.ProbeResult.load(folder / "result.nc").dataset for folder in (out, done))
    xr.testing.assert_identical(found.effective_rank, want.effective_rank)


def test_positions_are_checked_on_inputs_without_any(tmp_path, capsys):
    path, own_folder = tmp_path / "rows.npy", tmp_path / "model"
    generator = torch.Generator().manual_seed(0)
    rgfast.MaskedTokenModel(5, 4, width=8, depth=2, mixing="none", generator=generator).save(own_folder)
    np.save(path, np.random.default_rng(0).normal(size=(50, 8)).astype(">f4"))
    words = ["--inputs", path, "--positions", "3", "--out", tmp_path / "out"]
    assert run(own_folder, *words) == errors.WRONG
    assert "positions must be 0, the only position of these layers, got [3]" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--limit", "0"], "limit must be at least 1, got 0"),
        (["--limit", "1"], "at least 2 sequences"),
        (["--batch-size", "-4"], "batch-size must be at least 1, got -4"),
        (["--seed", "-1"], "seed must be at least 0, got -1"),
        (["--seed", str(2**63)], "seed must be at most 9223372036854775807, got 9223372036854775808"),
        (["--groups", "0"], "groups must be at least 1"),
        (["--groups", "150"], "groups"),
        (["--memory", "much"], "memory must be bytes or text such as '4GiB', got 'much'"),
        (["--memory", "1KiB"], "memory"),
        (["--layers", "9"], "layers must be an index from 0 to 3, got 9"),
        (["--layers", "stack.block.1"], "near it: stack.blocks.1"),
        (["--positions", "4"], "positions must be indices from 0 to 3"),
        (["--positions", "4", "--views", "pooled"], "positions must be indices from 0 to 3"),
        (["--positions", "some"], "positions must be auto, all, first, last or indices, got some"),
        (["--views", "hidden"], "mean_pooled, flattened, got 'hidden'"),
        (["--rows", "nouns"], "rows must be such as nouns=is_noun verbs=pos_tags:3,4 ends=last, "),
        (["--rows", "a=last", "a=first"], "each of another name, got a=last a=first"),
        (["--rows", "a=tags:x"], "rows must be such as nouns=is_noun"),
        (["--rows", "pooled=last"], "rows must have names that no other view has, got 'pooled'"),
        (["--rows", "a=missing"], "rows['a']: there is no entry 'missing' in the batch (tokens"),
        (["--rows", "a=last", "--views", "pooled"], "views must have a view of rows= (a), got pooled"),
        (["--pairs", "0-9"], "pairs must name layers 0 to 3"),
        (["--pairs", "some"], "pairs must be adjacent, all or such as 0-3 2-5, got some"),
        (["--mask", "2"], "mask must be a share between 0 and 1"),
        (["--mask", "missing"], "got 'missing'"),
        (["--length", "4"], "length cuts texts"),
        (["--device", "tpu9"], "device must be one that torch has here, got 'tpu9'"),
        (["--device", "cuda:99"], "device must be one that torch has here, got 'cuda:99'"),
        (["--checkpoint", "absent/state"], "checkpoint must be in a folder that exists"),
    ],
)
def test_wrong_options_are_one_sentence(
    words, message, own_folder, own_tokens, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert run(own_folder, "--inputs", own_tokens, *words, "--out", "out") == errors.WRONG
    told = capsys.readouterr()
    assert message in told.err
    assert told.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--inputs", "a.npy", "--text", "a.txt"], "not allowed with argument"),
        (["--inputs", "a.npy", "--limit", "many"], "invalid int value: 'many'"),
        (["--input", "a.npy"], "--input (did you mean --inputs?)"),
    ],
)
def test_wrong_usage(words, message, own_folder, capsys):
    with pytest.raises(SystemExit) as stop:
        run(own_folder, *words)
    assert stop.value.code == errors.WRONG
    assert message in capsys.readouterr().err


def test_wrong_models_are_one_sentence(own_folder, own_tokens, tmp_path, capsys):
    folders = {name: tmp_path / name for name in ("empty", "cut", "json", "unfit", "result", "other")}
    for folder in folders.values():
        folder.mkdir()
        if folder.name in ("cut", "unfit"):
            shutil.copytree(own_folder, folder, dirs_exist_ok=True)
    weights = folders["cut"] / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    config = json.loads((own_folder / "model.json").read_text())
    (folders["unfit"] / "model.json").write_text(json.dumps({**config, "width": 9}))
    (folders["json"] / "model.json").write_text("{")
    (folders["result"] / "config.json").write_text('{"format": "rgfast.reproduce/1"}')
    (folders["other"] / "config.json").write_text('{"a": 1}')
    expected = {
        "empty": "has neither",
        "cut": "cannot be loaded",
        "json": "is not JSON",
        "unfit": "cannot be loaded",
        "result": "holds a result of rgfast, which keeps no weights",
        "other": "no model_type",
    }
    cases = [(folders[name], message) for name, message in expected.items()]
    cases += [("bert-base-uncased", "nothing is downloaded"), (own_tokens, "must be a folder on disk")]
    for folder, message in cases:
        assert run(folder, "--inputs", own_tokens, "--out", tmp_path / "out") == errors.WRONG
        told = capsys.readouterr().err
        assert message in told
        assert told.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("no_pictures")
def test_what_is_in_the_way_of_the_folder(own_folder, own_tokens, tmp_path, capsys):
    (tmp_path / "file").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").touch()
    (tmp_path / "empty").mkdir()
    for name, message in (
        ("file", "is a file"),
        ("file/below", "file is a file"),
        ("full", "holds other files"),
    ):
        assert run(own_folder, "--inputs", own_tokens, "--out", tmp_path / name) == errors.WRONG
        assert message in capsys.readouterr().err
    assert run(own_folder, "--inputs", own_tokens, "--limit", 9, "--out", tmp_path / "empty") == errors.DONE
    assert {path.name for path in (tmp_path / "empty").iterdir()} >= FILES


@pytest.mark.usefixtures("no_pictures")
def test_a_failure_while_writing_leaves_nothing(own_folder, own_tokens, tmp_path, capsys, monkeypatch):
    def fail(self, path):
        raise RuntimeError("no more room")

    monkeypatch.setattr(rgfast.ProbeResult, "report", fail)
    assert (
        run(own_folder, "--inputs", own_tokens, "--limit", 9, "--out", tmp_path / "out") == errors.UNEXPECTED
    )
    assert "unexpected RuntimeError: no more room" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("no_pictures")
def test_ctrl_c_keeps_the_checkpoint_and_the_next_run_has_the_same_bits(own_folder, tmp_path, capsys):
    np.save(tmp_path / "many.npy", np.random.default_rng(4).integers(0, 6, (1500, 4)))
    words = [own_folder, "--inputs", tmp_path / "many.npy", "--batch-size", 1, "--checkpoint-every", 8]
    stopped = [*words, "--checkpoint", tmp_path / "state", "--out", tmp_path / "out"]
    command = [sys.executable, "-m", "rgfast", "probe", *map(str, stopped)]
    # A shell has what it runs in the background ignore Ctrl-C, and so would what that runs.
    heed = partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=heed) as process:
        until = time.monotonic() + 60
        while not (tmp_path / "state").exists() and time.monotonic() < until:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=60)
    assert process.returncode == errors.INTERRUPTED
    assert told == f"rgfast: interrupted; the same command goes on from {tmp_path / 'state'}\n"
    assert not (tmp_path / "out").exists()
    assert run(*stopped) == errors.DONE
    assert run(*words, "--out", tmp_path / "straight") == errors.DONE
    both = [rgfast.ProbeResult.load(tmp_path / name / "result.nc").dataset for name in ("out", "straight")]
    for name in both[0].data_vars:
        xr.testing.assert_identical(both[0][name], both[1][name])


def test_under_torchrun_every_rank_takes_its_share(done, own_folder, own_tokens, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [
        "-m",
        "rgfast",
        "probe",
        own_folder,
        "--inputs",
        own_tokens,
        "--pairs",
        "all",
        "--groups",
        "2",
    ]
    command += ["--checkpoint", tmp_path / "state", "--out", tmp_path / "out", "--json"]
    ended = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout)["sequences"] == 200
    found, alone = (
        rgfast.ProbeResult.load(folder / "result.nc").dataset for folder in (tmp_path / "out", done)
    )
    for name in ("effective_rank", "kernel_drift", "cka", "n"):
        np.testing.assert_allclose(
            found[name], alone[name], rtol=1e-6, atol=1e-6
        )  # fp32 batches of other sizes
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["out", "state.rank0of2", "state.rank1of2"]


@pytest.mark.usefixtures("no_pictures")
def test_moments_are_kept_where_asked_for(own_folder, own_tokens, tmp_path):
    words = [own_folder, "--inputs", own_tokens, "--limit", 60, "--mask", "none"]
    assert run(*words, "--moments", "--out", tmp_path / "with") == errors.DONE
    assert run(*words, "--out", tmp_path / "without") == errors.DONE
    kept, bare = (rgfast.ProbeResult.load(tmp_path / name / "result.nc") for name in ("with", "without"))
    assert kept.merge(kept).dataset.attrs["sequences"] == 120
    with pytest.raises(ValueError, match="cannot be merged"):
        bare.merge(bare)


@pytest.mark.usefixtures("no_pictures")
def test_a_hugging_face_folder_with_text(bert_folder, text_file, tmp_path, capsys, no_network):
    transformers = pytest.importorskip("transformers")
    words = [bert_folder, "--text", text_file, "--length", 9, "--mask", "none", "--out", tmp_path / "out"]
    assert run(*words) == errors.DONE
    assert capsys.readouterr().err == ""
    found = rgfast.ProbeResult.load(tmp_path / "out" / "result.nc")
    assert found.layers == ("encoder.layer.0:input", "encoder.layer.0", "encoder.layer.1")
    tokenizer = transformers.AutoTokenizer.from_pretrained(bert_folder)
    batch = tokenizer(
        text_file.read_text().splitlines(), padding=True, truncation=True, max_length=9, return_tensors="pt"
    )
    model = transformers.AutoModel.from_pretrained(bert_folder)
    expected = rgfast.probe(model, dict(batch), progress=False)
    for name in ("effective_rank", "cka", "n", "singular_values"):
        xr.testing.assert_identical(found.dataset[name], expected.dataset[name])
    assert int(found.dataset.n.sel(view="pooled", position=-1)) == int(batch["attention_mask"].sum())


@pytest.mark.usefixtures("no_pictures")
def test_special_tokens_and_padding_are_never_hidden(bert_folder, text_file, tmp_path, capsys, no_network):
    out = tmp_path / "out"
    assert run(bert_folder, "--text", text_file, "--mask", "0.5", "--out", out) == errors.DONE
    counts = rgfast.ProbeResult.load(out / "result.nc").dataset.n
    assert int(counts.sel(view="masked", position=0)) == 0  # [CLS]
    assert int(counts.sel(view="masked", position=1)) == 30
    # The same as ids, without a text: the folder's tokenizer says which token hides.
    np.save(tmp_path / "ids.npy", np.random.default_rng(5).integers(5, 20, (50, 6)))
    words = ["--inputs", tmp_path / "ids.npy", "--mask", "0.2", "--out", tmp_path / "ids"]
    assert run(bert_folder, *words) == errors.DONE
    counts = rgfast.ProbeResult.load(tmp_path / "ids" / "result.nc").dataset.n
    assert counts.sel(view="masked", position=range(6)).values.tolist() == [10] * 6


@pytest.mark.usefixtures("no_pictures")
def test_paragraphs_are_the_sequences_where_there_are_empty_lines(bert_folder, tmp_path, capsys):
    (tmp_path / "text.txt").write_text(
        "the flow\nfalls\n\n\na rank [MASK]\n \nshort and\nlong\n\n", encoding="utf-8-sig"
    )
    out = tmp_path / "out"
    assert run(bert_folder, "--text", tmp_path / "text.txt", "--json", "--out", out) == errors.DONE
    found = json.loads(capsys.readouterr().out)
    assert found["sequences"] == 3
    assert found["views"]["masked"]["n"] == [0, 1]  # the text's own


@pytest.mark.usefixtures("no_pictures")
def test_pickled_weights_are_refused_unless_asked_for(bert_folder, text_file, tmp_path, capsys):
    safetensors = pytest.importorskip("safetensors.torch")
    folder = shutil.copytree(bert_folder, tmp_path / "bert")
    torch.save(safetensors.load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    words = [folder, "--text", text_file, "--limit", 20, "--out", tmp_path / "out"]
    assert run(*words) == errors.WRONG
    assert "only pickled ones (pytorch_model.bin)" in capsys.readouterr().err
    assert run(*words, "--allow-pickle") == errors.DONE


def test_no_code_of_a_folder_runs(bert_folder, text_file, tmp_path, capsys):
    folder = shutil.copytree(bert_folder, tmp_path / "bert")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "code.Config", "AutoModel": "code.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Config: pass\nclass Model: pass\n"
    )
    assert run(folder, "--text", text_file, "--out", tmp_path / "out") == errors.WRONG
    assert "transformers cannot load" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()


def test_weights_and_texts_that_do_not_fit_a_hugging_face_folder(bert_folder, text_file, tmp_path, capsys):
    folder = shutil.copytree(bert_folder, tmp_path / "deeper")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    bare = shutil.copytree(bert_folder, tmp_path / "bare", ignore=shutil.ignore_patterns("token*"))
    empty = shutil.copytree(bert_folder, tmp_path / "empty", ignore=shutil.ignore_patterns("*.safetensors"))
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\nth\xe9\n")
    (tmp_path / "short.txt").write_text("one line\n")
    np.save(tmp_path / "ids.npy", np.full((9, 4), 20))
    np.save(tmp_path / "long.npy", np.full((9, 40), 5))
    for words, message in (
        ([folder, "--text", text_file], "do not fit its config.json (wanting encoder.layer.2"),
        ([bare, "--text", text_file], "has none"),
        ([empty, "--text", text_file], "has none"),
        ([bert_folder, "--text", tmp_path / "latin.txt"], "text must be in UTF-8"),
        ([bert_folder, "--text", tmp_path / "short.txt"], "at least 2 paragraphs"),
        ([bert_folder, "--text", text_file, "--length", 17], "length must be at most 16"),
        ([bert_folder, "--text", text_file, "--length", 2], "length must be at least 3"),
        ([bert_folder, "--text", tmp_path / "absent.txt"], "text must be a file"),
        ([bert_folder, "--inputs", tmp_path / "ids.npy"], "tokens must lie in 0..19"),
        ([bert_folder, "--inputs", tmp_path / "long.npy"], "does not take input_ids [9, 40]"),
    ):
        assert run(*words, "--out", tmp_path / "out") == errors.WRONG
        told = capsys.readouterr().err
        assert message in told
        assert told.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_that_finds_nothing(bert_folder, text_file, tmp_path, capsys):
    folder = shutil.copytree(bert_folder, tmp_path / "mute")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["post_processor"] = None
    tokenizer["normalizer"] = {"type": "Replace", "pattern": {"Regex": "."}, "content": ""}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert run(folder, "--text", text_file, "--out", tmp_path / "out") == errors.WRONG
    assert f"text must hold tokens, and the tokenizer of {folder} finds none" in capsys.readouterr().err


def test_text_needs_a_tokenizer(own_folder, text_file, tmp_path, capsys):
    assert run(own_folder, "--text", text_file, "--out", tmp_path / "out") == errors.WRONG
    assert "a MaskedTokenModel" in capsys.readouterr().err


def test_padding_and_positions_from_the_command_line(own_folder, tmp_path, no_pictures):
    """The own model takes no mask; the array beside its tokens says what is padding all the same."""
    model = rgfast.MaskedTokenModel.load(own_folder)
    tokens = np.random.default_rng(0).integers(0, model.states, (60, model.length))
    keep = np.arange(model.length) < np.arange(60)[:, None] % model.length + 1
    inputs = tmp_path / "inputs.npz"
    np.savez(inputs, tokens=tokens, attention_mask=keep)
    words = [own_folder, "--inputs", inputs, "--positions", "last", "--mask", "none"]
    for number, (more, rows) in enumerate((((), keep.sum()), ((["--padding", "none"]), keep.size))):
        out = tmp_path / str(number)
        assert run(*words, *more, "--out", out) == errors.DONE
        found = rgfast.ProbeResult.load(out / "result.nc").dataset
        assert int(found.n.sel(view="pooled").max()) == int(rows)
        assert int(found.n.sel(view="position").max()) == 60
    assert run(*words, "--axes", "N N D", "--out", tmp_path / "no") == errors.WRONG
