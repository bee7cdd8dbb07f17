# The one entry point: every pipeline and every document calls these targets.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3.11
CLUSTER ?= default
CONTEXT ?=
BIN := .venv/bin
CLUSTER_TOOL := $(PYTHON) tests/cluster/cluster.py

##@ Use

.PHONY: help
help: ## Show the targets
	@awk 'BEGIN {FS = ":.*##"} /^##@/ {printf "\n%s\n", substr($$0, 5)} /^[a-z-]+:.*##/ {printf "  %-16s %s\n", $$1, $$2}' Makefile

.PHONY: demo
demo: venv ## From nothing to a served model, on the embedded cluster or on CONTEXT=<kubectl context>
	@$(BIN)/python -m tests.demo --cluster "$(CLUSTER)" --context "$(CONTEXT)"

.PHONY: test
test: venv venv-trainer venv-vllm ## Run every rung that needs no GPU
	@$(PYTHON) tests/run.py unit chart api trainer cluster vllm

##@ One rung of the tests

.PHONY: test-unit test-chart test-api test-trainer test-vllm test-cluster test-gpu test-faults
test-unit: venv ## No network, no torch: seconds
	@$(PYTHON) tests/run.py unit
test-chart: venv ## Helm templates and the values' schema
	@$(PYTHON) tests/run.py chart
test-api: venv ## A real API server, no nodes
	@$(PYTHON) tests/run.py api
test-trainer: venv venv-trainer ## DeepSpeed with several ranks, no cluster
	@$(PYTHON) tests/run.py trainer
test-vllm: venv-trainer venv-vllm ## An endpoint's pods on real vLLM, built for CPUs
	@$(PYTHON) tests/run.py vllm
test-cluster: venv ## Real pods on the embedded cluster
	@$(PYTHON) tests/run.py cluster
test-gpu: venv-trainer ## Needs a GPU; skipped without one
	@$(PYTHON) tests/run.py gpu
test-faults: venv ## Every fault in every phase of a training, half an hour: no part of make test
	@$(BIN)/python -m tests.cluster.fault_matrix --cluster "$(CLUSTER)" --only "$(FAULTS)"

##@ Benchmarks: a table, and build/bench/<name>.json

.PHONY: bench-recovery bench-checkpoint bench-goodput bench-restart bench-filter bench-filter-quality bench-judge bench-packing bench-prepare bench-weight-diff bench-compose bench-eval
.PHONY: bench-serve-start bench-rollout
bench-recovery: venv-trainer ## Kills at random moments, beside the stock Trainer: KILLS=50 ENGINE=50 SEED=1 MINUTES=inf
	@.venv-trainer/bin/python -m tests.bench.recovery --kills "$(or $(KILLS),50)" --engine "$(or $(ENGINE),50)" \
	  --seed "$(or $(SEED),1)" --minutes "$(or $(MINUTES),inf)"
bench-checkpoint: venv-trainer ## What a save costs training, beside torch.save
	@.venv-trainer/bin/python -m tests.bench.checkpoint
bench-goodput: venv-trainer ## Productive share under kills, beside the recipe's cadence
	@.venv-trainer/bin/python -m tests.bench.goodput
bench-restart: venv ## From a killed pod, and a killed rank, to the next step on the embedded cluster: ROUNDS=3
	@$(BIN)/python -m tests.bench.restart --rounds "$(or $(ROUNDS),3)" --cluster "$(CLUSTER)"
bench-filter: venv ## Rows a second through the filter, beside the naive loop and a compiled regex
	@$(BIN)/python -m tests.bench.filter
bench-filter-quality: venv ## Precision, recall and F1 of the rules per language, beside the legacy list
	@$(BIN)/python -m tests.bench.filter_quality
bench-judge: venv-trainer ## What a judge trained on labelled rows adds to the rules: SEEDS=3 (minutes each)
	@CUDA_VISIBLE_DEVICES= .venv-trainer/bin/python -m tests.bench.judge --seeds "$(or $(SEEDS),3)"
