# Everything a machine with Python 3.11 or newer, pip and make needs: `make demo`, `make test`.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
INSTALLED_DEV := $(VENV)/.installed-dev
WORKERS ?= 2
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install demo test test-all lint format check clean

help:  ## Say what can be made
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

install: $(INSTALLED)  ## Set up .venv with the tested versions

demo: $(INSTALLED)  ## The whole story on a generated data set, into demo/
	$(BIN)/untrojan demo --out demo

test: $(INSTALLED)  ## Run the tests, with coverage
	$(ONE_THREAD) $(BIN)/python -m pytest -n $(WORKERS) -m "not slow" --cov=untrojan --cov-report=term --cov-fail-under=80

test-all: $(INSTALLED)  ## Run the slow tests too
	$(ONE_THREAD) $(BIN)/python -m pytest -n $(WORKERS)

lint: $(INSTALLED_DEV)  ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED_DEV)  ## Format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

check: lint test  ## Lint, then test

clean:  ## Remove what was made here, the environment included
	rm -rf $(VENV) build dist src/*.egg-info .coverage .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is missing or older than 3.11: install Python 3.11 or newer, or say make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "error: $(PYTHON) cannot make virtual environments: install its venv module (Debian, Ubuntu: apt install python3-venv)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# PyPI's torch for Linux brings CUDA along, several gigabytes. For the smaller build without it, set
# PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
$(INSTALLED): $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[test]'
	@touch $@

$(INSTALLED_DEV): $(INSTALLED)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@
