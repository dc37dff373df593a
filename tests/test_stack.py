import json

import pytest
import torch

from rgfast import MaskedTokenModel, ResidualStack
from rgfast.stack import ACTIVATIONS


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("mixing", ["mixer", "flat", "none"])
@pytest.mark.parametrize("norm", ["layer", "rms", None])
def test_zero_w2_is_the_identity(mixing, norm):
    stack = ResidualStack(6, 3, mixing=mixing, length=5, norm=norm)
    x = torch.randn(4, 5, 6)
    assert torch.equal(stack(x), x)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("norm", ["layer", "rms", None])
def test_matches_the_written_out_formula(activation, norm):
    stack = ResidualStack(
        6, 2, 10, "mixer", 5, norm, activation, w2_scale=0.7, generator=generator()
    ).double()
    x = torch.randn(3, 5, 6, dtype=torch.float64)

    def normalise(z, module):
        if norm is None:
            return z
        if norm == "rms":
            return z / (z.square().mean(-1, keepdim=True) + 1e-5).sqrt() * module.weight
        centred = z - z.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * module.weight + module.bias

    def mlp(z, m):
        return ACTIVATIONS[activation](z @ m.w1.T + m.b1) @ m.w2.T + m.b2

    truth = x
    for block in stack.blocks:
        mixed = mlp(normalise(truth, block.mix.norm).transpose(1, 2), block.mix)
        truth = truth + mixed.transpose(1, 2)
        truth = truth + mlp(normalise(truth, block.mlp.norm), block.mlp)
    torch.testing.assert_close(stack(x), truth, rtol=1e-12, atol=1e-12)
    assert not torch.equal(truth, x)


def test_mixing_none_takes_any_leading_dimensions_and_sees_no_neighbour():
    stack = ResidualStack(6, 2, mixing="none", w2_scale=0.5, generator=generator())
    x = torch.randn(2, 3, 4, 6)
    out = stack(x)
    assert out.shape == x.shape
    torch.testing.assert_close(out[0, 1, 2], stack(x[0, 1, 2]), rtol=1e-5, atol=1e-6)
    assert stack(torch.zeros(0, 6)).shape == (0, 6)


def test_mixer_sees_neighbours():
    stack = ResidualStack(6, 1, mixing="mixer", length=4, w2_scale=1.0, generator=generator())
    x = torch.randn(1, 4, 6, generator=generator(1))
    moved = x.clone()
    moved[0, 3, 0] += 1.0  # one feature only: a shift of all would vanish in the norm
    assert not torch.equal(stack(x)[0, 0], stack(moved)[0, 0])


def test_flat_is_one_mlp_over_the_whole_sequence():
    stack = ResidualStack(6, 2, mixing="flat", length=4, w2_scale=0.7, generator=generator()).double()
    x = torch.randn(3, 4, 6, dtype=torch.float64)
    truth = x.flatten(1)
    for block in stack.blocks:
        m = block.mlp
        assert m.w1.shape == (96, 24)
        z = torch.nn.functional.layer_norm(truth, (24,), m.norm.weight, m.norm.bias)
        truth = truth + torch.nn.functional.gelu(z @ m.w1.T + m.b1) @ m.w2.T + m.b2
    torch.testing.assert_close(stack(x), truth.reshape(3, 4, 6), rtol=1e-12, atol=1e-12)


def test_window_puts_the_neighbours_side_by_side_and_sees_no_further():
    model = MaskedTokenModel(4, 5, 8, 2, mixing="window", window=1, w2_scale=0.5, generator=generator())
    tokens = torch.randint(0, 5, (3, 5), generator=generator(1))
    stream = model.embed(tokens)
    assert stream.shape == (3, 5, 24)
    single = model.token_embedding[tokens] + model.position_embedding
    assert torch.equal(stream[:, 2], torch.cat([single[:, 1], single[:, 2], single[:, 3]], -1))
    assert torch.equal(stream[:, 0], torch.cat([torch.zeros(3, 8), single[:, 0], single[:, 1]], -1))
    moved = tokens.clone()
    moved[:, 3] = (moved[:, 3] + 1) % 4
    same = (model(tokens) == model(moved)).flatten(2).all(-1).all(0)
    assert same.tolist() == [True, True, False, False, False]


def test_weights_have_the_stated_scales_and_follow_the_generator():
    a = ResidualStack(64, 2, 256, "none", w2_scale=0.5, generator=generator(3))
    b = ResidualStack(64, 2, 256, "none", w2_scale=0.5, generator=generator(3))
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        assert torch.equal(p, q), name
    mlp = a.blocks[0].mlp
    assert mlp.w1.std().item() == pytest.approx(64**-0.5, rel=0.05)
    assert mlp.w2.std().item() == pytest.approx(0.5 * 256**-0.5, rel=0.05)


def test_first_weights_do_not_depend_on_w2_scale():
    a = ResidualStack(8, 2, mixing="none", w2_scale=0.0, generator=generator(3))
    b = ResidualStack(8, 2, mixing="none", w2_scale=0.5, generator=generator(3))
    assert torch.equal(a.blocks[1].mlp.w1, b.blocks[1].mlp.w1)


