"""Axes of every order, and blocks that return several tensors: against rows stored by hooks of our own."""

from functools import partial

import pytest
import torch
from torch import nn

import rgfast


def run(model, batches, **options):
    return rgfast.probe(model.eval(), batches, progress=False, **options)


def hooked(model, names, *args, **kwargs):
    """What modules return, or are given first (``name:input``), in one forward."""
    found, handles = {}, []

    def keep_given(name, module, args):
        found.setdefault(name, args[0].clone())

    def keep_returned(name, module, args, output):
        found.setdefault(name, output)

    for name in names:
        module = model.get_submodule(name.removesuffix(":input"))
        if name.endswith(":input"):
            handles.append(module.register_forward_pre_hook(partial(keep_given, name)))
        else:
            handles.append(module.register_forward_hook(partial(keep_returned, name)))
    with torch.no_grad():
        model.eval()(*args, **kwargs)
    for handle in handles:
        handle.remove()
    return [found[name] for name in names]


def same_bits(first, second):
    for name in first.dataset.data_vars:
        a, b = (torch.from_numpy(r.dataset[name].values.copy()) for r in (first, second))
        assert torch.equal(a.nan_to_num(-7.0), b.nan_to_num(-7.0)), name


class Inside(nn.Module):
    """Takes [B, T, D], and works on [T, B, D] inside."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x.transpose(0, 1)).transpose(0, 1)


class Turning(nn.Module):
    """A block of [B, T, D] whose attention is of [T, B, D]."""

    def __init__(self, width=8):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 2)

    def forward(self, x):
        y = self.norm(x).transpose(0, 1)
        return x + self.attention(y, y, y, need_weights=False)[0].transpose(0, 1)


class Straight(Turning):
    """A block of [T, B, D]."""

    def forward(self, x):
        y = self.norm(x)
        return x + self.attention(y, y, y, need_weights=False)[0]


class Places(nn.Module):
    """Works on features in the last axis."""

    def __init__(self, width):
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, x):
        return x + torch.tanh(self.linear(self.norm(x)))


class Channels(nn.Module):
    """Works on features in axis 1."""

    def __init__(self, width, kind=nn.Conv2d):
        super().__init__()
        self.conv = kind(width, width, 3, padding=1)

    def forward(self, x):
        return x + torch.tanh(self.conv(x))


def encoder(kind="torch", depth=2, width=8):
    if kind == "torch":
        layer = nn.TransformerEncoderLayer(width, 2, 16)
        return Inside(nn.TransformerEncoder(layer, depth, enable_nested_tensor=False))
    blocks = {"attention": Straight, "plain": Places}[kind]
    return Inside(nn.Sequential(*[blocks(width) for _ in range(depth)]))


NAMES = {
    "torch": ["inner.layers.0:input", "inner.layers.0", "inner.layers.1"],
    "attention": ["inner.0:input", "inner.0", "inner.1"],
    "plain": ["inner.0:input", "inner.0", "inner.1"],
}


@pytest.mark.parametrize("kind", ["torch", "attention", "plain"])
def test_samples_stand_on_the_second_axis(kit, kind):
    torch.manual_seed(0)
    model, x = encoder(kind), torch.randn(70, 5, 8)
    layers = [y.transpose(0, 1) for y in hooked(model, NAMES[kind], x)]
    found = run(model, x)
    assert (found.dataset.attrs["sequences"], found.dataset.attrs["length"]) == (70, 5)
    kit.assert_equal_to(kit.brute([y[:, 3] for y in layers]), found.dataset, "position", 3)
    kit.assert_equal_to(
        kit.brute([y.mean(1, dtype=torch.float64) for y in layers]), found.dataset, "mean_pooled"
    )
    same_bits(found, run(model, x, axes="T N D"))
    same_bits(found, run(model, x, axes={"inner.*": "T N D"}))


@pytest.mark.parametrize("axes", [None, "T N D"])
def test_as_many_samples_as_positions_with_sequence_first_layers(kit, axes):
    torch.manual_seed(0)
    model, x = encoder(), torch.randn(40, 40, 8)
    layers = [y.transpose(0, 1) for y in hooked(model, NAMES["torch"], x)]
    found = run(model, x, axes=axes, positions=[3])
    kit.assert_equal_to(kit.brute([y[:, 3] for y in layers]), found.dataset, "position", 3)


def test_as_many_samples_as_positions_are_samples_first():
    torch.manual_seed(0)
    model, x = nn.Sequential(*[Places(8) for _ in range(2)]), torch.randn(20, 20, 8)
    same_bits(run(model, x), run(model, x, axes="N T D"))


def test_a_block_that_turns_axes_inside_is_samples_first():
    torch.manual_seed(0)
    model, x = nn.Sequential(Turning(), Turning()), torch.randn(70, 5, 8)
    same_bits(run(model, x), run(model, x, axes="N T D"))


def test_two_readings_are_refused():
    model = nn.Sequential(Turning(), Turning())
    with pytest.raises(ValueError, match=r"axes: layer '0:input' of shape \(9, 9, 8\) may be N T D or T N D"):
        run(model, torch.randn(9, 9, 8))
    x = torch.randn(9, 9, 8)
    same_bits(run(model, x, axes={"*": "N T D"}), run(model, x, axes="N H D"))


def test_a_sequence_first_batch_is_refused_until_it_is_said(kit):
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 2, enable_nested_tensor=False)
    x = torch.randn(5, 70, 8)
    with pytest.raises(ValueError, match=r"axes=\{'layers\.\*': 'T N D'\}"):
        run(model, [x])
    found = run(model, [x], axes="T N D")
    layers = [y.transpose(0, 1) for y in hooked(model, ["layers.0:input", "layers.0", "layers.1"], x)]
    kit.assert_equal_to(kit.brute([y[:, 2] for y in layers]), found.dataset, "position", 2)
    assert not any("number of rows" in note for note in found.notes)


def test_recurrent_layers_have_samples_second(kit):
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.LSTM(8, 6), nn.GRU(6, 6)

        def forward(self, x):
            return self.b(self.a(x.transpose(0, 1))[0])[0]

    model, x = Net(), torch.randn(60, 4, 8)
    layers = [y[0].transpose(0, 1) for y in hooked(model, ["a", "b"], x)]
    found = run(model, x, layers=["a", "b"])
    kit.assert_equal_to(kit.brute([y[:, 1] for y in layers]), found.dataset, "position", 1)


def test_a_later_batch_that_says_otherwise_is_refused():
    model = encoder("plain")
    with pytest.raises(ValueError, match="it was read as N T D in an earlier batch"):
        run(model, [torch.randn(5, 5, 8), torch.randn(9, 5, 8)])


@pytest.mark.parametrize("shape", [(40, 3, 4, 10), (40, 10, 4, 6)])
def test_channels_last(kit, shape):
    torch.manual_seed(0)
    model, x = nn.Sequential(Places(shape[-1]), Places(shape[-1])), torch.randn(shape)
    layers = [x, *hooked(model, ["0", "1"], x)]
    found = run(model, x)
    rows = [y.flatten(1, 2) for y in layers]
    kit.assert_equal_to(kit.brute([y.flatten(0, 1) for y in rows]), found.dataset, "pooled")
    kit.assert_equal_to(kit.brute([y[:, 7] for y in rows]), found.dataset, "position", 7)
    same_bits(found, run(model, x, axes="N H W D"))


def test_a_block_without_widths_is_read_as_its_neighbors():
    torch.manual_seed(0)
    model, x = nn.Sequential(Places(6), nn.Tanh()), torch.randn(40, 3, 4, 6)
    found = run(model, x, layers=["0", "1"])
    assert found.dataset.width.values.tolist() == [6, 6]


def test_widths_that_fit_both_axes_are_refused():
    model, x = nn.Sequential(Places(6), Places(6)), torch.randn(40, 6, 4, 6)
    with pytest.raises(ValueError, match=r"may be N D H W or N H W D.*axes=\{'\*': 'N H W D'\}"):
        run(model, x)
    run(model, x, axes="N H W D")


def test_a_block_that_begins_with_a_convolution_is_features_first():
    class Both(Channels):
        def __init__(self):
            super().__init__(6)
            self.linear = nn.Linear(6, 6)

        def forward(self, x):
            return self.linear(super().forward(x).movedim(1, -1)).movedim(-1, 1)

    torch.manual_seed(0)
    model, x = nn.Sequential(Both(), Both()), torch.randn(40, 6, 4, 6)
    found = run(model, x)
    same_bits(found, run(model, x, axes="N D H W"))
    assert sum("axes='N H W D'" in note for note in found.notes) == 1


def test_sequences_of_channels(kit):
    torch.manual_seed(0)
    model, x = nn.Sequential(*[Channels(6, nn.Conv1d) for _ in range(2)]), torch.randn(40, 6, 9)
    layers = [y.transpose(1, 2) for y in [x, *hooked(model, ["0", "1"], x)]]
    found = run(model, x)
    kit.assert_equal_to(kit.brute([y[:, 8] for y in layers]), found.dataset, "position", 8)
    same_bits(found, run(model, x, axes="N D T"))


@pytest.mark.parametrize("first", [True, False])
def test_video(kit, first):
    torch.manual_seed(0)
    axes = "N D T H W" if first else "N T H W D"
    x = torch.randn(40, 6, 2, 3, 4) if first else torch.randn(40, 2, 3, 4, 6)
    model = nn.Sequential(*[Channels(6, nn.Conv3d) if first else Places(6) for _ in range(2)])
    options = {"layers": ["0:input", "1"], "views": ["pooled"]}
    layers = [y.movedim(1, -1) if first else y for y in hooked(model, ["0:input", "1"], x)]
    found = run(model, x, **options)
    kit.assert_equal_to(kit.brute([y.reshape(-1, 6) for y in layers]), found.dataset, "pooled")
    same_bits(found, run(model, x, axes=axes, **options))


def test_five_axes_without_evidence_are_refused():
    model = nn.Sequential(nn.Tanh(), nn.Tanh())
    x = torch.randn(20, 3, 2, 3, 4)
    with pytest.raises(ValueError, match=r"may be N D T H W or N T H W D, nothing tells its axes"):
        run(model, x, layers=["0", "1"])
    found = run(model, x, layers=["0", "1"], axes="N H T W D", views=["pooled"])
    assert found.dataset.width.values.tolist() == [4, 4]


def test_stages_of_different_size(kit):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 6, 3, stride=2), nn.Conv2d(6, 6, 2))
    x = torch.randn(60, 3, 9, 9)
    layers = hooked(model, ["0", "1", "2"], x)
    found = run(model, x, layers=["0", "1", "2"], pairs="all")
    means = kit.brute([y.double().mean((2, 3)) for y in layers])
    kit.assert_equal_to(means, found.dataset, "mean_pooled")
    for k, y in enumerate(layers):
        rank = found.order_parameter("pooled", "effective_rank")[k]
        truth = kit.ranks_of(y.movedim(1, -1).reshape(-1, y.shape[1]))["effective_rank"]
        assert float(rank) == pytest.approx(truth, rel=1e-10)


@pytest.mark.parametrize(
    ("axes", "error", "sentence"),
    [
        (3, TypeError, "axes must be a layout of N"),
        ({"*": None}, TypeError, "got None"),
        ("NTD", ValueError, "axes must be different letters with spaces between, got 'NTD'"),
        ("N T T D", ValueError, "axes must be different letters"),
        ("T D", ValueError, "axes must hold N"),
        ({"none*": "N T D"}, ValueError, "axes: no layer matches 'none\\*', the layers are 0:input, 0, 1"),
        ("N H W D", ValueError, r"'N H W D' has 4 axes, and layer '0:input' has shape \(30, 4, 8\)"),
        ("T N D", ValueError, "4 samples, and the batch has 30"),
    ],
)
def test_layouts_that_cannot_be(axes, error, sentence):
    model = nn.Sequential(Places(8), Places(8))
    with pytest.raises(error, match=sentence):
        run(model, torch.randn(30, 4, 8), axes=axes)


def test_our_own_stack_is_read_as_asked():
    torch.manual_seed(0)
    stack, x = rgfast.ResidualStack(4, 2, mixing="none"), torch.randn(50, 3, 4)
    with pytest.raises(ValueError, match="3 samples, and the batch has 50"):
        run(stack, x, axes="T N D")
    found, plain = run(stack, x, axes="N T D"), run(stack, x)
    assert float(found.order_parameter("pooled")[-1]) == pytest.approx(
        float(plain.order_parameter("pooled")[-1])
    )


class Experts(nn.Module):
    """An MLP on tokens in one row, ``[B·T, D]``; ``routed``: on those alone whose first feature is > 0."""

    def __init__(self, width=6, routed=False):
        super().__init__()
        self.mlp, self.routed = nn.Linear(width, width), routed

    def forward(self, x):
        flat = x.reshape(-1, x.shape[-1])
        if not self.routed:
            return x + self.mlp(flat).reshape(x.shape)
        out, chosen = flat.clone(), flat[:, 0] > 0
        out[chosen] += self.mlp(flat[chosen])
        return out.reshape(x.shape)


class Tokens(nn.Module):
    def __init__(self, routed=False):
        super().__init__()
        self.embed = nn.Embedding(20, 6)
        self.layers = nn.ModuleList([Experts(routed=routed) for _ in range(2)])

    def forward(self, ids, attention_mask=None):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.parametrize("layers", [["layers.0.mlp", "layers.1.mlp"], ["embed", "layers.0.mlp", "layers.1"]])
def test_flattened_tokens_have_their_padding(kit, layers):
    torch.manual_seed(0)
    model, ids = Tokens(), torch.randint(20, (50, 5))
    keep = torch.arange(5) < torch.randint(2, 6, (50, 1))
    rows = [y.reshape(50, 5, 6) for y in hooked(model, layers, ids)]
    batches = [
        {"ids": ids[:30], "attention_mask": keep[:30].long()},
        {"ids": ids[30:], "attention_mask": keep[30:].long()},
    ]
    found = run(model, batches, layers=layers)
    assert found.dataset.attrs["sequences"] == 50
    kit.assert_equal_to(kit.brute([y[keep] for y in rows]), found.dataset, "pooled")
    kit.assert_equal_to(kit.brute([y[keep[:, 1], 1] for y in rows]), found.dataset, "position", 1)


def test_routed_tokens_are_refused_beside_sequences():
    torch.manual_seed(0)
    model, ids = Tokens(routed=True), torch.randint(20, (50, 5))
    with pytest.raises(ValueError, match=r"layer 'layers.0.mlp' has \d+ rows for 50 sequences"):
        run(model, ids, layers=["embed", "layers.0.mlp"])
    found = run(model, ids, layers=["layers.0.mlp"], pairs=[])
    assert any("each row counts as a sequence of its own" in note for note in found.notes)


class Branch(nn.Module):
    """Returns a branch and the residual before it."""

    def __init__(self, width, kind):
        super().__init__()
        self.linear, self.kind = nn.Linear(width, width), kind

    def forward(self, hidden, residual=None):
        residual = hidden if residual is None else hidden + residual
        branch = torch.tanh(self.linear(residual))
        pair = (branch, residual)
        return {"branch": branch, "residual": residual} if self.kind == "dict" else pair


class Branches(nn.Module):
    def __init__(self, kind="tuple"):
        super().__init__()
        self.blocks = nn.ModuleList([Branch(7, kind) for _ in range(3)])

    def forward(self, x):
        residual = None
        for block in self.blocks:
            out = block(x, residual)
            x, residual = out.values() if isinstance(out, dict) else out
        return x + residual


def pairs_of(model, x):
    pairs = hooked(model, ["blocks.0", "blocks.1", "blocks.2"], x)
    return [tuple(p.values()) if isinstance(p, dict) else p for p in pairs]


@pytest.mark.parametrize("kind", ["tuple", "dict"])
def test_a_branch_and_its_residual(kit, kind):
    torch.manual_seed(0)
    model, x = Branches(kind), torch.randn(60, 3, 7)
    with pytest.raises(
        ValueError, match=r"output: layer 'blocks.0' returns 2 floating tensors.*output='sum'"
    ):
        run(model, x)
    pairs = pairs_of(model, x)
    summed = kit.brute([y.flatten(0, 1) for y in [x, *(h + r for h, r in pairs)]])
    same = "residual" if kind == "dict" else 1
    second = kit.brute([y.flatten(0, 1) for y in [x, *(r for _, r in pairs)]])
    kit.assert_equal_to(summed, run(model, x, output="sum").dataset, "pooled")
    kit.assert_equal_to(second, run(model, x, output=same).dataset, "pooled")
    kit.assert_equal_to(second, run(model, x, output={"blocks.*": same}).dataset, "pooled")


def test_a_function_of_what_a_block_returns(kit):
    torch.manual_seed(0)
    model, x = Branches(), torch.randn(60, 3, 7)
    found = run(model, x, output=lambda pair: 2 * pair[0] + pair[1])
    layers = [x, *(2 * h + r for h, r in pairs_of(model, x))]
    kit.assert_equal_to(kit.brute([y.flatten(0, 1) for y in layers]), found.dataset, "pooled")


def test_the_input_of_a_block_has_a_residual_too(kit):
    torch.manual_seed(0)
    model, x = Branches(), torch.randn(60, 3, 7)
    layers = ["blocks.0:input", "blocks.1:input", "blocks.2:input"]
    with pytest.raises(ValueError, match=r"output: layer 'blocks\.1:input' is given a residual"):
        run(model, x, layers=layers)
    found = run(model, x, layers=layers, output="sum")
    want = [x, *(h + r for h, r in pairs_of(model, x)[:2])]
    kit.assert_equal_to(kit.brute([y.flatten(0, 1) for y in want]), found.dataset, "pooled")
    second = run(model, x, layers=layers[1:], output={"*:input": 1}, pairs=[])
    truth = [kit.ranks_of(r.flatten(0, 1))["effective_rank"] for _, r in pairs_of(model, x)[:2]]
    assert second.order_parameter("pooled", "effective_rank").values == pytest.approx(truth, rel=1e-10)


class Returning(nn.Module):
    """A residual block that returns something beside its stream."""

    def __init__(self, more):
        super().__init__()
        self.block, self.more = Places(6), more

    def forward(self, x):
        x = x[0] if isinstance(x, tuple) else x
        y = self.block(x)
        weights = torch.softmax(torch.ones(len(x), 6, 6).cumsum(-1), -1)
        more = {
            "same": (y, y),
            "weights": (y, weights),
            "cache": (y, (y + 1, y + 2)),
            "wide": (y, torch.cat([y, y], -1)),
            "none": (y, None, "text", torch.ones(len(x), dtype=torch.int64)),
        }
        return more[self.more]


@pytest.mark.parametrize("more", ["same", "weights", "cache", "wide", "none"])
def test_what_is_no_second_stream_is_passed_over(more):
    torch.manual_seed(0)
    model, x = nn.Sequential(Returning(more), Returning(more)), torch.randn(40, 6, 6)
    same_bits(run(model, x), run(model, x, output=0))


@pytest.mark.parametrize(
    ("output", "error", "sentence"),
    [
        (True, TypeError, "output must be an index, a key, a function or 'sum'"),
        ({"blocks.*": None}, TypeError, "or these by layer pattern, got None"),
        ({"none*": 0}, ValueError, "output: no layer matches 'none\\*'"),
        (2, ValueError, "output: layer 'blocks.0' has no 2, it has 2 items"),
        ("branch", ValueError, "output: layer 'blocks.0' has no 'branch', it has 2 items"),
        (len, TypeError, "the function must give a floating tensor of layer 'blocks.0', got int"),
    ],
)
def test_outputs_that_cannot_be(output, error, sentence):
    with pytest.raises(error, match=sentence):
        run(Branches(), torch.randn(30, 3, 7), output=output)


def test_a_checkpoint_knows_the_axes(tmp_path):
    torch.manual_seed(0)
    model, x = nn.Sequential(Places(6), Places(6)), torch.randn(30, 6, 6)
    path = tmp_path / "state"
    run(model, x, axes="N T D", checkpoint=path)
    with pytest.raises(ValueError, match="axes was N T D, now N D T"):
        run(model, x, axes="N D T", checkpoint=path)
