"""Examples and the Python blocks of the pages run as they stand."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness import run_python

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
PAGES = ("README.md", "docs/quickstart.md", "docs/switching-from.md")
NEEDS = {"lightning_module": "lightning", "hugging_face_trainer": "transformers"}


@pytest.mark.slow
@pytest.mark.parametrize("script", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs_and_ends_as_it_asserts(script):
    pytest.importorskip(NEEDS.get(script.stem, "sklearn"))
    run = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip(), "the last line says what came out"


def test_every_example_is_listed():
    listed = re.findall(r"^\| `(\w+)\.py` \|", (ROOT / "examples/README.md").read_text(), re.M)
    assert sorted(listed) == [path.stem for path in EXAMPLES]


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_blocks_of_a_page_run_one_after_the_other(page):
    for package in ("ot", "geomloss"):
        pytest.importorskip(package)
    blocks = re.findall(r"(?ms)^```python\n(.*?)^```", (ROOT / page).read_text())
    run = run_python("\n".join(blocks))
    assert run.returncode == 0, run.stderr