@pytest.mark.parametrize("mixing", ["mixer", "flat", "none"])
def test_everything_starts_as_linear_layers_do(mixing):
    model = MaskedTokenModel(
        30, 5, 64, 2, mixing=mixing, initialization="torch", positions="none", generator=generator()
    )
    linear = [(model.token_embedding, 31), (model.position_embedding, 31)]
    linear += [(parameter, model.head.in_features) for parameter in (model.head.weight, model.head.bias)]
    for block in model.stack.blocks:
        for mlp in filter(None, (block.mix, block.mlp)):
            linear += [(p, w.shape[1]) for w, b in ((mlp.w1, mlp.b1), (mlp.w2, mlp.b2)) for p in (w, b)]
    for value, fan_in in linear:
        bound = torch.nn.Linear(fan_in, 1).in_features ** -0.5
        assert float(value.detach().abs().max()) <= bound
        if value.numel() >= 1000:
            assert float(value.detach().abs().max()) > 0.98 * bound
            assert float(value.detach().std()) == pytest.approx(bound / 3**0.5, rel=0.06)
        assert len(value.unique()) > 0.9 * value.numel()
    # Drawn anew they have the same law.
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    for (name, old), (value, fan_in) in ((item, pair) for item in before.items() for pair in linear):
        if model.get_parameter(name) is value:
            assert not torch.equal(value, old)
            assert float(value.detach().abs().max()) <= fan_in**-0.5


def test_torchs_own_layers_start_within_the_same_bounds():
    ours = ResidualStack(64, 1, 200, "none", initialization="torch", generator=generator()).blocks[0].mlp
    theirs = torch.nn.Linear(64, 200)
    for own, other in ((ours.w1, theirs.weight), (ours.b1, theirs.bias)):
        assert own.shape == other.shape
        assert float(own.detach().abs().max()) == pytest.approx(float(other.detach().abs().max()), rel=0.05)


def test_without_positions_nothing_tells_them_apart(tmp_path):
    model = MaskedTokenModel(4, 5, 8, 2, mixing="none", w2_scale=0.5, positions="none", generator=generator())
    with torch.no_grad():
        model.position_embedding.normal_()
    logits = model(torch.full((2, 5), 3))
    assert model.position_embedding.shape == (1, 8)
    assert torch.equal(logits, logits[:1, :1].expand_as(logits))
    # One row as a bias: a linear layer on one-hot tokens.
    tokens = torch.randint(5, (3, 5), generator=generator())
    one_hot = torch.nn.functional.one_hot(tokens, 5).float()
    linear = torch.nn.functional.linear(one_hot, model.token_embedding.T, model.position_embedding[0])
    torch.testing.assert_close(model.embed(tokens), linear)
    model.save(tmp_path)
    assert torch.equal(MaskedTokenModel.load(tmp_path)(tokens), model(tokens))


def test_an_older_file_has_learned_positions(tmp_path):
    model = MaskedTokenModel(4, 5, 8, 2, generator=generator())
    model.save(tmp_path)
    config = json.loads((tmp_path / "model.json").read_text())
    for name in ("initialization", "positions"):
        del config[name]
    (tmp_path / "model.json").write_text(json.dumps(config))
    tokens = torch.zeros(1, 5, dtype=torch.int64)
    assert torch.equal(MaskedTokenModel.load(tmp_path)(tokens), model(tokens))


@pytest.mark.parametrize("mixing", ["mixer", "flat", "window", "none"])
def test_logits_of_some_positions_are_those_of_the_whole(mixing):
    model = MaskedTokenModel(4, 5, 8, 2, mixing=mixing, w2_scale=0.5, generator=generator()).double()
    tokens = torch.randint(5, (3, 5), generator=generator())
    where = torch.rand(3, 5, generator=generator()) < 0.4
    assert 0 < where.sum() < where.numel()
    torch.testing.assert_close(model.logits_at(tokens, where), model(tokens)[where], rtol=1e-12, atol=1e-12)
    assert torch.equal(model.logits_at(tokens, where.nonzero(as_tuple=True)), model.logits_at(tokens, where))
    assert model.logits_at(tokens, torch.zeros(3, 5, dtype=torch.bool)).shape == (0, 4)


def test_building_leaves_the_global_generator_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    MaskedTokenModel(4, 3, 8, 2, generator=generator())
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"width": 0, "depth": 1}, "width must be at least 1, got 0"),
        ({"width": 4, "depth": 0}, "depth must be at least 1, got 0"),
        ({"width": 4, "depth": 1, "hidden": -1}, "hidden must be at least 1, got -1"),
        ({"width": 4, "depth": 1, "mixing": "attention"}, "mixing must be one of 'mixer', 'flat', 'none'"),
        ({"width": 4, "depth": 1}, "length must be given"),
        ({"width": 4, "depth": 1, "length": 3, "norm": "batch"}, "norm must be one of"),
        ({"width": 4, "depth": 1, "length": 3, "activation": "elu"}, "activation must be one of"),
        ({"width": 4, "depth": 1, "length": 3, "w2_scale": float("nan")}, "w2_scale must be"),
    ],
)
def test_bad_options_are_refused(kwargs, words):
    with pytest.raises(ValueError, match=words):
        ResidualStack(**kwargs)


