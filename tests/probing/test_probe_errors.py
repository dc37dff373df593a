"""What goes wrong is said in a sentence, and the model is left as it was found."""

import re

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import rgfast


def hooks_of(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


class Breaks(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5), nn.Linear(3, 3))

    def forward(self, x):
        torch.set_grad_enabled(False)
        self.body[0].train()
        y = self.body(x)
        if float(x[0, 0]) == 13.0:
            raise KeyError("from the model")
        return y


@pytest.mark.parametrize("fails", [False, True])
def test_hooks_training_flags_and_grad_mode_are_restored(fails):
    model = Breaks()
    model.body[2].eval()
    flags = [m.training for m in model.modules()]
    x = torch.randn(20, 3)
    if fails:
        x[10:, 0] = 13.0
    if fails:
        with pytest.raises(KeyError, match="from the model"):
            rgfast.probe(model, x, layers=["body.0", "body.2"], batch_size=10, progress=False)
    else:
        rgfast.probe(model, x, layers=["body.0", "body.2"], batch_size=10, progress=False)
    assert hooks_of(model) == 0
    assert [m.training for m in model.modules()] == flags
    assert torch.is_grad_enabled()


def test_evaluation_mode_without_gradients_inside():
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.9), nn.Linear(3, 3))
    seen = []
    model[0].register_forward_hook(lambda m, a, out: seen.append((m.training, out.requires_grad)))
    rgfast.probe(model, torch.randn(8, 3), layers=["0", "2"], progress=False)
    assert seen == [(False, False)]
    assert model.training


def test_nan_in_layer_3_at_position_7():
    class Poison(nn.Module):
        def __init__(self, bad):
            super().__init__()
            self.inner, self.bad = nn.Linear(4, 4), bad

        def forward(self, x):
            x = x + self.inner(x)
            if self.bad:
                x = x.index_put((torch.tensor([2, 5]), torch.tensor([7, 7])), torch.tensor(float("nan")))
            return x

    model = nn.Sequential(*(Poison(bad=k == 2) for k in range(4)))
    with pytest.raises(ValueError, match=r"got 8 NaN or infinite values in layer 3 at position 7 \(2,"):
        rgfast.probe(model, torch.randn(10, 9, 4), progress=False)
    assert hooks_of(model) == 0


def test_padding_may_hold_nan_but_not_rows_that_count():
    x = torch.randn(30, 4, 3)
    x[:, 3] = float("nan")
    keep = torch.ones(30, 4)
    keep[:, 3] = 0
    model = nn.Sequential(nn.Identity(), nn.Identity())
    rgfast.probe(model, {"input": x, "attention_mask": keep}, layers=["0", "1"], progress=False)
    with pytest.raises(ValueError, match="layer 0 at position 3"):
        rgfast.probe(model, {"input": x}, layers=["0", "1"], progress=False)


@pytest.mark.parametrize("route", ["auto", "moments"])
@pytest.mark.parametrize("positions", [[1], [0, 3], [-2], [7]])
def test_positions_out_of_range_are_refused_without_positions_too(positions, route):
    model = nn.Sequential(nn.Identity(), nn.Identity())
    x = torch.randn(20, 4)
    options = {"layers": ["0", "1"], "positions": positions, "route": route, "progress": False}
    with pytest.raises(ValueError, match="positions must be 0, the only position of these layers, got"):
        rgfast.probe(model, x, **options)
    with (
        pytest.raises(ValueError, match="positions must be 0"),
        rgfast.Probe(model, **{**options, "views": ["mean_pooled"]}),
    ):
        model(x)
    for fine in ([0], [-1], [0, -1]):
        found = rgfast.probe(model, x, **{**options, "positions": fine})
        assert found.dataset.n.values.tolist() == [[20]]


def test_positions_out_of_range_are_refused_by_views_without_any_and_by_samples():
    model = rgfast.ResidualStack(width=4, depth=2, mixing="none")
    x = torch.randn(20, 5, 4)
    for options in ({"views": ["pooled"]}, {"views": ["position"], "route": "samples"}):
        with pytest.raises(ValueError, match=r"positions must be indices from 0 to 4, got \[0, 5\]"):
            rgfast.probe(model, x, positions=[0, 5], progress=False, **options)


