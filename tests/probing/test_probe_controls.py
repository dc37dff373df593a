"""Controls: the same model with random weights, or the same model on shuffled tokens."""

import numpy as np
import pytest
import torch
from torch import nn

import rgfast
from rgfast.probing.controls import random_twin, shuffled
from rgfast.probing.spec import ProbeSpec


class Encoder(nn.Module):
    """Token and position embeddings before torch's own encoder."""

    def __init__(self, width=8, depth=2, states=20, length=6):
        super().__init__()
        self.embedding = nn.Embedding(states, width, padding_idx=0)
        self.register_buffer("position", torch.arange(length * width).reshape(length, width) / 100.0)
        layer = nn.TransformerEncoderLayer(width, 2, 16, batch_first=True, dropout=0.0)
        self.encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.norm = nn.BatchNorm1d(width)

    def forward(self, input_ids, attention_mask=None):
        x = self.embedding(input_ids) + self.position
        padding = None if attention_mask is None else attention_mask == 0
        x = self.encoder(x, src_key_padding_mask=padding)
        return self.norm(x.transpose(1, 2))


def encoder(seed=0):
    torch.manual_seed(seed)
    return Encoder().eval()


def tokens(n=40, length=6, states=20, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, states, (n, length), generator=generator)


def state_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def shuffle(batches, model=None, seed=0, rank=0, mask=None, padding="auto", reserved=()):
    model = encoder() if model is None else model
    found = shuffled(
        batches, model, seed=seed, rank=rank, mask=mask, padding=padding, reserved=frozenset(reserved)
    )
    return list(found)


def probed(model, batches, **options):
    return rgfast.probe(model, batches, progress=False, **options)


def test_a_twin_has_other_weights_and_the_same_buffers():
    model = encoder()
    model.norm.running_mean.fill_(0.3)
    before, drawn = state_of(model), torch.get_rng_state()
    twin = random_twin(model, 3)
    assert torch.equal(torch.get_rng_state(), drawn)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    buffers = dict(twin.named_buffers())
    for name, value in twin.state_dict().items():
        constant = name in buffers or "norm" in name or name.endswith("in_proj_bias")
        assert torch.equal(value, before[name]) == (constant or name.endswith("out_proj.bias")), name
    assert torch.equal(twin.norm.running_mean, torch.full((8,), 0.3))
    assert bool(
        (twin.embedding.weight[0] == 0).all()
    )  # the padding token's row, as reset_parameters leaves it


def test_a_twin_is_drawn_by_its_seed():
    model = encoder()
    first, same, other = (state_of(random_twin(model, seed)) for seed in (5, 5, 6))
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["embedding.weight"], other["embedding.weight"])


def test_a_model_that_resets_itself_has_the_last_word():
    class Model(nn.Sequential):
        def reset_parameters(self):
            for linear in self:
                nn.init.constant_(linear.weight, 0.25)

    twin = random_twin(Model(nn.Linear(3, 3), nn.Linear(3, 3)), 0)
    assert all(bool((linear.weight == 0.25).all()) for linear in twin)


def test_modules_that_cannot_be_reset_are_named():
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))

        def forward(self, x):
            return self.scale * x

    model = nn.Sequential(nn.Linear(3, 3), Scale(), Scale())
    with pytest.raises(ValueError, match=r"nothing draws those of 1 \(Scale\), 2 \(Scale\); give them one"):
        probed(model, torch.randn(50, 3), control="random_weights")

    class Needs(Scale):
        def reset_parameters(self, std):
            raise AssertionError("never called")

    with pytest.raises(ValueError, match=r"nothing draws those of the model itself \(Needs\)"):
        random_twin(Needs(), 0)
    with pytest.raises(ValueError, match="needs a model with parameters, and Identity has none"):
        random_twin(nn.Identity(), 0)
    with pytest.raises(ValueError, match="some are offloaded"):
        random_twin(nn.Linear(3, 3, device="meta"), 0)
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got int"):
        probed(3, torch.randn(50, 3), control="random_weights")


