"""What is wrong with saved activations is said before anything is measured, and names the file."""

import re

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import rgfast
from rgfast.probing.sources import activations as module

N, T, D = 6, 5, 4


def layers(n=N, t=T, d=D):
    return {"a": torch.randn(n, t, d), "b": torch.randn(n, t, d)}


def batches(folder, *parts):
    for number, part in enumerate(parts):
        save_file({k: x.contiguous() for k, x in part.items()}, folder / f"part{number}.safetensors")
    return folder


def requests(folder, *parts):
    for number, part in enumerate(parts):
        save_file({k: x.contiguous() for k, x in part.items()}, folder / f"request{number}.safetensors")
    return folder


def request(t, depth=3, d=D, **more):
    return {"token_ids": torch.arange(t), "hidden_states": torch.randn(t, depth, d), **more}


@pytest.fixture(autouse=True)
def nothing_is_measured(monkeypatch):
    monkeypatch.setattr(module, "_rows", lambda *_: pytest.fail("it read rows"))


def refused(message, *args, error=ValueError, **options):
    with pytest.raises(error, match=message):
        rgfast.Activations(*args, **options)


def test_a_truncated_file(tmp_path):
    batches(tmp_path, layers(), layers())
    path = tmp_path / "part1.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    refused(r"path: .*part1\.safetensors is truncated", tmp_path)
    path.write_bytes(b"")
    refused(r"part1\.safetensors is truncated or no \.safetensors file", tmp_path)
    folder = tmp_path / "npy"
    folder.mkdir()
    for name, x in layers().items():
        np.save(folder / f"{name}.npy", x.numpy())
    whole = (folder / "b.npy").read_bytes()
    (folder / "b.npy").write_bytes(whole[:-3])
    refused(r"path: .*b\.npy is truncated or damaged", folder)
    (folder / "b.npy").write_bytes(whole[:20])
    refused(r"path: .*b\.npy is truncated or damaged", folder)


def test_a_file_that_changes_on_the_way(tmp_path, monkeypatch):
    monkeypatch.undo()
    arrays, tensors = tmp_path / "arrays", tmp_path / "tensors"
    for folder in (arrays, tensors):
        folder.mkdir()
    for name, x in layers().items():
        np.save(arrays / f"{name}.npy", x.numpy())
    batches(tensors, layers(), layers())
    found = [rgfast.Activations(folder) for folder in (arrays, tensors)]
    np.save(arrays / "b.npy", np.ones((N, T, D + 1), np.float32))
    batches(tensors, layers(), {"a": torch.randn(N, T, D)})
    for acts, name in zip(found, ("b.npy", "part1.safetensors"), strict=True):
        with pytest.raises(ValueError, match=f"{re.escape(name)} has changed since it was opened"):
            rgfast.probe(acts, progress=False)


def test_nothing_is_unpickled(tmp_path):
    torch.save(layers(), tmp_path / "a.pt")
    refused(r"a\.pt is pickled, and nothing is unpickled; save arrays as \.npy", tmp_path)
    refused(r"a\.pt is pickled", tmp_path / "a.pt")
    np.save(tmp_path / "a.npy", np.array([{}], dtype=object))
    refused(r"a\.npy holds pickled objects", tmp_path)


def test_a_file_that_lacks_a_layer(tmp_path):
    batches(tmp_path, layers(), {"a": torch.randn(N, T, D)}, layers())
    refused(r"path: .*part1\.safetensors lacks 'b', which .*part0\.safetensors has", tmp_path)


def test_a_request_that_lacks_a_layer(tmp_path):
    requests(tmp_path, request(5), request(6, depth=2), request(7))
    message = r"'T L D' gives 'hidden_states' of .*request1\.safetensors of shape \(6, 2, 4\) 2 layers"
    refused(message, tmp_path, "T L D")
    other = tmp_path / "by layer"
    other.mkdir()
    one = {"token_ids": torch.arange(3), "a": torch.randn(3, D), "b": torch.randn(3, D)}
    requests(other, one, {k: x for k, x in one.items() if k != "b"})
    refused(r"path: .*request1\.safetensors lacks 'b'", other)


@pytest.mark.parametrize(
    ("odd", "message"),
    [
        (layers(d=D + 1), r"'N T D' gives 'a' of .*part1\.safetensors of shape \(6, 5, 5\) 5 features"),
        (
            {k: x.bfloat16() for k, x in layers().items()},
            r"path: 'a' of .*part1\.safetensors is bfloat16, and that of .*part0\.safetensors float32",
        ),
        ({**layers(), "c": torch.randn(N, T, D)}, r"part1\.safetensors has 'c', which .*part0"),
        ({**layers(), "label": torch.arange(N)}, r"part1\.safetensors and .* do not both have 'label'"),
        (
            {"a": torch.randn(N, T, D), "b": torch.randn(N - 1, T, D)},
            r"'N T D' gives 'b' of .*part1\.safetensors of shape \(5, 5, 4\) 5 samples, and 'a'",
        ),
        ({"a": torch.randn(N, D), "b": torch.randn(N, D)}, r"'N T D' has 3 axes, and 'a' of .*part1"),
    ],
    ids=["width", "dtype", "another layer", "another entry", "samples", "axes"],
)
def test_a_file_that_is_not_like_the_others(tmp_path, odd, message):
    batches(tmp_path, layers(), odd)
    refused(message, tmp_path)


def test_equal_axes_named_wrongly_are_refused_by_ids():
    whole = {k: torch.cat([x, x[:2]]) for k, x in layers(n=T).items()}  # 5 and 2 sequences of 5 positions
    parts = [{k: x[:T] for k, x in whole.items()}, {k: x[T:] for k, x in whole.items()}]
    assert len(rgfast.Activations(parts, "N T D", ids=range(T + 2))) == T + 2
    refused(
        r"ids must be one per sequence, got 7, and by axes there are 5 sequences",
        whole,
        "T N D",
        ids=range(7),
    )
    refused(r"5 positions and activations\[1\] 2, which is right only if", parts, "T N D", ids=range(7))
    by_file = [{**part, "ids": torch.arange(len(part["a"])) + 5 * k} for k, part in enumerate(parts)]
    refused(
        r"'T N D' gives 'a' of activations\[1\] of shape \(2, 5, 4\) 5 samples, and 'ids' .* shape \(2,\)",
        by_file,
        "T N D",
    )


def test_equal_axes_named_wrongly_are_refused_by_another_shape():
    refused(
        r"'T N D' gives 'a' of activations of shape \(8, 8, 4\) 8 samples, and 'input_ids' .* shape \(3, 8\)",
        {"a": torch.randn(8, 8, 4), "input_ids": torch.zeros(3, 8, dtype=torch.int64)},
        "T N D",
    )
    refused(
        r"'N D T' gives 'a' of activations of shape \(6, 4, 9\) 9 positions, and 'input_ids' .* has 4",
        {"a": torch.randn(N, 4, 9), "input_ids": torch.zeros(N, 4, dtype=torch.int64)},
        "N D T",
    )
    refused(
        r"'N D T' gives 'a' of activations\[1\] of shape \(6, 3, 4\) 3 features, and that of .* has 4",
        [{"a": torch.randn(N, 4, 4)}, {"a": torch.randn(N, 3, 4)}],
        "N D T",
    )
    refused(
        r"'L T D' gives 'hidden_states' of activations\[1\] of shape \(7, 5, 4\) 7 layers, and that of .* 5",
        [{"hidden_states": torch.randn(5, 5, D)}, {"hidden_states": torch.randn(7, 5, D)}],
        "L T D",
    )


def test_requests_whose_axes_are_equal_are_told_apart_by_others_or_refused(tmp_path):
    requests(tmp_path, request(3), request(7))
    assert len(rgfast.Activations(tmp_path).layers) == 3
    turned = [{**request(t), "hidden_states": torch.randn(3, t, D)} for t in (3, 7)]
    assert rgfast.Activations(turned).lengths.tolist() == [3, 7]
    both = [request(3), request(3)]
    refused(r"may be T L D or L T D, as far as its tokens tell; say which, as in axes='T L D'", both)
    assert len(rgfast.Activations(both, "T L D")) == 2
    refused(
        "5 positions, and 'token_ids' of .* has 4", [{**request(5), "token_ids": torch.arange(4)}], "T L D"
    )
    refused(
        "nothing tells the axes of 'hidden_states'",
        [{"hidden_states": torch.randn(5, 3, D)}] * 2,
        files="requests",
    )


def test_ids(tmp_path):
    refused(r"ids must be different, got 'x' twice \(in activations\)", layers(), ids=["x"] * N)
    refused("ids must be one per sequence, got 5", layers(), ids=range(5))
    refused("ids must be whole numbers or text, got 1.5", layers(), error=TypeError, ids=[1.5] * N)
    refused("ids must be all whole numbers or all text", layers(), error=TypeError, ids=[*range(5), "x"])
    refused("ids: there is no 'key' in activations", layers(), ids="key")
    parts = [{**layers(), "ids": torch.arange(N)}, {**layers(), "ids": torch.arange(N) + 5}]
    batches(tmp_path, *parts)
    refused(r"got 5 twice \(in .*part0\.safetensors and .*part1\.safetensors\)", tmp_path)
    folder = tmp_path / "requests"
    folder.mkdir()
    requests(folder, request(3), request(4))
    refused("there is no file of request 'request7'", folder, ids=["request0", "request7"])
    refused(r"ids: request .*request1\.safetensors is not among them", folder, ids=["request0"])
    refused("got 'request0' twice", folder, ids=["request0", "request1", "request0"], error=ValueError)


def test_layer_files_whose_sequences_are_in_another_order(tmp_path):
    for name, order in (("a", range(N)), ("b", reversed(range(N)))):
        save_file(
            {name: torch.randn(N, T, D), "ids": torch.tensor([*order])}, tmp_path / f"{name}.safetensors"
        )
    refused(r"b\.safetensors has the sequences in another order or others than .*a\.safetensors", tmp_path)


def test_what_a_file_is_is_not_guessed(tmp_path):
    batches(tmp_path, {"hidden": torch.randn(N, T, D)}, {"hidden": torch.randn(N, T, D)})
    refused(r"hold one array of the same name; say whether a file is a layer \(files='layers'\)", tmp_path)
    assert rgfast.Activations(tmp_path, files="layers").layers == ("part0", "part1")
    assert len(rgfast.Activations(tmp_path, files="batches")) == 2 * N
    refused("files must be one of", tmp_path, files="files")
    refused("axes must hold N", tmp_path, "T D", files="batches")


@pytest.mark.parametrize(
    ("source", "message", "error"),
    [
        ("nowhere", "there is no nowhere", FileNotFoundError),
        ({}, "at least one layer", ValueError),
        ({"ids": torch.arange(3)}, "holds no floats", ValueError),
        ({"a": [1.0, 2.0]}, "must be a tensor, an array or have shape", TypeError),
        ({"a": torch.randn(3, 4, dtype=torch.complex64)}, "of real numbers", TypeError),
        ({"a": np.array(["x"])}, "holds no floats", ValueError),
        ({"a": torch.randn(3, 0, 4)}, "has an empty axis", ValueError),
        ({"a": torch.randn(2, 3, 4, 5)}, "nothing tells the axes of 'a'", ValueError),
        (7, "must be a path, a mapping of arrays by layer", TypeError),
    ],
    ids=str,
)
def test_other_sources(source, message, error):
    refused(re.escape(message), source, error=error)


def test_folders_without_activations(tmp_path):
    refused(r"holds no \.npy and no \.safetensors file", tmp_path)
    np.save(tmp_path / "a.npy", np.ones((3, 4)))
    batches(tmp_path, layers())
    refused(r"holds \.npy and \.safetensors files", tmp_path)
    (tmp_path / "x.npz").write_bytes(b"")
    refused(r"path must be a folder, an \.npy or a \.safetensors file", tmp_path / "x.npz")


@pytest.mark.parametrize(
    ("axes", "message", "error"),
    [
        ("N T", "axes must hold D", ValueError),
        ("N T T D", "different letters with spaces", ValueError),
        ("NTD", "different letters with spaces", ValueError),
        (3, "axes must be a layout", TypeError),
        ({"a": "N T D", "b": "T D"}, "in every layout, or in none", ValueError),
        ({"c": "N T D"}, "no layer matches 'c'", ValueError),
        ("N D", "'N D' has 2 axes, and 'a' of activations has shape (6, 5, 4)", ValueError),
    ],
)
def test_axes(axes, message, error):
    refused(re.escape(message), layers(), axes, error=error)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"control": "random_weights"}, "control: 'random_weights' runs a model"),
        ({"control": "shuffled_tokens"}, "control: 'shuffled_tokens' runs a model"),
        ({"axes": "T N D"}, "axes: the activations are saved.*give axes= to Activations"),
        ({"output": 0}, "output: the activations are saved"),
        ({"layers": "blocks"}, "no layer is called 'blocks', the layers are a, b"),
        ({"layers": 2}, "an index from 0 to 1, got 2"),
        ({"layers": "sublayers"}, "no layer is called 'sublayers'"),
        ({"layers": ["a", 0]}, "must not repeat a layer, got 'a' 2 times"),
        ({"layers": []}, "at least one layer"),
    ],
)
def test_options_of_models(options, message):
    with pytest.raises(ValueError, match=message):
        rgfast.probe(rgfast.Activations(layers()), progress=False, **options)


def test_batches_beside_activations():
    with pytest.raises(TypeError, match=r"batches must be left out.*got list"):
        rgfast.probe(rgfast.Activations(layers()), [], progress=False)


def test_padding_of_ragged_requests_cannot_be_left_in():
    with pytest.raises(ValueError, match=r"these sequences differ in length.*leave out padding=None"):
        rgfast.probe(rgfast.Activations([request(3), request(5)], "T L D"), padding=None, progress=False)


def test_names_that_a_probe_uses():
    with pytest.raises(ValueError, match="must not call an array 'sequence'"):
        rgfast.probe(rgfast.Activations({"sequence": torch.randn(N, D)}), progress=False)
