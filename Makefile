# make demo: a table from real data in ten minutes.   make test: the suite.   make check: lint, types, format.
# make results: the README's table, trained anew (hours).
SHELL := /bin/bash
PYTHON ?= python3
BIN := .venv/bin
OVERLAY ?= demo
RUNS ?= runs/$(OVERLAY)
FLOORS := popularity ease markov markov_tuned
DEMO := $(FLOORS) sasrec e4srec_hybrid
RESULTS := $(FLOORS) sasrec anyo anyo_hybrid anyo_vectors e4srec e4srec_hybrid \
	e4srec_vectors e4srec_vectors_hybrid
export HF_HUB_OFFLINE := 1

.PHONY: demo results test test-distributed check format clean
.SECONDARY:

demo: $(DEMO:%=$(RUNS)/%/metrics.json)
	$(BIN)/anyo compare $(DEMO:%=$(RUNS)/%) --baseline markov

results: $(RESULTS:%=runs/results/%/metrics.json)
	$(BIN)/python benchmarks/results.py runs/results

# Each variant once: a finished run folder is left alone, an interrupted one goes on from its last checkpoint.
runs/results/%/metrics.json: | .venv/installed
	$(BIN)/anyo fit --config configs/$*.yaml --run runs/results/$*

# The demo shortens the language model's training only, the debug overlay everything.
$(RUNS)/%/metrics.json: | .venv/installed
	$(BIN)/anyo fit --config configs/$*.yaml --run $(RUNS)/$* \
		$(if $(filter debug,$(OVERLAY))$(filter e4srec% anyo%,$*),--config configs/overlays/$(OVERLAY).yaml)

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

test: .venv/installed
	$(BIN)/pytest --numprocesses 2 -m "not distributed"

test-distributed: .venv/installed
	$(BIN)/pytest -m distributed

check: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv runs .mypy_cache .pytest_cache .ruff_cache
