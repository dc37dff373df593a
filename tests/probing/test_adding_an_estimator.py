"""The worked example of CONTRIBUTING, "Adding an estimator": a module, and the line of `tally` that takes it.

This one measures the newest sequences of a long run; the module is this file, the line is patched in.
"""

from collections import deque
from dataclasses import dataclass

import pytest
import torch

import rgfast
from rgfast.probing import tally
from rgfast.probing.early import owned
from rgfast.probing.estimators.base import HoldsRows
from rgfast.probing.estimators.row_measures import measure_rows
from rgfast.probing.estimators.samples import SampleState

MOST = 40


@dataclass(frozen=True)
class NewestState(SampleState):
    route = "newest"


class Newest:
    """Holds the rows of the last 40 sequences, whatever their dtype."""

    def __init__(self, plan, memory, *, uncentred):
        self.plan, self._uncentred, self._held = plan, uncentred, deque()

    @property
    def sequences(self):
        return sum(batch.sequences for batch in self._held)

    def accepts(self, batch):
        if batch.missing or any(keep is not None for keep in batch.keeps):
            return "rows are missing"
        return ""

    def add(self, batch):
        self._held.append(owned(batch))
        while self.sequences - self._held[0].sequences >= MOST:
            self._held.popleft()

    def note(self, sentences):
        self.plan = self.plan.noted(sentences)

    def merge(self, other):
        self._held.extend(other._held)

    def state(self):
        return None

    def batches(self):
        yield from self._held

    def enough(self):
        return self.sequences >= 4

    def worthwhile(self):
        return True

    def measures(self):
        layers = [torch.cat([batch.layers[k] for batch in self._held]) for k in range(len(self.plan.names))]
        states = torch.stack([x[-MOST:].transpose(0, 1)[list(self.plan.positions)] for x in layers])
        part = measure_rows(states.float(), adjacent=self.plan.pairs == "adjacent", uncentred=self._uncentred)
        return NewestState(self.plan, MOST, {"position": part})


def _estimator(plan=None) -> HoldsRows:
    return Newest(plan, 0, uncentred=False)


@pytest.fixture
def named(monkeypatch):
    monkeypatch.setattr(tally, "Rows", Newest)


def _data(sequences):
    torch.manual_seed(2)
    model = torch.nn.Sequential(*(torch.nn.Linear(5, 5, dtype=torch.float32) for _ in range(3)))
    made = torch.Generator(device="cpu").manual_seed(1)
    return model, torch.randn(sequences, 3, 5, generator=made, dtype=torch.float32, device="cpu")


def test_the_probe_takes_it_and_shows_what_it_found(named, tmp_path):
    model, x = _data(100)
    options = {"layers": ["0", "1", "2"], "views": ["position"], "route": "samples", "progress": False}
    result = rgfast.probe(model, x, batch_size=16, **options)
    assert result.dataset.attrs["route"] == "newest"
    assert result.moments is None
    assert result.variable("n", "position").values.tolist() == [MOST] * 3
    rows = model[0](x[-MOST:]).detach()
    want = rgfast.effective_rank(rows.transpose(0, 1))
    torch.testing.assert_close(
        torch.from_numpy(result.variable("effective_rank", "position").values[0]), want, rtol=1e-6, atol=0
    )
    assert {*result.to_dataframe().measure} == {*result.measures}
    result.report(tmp_path / "page.html")
    assert "effective rank" in (tmp_path / "page.html").read_text()


def test_it_hands_over_what_it_cannot_take(named):
    model, x = _data(12)
    mask = torch.ones(12, 3, dtype=torch.bool, device="cpu")
    mask[:, -1] = False

    class Masked(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x, attention_mask=None):
            return self.inner(x)

    batches = [{"x": x}, {"x": x, "attention_mask": mask}]
    result = rgfast.probe(
        Masked(), batches, layers=["inner.0", "inner.1"], views=["position"], progress=False
    )
    assert result.dataset.attrs["route"] == "moments"
    assert result.variable("n", "position").values.tolist() == [24, 24, 12]


def test_it_is_an_estimator():
    estimator = _estimator()
    members = {name for name in dir(HoldsRows) if not name.startswith("_")}
    assert members <= {*dir(estimator)}