bench-packing: venv-trainer ## Real tokens and tokens a second, packed beside padded
	@.venv-trainer/bin/python -m tests.bench.packing
bench-prepare: venv-trainer ## A million rows end to end, beside datasets.map
	@.venv-trainer/bin/python -m tests.bench.prepare
bench-weight-diff: venv-trainer ## A weight diff in stretches, beside loading both models whole
	@.venv-trainer/bin/python -m tests.bench.weight_diff
bench-compose: venv-trainer ## A composed adapter, beside its parts stacked live
	@.venv-trainer/bin/python -m tests.bench.compose
bench-eval: venv-trainer ## Log-likelihoods in rows that share beginnings, beside batch 1: ROUNDS=3
	@.venv-trainer/bin/python -m tests.bench.eval --rounds "$(or $(ROUNDS),3)"

bench-serve-start: venv ## From the passed gate to the first answer on the embedded cluster: ROUNDS=3
	@$(BIN)/python -m tests.bench.serve_start --rounds "$(or $(ROUNDS),3)" --cluster "$(CLUSTER)"
bench-rollout: venv ## Requests through a new version, a killed pod and a roll-back: REQUESTS=10000 (17 minutes)
	@$(BIN)/python -m tests.bench.rollout --requests "$(or $(REQUESTS),10000)" --cluster "$(CLUSTER)"

##@ Develop

.PHONY: venv
venv: ## Make .venv: operator, light trainer commands, development tools
	@$(PYTHON) tests/cluster/images/venvs.py light

.PHONY: venv-trainer
venv-trainer: ## Make .venv-trainer: the training stack
	@$(PYTHON) tests/cluster/images/venvs.py trainer

.PHONY: venv-vllm
venv-vllm: ## Make .venv-vllm: vLLM as in the inference image, built for CPUs
	@$(PYTHON) tests/cluster/images/venvs.py vllm

.PHONY: fmt
fmt: venv ## Format the Python code
	@$(BIN)/ruff format operator tests
	@$(BIN)/ruff check --fix --quiet operator tests

.PHONY: lint
lint: venv ## Lint code, import contracts and YAML
	@$(BIN)/ruff format --check --quiet operator tests || { echo "run: make fmt"; exit 1; }
	@$(BIN)/ruff check --quiet operator tests
	@PYTHONPATH=operator/src $(BIN)/lint-imports
	@$(BIN)/yamllint --strict --format parsable -c .yamllint.yaml .

.PHONY: type
type: venv ## Check types
	@$(BIN)/mypy

.PHONY: generate
generate: venv ## Write what is generated from the models: CRD, chart copy, API reference
	@$(BIN)/python -m finetune_operator.api.crd

.PHONY: verify
verify: generate ## Generated files fresh, lint, types, unit tests
	@git diff --exit-code -- crds charts operator/docs || { echo "generated files differ: commit what make generate wrote"; exit 1; }
	@$(MAKE) --no-print-directory lint type test-unit

.PHONY: images
images: ## Build the images into the embedded cluster's store
	@$(PYTHON) tests/cluster/images/build.py --name "$(CLUSTER)"

.PHONY: release
release: venv ## Push images and chart: VERSION=v1.2.3 REGISTRY=registry.example.com/finetune
	@$(BIN)/python pipelines/release.py --version "$(VERSION)" --registry "$(REGISTRY)" --helm "$$($(CLUSTER_TOOL) tools)/helm"

##@ The embedded cluster

.PHONY: cluster-up cluster-down kubeconfig
cluster-up: ## Start it, building what is missing
	@$(CLUSTER_TOOL) up --name "$(CLUSTER)"
cluster-down: ## Stop it; nothing stays behind but the cache
	@$(CLUSTER_TOOL) down --name "$(CLUSTER)"
kubeconfig: ## Print the path of its kubeconfig
	@$(CLUSTER_TOOL) kubeconfig --name "$(CLUSTER)"

.PHONY: clean
clean: ## Remove what was built in the checkout
	@rm -rf build dist .venv .venv-trainer .venv-vllm .pytest_cache .mypy_cache .ruff_cache .hypothesis
