"""A monitor measures what a probe of saved weights measures, and training does not notice it."""

import copy
import json
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import rgfast


class Noisy(nn.Module):
    """Dropout draws random numbers, BatchNorm has buffers that training moves."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.GELU(), nn.Dropout(0.2), nn.Linear(12, 6))
            for _ in range(3)
        )

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return x


BATCH = torch.randn(48, 6, generator=torch.Generator().manual_seed(5))


def made(model=Noisy):
    torch.manual_seed(3)
    return model()


def trained(model, monitor=None, *, steps=9, run=None, accumulate=1, saved=None):
    """A plain loop; ``saved`` takes a copy of the weights at every step that is measured."""
    run = model if run is None else run
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    torch.manual_seed(11)
    model.train()
    for i in range(steps):
        if monitor is not None:
            monitor.step(i)
        if saved is not None and i % 4 == 0:
            saved[i] = copy.deepcopy(model.state_dict())
        for _ in range(accumulate):
            x = torch.randn(16, 6)
            (run(x) - 0.1 * x).square().mean().div(accumulate).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same_bits(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_weights_are_those_of_a_loop_without_it(accumulate):
    alone = trained(made(), accumulate=accumulate)
    model = made()
    monitor = rgfast.Monitor(model, BATCH, every=2)
    assert_same_bits(trained(model, monitor, accumulate=accumulate), alone)
    assert model.training
    assert monitor.result().steps == (0, 2, 4, 6, 8)


@pytest.mark.parametrize("inplace", [False, True])
def test_weights_are_those_of_a_compiled_loop_without_it(inplace):
    def of(watched):
        torch._dynamo.reset()
        model = made()
        run = model
        if inplace:
            model.compile(backend="eager")
        else:
            run = torch.compile(model, backend="eager")
        return trained(model, rgfast.Monitor(run, BATCH, every=3) if watched else None, run=run)

    assert_same_bits(of(True), of(False))


def test_random_numbers_hooks_flags_and_gradients_are_as_before():
    model = made().train()
    model.blocks[1].eval()
    model(BATCH).sum().backward()
    grads = [p.grad.clone() for p in model.parameters()]
    flags = [m.training for m in model.modules()]
    state = torch.get_rng_state()
    rgfast.Monitor(model, BATCH, every=1).step(0)
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in model.modules()] == flags
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.is_grad_enabled()


def test_values_are_those_of_a_probe_of_the_saved_weights():
    model, saved = made(), {}
    targets = {"first": lambda entries: entries["input"][:, :1]}
    options = {"measures": ["effective_rank", "kernel_drift", "cka"], "targets": targets}
    monitor = rgfast.Monitor(model, BATCH, every=4, **options)
    trained(model, monitor, saved=saved)
    result = monitor.result()
    assert result.steps == tuple(saved) == (0, 4, 8)
    assert set(result.measures) == {"effective_rank", "kernel_drift", "cka"}
    for k, state in enumerate(saved.values()):
        twin = made()
        twin.load_state_dict(state)
        probed = rgfast.probe(twin, [BATCH], progress=False, **options)
        for name in (*result.measures, "target_r2", "effective_rank_se"):
            np.testing.assert_array_equal(result.dataset[name].values[k], probed.dataset[name].values)
        np.testing.assert_array_equal(result.dataset["n"].values, probed.dataset["n"].values)
        frame = result.to_dataframe()
        part = frame[frame.step == result.steps[k]].drop(columns="step").reset_index(drop=True)
        assert part.equals(probed.to_dataframe())


def test_it_measures_outside_of_autocast():
    model = made()
    monitor = rgfast.Monitor(model, BATCH, every=1, measures="effective_rank")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        monitor.step(0)
        assert torch.is_autocast_enabled("cpu")
    alone = rgfast.probe(made(), [BATCH], measures="effective_rank", progress=False)
    np.testing.assert_array_equal(
        monitor.result().dataset.effective_rank.values[0], alone.dataset.effective_rank.values
    )


def test_what_is_logged():
    logged = []
    model = rgfast.ResidualStack(width=4, depth=2, mixing="none", w2_scale=1.0)
    x = torch.randn(64, 3, 4)
    monitor = rgfast.Monitor(
        model, x, every=5, log=lambda values, step: logged.append((step, values)), views=["pooled"],
        measures=["effective_rank", "kernel_drift", "cka"],
    )  # fmt: skip
    assert monitor.step(3) is None
    assert monitor.step(5) == logged[0][1]
    assert monitor.step(5) is None  # a second batch of the same step
    (step, values), *rest = logged
    assert (step, rest) == (5, [])
    assert set(values) == {
        *(f"effective_rank/pooled/layer_{k}" for k in range(3)),
        *(f"kernel_drift/pooled/transition_{k}" for k in range(2)),
    }
    probed = rgfast.probe(model, [x], views=["pooled"], progress=False)
    assert values["effective_rank/pooled/layer_1"] == float(probed.order_parameter("pooled")[1])


def test_a_list_is_of_batches_and_padding_counts():
    model = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(2)))
    keep = torch.arange(5) < torch.tensor([5, 3] * 20)[:, None]
    batches = [{"input": x, "attention_mask": keep[:20]} for x in torch.randn(2, 20, 5, 4)]
    monitor = rgfast.Monitor(model, batches, every=1, measures="effective_rank")
    monitor.step(0)
    n = monitor.result().variable("n", "pooled").values
    assert n.tolist() == [2 * int(keep[:20].sum())]


def test_when_layers_collapse(tmp_path):
    """The second layer loses half of its directions from step 20 on; the first does so for one step alone."""
    x = torch.randn(400, 8, dtype=torch.float64)

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8, bias=False)) for _ in range(2))

        def forward(self, x):
            for block in self.blocks:
                x = block(x)
            return x

    model = Scaled().double()
    monitor = rgfast.Monitor(model, x, every=10, layers="blocks", measures=["effective_rank", "kernel_drift"])
    eye, half = torch.eye(8, dtype=torch.float64), torch.diag(torch.tensor([1.0] * 4 + [0.0] * 4)).double()
    for step in range(0, 41, 10):
        with torch.no_grad():
            model.blocks[0][0].weight.copy_(half if step == 10 else eye)
            model.blocks[1][0].weight.copy_(half if step >= 20 else eye)
        monitor.step(step)
    result = monitor.result()
    np.testing.assert_array_equal(result.collapse().values, [np.nan, np.nan, 10.0])
    rank = result.by_step("effective_rank").values
    assert rank.shape == (5, 3)
    assert rank[1, 1] < 4.01 < 7 < rank[0, 1]
    np.testing.assert_array_equal(result.collapse(below=0.4).values, [np.nan] * 3)
    assert "collapsed at" in str(result)
    assert "never  blocks.0" in str(result)
    ax = result.plot()
    assert ax.get_xlabel() == "training step"
    assert result.plot("kernel_drift").get_ylabel() == "transition"
    result.report(tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "1 of 3 layers collapsed, the first at step 10" in page
    assert "Effective rank (singular values) by layer and training step" in page


def test_refusals(tmp_path):
    model = made()
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got int"):
        rgfast.Monitor(3, BATCH)
    with pytest.raises(ValueError, match="every must be at least 1, got 0"):
        rgfast.Monitor(model, BATCH, every=0)
    with pytest.raises(TypeError, match="log must be a function of values and a step, got str"):
        rgfast.Monitor(model, BATCH, log="wandb")
    with pytest.raises(TypeError, match="Monitor has no option 'distributed'"):
        rgfast.Monitor(model, BATCH, distributed=True)
    with pytest.raises(ValueError, match=r"measures must be 'all' or among .*, got 'rank'"):
        rgfast.Monitor(model, BATCH, measures="rank")
    with pytest.raises(ValueError, match="batch must hold a batch, got none"):
        rgfast.Monitor(model, [])
    with pytest.raises(ValueError, match="path must be in a folder that exists"):
        rgfast.Monitor(model, BATCH, path=tmp_path / "none" / "x.jsonl")
    with pytest.raises(ValueError, match=r"path must be the path of a file, and .* is a folder"):
        rgfast.Monitor(model, BATCH, path=tmp_path)
    monitor = rgfast.Monitor(model, BATCH, measures=["effective_rank", "cka"])
    with pytest.raises(RuntimeError, match="nothing was measured yet"):
        monitor.result()
    with pytest.raises(ValueError, match="i must be at least 0, got -1"):
        monitor.step(-1)
    monitor.step(0)
    result = monitor.result()
    with pytest.raises(ValueError, match=r"measure must be one of .*, got 'kernel_drift'"):
        result.by_step("kernel_drift")
    with pytest.raises(ValueError, match="measure must be one of effective_rank, got 'cka'"):
        result.plot("cka")
    with pytest.raises(ValueError, match="view must be one of pooled, got 'masked'"):
        result.by_step(view="masked")
    with pytest.raises(ValueError, match="measure must be a rank, got 'cka'"):
        result.collapse(measure="cka")
    with pytest.raises(ValueError, match="below must be between 0 and 1, got 1"):
        result.collapse(below=1)
    with pytest.raises(ValueError, match="target must be one of none"):
        result.target_r2("token")


def test_training_that_diverges_goes_on(tmp_path):
    path = tmp_path / "run.jsonl"
    model = made()
    monitor = rgfast.Monitor(model, BATCH, every=1, measures="effective_rank", path=path)
    monitor.step(0)
    with torch.no_grad():
        model.blocks[1][4].weight.fill_(torch.nan)
    with pytest.warns(RuntimeWarning, match="step 1: activations must be finite, got .* in layer 2"):
        monitor.step(1)
    result = rgfast.MonitorResult.load(path)
    assert np.isnan(result.dataset.effective_rank.values[1]).all()
    assert np.isfinite(result.dataset.effective_rank.values[0]).all()
    assert list(result.notes) == [1]
    assert np.isnan(result.collapse().values).all()


def test_what_the_model_raises_is_passed_on():
    monitor = rgfast.Monitor(made(), torch.randn(4, 7), every=1)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        monitor.step(0)


class TestFile:
    def monitored(self, path, steps=9, **options):
        model = made()
        monitor = rgfast.Monitor(model, BATCH, every=2, measures="effective_rank", path=path, **options)
        trained(model, monitor, steps=steps)
        return monitor

    def test_it_is_read_while_it_grows_and_saved_as_it_is(self, tmp_path):
        path = tmp_path / "run.jsonl"
        monitor = self.monitored(path)
        result = rgfast.MonitorResult.load(path)
        assert result.dataset.identical(monitor.result().dataset)
        with path.open("ab") as file:
            file.write(b'{"step": 10, "val')  # half a line: another process is writing it
        assert rgfast.MonitorResult.load(path).dataset.identical(result.dataset)
        result.save(tmp_path / "copy.jsonl")
        assert rgfast.MonitorResult.load(tmp_path / "copy.jsonl").dataset.identical(result.dataset)

    def test_going_on_from_a_checkpoint_gives_the_same_file(self, tmp_path):
        whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
        self.monitored(whole)
        model = made()
        first = rgfast.Monitor(model, BATCH, every=2, measures="effective_rank", path=cut)
        for i in range(7):  # gone past the checkpoint at step 4, then killed in the middle of a line
            first.step(i)
        with cut.open("ab") as file:
            file.write(b'{"step": 8')
        again = made()
        monitor = rgfast.Monitor(again, BATCH, every=2, measures="effective_rank", path=cut)
        trained(again, None, steps=4)
        weights = rgfast.MonitorResult.load(cut).steps
        assert weights == (0, 2, 4, 6)
        monitor.measure(4)
        assert rgfast.MonitorResult.load(cut).steps == (0, 2, 4)
        assert monitor.result().steps == (0, 2, 4)
        lines = [json.loads(line) for line in cut.read_bytes().splitlines()]
        assert [line.get("step") for line in lines] == [None, 0, 2, 4]
        wanted = json.loads(whole.read_bytes().splitlines()[3])
        assert lines[3] == wanted

    def test_a_file_of_something_else_is_refused_before_any_step(self, tmp_path):
        path = tmp_path / "run.jsonl"
        self.monitored(path, steps=1)
        before = path.read_bytes()
        with pytest.raises(ValueError, match=r"path: .*run.jsonl was written with another batch"):
            rgfast.Monitor(made(), BATCH + 1, measures="effective_rank", path=path)
        with pytest.raises(ValueError, match="was written with another measures; delete it"):
            rgfast.Monitor(made(), BATCH, measures="cka", path=path)
        assert path.read_bytes() == before

    @pytest.mark.parametrize(
        ("content", "says"),
        [
            (b"", "not the file of a monitor"),
            (b"1,2,3\n", "not the file of a monitor"),
            (b"[1]\n", "not the file of a monitor"),
            (b'{"format": "rgfast.monitor/7"}\n', "written by another rgfast"),
            (b'{"format": "rgfast.monitor/1"}\n{"step": 1}\n', "damaged: a line after the first is no step"),
            (b'{"format": "rgfast.monitor/1"}\n{"step": 1,\n', "damaged or not the file of a monitor"),
            (b'{"format": "rgfast.monitor/1"}\n', "has no measured step yet"),
        ],
    )
    def test_wrong_files(self, tmp_path, content, says):
        path = tmp_path / "run.jsonl"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=says):
            rgfast.MonitorResult.load(path)

    def test_no_file(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="there is no file"):
            rgfast.MonitorResult.load(tmp_path / "x.jsonl")

    def test_a_file_that_was_deleted_while_training_is_whole_again(self, tmp_path):
        path = tmp_path / "run.jsonl"
        model = made()
        monitor = rgfast.Monitor(model, BATCH, every=1, measures="effective_rank", path=path)
        monitor.step(0)
        path.unlink()
        monitor.step(1)
        assert rgfast.MonitorResult.load(path).steps == (0, 1)


@pytest.mark.filterwarnings("default")  # Trainer warns of what it will rename
def test_trainer_gives_the_same_weights_and_the_values_of_its_checkpoints(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=16,
    )  # fmt: skip
    tokens = torch.randint(5, 30, (32, 6), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in tokens]
    batch = {"input_ids": tokens[:16], "attention_mask": torch.ones_like(tokens[:16])}
    found = []

    def run(watched):
        torch.manual_seed(0)
        model = transformers.BertForMaskedLM(config)
        monitor = rgfast.Monitor(model, batch, every=3, views=["pooled"], measures="effective_rank")
        arguments = transformers.TrainingArguments(
            str(tmp_path / str(watched)), max_steps=7, save_strategy="steps", save_steps=3, report_to="none",
            per_device_train_batch_size=4, gradient_accumulation_steps=2, disable_tqdm=True, use_cpu=True,
            logging_strategy="no",
        )  # fmt: skip
        callbacks = [monitor.transformers_callback()] if watched else []
        transformers.Trainer(model, arguments, train_dataset=data, callbacks=callbacks).train()
        if watched:
            found.append(monitor.result())
        return model.state_dict()

    assert_same_bits(run(True), run(False))
    (result,) = found
    assert result.steps == (0, 3, 6, 7)
    model = transformers.BertForMaskedLM.from_pretrained(tmp_path / "True" / "checkpoint-3")
    probed = rgfast.probe(model, [batch], views=["pooled"], measures="effective_rank", progress=False)
    np.testing.assert_array_equal(
        result.dataset.effective_rank.values[1], probed.dataset.effective_rank.values
    )


@pytest.mark.filterwarnings("default")
def test_lightning_gives_the_same_weights():
    lightning = pytest.importorskip("pytorch_lightning")
    data = torch.randn(40, 6, generator=torch.Generator().manual_seed(1))

    class Denoiser(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = made()

        def training_step(self, batch):
            return (self.model(batch + torch.randn_like(batch)) - batch).square().mean()

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=1e-2)

    steps = []

    def run(watched):
        module = Denoiser()
        monitor = rgfast.Monitor(module.model, BATCH, every=4, measures="effective_rank")
        trainer = lightning.Trainer(
            max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, accumulate_grad_batches=2,
            callbacks=[monitor.lightning_callback()] if watched else [],
        )  # fmt: skip
        torch.manual_seed(7)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=4, shuffle=True))
        if watched:
            steps.extend(monitor.result().steps)
        return module.state_dict()

    assert_same_bits(run(True), run(False))
    assert steps == [0, 4, 8, 10]


def test_without_their_packages_callbacks_say_so(monkeypatch):
    import rgfast.monitor.callbacks as callbacks

    monkeypatch.setattr(callbacks, "find_spec", lambda name: None)
    monitor = rgfast.Monitor(made(), BATCH)
    with pytest.raises(ImportError, match="needs transformers, which is not installed"):
        monitor.transformers_callback()
    with pytest.raises(ImportError, match="needs lightning or pytorch_lightning, and neither"):
        monitor.lightning_callback()
