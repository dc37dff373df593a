"""What a page says, without a browser."""

import json
import math
import re

import numpy as np
import pytest
import torch
import xarray as xr

import rgfast
from rgfast import cli
from rgfast.flow import judge, paired_interval
from rgfast.report import write_report
from rgfast.report.definitions import definition, interval_text, number, numbers_of
from rgfast.report.markup import Markup, table, tag
from rgfast.report.page import Page

NASTY = "</script><script>alert(1)</script> \"quoted' & <b>"


def figures(page):
    text = re.search(r'<script type="application/json" id="figures">(.*?)</script>', page, re.S).group(1)
    return json.loads(text, parse_constant=pytest.fail)["figures"]


def read(path):
    return path.read_text(encoding="utf-8")


def test_whatever_is_put_into_a_tag_is_escaped():
    told = tag("p", NASTY, tag("b", "1 < 2"), title=NASTY)
    assert told.count("<") == 4
    assert "<b>1 &lt; 2</b>" in told
    assert isinstance(table([NASTY], [[NASTY]], caption=NASTY, words=(0,)), Markup)
    assert "<script" not in table([NASTY], [[NASTY]], caption=NASTY, words=(0,))


def test_json_in_a_page_cannot_end_its_script_and_holds_no_nan():
    page = Page("title", "lead")
    values = [1.5, math.nan, math.inf, -math.inf, np.float64(2), np.int64(3), np.bool_(True)]
    page.figure("t", NASTY, [{"title": NASTY, "values": values, "array": np.array([[math.nan, 1.0]])}])
    html = page.render()
    assert html.count("<script") == html.count("</script>") == 2
    (found,) = figures(html)[0]["panels"]
    assert found["title"] == NASTY
    assert found["values"] == [1.5, None, None, None, 2, 3, True]
    assert found["array"] == [[None, 1.0]]


def test_line_separators_stay_inside_a_string():
    page = Page("t", "l")
    page.figure("t", "c", [{"title": "a\u2028b\u2029c"}])
    assert "\u2028" not in page.render()
    assert figures(page.render())[0]["panels"][0]["title"] == "a\u2028b\u2029c"


def test_a_page_names_no_address_and_lets_one_script_run(finished):
    html = read(finished.out / "report.html")
    assert not re.search(r"""(src|href)\s*=\s*["'](?!data:)""", html)
    assert "default-src 'none'" in html
    assert "@import" not in html
    assert not re.search(r"url\(", html)


def test_reproduce_leaves_a_page_with_every_verdict_and_its_definition(finished):
    html = read(finished.out / "report.html")
    for verdict in finished.verdicts["two-scale"]:
        assert f"<b>{verdict.title}</b>".replace("'", "&#x27;") in html
    for words in (
        "what is asked",
        "As stated: <span",
        "Its reading “discrete step, then plateau”: <span",
        "Other views. R: visible",
        "Paired by seed",
        "competes with a geometric decay",
        "Every run captured at least 0.9",
        "Robustness",
        "control_permuted",
        "participation ratio",
        "training.lr",
        "torch",
    ):
        assert words in html
    assert len(figures(html)) == 8


def in_order(html, *parts):
    """Asserts that each part stands after the one before."""
    at = -1
    for part in parts:
        at = html.find(part, at + 1)
        assert at >= 0, part


