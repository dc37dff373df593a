import math

import pytest
import torch

from rgfast import MarkovChain, MaskedTokenModel, training
from rgfast.masking import corrupt
from rgfast.training import TrainingConfig, captured, seeded_generator, train

SHORT = TrainingConfig(steps=30, batch=32, warmup=5, log_every=10, log_sequences=128)


def model(seed=0, **options):
    return MaskedTokenModel(8, 5, 8, 2, generator=seeded_generator(seed, "weights"), **options)


def chain(xi=1.0):
    return MarkovChain.from_correlation_length(xi, states=8)


def test_training_is_the_same_bit_for_bit():
    logs, weights = [], []
    for _ in range(2):
        m = model()
        torch.manual_seed(len(logs))  # the global generator must not matter
        logs.append(train(m, chain(), SHORT, seed=3))
        weights.append(torch.cat([p.detach().flatten() for p in m.parameters()]))
    assert logs[0] == logs[1]
    assert torch.equal(*weights)


def test_seeds_and_permuted_targets_change_the_result():
    runs = {
        name: train(model(), chain(), SHORT, **kwargs).loss
        for name, kwargs in {
            "a": {"seed": 0},
            "b": {"seed": 1},
            "c": {"seed": 0, "permute_targets": True},
        }.items()
    }
    assert len(set(runs.values())) == 3


@pytest.mark.parametrize("replacement", ["mask", "bert"])
def test_one_target_per_sequence_is_an_exact_null_without_mixing(replacement):
    """The (token shown, target) pairs of a batch have one law at every correlation length."""
    config = TrainingConfig(masking="one", replacement=replacement)
    chains = [MarkovChain.from_correlation_length(xi) for xi in (1, 7)]
    seen = torch.zeros(2, 17, 16)
    for k, chain in enumerate(chains):
        tokens = chain.sample(20_000, 8, seeded_generator(0, "tokens"))
        mask = config.draw_mask(20_000, 8, seeded_generator(0, "masks"))
        shown = corrupt(tokens, mask, 16, 16, replacement, seeded_generator(0, "corruption"))
        assert int(mask.sum()) == 20_000  # one independent pair each
        seen[k].index_put_((shown[mask], tokens[mask]), torch.ones(20_000), accumulate=True)
    # Two samples of one table: chi-squared over the cells that occur.
    total = seen.sum(0)
    cells = total > 0
    statistic = float(((seen[0] - seen[1])[cells] ** 2 / total[cells]).sum())
    freedom = int(cells.sum()) - 1
    assert statistic < freedom + 5 * (2 * freedom) ** 0.5


def test_without_mixing_only_the_hidden_rows_are_trained_on():
    """The gradient is that of the whole sequences, of which the loss sees the hidden rows alone."""
    net = MaskedTokenModel(16, 6, 8, 2, mixing="none", w2_scale=0.5, generator=seeded_generator(0, "weights"))
    net = net.double()
    tokens = MarkovChain.from_correlation_length(1).sample(8, 6, seeded_generator(0, "tokens"))
    mask = TrainingConfig().draw_mask(8, 6, seeded_generator(0, "masks"))
    shown = tokens.masked_fill(mask, 16)
    gradients = []
    for logits in (net.logits_at(shown, mask), net(shown)[mask]):
        loss = torch.nn.functional.cross_entropy(logits, tokens[mask])
        gradients.append(torch.autograd.grad(loss, list(net.parameters())))
    for own, whole in zip(*gradients, strict=True):
        torch.testing.assert_close(own, whole, rtol=1e-10, atol=1e-14)


@pytest.mark.filterwarnings("ignore::rgfast.FallbackWarning")
@pytest.mark.parametrize("mixing", ["mixer", "window", "none"])
def test_a_model_elsewhere_gets_its_batch_there(mixing):
    """On "meta", which stands for a GPU: the loss is there, and no value was waited for."""
    net = MaskedTokenModel(
        16, 6, 8, 2, mixing=mixing, generator=seeded_generator(0, "weights"), device="meta"
    )
    tokens = MarkovChain.from_correlation_length(1).sample(8, 6, seeded_generator(0, "tokens"))
    mask = TrainingConfig().draw_mask(8, 6, seeded_generator(0, "masks"))
    loss = training._loss(net, tokens.masked_fill(mask, 16), mask, tokens)
    loss.backward()
    assert loss.device.type == "meta"
    assert all(p.grad is not None and p.grad.device.type == "meta" for p in net.parameters())


