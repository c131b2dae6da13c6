# `make demo` and `make test` do everything from a bare checkout: environment, install, run.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

# A Linux machine without an NVIDIA driver takes PyTorch's CPU build: the default one brings gigabytes of CUDA.
# `make TORCH=torch demo` lets pip choose.
ifeq ($(shell uname -s)-$(shell command -v nvidia-smi >/dev/null 2>&1 && echo gpu),Linux-)
TORCH ?= torch==2.13.0+cpu --extra-index-url https://download.pytorch.org/whl/cpu
else
TORCH ?= torch==2.13.0
endif

.PHONY: demo test test-all lint install install-dev clean

demo: install
	$(BIN)/lorica run examples/digits-shared-noise.yaml

PYTEST := $(BIN)/python -m pytest -n 2 --dist worksteal

test: install-dev
	$(PYTEST)

# The slow tests, and those over drawn examples again with ten times as many.
test-all: install-dev
	$(PYTEST) --durations 15
	$(PYTEST) --durations 15 -m "integration and not slow"
	$(PYTEST) --durations 15 -m "slow or hypothesis" --hypothesis-profile thorough

lint: install-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

install: $(VENV)/installed
install-dev: $(VENV)/installed-dev

$(VENV)/torch:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Lorica needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --retries 1 $(TORCH) && touch $@

$(VENV)/installed: $(VENV)/torch pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet -c constraints.txt -e . && touch $@

$(VENV)/installed-dev: $(VENV)/torch pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	# Only its auditing module is used, as a second implementation, and that needs no JAX.
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-deps jax-privacy && touch $@ $(VENV)/installed

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache
