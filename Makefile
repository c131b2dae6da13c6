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

.PHONY: demo test test-integration test-all lint docs install install-dev install-docs clean

demo: install
	$(BIN)/lorica run examples/digits-shared-noise.yaml

PYTEST := $(BIN)/python -m pytest -n 2 --dist worksteal

test: install-dev
	$(PYTEST)

test-integration: install-dev
	$(PYTEST) --durations 15 -m "integration and not slow"

# The slow tests too, and those over drawn examples again with ten times as many.
test-all: test test-integration
	$(PYTEST) --durations 15 -m "slow or hypothesis" --hypothesis-profile thorough

lint: install-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Searchable, in site/. NO_MKDOCS_2_WARNING silences an announcement.
docs: install-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "Built: site/index.html. To search in it: $(BIN)/python -m http.server --directory site"

install: $(VENV)/installed
install-dev: $(VENV)/installed-dev
install-docs: $(VENV)/installed-docs

PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

$(VENV)/torch:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Lorica needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	@echo "Creating the environment $(VENV) ..."
	@$(PYTHON) -m venv $(VENV)
	@echo "Installing PyTorch: about 200 MB to download for CPUs, gigabytes with CUDA; one to several minutes ..."
	@$(PIP) --retries 1 $(TORCH) && touch $@

$(VENV)/installed: $(VENV)/torch pyproject.toml constraints.txt
	@echo "Installing Lorica and the libraries that it uses: about 170 MB to download; a minute or two ..."
	@$(PIP) -c constraints.txt -e . && touch $@

$(VENV)/installed-dev: $(VENV)/torch pyproject.toml constraints.txt
	@echo "Installing Lorica with what its tests use: about 450 MB to download; two to several minutes ..."
	@$(PIP) -c constraints.txt -e '.[dev]'
	@# Only its auditing module is used, as a second implementation, and that needs no JAX.
	@$(PIP) -c constraints.txt --no-deps jax-privacy && touch $@ $(VENV)/installed $(VENV)/installed-docs

$(VENV)/installed-docs: $(VENV)/torch pyproject.toml constraints.txt
	@echo "Installing Lorica with what builds its pages: about 200 MB to download; a minute or two ..."
	@$(PIP) -c constraints.txt -e '.[docs]' && touch $@ $(VENV)/installed

clean:
	rm -rf $(VENV) site .pytest_cache .ruff_cache .mypy_cache
