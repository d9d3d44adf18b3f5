# Each target sets up the environment that it needs. `make help` lists the targets.
.DEFAULT_GOAL := help

VENV   ?= .venv
PYTHON ?= python3
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
DEV_READY := $(VENV)/.ready-dev
RECIPE  ?= smollm2-135m-spec
MINUTES ?= 15
SEED    ?= 1

# Extras for $(VENV); what tests and checks need besides is installed by the first target that needs it. An environment with
# the Neuron SDK keeps the SDK's torch, which the extra `inductor` would replace.
SDK    := $(wildcard $(VENV)/lib/python3*/site-packages/torch_neuronx)
EXTRAS ?= $(if $(SDK),build-neuron,build)
DEV    := $(if $(SDK),,dev)
comma  := ,

# PyTorch/XLA ends at torch 2.9, so its tests have a separate environment (7 GB).
XLA_VENV   ?= .venv-xla
XLA_PYTHON ?= $(PYTHON)
XLA_READY  := $(XLA_VENV)/.ready

# vLLM pins the versions of many packages, so its tests have a separate environment (2 GB).
VLLM_VENV   ?= .venv-vllm
VLLM_READY  := $(VLLM_VENV)/.ready

# speculators and SpecForge pin other versions of torch and transformers, so they have a separate environment (1.5 GB).
DRAFTS_VENV  ?= .venv-drafts
DRAFTS_READY := $(DRAFTS_VENV)/.ready

# Neuron hosts have transformers 4.57, other machines 5: a separate environment (2 GB).
TRANSFORMERS_4_VENV  ?= .venv-transformers-4
TRANSFORMERS_4_READY := $(TRANSFORMERS_4_VENV)/.ready
TRANSFORMERS_4_TESTS := tests/models/test_config_of.py tests/models/test_families.py tests/models/test_fields.py \
	tests/models/test_random_configs.py tests/sources/test_forms.py tests/validate

# lm-eval, guidellm and LangChain, which call a server as their users do (1.5 GB).
CLIENTS_VENV  ?= .venv-clients
CLIENTS_READY := $(CLIENTS_VENV)/.ready

# The documentation needs no torch, so its environment is small.
DOCS_VENV   ?= .venv-docs
DOCS_READY  := $(DOCS_VENV)/.ready

# Debian packages of the tests of OCI registries.
OCI_TOOLS := docker-registry skopeo umoci

# Text that is read or written without `encoding=` is an error in pipeline/ (`filterwarnings` in pyproject.toml).
PYTEST := PYTHONWARNDEFAULTENCODING=1 $(BIN)/python -m pytest

# The fast tests run in up to four processes, one file in each, the longest first (tests/conftest.py). `test-quick` also
# omits the tests that compile graphs. -m replaces the expression of `addopts` in pyproject.toml, so QUICK repeats it.
PARALLEL := --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder
QUICK    := not compile and not slow and not server and not vllm and not cuda and not neuron and not xla and not hlo and not browser and not ray and not drafts and not chaos

.PHONY: help build test test-quick test-slow test-report test-servers test-ray test-chaos fuzz test-xla test-hlo test-vllm test-drafts test-transformers-4 test-soak mutants lint format types imports docs check clean
help:                    ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  %-20s%s\n", $$1, $$2 }' $(MAKEFILE_LIST)

build: $(READY)          ## compile, validate and package one recipe: make build RECIPE=name
	$(BIN)/tandem build '$(subst ','\'',$(value RECIPE))'

test: $(DEV_READY)       ## fast tests
	$(PYTEST) $(PARALLEL)

test-quick: $(DEV_READY) ## fast tests that compile no graph, for the inner loop
	$(PYTEST) $(PARALLEL) -m "$(QUICK)"

test-slow: $(DEV_READY)  ## minutes of compiling, real weights, large checkpoints
	$(PYTEST) -m slow

test-report: $(DEV_READY) ## the parity page in a real Chromium
	$(BIN)/python -m pip install --quiet playwright
	command -v chromium >/dev/null || $(BIN)/playwright install --with-deps chromium
	$(PYTEST) -m browser

test-servers: $(DEV_READY) ## tests with real S3 and OCI servers and a test server for the Hub, over loopback
	$(BIN)/python -m pip install --quiet --editable '.[servers]'
	command -v docker-registry skopeo umoci >/dev/null || apt-get install --yes --no-install-recommends $(OCI_TOOLS) \
	  || echo "tests of OCI registries are skipped without the Debian packages $(OCI_TOOLS)" >&2
	$(PYTEST) -m server

test-ray: $(DEV_READY)   ## a real Ray cluster of several nodes on this machine, with a real S3 server
	$(BIN)/python -m pip install --quiet --editable '.[ray,servers,stablehlo]'
	$(PYTEST) -m ray

test-soak: $(DEV_READY) $(VLLM_READY) ## mixed load on a served pair, disturbed: make test-soak MINUTES=60 SEED=1
	test -e artifacts/$(RECIPE)/manifest.json || $(BIN)/tandem build $(RECIPE)
	$(VLLM_VENV)/bin/python benchmarks/soak.py artifacts/$(RECIPE) --minutes $(MINUTES) --chaos $(SEED)

fuzz: $(DEV_READY)       ## parsers of outside input under atheris: make fuzz TARGET=recipe RUNS=32000 SECONDS=120; continues where it stopped
	$(BIN)/python -m pip install --quiet --editable '.[fuzz]'
	PYTHONPATH=.:tests $(BIN)/python -m fuzz.run $(if $(TARGET),--target '$(TARGET)') $(if $(RUNS),--runs '$(RUNS)') $(if $(SECONDS),--seconds '$(SECONDS)')

test-chaos: $(DEV_READY) ## commands disturbed at random steps: make test-chaos SEED=1 RUNS=60 SECONDS=600 ONLY=publish:kill; skips seeds that passed
	SEED='$(SEED)' RUNS='$(RUNS)' SECONDS='$(SECONDS)' ONLY='$(ONLY)' STEP='$(STEP)' $(PYTEST) -m chaos tests/chaos

mutants: $(DEV_READY)    ## small faults in the code of graphs, through all gates; prints those that pass
	$(BIN)/python benchmarks/mutants.py

lint: $(DEV_READY)       ## ruff: rules and format
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

format: $(DEV_READY)     ## ruff: apply fixes and format
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

types: $(DEV_READY)      ## mypy, strict
	$(BIN)/mypy

imports: $(DEV_READY)    ## import contracts between the rooms of pipeline/
	$(BIN)/lint-imports

docs: $(DOCS_READY)      ## the documentation site, in build/site; broken internal links and anchors are errors
	NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/mkdocs build --strict

test-xla: $(XLA_READY)   ## Neuron graphs as HLO on XLA's CPU; TANDEM_NXD_SOURCE=<neuronx-distributed 2.29>/src adds the real NxD
	$(XLA_VENV)/bin/python -m pytest -m xla tests/backends/neuron tests/nxdi

test-hlo: $(DEV_READY)   ## Neuron graphs through StableHLO, run on XLA's CPU client, several ranks for real
	$(BIN)/python -m pip install --quiet --editable '.[stablehlo]' 'jax>=0.10.2,<0.11'
	$(PYTEST) -m hlo tests/backends/neuron

test-vllm: $(VLLM_READY) $(CLIENTS_READY) ## a real vLLM serves an artifact over loopback, to clients of other projects
	TANDEM_CLIENTS_PYTHON=$(abspath $(CLIENTS_VENV))/bin/python $(VLLM_VENV)/bin/python -m pytest -m vllm tests/serve

test-drafts: $(DEV_READY) $(DRAFTS_READY) ## heads, DFlash and DSpark drafts that public tools write, against the logits of their modules
	TANDEM_DRAFTS_PYTHON=$(abspath $(DRAFTS_VENV))/bin/python $(PYTEST) -m drafts tests/drafts

