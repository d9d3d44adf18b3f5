# Each target sets up what it needs; nothing else to install first.
VENV   ?= .venv
PYTHON ?= python3
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
RECIPE ?= smollm2-135m-spec

# PyTorch/XLA ends at torch 2.9, so its tests have an environment of their own (7 GB).
XLA_VENV   ?= .venv-xla
XLA_PYTHON ?= $(PYTHON)
XLA_READY  := $(XLA_VENV)/.ready

# vLLM pins its own versions of much, so it has an environment of its own, too (2 GB).
VLLM_VENV   ?= .venv-vllm
VLLM_READY  := $(VLLM_VENV)/.ready

.PHONY: build test test-slow test-report test-servers test-xla test-vllm lint types check clean
build: $(READY)          ## compile, validate and package one recipe: make build RECIPE=name
	$(BIN)/tandem build $(RECIPE)

test: $(READY)           ## fast tests
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

test-slow: $(READY)      ## minutes of compiling, real weights, large checkpoints
	$(BIN)/python -m pytest -m slow

test-report: $(READY)    ## the parity page in a real Chromium
	$(BIN)/python -m pip install --quiet playwright
	command -v chromium >/dev/null || $(BIN)/playwright install --with-deps chromium
	$(BIN)/python -m pytest -m browser

test-servers: $(READY)   ## a real S3 server and a Hub over loopback, which the tests start themselves
	$(BIN)/python -m pip install --quiet --editable '.[servers]'
	$(BIN)/python -m pytest -m server

lint: $(READY)
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

test-xla: $(XLA_READY)   ## Neuron graphs as HLO on XLA's CPU; TANDEM_NXD_SOURCE=<neuronx-distributed 2.29>/src adds the real NxD
	$(XLA_VENV)/bin/python -m pytest -m xla tests/backends/neuron/test_xla.py

test-vllm: $(VLLM_READY) ## a real vLLM serves an artifact over loopback
	$(VLLM_VENV)/bin/python -m pytest -m vllm tests/serve/test_vllm.py

check: lint types test

$(XLA_READY): tests/requirements-xla.txt
	$(XLA_PYTHON) -m venv $(XLA_VENV)
	$(XLA_VENV)/bin/python -m pip install --quiet --requirement $<
	$(XLA_VENV)/bin/python -m pip download --quiet --no-deps --dest $(XLA_VENV)/wheels tensorflow-cpu==2.21.0
	$(XLA_VENV)/bin/python tests/support/xla_protos.py $(XLA_VENV)/wheels/tensorflow_cpu-*.whl
	rm -rf $(XLA_VENV)/wheels
	touch $@

$(VLLM_READY): pyproject.toml
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --quiet --editable '.[vllm]' pytest scipy
	$(VLLM_VENV)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec  # made for another torch
	touch $@

$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[inductor,dev]'
	touch $@

clean:
	rm -rf $(VENV) $(XLA_VENV) $(VLLM_VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache
