# `make demo` and `make test` need nothing done before: each makes the virtual environment when it
# is missing.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# Processes of the tests, one thread each; a test file stays in one process, with its fixtures.
WORKERS ?= 2
PYTEST = $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

.PHONY: help demo test test-fast lint docs clean
help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:[^#]*## /\t/'

demo: $(VENV)/.installed  ## data, embeddings, a short decoder training, pictures (runs/demo)
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m unclip_pl.cli.demo

test: $(VENV)/.installed-test  ## the whole test suite
	$(PYTEST)

test-fast: $(VENV)/.installed-test  ## the tests of less than about five seconds
	$(PYTEST) -m "not slow"

lint: $(VENV)/.installed-dev  ## ruff, its formatter, codespell and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	git ls-files -z | xargs -0 $(BIN)/codespell
	rm -f unclip_pl/studio/inputs.pyi  # Gradio writes it, and mypy would read it in place of the module
	$(BIN)/mypy

docs: $(VENV)/.installed-docs  ## the pages as a site in docs/_build/html; a warning is an error
	$(BIN)/python -m sphinx -q -W --keep-going -j auto $(SPHINXOPTS) \
		-d docs/_build/doctrees docs docs/_build/html

clean:  ## remove the virtual environment, caches and runs of this folder
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .mypy_cache runs docs/_build docs/api

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: setup.py constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install -q -c constraints.txt -e .
	touch $@

$(VENV)/.installed-%: $(VENV)/.installed
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[$*]"
	touch $@
