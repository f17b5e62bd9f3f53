# Each target makes its own virtual environment. TORCH is installed only where the environment has no torch yet:
# `make quickstart TORCH="torch --index-url https://download.pytorch.org/whl/cu128"` brings your own build.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check
# The oldest versions that setup.cfg admits.
LOWEST_TORCH ?= torch==2.6.0
LOWEST = "$(firstword $(LOWEST_TORCH))" "transformers>=4.57,<4.58"
# Packages that parity is tested against. They pin old versions of what they need, hence --no-deps.
PEERS = galore-torch==1.0 fira==1.0.2 adam-mini==1.1.1 came-pytorch==0.1.3 apollo-torch==1.0.3
BENCH_PEERS = q-galore-torch==1.0 pytorch-optimizer==4.1.0

.PHONY: quickstart test test-all test-lowest bench check docs clean

quickstart: $(VENV)/.recipes
	$(BIN)/python recipes/quickstart/quickstart.py

test: $(VENV)/.test
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not full"

test-all: $(VENV)/.test
	$(BIN)/python -m pytest -n 2 --dist worksteal
	$(BIN)/python tests/mutants/run.py

# The same tests with the oldest torch and transformers that are supported; the oldest Python: make test-lowest PYTHON=python3.10.
test-lowest: VENV = .venv-lowest-$(notdir $(PYTHON))
test-lowest:
	$(MAKE) VENV=$(VENV) TORCH="$(LOWEST_TORCH)" PINS='$(LOWEST)' $(VENV)/.test
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not full"

bench: $(VENV)/.bench
	$(BIN)/python recipes/benchmarks/run.py --json runs/bench.json --markdown runs/bench.md

# The documentation, into runs/site. (The variable silences an announcement that mkdocs-material prints.)
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -c "import torch" 2>/dev/null || $(PIP) $(TORCH)
	touch $@

$(VENV)/.recipes: $(VENV)/.torch setup.cfg
	$(PIP) --editable ".[recipes]" $(PINS)
	touch $@

$(VENV)/.test: $(VENV)/.torch setup.cfg
	$(PIP) --editable ".[test]" $(PINS)
	$(PIP) --no-deps $(PEERS)
	touch $@

$(VENV)/.bench: $(VENV)/.test
	$(PIP) --no-deps $(BENCH_PEERS)
	mkdir -p runs
	touch $@

$(VENV)/.docs: $(VENV)/.torch setup.cfg
	$(PIP) --editable ".[docs]"
	touch $@

$(VENV)/.dev: $(VENV)/.test
	$(PIP) --editable ".[dev]"
	touch $@

clean:
	rm -rf .venv* build dist *.egg-info runs
