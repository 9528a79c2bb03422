# Every target makes .venv when it is missing. PYTHON chooses the interpreter (3.11 or newer).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
HASHES := constraints.hashes.txt
WHEELS := dist/wheels

export DS_ACCELERATOR ?= cpu

.DEFAULT_GOAL := help
.PHONY: help install install-hashed wheels package hashes quickstart test test-slow lint format docs bench gpu-check

help:  ## show the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 16

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

install: $(READY)  ## make .venv with exactly the versions of constraints.txt

# What builds packages is checked like the rest: builds see the tools that .venv has, in place of ones that pip would
# fetch for them unchecked. setuptools is for packages that come as source, hatchling and what it needs for this one.
TOOLS := setuptools|hatchling|editables|packaging|pathspec|pluggy|tomlkit|trove-classifiers
define tools
	$(PYTHON) -m venv --clear $(VENV)
	awk '/^[^ #]/ { wanted = /^($(TOOLS))==/ } wanted' $(HASHES) > $(VENV)/tools.txt
	$(PIP) install --require-hashes --only-binary :all: --requirement $(VENV)/tools.txt
endef
PIP := $(BIN)/pip --quiet --disable-pip-version-check

install-hashed:  ## make .venv anew, from files whose SHA-256 constraints.hashes.txt has
	$(tools)
	$(PIP) install --require-hashes --no-build-isolation --requirement $(HASHES)
	$(PIP) install --no-index --no-deps --no-build-isolation --editable .
	@touch $(READY)

wheels:  ## the same as wheels in WHEELS, for images
	$(tools)
	$(PIP) wheel --require-hashes --no-build-isolation --wheel-dir $(WHEELS) --requirement $(HASHES)

package:  ## this package as a wheel beside them
	$(PIP) wheel --no-index --no-deps --no-build-isolation --wheel-dir $(WHEELS) .

hashes: $(READY)  ## write constraints.hashes.txt for constraints.txt, as the package index lists its files
	$(BIN)/uv pip compile --quiet --no-config --universal --python-version 3.11 --generate-hashes --no-annotate \
		--no-header --output-file $(VENV)/hashes.txt constraints.txt
	(echo "# Written by make hashes: the SHA-256 of every file of constraints.txt's versions, for all platforms."; \
		echo "# What has a marker comes with another package on some platforms only: torch's CUDA libraries on Linux."; \
		cat $(VENV)/hashes.txt) > $(HASHES)

quickstart: $(READY)  ## reviews -> trained explainable recommender -> scores -> report, in minutes
	$(BIN)/gavamoe quickstart

test: $(READY)  ## the fast tests, side by side on two cores
	$(BIN)/pytest --numprocesses 2

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

gpu-check: export DS_ACCELERATOR := cuda
gpu-check: $(READY)  ## what a GPU here does with all of this: right? fast? does it fit? (10 minutes)
	$(BIN)/python -m benchmarks.gpu

bench: $(READY)  ## measure speed and size; prints, never fails
	$(BIN)/python -m benchmarks
