"""Begin a method: its module, test, catalog entry and docs, in a checkout of the sources.

What is written works: a penalty on the length of rows, in the form that every method has. Replace
the formula, keep the form.
"""

from __future__ import annotations

import keyword
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from string import Template

from regularizers import catalog

_MODULE = Template('''\
"""$words."""

from __future__ import annotations

from torch import Tensor

from regularizers._shared.checks import check_floating, check_not_negative, check_one_of
from regularizers._shared.reductions import REDUCTIONS, Reduction, reduce_rows


def $name(x: Tensor, *, weight: float = 1.0, reduction: Reduction = "mean") -> Tensor:
    r"""Penalise the squared length of every row.

    .. math:: R_i = w \\sum_d x_{id}^2

    Args:
        x: ``[B, D]``, floating point.
        weight: w, at least 0.
        reduction: over the batch, ``"mean"``, ``"sum"`` or ``"none"``.

    Returns:
        A penalty without dimensions, or ``[B]`` for ``reduction="none"``.

    Raises:
        TypeError: ``x`` is not floating point.
        ValueError: ``x`` is not a matrix, ``weight`` is negative or ``reduction`` is unknown.

    Example:
        >>> import torch
        >>> $name(torch.tensor([[3.0, 4.0]]), weight=0.5)
        tensor(12.5000)

    Source:
        $source
    """
    check_floating("x", x)
    check_not_negative("weight", weight)
    check_one_of("reduction", reduction, REDUCTIONS)
    if x.dim() != 2:
        raise ValueError(f"x must have shape [B, D], got {list(x.shape)}")
    return reduce_rows(weight * x.square().sum(1), reduction)
''')

_TEST = Template('''\
"""$words: the facts of its sheet, bad input."""

import pytest
import torch

from regularizers.$family import $name


def test_worked_example():
    x = torch.tensor([[3.0, 4.0], [0.0, 2.0]], dtype=torch.float64)
    torch.testing.assert_close($name(x, reduction="none"), x.new_tensor([25.0, 4.0]))


def test_reductions_agree():
    x = torch.randn(5, 3, dtype=torch.float64)
    each = $name(x, reduction="none")
    torch.testing.assert_close($name(x), each.mean())
    torch.testing.assert_close($name(x, reduction="sum"), each.sum())


def test_gradcheck():
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck($name, (x,))


@pytest.mark.parametrize(
    ("exception", "match", "call"),
    [
        (TypeError, "x must", lambda: $name(torch.ones(2, 2, dtype=torch.long))),
        (ValueError, "x must", lambda: $name(torch.ones(2))),
        (ValueError, "weight", lambda: $name(torch.ones(2, 2), weight=-1.0)),
        (ValueError, "reduction", lambda: $name(torch.ones(2, 2), reduction="max")),
    ],
)
def test_bad_input_names_the_argument(exception, match, call):
    with pytest.raises(exception, match=match):
        call()
''')

_PAGE = Template("""\
# $words

What it does, when it helps, what it costs, and the traps; with a picture made by a script of
`docs/pictures`.

```{eval-rst}
.. currentmodule:: regularizers.$family

.. autofunction:: $name
```
""")


def create(name: str, family: str, number: int, root: Path | None = None) -> list[Path]:
    """Write what a new method consists of; return the files that were written or changed.

    Args:
        name: of the function and its module, in snake case.
        family: one of ``catalog.families()``.
        number: of the paper in the catalog of the family.
        root: of the checkout; that of this package by default.

    Raises:
        ValueError: the name is no identifier or is taken, the family or the paper is unknown, or
            there is no checkout. Nothing is written then.
    """
    root = Path(__file__).parents[2] if root is None else root
    package = root / "python" / "regularizers"
    if not (root / "csrc").is_dir() or not package.is_dir():
        raise ValueError(f"root must be a checkout of the sources, got {root}")
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or keyword.iskeyword(name):
        raise ValueError(f"name must be in snake case, got {name!r}")
    if family not in catalog.families():
        raise ValueError(f"family must be one of {', '.join(catalog.families())}, got {family!r}")
    found = [paper for paper in catalog.papers(family=family) if paper.number == number]
    if not found:
        raise ValueError(f"paper must be a number of the family {family}, got {number}")
    module = package / family / f"{name}.py"
    test = root / "tests" / family / f"test_{name}.py"
    page = root / "docs" / "families" / f"{family}-{name.replace('_', '-')}.md"
    for path in (module, test, page):
        if path.exists():
            raise ValueError(f"name is taken: {path.relative_to(root)} exists")

    (paper,) = found
    words = name.replace("_", " ").capitalize()
    values = {
        "name": name,
        "family": family,
        "words": words,
        "source": f"{paper.source or 'Paper ' + str(number)}; say how sure the formula is.",
    }
    changed = [] if (package / family).is_dir() else _add_family(root, family)
    for path, template in ((module, _MODULE), (test, _TEST), (page, _PAGE)):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(template.substitute(values), encoding="utf-8")
    init = test.parent / "__init__.py"
    init.touch()
    _add_public_name(package / family / "__init__.py", family, name)
    entries = package / "catalog" / f"{family}.toml"
    _add_to_catalog(entries, paper, f"{family}.{name}")
    index = root / "docs" / "index.md"
    _insert_line(index, rf"families/{family}\b.*|families/.*", f"families/{page.stem}")
    return [module, test, init, page, package / family / "__init__.py", entries, index, *changed]