@pytest.mark.parametrize("mixing", ["mixer", "none"])
def test_the_loss_of_a_model_elsewhere_is_that_on_the_cpu(mixing, monkeypatch):
    class Elsewhere:
        type = "elsewhere"

    net = MaskedTokenModel(16, 6, 8, 2, mixing=mixing, generator=seeded_generator(0, "weights"))
    tokens = MarkovChain.from_correlation_length(1).sample(8, 6, seeded_generator(0, "tokens"))
    mask = TrainingConfig().draw_mask(8, 6, seeded_generator(0, "masks"))
    given = net, tokens.masked_fill(mask, 16), mask, tokens
    here = training._loss(*given)
    to = torch.Tensor.to
    monkeypatch.setattr(training, "_device", lambda model: Elsewhere)
    monkeypatch.setattr(
        torch.Tensor, "to", lambda x, *where, **how: x if Elsewhere in where else to(x, *where, **how)
    )
    torch.testing.assert_close(training._loss(*given), here, rtol=1e-6, atol=0)


def test_training_captures_and_permuted_targets_do_not():
    config = TrainingConfig(steps=300, batch=128, lr=1e-2, warmup=20, log_every=300)
    learnt = train(model(), chain(2.0), config, seed=0)
    assert learnt.captured[-1] > 0.5
    control = train(model(), chain(2.0), config, seed=0, permute_targets=True)
    assert control.captured[-1] < 0.1
    # Nothing to learn but the uniform stationary distribution: ln 8 nats.
    assert control.loss[-1] == pytest.approx(math.log(8), abs=0.05)


def test_the_evaluation_loss_lies_above_that_of_bayes_by_what_is_not_captured():
    """1 − captured is the excess over Bayes as a share of what Bayes knows beyond the stationary one."""
    log = train(model(), chain(2.0), SHORT, seed=0)
    for loss, fraction in zip(log.evaluation_loss, log.captured, strict=True):
        known = log.stationary_loss - log.bayes_loss
        assert loss - log.bayes_loss == pytest.approx((1 - fraction) * known, rel=1e-9)
    assert 0 < log.bayes_loss < log.evaluation_loss[-1]
    # A uniform stationary distribution: ln 8 nats, whatever the tokens.
    assert log.stationary_loss == pytest.approx(math.log(8), rel=1e-12)


def test_nothing_is_known_of_independent_tokens():
    log = train(model(), MarkovChain.from_label("iid", 1.0, 8), SHORT)
    assert log.bayes_loss == pytest.approx(math.log(8), rel=1e-12)
    assert all(math.isnan(fraction) for fraction in log.captured)
    assert all(loss >= log.bayes_loss for loss in log.evaluation_loss)


def test_the_bayes_posterior_captures_everything():
    class Oracle(torch.nn.Module):
        mask_token = 8

        def forward(self, tokens):
            mask = tokens == 8
            return chain().bayes_posterior(tokens.masked_fill(mask, 0), mask).log()

    tokens = chain().sample(200, 5, seeded_generator(0, "tokens"))
    mask = torch.zeros(200, 5, dtype=torch.bool)
    mask[:, 2] = True
    assert captured(Oracle(), chain(), tokens, mask) == pytest.approx(1, abs=1e-12)


def test_learning_rate_warms_up_and_ends_at_its_fraction():
    config = TrainingConfig(steps=100, lr=1.0, warmup=10, final_lr_fraction=0.02)
    rates = [config.lr_at(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert config.lr_at(100) == pytest.approx(0.02)


def test_streams_of_a_seed_differ_and_repeat():
    def first(seed, stream):
        return torch.rand(3, generator=seeded_generator(seed, stream)).tolist()

    assert first(0, "tokens") == first(0, "tokens")
    assert len({tuple(first(s, name)) for s in (0, 1) for name in ("tokens", "masks", "weights")}) == 6


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"lr": math.nan}, "lr must be a finite number > 0, got nan"),
        ({"mask_rate": 1.0}, "mask_rate must lie between 0 and 1, got 1"),
        ({"warmup": -1}, "warmup must be a whole number >= 0, got -1"),
        ({"final_lr_fraction": 2.0}, "final_lr_fraction must lie in"),
    ],
)
def test_bad_options_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        TrainingConfig(**options)


def test_a_chain_of_other_states_is_refused():
    with pytest.raises(ValueError, match="model must have the chain's 16 states, got 8"):
        train(model(), MarkovChain.from_correlation_length(1.0), SHORT)


def test_a_diverging_run_says_so():
    m = model()
    with torch.no_grad():
        m.head.weight.fill_(math.inf)
    with pytest.raises(FloatingPointError, match="training loss is nan after"):
        train(m, chain(), SHORT)


def test_a_negative_seed_is_refused():
    with pytest.raises(ValueError, match="seed must be a whole number >= 0, got -1"):
        seeded_generator(-1, "tokens")
