# `make help` lists the targets. ARGS="..." adds arguments to a command: make train ARGS="method.rank=4 steps=50"
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
OUT ?= runs
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help setup train test test-all faults ui pictures bench mini format lint hooks

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is required, but this is Python " + sys.version.split()[0] + ". Type make PYTHON=python3.12 ...") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@
	@echo 'Installed in .venv. Type once per terminal: . .venv/bin/activate'

setup: $(READY)  ## create .venv and install the pinned dependencies

train: $(READY)  ## run the default training, a LoRA on the model that ships with the program (ARGS="method.rank=4 steps=50")
	$(BIN)/python -m trainer $(ARGS)

test: $(READY)  ## run the tests, without the slow ones (ARGS="tests/test_config.py")
	$(BIN)/python -m pytest -n 2 $(ARGS)

test-all: $(READY)  ## run all tests, including the slow ones
	$(BIN)/python -m pytest -n 2 -m '' $(ARGS)

faults: $(READY)  ## kill, starve and corrupt some 400 runs (about half an hour) and print how many survived
	$(BIN)/python tests/test_faults.py

ui: $(READY)  ## serve the MLflow UI for the runs in OUT (default: runs; ARGS="--port 5001")
	$(BIN)/python -m trainer ui --out $(OUT) $(ARGS)

pictures: $(READY)  ## regenerate the images and curves of the README (about nine minutes on one core)
	$(BIN)/python -m bench.pictures

bench: $(READY)  ## measure performance and update docs/BENCHMARKS.md (about a quarter of an hour on two idle cores)
	$(BIN)/python -m bench.speed

mini: $(READY)  ## train the model that ships with the program from scratch (a few hours on two cores)
	$(BIN)/python -m trainer.model.mini_kontext build/mini_kontext
	$(BIN)/python -m trainer experiment=mini_base model.path=build/mini_kontext 'export.formats=[pipeline]' export.dtype=bfloat16 out=build/base tracking=none
	$(BIN)/python -m trainer 'experiment=[mini_base,mini_more]' model.path=$$(echo build/base/*/export/pipeline) 'export.formats=[pipeline]' export.dtype=bfloat16 out=build/more tracking=none
	@echo "the new trainer/model/mini_kontext/weights:" build/more/*/export/pipeline

format: $(READY)  ## format the code and fix what ruff can fix
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lint: $(READY)  ## check formatting, lint rules and types, as CI does
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

hooks: $(READY)  ## install the git hooks of .pre-commit-config.yaml
	$(BIN)/pre-commit install