def test_a_module_that_draws_only_some_of_its_weights_is_named():
    class Half(nn.Linear):
        def reset_parameters(self):
            nn.init.ones_(self.bias)

    with pytest.raises(ValueError, match=r"nothing draws those of 1 \(Half\)"):
        random_twin(nn.Sequential(nn.Linear(3, 3), Half(3, 3)), 0)


@pytest.mark.parametrize("kind", ["GPT2", "Llama", "Bert", "T5"])
def test_hugging_face_models_start_as_from_their_configuration(kind):
    transformers = pytest.importorskip("transformers")
    small = {
        "GPT2": {"n_embd": 64, "n_layer": 2, "n_head": 2},
        "Llama": {
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
        },
        "Bert": {
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
        },
        "T5": {"d_model": 64, "d_kv": 32, "d_ff": 96, "num_layers": 2, "num_heads": 2},
    }[kind]
    config = getattr(transformers, f"{kind}Config")(vocab_size=500, pad_token_id=0, **small)
    model = getattr(transformers, f"{kind}Model")(config).eval()
    fresh = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        nn.init.constant_(parameter, 7.0)
        parameter._is_hf_initialized = True  # as weights of a checkpoint are marked
    twin = random_twin(model, 0)
    drawn = dict(twin.named_parameters())
    assert set(drawn) == set(fresh)
    for name, before in fresh.items():
        assert not bool((drawn[name] == 7.0).any()), name
        if before.numel() > 1000:
            assert float(drawn[name].detach().std()) == pytest.approx(float(before.std()), rel=0.2), name
        elif float(before.std()) == 0:
            assert torch.equal(drawn[name].detach(), before), name
    assert all(bool((p == 7.0).all()) for p in model.parameters())
    other = dict(random_twin(model, 1).named_parameters())
    assert any(not torch.equal(drawn[name], other[name]) for name in drawn)


def test_our_own_models_start_anew():
    model = rgfast.MaskedTokenModel(states=5, length=4, width=256, depth=2, w2_scale=0.5, token_std=2.0)
    for parameter in model.parameters():
        nn.init.constant_(parameter, 7.0)
    twin = random_twin(model, 0)
    block = twin.stack.blocks[0].mlp
    assert float(block.w1.detach().std()) == pytest.approx(1 / 16, rel=0.05)
    assert float(block.w2.detach().std()) == pytest.approx(0.5 / block.w2.shape[1] ** 0.5, rel=0.05)
    assert float(twin.token_embedding.detach().std()) == pytest.approx(2.0, rel=0.1)
    assert not any(b.detach().any() for b in (block.b1, block.b2, block.norm.bias, twin.head.bias))
    assert bool((block.norm.weight == 1).all())
    moved = {name for name, value in twin.named_parameters() if bool((value == 7.0).any())}
    assert not moved


def test_a_probe_of_a_twin_is_that_of_the_twin_and_says_so(tmp_path):
    model, batch = encoder(), {"input_ids": tokens()}
    options = {"layers": "encoder.layers", "groups": 4}
    found = probed(model, batch, control="random_weights", control_seed=2, **options)
    truth = probed(random_twin(model, 2), batch, **options)
    for measure in found.measures:
        np.testing.assert_array_equal(found.dataset[measure].values, truth.dataset[measure].values)
    assert (found.dataset.attrs["control"], found.dataset.attrs["control_seed"]) == ("random_weights", 2)
    assert repr(found).startswith("ProbeResult of Encoder with random weights: 40 sequences")
    found.save(tmp_path / "twin.nc")
    assert rgfast.ProbeResult.load(tmp_path / "twin.nc").dataset.attrs["control"] == "random_weights"
    assert "control" not in truth.dataset.attrs


