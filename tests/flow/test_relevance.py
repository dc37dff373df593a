import numpy as np
import pandas as pd
import pytest

from rgfast.flow.relevance import RIVALS, relevance_test


def table(final, widths=(16, 48), cells=12, captured=0.97, seed=0):
    """A run for every cell, width and seed; ``final`` gives the last rank."""
    rng = np.random.default_rng(seed)
    rows = []
    for cell in range(cells):
        xi, posterior = float(1 + cell % 3), 3 + 9 * rng.random()
        rivals = {name: 1 + rng.random() for name in RIVALS if name != "xi"}
        for width in widths:
            for s in (0, 1):
                noise = np.exp(0.01 * rng.standard_normal())
                rows.append({
                    "chain": f"c{cell}", "xi": xi, "width": width, "seed": s, "captured": captured,
                    "masked_last": noise * final(posterior, xi, width), "log_posterior_rank": posterior,
                    **rivals,
                })  # fmt: skip
    return pd.DataFrame(rows)


def test_a_rank_that_is_the_posteriors_supports_the_claim():
    found = relevance_test(table(lambda p, xi, w: p))
    assert found.status == "supported"
    assert found.width_exponent[0] == pytest.approx(0, abs=0.02)
    assert found.cells == {16: 12, 48: 12}
    assert found.surplus[48] == pytest.approx(1, abs=0.02)
    claim = next(p for p in found.predictors if p.name == "y = x" and p.width == 16)
    assert claim.error < 0.02
    assert claim.excess == 0
    assert claim.spearman > 0.98


@pytest.mark.parametrize(
    ("final", "words"),
    [
        (lambda p, xi, w: 4 * xi, "as well or better than by y = x: xi"),
        (lambda p, xi, w: 7.0, "mean"),
        (lambda p, xi, w: 1.8 * p, "at width"),
    ],
)
def test_a_rank_that_something_else_predicts_refutes_it(final, words):
    found = relevance_test(table(final))
    assert found.status == "refuted"
    assert words in found.reason


def test_a_rank_that_tracks_the_width_refutes_it():
    """The rivals err more, since each width has a line of its own; only the exponent tells."""
    near = {16: 0.75, 48: 1.35}
    found = relevance_test(table(lambda p, xi, w: p * near[w], cells=27))
    assert found.status == "refuted"
    assert found.reason == "the final rank tracks the width (exponent 0.54)"


def test_too_few_trained_cells_leave_it_undecided():
    rows = table(lambda p, xi, w: p)
    rows.loc[rows.chain.isin([f"c{k}" for k in range(5)]) & (rows.width == 48), "captured"] = 0.5
    found = relevance_test(rows)
    assert found.status == "undecided"
    assert "7 at width 48; wanted 8" in found.reason


def test_one_width_cannot_support_it():
    assert relevance_test(table(lambda p, xi, w: p, widths=(16,))).status == "undecided"


def test_the_bootstrap_repeats_and_columns_are_checked():
    rows = table(lambda p, xi, w: p**0.9)
    assert relevance_test(rows) == relevance_test(rows.sample(frac=1, random_state=1))
    with pytest.raises(ValueError, match="missing are masked_last"):
        relevance_test(rows.drop(columns="masked_last"))
