# Every target makes .venv when it is missing. PYTHON chooses the interpreter (3.11 or newer).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
HASHES := constraints.hashes.txt

export DS_ACCELERATOR ?= cpu

.DEFAULT_GOAL := help
.PHONY: help install install-hashed hashes quickstart test test-slow lint format docs bench

help:  ## show the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 16

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

install: $(READY)  ## make .venv with exactly the versions of constraints.txt

# What builds the packages that come as source (setuptools) and this one (hatchling) is checked like the rest: builds see
# the packages of .venv, in place of ones that pip would fetch for them unchecked.
install-hashed:  ## make .venv anew, from files whose SHA-256 constraints.hashes.txt has
	$(PYTHON) -m venv --clear $(VENV)
	awk '/^[^ #]/ { wanted = /^setuptools==/ } wanted' $(HASHES) > $(VENV)/build.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes --requirement $(VENV)/build.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes --no-build-isolation --requirement $(HASHES)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-index --no-deps --no-build-isolation --editable .
	@touch $(READY)

hashes: $(READY)  ## write constraints.hashes.txt for constraints.txt, as the package index lists its files
	$(BIN)/uv pip compile --quiet --no-config --universal --python-version 3.11 --generate-hashes --no-annotate \
		--no-header --output-file $(VENV)/hashes.txt constraints.txt
	(echo "# Written by make hashes: the SHA-256 of every file of constraints.txt's versions, for all platforms."; \
		echo "# What has a marker comes with another package on some platforms only: torch's CUDA libraries on Linux."; \
		cat $(VENV)/hashes.txt) > $(HASHES)

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
