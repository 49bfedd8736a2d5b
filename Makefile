# make demo    install, then the main job on the embedded digits, into runs/digits
# make test    install, then lint, types, layers of imports and tests
# make suite   install, then tests alone; TESTS="tests/metrics tests/runs" chooses among them
# make slow    install, then the checks that take minutes
# make docs    install what that takes, too, then build the site, build/docs/index.html
# make tables  install, then compare every table of the documents with the histories it is from
# PYTHON=python3.13 chooses the interpreter; each has an environment of its own.

PYTHON ?= python3
VENV ?= .venv$(patsubst python3%,%,$(filter-out python3,$(notdir $(PYTHON))))
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# A file per process at a time: fixtures that train are shared within a file.
PYTEST := $(BIN)/pytest --numprocesses=auto --maxprocesses=4 --dist=loadfile

.PHONY: demo test suite slow tables docs lock

demo: $(INSTALLED)
	$(BIN)/ncjax train --config=digits --workdir=runs/digits

test: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports --no-cache --no-logo
	$(PYTEST)

suite: $(INSTALLED)
	$(PYTEST) $(TESTS)

slow: $(INSTALLED)
	$(PYTEST) -m slow

tables: $(INSTALLED)
	$(BIN)/python -m experiments.tables

docs: $(VENV)/.docs
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet --conf-dir docs . build/docs

$(VENV)/.docs: $(INSTALLED) requirements-docs.lock
	$(BIN)/python -m pip install --quiet --requirement requirements-docs.lock
	touch $@

$(INSTALLED): requirements.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --requirement requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	touch $@

# Universal: one file for every Python from 3.11 on, by environment markers. Needs uv.
LOCK := uv pip compile --universal --python-version 3.11 --no-header --no-annotate --quiet
lock:
	$(LOCK) --extra dev --output-file requirements.lock pyproject.toml
	$(LOCK) --extra docs --constraint requirements.lock --output-file requirements-docs.lock pyproject.toml
