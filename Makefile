# Two commands: `make demo` runs the whole main job on the embedded small world, `make test` passes the tests.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
REFERENCE ?= .venv-reference
export POLYPHONY_HOME ?= $(CURDIR)/.polyphony
export DAGSTER_HOME := $(POLYPHONY_HOME)/dagster_home
PORT ?= 3000
# Processes that test at once; a file of tests stays together, as its fixtures cost most.
JOBS ?= 2
# Nothing is fetched from a model hub by the small world; libraries that ask are told so.
OFFLINE := HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error DIFFUSERS_VERBOSITY=error HF_HUB_DISABLE_PROGRESS_BARS=1

.PHONY: help setup reference home demo ui test test-slow test-browser test-reference test-gpu check bench bench-gpu world-models clean
help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), f"Python 3.11 or newer is needed, found {sys.version}"'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (one to three minutes) ..."
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e ".[dev]"
	touch $@

# Nothing but what the group names: no package brings others along, and torch no CUDA libraries.
$(REFERENCE)/.installed: pyproject.toml
	test -x $(REFERENCE)/bin/python || $(PYTHON) -m venv $(REFERENCE)
	@echo "installing the original packages into $(REFERENCE) (about a minute) ..."
	$(REFERENCE)/bin/python -m pip install --disable-pip-version-check -q --upgrade "pip>=25.1"
	$(REFERENCE)/bin/python -m pip install --disable-pip-version-check -q --no-deps --group reference
	$(REFERENCE)/bin/python -I pipelines/scoring/reference_driver.py check
	touch $@

setup: $(VENV)/.installed  ## install into .venv with the tested versions

reference: $(REFERENCE)/.installed  ## install the original packages hpsv2 and image-reward into .venv-reference

home: ## make DAGSTER_HOME and copy dagster.yaml into it
	@mkdir -p "$(DAGSTER_HOME)"
	@cmp -s dagster.yaml "$(DAGSTER_HOME)/dagster.yaml" || cp dagster.yaml "$(DAGSTER_HOME)/dagster.yaml"

demo: setup home  ## the whole main job on the small world, on a CPU
	$(OFFLINE) $(BIN)/python -m assets.demo

ui: setup home  ## the Dagster UI over the demo's own instance, on 127.0.0.1:$(PORT); pages of pairs on port 3001
	@mkdir -p "$(POLYPHONY_HOME)/store/pairs"
	@$(BIN)/python -m http.server 3001 --bind 127.0.0.1 --directory "$(POLYPHONY_HOME)/store/pairs" >/dev/null 2>&1 & \
	trap "kill $$! 2>/dev/null" EXIT; \
	$(OFFLINE) VIRTUAL_ENV="$(abspath $(VENV))" PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/dg dev --host 127.0.0.1 --port $(PORT)

test: setup  ## the default tests
	$(OFFLINE) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile -m "not slow and not gpu and not reference"

test-slow: setup  ## the tests that take minutes
	$(OFFLINE) $(BIN)/python -m pytest -m "slow and not gpu and not reference"

test-browser: setup  ## the UI in Chromium, which the system must have; POLYPHONY_SCREENSHOTS=FOLDER keeps pictures
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e ".[dev,browser]"
	$(OFFLINE) $(BIN)/python -m pytest tests/assets/test_browser.py

test-reference: setup reference  ## our scorers against the original packages
	$(OFFLINE) $(BIN)/python -m pytest -m reference

test-gpu: setup  ## the tests that need a CUDA device
	$(OFFLINE) $(BIN)/python -m pytest -m gpu

check: setup  ## ruff, mypy, import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: setup  ## benchmarks: each prints what it measured, on which machine, against what
	$(OFFLINE) $(BIN)/python -m benchmarks.scoring ensemble --size tiny
	$(OFFLINE) $(BIN)/python -m benchmarks.scoring ensemble --size base
	$(OFFLINE) $(BIN)/python -m benchmarks.scoring plane
	$(OFFLINE) $(BIN)/python -m benchmarks.ingest
	$(OFFLINE) $(BIN)/python -m benchmarks.catalogue
	$(OFFLINE) $(BIN)/python -m benchmarks.labels
	$(OFFLINE) $(BIN)/python -m benchmarks.labels --pairs 1000000
	$(OFFLINE) $(BIN)/python -m benchmarks.labels_groups
	$(OFFLINE) $(BIN)/python -m benchmarks.training

bench-gpu: setup  ## scoring and training speed in bf16 and the share of the card's matrix rate
	$(OFFLINE) $(BIN)/python -m benchmarks.scoring gpu
	$(OFFLINE) $(BIN)/python -m benchmarks.training_gpu

world-models: setup  ## train the small world's tiny models again (about half an hour on two cores)
	$(OFFLINE) $(BIN)/python -m trainers.world_models

clean:  ## remove what the demo made in this folder
	rm -rf "$(CURDIR)/.polyphony"
