"""How ``make docs`` builds the site; see ``docs/index.md`` for its contents."""

import os
import posixpath
import re
from pathlib import Path
from typing import Any

from rgfast.cli import build_parser
from rgfast.version import __version__

ROOT = Path(__file__).resolve().parents[1]

project = "rgfast"
author = "The rgfast authors"
release = version = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = f"rgfast {__version__}"
html_copy_source = False
myst_heading_anchors = 3
autodoc_typehints = "none"  # signatures are long enough with names and defaults; types stand in the text
autodoc_member_order = "bysource"
default_role = "code"
# Fences hold shell sessions, diagrams and formulas as well as Python.
highlight_language = "none"

# Pages that are files of the repository: what stands in docs/ is their place, and what they say besides.
FROM_REPOSITORY = {
    "index": "README.md",
    "ops/spectrum": "rgfast/ops/spectrum/README.md",
    "ops/cka": "rgfast/ops/cka/README.md",
    "ops/similarity": "rgfast/ops/similarity/README.md",
    "ops/intrinsic_dimension": "rgfast/ops/intrinsic_dimension/README.md",
    "ops/moments": "rgfast/ops/moments/README.md",
    "ops/residual_mlp": "rgfast/ops/residual_mlp/README.md",
    "benchmarks/probe": "benchmarks/probe.md",
    "contributing": "CONTRIBUTING.md",
    "changelog": "CHANGELOG.md",
}
PAGES = {origin: f"docs/{name}.md" for name, origin in FROM_REPOSITORY.items()}


def relinked(text: str, origin: str, page: str) -> str:
    """``text`` of the file ``origin`` with its relative links as they are seen from ``page``."""

    def link(found: re.Match[str]) -> str:
        target, mark, anchor = found[2].partition("#")
        if ":" in target or not target:
            return found[0]
        place = posixpath.normpath(posixpath.join(posixpath.dirname(origin), target))
        seen = posixpath.relpath(PAGES.get(place, place), posixpath.dirname(page))
        return f"{found[1]}{seen}{mark}{anchor})"

    return re.sub(r"(\]\()([^)\s]+)\)", link, text)


def command_line() -> str:
    """What ``rgfast --help`` and the help of every subcommand print, as Markdown."""
    os.environ["COLUMNS"] = "100"
    parser = build_parser()
    parts = [f"```text\n{parser.format_help()}```"]
    for name, command in parser.commands().items():
        parts.append(f"## rgfast {name}\n\n```text\n{command.format_help()}```")
    return "\n\n".join(parts)


def read_source(app: Any, name: str, source: list[str]) -> None:
    page = f"docs/{name}.md"
    if name in FROM_REPOSITORY:
        origin = FROM_REPOSITORY[name]
        app.env.note_dependency(str(ROOT / origin))
        besides = source[0].partition("<!-- besides -->")[2]
        source[0] = relinked((ROOT / origin).read_text(encoding="utf-8"), origin, page) + besides
    else:
        source[0] = relinked(source[0], page, page).replace("<!-- rgfast --help -->", command_line())


def read_docstring(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Bars are absolute values here, not the substitutions of reStructuredText."""
    for number, line in enumerate(lines):
        parts = line.split("``")
        parts[::2] = [part.replace("|", r"\|") for part in parts[::2]]
        if not line.lstrip().startswith((">>>", "...")):
            lines[number] = "``".join(parts)


def setup(app: Any) -> None:
    app.connect("autodoc-process-docstring", read_docstring)
    app.connect("source-read", read_source)