X = torch.randn(20, 5, 4)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"views": "position"}, ValueError, "views must be a sequence"),
        ({"views": ["positions"]}, ValueError, "views must be among"),
        ({"views": ["masked"]}, ValueError, "'masked' needs mask="),
        ({"positions": [5]}, ValueError, "positions must be indices from 0 to 4"),
        ({"positions": "some"}, ValueError, "positions must be 'auto', 'all'"),
        ({"pairs": "some"}, ValueError, "pairs must be"),
        ({"pairs": [(0, 9)]}, ValueError, "pairs must name layers 0 to 1"),
        ({"measures": ["rank"]}, ValueError, "measures must be 'all' or among"),
        ({"measures": []}, ValueError, "at least one measure"),
        ({"groups": 0}, ValueError, "groups must be at least 1"),
        ({"groups": 2.5}, TypeError, "groups must be a whole number"),
        ({"groups": 11}, ValueError, "at least 2 sequences each, got 11 groups of 20"),
        ({"memory": "much"}, ValueError, "memory must be bytes or text"),
        ({"mask": 3}, TypeError, "mask must be the name"),
        ({"mask": "hidden"}, ValueError, "no entry 'hidden' in the batch"),
        (
            {"mask": lambda entries: torch.ones(20, 5)},
            ValueError,
            r"mask must be bool \[20, 5\], got float32",
        ),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1"),
        (
            {"positions": 3},
            ValueError,
            "positions must be 'auto', 'all', 'first', 'last' or a sequence of indices, got 3",
        ),
        ({"positions": [1.5]}, ValueError, "positions must be 'auto', 'all', 'first', 'last' or a sequence"),
        ({"positions": []}, ValueError, "positions must be 'auto', 'all', 'first', 'last' or a sequence"),
        ({"measures": None}, ValueError, "measures must be 'all' or a sequence"),
        ({"refine": "yes"}, TypeError, "refine must be True, False or None, got 'yes'"),
        ({"checkpoint": 3}, TypeError, "checkpoint must be the path of a file, got int"),
        ({"checkpoint": "nowhere/at/all"}, ValueError, "checkpoint must be in a folder that exists"),
        ({"checkpoint": "/"}, ValueError, "checkpoint must be the path of a file, and / is a folder"),
        ({"checkpoint_every": 0}, ValueError, "checkpoint_every must be at least 1"),
    ],
)
def test_bad_options(options, error, message):
    model = nn.Sequential(nn.Identity(), nn.Identity())
    with pytest.raises(error, match=message):
        rgfast.probe(model, X, layers=["0", "1"], progress=False, **options)
    assert hooks_of(model) == 0


@pytest.mark.parametrize("options", [{"pairs": [(0, 2)]}, {"positions": "few"}, {"checkpoint": "no/where"}])
def test_bad_options_are_refused_before_any_work(options):
    class Never(nn.Module):
        def forward(self, x):
            raise AssertionError("the model ran")

    def batches():
        raise AssertionError("the batches were begun")
        yield

    model = nn.ModuleDict({"a": Never(), "b": Never()})
    with pytest.raises(ValueError, match="must"):
        rgfast.probe(model, batches(), layers=["a", "b"], progress=False, **options)


@pytest.mark.parametrize("shape", [(5, 0), (5, 0, 3), (5, 3, 0, 2), (5,)])
def test_activations_of_another_shape(shape):
    model = nn.Sequential(nn.Identity(), nn.Identity())
    with pytest.raises(ValueError, match=r"layer '0' must be \[B, D\].*got shape \(" + str(shape[0])):
        rgfast.probe(model, torch.zeros(shape), layers=["0", "1"], progress=False)


def test_layers_of_no_kind():
    with pytest.raises(ValueError, match=r"layers: '\(' is no regular expression"):
        rgfast.probe(nn.Sequential(nn.Identity()), X, layers="re:(", progress=False)
    with pytest.raises(
        TypeError, match="layers must be 'auto', a name, index, pattern or a sequence of them"
    ):
        rgfast.probe(nn.Sequential(nn.Identity()), X, layers=None, progress=False)


@pytest.mark.parametrize("where", ["model", "batches"])
def test_an_interrupt_restores_the_model(where):
    model = Breaks()
    seen = []

    def stop(module, args):
        seen.append(1)
        if where == "model" and len(seen) == 2:
            raise KeyboardInterrupt

    def batches():
        yield torch.randn(5, 3)
        yield torch.randn(5, 3)
        raise KeyboardInterrupt

    handle = model.body[1].register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        rgfast.probe(model, batches(), layers=["body.0", "body.2"], progress=False)
    handle.remove()
    assert hooks_of(model) == 0
    assert all(module.training for module in model.modules())
    assert torch.is_grad_enabled()


