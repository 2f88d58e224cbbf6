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

# The peers have an environment of their own: they want other versions than the tools do. Eager tasks are measured
# in a newer Python, where there is one that runs (a shim of pyenv may not).
BENCH := $(VENV)-bench
ifneq ($(filter bench,$(MAKECMDGOALS)),)
EAGER_PYTHON ?= $(shell for python in python3.13 "$$HOME"/.pyenv/versions/3.13.*/bin/python3 python3.14 python3.12; do \
	"$$python" -c 'import venv' 2>/dev/null && echo "$$python" && break; done)
EAGER := $(if $(EAGER_PYTHON),$(BENCH)-eager)
endif

.DEFAULT_GOAL := help
.PHONY: help demo demo-services test cover check format docs bench clean

help: ## Show the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

demo: $(READY) ## Run the example service and show its traces (SERVE=1: keep serving)
	$(BIN)/python examples/demo.py $(if $(filter-out 0,$(SERVE)),--serve) $(ARGS)

demo-services: $(READY) ## Run three services that call one another, and show one trace across them
	$(BIN)/python -m examples.three_services

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

docs: $(VENV)-docs/.ready ## Build the documentation into build/site, warnings being errors (SERVE=1: show it while you write)
	NO_MKDOCS_2_WARNING=1 $(VENV)-docs/bin/mkdocs $(if $(filter-out 0,$(SERVE)),serve,build --strict --quiet) $(ARGS)

bench: $(BENCH)/.ready $(EAGER:%=%/.ready) ## Measure against the peers, under 10 minutes (ONLY=spawn: one part)
	$(BENCH)/bin/python -m benchmarks $(ONLY:%=--only %) $(EAGER:%=--eager-python %/bin/python) $(ARGS)

clean: ## Remove the virtual environment, caches and build results
	rm -rf .venv .venv-docs .venv-bench .venv-bench-eager build dist .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis .coverage
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

$(VENV)-docs/.ready: pyproject.toml
	$(call make_environment,$(PYTHON),$(VENV)-docs,--group docs)

$(BENCH)/.ready: pyproject.toml
	$(call make_environment,$(PYTHON),$(BENCH),--group bench)

$(BENCH)-eager/.ready: pyproject.toml
	$(call make_environment,$(EAGER_PYTHON),$(BENCH)-eager)

define make_environment
	@rm -rf "$(2)"
	$(if $(UV),$(UV) venv --quiet --python "$(1)" "$(2)",$(1) -m venv "$(2)")
	$(if $(UV),,$(2)/bin/python -m pip install --quiet --upgrade "pip>=25.1")
	$(if $(UV),$(UV) pip install --quiet --python "$(2)/bin/python",$(2)/bin/python -m pip install --quiet) $(3) --editable .
	@touch "$(2)/.ready"
endef
