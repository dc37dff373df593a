"""Saved activations are compared as the models are that they were saved from."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import rgfast
from rgfast.probing.sources import activations

A, B = ["blocks.0:input", "blocks.0", "blocks.1", "blocks.2"], ["blocks.0:input", "blocks.0", "blocks.1"]
N, T = 50, 7


def compared(a, b, *batches, **options):
    return rgfast.compare(a, b, *batches, progress=False, **options)


def same(found, want, tolerance=1e-12):
    """All numbers of two results are the same."""
    assert found.views == want.views
    assert set(found.dataset.data_vars) == set(want.dataset.data_vars)
    for name in want.dataset.data_vars:
        x, y = found.dataset[name].values, want.dataset[name].values
        assert x.shape == y.shape
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance, err_msg=name)


@pytest.fixture
def pair(kit):
    return kit.Encoder(6, 3), kit.Encoder(9, 2, seed=1)


@pytest.fixture
def tokens():
    return torch.randint(1, 30, (N, T), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def saved(kit, pair, tokens):
    """The layers of both models by name, ``[N, T, D]``."""
    layers = [kit.stored(model, names, [tokens]) for model, names in zip(pair, (A, B), strict=True)]
    return [
        {name: x for name, (x,) in zip(names, found, strict=True)}
        for names, found in zip((A, B), layers, strict=True)
    ]


def some(saved, order):
    return {name: x[order] for name, x in saved.items()}


def requests(folder, saved, lengths):
    """One file per sequence, of its own length."""
    folder.mkdir()
    for k, length in enumerate(lengths):
        one = {name: x[k, :length].contiguous() for name, x in saved.items()}
        save_file(one, folder / f"request-{k}.safetensors")
    return rgfast.Activations(folder, "T D", files="requests")


@pytest.mark.parametrize("route", ["moments", "samples"])
def test_the_numbers_are_those_of_the_models(pair, tokens, saved, route):
    options = {
        "measures": ["cka", "cka_biased", "rsa", "mutual_knn"],
        "views": ["position", "pooled", "mean_pooled", "flattened"],
        "groups": 4,
        "null": 5,
        "sample_limit": 40,
        "k": 3,
        "route": route,
    }
    a, b = (rgfast.Activations(x, "N T D", ids=range(N)) for x in saved)
    found = compared(a, b, **options)
    same(found, compared(*pair, {"input_ids": tokens}, **options))
    assert (found.layers_a, found.layers_b) == (tuple(A), tuple(B))
    assert found.notes == ()
    assert found.provenance["a"]["model"] == "Activations"
    assert found.provenance["b"]["source"] == "memory"


def test_batches_that_each_side_cuts_otherwise_are_aligned(saved, monkeypatch):
    a, b = (rgfast.Activations(x, ids=range(N)) for x in saved)
    want = compared(a, b, batch_size=1000)
    monkeypatch.setattr(activations, "_BLOCK", a.nbytes // N * 7)
    sizes = [[len(batch) for batch in x.batches(1000)] for x in (a, b)]
    assert sizes[0] != sizes[1]
    same(compared(a, b, batch_size=1000), want)


def test_layers_are_chosen_by_name_index_and_pattern(saved):
    a, b = (rgfast.Activations(x) for x in saved)
    whole = compared(a, b, views=["pooled"])
    found = compared(a, b, layers_a=[3, "blocks.0"], layers_b="re:blocks.[01]", views=["pooled"])
    assert (found.layers_a, found.layers_b) == (("blocks.2", "blocks.0"), ("blocks.0", "blocks.1"))
    want = whole.matrix("cka").values[[3, 1]][:, [1, 2]]
    np.testing.assert_allclose(found.matrix("cka").values, want, rtol=0, atol=1e-12)


def test_a_store_beside_itself_and_beside_a_second_reading_of_it(saved, tmp_path):
    for name, x in saved[0].items():
        np.save(tmp_path / f"{name}.npy", x.numpy())
    a, again = (rgfast.Activations(tmp_path, "N T D", ids=range(N)) for _ in range(2))
    for other in (a, again):
        found = compared(a, other, views=["pooled", "mean_pooled"])
        for view in found.views:
            assert np.abs(np.diag(found.matrix("cka", view)) - 1).max() <= 1e-12
        assert found.notes == ()
    assert found.provenance["a"]["source"] == str(tmp_path)
    assert rgfast.Comparison(compared(a, again).dataset).layers_a == a.layers


def test_stores_that_a_probe_kept(pair, tokens, tmp_path):
    kept = []
    for name, model in zip("ab", pair, strict=True):
        rgfast.probe(model, {"input_ids": tokens}, keep=tmp_path / name, progress=False)
        kept.append(rgfast.Activations(tmp_path / name))
    found = compared(*kept)
    same(found, compared(*pair, {"input_ids": tokens}))
    assert found.notes == ()


def test_other_sequences_are_refused_and_the_first_is_named(saved):
    ids = [f"doc-{k}" for k in range(N)]
    a = rgfast.Activations(saved[0], ids=ids)
    order = [*range(20), 21, 20, *range(22, N)]
    b = rgfast.Activations(some(saved[1], order), ids=[ids[k] for k in order])
    words = (
        "ids: b must hold the sequences of a in their order, and sequence 20 is 'doc-20' in a and 'doc-21'"
    )
    with pytest.raises(ValueError, match=words):
        compared(a, b)
    b = rgfast.Activations(saved[1], ids=[*ids[:49], "new"])
    with pytest.raises(ValueError, match="sequence 49 is 'doc-49' in a and 'new' in b"):
        compared(a, b)
    fewer = rgfast.Activations(some(saved[1], slice(40)), ids=ids[:40])
    with pytest.raises(ValueError, match="b must hold the sequences of a, and has 40 ids for 50"):
        compared(a, fewer)


def test_without_ids_the_order_is_taken_on_trust_and_said_to_be(saved):
    bare, b = rgfast.Activations(saved[0]), rgfast.Activations(saved[1], ids=range(N))
    want = compared(rgfast.Activations(saved[0], ids=range(N)), b)
    found = compared(bare, b)
    same(found, want)
    assert found.notes == ("a has no ids, so that the order of the sequences was taken on trust",)
    (note,) = compared(bare, rgfast.Activations(saved[1])).notes
    assert note == "a and b have no ids, so that the order of the sequences was taken on trust"
    with pytest.raises(ValueError, match="b must hold the sequences of a, and has 50 sequences for 30"):
        compared(rgfast.Activations(some(saved[0], slice(30))), b)


def test_ids_that_are_given(saved):
    a, b = (rgfast.Activations({**x, "uid": torch.arange(N)}) for x in saved)
    want = compared(a, b)
    for ids in ("uid", (range(N), np.arange(N))):
        ids = ids if isinstance(ids, str) else tuple(map(list, ids))
        found = compared(a, b, ids=ids)
        same(found, want)
        assert found.notes == ()
    other = rgfast.Activations({**saved[1], "uid": torch.arange(N).flip(0)})
    with pytest.raises(ValueError, match="sequence 0 is 0 in a and 49 in b"):
        compared(a, other, ids="uid")
    with pytest.raises(ValueError, match=r"ids: b has no entry 'uid' \(there is none\)"):
        compared(a, rgfast.Activations(saved[1]), ids="uid")
    with pytest.raises(ValueError, match="one for each sequence, got 30 for 50 sequences"):
        compared(a, b, ids=(list(range(30)), list(range(30))))


def test_requests_of_the_same_lengths_are_compared_row_by_row(kit, saved, tmp_path):
    lengths = [1 + k % T for k in range(N)]
    a, b = (requests(tmp_path / name, x, lengths) for name, x in zip("ab", saved, strict=True))
    options = {"measures": ["cka", "cka_biased"], "layers_a": A, "layers_b": B}
    found = compared(a, b, **options)
    assert found.views == ("pooled", "mean_pooled")
    rows = [[torch.cat([x[k, :n] for k, n in enumerate(lengths)]) for x in one.values()] for one in saved]
    want = kit.matrix_of(*rows).numpy()
    np.testing.assert_allclose(found.matrix("cka", "pooled").values, want, rtol=0, atol=1e-8)
    # The same sequences, padded where they are stored.
    mask = torch.arange(T) < torch.tensor(lengths)[:, None]
    padded = rgfast.Activations({**saved[1], "attention_mask": mask}, ids=b.ids)
    same(compared(a, padded, **options), found)


def test_of_other_lengths_means_are_compared(kit, saved, tmp_path):
    # The first ten are equally long, so that the first batch does not show it.
    mine = [T if k < 10 else 1 + k % T for k in range(N)]
    theirs = [T if k < 10 else 1 + (k + 1) % T for k in range(N)]
    a, b = requests(tmp_path / "a", saved[0], mine), requests(tmp_path / "b", saved[1], theirs)
    found = compared(a, b, layers_a=A, layers_b=B, batch_size=5)
    assert found.views == ("mean_pooled",)
    words = "row-by-row views were left out: sequence 10 ('request-10') has 4 positions in a and 5 in b"
    assert words in found.notes
    means = [
        [torch.stack([x[k, :n].double().mean(0) for k, n in enumerate(lengths)]) for x in one.values()]
        for one, lengths in zip(saved, (mine, theirs), strict=True)
    ]
    want = kit.matrix_of(*means).numpy()
    np.testing.assert_allclose(found.matrix("cka").values, want, rtol=0, atol=1e-8)
    with pytest.raises(
        ValueError, match=r"'pooled' compares row by row, and sequence 10 \('request-10'\) has"
    ):
        compared(a, b, views=["pooled"])


def test_masks_tokens_and_positions_of_one_side_leave_means(saved):
    keep = torch.arange(T) < torch.randint(1, T, (N, 1), generator=torch.Generator().manual_seed(0))
    a, b = rgfast.Activations({**saved[0], "attention_mask": keep}), rgfast.Activations(saved[1])
    assert compared(a, b).views == ("mean_pooled",)
    with pytest.raises(ValueError, match="other positions of the sequences are padding in b than in a"):
        compared(a, b, views=["position"])
    found = compared(a, b, padding=(None, "auto"))
    same(found, compared(rgfast.Activations(saved[0]), b))
    tokens = torch.arange(N * T).reshape(N, T)
    a, b = (rgfast.Activations({**x, "input_ids": tokens + k}) for k, x in enumerate(saved))
    found = compared(a, b)
    assert found.views == ("mean_pooled",)
    assert "other tokens: input_ids of b differs from that of a" in "\n".join(found.notes)
    short = rgfast.Activations({name: x[:, 1:] for name, x in saved[1].items()})
    assert "layer b.blocks.0:input has 6 positions" in "\n".join(compared(a, short).notes)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"batches": torch.zeros(4, 3)}, TypeError, "^batches must be left out, since the activations are"),
        ({"batches_b": [1]}, TypeError, "^batches_b must be left out, .* got list"),
        ({"axes": "N T D"}, ValueError, "axes: the activations are saved.*give axes= to Activations"),
        ({"axes": (None, "N T D")}, ValueError, "axes: the activations are saved"),
        ({"output": 0}, ValueError, "output: the activations are saved"),
        ({"layers_a": "nothing"}, ValueError, "^layers_a: no layer is called 'nothing'"),
        ({"layers_b": 9}, ValueError, "^layers_b must be an index from 0 to 2, got 9"),
    ],
)
def test_options_of_models_are_refused_by_name(saved, options, error, words):
    a, b = (rgfast.Activations(x) for x in saved)
    with pytest.raises(error, match=words):
        compared(a, b, **options)


def test_a_model_beside_activations_is_refused(pair, tokens, saved):
    acts = rgfast.Activations(saved[1])
    words = "both be models or both be Activations, got Encoder and Activations; save the layers of the model"
    with pytest.raises(TypeError, match=words):
        compared(pair[0], acts, {"input_ids": tokens})
    with pytest.raises(TypeError, match="got Activations and Encoder"):
        compared(acts, pair[0], {"input_ids": tokens})
    with pytest.raises(TypeError, match="batches must be an iterable of batches"):
        compared(*pair)


class Made:
    """A layer ``[n, T, D]`` that is made as it is read, and the most sequences that were read at a time."""

    def __init__(self, n, width, seed):
        self.shape, self.dtype, self.most, self._seed = (n, 3, width), np.dtype(np.float32), 0, seed

    def __getitem__(self, part):
        rows = range(*part.indices(self.shape[0]))
        self.most = max(self.most, len(rows))
        generator = np.random.default_rng(self._seed)
        mixed = generator.standard_normal((2, self.shape[2]))
        at = np.array(rows)[:, None, None] + np.array([0.0, 0.3, 0.6])[:, None]
        made = np.concatenate([np.sin(at), np.cos(1.7 * at)], -1) @ mixed
        return made.astype(np.float32)


def test_no_more_than_a_block_of_either_side_is_read_at_a_time(monkeypatch):
    monkeypatch.setattr(activations, "_BLOCK", 3 * 8 * 4 * 100)  # 100 sequences of 8 features
    made = Made(1000, 8, 0), Made(1000, 16, 1)
    found = compared(*(rgfast.Activations({"layer": x}) for x in made))
    assert [x.most for x in made] == [100, 50]
    assert found.dataset.attrs["sequences"] == 1000
    whole = [torch.from_numpy(x[:]) for x in made]
    want = compared(*(rgfast.Activations({"layer": x}) for x in whole))
    same(found, want)
