"""What is refused, in whose words, and that both models are left as they came."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import rgfast


def compared(a, b, batches, **options):
    return rgfast.compare(a, b, batches, progress=False, **options)


@pytest.fixture
def pair(kit):
    return kit.Encoder(6, 2), kit.Encoder(4, 2, seed=1)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"layers_a": "nothing"}, ValueError, "layers_a: there is no module 'nothing'"),
        ({"layers_b": ["blocks.7"]}, ValueError, "layers_b: there is no module 'blocks.7'"),
        ({"layers_b": 2.5}, TypeError, "layers_b must be 'auto', a name"),
        ({"measures": ()}, ValueError, "measures must be a sequence of cka"),
        ({"measures": ["ckaa"]}, ValueError, "measures must be one of 'cka', 'cka_biased'.*got 'ckaa'"),
        ({"views": ["pool"]}, ValueError, "views must be among"),
        ({"views": ["masked"]}, ValueError, "views: 'masked' needs mask="),
        ({"groups": 0}, ValueError, "groups must be at least 1"),
        ({"groups": 40}, ValueError, "groups must hold at least 2 sequences each.*40 groups of 40"),
        ({"null": -1}, ValueError, "null must be at least 0"),
        ({"null": 2.0}, TypeError, "null must be a whole number"),
        ({"sample_limit": 3}, ValueError, "sample_limit must be at least 4"),
        ({"k": 0}, ValueError, "k must be at least 1"),
        ({"seed": -1}, ValueError, "seed must be at least 0"),
        ({"route": "fast"}, ValueError, "route must be one of 'auto', 'moments', 'samples'"),
        ({"memory": "much"}, ValueError, "memory must be bytes"),
        ({"memory": "10 kB", "route": "moments"}, ValueError, "memory: .*raise memory="),
        ({"memory": "10 kB", "route": "samples"}, ValueError, "memory: rows of .* sequences take"),
        ({"padding": "no_such"}, ValueError, "padding: there is no entry 'no_such'"),
        ({"padding": (None, 3)}, TypeError, "padding must be"),
        ({"ids": 3}, TypeError, "ids must be the name of a batch entry, or a pair of arrays"),
        ({"ids": "no_such"}, ValueError, "ids: batch 0 of batches has no entry 'no_such'"),
        ({"positions": [99]}, ValueError, "positions must be indices from 0 to 6"),
    ],
)
def test_options_are_refused_by_name(kit, pair, options, error, words):
    with pytest.raises(error, match=words):
        compared(*pair, kit.padded(40, 7), **options)


def test_what_is_no_model_is_named_by_its_argument(kit, pair):
    batches = kit.padded(40, 7)
    with pytest.raises(TypeError, match=r"^a must be a torch.nn.Module, got str"):
        compared("bert", pair[1], batches)
    with pytest.raises(TypeError, match=r"^b must be a torch.nn.Module, got NoneType"):
        compared(pair[0], None, batches)


def test_too_few_sequences_and_other_numbers_of_them(kit, pair):
    a, b = pair
    with pytest.raises(ValueError, match="at least 4 sequences in all, got n = 3"):
        compared(a, b, kit.padded(3, 7))
    with pytest.raises(ValueError, match="at least 4 sequences in all, got n = 0"):
        compared(a, b, [])
    batches = kit.padded(40, 7)
    with pytest.raises(ValueError, match=r"as many batches.*batches_b ended after 2, and batches goes on"):
        compared(a, b, batches, batches_b=batches[:2])
    with pytest.raises(ValueError, match="batches ended after 3, and batches_b goes on"):
        compared(a, b, batches, batches_b=[*batches, batches[0]])
    with pytest.raises(ValueError, match="batch 0 has 20 there and 16 in batches"):
        compared(a, b, batches, batches_b=kit.padded(40, 7, size=20))


def with_ids(batches, ids):
    """The batches with an entry ``uid`` of the ids of their sequences."""
    at, found = 0, []
    for batch in batches:
        count = len(batch["input_ids"])
        found.append({**batch, "uid": ids[at : at + count]})
        at += count
    return found


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor, "strings"])
def test_ids_are_compared_and_the_first_other_one_is_named(kit, pair, kind):
    a, b = pair
    numbers = list(range(100, 140))
    make = (lambda x: [f"doc-{i}" for i in x]) if kind == "strings" else kind
    batches = with_ids(kit.padded(40, 7), make(numbers))
    found = compared(a, b, batches, batches_b=with_ids(kit.padded(40, 7), make(numbers)), ids="uid")
    assert found.views == ("pooled", "mean_pooled")
    swapped = [*numbers[:20], numbers[21], numbers[20], *numbers[22:]]
    words = r"sequence 20 is '?(doc-)?120'? in batches and '?(doc-)?121'? in batches_b"
    with pytest.raises(ValueError, match=words):
        compared(a, b, batches, batches_b=with_ids(kit.padded(40, 7), make(swapped)), ids="uid")
    with pytest.raises(ValueError, match=words):
        compared(a, b, kit.padded(40, 7), batches_b=kit.padded(40, 7), ids=(make(numbers), make(swapped)))
    compared(a, b, kit.padded(40, 7), batches_b=kit.padded(40, 7), ids=(make(numbers), make(numbers)))
    with pytest.raises(ValueError, match="one for each sequence, got 30 for 40 sequences"):
        compared(a, b, kit.padded(40, 7), ids=(make(numbers[:30]), make(numbers[:30])))
    with pytest.raises(ValueError, match="has 39 ids for 40"):
        compared(a, b, kit.padded(40, 7), ids=(make(numbers), make(numbers[:39])))


def test_loaders_that_shuffle_need_ids(kit):
    a, b = kit.Mlp(5, 6, 2), kit.Mlp(5, 4, 2, seed=1)
    data = [{"x": torch.randn(5), "uid": k} for k in range(32)]
    plain, mixed = DataLoader(data, 8), DataLoader(data, 8, shuffle=True)
    with pytest.raises(
        ValueError, match=r"^batches_b must hold .* the loader shuffles them \(RandomSampler\)"
    ):
        compared(a, b, plain, batches_b=mixed)
    with pytest.raises(ValueError, match=r"^batches must hold"):
        compared(a, b, mixed, batches_b=plain)
    with pytest.raises(ValueError, match="ids: batches_b must hold the sequences of batches in their order"):
        compared(a, b, plain, batches_b=mixed, ids="uid")
    assert compared(a, b, mixed).matrix().shape == (3, 3)  # one loader for both
    assert compared(a, b, mixed, ids="uid").matrix().shape == (3, 3)


def test_other_tokens_are_never_compared_row_by_row(kit, pair):
    a, b = pair
    mine, theirs = kit.padded(40, 7), kit.padded(40, 7, seed=5)
    for one, other in zip(mine, theirs, strict=True):
        other["attention_mask"] = one["attention_mask"]
    assert compared(a, b, mine, batches_b=theirs).views == ("mean_pooled",)
    words = r"views: 'pooled' compares row by row, and the models have other tokens: batches\['input_ids'\]"
    with pytest.raises(ValueError, match=words):
        compared(a, b, mine, batches_b=theirs, views=["pooled", "mean_pooled"])
    later = [mine[0], theirs[1], *mine[2:]]
    with pytest.raises(
        ValueError, match="rows of the first batch correspond, and in batch 1 the models have"
    ):
        compared(a, b, mine, batches_b=later)


def test_other_floats_are_compared_row_by_row_only_if_that_is_asked_for():
    def stack(seed):
        return rgfast.ResidualStack(6, depth=2, mixing="none", generator=torch.Generator().manual_seed(seed))

    x = torch.randn(40, 5, 6)
    found = compared(stack(0), stack(1), x, batches_b=2 * x)
    assert found.views == ("mean_pooled",)
    assert "batches_b holds other inputs than batches" in found.notes[0]
    asked = compared(stack(0), stack(1), x, batches_b=2 * x, views=["pooled"])
    assert abs(asked.matrix().values[0, 0] - 1) < 1e-12  # scale is not seen
    with pytest.raises(
        ValueError, match=r"layer b.blocks.0:input has 4 positions where a.blocks.0:input has 5"
    ):
        compared(stack(0), stack(1), x, batches_b=x[:, 1:], views=["position"])


def test_not_finite_and_missing_layers_are_named(kit, pair):
    class Sometimes(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(kit.Block(6) for _ in range(2))
            self.calls = 0

        def forward(self, x):
            self.calls += 1
            x = self.blocks[0](x)
            return self.blocks[1](x) if self.calls == 1 else x

    x = torch.randn(40, 3, 6)
    with pytest.raises(ValueError, match=r"layers_b: blocks.1 did not run for this batch"):
        compared(rgfast.ResidualStack(6, depth=2, mixing="none"), Sometimes(), x, batch_size=8)
    a, b = pair
    with torch.no_grad():
        b.blocks[1].inner[2].weight[0, 0] = torch.inf
    for route in ("moments", "samples"):
        with pytest.raises(
            ValueError, match=r"activations must be finite.*\(b.blocks.1, sequences 0 to 15\)"
        ):
            compared(a, b, kit.padded(40, 7), route=route)


def state_of(*models):
    return [
        (module.training, len(module._forward_hooks), len(module._forward_pre_hooks))
        for model in models
        for module in model.modules()
    ]


@pytest.mark.parametrize("fails", [False, True])
def test_both_models_leave_as_they_came(kit, pair, fails):
    a, b = pair
    a.train()
    b.train()
    a.blocks[0].eval()
    b.register_forward_hook(lambda *_: None)
    weights = [copy.deepcopy(model.state_dict()) for model in (a, b)]
    before = state_of(a, b)
    batches = kit.padded(40, 7)
    if fails:
        batches[1] = {"input_ids": torch.full((16, 7), 99)}
        with pytest.raises(IndexError):
            compared(a, b, batches)
    else:
        compared(a, b, batches)
        compared(a, a, batches)
    assert state_of(a, b) == before
    assert torch.is_grad_enabled()
    for model, held in zip((a, b), weights, strict=True):
        assert all(torch.equal(value, held[name]) for name, value in model.state_dict().items())
    with torch.no_grad():
        compared(*pair, kit.padded(40, 7))
        assert not torch.is_grad_enabled()


def test_models_that_share_parts_and_write_into_them(kit):
    class Buffered(nn.Module):
        """Puts out the same memory every time."""

        def __init__(self, block):
            super().__init__()
            self.block, self.out = block, torch.zeros(0)

        def forward(self, x):
            y = self.block(x).detach()
            if self.out.shape != y.shape:
                self.out = torch.empty_like(y)
            return self.out.copy_(y)

    shared = Buffered(kit.Block(6))
    a, b = nn.Sequential(shared, nn.Tanh()), nn.Sequential(nn.Linear(6, 6), shared)
    x = torch.randn(64, 6)
    found = compared(a, b, x, layers_a=["0"], layers_b=["0", "1"], batch_size=16)
    with torch.no_grad():
        first, second = shared.block(x), b[0](x)
        third = shared.block(second)
    want = kit.matrix_of([first], [second, third])
    assert abs(found.matrix().values - want.numpy()).max() < 1e-6


def test_an_empty_batch_counts_nothing(kit, pair):
    batches = kit.padded(40, 7)
    empty = {name: value[:0] for name, value in batches[0].items()}
    found = compared(*pair, [batches[0], empty, *batches[1:]])
    assert found.dataset.attrs["sequences"] == 40
    assert np.array_equal(found.dataset.cka, compared(*pair, batches).dataset.cka, equal_nan=True)


def test_sequences_that_begin_at_other_tokens_are_not_compared_by_position(kit, pair):
    a, b = pair
    batches = kit.padded(40, 7)
    for batch in batches:
        batch["other_mask"] = batch["attention_mask"].clone()
        batch["other_mask"][:, 0] = 0
        batch["attention_mask"][:, 1] = batch["other_mask"][:, 1] = 1
    assert compared(a, b, batches, positions=["first"]).views == ("position", "pooled", "mean_pooled")
    with pytest.raises(
        ValueError, match="'position' compares row by row, and sequences begin at other tokens"
    ):
        compared(
            a,
            b,
            batches,
            positions=["first"],
            views=["position"],
            padding=("attention_mask", "other_mask"),
        )


def test_what_fits_neither_as_moments_nor_as_rows_says_so(kit):
    a, b = kit.Mlp(5, 16, 2), kit.Mlp(5, 16, 2, seed=1)
    few = compared(a, b, torch.randn(40, 5), memory="30 kB")
    assert few.dataset.attrs["route"] == "samples"
    assert "rows are held, since moments of all pairs do not fit the memory" in few.notes
    with pytest.raises(ValueError, match=r"^memory: .*\(rows are held of at most 4096 sequences\)"):
        compared(a, b, [torch.zeros(5000, 5)], memory="30 kB")
