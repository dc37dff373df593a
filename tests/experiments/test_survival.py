"""Mode survival against least squares on stored activations, and on stacks whose answer is known."""

import numpy as np
import pytest
import torch

from rgfast import MarkovChain, MaskedTokenModel
from rgfast.experiments.survival import mode_survival, posterior_rank
from rgfast.masking import balanced_mask

N, T, V = 403, 5, 8


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def case():
    chain = MarkovChain.from_label("two-scale:K=2,r=3", 2.0, V)
    tokens = chain.sample(N, T, seeded())
    return chain, tokens, balanced_mask(N, T, 0.4, seeded(1))


def model(width=6, w2_scale=1.0):
    return MaskedTokenModel(V, T, width, 2, w2_scale=w2_scale, generator=seeded(2)).eval()


def streams(m, shown):
    found = [m.embed(shown)]
    for block in m.stack.blocks:
        found.append(block(found[-1]))
    return [x.detach().double() for x in found]


def least_squares_r2(x, y, fold, folds):
    residual, total = torch.zeros(y.shape[1]), torch.zeros(y.shape[1])
    for g in range(folds):
        test, train = fold == g, fold != g
        mean_x, mean_y = x[train].mean(0), y[train].mean(0)
        weight = torch.linalg.lstsq(x[train] - mean_x, y[train] - mean_y, driver="gelsd").solution
        residual = residual + ((y[test] - mean_y - (x[test] - mean_x) @ weight) ** 2).sum(0)
        total = total + ((y[test] - mean_y) ** 2).sum(0)
    return float(1 - residual.sum() / total.sum())


@pytest.mark.parametrize("folds", [2, 5])
def test_equals_least_squares_on_stored_activations(case, folds):
    chain, tokens, mask = case
    m = model()
    found = mode_survival(m, chain, tokens, mask, folds=folds, batch=100).r2
    layers = streams(m, tokens.masked_fill(mask, V))
    posterior = chain.bayes_posterior(tokens, mask)
    fold = torch.arange(N) % folds
    for mode, space in enumerate(chain.eigenspaces()[1:]):
        for process, rows in enumerate((~mask, mask)):
            for layer in range(3):
                if process == 1 and layer == 0:
                    continue
                truth = []
                for t in range(T):
                    keep = rows[:, t]
                    y = (posterior @ space.basis)[keep, t]
                    truth.append(least_squares_r2(layers[layer][keep, t], y, fold[keep], folds))
                assert found[process, mode, layer] == pytest.approx(np.mean(truth), abs=1e-6)


def test_the_identity_keeps_every_mode_and_a_constant_row_none(case):
    found = mode_survival(model(width=8, w2_scale=0.0), *case)
    np.testing.assert_allclose(found.r2[0], 1.0, atol=1e-9)
    np.testing.assert_allclose(found.r2[1], 0.0, atol=1e-9)
    np.testing.assert_allclose(found.modulus, [np.exp(-1 / 2), np.exp(-3 / 2)], rtol=1e-12)


def test_an_embedding_of_slow_modes_alone_forgets_the_fast(case):
    chain, tokens, mask = case
    m = model(width=4, w2_scale=0.0)
    with torch.no_grad():
        m.token_embedding.zero_()
        m.token_embedding[:V, :1] = chain.eigenspaces()[1].basis.float()
    slow, fast = mode_survival(m, chain, tokens, mask).r2[0]
    np.testing.assert_allclose(slow, 1.0, atol=1e-9)
    assert np.all(fast < 0.05)


def test_batches_do_not_matter_and_positions_are_chosen(case):
    chain, tokens, mask = case
    whole = mode_survival(model(), chain, tokens, mask).r2
    np.testing.assert_allclose(mode_survival(model(), chain, tokens, mask, batch=7).r2, whole, atol=1e-5)
    each = [mode_survival(model(), chain, tokens, mask, positions=[t]).r2 for t in range(T)]
    np.testing.assert_allclose(np.mean(each, axis=0), whole, atol=1e-9)


@pytest.mark.parametrize("folds", [1, N // 2 + 1])
def test_folds_are_checked(case, folds):
    with pytest.raises(ValueError, match=f"folds must lie in 2..{N // 2}"):
        mode_survival(model(), *case, folds=folds)


def test_posterior_rank_is_the_order_parameters_convention(case):
    chain, tokens, mask = case
    posterior = chain.bayes_posterior(tokens, mask).numpy()
    logs = np.log(posterior.clip(1e-12))
    logs -= logs.mean(-1, keepdims=True)
    for found, x in zip(posterior_rank(chain, tokens, mask), (posterior, logs), strict=True):
        ranks = []
        for t in range(T):
            rows = x[mask[:, t].numpy(), t]
            s = np.linalg.svd(rows - rows.mean(0), compute_uv=False)
            p = s[s > 1e-9 * s[0]] / s.sum()
            ranks.append(np.exp(-(p * np.log(p)).sum()))
        assert found == pytest.approx(np.mean(ranks), rel=1e-5)
