# make quickstart   selective copying with SeqBoat, with attention everywhere and without, minutes on two CPU cores
# make test         lint and the fast tests, minutes on two CPU cores
# make test-breadth more cases of what those cover, which continuous integration runs after them
# make test-all     everything, the heavy evidence too
# make lint         format check, lint, types
# make docs         the site with all pages and the API, in site/; fails on a warning
# make notebooks    run notebooks/*.py and write their .ipynb, with outputs
# make accelerator  check and time everything on this machine's GPU or TPU, in 12 minutes; ARGS=--help
#
# All but `accelerator`, which uses PYTHON as it is, make a virtual environment in .venv, and `docs` in .venv-docs.
# PYTHON=python3.13 VENV=.venv313 chooses the interpreter and a second environment for it. Without make, see
# docs/getting_started.md.

PYTHON ?= python3
VENV ?= .venv
DOCS_VENV ?= .venv-docs
RUN := $(VENV)/bin/python
WORKDIR ?= runs/quickstart
SHELL := /bin/bash
# pyenv puts a python3.13 on the path that only runs once a version is chosen: choose the one that has it.
export PYENV_VERSION ?= $(shell $(PYTHON) --version >/dev/null 2>&1 || pyenv whence $(PYTHON) 2>/dev/null | tail -n 1)

.PHONY: quickstart accelerator test fast test-breadth test-all lint style types docs notebooks python clean

quickstart: $(VENV)/.run
	$(RUN) -m experiments.sweep --config=configs/sweeps/quickstart.py --workdir=$(WORKDIR) --out=$(WORKDIR)/table
	$(RUN) -m experiments.report --workdir=$(WORKDIR)/seqboat/seed_0

# With the machine's own Python, whose jax knows the device.
accelerator:
	PYTHON=$(PYTHON) launch/accelerator.sh $(ARGS)

# Shapes and types of arrays, as annotated, are checked at every call of the library: a tenth of the tests' time.
SHAPES := --jaxtyping-packages=seqboat,beartype.beartype

# Types and tests side by side: mypy fills what two workers leave of two cores.
test: style
	@$(MAKE) --no-print-directory -j 2 types fast

# Two workers, for test time is compile time of one thread; a file stays with one worker, and so do its fixtures.
fast: $(VENV)/.dev
	$(RUN) -m pytest -m "not slow and not breadth" -n 2 --dist loadfile --no-loadscope-reorder

test-breadth: $(VENV)/.dev
	$(RUN) -m pytest $(SHAPES) -m "breadth and not slow" -n 2 --dist loadfile

test-all: lint
	$(RUN) -m pytest $(SHAPES)

lint: style types

style: $(VENV)/.dev
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

types: $(VENV)/.dev
	$(RUN) -m mypy

# Without jax: the API is read from the sources, not imported.
docs: $(DOCS_VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/python -m mkdocs build --quiet
	@echo "wrote site/; to read it: $(DOCS_VENV)/bin/python -m http.server --directory site"

# Without the times of the cells, which differ each time; a second pass joins what a cell printed in pieces.
notebooks: $(VENV)/.notebooks
	rm -rf notebooks/runs
	$(RUN) -m jupytext --to ipynb notebooks/*.py
	PYTHONPATH=$(CURDIR) $(RUN) -m jupyter nbconvert --execute --to notebook --inplace --ExecutePreprocessor.record_timing=False notebooks/*.ipynb
	$(RUN) -m jupyter nbconvert --to notebook --inplace --coalesce-streams notebooks/*.ipynb

# Fails where PYTHON does not run or is too old.
python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: $(PYTHON) does not run or is older than 3.11; try make PYTHON=python3.12 ..." >&2; exit 2; }

$(VENV)/.run: requirements.txt | python
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

$(VENV)/.dev: requirements-dev.txt $(VENV)/.run
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

$(VENV)/.notebooks: requirements-notebooks.txt $(VENV)/.run
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements-notebooks.txt
	@touch $@

$(DOCS_VENV)/.docs: requirements-docs.txt | python
	$(PYTHON) -m venv $(DOCS_VENV)
	$(DOCS_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-docs.txt
	@touch $@

clean:
	rm -rf $(VENV) $(DOCS_VENV) site .mypy_cache .pytest_cache .ruff_cache
