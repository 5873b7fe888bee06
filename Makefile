# make demo: a table from real data in ten minutes.   make test: the suite.   make check: lint, types, format.
SHELL := /bin/bash
PYTHON ?= python3
BIN := .venv/bin
RUNS ?= runs/demo
OVERLAY ?= demo
VARIANTS := popularity ease markov markov_tuned sasrec e4srec_hybrid
FINISHED := $(VARIANTS:%=$(RUNS)/%/metrics.json)
export HF_HUB_OFFLINE := 1

.PHONY: demo test check format clean

demo: $(FINISHED)
	$(BIN)/anyo compare $(VARIANTS:%=$(RUNS)/%) --baseline markov

# Each variant once: a finished run folder is left alone, an interrupted one goes on from its last checkpoint.
$(RUNS)/%/metrics.json: | .venv/installed
	$(BIN)/anyo fit --config configs/$*.yaml --config configs/overlays/$(OVERLAY).yaml --run $(RUNS)/$*

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

test: .venv/installed
	$(BIN)/pytest

check: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv runs .mypy_cache .pytest_cache .ruff_cache
