"""Models as people have them: shared blocks, dropped layers, offloaded, quantized, traced, generating."""

import types
import warnings

import pytest
import torch
from models import Block, Tokens, seeded
from test_probe_masks import rank_of
from torch import nn

import rgfast

GENERATOR = torch.Generator().manual_seed(3)
X = torch.randn(80, 4, 8, generator=GENERATOR)


def probe(model, batches=X, **options):
    return rgfast.probe(model, batches, progress=False, **options)


def assert_layers(result, rows):
    """Pooled ranks and the drift of neighbors are those of ``rows[l]`` ``[B, T, D]``."""
    flat = [x.flatten(0, 1) for x in rows]
    assert result.order_parameter("pooled").values == pytest.approx([rank_of(x) for x in flat], rel=1e-6)
    want = rgfast.kernel_drift([x.double() for x in flat])
    got = result.order_parameter("pooled", "kernel_drift").values
    assert got == pytest.approx(want.numpy(), abs=1e-9)


class Shared(nn.Module):
    """ALBERT's way: blocks that run again and again."""

    def __init__(self, blocks=1, times=6):
        super().__init__()
        self.groups, self.times = nn.ModuleList([Block() for _ in range(blocks)]), times

    def forward(self, x):
        for _ in range(self.times):
            for block in self.groups:
                x = block(x)
        return x


def shared_stream(model):
    rows = [X]
    with torch.no_grad():
        for _ in range(model.times):
            for block in model.groups:
                rows.append(block(rows[-1]))
    return rows


def test_a_shared_block_is_one_layer_per_run():
    model = seeded(Shared)
    result = probe(model, batch_size=30)
    assert result.layers == ("groups.0:input", *(f"groups.0#{k}" for k in range(1, 7)))
    assert_layers(result, shared_stream(model))


def test_shared_blocks_in_the_order_in_which_they_run():
    model = seeded(Shared, 2, 3)
    result = probe(model, batch_size=30)
    assert result.layers[1:] == tuple(f"groups.{b}#{k}" for k in (1, 2, 3) for b in (0, 1))
    assert_layers(result, shared_stream(model))
    named = probe(model, layers=["groups.1", "groups.0"])
    assert named.layers == result.layers[1:]


def test_pairs_of_runs():
    result = probe(seeded(Shared), pairs=[(0, 6)])
    assert result.dataset.cka.sel(view="pooled", position=-1).notnull().values[0, 6]
    with pytest.raises(ValueError, match="pairs must name layers 0 to 6, got"):
        probe(seeded(Shared), pairs=[(0, 7)])


def test_more_runs_than_at_first_are_refused():
    model = seeded(Shared)

    def batches():
        yield X
        model.times = 8
        yield X

    with pytest.raises(ValueError, match=r"'groups.0' ran 7 times in this forward and 6 in an earlier one"):
        probe(model, batches())


def test_a_module_named_twice_over_a_sequence():
    block = nn.Linear(4, 4)
    result = probe(nn.Sequential(block, nn.ReLU(), block), torch.randn(20, 5, 4), layers=["0"])
    assert result.layers == ("0#1", "0#2")


class Drops(nn.Module):
    """LayerDrop: which blocks run is up to the batch."""

    def __init__(self, runs):
        super().__init__()
        self.blocks, self.runs, self.at = nn.ModuleList([Block() for _ in range(3)]), runs, 0

    def forward(self, x):
        for k, block in enumerate(self.blocks):
            x = block(x) if k in self.runs[self.at] else x
        self.at += 1
        return x


@pytest.mark.parametrize(
    "runs", [[{0, 1, 2}, {0, 2}, {0, 1, 2}, {0, 2}], [{0, 2}, {0, 1, 2}, {0, 2}, {0, 1, 2}]]
)
@pytest.mark.parametrize("options", [{}, {"views": ["position"], "pairs": "all"}, {"groups": 4}])
def test_layers_that_do_not_run_have_fewer_rows(runs, options):
    model = seeded(Drops, runs)
    result = probe(model, X.split(20), **options)
    assert "did not run in some batches: blocks.1; they have fewer rows" in "\n".join(result.notes)
    rows: list[list[torch.Tensor]] = [[], [], [], []]
    with torch.no_grad():
        for part, run in zip(X.split(20), runs, strict=True):
            x = part
            rows[0].append(x)
            for k, block in enumerate(model.blocks):
                x = block(x) if k in run else x
                if k in run:
                    rows[k + 1].append(x)
    view = result.views[-1] if options.get("views") else "pooled"
    data = result.dataset.sel(view=view)
    position = 0 if options.get("views") else -1
    at = data.sel(position=position)
    for layer, parts in enumerate(rows):
        x = torch.cat(parts)
        x = x[:, 0] if options.get("views") else x.flatten(0, 1)
        assert int(at.n_by_layer[layer]) == len(x)
        assert float(at.effective_rank[layer]) == pytest.approx(rank_of(x), rel=1e-6)
    assert at.cka.notnull().values[0, 1]
    assert at.cka.isnull().values[1, 2]
    assert at.cka.isnull().values[2, 3]


def test_a_layer_that_never_runs():
    with pytest.raises(ValueError, match=r"blocks\.1 did not run in 4 forwards; name layers that run"):
        probe(seeded(Drops, [{0, 2}] * 4), X.split(20))


def test_merging_what_missed_different_layers():
    first, second = (seeded(Drops, runs) for runs in ([{0, 1, 2}, {0, 2}], [{0, 1, 2}, {0, 1}]))
    merged = probe(first, X[:40].split(20)).merge(probe(second, X[40:].split(20)))
    whole = probe(seeded(Drops, [{0, 1, 2}, {0, 2}, {0, 1, 2}, {0, 1}]), X.split(20))
    assert merged.order_parameter("pooled").values == pytest.approx(
        whole.order_parameter("pooled").values, rel=1e-12
    )
    assert merged.dataset.n_by_layer.equals(whole.dataset.n_by_layer)


