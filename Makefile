# make demo: a first table from real data, then a language model's row.   make test: the suite.   make check: lint, types,
# format. make demo-record: the README's table of the demo.
# make table: nine variants and floors into benchmarks/ml100k.md and runs/report.html. JOBS rows at a time, one core each.
#   Language models at one budget, overlays/table.yaml; BUDGET= trains them as their own yaml files say, in runs/own.
# make beauty BEAUTY=folder: floors, SASRec, UniSRec and an LLM on Amazon Beauty, history masked and not; the folder
#   holds interactions.csv.gz and items.csv.gz.
# make ml1m DATA=folder: floors, SASRec, UniSRec and an LLM on MovieLens-1M, into the README's table.
# make test-lowest: the parts that rest on libraries, with the oldest versions of these, constraints-lowest.txt.
# make test-distributed: several real processes, killed processes, full disks.
SHELL := /bin/bash
PYTHON ?= python3
BIN := .venv/bin
OVERLAY ?= demo
RUNS ?= runs/$(OVERLAY)
FLOORS := popularity ease markov markov_tuned
FIRST := sasrec popularity ease markov
DEMO := e4srec_vectors_hybrid markov_tuned $(FIRST)
# Small steps learn sooner. SASRec goes on after the first table, while the language model trains on the other core.
DEMO_sasrec := --data.batch_tokens 1600 --trainer.max_epochs $(if $(filter debug,$(OVERLAY)),1,8)
MORE_sasrec := --data.batch_tokens 1600 --trainer.max_epochs $(if $(filter debug,$(OVERLAY)),2,20)
# Long ones first, so that two cores finish together. cllmrec waits for its views; make starts the others meanwhile.
LLM := e4srec anyo cllmrec sracl llara e4srec_paper e4srec_vectors
TABLE := sasrec sracl_paper $(LLM) $(FLOORS)
BUDGET ?= table
TABLE_RUNS := runs/$(or $(BUDGET),own)
JOBS ?= 2
OPTIONS_llara := --trainer.max_epochs 4
# The paper trains on one prefix per sample: hours here. All boundaries in one pass instead, and the row says so.
OPTIONS_e4srec_paper := --model.encoders.item_vectors_from $(TABLE_RUNS)/sasrec --data.supervision all \
	--data.shuffle_ties true --trainer.max_epochs 12 --metrics.variant "e4srec_paper, all boundaries"
BEAUTY_ENSEMBLES := ensemble ensemble_llm ensemble_control \
	sasrec_rare unisrec_rare ensemble_rare ensemble_llm_rare ensemble_control_rare
BEAUTY_TABLE := $(FLOORS) sasrec sasrec_recbole sasrec_text unisrec e4srec_vectors_hybrid $(BEAUTY_ENSEMBLES)
export HF_HUB_OFFLINE := 1

.PHONY: demo first-rows demo-rows demo-record table rows beauty ml1m test test-lowest test-distributed check format clean
.SECONDARY:

# SASRec's metrics.json is gone while it trains on: what has been reached is in files beside it.
first-rows: $(RUNS)/sasrec.begun $(patsubst %,$(RUNS)/%/metrics.json,$(filter-out sasrec,$(FIRST)))
demo-rows: $(RUNS)/sasrec.longer $(patsubst %,$(RUNS)/%/metrics.json,$(filter-out sasrec,$(DEMO)))

demo:
	OMP_NUM_THREADS=1 $(MAKE) --jobs $(JOBS) first-rows
	test ! -f $(RUNS)/sasrec/metrics.json || $(BIN)/anyo compare $(FIRST:%=$(RUNS)/%) --baseline markov
	@echo "A first table. The language model trains for some minutes, and SASRec goes on; then comes the whole table."
	OMP_NUM_THREADS=1 $(MAKE) --jobs $(JOBS) demo-rows
	$(BIN)/anyo compare $(DEMO:%=$(RUNS)/%) --baseline markov

demo-record: demo-rows
	$(BIN)/python benchmarks/results.py $(DEMO:%=$(RUNS)/%) --output benchmarks/demo.md --command "make demo" --readme

rows: $(TABLE_RUNS)/views.done $(TABLE:%=$(TABLE_RUNS)/%/metrics.json)

