# make demo | test | lint | docs | bench: each sets up .venv first. Only Python 3.11 to 3.13 is needed.
#
# TORCH pins torch: pip might take a newer one, and gigabytes of CUDA libraries. Any requirement works:
#   make venv TORCH="torch==2.13.0 --index-url URL"     a certain build of torch (CPU, CUDA, ROCm)
# PYTHON chooses the interpreter that makes .venv.

TORCH ?= torch==2.13.0
SUPPORTED := import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))
PYTHON ?= $(shell for p in python3 python3.12 python3.11 python3.13 python; do \
	$$p -c '$(SUPPORTED)' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
DEMO := $(VENV)/.demo
STAMP := $(VENV)/.installed
NATIVE := $(wildcard setup.py csrc/*.h csrc/*.cpp csrc/*/*)
# Errors only: a warning that pip gives here is about the machine's own settings, a new pip, or a cache.
PIP := PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore $(BIN)/python -m pip install -qq
# One worker per core; make test WORKERS=0 stays in one process, for a debugger.
WORKERS ?= logical
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --maxprocesses 16 --dist loadgroup -p no:benchmark

.PHONY: help venv demo test test-all lint format docs bench clean
.DEFAULT_GOAL := help

help:
	@echo "make demo      train the ladder of methods on handwritten digits (a minute) and draw the picture"
	@echo "make test      what proves the package to a user, in minutes: the fast tests, on all cores"
	@echo "make test-all  every test: each Triton plan on each target, Triton's interpreter, nvcc, sanitizers"
	@echo "make lint      ruff and mypy"
	@echo "make docs      the documentation site, in build/site; its links and equations are checked"
	@echo "make bench     the benchmarks that run on this machine"
	@echo "make venv      .venv with everything (the others do it themselves)"

venv: $(STAMP)

# What the demo needs; again when dependencies or native sources change.
$(DEMO): pyproject.toml $(NATIVE)
	@test -n "$(PYTHON)" || { echo "No Python 3.11 to 3.13 found; name one:" >&2; \
	  echo "make $(MAKECMDGOALS) PYTHON=/path/to/python3" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -c '$(SUPPORTED)' || { echo "$(VENV) has an unsupported Python: remove it" >&2; exit 1; }
	@date +%s > $(VENV)/.began
	@echo "Installing $(firstword $(TORCH)) and what builds the package ..."
	@$(PIP) $(TORCH)
	@$(PIP) "setuptools>=77" ninja pybind11 numpy
	@echo "Compiling arl_fast (a minute or two on two cores), with what the demo needs ..."
	@$(PIP) --no-build-isolation -e ".[demo]"
	@$(BIN)/python -m arl_fast
	@echo "Ready after $$(($$(date +%s) - $$(cat $(VENV)/.began))) s."
	@touch $@

$(STAMP): $(DEMO)
	@date +%s > $(VENV)/.began
	@echo "Installing what tests, lint and documentation need ..."
	@$(PIP) "arl_fast[dev]"
	@echo "Ready after $$(($$(date +%s) - $$(cat $(VENV)/.began))) s."
	@touch $@

demo: $(DEMO)
	$(BIN)/python examples/demo.py $(ARGS)

test: $(STAMP)
	$(PYTEST) -m "not slow" $(ARGS)
	@$(call interpreted,contract and not slow)

test-all: $(STAMP)
	$(PYTEST) $(ARGS)
	@$(call interpreted,contract)

define interpreted
if $(BIN)/python -c 'import triton' 2>/dev/null; \
then echo "The Triton kernels, interpreted:"; TRITON_INTERPRET=1 $(PYTEST) -m "$(1)" $(ARGS); \
else echo "Triton is not installed here: its kernels were not tested."; fi
endef

lint: $(STAMP)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

format: $(STAMP)
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

docs: $(STAMP)
	$(BIN)/python -m zensical build --clean --strict
	$(BIN)/python .ci/check_site.py build/site

bench: $(STAMP)
	$(BIN)/python benchmarks/run.py $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
