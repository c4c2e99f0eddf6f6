# make demo | make test | make quick: each sets itself up in .venv and does its job; a second call reuses what is there.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

# Bytecode is kept even where the machine says otherwise: the tests start Python often.
PYTEST := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal

.PHONY: demo test quick peers docs format clean

demo: $(VENV)/.installed
	$(BIN)/python examples/demo.py --out demo

# One thread per process of the tests: threads that share the cores wait for one another.
test: $(VENV)/.installed-test
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m pyright
	$(PYTEST)

# The laws alone: losses, integrators, systems; without what starts processes or compiles.
quick: $(VENV)/.installed-test
	$(PYTEST) -m 'not slow' --ignore tests/losses/test_distributed.py --ignore tests/losses/test_compiled_bits.py \
		--deselect tests/losses/test_transforms.py::test_compile_without_graph_break_and_export \
		tests/losses tests/systems tests/test_integrators.py tests/test_grid.py

# In the tools of others, in an environment of their own on top of .venv: hosts of the loss, trackers, Ray, submitit.
peers: $(VENV)/.installed-test
	.ci/peers

# Warnings are errors; the gallery's programs run. A few minutes.
docs: $(VENV)/.installed
	$(INSTALL) -e '.[all,docs]'
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs docs/_build

format: $(VENV)/.installed-test
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

clean:
	rm -rf $(VENV) .venv-peers docs/_build .pytest_cache .ruff_cache

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "squall needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) -e '.[all]'
	touch $@

$(VENV)/.installed-test: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) -e '.[all,test,lint,interop]'
	touch $@ $(VENV)/.installed
