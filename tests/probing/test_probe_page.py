import json
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


def titles(page):
    return re.findall(r"<h3>(.*?)</h3>", page)


def panels(page):
    text = re.search(r'<script type="application/json" id="figures">(.*?)</script>', page, re.S).group(1)
    return [figure["panels"] for figure in json.loads(text)["figures"]]


def test_the_page_is_self_contained_and_escapes_every_name(tmp_path):
    torch.manual_seed(0)
    model = Model("<script>alert(1)</script>")
    result = rgfast.probe(model, torch.randn(200, 3, 4), layers="stack.*", pairs="all", progress=False)
    result.report(tmp_path / "run.html")
    page = (tmp_path / "run.html").read_text(encoding="utf-8")
    assert page.count("<script") == 2  # its own: the data and the routine that draws them
    assert "&lt;script&gt;" in page
    assert not re.search(r"(src|href)\s*=\s*['\"](?!data:)", page)
    assert {"Effective rank (singular values) by layer and position", "CKA between layers"} <= set(
        titles(page)
    )
    assert len(titles(page)) == len(panels(page)) == 6
    assert "Does the rank fall?" in page
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
    assert titles(page) == [
        "Participation ratio by layer",
        "Participation ratio by layer and position",
        "Singular values by depth",
    ]


def test_a_heat_map_has_every_layer_and_position_and_its_count(tmp_path):
    result = rgfast.probe(rgfast.ResidualStack(4, 2, mixing="none"), torch.randn(60, 3, 4), progress=False)
    result.report(tmp_path / "run.html")
    (drawn,) = panels((tmp_path / "run.html").read_text(encoding="utf-8"))[1]
    values = result.by_position("effective_rank", "position").transpose("layer", "position").values
    assert drawn["heat"]["values"] == [[pytest.approx(v, rel=1e-6) for v in row] for row in values]
    assert drawn["heat"]["counts"] == [60, 60, 60]
    assert (drawn["y"]["labels"], drawn["x"]["labels"]) == (["0", "1", "2"], ["0", "1", "2"])


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