table:
	OMP_NUM_THREADS=1 $(MAKE) --jobs $(JOBS) rows
	$(BIN)/python benchmarks/results.py $(TABLE:%=$(TABLE_RUNS)/%) --output benchmarks/ml100k.md \
		--command "make table$(if $(BUDGET),, BUDGET=)"
	$(BIN)/anyo compare $(TABLE:%=$(TABLE_RUNS)/%) --baseline markov --format html --output runs/report.html

# Each variant once: a finished run folder is left alone, an interrupted run resumes from its last checkpoint.
$(TABLE_RUNS)/%/metrics.json: | .venv/installed
	$(BIN)/anyo fit --config configs/$*.yaml $(if $(BUDGET),$(if $(filter $*,$(LLM)),--config configs/overlays/$(BUDGET).yaml)) --run $(TABLE_RUNS)/$* $(OPTIONS_$*)

$(TABLE_RUNS)/e4srec_paper/metrics.json: $(TABLE_RUNS)/sasrec/metrics.json
$(TABLE_RUNS)/cllmrec/metrics.json: $(TABLE_RUNS)/views.done

$(TABLE_RUNS)/views.done: | .venv/installed
	$(BIN)/anyo augment --kind summarise $(if $(BUDGET),--parts 1)
	mkdir -p $(TABLE_RUNS) && touch $@

BEAUTY_DATA := --config configs/overlays/beauty.yaml --data.interactions $(BEAUTY)/interactions.csv.gz \
	--data.items $(BEAUTY)/items.csv.gz
BEAUTY_OPTIONS_sasrec := --model.encoders.dropout 0.5 --model.optimizer.weight_decay 0 --trainer.max_epochs 30
BEAUTY_OPTIONS_sasrec_recbole := --data.batch_tokens 5274 --trainer.max_epochs 40
BEAUTY_OPTIONS_sasrec_text := $(BEAUTY_OPTIONS_sasrec) --model.encoders.frozen 32 \
	--metrics.variant "sasrec_text, half frozen"
BEAUTY_OPTIONS_unisrec := --model.encoders.backbone.layers null --model.encoders.dropout 0.5 --trainer.max_epochs 30
BEAUTY_OPTIONS_e4srec_vectors_hybrid := --model.encoders.item_vectors_from runs/beauty/sasrec \
	--model.encoders.dropout 0.5 --data.batch_tokens 5280 --trainer.max_epochs 12 \
	--metrics.variant "e4srec_vectors_hybrid, SASRec's vectors"
BEAUTY_OPTIONS_ensemble := --model.runs "[runs/beauty/unisrec, runs/beauty/sasrec]" \
	--metrics.variant "ensemble, unisrec and SASRec"
BEAUTY_OPTIONS_ensemble_llm := --model.runs "[runs/beauty/e4srec_vectors_hybrid, runs/beauty/unisrec]" \
	--metrics.variant "ensemble, the LLM and unisrec"
BEAUTY_OPTIONS_ensemble_control := --model.runs "[runs/beauty/sasrec, runs/beauty_more/sasrec1]" \
	--metrics.variant "ensemble, two SASRecs"
# `_rare`: half of the log count is taken from each run's logits.
BEAUTY_OPTIONS_sasrec_rare := --model.runs "[runs/beauty/sasrec, runs/beauty/popularity]" \
	--model.weights "[1, -0.5]" --metrics.variant "sasrec, less popular"
BEAUTY_OPTIONS_unisrec_rare := --model.runs "[runs/beauty/unisrec, runs/beauty/popularity]" \
	--model.weights "[1, -0.5]" --metrics.variant "unisrec, less popular"
BEAUTY_OPTIONS_ensemble_rare := --model.runs "[runs/beauty/unisrec, runs/beauty/sasrec, runs/beauty/popularity]" \
	--model.weights "[1, 1, -1]" --metrics.variant "ensemble, unisrec and SASRec, less popular"
BEAUTY_OPTIONS_ensemble_llm_rare := \
	--model.runs "[runs/beauty/e4srec_vectors_hybrid, runs/beauty/unisrec, runs/beauty/popularity]" \
	--model.weights "[1, 1, -1]" --metrics.variant "ensemble, the LLM and unisrec, less popular"
BEAUTY_OPTIONS_ensemble_control_rare := --model.runs "[runs/beauty/sasrec, runs/beauty_more/sasrec1, runs/beauty/popularity]" \
	--model.weights "[1, 1, -1]" --metrics.variant "ensemble, two SASRecs, less popular"
BEAUTY_RESULTS := $(BIN)/python benchmarks/results.py --output benchmarks/beauty.md --baseline sasrec \
	--command "make beauty BEAUTY=folder" --metrics test/hr@10 test/ndcg@10 --slices

# Another data set by both of the literature's protocols: what the history holds may be recommended again, or not. Some
# four hours on one core.
beauty: $(BEAUTY_TABLE:%=runs/beauty/%/metrics.json) $(BEAUTY_TABLE:%=runs/beauty_masked/%/metrics.json)
	$(BEAUTY_RESULTS) --block beauty $(BEAUTY_TABLE:%=runs/beauty/%)
	$(BEAUTY_RESULTS) --block beauty_masked $(BEAUTY_TABLE:%=runs/beauty_masked/%)

# MovieLens-1M, history masked. DATA=folder with interactions.parquet and items.csv, in time order by `position`; without
# it the rows are made of GroupLens's archive. Some three hours on one core, a seed: SASRec, UniSRec on the texts of all
# 30 layers, and an LLM that reads SASRec's vectors beside those of texts. The table has all runs in runs/ml1m, so that
# other seeds may be added to it: `--seed_everything 1 --run runs/ml1m/sasrec1`, or quality_gpu.sh's lanes `seed0 seed1
# seed2`.
ML1M_TABLE := $(FLOORS) sasrec unisrec e4srec_vectors_hybrid ensemble
ML1M_DATA := $(if $(DATA),--data.interactions $(DATA)/interactions.parquet --data.items $(DATA)/items.csv \
	--data.columns.timestamp position,--data.source ml-1m)
ML1M_OPTIONS_sasrec := --data.max_items 200 --data.overlap 0 --data.random_cuts true --trainer.max_epochs 40 \
	--trainer.check_val_every_n_epoch 4
ML1M_OPTIONS_unisrec := $(ML1M_OPTIONS_sasrec) --model.encoders.backbone.layers null
ML1M_OPTIONS_e4srec_vectors_hybrid := --data.max_items 100 --data.batch_tokens 4000 --trainer.max_epochs 10 \
	--model.encoders.item_vectors_from runs/ml1m/sasrec --metrics.variant "e4srec_vectors_hybrid, SASRec's vectors"

ML1M_OPTIONS_ensemble := --model.runs "[runs/ml1m/e4srec_vectors_hybrid, runs/ml1m/sasrec]" \
	--metrics.variant "ensemble, the LLM and SASRec"