test-transformers-4: $(TRANSFORMERS_4_READY) ## configs, logits and gates with transformers 4.57, which Neuron hosts have
	$(TRANSFORMERS_4_VENV)/bin/python -m pytest $(PARALLEL) -m "$(QUICK)" $(TRANSFORMERS_4_TESTS)

check: lint types imports test ## required checks of a change: lint, types, imports, fast tests

$(XLA_READY): tests/requirements-xla.txt
	$(XLA_PYTHON) -m venv $(XLA_VENV)
	@echo "installing packages into $(XLA_VENV): several minutes, about 7 GB of disk" >&2
	$(XLA_VENV)/bin/python -m pip install --quiet --requirement $<
	$(XLA_VENV)/bin/python -m pip download --quiet --no-deps --dest $(XLA_VENV)/wheels tensorflow-cpu==2.21.0
	$(XLA_VENV)/bin/python tests/support/xla_protos.py $(XLA_VENV)/wheels/tensorflow_cpu-*.whl
	rm -rf $(XLA_VENV)/wheels
	touch $@

$(VLLM_READY): pyproject.toml
	$(PYTHON) -m venv $(VLLM_VENV)
	@echo "installing packages into $(VLLM_VENV): a few minutes, about 2 GB of disk" >&2
	$(VLLM_VENV)/bin/python -m pip install --quiet --editable '.[vllm]' pytest pytest-timeout scipy
	$(VLLM_VENV)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec  # built for another torch
	touch $@

$(DRAFTS_READY): tests/requirements-drafts.txt
	$(PYTHON) -m venv $(DRAFTS_VENV)
	@echo "installing packages into $(DRAFTS_VENV): a few minutes, about 1.5 GB of disk" >&2
	$(DRAFTS_VENV)/bin/python -m pip install --quiet --requirement $<
	$(DRAFTS_VENV)/bin/python -m pip install --quiet --no-deps speculators==0.9.0 hs-connectors==0.9.0 specforge==0.2.0
	touch $@

$(TRANSFORMERS_4_READY): pyproject.toml
	$(PYTHON) -m venv $(TRANSFORMERS_4_VENV)
	@echo "installing packages into $(TRANSFORMERS_4_VENV): a few minutes, about 2 GB of disk" >&2
	$(TRANSFORMERS_4_VENV)/bin/python -m pip install --quiet --editable '.[inductor,dev]' 'transformers>=4.57,<4.58'
	touch $@

$(CLIENTS_READY): tests/requirements-clients.txt
	$(PYTHON) -m venv $(CLIENTS_VENV)
	@echo "installing packages into $(CLIENTS_VENV): a few minutes, about 1.5 GB of disk" >&2
	$(CLIENTS_VENV)/bin/python -m pip install --quiet --requirement $<
	touch $@

$(DOCS_READY): pyproject.toml
	$(PYTHON) -m venv $(DOCS_VENV)
	@echo "installing packages into $(DOCS_VENV): a minute" >&2
	$(DOCS_VENV)/bin/python -m pip install --quiet --editable '.[docs]'
	touch $@

install = $(BIN)/python -m pip install --quiet --editable '.[$(subst $() $(),$(comma),$(strip $(1)))]'

$(READY): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing packages into $(VENV): a minute or two, about 1.3 GB of disk" >&2
	$(call install,$(EXTRAS))
	touch $@

$(DEV_READY): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing packages into $(VENV): a few minutes, about 2 GB of disk" >&2
	$(call install,$(EXTRAS) $(DEV))
	touch $(READY) $@

clean:                   ## remove environments, caches of tools and built files, but not artifacts/
	rm -rf $(VENV) $(XLA_VENV) $(VLLM_VENV) $(DOCS_VENV) $(DRAFTS_VENV) $(CLIENTS_VENV) $(TRANSFORMERS_4_VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