def test_a_reproduction_starts_with_what_came_out_and_its_picture(finished):
    html = read(finished.out / "report.html")
    in_order(
        html,
        "<h1>",
        "<b>What was measured.</b> Residual networks of 5 blocks (2 for each ξ)",
        "<b>What came out.</b> From the first to the last layer the rank ",
        "<b>What it says of the paper</b>",
        '<div id="figure-0">',
        "<h2>Terms</h2>",
        "<h2>Verdicts</h2>",
        "<h2>Figures</h2>",
        '<div id="figure-1">',
    )
    screen = html[: html.index('<div id="figure-0">')]
    assert "<table" not in screen
    verdicts = {verdict.key: verdict for verdict in finished.verdicts["two-scale"]}
    short, long = verdicts["i"].quantity("R").pooled.mean, verdicts["ii"].quantity("R_long").pooled.mean
    assert f"at ξ = 1 (ratio R = {short:.2f}) and " in screen
    assert f"at ξ = 7 (ratio R = {long:.2f}); networks with nothing to learn" in screen
    control = verdicts["i"].quantity("R, control_permuted").pooled.mean
    assert f"R = {control:.2f} (permuted targets) at ξ = 1." in screen
    words = re.findall(r'<span class="verdict[^"]*">([^<]*)</span>', screen)
    assert words == [answer.status for key in ("i", "ii", "iii") for answer in verdicts[key].answers]
    assert "those that did not are in no reading" in screen  # sixty steps teach nothing


def test_the_picture_of_the_first_screen_is_of_the_view_that_decides(finished):
    (panel,) = figures(read(finished.out / "report.html"))[0]["panels"]
    assert panel["title"] == "all rows at each position"
    data = finished.dataset.effective_rank.sel(chain="two-scale", stage="trained", xi=7.0, view="position")
    mean = next(each for each in panel["series"] if each["name"] == "ξ = 7")
    np.testing.assert_allclose([p[1] for p in mean["points"]], data.mean("seed").values, rtol=1e-6)


def test_a_result_of_one_length_and_several_chains_has_a_first_screen(finished, tmp_path):
    one = finished.dataset.sel(xi=[1.0])
    both = xr.concat([one, one.assign_coords(chain=["lazy"])], "chain", data_vars="minimal")
    both.attrs = one.attrs
    screen = read(write_report(both, tmp_path / "page.html")).partition("<h2>")[0]
    assert "within about ξ = 1 step; after" in screen
    for chain in ("two-scale", "lazy"):
        assert f"{chain}: From the first to the last layer the rank " in screen
        assert f"{chain}: (i) The rank falls with depth: " in screen
        assert f"Does the effective rank fall with depth? ({chain})" in screen
    assert "(ii)" not in screen


def test_a_probe_starts_with_what_came_out_and_its_picture(probed, tmp_path):
    html = read(write_report(probed, tmp_path / "run.html"))
    in_order(
        html,
        "<b>What was measured.</b> ResidualStack: 200 sequences, 6 layers, 5 positions: at every layer",
        "<b>What came out.</b> Over the rows at each position whose token the model sees the effective rank ",
        "<b>What it means.</b>",
        '<div id="figure-0">',
        "<h2>Terms</h2>",
        "<b>mean pooled</b>",
        "<h2>Findings</h2>",
        "<h2>Figures</h2>",
        '<div id="figure-1">',
    )
    screen, flow = html[: html.index('<div id="figure-0">')], probed.flow()
    assert "<table" not in screen
    assert (
        f"(ratio R = {flow.rank.ratio:.2f}, drop {number(flow.rank.drop)} ± {number(flow.error)})" in screen
    )
    assert f"<b>{'is flat' if flow.word == 'flat' else flow.word}</b>: from " in screen
    assert "only where a control (random weights, shuffled tokens) shows less of it" in screen


def test_a_control_and_a_constant_stream_say_so_first(tmp_path):
    stack, x = rgfast.ResidualStack(4, 3, mixing="none"), torch.randn(80, 3, 4)
    control = rgfast.probe(stack, x, control="random_weights", progress=False)
    html = read(write_report(control, tmp_path / "control.html"))
    assert "This is a control (random weights); flow(control=...) compares the model with it." in html
    constant = rgfast.probe(stack, torch.ones(80, 3, 4), progress=False)
    assert "is undefined: nothing varies there." in read(write_report(constant, tmp_path / "constant.html"))


def test_every_table_lies_in_a_region_that_scrolls_and_can_say_so(finished, probed, tmp_path):
    for html in (read(finished.out / "report.html"), read(write_report(probed, tmp_path / "run.html"))):
        region = (
            r'<p class="hint" hidden="">This table scrolls sideways →</p><div class="scroll" tabindex="0" '
        )
        assert html.count("<table") == len(
            re.findall(rf'{region}role="region" aria-label="[^"]+"><table', html)
        )