@pytest.mark.parametrize("form", ["tensor", "mapping", "tuple", "labelled", "array"])
def test_tokens_are_permuted_within_a_batch_in_every_form(form):
    ids = tokens()
    batch = {
        "tensor": ids,
        "mapping": {"input_ids": ids, "token_type_ids": torch.zeros_like(ids), "labels": ids},
        "tuple": (ids, torch.arange(40)),
        "labelled": ({"input_ids": ids}, torch.arange(40)),
        "array": ids.numpy(),
    }[form]
    (found,) = shuffle([batch])
    new = {
        "tensor": lambda: found,
        "mapping": lambda: found["input_ids"],
        "tuple": lambda: found[0],
        "labelled": lambda: found[0]["input_ids"],
        "array": lambda: found,
    }[form]()
    assert new.shape == ids.shape
    assert (new != ids).float().mean() > 0.8
    assert torch.equal(new.flatten().sort().values, ids.flatten().sort().values)
    assert any(len(set(new[:, t].tolist()) - set(ids[:, t].tolist())) for t in range(6))
    if form == "mapping":
        assert torch.equal(found["labels"], ids)
        assert not found["token_type_ids"].any()
    if form in ("tuple", "labelled"):
        assert torch.equal(found[1], torch.arange(40))


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32])
def test_padding_stays_where_it_is(dtype):
    ids = tokens()
    keep = torch.arange(6)[None] < torch.arange(40)[:, None] % 6 + 1
    ids[~keep] = 0
    (found,) = shuffle([{"input_ids": ids, "attention_mask": keep.to(dtype)}])
    new = found["input_ids"]
    assert torch.equal(new[~keep], ids[~keep])
    assert torch.equal(new[keep].sort().values, ids[keep].sort().values)
    assert (new[keep] != ids[keep]).float().mean() > 0.7
    (named,) = shuffle([{"input_ids": ids, "mine": keep}], padding="mine")
    assert torch.equal(named["input_ids"][~keep], ids[~keep])
    (every,) = shuffle([{"input_ids": ids, "attention_mask": keep.to(dtype)}], padding=None)
    assert bool((every["input_ids"][~keep] != 0).any())
    (second,) = shuffle([(ids, keep)])
    assert torch.equal(second[0][~keep], ids[~keep])


def test_hidden_tokens_stay_hidden():
    ids, hidden = tokens(), torch.rand(40, 6) < 0.4
    ids[hidden] = 19
    (found,) = shuffle([{"input_ids": ids, "hidden": hidden}], mask="hidden", reserved=["hidden"])
    assert bool((found["input_ids"][hidden] == 19).all())
    (called,) = shuffle([ids], mask=lambda entries: entries["input"] == 19)
    assert bool((called[ids == 19] == 19).all())


def test_a_decoders_tokens_are_permuted_among_themselves():
    class Both(nn.Module):
        def forward(self, input_ids, decoder_input_ids):
            return input_ids

    ids, target = tokens(), tokens(length=3, seed=1) + 100
    keep = torch.ones(40, 6, dtype=torch.int64)
    keep[:, 4:] = 0
    batch = {"input_ids": ids, "decoder_input_ids": target, "attention_mask": keep}
    (found,) = shuffle([batch], Both())
    assert torch.equal(found["input_ids"][:, 4:], ids[:, 4:])
    assert bool((found["decoder_input_ids"] >= 100).all())
    assert not torch.equal(found["decoder_input_ids"], target)
    (pair,) = shuffle([(ids, target)], Both())
    assert bool((pair[1] >= 100).all())
    assert not torch.equal(pair[1], target)


