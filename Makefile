# make demo | test | lint | bench: each sets up .venv first, on a machine with nothing but Python 3.11 to 3.13.
#
# TORCH pins torch; without it pip may take a newer build and gigabytes of CUDA libraries with it. Any requirement works:
#   make venv TORCH="torch==2.13.0 --index-url URL"     a certain build of torch (CPU, CUDA, ROCm)
# PYTHON chooses the interpreter that makes .venv.

TORCH ?= torch==2.13.0
SUPPORTED := import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))
PYTHON ?= $(shell for p in python3 python3.12 python3.11 python3.13 python; do \
	$$p -c '$(SUPPORTED)' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
NATIVE := $(wildcard setup.py csrc/*.h csrc/*.cpp csrc/*/*)

.PHONY: help venv demo test lint format bench clean
.DEFAULT_GOAL := help

help:
	@echo "make demo    train the ladder of methods on handwritten digits (a minute) and draw the picture"
	@echo "make test    the test suite, then the Triton kernels under Triton's interpreter"
	@echo "make lint    ruff and mypy"
	@echo "make bench   the benchmarks that run on this machine"
	@echo "make venv    .venv with everything (the others do it themselves)"

venv: $(STAMP)

# Again whenever the dependencies or the native sources change. The native extension is built if there is a compiler.
$(STAMP): pyproject.toml $(NATIVE)
	@test -n "$(PYTHON)" || { echo "No Python 3.11 to 3.13 found; name one: make $(MAKECMDGOALS) PYTHON=/path/to/python3" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c '$(SUPPORTED)' || { echo "$(VENV) has an unsupported Python: remove it" >&2; exit 1; }
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q $(TORCH)
	$(BIN)/python -m pip install -q "setuptools>=77" ninja pybind11 numpy
	$(BIN)/python -m pip install -q --no-build-isolation -e ".[dev]"
	$(BIN)/python -m arl_fast
	@touch $@

demo: $(STAMP)
	$(BIN)/python examples/demo.py $(ARGS)

test: $(STAMP)
	$(BIN)/python -m pytest $(ARGS)
	@if $(BIN)/python -c 'import triton' 2>/dev/null; \
	then echo "The Triton kernels, interpreted:"; TRITON_INTERPRET=1 $(BIN)/python -m pytest -m contract $(ARGS); \
	else echo "Triton is not installed here: its kernels were not tested."; fi

lint: $(STAMP)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

format: $(STAMP)
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

bench: $(STAMP)
	$(BIN)/python benchmarks/run.py $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