def test_panels_that_share_an_axis_in_a_file_share_it_on_a_page(finished, probed, tmp_path):
    drawn = figures(read(finished.out / "report.html"))
    assert [each["shared"] for each in drawn] == ["y", "y", "xy", "y", "y", "", "xy", "xy"]
    heat = figures(read(write_report(probed, tmp_path / "run.html")))[1]["panels"]
    assert len(heat) == 3
    assert len({(panel["heat"]["low"], panel["heat"]["high"]) for panel in heat}) == 1


def test_intervals_over_seeds_are_those_of_the_verdicts(finished):
    judged = {v.key: v for v in judge(finished.dataset)}
    found = {key: {name: each for name, each, _ in numbers_of(v.to_dict())} for key, v in judged.items()}
    for key, name in (
        ("i", "R"),
        ("ii", "R_long − R_short, masked"),
        ("ii", "R² fast of the posterior, ξ = 7"),
        ("iii", "top-2 share"),
        ("concentration", "R"),
    ):
        assert found[key][name].mean == pytest.approx(judged[key].quantity(name).pooled.mean)
        assert found[key][name].n == 2
    assert (
        found["i"]["R, trained on i.i.d. tokens"].mean == judged["i"].quantity("R, control_iid").pooled.mean
    )
    assert all(definition(key) for key in judged)
    assert definition("iii-long").startswith(definition("iii"))
    five = paired_interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert interval_text(five) == "3 [1.04, 4.96]"
    assert interval_text(paired_interval([1.0, 2.0]), [1.0, 2.0]) == "1.5 (1 to 2)"
    assert [number(v) for v in (None, math.nan, -0.5, 12345.6, 1e-5)] == [
        "undefined", "undefined", "−0.5", "12346", "1e-05",
    ]  # fmt: skip


def test_curves_of_a_page_are_those_of_the_result(finished):
    by_depth = figures(read(finished.out / "report.html"))[1]["panels"]
    data = finished.dataset.effective_rank.sel(chain="two-scale", stage="trained", xi=1.0)
    for panel, view in zip(by_depth, ("visible", "masked"), strict=True):
        first = 0 if view == "visible" else 1
        mean = panel["series"][0]
        values = data.sel(view=view).mean("seed").values[first:]
        np.testing.assert_allclose([p[1] for p in mean["points"]], values, rtol=1e-6)
        assert [p[0] for p in mean["points"]] == list(range(first, len(values) + first))
        assert f"n = {int(finished.dataset.n.sel(view=view))} rows per position and seed" in mean["facts"]


def test_a_folder_a_file_a_dataset_and_the_result_itself_give_the_same_figures(finished, tmp_path):
    told = figures(read(write_report(finished, tmp_path / "a.html")))
    for source in (finished.out, str(finished.out), finished.out / "result.nc", finished.dataset):
        assert figures(read(write_report(source, tmp_path / "b.html"))) == told


def test_the_default_path_is_beside_the_source(finished, probed, tmp_path):
    assert write_report(finished.out) == finished.out / "report.html"
    probed.save(tmp_path / "run.nc")
    assert write_report(tmp_path / "run.nc") == tmp_path / "run.html"
    with pytest.raises(ValueError, match="path must be given for a result in memory, got None"):
        write_report(probed)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda folder: folder / "none", FileNotFoundError, "there is no"),
        (lambda folder: folder, ValueError, "holds no result.nc and no design.json"),
        (lambda folder: 3, TypeError, "source must be a ProbeResult.* got int"),
        (lambda folder: xr.Dataset({"x": 1}), ValueError, "holds neither"),
    ],
)
def test_what_is_no_result_is_refused_and_nothing_is_written(tmp_path, make, error, words):
    with pytest.raises(error, match=words):
        write_report(make(tmp_path), tmp_path / "out.html")
    assert list(tmp_path.iterdir()) == []