def test_permutations_are_those_of_the_seed_the_rank_and_the_batch():
    ids = tokens()
    first, second = shuffle([ids, ids])
    again = shuffle([ids, ids])
    assert torch.equal(first, again[0])
    assert torch.equal(second, again[1])
    assert not torch.equal(first, second)
    assert not torch.equal(first, shuffle([ids], seed=1)[0])
    assert not torch.equal(first, shuffle([ids], rank=1)[0])
    assert shuffle([ids[:0]])[0].shape == (0, 6)


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        (
            torch.randn(40, 3, 4),
            r"takes tokens \(whole numbers \[B, T\]\), and input is float32 \[40, 3, 4\]",
        ),
        ((torch.randn(40, 4), torch.zeros(40, 4, dtype=torch.int64)), r"and input is float32 \[40, 4\]"),
        ({"x": torch.randn(40, 4)}, r"and x is float32 \[40, 4\]"),
        ({"one": tokens(), "two": tokens()}, "one entry of tokens, .* and the batch has one, two"),
        (torch.zeros(40, 3, dtype=torch.bool), r"and input is bool \[40, 3\]"),
        (torch.zeros(40, dtype=torch.int64), r"and input is int64 \[40\]"),
    ],
)
def test_what_is_no_token_is_refused(batch, words):
    with pytest.raises(ValueError, match=words):
        shuffle([batch])
    with pytest.raises(ValueError, match=words):
        probed(encoder(), [batch], control="shuffled_tokens", layers="encoder.layers")


def test_a_probe_of_shuffled_tokens_is_that_of_the_shuffled_batches(tmp_path):
    model, ids = encoder(), tokens(60)
    pieces = [ids[:25], ids[25:50], ids[50:]]
    options = {"layers": "encoder.layers"}
    found = probed(model, pieces, control="shuffled_tokens", control_seed=4, **options)
    truth = probed(model, shuffle(pieces, model, seed=4), **options)
    np.testing.assert_array_equal(found.dataset.effective_rank.values, truth.dataset.effective_rank.values)
    assert found.dataset.attrs["control"] == "shuffled_tokens"
    whole = probed(model, ids, control="shuffled_tokens", batch_size=25, control_seed=4, **options)
    np.testing.assert_array_equal(found.dataset.effective_rank.values, whole.dataset.effective_rank.values)


def test_a_control_goes_on_from_its_own_checkpoint_alone(tmp_path):
    model, ids = encoder(), tokens(60)
    pieces = [ids[:20], ids[20:40], ids[40:]]
    options = {"layers": "encoder.layers", "control": "shuffled_tokens", "checkpoint_every": 1}
    whole = probed(model, pieces, **options)
    path = tmp_path / "state"

    def stops():
        yield from pieces[:2]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        probed(model, stops(), checkpoint=path, **options)
    resumed = probed(model, pieces, checkpoint=path, **options)
    np.testing.assert_array_equal(resumed.dataset.effective_rank.values, whole.dataset.effective_rank.values)
    with pytest.raises(ValueError, match="checkpoint"):
        probed(model, pieces, checkpoint=path, layers="encoder.layers")


def test_a_control_merges_with_its_like_alone():
    model, ids = encoder(), tokens(60)
    options = {"layers": "encoder.layers", "route": "moments"}
    plain = probed(model, ids, **options)
    control = probed(model, ids, control="shuffled_tokens", **options)
    both = control.merge(probed(model, ids, control="shuffled_tokens", **options))
    assert both.dataset.attrs["control"] == "shuffled_tokens"
    words = r"other must be of the same control: None, got shuffled_tokens \(seed 0\)"
    with pytest.raises(ValueError, match=words):
        plain.merge(control)


def test_options_of_a_control_are_checked_before_any_work():
    with pytest.raises(
        ValueError, match="control must be one of 'random_weights', 'shuffled_tokens', got 'noise'"
    ):
        ProbeSpec(control="noise")
    with pytest.raises(ValueError, match="control_seed must be at least 0, got -1"):
        ProbeSpec(control_seed=-1)
    with pytest.raises(TypeError, match="Probe has no option 'control'"):
        rgfast.Probe(encoder(), control="random_weights")