ml1m: $(ML1M_TABLE:%=runs/ml1m/%/metrics.json)
	$(BIN)/python benchmarks/results.py $(wildcard runs/ml1m/*/) --output benchmarks/ml1m.md --baseline sasrec \
		--command "make ml1m DATA=folder" --readme

runs/ml1m/%/metrics.json: | .venv/installed
	$(BIN)/anyo fit --config configs/$*.yaml $(ML1M_DATA) --run runs/ml1m/$* $(ML1M_OPTIONS_$*)

runs/ml1m/e4srec_vectors_hybrid/metrics.json: runs/ml1m/sasrec/metrics.json

runs/ml1m/ensemble/metrics.json: runs/ml1m/e4srec_vectors_hybrid/metrics.json

runs/beauty/%/metrics.json: | .venv/installed
	$(BIN)/anyo fit --config configs/$(if $(filter $*,$(BEAUTY_ENSEMBLES)),ensemble,$*).yaml $(BEAUTY_DATA) \
		--run runs/beauty/$* $(BEAUTY_OPTIONS_$*)

# Another seed, whose figures the tables' control needs.
runs/beauty_more/sasrec1/metrics.json: | .venv/installed
	$(BIN)/anyo fit --config configs/sasrec.yaml $(BEAUTY_DATA) --run runs/beauty_more/sasrec1 $(BEAUTY_OPTIONS_sasrec) \
		--seed_everything 1

runs/beauty_masked/%/metrics.json: | runs/beauty/%/metrics.json
	$(BIN)/anyo test --run runs/beauty/$* --output runs/beauty_masked/$* --metrics.mask_history true

runs/beauty/e4srec_vectors_hybrid/metrics.json: | runs/beauty/sasrec/metrics.json
$(patsubst %,runs/beauty/%/metrics.json,ensemble ensemble_rare ensemble_llm ensemble_llm_rare unisrec_rare): \
	| runs/beauty/unisrec/metrics.json
$(patsubst %,runs/beauty/%/metrics.json,ensemble ensemble_rare ensemble_control ensemble_control_rare sasrec_rare): \
	| runs/beauty/sasrec/metrics.json
runs/beauty/ensemble_llm/metrics.json runs/beauty/ensemble_llm_rare/metrics.json: \
	| runs/beauty/e4srec_vectors_hybrid/metrics.json
runs/beauty/ensemble_control/metrics.json runs/beauty/ensemble_control_rare/metrics.json: \
	| runs/beauty_more/sasrec1/metrics.json
$(patsubst %,runs/beauty/%/metrics.json,$(filter %_rare,$(BEAUTY_ENSEMBLES))): | runs/beauty/popularity/metrics.json

DEBUG := $(if $(filter debug,$(OVERLAY)),--config configs/overlays/debug.yaml)
FAST_DTYPE := from anyo_lightning.hardware import fast_dtype; print(fast_dtype())
# The debug overlay shortens everything, the demo's overlays the language model's training.
$(RUNS)/%/metrics.json: | .venv/installed
	$(BIN)/anyo fit --config configs/$*.yaml $(DEBUG) --run $(RUNS)/$* $(DEMO_$*)

$(RUNS)/sasrec.begun: | .venv/installed
	$(BIN)/anyo fit --config configs/sasrec.yaml $(DEBUG) --run $(RUNS)/sasrec $(DEMO_sasrec)
	touch $@

$(RUNS)/sasrec.longer: $(RUNS)/sasrec.begun
	$(BIN)/anyo fit --config configs/sasrec.yaml $(DEBUG) --run $(RUNS)/sasrec $(MORE_sasrec)
	touch $@

# Without bfloat16 in hardware a language model trains several times as slowly, so that it gets a fraction of the tokens.
$(RUNS)/e4srec_vectors_hybrid/metrics.json: | .venv/installed
	@overlay=$(OVERLAY); \
	if [ $$overlay = demo ] && [ "$$($(BIN)/python -c "$(FAST_DTYPE)")" = float32 ]; then \
		overlay=demo_float32; \
		echo "This machine has no fast bfloat16: the language model reads fewer tokens (overlays/demo_float32.yaml)"; \
	fi; \
	$(BIN)/anyo fit --config configs/e4srec_vectors_hybrid.yaml --config configs/overlays/$$overlay.yaml \
		--run $(RUNS)/e4srec_vectors_hybrid

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[completion,serve,sweep]'
	touch $@

.venv/tested: .venv/installed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

test: .venv/tested
	$(BIN)/pytest --numprocesses 2 -m "not distributed"

LOWEST := sources backbone encoders models losses internals costs callback delimited index report
.venv-lowest/installed: pyproject.toml constraints-lowest.txt
	$(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/pip install --quiet --constraint constraints-lowest.txt torch
	.venv-lowest/bin/pip install --quiet --constraint constraints-lowest.txt --editable . \
		beartype hypothesis openai optuna pytest pytest-xdist
	touch $@

test-lowest: .venv-lowest/installed
	.venv-lowest/bin/pytest --numprocesses 2 -m "not distributed and not browser and not slow" \
		$(LOWEST:%=tests/test_%.py) tests/test_cli.py::test_every_configuration_survives_a_step \
		tests/test_cli.py::test_mistakes_are_one_sentence

test-distributed: .venv/tested
	$(BIN)/pytest -m distributed

check: .venv/tested
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/tested
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv .venv-lowest runs .mypy_cache .pytest_cache .ruff_cache