def test_damaged_files_are_named(finished, tmp_path):
    (tmp_path / "result.nc").write_bytes((finished.out / "result.nc").read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"result\.nc is damaged"):
        write_report(tmp_path)
    (tmp_path / "result.nc").write_bytes((finished.out / "result.nc").read_bytes())
    (tmp_path / "verdict.json").write_text("{")
    with pytest.raises(ValueError, match=r"verdict\.json is damaged"):
        write_report(tmp_path)


def test_stages_are_called_by_words(finished):
    """Names that files have for controls stand in the page only where they are explained."""
    shown = re.sub(r"<script.*?</script>", "", read(finished.out / "report.html"), flags=re.DOTALL)
    assert "R, trained on i.i.d. tokens" in shown
    assert "R, trained on permuted targets" in shown
    assert len(re.findall("control_(?:iid|permuted)", shown)) == 2
    assert "control_" not in str(finished)


# What rgfast 0.1 wrote, cut to one verdict.
EARLIER = {
    "format": "rgfast.verdict/1",
    "setup": "in the set-up that config.json records",
    "verdicts": {
        "two-scale": [
            {
                "key": "ii-b",
                "title": "(ii-b) Slow modes of the own token survive at ξ=1, fast ones do not",
                "status": "partial",
                "summary": "last layer keeps slow 0.72, fast 0.45 (control_iid 0.80 and 0.84)",
                "checks": [{"name": "slow", "value": 0.72, "bar": ">= 0.75", "holds": False, "seed": 0}],
                "pooled": {"slow": 0.72, "fast": 0.45},
                "per_seed": [{"seed": 0, "slow": 0.72, "fast": 0.45}],
                "notes": [],
            }
        ]
    },
    "config": {},
}


def test_a_folder_of_the_version_before_is_judged_anew(finished, tmp_path):
    (tmp_path / "result.nc").write_bytes((finished.out / "result.nc").read_bytes())
    (tmp_path / "verdict.json").write_text(json.dumps(EARLIER))
    html = read(write_report(tmp_path))
    assert "verdict.json is that of rgfast 0.1; the findings below are judged anew" in html
    assert "Every verdict holds in the set-up that config.json records." in html
    for verdict in finished.verdicts["two-scale"]:
        assert verdict.title in html
    assert "(ii-b)" not in html
    (tmp_path / "verdict.json").write_text(json.dumps({**EARLIER, "format": "rgfast.verdict/3"}))
    with pytest.raises(ValueError, match=r"written by another rgfast \(format 'rgfast.verdict/3'; this one"):
        write_report(tmp_path)


def test_an_older_result_without_the_newer_numbers_has_a_page(finished, tmp_path):
    newer = ["cka", "relative_spectrum", "training_evaluation_loss", "bayes_loss", "stationary_loss", "n"]
    older = finished.dataset.drop_vars(newer)
    assert len(figures(read(write_report(older, tmp_path / "old.html")))) == 6


def test_a_probe_without_drift_or_layers_says_what_it_lacks(tmp_path):
    stack = rgfast.ResidualStack(4, 2, mixing="none")
    for measures, words in (
        (["participation_ratio"], "Not measured: findings need"),
        (["cka"], "No rank was measured"),
    ):
        result = rgfast.probe(stack, torch.randn(80, 3, 4), measures=measures, progress=False)
        assert words in read(write_report(result, tmp_path / "run.html"))


def test_the_command_writes_the_page_and_refuses_in_one_sentence(finished, tmp_path, capsys):
    assert cli.main(["report", str(finished.out), "--out", str(tmp_path / "page.html")]) == 0
    assert capsys.readouterr().out == f"written to {tmp_path / 'page.html'}\n"
    assert (tmp_path / "page.html").stat().st_size > 10_000
    assert cli.main(["report", str(tmp_path / "nothing")]) == 2
    told = capsys.readouterr()
    assert told.err.startswith("rgfast: source must be")
    assert told.err.count("\n") == 1
