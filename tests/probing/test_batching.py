"""How whole arrays are cut into batches, and a stack's batches into tiles."""

import numpy as np
import pytest
import torch
from torch import nn

import rgfast
from rgfast.probing import batching
from rgfast.probing.capture.layers import resolve
from rgfast.probing.spec import ProbeSpec
from rgfast.runtime import waiting

N, LENGTH, WIDTH, DEPTH = 2500, 3, 4, 2
EACH = 4 * (DEPTH + 1) * LENGTH * WIDTH  # bytes of a sequence at all layers


@pytest.fixture
def elsewhere(monkeypatch):
    """The CPU is taken for a device where every operator is a launch."""
    monkeypatch.setattr(waiting, "_EVERYWHERE", True)


def stack(**options):
    torch.manual_seed(0)
    return rgfast.ResidualStack(WIDTH, DEPTH, mixing="none", w2_scale=0.5, **options)


X = torch.randn(N, LENGTH, WIDTH, generator=torch.Generator().manual_seed(1))


def sizes(model, batches, **options):
    """Sequences of every forward that a probe makes."""
    seen = []
    handle = model.register_forward_pre_hook(
        lambda m, args, given: seen.append(len([*args, *given.values()][0])), with_kwargs=True
    )
    options = {"route": "moments", "refine": False, "progress": False, "views": ["position"]} | options
    result = rgfast.probe(model, batches, **options)
    handle.remove()
    return seen, result.dataset


def test_a_checkpoint_counts_batches_of_the_usual_size(elsewhere, tmp_path):
    seen, _ = sizes(stack(), X, checkpoint=tmp_path / "state")
    assert seen == [256] * 9 + [196]


def test_a_stack_on_a_gpu_has_batches_of_whole_tiles(elsewhere):
    seen, tiles = [], []
    model = stack()
    real = model.stream_tiles

    def stream(consumer, tile=None):
        def told(first, states):
            tiles.append(states.shape[1])
            consumer(first, states)

        return real(told, tile)

    model.stream_tiles = stream
    seen, found = sizes(model, X)
    assert seen == tiles == [1024, 1024, 452]
    _, cut = sizes(stack(), X, batch_size=100)
    for name in ("effective_rank", "kernel_drift", "singular_values"):
        np.testing.assert_allclose(found[name].values, cut[name].values, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "first"),
    [
        ({"batch_size": 256}, 256),
        ({"batch_size": 2000}, 2000),
        ({"groups": 2}, 2048),
        ({"memory": 4 * 700 * EACH}, 700),
        ({"memory": 4 * 20 * EACH}, 256),
        ({"axes": "N T D"}, 256),
    ],
    ids=str,
)
def test_what_is_asked_for_counts_and_memory_bounds_the_rest(elsewhere, options, first):
    assert sizes(stack(), X, **options)[0][0] == first


def test_rows_without_positions_and_numpy_arrays(elsewhere):
    assert sizes(stack(), X[:, 0])[0][0] == 1024
    assert sizes(stack(), X.numpy())[0][0] == 1024


def test_models_of_other_kinds_and_other_batches_are_cut_as_ever(elsewhere):
    class Within(nn.Module):
        def __init__(self):
            super().__init__()
            self.stack = stack()

        def forward(self, x):
            return self.stack(x)

    blocks = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH))
    for model, batches, layers in (
        (Within(), X, "auto"),
        (blocks, X, ["0", "1"]),
        (stack(), {"x": X}, "auto"),
    ):
        assert sizes(model, batches, layers=layers)[0][0] == 256, type(model)
    assert sizes(stack(), [X[:77], X[77:]])[0] == [77, N - 77]


def test_on_the_cpu_nothing_changes():
    assert sizes(stack(), X)[0] == [256] * 9 + [196]
    assert batching.tile_size(stack(), 3) == 384


LABELS, VECTORS = torch.arange(N) % 5, torch.randn(N, 2, generator=torch.Generator().manual_seed(2))
OPTIONS = {
    "position": {},
    "default": {"views": None},
    "all pairs": {"pairs": "all", "views": ["position", "pooled"]},
    "groups": {"groups": 2},
    "some positions": {"positions": [0, "last"]},
    "labels": {"targets": {"a": LABELS, "b": LABELS[:, None].expand(N, LENGTH)}},
    "vectors": {"targets": {"a": VECTORS, "b": VECTORS[:, 0], "c": X[..., :1], "d": X[:, :, 0]}},
    "masked": {"mask": lambda entries: next(iter(entries.values()))[..., 0] > 1.0, "views": None},
    "rows": {"rows": {"odd": torch.arange(N) % 2 == 1}, "views": None},
}


def state_of(**options):
    """Bytes of the state that a probe plans when it has seen its first batch."""
    with rgfast.Probe(stack(), progress=False, **options) as probe, torch.no_grad():
        probe.run(X[:256])
    return probe.plan.state_bytes


@pytest.mark.parametrize("name", OPTIONS)
def test_rows_of_a_tile_have_what_the_state_leaves_of_memory(elsewhere, name):
    asked = {"route": "moments", "refine": False, "views": ["position"]} | OPTIONS[name]
    seen = []
    for memory in (50_000, 275_000, 600_000, 4_000_000):
        state = state_of(memory=memory, **asked)
        model, spec = stack(), ProbeSpec(memory=memory, **asked)
        taps, _ = resolve(model, "auto")
        seen.append(batching.batch_size(spec, model, taps, X))
        fitting = min(memory // 4, memory - state) // EACH
        assert seen[-1] == max(256, min(1024 * spec.groups, fitting))
    assert len({*seen}) > 2


def test_a_state_that_leaves_little_has_batches_of_the_usual_size(elsewhere):
    """At a quarter of memory it would be 390, 477 and 520 sequences."""
    for memory, first in ((225_000, 256), (275_000, 465), (300_000, 520)):
        assert sizes(stack(), X, groups=40, pairs="all", memory=memory)[0][0] == first


@pytest.mark.parametrize(
    "options",
    [{"targets": {"a": lambda entries: X[:256, 0]}}, {"memory": 2_000}],
    ids=["targets of entries", "nothing fits"],
)
def test_a_state_that_is_not_known_has_batches_of_the_usual_size(elsewhere, options):
    asked = {"route": "moments", "refine": False, "views": ["position"], "memory": "1GiB"} | options
    model = stack()
    taps, _ = resolve(model, "auto")
    assert batching.batch_size(ProbeSpec(**asked), model, taps, X) == 256
    del asked["targets" if "targets" in asked else "memory"]
    assert batching.batch_size(ProbeSpec(**asked), model, taps, X) == 1024
