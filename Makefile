# The verbs of the project; `make help` lists them.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
OUT ?= runs

.DEFAULT_GOAL := help
.PHONY: help setup train test test-all faults ui pictures bench mini format lint clean

help:  ## list the verbs
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0] + ": type make PYTHON=python3.12 ...") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

setup: $(READY)  ## make .venv with the pinned dependencies

train: $(READY)  ## run the main job: a LoRA on the model that comes with the program
	$(BIN)/python -m trainer

test: $(READY)  ## the everyday tests
	$(BIN)/python -m pytest -n 2

test-all: $(READY)  ## every test, the slow ones too
	$(BIN)/python -m pytest -n 2 -m ''

faults: $(READY)  ## let the program die in every way it must survive, some 400 times, in about half an hour; prints how many it did
	$(BIN)/python tests/test_faults.py

ui: $(READY)  ## open the MLflow pages of the runs in OUT (default: runs)
	$(BIN)/python -m trainer.tracking.ui --out $(OUT)

pictures: $(READY)  ## draw the pictures and curves of the README, in about nine minutes of one core
	$(BIN)/python -m bench.pictures

bench: $(READY)  ## measure how fast the program is and write it into the README, in about a quarter of an hour on two idle cores
	$(BIN)/python -m bench.speed

mini: $(READY)  ## make the model that comes with the program anew, in a few hours on two cores
	$(BIN)/python -m trainer.model.mini_kontext build/mini_kontext
	$(BIN)/python -m trainer experiment=mini_base model.path=build/mini_kontext 'export.formats=[pipeline]' export.dtype=bfloat16 out=build/base tracking=none
	$(BIN)/python -m trainer 'experiment=[mini_base,mini_more]' model.path=$$(echo build/base/*/export/pipeline) 'export.formats=[pipeline]' export.dtype=bfloat16 out=build/more tracking=none
	@echo "the new trainer/model/mini_kontext/weights:" build/more/*/export/pipeline

format: $(READY)  ## format the code and mend what ruff can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lint: $(READY)  ## what CI asks of the form
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
