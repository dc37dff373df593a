"""What a configuration can ask for beyond the default set-up, and that the default did not move."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import tiny_config

import rgfast
from rgfast import MarkovChain
from rgfast.experiments.config import ReproduceConfig
from rgfast.experiments.points import Point
from rgfast.experiments.runs import Run, build_model, execute, views_of
from rgfast.training import TrainingConfig, seeded_generator, train

TINY = tiny_config(seeds=(0,), states=6, probe_sequences=800, chains=("lazy",))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_the_default_draws_what_it_always_drew():
    config = TrainingConfig()
    drawn = config.draw_mask(128, 12, seeded_generator(0, "masks"))
    assert torch.equal(drawn, rgfast.masking.iid_mask(128, 12, 0.2, seeded_generator(0, "masks")))
    # Recorded streams: a new one must not move those that were there.
    first = [
        int(torch.randint(1 << 30, (1,), generator=seeded_generator(0, s))) for s in ("weights", "probe")
    ]
    assert first == [366033228, 918567381]


def test_exact_masks_hide_the_same_number_everywhere():
    mask = TrainingConfig(mask_rate=0.15, masking="exact").draw_mask(50, 20, generator())
    assert mask.sum(1).unique().tolist() == [3]
    least = TrainingConfig(mask_rate=0.01, masking="exact").draw_mask(50, 20, generator())
    assert least.sum(1).unique().tolist() == [1]


def test_one_target_per_sequence_leaves_the_probe_its_rate():
    config = TrainingConfig(mask_rate=0.15, masking="one")
    mask = config.draw_mask(4000, 20, generator())
    assert mask.sum(1).unique().tolist() == [1]
    # Every position equally often: 200 of 4,000, standard deviation 13.8.
    assert int((mask.sum(0) - 200).abs().max()) < 60
    assert config.mean_mask_rate == 0.15


def test_random_rates_spread_over_sequences():
    config = TrainingConfig(mask_rate=0.1, mask_rate_max=0.9)
    share = config.draw_mask(4000, 60, generator()).double().mean(1)
    assert config.mean_mask_rate == pytest.approx(0.5)
    assert float(share.mean()) == pytest.approx(0.5, abs=0.02)
    # Uniform on [0.1, 0.9]: 0.8/sqrt(12) = 0.231, and binomial noise of a sequence on top.
    assert float(share.std()) == pytest.approx(0.238, abs=0.015)
    assert bool(config.draw_mask(500, 2, generator()).any(1).all())


def test_bert_shows_some_hidden_tokens_and_only_in_training():
    seen = []

    class Recording(rgfast.MaskedTokenModel):
        def forward(self, tokens):
            seen.append((self.training, tokens.clone()))
            return super().forward(tokens)

    model = Recording(6, 8, 4, 1, generator=generator())
    config = TrainingConfig(
        steps=2, batch=400, warmup=0, mask_rate=0.5, replacement="bert", log_every=2, log_sequences=400
    )
    chain = MarkovChain.from_correlation_length(2, states=6, clusters=2)
    train(model, chain, config, seed=1)
    trained = [tokens for training, tokens in seen if training and len(tokens) == 400][:2]
    shown = float((torch.stack(trained) == 6).double().mean())
    assert shown == pytest.approx(0.5 * 0.8, abs=0.03)
    evaluated = float((seen[-1][1] == 6).double().mean())
    assert evaluated == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"masking": "block"}, "masking must be one of 'iid', 'exact', 'one'"),
        ({"replacement": "zero"}, "replacement must be one of 'mask', 'bert'"),
        ({"mask_rate_max": 0.1}, "mask_rate_max must lie between mask_rate 0.2 and 1, got 0.1"),
        ({"mask_rate_max": 0.5, "masking": "exact"}, "mask_rate_max needs masking='iid'"),
    ],
)
def test_bad_training_options_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        TrainingConfig(**options)


def test_the_sequel_is_what_is_known_of_it():
    sequel = ReproduceConfig.preset("sequel")
    assert (sequel.states, sequel.length, sequel.width, sequel.depth, sequel.hidden) == (16, 64, 64, 6, 256)
    assert (sequel.activation, sequel.norm, sequel.xi) == ("gelu", "layer", (1.2, 6.7))
    t = sequel.training
    assert (t.steps, t.batch, t.mask_rate, t.replacement) == (10_000, 32, 0.15, "bert")
    assert t.lr_at(0) == t.lr_at(9_999) == pytest.approx(3e-4, rel=1e-12)
    assert "flattened" not in views_of(sequel)
    assert ReproduceConfig.from_json(sequel.to_json()) == sequel


def test_older_configurations_load():
    document = json.loads(TINY.to_json())
    assert not {"initialization", "positions"} & set(document)
    assert ReproduceConfig.from_json(json.dumps(document)) == TINY


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"initialization": "xavier"}, "initialization must be one of 'normal', 'torch'"),
        ({"positions": "sine"}, "positions must be one of 'learned', 'none'"),
    ],
)
def test_bad_options_of_the_model_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        replace(TINY, **options)


def test_the_start_of_torch_runs_from_the_configuration(tmp_path):
    config = replace(TINY, mixing="none", initialization="torch", positions="none")
    model = build_model(config, 0)
    assert model.config["initialization"] == "torch"
    assert model.position_embedding.shape == (1, 4)
    assert bool((model.stack.blocks[0].mlp.w2 != 0).all())
    execute(config, Run("trained", 0, (("lazy", 1.0),)), tmp_path / "run.nc")
    assert (tmp_path / "run.nc").stat().st_size > 0


@pytest.mark.parametrize("mixing", ["flat", "window"])
def test_other_mixings_run_from_the_configuration(mixing, tmp_path):
    config = replace(TINY, mixing=mixing, window=1, probe_sequences=960)
    model = build_model(config, 0)
    assert model.config["mixing"] == mixing
    assert model.stack.width == config.stream_width == (12 if mixing == "window" else 4)
    execute(config, Run("trained", 0, (("lazy", 1.0),)), tmp_path / "run.nc")
    assert (tmp_path / "run.nc").stat().st_size > 0


def test_a_window_needs_rows_for_its_wider_stream():
    with pytest.raises(ValueError, match=r"at least 16 \* width = 320 hidden rows"):
        replace(TINY, mixing="window", window=2, probe_sequences=800)


@pytest.fixture
def matrix_file(tmp_path):
    chain = MarkovChain.from_correlation_length(2.5, states=6, kind="ring-heat")
    np.save(tmp_path / "mine.npy", chain.transition.numpy())
    return tmp_path / "mine.npy"


def test_a_users_matrix_brings_its_own_correlation_length(matrix_file, tmp_path):
    result = rgfast.reproduce(
        config=TINY, chains=[str(matrix_file)], out=tmp_path / "run", jobs=1, progress=False
    )
    assert result.config.chains == ("mine",)
    assert result.config.xi == pytest.approx((2.5,), rel=1e-9)
    assert result.dataset.chain.values.tolist() == ["mine"]
    np.testing.assert_array_equal(
        result.config.chain("mine", result.config.xi[0]).transition.numpy(), np.load(matrix_file)
    )
    # The recorded configuration repeats the run without the file.
    matrix_file.unlink()
    assert ReproduceConfig.load(tmp_path / "run" / "config.json") == result.config
    keys = {verdict.key for verdict in result.verdicts["mine"]}
    assert keys == {"valid", "i", "iii", "concentration"}


def test_a_matrix_is_refused_where_it_does_not_fit(matrix_file, tmp_path):
    def run(**options):
        rgfast.reproduce(config=TINY, out=tmp_path / "run", jobs=1, **options)

    with pytest.raises(ValueError, match="xi must not be given with"):
        run(chains=[str(matrix_file)], xi=[1.0])
    with pytest.raises(ValueError, match=r"chains must be labels or one \.npy file"):
        run(chains=[str(matrix_file), "lazy"])
    with pytest.raises(OSError, match="absent"):
        run(chains=[str(tmp_path / "absent.npy")])
    np.save(tmp_path / "iid.npy", np.full((6, 6), 1 / 6))
    with pytest.raises(ValueError, match="xi must be finite and > 0, got 0"):
        run(chains=[str(tmp_path / "iid.npy")])
    with pytest.raises(ValueError, match="its correlation length"):
        replace(TINY.with_matrix(matrix_file), xi=(7.0,))
    assert not (tmp_path / "run").exists()


def test_a_point_keeps_the_name_that_0_1_gave_it():
    """Folders of studies and of runs fit again, whatever options came since."""
    assert Point("x", ReproduceConfig()).name == "x-two_scale-xi1-d16-seed0-34422afd07fe"
    other = ReproduceConfig(initialization="torch")
    assert Point("x", other).name != Point("x", ReproduceConfig()).name
    assert ReproduceConfig.from_json(other.to_json()) == other
