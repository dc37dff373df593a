import re

import pytest
import torch

import rgfast


class Model(torch.nn.Module):
    def __init__(self, name):
        super().__init__()
        self.stack = torch.nn.ModuleDict({name: torch.nn.Linear(4, 6), "out": torch.nn.Linear(6, 5)})

    def forward(self, x):
        for layer in self.stack.values():
            x = layer(x)
        return x


def test_the_page_is_self_contained_and_escapes_every_name(tmp_path):
    torch.manual_seed(0)
    model = Model("<script>alert(1)</script>")
    result = rgfast.probe(model, torch.randn(200, 3, 4), layers="stack.*", pairs="all", progress=False)
    result.report(tmp_path / "run.html")
    page = (tmp_path / "run.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert not re.search(r"(src|href)\s*=\s*['\"](?!data:)", page)
    assert page.count("data:image/png;base64,") == 4
    assert "Flow with depth" in page
    assert [p.name for p in tmp_path.iterdir()] == ["run.html"]


def test_only_what_was_measured_is_drawn(tmp_path):
    result = rgfast.probe(
        rgfast.ResidualStack(4, 2, mixing="none"),
        torch.randn(100, 3, 4),
        measures=["participation_ratio"],
        progress=False,
    )
    result.report(tmp_path / "run.html")
    page = (tmp_path / "run.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 1
    assert "Singular values" in page


def test_a_folder_that_is_not_there_is_an_error_and_nothing_is_written(tmp_path):
    result = rgfast.probe(rgfast.ResidualStack(4, 1, mixing="none"), torch.randn(50, 2, 4), progress=False)
    with pytest.raises(FileNotFoundError):
        result.report(tmp_path / "none" / "run.html")
    assert list(tmp_path.iterdir()) == []


def test_constant_activations_have_a_page_too(tmp_path):
    result = rgfast.probe(
        rgfast.ResidualStack(4, 2, mixing="none"), torch.ones(50, 2, 4), pairs="all", progress=False
    )
    result.report(tmp_path / "run.html")
    assert (tmp_path / "run.html").stat().st_size > 0
