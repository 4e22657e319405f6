# Every target sets up what it needs: a virtual environment in .venv, with pinned packages.
#   make test ARGS="-k launch"   make test DEPTH=10   make setup PYTHON=python3.12

PYTHON ?= python3
VENV   ?= .venv
ARGS   ?=
DEPTH  ?= 1
# Test files are run side by side by so many processes; one after the other where GPUs are shared.
WORKERS ?= $(if $(wildcard /dev/nvidia0),0,2)

BIN   := $(VENV)/bin
STAMP := $(VENV)/.installed

KERNELS = $(shell find src tests -name "*.cu" -o -name "*.cuh" -o -name "emulator.h")

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint format docs bench clean

help: ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 10

setup: $(STAMP) ## install into .venv; done again only when the requirements change

# pip is replaced first: an old one cannot install a project without setup.py in place.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade --constraint constraints.txt pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: $(STAMP) ## show what the library does, on this machine
	$(BIN)/expertlink demo $(ARGS)

test: $(STAMP) ## run the tests; GPU ones skip themselves elsewhere; DEPTH=10: ten times the drawn cases
	EXPERTLINK_TEST_DEPTH=$(DEPTH) $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

lint: $(STAMP) ## ruff, clang-format and pyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(KERNELS)
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(STAMP) ## let ruff and clang-format rewrite the sources
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(STAMP) ## write docs/reference, docs/results and build/api from sources and records
	$(BIN)/python docs/generate.py
	$(BIN)/python docs/api.py
	$(BIN)/expertlink report

bench: $(STAMP) ## measure dispatch and combine
	$(BIN)/expertlink bench $(ARGS)

clean: ## remove the environment and everything generated
	rm -rf $(VENV) build dist out src/*.egg-info .hypothesis .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
