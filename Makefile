# make quickstart   train, evaluate and compare a SeqBoat on short ListOps, a few minutes on two CPU cores
# make test         what continuous integration runs
# make test-all     everything, the heavy evidence too
# make lint         format check, lint, types
#
# Each makes its own virtual environment in .venv; PYTHON=python3.12 chooses the interpreter. Without make, see README.md.

PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python
WORKDIR ?= runs/quickstart
SHELL := /bin/bash

.PHONY: quickstart test test-all lint clean

quickstart: $(VENV)/.run
	$(RUN) -m experiments.train --config=configs/quickstart.py --workdir=$(WORKDIR)
	$(RUN) -m experiments.evaluate --workdir=$(WORKDIR)

# Two workers, for test time is compile time of one thread; a file stays with one worker, and so do its fixtures.
test: lint
	$(RUN) -m pytest -m "not slow" -n 2 --dist loadfile

test-all: lint
	$(RUN) -m pytest

lint: $(VENV)/.dev
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

$(VENV)/.run: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: $(PYTHON) is older than 3.11; try make PYTHON=python3.12 ..." >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

$(VENV)/.dev: requirements-dev.txt $(VENV)/.run
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache
