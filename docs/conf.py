"""The documentation site: ``python -m sphinx -W -b html docs docs/_build``."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from regularizers import catalog
from regularizers._version import __version__

DOCS = Path(__file__).parent

project = "regularizers"
author = "the regularizers authors"
version = release = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
]
exclude_patterns = ["_build", "generated"]  # generated/ holds what pages include
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
nitpicky = True  # a reference to a name of ours that does not exist is an error
nitpick_ignore_regex = [
    ("py:.*", r"(torch|collections)\..*|Tensor"),
    ("py:.*", r"regularizers\..*\.Model"),  # a type variable
    ("py:.*", r"(typing\.Literal|dict)\[.*"),  # halves of aliases, which Sphinx cuts at commas
]
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_custom_sections = ["Shape", "Source"]

html_theme = "furo"
html_title = f"regularizers {version}"
html_show_copyright = False


def setup(app: Any) -> None:
    """Write the pages that come from the catalog before Sphinx looks for them."""
    app.connect("builder-inited", lambda _: write_method_lists(DOCS / "generated"))
    app.connect("autodoc-process-docstring", _keep_initials, priority=900)  # after napoleon


def _keep_initials(
    app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]
) -> None:
    """Keep "H. Inoue" and "in_features: D." from being read as items of a list, A. B. C."""
    lines[:] = [re.sub(r"^(\s*|:param \w+: )([A-Z]\.(\s|$))", r"\1\\\2", line) for line in lines]


def write_method_lists(folder: Path) -> None:
    """Write the method index, and one list a family, as Markdown for pages to include."""
    folder.mkdir(exist_ok=True)
    sections = []
    for name, family in catalog.families().items():
        papers = catalog.papers(family=name)
        sections.append(f"## {name}\n\n{_escape(family.summary)}\n\n{_table(papers)}")
        (folder / f"{name}.md").write_text(_table(papers), encoding="utf-8")
    counts = (f"{len(catalog.papers(status=status))} {status}" for status in catalog.STATUSES)
    head = f"{len(catalog.papers())} papers: {', '.join(counts)}.\n\n"
    (folder / "methods.md").write_text(head + "\n".join(sections), encoding="utf-8")


def _table(papers: Iterable[catalog.Paper]) -> str:
    rows = ["| no. | component | paper | status | names |", "| ---: | --- | --- | --- | --- |"]
    rows += [f"| {' | '.join(_cells(paper))} |" for paper in papers]
    return "\n".join(rows) + "\n"


def _cells(paper: catalog.Paper) -> tuple[str, ...]:
    link = f"[arXiv {paper.arxiv}](https://arxiv.org/abs/{paper.arxiv})" if paper.arxiv else ""
    status = paper.status + (f": {paper.missing}" if paper.missing else "")
    exists = paper.status in ("implemented", "partial")
    names = (f"{{py:obj}}`~regularizers.{name}`" if exists else f"`{name}`" for name in paper.names)
    return (
        str(paper.number),
        _escape(paper.component),
        link or _escape(paper.source),
        _escape(status),
        ", ".join(names),
    )


def _escape(text: str) -> str:
    """Keep Markdown from reading signs of the text as its own."""
    return re.sub(r"([\\`*_{}\[\]<>$|#~])", r"\\\1", text)
