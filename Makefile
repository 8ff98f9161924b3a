# make demo | test | lint | coverage | bench | verify-resume | fuzz | gpu-check | venv
PYTHON ?= python3
BIN := .venv/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# --system-site-packages: .venv uses the torch of PYTHON, and pip must not replace it (docs/installation.md)
VENV_OPTIONS ?=

.PHONY: venv demo test lint coverage bench verify-resume gpu-check fuzz

venv: .venv/installed

.venv/installed: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV_OPTIONS) .venv
ifeq ($(findstring --system-site-packages,$(VENV_OPTIONS)),)
	$(PIP_INSTALL) --requirement requirements.txt
else
	$(BIN)/python -c "import torch; print('torch==' + torch.__version__)" > .venv/torch.txt
	$(PIP_INSTALL) --constraint .venv/torch.txt --editable ".[test]"
endif
	touch $@

# RACOON learns to tell two gravities apart on a synthetic universe
demo: venv
	$(BIN)/accelerate launch --config_file accelerate_configs/cpu.yaml trainer.py experiments/temp.yaml --no-extend

test: venv
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 3 --dist loadfile --no-loadscope-reorder

# which lines the tests run, of processes that they start as well
coverage: venv
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 3 --dist loadfile --cov --cov-report=term:skip-covered

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# this trainer beside a plain loop, Lightning and transformers' Trainer, on this machine
bench: venv
	$(PIP_INSTALL) --requirement benchmarks/requirements.txt
	$(BIN)/python benchmarks/throughput.py

# kill a training at random moments, resume it, compare the weights; CONFIG=accelerate_configs/X.yaml tries a cluster
CONFIG ?= accelerate_configs/cpu.yaml
verify-resume: venv
	$(BIN)/python tests/verify_resume.py --config_file $(CONFIG)

# the first thing to do on a new accelerator: a table of expected and measured values, in ten minutes
gpu-check: venv
	$(BIN)/python benchmarks/gpu_check.py

# odd settings, environments and damaged files; FUZZ_INPUTS is the number per category
FUZZ_INPUTS ?= 2000
fuzz: venv
	FUZZ_INPUTS=$(FUZZ_INPUTS) $(BIN)/python -m pytest -q tests/test_fuzz.py
