"""The documentation site: ``python -m sphinx -W -b html docs docs/_build``."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from regularizers._version import __version__

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS))
import pages  # noqa: E402

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
    """Write the pages that come from catalog and figures before Sphinx looks for them."""
    app.connect("builder-inited", lambda _: pages.write_all(DOCS / "generated"))
    app.connect("autodoc-process-docstring", _keep_initials, priority=900)  # after napoleon


def _keep_initials(
    app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]
) -> None:
    """Keep "H. Inoue" and "in_features: D." from being read as items of a list, A. B. C."""
    lines[:] = [re.sub(r"^(\s*|:param \w+: )([A-Z]\.(\s|$))", r"\1\\\2", line) for line in lines]
