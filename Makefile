# Everything here works in a fresh clone: the first target run makes the virtual environment.
#
#   make test PYTHON=python3.12 VENV=/tmp/venv312    another interpreter, another place
#   make test ARGS="-k shutdown -x --pdb"            arguments for pytest
#   make test ARGS="tests/e2e" WORKERS=4             processes that share these tests

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
# All tests are shared by four processes, because the end-to-end tests mostly wait for servers. A selection runs in one
# process: it starts at once, prints as it goes, and can be debugged.
WORKERS ?= $(if $(ARGS),0,4)
SPREAD := $(if $(filter-out 0,$(WORKERS)),-n $(WORKERS) --dist worksteal --max-worker-restart 0)

BIN := $(VENV)/bin
READY := $(VENV)/.ready
UV := $(shell command -v uv 2>/dev/null)

DIST := $(VENV)-dist
# An environment whose versions are the newest there are, not the pinned ones.
NEWEST := $(VENV)-newest
UPGRADED := fastapi starlette uvicorn anyio opentelemetry-api opentelemetry-sdk opentelemetry-exporter-otlp-proto-http \
	opentelemetry-distro opentelemetry-instrumentation opentelemetry-instrumentation-asgi \
	opentelemetry-instrumentation-fastapi opentelemetry-instrumentation-httpx

# The nightly tests have one too: what they install is nobody else's concern. Its pytest plugins are for the peers' suites.
NIGHTLY := $(VENV)-nightly

# The peers have an environment of their own: they want other versions than the tools do. Eager tasks are measured
# in a newer Python, where there is one that runs (a shim of pyenv may not).
BENCH := $(VENV)-bench
ifneq ($(filter bench,$(MAKECMDGOALS)),)
EAGER_PYTHON ?= $(shell for python in python3.13 "$$HOME"/.pyenv/versions/3.13.*/bin/python3 python3.14 python3.12; do \
	"$$python" -c 'import venv' 2>/dev/null && echo "$$python" && break; done)
EAGER := $(if $(EAGER_PYTHON),$(BENCH)-eager)
endif

.DEFAULT_GOAL := help
.PHONY: help demo demo-services demo-llm demo-live demo-fleet test test-newest nightly cover check format docs dist bench clean

help: ## Show the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

demo: $(READY) ## Run the example service and show its traces (SERVE=1: keep serving)
	$(BIN)/python examples/demo.py $(if $(filter-out 0,$(SERVE)),--serve) $(ARGS)

demo-services: $(READY) ## Run three services that call one another, and show one trace across them
	$(BIN)/python -m examples.three_services

demo-llm: $(READY) ## Run an LLM gateway with and without the middleware, half of whose clients hang up
	$(BIN)/python -m examples.llm_gateway

demo-live: $(READY) ## Run a busy service and print the address of its live view (ARGS="--for 20": end by itself)
	$(BIN)/python -m examples.live $(ARGS)

demo-fleet: $(READY) ## Run two replicas and two workers over Redis and RabbitMQ, and kill one of each
	$(BIN)/python -m examples.fleet

test: $(READY) ## Run all tests
	$(BIN)/python -m pytest $(SPREAD) $(ARGS)

test-newest: $(NEWEST)/.ready ## Run the tests with the newest FastAPI, Starlette, uvicorn and OpenTelemetry
	@$(NEWEST)/bin/python -c 'import sys, importlib.metadata as m; print(*(f"{n} {m.version(n)}" for n in sys.argv[1:]), sep="\n")' $(UPGRADED)
	$(NEWEST)/bin/python -m pytest $(SPREAD) $(ARGS)

nightly: $(NIGHTLY)/.ready ## Run the long tests, those with vendors' agents and shared clients, and the peers' suites
	PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 $(NIGHTLY)/bin/python -m pytest -o faulthandler_timeout=1800 $(wildcard tests/nightly tests/peers) $(ARGS)

cover: $(READY) ## Run the tests without servers and show what they do not reach
	$(BIN)/python -m pytest -m "not e2e" --cov --cov-report=term-missing $(ARGS)

check: $(READY) ## Check format, lint, types, imports, spelling and workflows
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports
	$(BIN)/codespell
	$(BIN)/zizmor --offline --quiet --no-progress .github

format: $(READY) ## Format, and fix what ruff can fix
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(VENV)-docs/.ready ## Build the documentation into build/site, warnings being errors (SERVE=1: show it while you write)
	NO_MKDOCS_2_WARNING=1 $(VENV)-docs/bin/mkdocs $(if $(filter-out 0,$(SERVE)),serve,build --strict --quiet) $(ARGS)

dist: $(DIST)/.ready ## Build wheel and sdist into dist/, check both, use each in an empty environment (TAG=v1.2.3: a release)
	rm -rf dist
	$(DIST)/bin/python -m build --no-isolation --outdir dist
	$(DIST)/bin/twine check --strict dist/*
	$(DIST)/bin/check-wheel-contents dist/*.whl
	$(DIST)/bin/python -m tests.installed dist $(TAG:%=--tag %)

bench: $(BENCH)/.ready $(EAGER:%=%/.ready) ## Measure against the peers, 14 minutes (ONLY=spawn: one part)
	$(BENCH)/bin/python -m benchmarks $(ONLY:%=--only %) $(EAGER:%=--eager-python %/bin/python) $(ARGS)

clean: ## Remove the virtual environment, caches and build results
	rm -rf .venv .venv-docs .venv-dist .venv-newest .venv-nightly .venv-vendor-* .venv-bench .venv-bench-eager build dist .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis .coverage
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +

# Rebuilt when pyproject.toml changes, and only then. The mark comes last, so that a half-built one is not used.
# pip knows --group from 25.1 on, and the interpreter's own is often older.
$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "otel_tasks needs Python 3.11 or newer, and $(PYTHON) is $$($(PYTHON) --version 2>/dev/null || echo not there)." >&2; \
		echo "Name another one: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; \
		exit 1; }
	@echo "Installing into $(VENV), once. It takes a minute or two."
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

$(DIST)/.ready: pyproject.toml
	$(call make_environment,$(PYTHON),$(DIST),--group dist)

# Rebuilt each time: what is newest changes without pyproject.toml.
.PHONY: $(NEWEST)/.ready
$(NEWEST)/.ready:
	$(call make_environment,$(PYTHON),$(NEWEST),--group dev)
	$(if $(UV),$(UV) pip install --quiet --python "$(NEWEST)/bin/python",$(NEWEST)/bin/python -m pip install --quiet) --upgrade $(UPGRADED)

$(NIGHTLY)/.ready: pyproject.toml
	$(call make_environment,$(PYTHON),$(NIGHTLY),--group nightly)

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
