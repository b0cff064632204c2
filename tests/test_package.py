"""The package as a whole: what its import brings, and what its libraries ask of torch."""

import json
import re
import subprocess
from pathlib import Path

import pytest

import regularizers
from tests.harness import run_python

PACKAGE = Path(regularizers.__file__).parent
ROOT = Path(__file__).parents[1]


def _output(script, **environment):
    run = run_python(script, **environment)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_import_brings_no_optional_package_and_no_family():
    script = """
import sys, torch
before = set(sys.modules)
import regularizers, json
print(json.dumps(sorted(set(sys.modules) - before)))
"""
    loaded = json.loads(_output(script))
    for name in (
        "triton",
        "sklearn",
        "matplotlib",
        "rich",
        "regularizers.dropout",
        "regularizers.catalog",
    ):
        assert not [
            module for module in loaded if module.split(".")[0] == name or module == name
        ], name


def test_import_runs_few_instructions():
    # Stands for "adds at most 0.3 s to import torch" (0.03 s measured): modules loaded, since tests
    # assert no times. Each operator is a module.
    script = """
import sys, torch
before = set(sys.modules)
import regularizers
print(len(set(sys.modules) - before))
"""
    assert int(_output(script)) < 60


def test_environment_forces_a_backend():
    script = "import regularizers; print(regularizers.info()['forced'])"
    assert _output(script, REGULARIZERS_BACKEND="reference").strip() == "reference"


def test_bad_backend_in_the_environment_is_refused():
    run = run_python("import regularizers", REGULARIZERS_BACKEND="fast")
    assert run.returncode != 0
    assert "REGULARIZERS_BACKEND must be one of" in run.stderr


def _undefined_symbols(library):
    listing = subprocess.run(
        ["nm", "-D", "--undefined-only", "-C", library], capture_output=True, text=True, check=True
    ).stdout
    return [line.split(maxsplit=1)[1] for line in listing.splitlines()]


@pytest.mark.parametrize("name", ["libregularizers_cpu.so", "libregularizers_cuda.so"])
def test_library_imports_only_c_shims_of_torch(name):
    if not (PACKAGE / name).exists():
        pytest.skip(f"{name} was not built")
    symbols = _undefined_symbols(PACKAGE / name)
    assert [s for s in symbols if s.startswith(("aoti_torch_", "torch_"))]
    cxx = [s for s in symbols if re.match(r"(\w+ )*(at|c10|torch|caffe2)::", s)]
    assert cxx == []


@pytest.mark.skipif(
    "not config.getoption('--build-folder', default=None)",
    reason="needs --build-folder, which CI gives",
)
def test_no_weak_symbol_of_a_wide_object_is_in_a_baseline_object(pytestconfig):
    folder = Path(pytestconfig.getoption("--build-folder"))

    def weak_and_global(pattern):
        found = {}
        for path in folder.glob(pattern):
            listing = subprocess.run(["nm", "-C", path], capture_output=True, text=True, check=True)
            found[path] = {
                (line[17], line[19:]) for line in listing.stdout.splitlines() if line[17] in "WVTu"
            }
        return found

    wide = {
        **weak_and_global("CMakeFiles/wide_avx2.dir/**/*.o"),
        **weak_and_global("CMakeFiles/wide_avx512.dir/**/*.o"),
    }
    baseline = {
        **weak_and_global("CMakeFiles/wide_baseline.dir/**/*.o"),
        **weak_and_global("CMakeFiles/regularizers_cpu.dir/**/*.o"),
    }
    assert len(wide) == 2
    assert len(baseline) >= 3
    names = {name for symbols in baseline.values() for _, name in symbols}
    for path, symbols in wide.items():
        shared = [name for kind, name in symbols if name in names]
        assert shared == [], f"{path}: {shared}"
