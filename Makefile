# Every target makes .venv when it is missing. PYTHON chooses the interpreter (3.11 or newer).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

export DS_ACCELERATOR ?= cpu

.DEFAULT_GOAL := help
.PHONY: help install quickstart test test-slow lint format docs bench

help:  ## show the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

install: $(READY)  ## make .venv with exactly the versions of constraints.txt

quickstart: $(READY)  ## reviews -> trained explainable recommender -> scores -> report, in minutes
	$(BIN)/gavamoe quickstart

test: $(READY)  ## the fast tests
	$(BIN)/pytest

test-slow: $(READY)  ## the tests that take minutes
	$(BIN)/pytest -m slow

lint: $(READY)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)  ## rewrite files the way lint wants them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(READY)  ## write docs/config.md from the docstrings of the settings
	$(BIN)/python -m gavamoe.config.reference > docs/config.md

bench: $(READY)  ## measure speed and size; prints, never fails
	$(BIN)/python -m benchmarks