def test_a_stack_by_its_name():
    model = nn.ModuleDict(
        {
            "enc": nn.ModuleDict({"block": nn.ModuleList([Block(), Block()])}),
            "dec": nn.Sequential(Block(), Block()),
        }
    )

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.enc, self.dec = model["enc"], model["dec"]

        def forward(self, x):
            for block in self.enc["block"]:
                x = block(x)
            return self.dec(x)

    net = seeded(Net)
    with pytest.raises(ValueError, match="ambiguous") as refused:
        probe(net)
    choices = [part.split("'")[1] for part in str(refused.value).split("layers=")[2:]]
    assert choices == ["enc.block", "dec"]
    for name in choices:
        assert probe(net, layers=name).layers == (f"{name}.0:input", f"{name}.0", f"{name}.1")
    assert probe(net, layers=["enc.block", "dec"]).layers[-1] == "dec"


def test_what_was_looked_at_is_said():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    with pytest.raises(ValueError, match=r"looked at the model \(Sequential of Linear, ReLU\)"):
        probe(model)
    with pytest.raises(ValueError, match="there is no ModuleList or Sequential"):
        probe(seeded(Block))


def test_quantized_blocks_are_a_stack():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = seeded(lambda: nn.Sequential(Block(), Block(), Block()))
        model = torch.ao.quantization.quantize_dynamic(plain, {nn.Linear}, dtype=torch.qint8)
    assert probe(model).layers == ("0:input", "0", "1", "2")


def test_weights_that_wait_elsewhere():
    """What accelerate's offloading does: parameters on meta between forwards, and a hook that brings them."""
    model = seeded(lambda: nn.Sequential(Block(), Block()))
    want = probe(model)
    weights = {name: value.detach().clone() for name, value in model.named_parameters()}

    def bring(module, args):
        for name, value in weights.items():
            owner = model.get_submodule(name.rpartition(".")[0])
            setattr(owner, name.rpartition(".")[2], nn.Parameter(value))

    def take(module, args, output):
        for name in weights:
            owner = model.get_submodule(name.rpartition(".")[0])
            setattr(owner, name.rpartition(".")[2], nn.Parameter(weights[name].to("meta")))

    model.register_forward_pre_hook(bring)
    model.register_forward_hook(take, always_call=True)
    model._hf_hook = types.SimpleNamespace(execution_device="cpu")
    take(model, None, None)
    got = probe(model)
    assert got.dataset.effective_rank.equals(want.dataset.effective_rank)


def test_code_that_does_not_run_its_modules():
    net = seeded(lambda: nn.Sequential(Block(), Block()))
    exported = torch.export.export(net, (X,))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(net, X)
    for model, word in ((exported, "exported program"), (exported.module(), "inlined"), (traced, "traced")):
        with pytest.raises(TypeError, match=f"model must run its modules one by one, and .*{word}"):
            probe(model)


class Generates(Tokens):
    def forward(self, input_ids, past_key_values=None):
        return self.stream(input_ids)

    def generate(self, ids, cached):
        out = self(ids)
        for _ in range(3):
            token = out[:, -1].argmax(-1, keepdim=True)
            ids = torch.cat([ids, token], 1)
            out = self(token, past_key_values=(1,)) if cached else self(ids)
        return ids


@pytest.mark.parametrize("cached", [False, True])
def test_generating_inside_a_probe_is_refused(cached):
    model, ids = seeded(Generates), torch.randint(20, (10, 5), generator=GENERATOR)
    with (
        torch.no_grad(),
        pytest.raises(ValueError, match=r"generate\(\) cannot be probed"),
        rgfast.Probe(model, progress=False),
    ):
        model.generate(ids, cached)
    whole = model.generate(ids, cached)
    assert probe(model, [whole]).dataset.attrs["length"] == 8


def test_a_loop_in_inference_mode_can_be_read_and_continued():
    """What the probe keeps is no tensor of inference mode, whatever is probed and however it ends."""
    torch.manual_seed(0)
    x = torch.randn(300, 5, 4)
    for model, layers in (
        (rgfast.ResidualStack(4, 2, mixing="none"), "auto"),
        (torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh(), torch.nn.Linear(4, 4)), ["0", "2"]),
    ):
        want = rgfast.probe(model, x, layers=layers, route="moments", progress=False)
        with rgfast.Probe(model, layers=layers, progress=False) as watched:
            with torch.inference_mode():
                for part in x[:256].split(128):
                    model(part)
            first = watched.result().dataset
            assert first.n.max() == 256 * 5
            with torch.no_grad():
                model(x[256:])
        found = watched.result().dataset
        for name in ("effective_rank", "kernel_drift"):
            assert torch.allclose(
                torch.from_numpy(found[name].values), torch.from_numpy(want.dataset[name].values),
                rtol=1e-9, atol=1e-12, equal_nan=True,
            )  # fmt: skip


def test_a_target_of_weights_keeps_no_graph():
    """A function of the entries that uses weights of the model."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh(), torch.nn.Linear(4, 4))
    targets = {"first": lambda entries: model[0](entries["input"])}
    result = rgfast.probe(model, torch.randn(300, 4), layers=["0", "2"], targets=targets, progress=False)
    r2 = result.dataset.target_r2.isel(target=0, view=0, position=0)
    assert float(r2[0]) == pytest.approx(1.0, abs=1e-6)
