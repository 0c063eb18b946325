# Two commands for a newcomer, each from a fresh clone with nothing but Python >= 3.11 and pip: make demo, make test.
PYTHON ?= python3
VENV   ?= .venv
# Installed before anything else, so that nothing pulls another build in. Override it for your device, for example
# make demo TORCH='torch --index-url <the wheel index of your CUDA version, see pytorch.org>'
TORCH  ?= torch==2.13.0
# What to test and how, for example make pytest PYTEST='tests/data -x'
PYTEST ?=
# Where `make demo` writes.
DEMO   ?= demo
# One measurement alone: bench_step, bench_head, bench_data, bench_load, bench_memory, bench_checkpoint and so on.
BENCH  ?=
BIN    := $(VENV)/bin
# The oldest versions that are tested. PyPI's torch for Linux is the one with CUDA, 5 GB installed; for the small one:
# make test-oldest OLDEST='torch==2.11.0 --index-url <the CPU wheel index, see pytorch.org>'
OLDEST ?= torch==2.11.0
OLDEST_VENV ?= .venv-oldest
# Results and further arguments of gpu-check, and which mutants to try.
RESULT  ?=
GPU     ?=
MUTANTS ?=

# One thread a process: the tests and the demo start two processes on machines that may have two cores.
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false

.DEFAULT_GOAL := help
.PHONY: help demo test pytest lint format bench gpu-check mutants test-oldest clean

help:  ## Show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */\t/' | sort | awk -F'\t' '{printf "  make %-12s %s\n", $$1, $$2}'

demo: $(VENV)/.installed  ## Train a small chat model on 2 processes and ask it questions it has never seen (5 minutes)
	$(BIN)/python examples/arithmetic/demo.py $(DEMO)

test: lint pytest  ## Everything CI checks: ruff, mypy, import-linter, pytest

pytest: $(VENV)/.installed-dev  ## The tests alone
	$(BIN)/python -m pytest $(PYTEST)

lint: $(VENV)/.installed-dev  ## ruff, mypy, import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.installed-dev  ## Mend what ruff can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.installed-dev  ## Measure speed and memory against other trainers (15 minutes), see benchmarks/
	$(BIN)/python -m benchmarks$(if $(BENCH),.$(BENCH))

# With PYTHON named, that Python runs the check as it is: no virtual environment, no pip, no network.
ifeq ($(origin PYTHON),file)
gpu-check: $(VENV)/.installed
CHECKER := $(BIN)/python
else
CHECKER := $(PYTHON)
endif
gpu-check:  ## Correctness, speed and memory on one CUDA device (8 minutes): PYTHON=... RESULT=file GPU=--add
	$(CHECKER) -m benchmarks.gpu_check $(if $(RESULT),--out $(RESULT)) $(GPU)

mutants: $(VENV)/.installed-dev  ## Put known bugs into a copy, one at a time; the nearest tests must fail (10 minutes)
	$(BIN)/python -m tests.mutants $(MUTANTS)

test-oldest: $(OLDEST_VENV)/.installed-dev  ## The tests with the oldest torch and transformers that are supported
	$(OLDEST_VENV)/bin/python -m pytest $(PYTEST)

clean:  ## Remove the demo's files and caches; the virtual environment stays
	rm -rf $(DEMO) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache

# Stamps: set-up runs once, and again when the dependencies change.
$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "fsdpsft needs Python 3.11 or newer; name one with: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(TORCH)
	$(BIN)/python -m pip install -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install -e '.[test,dev]'
	@touch $@

$(OLDEST_VENV)/.installed-dev: pyproject.toml
	$(PYTHON) -m venv $(OLDEST_VENV)
	$(OLDEST_VENV)/bin/python -m pip install $(OLDEST)
	$(OLDEST_VENV)/bin/python -m pip install transformers==5.17.0 -e '.[test]'
	@touch $@
