"""What `python -m regularizers new-method` writes is a method that passes its tests."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from regularizers import _new_method, catalog
from regularizers.__main__ import main
from tests.harness import run_python

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the sources in which one method was begun in a family that has no package."""
    root = tmp_path_factory.mktemp("checkout")
    leave = shutil.ignore_patterns("_build", "results", "*.png", "__pycache__", "generated")
    for name in ("python", "tests", "docs", "csrc", "pyproject.toml"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, root / name, **({"ignore": leave} if (ROOT / name).is_dir() else {}))
    paper = next(p for p in catalog.papers(status="planned") if _has_no_package(p.family))
    _new_method.create("row_penalty", paper.family, paper.number, root)
    return root, paper


def _has_no_package(family):
    return not (ROOT / "python" / "regularizers" / family).is_dir()


def _files():
    folders = (ROOT / "python", ROOT / "tests", ROOT / "docs" / "families")
    return {path for folder in folders for path in folder.rglob("*.*") if path.suffix != ".pyc"}


def _run(root, *command):
    run = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=root,
        env={"PYTHONPATH": str(root / "python"), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.slow
def test_its_tests_its_doctest_and_the_catalog_pass(checkout):
    root, paper = checkout
    _run(
        root,
        *("pytest", "-q", "-p", "no:cacheprovider", f"tests/{paper.family}", "tests/catalog"),
        *("--doctest-modules", f"python/regularizers/{paper.family}"),
    )


def test_it_is_formatted_and_in_order(checkout):
    root, paper = checkout
    _run(root, "ruff", "check", "python/regularizers", f"tests/{paper.family}")
    _run(root, "ruff", "format", "--check", "python/regularizers", f"tests/{paper.family}")


def test_the_docs_list_its_page(checkout):
    root, paper = checkout
    page = f"families/{paper.family}-row-penalty"
    assert (root / "docs" / f"{page}.md").exists()
    assert page in (root / "docs" / "index.md").read_text().splitlines()


@pytest.mark.parametrize(
    ("match", "arguments"),
    [
        ("name must", ("RowPenalty", "optim", 15)),
        ("name must", ("class", "optim", 15)),
        ("name is taken", ("adamhd", "optim", 15)),
        ("family must", ("row_penalty", "nothing", 15)),
        ("paper must", ("row_penalty", "optim", 30)),
    ],
)
def test_bad_input_names_the_argument_and_writes_nothing(match, arguments):
    before = _files()
    with pytest.raises(ValueError, match=match):
        _new_method.create(*arguments)
    assert _files() == before


def test_an_installed_package_is_no_checkout(tmp_path):
    with pytest.raises(ValueError, match="root must be a checkout"):
        _new_method.create("row_penalty", "optim", 15, tmp_path)


def test_the_command_says_what_is_wrong(capsys):
    assert main(["new-method", "row_penalty", "--family", "optim", "--paper", "30"]) == 2
    assert "paper must" in capsys.readouterr().err


def test_help_lists_the_command():
    run = run_python("import regularizers.__main__ as m; m.main(['--help'])")
    assert "new-method" in run.stdout
