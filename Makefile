# Everything here works in a fresh clone: the first target run makes the virtual environment.
#
#   make test PYTHON=python3.12 VENV=/tmp/venv312    another interpreter, another place
#   make test ARGS="-k shutdown -x"                  arguments for pytest

PYTHON ?= python3
VENV ?= .venv
ARGS ?=

BIN := $(VENV)/bin
READY := $(VENV)/.ready
UV := $(shell command -v uv 2>/dev/null)

.DEFAULT_GOAL := help
.PHONY: help demo test cover check format clean

help: ## Show the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

demo: $(READY) ## Run the example service and show its traces (SERVE=1: keep serving)
	$(BIN)/python examples/demo.py $(if $(filter-out 0,$(SERVE)),--serve) $(ARGS)

test: $(READY) ## Run all tests
	$(BIN)/python -m pytest $(ARGS)

cover: $(READY) ## Run the tests without servers and show what they do not reach
	$(BIN)/python -m pytest -m "not e2e" --cov --cov-report=term-missing $(ARGS)

check: $(READY) ## Check format, lint, types and imports
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

format: $(READY) ## Format, and mend what ruff can mend
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean: ## Remove the virtual environment, caches and build results
	rm -rf .venv build dist .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis .coverage
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +

# Made anew when pyproject.toml changes, and only then. The mark comes last: a half-made one is not taken.
# pip knows --group from 25.1 on, and the interpreter's own is often older.
$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "otel_tasks needs Python 3.11 or newer, and $(PYTHON) is $$($(PYTHON) --version 2>/dev/null || echo not there)." >&2; \
		echo "Name another one: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; \
		exit 1; }
	@if [ -f "$(VENV)/pyvenv.cfg" ]; then rm -rf "$(VENV)"; fi
ifneq ($(UV),)
	$(UV) venv --quiet --python "$(PYTHON)" "$(VENV)"
	$(UV) pip install --quiet --python "$(BIN)/python" --group dev --editable .
else
	$(PYTHON) -m venv "$(VENV)"
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet --group dev --editable .
endif
	@touch $@
