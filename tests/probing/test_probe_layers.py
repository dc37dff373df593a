"""Which layers are found, by every kind of name, in every kind of model; what cannot be found is said."""

import re

import pytest
import torch
from torch import nn

import rgfast
from rgfast.probing.capture.layers import resolve


def names(model, layers="auto"):
    return [tap.name for tap in resolve(model, layers)[0]]


def test_residual_stack_alone_and_inside(token_model):
    assert names(token_model.stack) == ["blocks.0:input", "blocks.0", "blocks.1", "blocks.2"]
    assert names(token_model) == [f"stack.{n}" for n in names(token_model.stack)]
    assert names(rgfast.ResidualStack(4, 1, mixing="none")) == ["blocks.0:input", "blocks.0"]


def test_timm_like_mixer(kit):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.mlp_tokens = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))
            self.mlp_channels = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 6))

        def forward(self, x):
            x = x + self.mlp_tokens(x.transpose(1, 2)).transpose(1, 2)
            return x + self.mlp_channels(x)

    class Mixer(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Sequential(nn.Conv2d(3, 6, 2, stride=2))
            self.blocks = nn.Sequential(*(Block() for _ in range(3)))
            self.norm = nn.LayerNorm(6)

        def forward(self, x):
            return self.norm(self.blocks(self.stem(x).flatten(2).transpose(1, 2)))

    torch.manual_seed(0)
    model, x = Mixer(), torch.randn(80, 3, 4, 4)
    assert names(model) == ["blocks.0:input", "blocks.0", "blocks.1", "blocks.2"]
    result = rgfast.probe(model, x, progress=False)
    layers = kit.stored([lambda y: model.stem(y).flatten(2).transpose(1, 2), *model.blocks], x)
    kit.assert_equal_to(kit.brute([y[:, 3] for y in layers]), result.dataset, "position", 3)


def test_sequential_of_residual_blocks(kit):
    model = nn.Sequential(nn.Linear(4, 6), *(kit.Residual(6) for _ in range(2)), nn.Linear(6, 2))
    assert names(model) == ["1:input", "1", "2"]
    nested = nn.ModuleDict({"body": model, "head": nn.Linear(2, 2)})
    assert names(nested) == ["body.1:input", "body.1", "body.2"]


def test_names_indices_globs_and_regular_expressions(token_model):
    assert names(token_model, "stack.blocks.1") == ["stack.blocks.1"]
    assert names(token_model, ["head", "stack.blocks.0:input"]) == ["head", "stack.blocks.0:input"]
    assert names(token_model, [0, -1]) == ["stack.blocks.0:input", "stack.blocks.2"]
    assert names(token_model, 2) == ["stack.blocks.1"]
    assert names(token_model, "stack.blocks.*") == [f"stack.blocks.{k}" for k in range(3)]
    assert names(token_model, "stack.blocks.[12]") == ["stack.blocks.1", "stack.blocks.2"]
    assert names(token_model, "stack.blocks.[!12]:input") == ["stack.blocks.0:input"]
    assert names(token_model, "**.mlp") == [f"stack.blocks.{k}.mlp" for k in range(3)]
    assert names(token_model, "stack.blocks.?.mix") == [f"stack.blocks.{k}.mix" for k in range(3)]
    assert names(token_model, re.compile(r"stack\.blocks\.\d\.mix")) == names(token_model, "**.mix")
    assert names(token_model, r"re:stack\.blocks\.[02]") == ["stack.blocks.0", "stack.blocks.2"]


def test_what_cannot_be_found_lists_candidates(token_model, kit):
    with pytest.raises(ValueError, match=r"no module 'stack.block.1'; near it: .*stack\.blocks\.1"):
        names(token_model, "stack.block.1")
    with pytest.raises(ValueError, match=r"no module matches 'encoder\.\*'"):
        names(token_model, "encoder.*")
    with pytest.raises(ValueError, match="index from 0 to 3, got 4"):
        names(token_model, 4)
    with pytest.raises(ValueError, match="must not repeat a layer, got 'head' 2 times"):
        names(token_model, ["head", "head"])
    with pytest.raises(ValueError, match="at least one layer"):
        names(token_model, [])
    with pytest.raises(TypeError, match=r"names, indices or patterns, got 1\.5"):
        names(token_model, [1.5])
    plain = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))
    with pytest.raises(ValueError, match=r"found no stack of blocks .* top modules are: 0, 1, 2"):
        names(plain)
    two = nn.ModuleDict({
        "encoder": nn.Sequential(kit.Residual(3), kit.Residual(3)),
        "decoder": nn.Sequential(kit.Residual(3), kit.Residual(3)),
    })  # fmt: skip
    with pytest.raises(
        ValueError, match=r"ambiguous, take one of: layers='encoder': encoder\.0 … .*; layers='decoder'"
    ):
        names(two)


def test_a_stack_of_several_kinds_is_a_stream_if_it_is_named(kit):
    """Hybrids of attention and state spaces take turns, so that no two blocks of a kind are neighbors."""

    class Other(kit.Residual):
        pass

    kinds = [kit.Residual, Other, kit.Residual, Other]
    model = nn.ModuleDict({"layers": nn.ModuleList(kind(3) for kind in kinds), "norm": nn.LayerNorm(3)})
    with pytest.raises(ValueError, match="several kinds is taken by layers='layers'"):
        names(model)
    stream = ["layers.0:input", *(f"layers.{k}" for k in range(4))]
    assert names(model, "layers") == stream
    assert names(model, ["layers", "norm"]) == [*stream, "norm"]
    model["layers"].append(nn.Linear(3, 3))  # no block
    assert names(model, "layers") == ["layers"]


def test_what_was_chosen_is_printed(token_model, token_data, capsys):
    rgfast.probe(token_model, token_data, progress=True)
    printed = capsys.readouterr().out
    assert "stack.blocks.0 … stack.blocks.2 (3 × Block)" in printed
    assert re.search(r"4 layers \(width 7\), all 6 positions.* of state, .* flops a sequence", printed)
    for quiet in (False, None):  # no terminal
        rgfast.probe(token_model, token_data, progress=quiet)
        assert capsys.readouterr() == ("", "")