def _add_family(root: Path, family: str) -> list[Path]:
    """Make the package of a family that has none, known to the library and to type checkers."""
    package = root / "python" / "regularizers"
    (package / family).mkdir()
    summary = textwrap.fill(catalog.families()[family].summary, 96)
    text = f'"""The family `{family}`.\n\n{summary}\n"""\n\n__all__: list[str] = []\n'
    (package / family / "__init__.py").write_text(text, encoding="utf-8")
    library, stub = package / "__init__.py", package / "__init__.pyi"
    text = library.read_text(encoding="utf-8")
    for opening in ("_LAZY = (\n", "__all__ = [\n"):
        text = text.replace(opening, f'{opening}    "{family}",\n', 1)
    library.write_text(text, encoding="utf-8")
    _insert_line(
        stub,
        r"from regularizers import \w+ as \w+",
        f"from regularizers import {family} as {family}",
    )
    _sort(library, stub)
    return [library, stub]


def _add_public_name(init: Path, family: str, name: str) -> None:
    text = init.read_text(encoding="utf-8")
    entry = f"from regularizers.{family}.{name} import {name}\n"
    start = text.index("__all__")
    text = text[:start] + entry + "\n" + text[start:]
    text = re.sub(r"__all__(: list\[str\])? = \[", f'__all__ = [\n    "{name}",', text, count=1)
    init.write_text(text, encoding="utf-8")
    _sort(init)


def _add_to_catalog(entries: Path, paper: catalog.Paper, name: str) -> None:
    """Add a name to a paper; a planned one stands in part from now on."""
    blocks = re.split(r"(?m)^(?=\[\[paper\]\])", entries.read_text(encoding="utf-8"))
    place = next(i for i, b in enumerate(blocks) if re.search(rf"(?m)^number = {paper.number}$", b))
    standing = (*(() if paper.status == "planned" else paper.names), name)
    listed = "names = [\n" + "".join(f'    "{entry}",\n' for entry in standing) + "]\n"
    block = re.sub(r"(?ms)^names = \[.*?\]\n", listed, blocks[place], count=1)
    if paper.status == "planned":
        missing = ", ".join(entry.partition(".")[2] for entry in paper.names if entry != name)
        status = 'status = "partial"\n' + f'missing = "{missing or "the formula"}"\n'
        block = block.replace('status = "planned"\n', status, 1)
    blocks[place] = block
    entries.write_text("".join(blocks), encoding="utf-8")


def _insert_line(path: Path, pattern: str, line: str) -> None:
    """Put a line behind the last one of the first alternative of ``pattern`` that occurs."""
    lines = path.read_text(encoding="utf-8").splitlines()
    for alternative in pattern.split("|"):
        places = [i for i, text in enumerate(lines) if re.fullmatch(alternative, text)]
        if places:
            lines.insert(places[-1] + 1, line)
            path.write_text("\n".join(lines) + "\n", encoding="utf-8")
            return
    raise ValueError(f"{path} has no line like {pattern}")


def _sort(*paths: Path) -> None:
    """Let ruff sort imports and lists of names."""
    command = [sys.executable, "-m", "ruff", "check", "--quiet", "--fix", "--select", "I,RUF022"]
    subprocess.run([*command, *map(str, paths)], check=True)
    command = [sys.executable, "-m", "ruff", "format", "--quiet"]
    subprocess.run([*command, *map(str, paths)], check=True)
