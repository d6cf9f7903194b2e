# Two commands do everything on a fresh machine: `make quickstart` and `make test`. `make help` lists the rest.
BASE_PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
PYTHON := $(VENV)/bin/python
STAMP := $(VENV)/.installed
CONFIG ?= configs/mini_record.yaml
DATA := data/pydocs-mini
SEED ?= 0

.PHONY: help quickstart env data train test test-all test-slurm check bench clean

help: ## this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

quickstart: env data train ## environment, data, the main job, compliance check, report

env: $(STAMP) ## the virtual environment with every pinned package

# torch first and by its exact version: another package's open range would pull a build of several GB.
$(STAMP): pyproject.toml constraints.txt setup.py bert_fast/compression/native/kernels.c
	$(BASE_PYTHON) -m venv $(VENV)
	$(PYTHON) -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(PYTHON) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[data,dev,tuning,optimizers]"
	@touch $(STAMP)

data: $(DATA)/train/manifest.json ## the stores of the mini benchmark

$(DATA)/train/manifest.json: | env
	$(PYTHON) scripts/prepare_data.py --recipe configs/data/pydocs_mini.yaml --out $(DATA)

train: env data ## the main job: configs/mini_record.yaml with SEED=0
	rm -rf runs/quickstart
	$(PYTHON) run_pretraining.py --config $(CONFIG) run.folder=runs/quickstart train.seed=$(SEED)

# Three processes on two cores: tests that start ranks wait a lot. A file's tests share their runs, so they stay together.
test: env ## the tests, without the slow ones
	$(PYTHON) -m pytest -n $$(($$(nproc) + 1)) --dist loadfile -m "not slow and not gpu and not slurm"

test-all: env ## every test this machine can run
	$(PYTHON) -m pytest

test-slurm: env ## a real Slurm of two nodes on this machine (installs Debian's as root)
	@command -v sbatch >/dev/null && command -v munged >/dev/null || { [ "$$(id -u)" = 0 ] && apt-get update -qq \
		&& DEBIAN_FRONTEND=noninteractive apt-get install -y -qq slurm-wlm munge >/dev/null; } || true
	@if command -v sbatch >/dev/null && command -v munged >/dev/null && [ "$$(id -u)" = 0 ]; \
		then $(PYTHON) -m pytest -rs tests/slurm $(SLURM_PYTEST); \
		else echo "SKIPPED: NOTHING WAS TESTED UNDER SLURM: needs slurm-wlm and munge, and root (apt-get could not install them)"; fi

check: env ## lint, types and import contracts
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy
	$(VENV)/bin/lint-imports

bench: env data ## time to train against the transformers baseline, 5 interleaved pairs
	$(PYTHON) -m scripts.benchmarks.time_to_train --config configs/mini_cpu.yaml --json results/mini_cpu/time_to_train.json

clean: ## remove runs and prepared data
	rm -rf runs data
