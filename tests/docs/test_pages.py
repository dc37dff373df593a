"""The Python of every page runs, every public name has its place, and the site builds without a warning."""

import contextlib
import doctest
import importlib.util
import io
import re
import subprocess
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import torch

import rgfast

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
    if "```python" in path.read_text(encoding="utf-8")
)
FENCE = re.compile(r"^(?P<indent> *)```python\n(?P<code>.*?)^ *```$", re.MULTILINE | re.DOTALL)
NOT_RUN = re.compile(r"<!-- not run: \S.*-->\s*$")
NEEDS = re.compile(r"<!-- needs: (\S.*) -->\s*$")


@dataclass(frozen=True)
class Block:
    line: int
    code: str
    runs: bool
    needs: bool = False


def blocks(text: str) -> list[Block]:
    """The Python blocks of a page; those right below ``<!-- not run: why -->`` are not to be run.

    Those below ``<!-- needs: package, package -->`` run if these packages are installed.
    """
    found = []
    for fence in FENCE.finditer(text):
        before = text[: fence.start()]
        code = re.sub(f"^{fence['indent']}", "", fence["code"], flags=re.MULTILINE)
        needs = NEEDS.search(before)
        lacking = needs and not all(importlib.util.find_spec(name) for name in needs[1].split(", "))
        runs = not lacking and NOT_RUN.search(before) is None
        found.append(Block(before.count("\n") + 2, code, runs, needs is not None))
    return found


def run(block: Block, page: str, names: dict) -> None:
    """Run one block: as a doctest where it has prompts, as a script elsewhere."""
    if ">>>" not in block.code:
        with contextlib.redirect_stdout(io.StringIO()):
            exec(compile("\n" * (block.line - 1) + block.code, page, "exec"), names)
        return
    test = doctest.DocTestParser().get_doctest(block.code, names, page, page, block.line - 1)
    told = io.StringIO()
    failed, tried = doctest.DocTestRunner().run(test, out=told.write, clear_globs=False)
    assert failed == 0, told.getvalue()
    assert tried > 0
    names.update(test.globs)


@pytest.mark.parametrize("page", PAGES)
def test_the_python_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plt, "show", lambda: None)
    torch.manual_seed(0)
    names = {
        "__name__": "__page__",
        "model": rgfast.ResidualStack(8, depth=2, mixing="none"),
        "loader": [torch.randn(32, 3, 8) for _ in range(2)],
    }
    for block in blocks((ROOT / page).read_text(encoding="utf-8")):
        if block.runs:
            with warnings.catch_warnings():
                if block.needs:  # other packages' deprecations are not ours
                    warnings.simplefilter("ignore")
                run(block, page, names)
        else:
            compile(block.code, page, "exec")
    plt.close("all")


def test_a_wrong_example_is_noticed():
    (wrong,) = blocks("text\n```python\n>>> 1 + 1\n3\n```\n")
    with pytest.raises(AssertionError, match="Expected"):
        run(wrong, "page.md", {})
    (broken,) = blocks("```python\nraise KeyError\n```\n")
    with pytest.raises(KeyError):
        run(broken, "page.md", {})
    spared, ran = blocks("<!-- not run: slow -->\n```python\na\n```\n\n  ```python\n  b\n  ```\n")
    assert (spared.runs, ran.runs, ran.code) == (False, True, "b\n")
    has, lacks = blocks(
        "<!-- needs: torch, sys -->\n```python\na\n```\n<!-- needs: torch, no_such -->\n```python\nb\n```\n"
    )
    assert (has.runs, lacks.runs) == (True, False)


def test_every_public_name_is_in_the_reference():
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\.\. auto(?:function|class|exception):: (\S+)$", text, flags=re.MULTILINE)
    assert len(listed) == len(set(listed))
    modules = {"flow", "report", "__version__"}
    wanted = {f"rgfast.{name}" for name in rgfast.__all__ if name not in modules}
    wanted |= {f"rgfast.flow.{name}" for name in rgfast.flow.__all__}
    wanted |= {f"rgfast.report.{name}" for name in rgfast.report.__all__}
    from rgfast.report import figures

    wanted |= {f"rgfast.report.figures.{name}" for name in figures.__all__}
    assert set(listed) == wanted


def test_the_site_builds_without_a_warning_and_asks_nothing_of_a_network(tmp_path):
    pytest.importorskip("sphinx")
    pytest.importorskip("myst_parser")
    pytest.importorskip("furo")
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", "-E", "-W", "-q", "--keep-going", "-d", tmp_path / "trees",
         ROOT / "docs", tmp_path / "site"],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    index = (tmp_path / "site" / "index.html").read_text(encoding="utf-8")
    assert 'href="docs/' not in index
    commands = (tmp_path / "site" / "command_line.html").read_text(encoding="utf-8")
    for command in ("probe", "reproduce", "sweep", "report", "bench", "info", "completion"):
        assert f"usage: rgfast {command}" in commands
    for page in (tmp_path / "site").rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert re.findall(r'<(?:script|img|link)[^>]*(?:src|href)="(?:https?:)?//[^"]*"', text) == [], (
            page.name
        )
