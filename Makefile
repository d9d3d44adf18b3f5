# Each target sets up what it needs; nothing else to install first.
VENV   ?= .venv
PYTHON ?= python3
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
RECIPE ?= smollm2-135m-spec

.PHONY: build test test-slow test-report lint types check clean
build: $(READY)          ## compile, validate and package one recipe: make build RECIPE=name
	$(BIN)/tandem build $(RECIPE)

test: $(READY)           ## fast tests
	$(BIN)/python -m pytest

test-slow: $(READY)      ## minutes of compiling, real weights, large checkpoints
	$(BIN)/python -m pytest -m slow

test-report: $(READY)    ## the parity page in a real Chromium
	$(BIN)/python -m pip install --quiet playwright
	command -v chromium >/dev/null || $(BIN)/playwright install --with-deps chromium
	$(BIN)/python -m pytest -m browser

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
