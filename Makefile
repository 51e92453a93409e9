# `make demo` and `make test` need nothing but Python 3.11 or newer: they create .venv first.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
OLDEST_TORCH := 2.11.0
OLDEST_TRITON := 3.6.0
OLDEST := .venv-oldest

# Two workers keep two cores busy; each computes on one thread (tests/conftest.py). A file stays on
# one worker, so that its tests share what they trace and the ranks that they start. Files go in the
# order that tests/conftest.py says: those with fewest tests are not the shortest.
WORKERS ?= 2
PYTEST := -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all test-oldest lint format bench clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(READY) ## Create .venv with pinned versions (skipped when up to date)

demo: $(READY) ## Train a Hugging Face MoE on four ranks next to the single-device run
	$(BIN)/moptrace demo

test: lint ## Lint, check types, and run the test suite
	$(BIN)/python $(PYTEST)

test-all: lint ## The same with the long sweeps: 3,000 equivalence examples and the slow tests
	$(BIN)/python $(PYTEST) -m "" --hypothesis-profile=all -o faulthandler_timeout=7200

test-oldest: $(OLDEST)/.ready ## The test suite on the oldest supported torch (a download of several GB)
	$(OLDEST)/bin/python $(PYTEST)

lint: $(READY) build/typing ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright | sed -E 's,/build/typing/moptrace/(passes|kernels)/,/\1/,; s,/build/typing/,/,'

format: $(READY) ## Format the sources and apply safe fixes
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY) ## Step time against FSDP2 and hand-written expert parallelism; trace time of huge models
	$(BIN)/python benchmarks/trace_time.py
	$(BIN)/python benchmarks/step_time.py

clean: ## Remove what the other targets made
	rm -rf $(VENV) $(OLDEST) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -exec rm -rf {} +

# One resolution with every version pinned, so that nothing brings another torch. The package itself
# comes last, without isolation: its build needs only the setuptools that is there already.
define INSTALL
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else \
	  "moptrace needs Python 3.11 or newer; choose one with: make PYTHON=python3.12 ...")'
	@echo "Installing the pinned versions into $(1); the first time this takes some minutes."
	$(PYTHON) -m venv $(1)
	$(1)/bin/python -m pip install --disable-pip-version-check --requirement $(2)
	$(1)/bin/python -m pip install --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $(1)/.ready
endef

$(READY): pyproject.toml requirements-dev.txt
	$(call INSTALL,$(VENV),requirements-dev.txt)

# The registry's build of an older torch brings CUDA libraries of several GB on Linux.
$(OLDEST)/.ready: pyproject.toml requirements-dev.txt
	@mkdir -p build
	sed -e 's/^torch==.*/torch==$(OLDEST_TORCH)/' -e 's/^triton==[^;]*/triton==$(OLDEST_TRITON)/' \
	  requirements-dev.txt > build/requirements-oldest.txt
	$(call INSTALL,$(OLDEST),build/requirements-oldest.txt)

# The package as type checkers must see it: they do not run an editable install's import hooks.
# Links to files, because pyright does not look for sources behind a linked folder.
.PHONY: build/typing
build/typing:
	@rm -rf $@ && mkdir -p $@/moptrace/passes $@/moptrace/kernels
	@ln -s "$(CURDIR)"/moptrace/*.* $@/moptrace/
	@ln -s "$(CURDIR)"/passes/*.* $@/moptrace/passes/
	@ln -s "$(CURDIR)"/kernels/*.* $@/moptrace/kernels/
