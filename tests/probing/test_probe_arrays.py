"""Batches, targets and masks as arrays of every layout: probed as tensors are, or refused by name."""

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import rgfast

X = np.random.default_rng(0).normal(size=(30, 4)).astype(np.float32)
TOKENS = np.random.default_rng(1).integers(0, 7, size=(30, 5))
HIDDEN = np.random.default_rng(2).random((30, 5)) < 0.4


class Writes(nn.Module):
    """Adds to its input in place: fatal for memory that is mapped read-only."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        x += 1
        return self.two(torch.tanh(self.one(x)))


class Embeds(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.last = nn.Embedding(7, 6), nn.Linear(6, 6)

    def forward(self, tokens):
        return self.last(self.embed(tokens))


def probed(batches, model=Writes, layers=("one", "two"), **options):
    return rgfast.probe(
        model(), batches, layers=list(layers), progress=False, batch_size=8, **options
    ).dataset


def read_only(x):
    x = x.copy()
    x.flags.writeable = False
    return x


@pytest.fixture(scope="module")
def want():
    return probed(torch.from_numpy(X).clone())


@pytest.mark.parametrize(
    "layout",
    [
        lambda x: x[::-1].copy()[::-1],
        lambda x: np.flip(np.flip(x, 1).copy(), 1),
        lambda x: x.astype(">f4"),
        read_only,
        lambda x: np.ma.array(x.copy(), mask=False),
        lambda x: np.asfortranarray(x),
    ],
)
def test_layouts_of_whole_arrays_and_of_batches(layout, want):
    for batches in (
        layout(X),
        {"x": layout(X)},
        [layout(X[:10]), layout(X[10:])],
        [{"x": layout(X)}],
        [(layout(X),)],
    ):
        found = probed(batches)
        np.testing.assert_allclose(found.effective_rank, want.effective_rank, rtol=1e-6)
        np.testing.assert_allclose(found.kernel_drift, want.kernel_drift, rtol=1e-5)


def test_a_mapped_file_is_copied_a_batch_at_a_time(tmp_path, want):
    np.save(tmp_path / "x.npy", X)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    np.testing.assert_allclose(probed(mapped).effective_rank, want.effective_rank, rtol=1e-6)
    np.testing.assert_array_equal(mapped, X)


@pytest.mark.parametrize("kind", [np.uint16, np.int32, ">i8", ">u4", np.uint64])
def test_token_ids_of_every_width(kind):
    want = probed(torch.from_numpy(TOKENS), Embeds, ("embed", "last"))
    found = probed(TOKENS.astype(kind), Embeds, ("embed", "last"))
    np.testing.assert_array_equal(found.effective_rank, want.effective_rank)


MASKED = np.ma.array(X, mask=X > 1)


@pytest.mark.parametrize(
    ("batches", "words"),
    [
        (MASKED, "batches must have no masked values, got "),
        ([MASKED], "batches must have no masked values, got "),
        ([(MASKED,)], r"batches\[0\] must have no masked values, got "),
        ({"x": MASKED}, r"batches\['x'\] must have no masked values, got "),
        ([{"x": MASKED}], r"batches\['x'\] must have no masked values, got "),
        (X.astype(object), "batches must hold numbers or bool of a dtype that torch has, got dtype object"),
        (X.astype(np.longdouble), "batches must hold numbers or bool of a dtype that torch has, got dtype "),
        (
            {"x": X.astype(str)},
            r"batches\['x'\] must hold numbers or bool of a dtype that torch has, got dtype",
        ),
        (pd.DataFrame(X), r"batches must be .* got DataFrame \(take its .to_numpy\(\)\)"),
        ([pd.DataFrame(X)], r"batches must be a tensor or an array, got DataFrame \(take its"),
        ({"x": pd.DataFrame(X)}, r"batches\['x'\] must be a tensor or an array, got DataFrame"),
        (X.tolist(), "batches must hold tensors or arrays, got a list of numbers"),
        ([X.tolist()], "batches must hold tensors or arrays, got a list of numbers"),
        ([{"x": X.tolist()}], "batches must hold tensors or arrays, got a dict of numbers"),
    ],
)
def test_batches_that_are_refused(batches, words):
    with pytest.raises((TypeError, ValueError), match=f"^{words}"):
        probed(batches)


def test_targets_and_masks_of_every_layout():
    options = {"model": Embeds, "layers": ("embed", "last"), "views": ["position", "masked"]}
    tokens, hidden = torch.from_numpy(TOKENS), torch.from_numpy(HIDDEN)

    def run(target, mask):
        return probed({"tokens": tokens}, targets={"t": target}, mask=mask, **options)

    rows = np.arange(30)

    def of(mask):
        """A function of the entries that gives the part of ``mask`` that belongs to the batch."""
        at = {tuple(row): k for k, row in enumerate(TOKENS.tolist())}
        assert len(at) == len(rows)
        return lambda entries: mask[[at[tuple(row)] for row in entries["tokens"].tolist()]]

    want = run(torch.from_numpy(X), of(hidden))
    for target in (X[::-1].copy()[::-1], X.astype(">f4"), read_only(X), X.tolist(), list(X)):
        found = run(target, of(HIDDEN))
        np.testing.assert_allclose(found.target_r2, want.target_r2)
        np.testing.assert_array_equal(found.n, want.n)
    by_function = run(of(X), lambda entries: of(HIDDEN)(entries)[::-1].copy()[::-1].tolist())
    np.testing.assert_allclose(by_function.target_r2, want.target_r2)
    for target, words in (
        (np.ma.array(X, mask=X > 1), r"targets\['t'\] must have no masked values"),
        (lambda entries: np.ma.masked_all((8, 2)), r"targets\['t'\] must have no masked values"),
        (X.astype(object), r"targets\['t'\] must hold numbers"),
        (
            X.astype(complex),
            r"targets\['t'\] must be dense and of real numbers or labels, got torch.complex128",
        ),
        (pd.DataFrame(X), r"targets\['t'\] must be .* got DataFrame \(take its"),
        (lambda entries: 3.0, r"targets\['t'\] must have a row for every sequence"),
    ):
        with pytest.raises((TypeError, ValueError), match=f"^{words}"):
            run(target, of(HIDDEN))
    for mask, words in (
        (np.ma.array(HIDDEN, mask=HIDDEN), "mask must have no masked values"),
        (HIDDEN.astype(object), "mask must hold numbers or bool"),
        (HIDDEN.astype(int), "mask must be bool"),
    ):
        with pytest.raises((TypeError, ValueError), match=f"^{words}"):
            run(X, of(mask))


def test_an_attention_mask_that_is_noted_counts_as_array_and_list():
    keep = np.ones((30, 5), dtype=np.int64)
    keep[:, 3:] = 0
    counts = []
    for mask in (torch.from_numpy(keep), keep, keep.astype(">i2"), keep.tolist()):
        with rgfast.Probe(Embeds(), layers=["embed", "last"], views=["pooled"], progress=False) as probe:
            probe.note(attention_mask=mask)
            probe.model(torch.from_numpy(TOKENS))
        counts.append(probe.result().dataset.n.values.tolist())
    assert counts == [[[90]]] * 4


def test_digests_of_batches_are_those_of_their_values(tmp_path):
    for layout in (lambda x: x[::-1].copy()[::-1], lambda x: x.astype(">f4"), read_only):
        path = tmp_path / "state.npz"
        batches = [layout(X[:10]), layout(X[10:])]
        once = probed(batches, checkpoint=path)
        again = probed([X[:10].copy(), X[10:].copy()], checkpoint=path)
        np.testing.assert_array_equal(once.effective_rank, again.effective_rank)
        path.unlink()
