"""Pages as a reader sees them: in a headless Chromium, on a desk and on a phone."""

import importlib.util
import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import rgfast
from rgfast.report import write_report


def beside(name):
    """A module of this folder, which is no package."""
    spec = importlib.util.spec_from_file_location(f"report_{name}", Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


browser_module = beside("browser")
CHROMIUM = browser_module.find_chromium()
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
DESK, PHONE = 1280, 390
NASTY = "</script><script>document.title='owned'</script>\"'&<img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    found = browser_module.Browser(CHROMIUM, tmp_path_factory.mktemp("profile"))
    yield found
    found.close()


@pytest.fixture(scope="module")
def pages(finished, probed, tmp_path_factory):
    folder, studies = tmp_path_factory.mktemp("pages"), beside("test_studies_figures")
    write = partial(studies.write_study, folder)
    tables, summary, design = studies.universe()
    return {
        "reproduction": finished.out / "report.html",
        "probe": write_report(probed, folder / "probe.html"),
        "multiverse": write_report(write("multiverse", tables, summary, **design)),
        "sweep": write_report(write("sweep", {"table": studies.cells()})),
        "decimation": write_report(write("decimation", {"table": studies.spaced()}, {}, base={"xi": [7.0]})),
        "observer": write_report(studies.ridge_study(write)),
        "setups": write_report(studies.setups_study(write)),
    }


def centre(browser, selector, index=0):
    """Where an element lies in the window, once it was scrolled to its middle."""
    return browser.run(
        f"(() => {{ const e = document.querySelectorAll({selector!r})[{index}];"
        " e.scrollIntoView({block: 'center', behavior: 'instant'}); const b = e.getBoundingClientRect();"
        " return [b.x + b.width / 2, b.y + b.height / 2]; })()"
    )


def told(browser):
    """The lines of the tip, or nothing where it is hidden."""
    return browser.run("tip.hidden ? [] : [...tip.children].map((line) => line.textContent)")


@pytest.mark.parametrize("width", [DESK, PHONE])
@pytest.mark.parametrize(
    "name", ["reproduction", "probe", "multiverse", "sweep", "decimation", "observer", "setups"]
)
def test_every_figure_is_drawn_in_silence_and_without_the_network(browser, pages, name, width):
    browser.open(pages[name], width)
    drawn = browser.run(
        "[...document.querySelectorAll('.chart')].map((c) => [...c.querySelectorAll('.box svg')]"
        ".map((svg) => svg.querySelectorAll('.mark').length))"
    )
    assert browser.errors == []
    assert browser.requests == [pages[name].as_uri()]
    few = {"multiverse": 1, "sweep": 2, "decimation": 1, "observer": 1, "setups": 1}
    assert len(drawn) == int(browser.run("document.documentElement.dataset.figures")) >= few.get(name, 6)
    assert all(panels and min(panels) > 0 for panels in drawn)
    # Nothing but a table's own box scrolls sideways.
    assert browser.run("document.documentElement.scrollWidth <= window.innerWidth")
    assert browser.run("[...document.querySelectorAll('.box svg')].every((s) => s.clientWidth <= innerWidth)")


@pytest.mark.parametrize(("width", "height", "most"), [(1400, 900, 900), (PHONE, 844, 1100)])
@pytest.mark.parametrize(
    "name", ["reproduction", "probe", "multiverse", "sweep", "decimation", "observer", "setups"]
)
def test_the_first_figure_is_on_the_first_screen_or_just_below(browser, pages, name, width, height, most):
    browser.open(pages[name], width, height)
    top = "document.querySelector('#figure-0 .box svg').getBoundingClientRect().top"
    assert browser.run(top) < most
    first = "document.querySelector('table').getBoundingClientRect().top"
    assert browser.run(first) > browser.run(top)


@pytest.mark.parametrize("width", [1400, PHONE])
@pytest.mark.parametrize("name", ["reproduction", "probe"])
def test_a_table_that_is_too_wide_scrolls_and_says_so(browser, pages, name, width):
    browser.open(pages[name], width)
    browser.run("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
    browser.run("new Promise((done) => requestAnimationFrame(() => setTimeout(done, 50)))")
    found = browser.run(
        "[...document.querySelectorAll('table')].map((t) => { const box = t.parentElement;"
        " box.scrollLeft = 9; const hint = box.previousElementSibling;"
        " return [box.className, box.scrollWidth > box.clientWidth,"
        " box.scrollLeft > 0, hint.offsetHeight > 0 && hint.textContent.includes('scrolls sideways')]; })"
    )
    assert all(box == "scroll" for box, *_ in found)
    assert all(wide == moved == said for _, wide, moved, said in found)
    assert any(wide for _, wide, *_ in found) or width != PHONE


def test_on_a_phone_a_table_of_two_columns_does_not_repeat_its_head(browser, pages):
    browser.open(pages["reproduction"], PHONE)
    labels = browser.run(
        "[...document.querySelectorAll('table.stack')].map(t => [t.tHead.rows[0].cells.length,"
        " getComputedStyle(t.tBodies[0].rows[0].cells[1], '::before').content])"
    )
    assert [2, "none"] in labels
    assert any(columns > 2 and label != "none" for columns, label in labels)


def test_paired_panels_have_one_scale(browser, pages):
    ticks = (
        "[...document.querySelectorAll('#figure-1 .box svg')].map((svg) =>"
        " [...svg.querySelectorAll('.tick.end')].map((t) => [t.textContent, t.getAttribute('y')].join()))"
    )
    browser.open(pages["reproduction"], DESK)
    left, right = browser.run(ticks)
    assert left == right
    assert len(left) > 2
    # A point of the left panel lies as high as one of the same value at the right would.
    browser.run("document.querySelector('#figure-1 .entry').click()")
    left, right = browser.run(ticks)
    assert left == right


def test_a_dark_page_lightens_a_dark_grey(browser, pages):
    greys = "document.querySelectorAll('#figure-0 [stroke=\"#{}\"]').length"
    browser.open(pages["reproduction"], DESK)
    assert browser.run(greys.format("404040")) > 0
    browser.open(pages["reproduction"], DESK, dark=True)
    assert browser.run(greys.format("404040")) == 0
    assert browser.run(greys.format("bfbfbf")) > 0


def test_hovering_a_mean_tells_layer_value_and_n(browser, pages, finished):
    browser.open(pages["reproduction"], DESK)
    data = finished.dataset.sel(chain="two-scale", stage="trained", xi=7.0, view="visible")
    layer = finished.dataset.sizes["layer"] - 1
    value = float(data.effective_rank.mean("seed")[layer])
    # With ξ = 1 switched off the first circles are those of the mean at ξ = 7.
    browser.run("document.querySelector('#figure-1 .entry').click()")
    browser.point(*centre(browser, "#figure-1 .panel:first-child circle.mark", layer))
    lines = told(browser)
    assert lines[0] == "ξ = 7"
    assert f"layer {layer}" in lines
    shown = next(line for line in lines if line.startswith("effective rank"))
    assert float(shown.split()[-1]) == pytest.approx(value, rel=1e-4)
    assert f"n = {int(finished.dataset.n.sel(view='visible'))} rows per position and seed" in lines


@pytest.mark.parametrize("width", [DESK, PHONE])
def test_hovering_a_heat_map_tells_layer_position_value_and_n(browser, pages, probed, width):
    browser.open(pages["probe"], width)
    values = probed.by_position("effective_rank", "visible").transpose("layer", "position")
    counts = probed.dataset.n.sel(view="visible", position=values.position).values
    layers, positions = values.shape
    box = browser.run(
        "(() => { const svg = document.querySelector('#figure-1 .box svg');"
        " svg.scrollIntoView({block: 'center', behavior: 'instant'});"
        " const all = [...svg.querySelectorAll('.cell')].map((c) => c.getBoundingClientRect());"
        " return [Math.min(...all.map((b) => b.left)), Math.max(...all.map((b) => b.right)),"
        " Math.min(...all.map((b) => b.top)), Math.max(...all.map((b) => b.bottom))]; })()"
    )
    for layer, position in ((0, 0), (2, 3), (layers - 1, positions - 1)):
        x = box[0] + (position + 0.5) / positions * (box[1] - box[0])
        y = box[3] - (layer + 0.5) / layers * (box[3] - box[2])
        browser.point(x, y)
        lines = told(browser)
        assert lines[:2] == [f"layer {layer}", f"position {position}"]
        assert float(lines[2].split()[-1]) == pytest.approx(float(values[layer, position]), rel=1e-4)
        assert lines[3] == f"n = {counts[position]}"
    browser.point(1, 1)
    assert told(browser) == []


def test_the_keyboard_steps_through_the_values(browser, pages):
    browser.open(pages["probe"], DESK)
    browser.run("document.querySelector('#figure-0 .box svg').focus()")
    browser.press("ArrowRight")
    first = told(browser)
    assert "layer 0" in first
    browser.press("ArrowRight")
    assert "layer 1" in told(browser)
    browser.press("ArrowUp")
    assert told(browser)[0] != first[0]
    assert "layer 1" in told(browser)
    browser.press("Escape")
    assert told(browser) == []


def test_a_legend_switches_a_curve_off_and_on(browser, pages):
    browser.open(pages["probe"], DESK)
    count = "document.querySelectorAll('#figure-0 .box .mark').length"
    before = browser.run(count)
    toggle = "document.querySelector('#figure-0 .entry').click()"
    browser.run(toggle)
    assert browser.run(count) < before
    assert browser.run("document.querySelector('#figure-0 .entry').getAttribute('aria-pressed')") == "false"
    browser.run(toggle)
    assert browser.run(count) == before


def test_names_are_text_and_never_run(browser, tmp_path):
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = torch.nn.ModuleDict(
                {NASTY.replace(".", "_"): torch.nn.Linear(4, 4), "b": torch.nn.Linear(4, 4)}
            )

        def forward(self, x):
            for part in self.parts.values():
                x = x + part(x)
            return x

    torch.manual_seed(0)
    x = torch.randn(80, 3, 4)
    targets = {NASTY: x[..., :1]}
    result = rgfast.probe(Model(), x, layers="parts.*", targets=targets, groups=2, progress=False)
    browser.open(write_report(result, tmp_path / "page.html"), DESK)
    assert browser.errors == []
    assert browser.run("document.title") == "rgfast: probe report"
    assert browser.run("document.scripts.length") == 2
    assert browser.run("document.images.length") == 0
    assert NASTY in browser.run("document.querySelector('main').innerText")
    assert NASTY.replace(".", "_") in browser.run("document.querySelector('main').innerText")


def test_what_is_nowhere_defined_is_said_instead_of_drawn(browser, tmp_path):
    result = rgfast.probe(
        rgfast.ResidualStack(4, 2, mixing="none"), torch.ones(50, 2, 4), pairs="all", progress=False
    )
    browser.open(write_report(result, tmp_path / "page.html"), PHONE)
    assert browser.errors == []
    assert "nothing to draw" in browser.run("document.querySelector('main').textContent")


def test_a_dark_reader_gets_a_dark_page(browser, pages):
    ground = []
    for dark in (False, True):
        browser.open(pages["probe"], DESK, dark=dark)
        colour = browser.run("getComputedStyle(document.body).backgroundColor")
        ground.append(np.mean([int(part) for part in re.findall(r"\d+", colour)[:3]]))
    assert ground[0] > 200 > 60 > ground[1]
