"""Positions of padded sequences: the last token of each, the first, and counting from it."""

import numpy as np
import pytest
import torch
from models import Block, Tokens, seeded
from test_probe_masks import GENERATOR, IDS, KEEP, LEFT, LENGTHS, B, T, rank_of, stream
from torch import nn

import rgfast


def probe(model, mask, **options):
    batch = {"input_ids": IDS, "attention_mask": mask}
    return rgfast.probe(
        model, [{k: v[part] for k, v in batch.items()} for part in PARTS], **options, progress=False
    )


PARTS = [slice(0, 17), slice(17, B)]
# The column of each sequence's last token, and of its first one.
ENDS = {"right": (KEEP, LENGTHS - 1, torch.zeros(B, dtype=torch.int64)),
        "left": (LEFT, torch.full((B,), T - 1), T - LENGTHS)}  # fmt: skip


@pytest.mark.parametrize("side", ENDS)
@pytest.mark.parametrize("asked", ["last", ["last"], [-1]])
def test_the_last_token_of_each_sequence(side, asked):
    mask, last, _ = ENDS[side]
    model = seeded(Tokens)
    result = probe(model, mask, positions=asked)
    rows = stream(model)[:, torch.arange(B), last]
    got = result.by_position("effective_rank", "position")
    assert got.position.values.tolist() == [T - 1]
    assert got.values[:, 0] == pytest.approx([rank_of(x) for x in rows], rel=1e-6)
    assert int(result.dataset.n.sel(view="position", position=T - 1)) == B
    assert any("position 6 is each sequence's last token that counts" in note for note in result.notes)
    # All tokens are pooled, each once.
    want = rgfast.probe(model, {"input_ids": IDS, "attention_mask": mask}, progress=False)
    np.testing.assert_allclose(
        result.order_parameter("pooled").values, want.order_parameter("pooled").values, rtol=1e-9
    )
    assert int(result.dataset.n.sel(view="pooled").max()) == int(mask.sum())


def test_further_positions_from_the_end():
    model = seeded(Tokens)
    result = probe(model, KEEP, positions=[-1, -3])
    enough = LENGTHS >= 3
    rows = stream(model)[:, enough][:, torch.arange(int(enough.sum())), LENGTHS[enough] - 3]
    got = result.by_position("effective_rank", "position")
    assert got.position.values.tolist() == [T - 3, T - 1]
    assert got.values[:, 0] == pytest.approx([rank_of(x) for x in rows], rel=1e-6)
    assert result.dataset.n.sel(view="position").values[1:].tolist() == [int(enough.sum()), B]


@pytest.mark.parametrize("side", ENDS)
def test_the_first_and_the_last_token(side):
    mask, last, first = ENDS[side]
    model = seeded(Tokens)
    result = probe(model, mask, positions=["first", "last"])
    got = result.by_position("effective_rank", "position").values
    for column, index in ((0, first), (1, last)):
        rows = stream(model)[:, torch.arange(B), index]
        assert got[:, column] == pytest.approx([rank_of(x) for x in rows], rel=1e-6)


def test_counting_from_the_first_token():
    model = seeded(Tokens)
    right = stream(model)
    left = {"input_ids": torch.stack([row.roll(T - int(n)) for row, n in zip(IDS, LENGTHS, strict=True)])}
    left["attention_mask"] = LEFT
    result = rgfast.probe(model, left, origin="token", progress=False)
    want = rgfast.probe(model, {"input_ids": IDS, "attention_mask": KEEP}, progress=False)
    for name in ("effective_rank", "kernel_drift", "n"):
        np.testing.assert_allclose(
            result.dataset[name].values, want.dataset[name].values, rtol=1e-9, atol=1e-12
        )
    assert result.by_position("effective_rank", "position").values[:, 2] == pytest.approx(
        [rank_of(x[KEEP[:, 2], 2]) for x in right], rel=1e-6
    )
    columns = rgfast.probe(model, left, progress=False)
    assert int(columns.dataset.n.sel(view="position", position=0)) == int(LEFT[:, 0].sum())
    assert int(result.dataset.n.sel(view="position", position=0)) == B


def test_hidden_tokens_and_targets_move_with_their_rows():
    model = seeded(Tokens)
    hidden = torch.rand(B, T, generator=GENERATOR) < 0.4
    batch = {"input_ids": IDS, "attention_mask": LEFT, "hidden": hidden, "label": IDS % 3}
    options = {"mask": "hidden", "targets": {"label": "label"}, "progress": False}
    result = rgfast.probe(model, [batch], positions=["first"], **options)
    first = T - LENGTHS
    masked = hidden[torch.arange(B), first]
    assert int(result.dataset.n.sel(view="masked", position=0)) == int(masked.sum())
    # A function of the token itself is known at the input.
    own = rgfast.probe(
        model, [{**batch, "label": model.embedding(IDS).detach()}], positions=["last"], **options
    )
    assert own.dataset.target_r2.sel(view="position", position=T - 1)[0, 0] > 1 - 1e-9


def test_without_padding_positions_are_columns():
    model = seeded(lambda: nn.Sequential(Block(), Block()))
    x = torch.randn(50, 5, 8, generator=GENERATOR)
    plain = rgfast.probe(model, x, positions=[4], progress=False)
    for asked in ("last", [-1], ["last"]):
        again = rgfast.probe(model, x, positions=asked, progress=False)
        assert again.dataset.effective_rank.equals(plain.dataset.effective_rank)
    assert rgfast.probe(model, x, positions="first", progress=False).dataset.position.values.tolist() == [
        -1,
        0,
    ]


def test_errors():
    model = seeded(Tokens)
    with pytest.raises(ValueError, match="positions must be 'auto', 'all', 'first', 'last' or a sequence"):
        probe(model, KEEP, positions="lats")
    with pytest.raises(ValueError, match="positions must be indices from 0 to 6, got \\[-8\\]"):
        probe(model, KEEP, positions=[-8])
    with pytest.raises(ValueError, match="must not name one column twice"):
        probe(model, KEEP, positions=[6, -1])
    with pytest.raises(ValueError, match="origin must be one of 'column', 'token', got 'end'"):
        probe(model, KEEP, origin="end")
