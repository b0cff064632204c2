# Two commands do everything on a fresh machine: `make demo` and `make test`.
#
# A torch that the active environment already has is used as it is; otherwise the Makefile makes .venv and installs the
# pinned one of requirements.txt there.
PYTHON ?= python3
ifeq ($(shell $(PYTHON) -c "import torch" 2>/dev/null && echo yes),yes)
  RUN := $(PYTHON)
  INSTALLED := build/.installed
else
  RUN := .venv/bin/python
  INSTALLED := .venv/.installed
endif

SOURCES := setup.py pyproject.toml requirements.txt CMakeLists.txt $(shell find csrc -type f)
CXX_FILES := $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu')

# Beside the interpreter; asked when a recipe runs, since .venv may not be there before.
CLANG_FORMAT = $$($(RUN) -c 'import sysconfig; print(sysconfig.get_path("scripts"))')/clang-format

.PHONY: install demo test bench lint format docs clean

install: $(INSTALLED)

demo: install
	$(RUN) -m regularizers demo

# Two processes of one thread each (tests of threads ask for their own number); a file stays in one of them, since its
# tests may share what is costly to make.
PYTEST = OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 --dist loadfile

# Triton's interpreter has to be chosen before import, hence the second command.
test: install
	$(PYTEST) tests python/regularizers --doctest-modules --ignore=python/regularizers/ops/triton
	TRITON_INTERPRET=1 $(PYTEST) tests/ops/test_triton*.py -m interpreter

bench: install
	$(RUN) -m regularizers bench

lint: install
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(CLANG_FORMAT) --dry-run -Werror $(CXX_FILES)

format: install
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .
	$(CLANG_FORMAT) -i $(CXX_FILES)

docs: install
	$(RUN) -m sphinx -W -q -b html docs docs/_build

clean:
	rm -rf build dist docs/_build docs/generated python/regularizers/*.so python/*.egg-info

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/.installed: .venv/bin/python $(SOURCES)
	.venv/bin/python -m pip install --quiet --upgrade pip
	.venv/bin/python -m pip install --quiet -r requirements.txt setuptools wheel cmake ninja pybind11
	.venv/bin/python -m pip install --quiet --no-build-isolation -c requirements.txt -e '.[bench,dev,docs,examples]'
	touch $@

build/.installed: $(SOURCES)
	$(PYTHON) -m pip install --quiet --no-build-isolation -e '.[bench,dev,docs,examples]'
	mkdir -p build && touch $@