def test_probes_nest_but_not_in_themselves():
    model = nn.Sequential(nn.Identity(), nn.Identity())
    with (
        rgfast.Probe(model, layers=["0", "1"], progress=False) as outer,
        rgfast.Probe(model, layers=["1"], progress=False) as inner,
    ):
        model(X)
        with pytest.raises(RuntimeError, match="is watching already"), outer:
            pass
        model(X)
    assert hooks_of(model) == 0
    assert int(outer.result().dataset.n.max()) == int(inner.result().dataset.n.max()) == 40 * 5


def test_padding_of_sequences_of_one_token():
    model = nn.Sequential(nn.Identity(), nn.Identity())
    keep = torch.arange(20)[:, None] % 2
    found = rgfast.probe(
        model, {"input": X[:, :1], "attention_mask": keep}, layers=["0", "1"], progress=False
    )
    assert found.dataset.n.values.tolist() == [[10]]
    # A mask of positions says nothing about a layer that has none.
    found = rgfast.probe(
        nn.Sequential(nn.Flatten(), nn.Identity()),
        {"input": X, "attention_mask": torch.ones(20, 5)},
        layers=["0", "1"],
        progress=False,
    )
    assert found.dataset.n.values.tolist() == [[20]]


def test_longer_sequences_than_the_first_are_noted():
    model = nn.Sequential(nn.Identity(), nn.Identity())
    found = rgfast.probe(model, [X[:, :3], X, X], layers=["0", "1"], progress=False)
    assert "the first batch had 3 positions; further ones of longer sequences count in" in found.notes[0]
    assert found.notes[0] in repr(found)
    assert found.notes[0] in found._repr_html_()
    assert found.notes[0] in found.flow("position").caveats
    assert rgfast.probe(model, [X, X], layers=["0", "1"], progress=False).notes == ()


@pytest.mark.parametrize(
    ("batches", "error", "message"),
    [
        ([], ValueError, "at least 2 sequences in all, got n = 0"),
        ([torch.zeros(0, 4)], ValueError, "got n = 0"),
        (torch.randn(1, 4), ValueError, "got n = 1"),
        (3, TypeError, "batches must be an iterable"),
        ("text", TypeError, "batches must be an iterable"),
        ({"input": torch.zeros(3, 4), "other": torch.zeros(4, 4)}, ValueError, "same number of rows"),
        ({"text": "words"}, ValueError, "at least one array"),
        ([{"tokens": torch.zeros(3, 4)}], ValueError, "forward takes input, and the batch holds tokens"),
    ],
)
def test_bad_batches(batches, error, message):
    model = nn.Sequential(nn.Identity(), nn.Identity())
    with pytest.raises(error, match=message):
        rgfast.probe(model, batches, layers=["0", "1"], progress=False)


def test_no_module_and_no_tensor():
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got function"):
        rgfast.probe(lambda x: x, X, progress=False)

    class Words(nn.Module):
        def forward(self, x):
            return "words"

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.never = Words(), nn.Identity()

        def forward(self, x):
            self.words(x)
            return x

    with pytest.raises(TypeError, match="layer 'words' must return a floating tensor"):
        rgfast.probe(Model(), X, layers="words", progress=False)
    with pytest.raises(ValueError, match="never did not run in this forward"):
        rgfast.probe(Model(), X, layers="never", progress=False)
    flat = nn.Sequential(nn.Flatten(0), nn.Identity())
    with pytest.raises(ValueError, match=r"layer '0' must be \[B, D\].*got shape \(400,\)"):
        rgfast.probe(flat, X, layers=["0"], progress=False)


@pytest.mark.parametrize("shape", [(20, 4), (20, 1, 5, 4), (19, 5)])
def test_an_attention_mask_that_cannot_be_honored_is_refused(shape):
    model = nn.Sequential(nn.Identity(), nn.Identity())
    batch = [{"input": X, "attention_mask": torch.ones(shape)}]
    with pytest.raises(ValueError, match=r"attention_mask must be \[20, 5\], as layer '0' is, got shape"):
        rgfast.probe(model, batch, layers=["0", "1"], progress=False)


def test_flattened_and_lengths():
    model = nn.Sequential(nn.Identity(), nn.Identity())
    batches = [X, X[:, :3]]
    result = rgfast.probe(model, batches, layers=["0", "1"], progress=False)
    assert "flattened" not in result.views
    with pytest.raises(ValueError, match="'flattened' needs sequences of one length, got 3 after 5"):
        rgfast.probe(model, batches, layers=["0", "1"], views=["flattened"], progress=False)


