"""Models whose weights are offloaded or dispatched: the numbers, names and fingerprint of the plain model."""

import types

import numpy as np
import pytest
import torch
from models import Block, seeded
from torch import nn

import rgfast
from rgfast.probing.checkpoint import fingerprint, model_digest

accelerate = pytest.importorskip("accelerate")

X = torch.randn(40, 4, 8, generator=torch.Generator().manual_seed(3))
IDS = torch.randint(40, (32, 8), generator=torch.Generator().manual_seed(0))


PARTS = X.split(15)


class Halved(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.tensor(0.5))

    def forward(self, x):
        return x * self.scale


class Stack(nn.Module):
    """A buffer, blocks, and a block that runs twice."""

    def __init__(self):
        super().__init__()
        self.halved = Halved()
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x):
        x = self.halved(x)
        for block in (*self.blocks, self.blocks[0]):
            x = block(x)
        return x


def on_host(model, folder):
    return accelerate.cpu_offload(model, execution_device="cpu")


def with_buffers(model, folder):
    return accelerate.cpu_offload(model, execution_device="cpu", offload_buffers=True)


def on_disk(model, folder):
    return accelerate.disk_offload(model, folder, execution_device="cpu")


def dispatched(model, folder, names=("halved", "blocks.0", "blocks.1", "blocks.2"), disk=("blocks.1",)):
    """Placed by a map of devices, of which the disk is one."""
    places = {name: "disk" if name in disk else "cpu" for name in names}
    return accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=folder, force_hooks=True)


def from_first(model, folder):
    return dispatched(model, folder, disk=("blocks.0",))


WAYS = [on_host, with_buffers, on_disk, dispatched, from_first]


def probe(model, batches=PARTS, **more):
    return rgfast.probe(model, list(batches), progress=False, **{"views": ["position", "pooled"]} | more)


def assert_same(found, wanted):
    assert found.layers == wanted.layers
    for name, values in wanted.dataset.data_vars.items():
        np.testing.assert_array_equal(found.dataset[name], values, err_msg=name)
    assert found.provenance["weights"] == wanted.provenance["weights"] is not None


@pytest.mark.parametrize("way", WAYS)
def test_an_offloaded_model_gives_the_bits_of_a_plain_one(way, tmp_path):
    wanted = probe(seeded(Stack))
    model = way(seeded(Stack), tmp_path)
    assert any(p.is_meta for p in model.parameters())
    assert_same(probe(model), wanted)
    assert "blocks.0#2" in wanted.layers
    assert any(p.is_meta for p in model.parameters())


@pytest.mark.parametrize("way", [on_disk, from_first])
def test_a_checkpoint_goes_on_with_the_same_weights_wherever_they_are(way, tmp_path):
    asked = {"checkpoint": tmp_path / "run.checkpoint", "checkpoint_every": 1, "route": "moments"}
    wanted = probe(seeded(Stack), route="moments")
    probe(way(seeded(Stack), tmp_path / "first"), PARTS[:1], **asked)
    probe(seeded(Stack), PARTS[:2], **asked)
    assert_same(probe(way(seeded(Stack), tmp_path / "then"), **asked), wanted)
    with pytest.raises(ValueError, match="checkpoint is of a model with other weights"):
        probe(way(seeded(Stack, seed=1), tmp_path / "other"), **asked)


def test_rows_that_are_held_are_on_the_device_that_weights_are_brought_to(tmp_path):
    asked = {
        "checkpoint": tmp_path / "run.checkpoint",
        "checkpoint_every": 1,
        "route": "samples",
        "groups": 1,
    }
    wanted = probe(seeded(Stack), route="samples")
    probe(on_host(seeded(Stack), None), PARTS[:1], **asked)
    assert_same(probe(on_host(seeded(Stack), None), **asked), wanted)


def test_a_checkpoint_of_weights_that_cannot_be_read_is_refused_before_any_forward(tmp_path):
    model = on_host(seeded(Stack), None)
    for block in model.blocks:  # a hook that brings weights from elsewhere
        block.inner._hf_hook = types.SimpleNamespace(execution_device="cpu")
    assert fingerprint(model) is None
    model.register_forward_pre_hook(lambda *_: pytest.fail("it ran"))
    with pytest.raises(
        ValueError, match=r"checkpoint must be of a model whose weights can be read, .* Stack"
    ):
        probe(model, checkpoint=tmp_path / "run.checkpoint")


def gpt():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_layer=3, n_head=2, n_embd=16, vocab_size=40, n_positions=8, bos_token_id=0, eos_token_id=0
    )
    return seeded(transformers.GPT2LMHeadModel, config)


def placed_gpt(folder, *disk):
    names = [f"transformer.{name}" for name in ("wte", "wpe", "h.0", "h.1", "h.2", "ln_f")]
    disk = {*disk, "lm_head"} if "transformer.wte" in disk else disk  # whose weight is the embedding's
    return dispatched(gpt(), folder, [*names, "lm_head"], disk)


@pytest.mark.parametrize("disk", [("transformer.h.1",), ("transformer.wte", "transformer.h.2")])
def test_a_device_map_leaves_names_ordinals_and_fingerprints_as_they_are(disk, tmp_path):
    """With a cache of keys and values, which the model puts out beside its stream."""
    wanted = probe(gpt(), IDS.split(16), layers=[0, 1, 3])
    assert wanted.layers == ("transformer.h.0:input", "transformer.h.0", "transformer.h.2")
    model = placed_gpt(tmp_path, *disk)
    assert model(IDS[:2]).past_key_values.get_seq_length() == IDS.shape[1]
    found = probe(model, IDS.split(16), layers=[0, 1, 3])
    assert_same(found, wanted)
    both = found.merge(wanted)  # though weights that are tied are counted twice on the disk
    assert both.dataset.n.max() == 2 * wanted.dataset.n.max()
    assert model_digest(model) == model_digest(gpt())


def test_a_forward_that_starts_from_a_cache_is_refused_wherever_the_model_is(tmp_path):
    model = placed_gpt(tmp_path, "transformer.h.1")
    with torch.no_grad(), rgfast.Probe(model, progress=False) as p:
        past = model(IDS[:8]).past_key_values
        with pytest.raises(ValueError, match=r"generate\(\) cannot be probed"):
            model(IDS[:8, :1], past_key_values=past)
    assert p.result().dataset.n.max() == IDS[:8].numel()
