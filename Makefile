SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help setup demo test unit chaos cables audit gradio lint format types imports up clean

help: ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  %-10s %s\n", $$1, $$2}'

setup: $(INSTALLED) ## make .venv and install everything, pinned by constraints.txt

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(f"rushes needs Python 3.11 or newer, {sys.executable} is {sys.version.split()[0]}: make PYTHON=python3.12 ..." if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt "torch==2.13.0"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[local,dev]"
	touch $@

demo: setup ## start everything on this machine, render examples/prompts.jsonl, say where the videos are, stop
	$(BIN)/rushes demo

test: setup lint ## lint, then every test that needs no GPU
	@# Three processes on two cores, as many tests wait for others; more threads in each would be in the way.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 3 --dist loadscope

unit: setup ## the quick tests only: no servers, no processes
	$(BIN)/python -m pytest tests/unit

chaos: setup ## an hour of kills and outages on simulated devices; CHAOS="--scale 0.1 --seed 7" for less
	$(BIN)/python -m tests.chaos $(CHAOS)

cables: setup ## two hosts in network namespaces, one cut off and back: a minute, on Linux
	RUSHES_TEST_CABLES=1 $(BIN)/python -m pytest tests/chaos/test_cables.py --log-cli-level=INFO

.venv-gradio/.installed: pyproject.toml constraints.txt
	test -x .venv-gradio/bin/python || $(PYTHON) -m venv .venv-gradio
	.venv-gradio/bin/python -m pip install --quiet --disable-pip-version-check --constraint <(grep -v '^pillow==' constraints.txt) --editable ".[gradio,local]" axe-playwright-python playwright pytest pytest-timeout
	touch $@

gradio: .venv-gradio/.installed ## the Gradio page in Chromium, with an older pillow in .venv-gradio: a minute
	OMP_NUM_THREADS=1 .venv-gradio/bin/python -m pytest tests/integration/test_gradio.py

audit: ## known weaknesses of the pinned packages; asks PyPI's advisory service
	test -x .venv-audit/bin/pip-audit || ($(PYTHON) -m venv .venv-audit && .venv-audit/bin/python -m pip install --quiet --disable-pip-version-check "pip-audit>=2.9")
	.venv-audit/bin/pip-audit --strict --no-deps --disable-pip --progress-spinner off --requirement constraints.txt

lint: setup ## format check, lint, types, import contracts
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup ## rewrite the code in the project's format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

up: setup ## Redis, S3, database, dispatcher and workers on this machine, until Ctrl-C
	$(BIN)/rushes up

clean: ## remove the virtual environment and local state (.rushes)
	rm -rf $(VENV) .venv-audit .venv-gradio .rushes