def test_budget_is_stated_kept_and_refused_with_the_change_to_make(capsys):
    model = nn.Sequential(nn.Identity(), nn.Identity())
    x = torch.randn(64, 200, 8)
    options = {"layers": ["0", "1"], "views": ["position", "pooled"]}
    result = rgfast.probe(model, x, memory="300 kB", progress=True, **options)
    printed = capsys.readouterr().out
    positions = result.dataset.position.values[1:]
    assert 2 < len(positions) < 200
    assert positions[0] == 0
    assert positions[-1] == 199
    assert f"{len(positions)} log-spaced positions of 200 fit the memory" in printed
    assert result.dataset.n.sel(view="pooled", position=-1) == 64 * 200
    # Factors give way to positions.
    unrefined = rgfast.probe(model, x, memory="300 kB", refine=False, **options)
    assert "not refined: their factors do not fit" in printed
    assert unrefined.dataset.position.equals(result.dataset.position)
    capsys.readouterr()
    full = rgfast.probe(model, x, progress=False, **options)
    assert full.dataset.sizes["position"] == 201
    with pytest.raises(
        ValueError, match=r"200 positions of 2 layers need .* raise memory= or take fewer positions"
    ):
        rgfast.probe(model, x, memory="300 kB", positions="all", progress=False, **options)
    with pytest.raises(
        ValueError, match=r"need .*KiB, and memory allows 1.95 KiB; raise memory= or take pairs="
    ):
        rgfast.probe(model, x, memory=2000, pairs="all", progress=False, layers=["0", "1"])


def test_memory_does_not_grow_with_the_samples(token_model, token_data):
    sizes = []
    for repeat in (1, 5):
        with rgfast.Probe(token_model, mask="mask", progress=False) as p:
            for _ in range(repeat):
                p.run(token_data)
            assert p.nbytes <= p.plan.state_bytes
            sizes.append(p.nbytes)
    assert sizes[0] == sizes[1]


def test_own_loop_with_the_context_manager(token_model, token_data):
    with rgfast.Probe(token_model, mask="mask", progress=False) as p:
        assert p.plan is None
        for part in range(0, 300, 100):
            piece = {k: v[part : part + 100] for k, v in token_data.items()}
            p.note(mask=piece["mask"])
            token_model(piece["tokens"])
    assert hooks_of(token_model) == 0
    token_model.eval()
    want = rgfast.probe(token_model, token_data, mask="mask", batch_size=100, progress=False)
    for name in want.measures:
        assert want.dataset[name].equals(p.result().dataset[name])
    with pytest.raises(RuntimeError, match="inside the with block"):
        p.run(token_data)


def test_loaders_of_pairs_and_tuples(kit):
    torch.manual_seed(0)
    model = nn.Sequential(kit.Residual(4), kit.Residual(4))
    x, labels = torch.randn(50, 4), torch.arange(50)
    loader = DataLoader(TensorDataset(x, labels), batch_size=16)
    a = rgfast.probe(model, loader, progress=False)
    b = rgfast.probe(model, x, batch_size=16, progress=False)
    c = rgfast.probe(model, x.numpy(), batch_size=16, progress=False)
    assert a.dataset.effective_rank.equals(b.dataset.effective_rank)
    assert a.dataset.effective_rank.equals(c.dataset.effective_rank)
    assert re.search("ProbeResult of Sequential: 50 sequences", repr(a))


def test_what_a_layer_held_instead_of_floats_is_named():
    model = nn.Sequential(nn.Identity(), nn.Identity())
    with pytest.raises(TypeError, match=r"layer '0' must return a floating .*, got torch.complex64$"):
        rgfast.probe(model, X.to(torch.complex64), layers=["0"], progress=False)
    with pytest.raises(TypeError, match=r"layer '1:input' must .*, got a list of torch.complex64$"):
        rgfast.probe(model, X.to(torch.complex64), layers=["1:input"], progress=False)


def test_layers_without_numbers_and_batches_without_rows_are_refused():
    model = nn.Sequential(nn.Identity(), nn.Identity())
    with pytest.raises(ValueError, match="layer '0' must hold numbers, got a tensor on the meta device"):
        rgfast.probe(model, X.to("meta"), layers=["0", "1"], progress=False)
    for one in (torch.tensor(3.0), np.array(3.0)):
        with pytest.raises(ValueError, match="batches must have a row for every sequence, got a single"):
            rgfast.probe(model, one, layers=["0", "1"], progress=False)