def test_bad_input_shapes_are_refused():
    with pytest.raises(ValueError, match=r"x must end in width 4, got shape \(2, 3\)"):
        ResidualStack(4, 1, mixing="none")(torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"x must be \[\.\.\., 5, 4\], got shape \(2, 3, 4\)"):
        ResidualStack(4, 1, length=5)(torch.zeros(2, 3, 4))
    with pytest.raises(ValueError, match=r"tokens must be \[B, 3\]"):
        MaskedTokenModel(4, 3, 8, 1)(torch.zeros(2, 4, dtype=torch.int64))


def test_every_parameter_gets_a_gradient():
    model = MaskedTokenModel(4, 3, 8, 2, w2_scale=0.5, generator=generator())
    model(torch.randint(0, 5, (6, 3))).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_save_and_load(tmp_path):
    model = MaskedTokenModel(4, 3, 8, 2, norm="rms", w2_scale=0.5, final_norm=False, generator=generator())
    model.save(tmp_path / "m")
    again = MaskedTokenModel.load(tmp_path / "m")
    tokens = torch.randint(0, 5, (6, 3))
    assert torch.equal(model(tokens), again(tokens))
    assert sorted(p.name for p in (tmp_path / "m").iterdir()) == ["model.json", "model.safetensors"]


def test_load_refuses_what_does_not_fit(tmp_path):
    MaskedTokenModel(4, 3, 8, 2).save(tmp_path)
    config = json.loads((tmp_path / "model.json").read_text())
    (tmp_path / "model.json").write_text(json.dumps({**config, "depth": 3}))
    with pytest.raises(ValueError, match=r"does not fit model\.json"):
        MaskedTokenModel.load(tmp_path)
    (tmp_path / "model.json").write_text(json.dumps({**config, "format": "other"}))
    with pytest.raises(ValueError, match="format must be"):
        MaskedTokenModel.load(tmp_path)


def stream_of(stack, x):
    found = [x]
    for block in stack.blocks:
        found.append(block(found[-1]))
    return torch.stack(found)


@pytest.mark.parametrize("mixing", ["mixer", "flat", "none"])
@pytest.mark.parametrize("tile", [None, 1, 7])
def test_a_consumer_sees_every_layer_of_every_sample(mixing, tile):
    stack = ResidualStack(8, 3, mixing=mixing, length=5, w2_scale=0.7, generator=generator()).eval()
    x = torch.randn(20, 5, 8, generator=generator(1))
    want = stream_of(stack, x).detach()
    for grad in (True, False):
        seen = torch.full_like(want, float("nan"))

        def put(first, states, seen=seen):
            assert not states.requires_grad
            seen[:, first : first + states.shape[1]] = states

        handle = stack.stream_tiles(put, tile)
        with torch.set_grad_enabled(grad):
            y = stack(x)
        handle.remove()
        assert y.requires_grad == grad
        torch.testing.assert_close(seen, want)
        torch.testing.assert_close(y.detach(), want[-1])
        assert torch.equal(stack(x).detach(), stack(x).detach())


def test_a_consumer_of_a_single_sample_and_of_plain_rows():
    stack = ResidualStack(8, 2, mixing="none", w2_scale=0.7, generator=generator())
    shapes = []
    handle = stack.stream_tiles(lambda first, states: shapes.append(tuple(states.shape)))
    with torch.no_grad():
        for x in (torch.randn(8), torch.randn(4, 8), torch.randn(2, 3, 4, 8)):
            assert torch.equal(stack(x), stream_of(stack, x)[-1])
    with pytest.raises(RuntimeError, match="watched already"):
        stack.stream_tiles(print)
    handle.remove()
    assert shapes == [(3, 1, 8), (3, 4, 8), (3, 2, 3, 4, 8)]
    stack.stream_tiles(print).remove()


def test_hooked_and_replaced_blocks_are_called():
    stack = ResidualStack(8, 3, mixing="none", w2_scale=0.7, generator=generator())
    x, called = torch.randn(30, 8), []
    with torch.no_grad():
        plain = stack(x)
        handle = stack.blocks[1].mlp.register_forward_hook(lambda *args: called.append(1))
        stack(x)
        handle.remove()
        handle = stack.blocks[1].register_forward_pre_hook(lambda *args: called.append(2))
        hooked = stack(x)
        handle.remove()
        stack.blocks[1] = torch.nn.Identity()
        shorter = stack(x)
    assert called == [1, 2]
    torch.testing.assert_close(hooked, plain)
    torch.testing.assert_close(shorter, stack.blocks[2](stack.blocks[0](x)))
