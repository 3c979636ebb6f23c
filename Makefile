# make quickstart and make test are all that a newcomer needs. `make help` lists the rest.
# PYTHON chooses the interpreter of a new .venv (3.11 or newer): make setup PYTHON=python3.12

PYTHON ?= python3
VENV ?= .venv
CONFIG ?= configs/quickstart.py
WORKDIR ?= runs/quickstart
# Of bench: where the peers are installed (Tunix's JAX is not ours), and flags such as ARGS=--smallest or
# ARGS=--data=student_phd.json.
PEERS ?= .venv-peers
TUNIX ?= .venv-tunix
ARGS ?=
# Of test: the number of processes.
JOBS ?= auto
SMOLLM2 := checkpoints/SmolLM2-135M-Instruct

BIN := $(VENV)/bin
# A file's tests stay in one process, which sets up what they share once.
PYTEST := $(BIN)/python -m pytest --numprocesses=$(JOBS) --maxprocesses=8 --dist=loadfile
REQUIREMENTS := setup.py $(wildcard constraints/*.txt)
# The exact versions for this interpreter, where we have them; setup.py's ranges otherwise.
CONSTRAINT = file=constraints/py$$($(BIN)/python -c 'import sys; print("%d%d" % sys.version_info[:2])').txt; \
	if [ -f $$file ]; then echo "-c $$file"; fi

.DEFAULT_GOAL := help
.PHONY: help setup quickstart test nightly attack smollm2 bench docs lint format types clean

help:  ## Lists these commands.
	@grep -E '^[a-z0-9]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $(PYTHON) is missing or older than 3.11; name another: make setup PYTHON=python3.12" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

# A stamp per set of extras: a second `make` installs nothing.
$(VENV)/.setup: $(REQUIREMENTS) | $(BIN)/python
	$(BIN)/python -m pip install --quiet -e . $$($(CONSTRAINT))
	@touch $@

$(VENV)/.setup-test: $(REQUIREMENTS) | $(BIN)/python
	$(BIN)/python -m pip install --quiet -e '.[test]' $$($(CONSTRAINT))
	@touch $@ $(VENV)/.setup

$(VENV)/.setup-torch: $(REQUIREMENTS) | $(BIN)/python
	$(BIN)/python -m pip install --quiet -e '.[test,torch]' $$($(CONSTRAINT))
	@touch $@ $(VENV)/.setup $(VENV)/.setup-test

setup: $(VENV)/.setup  ## Creates .venv and installs popi_jax.

quickstart: $(VENV)/.setup  ## Trains, evaluates and compares every method on stylebook; prints the table.
	$(BIN)/python experiments/results_table.py --config=$(CONFIG) --workdir=$(WORKDIR)

test: lint types  ## Runs everything that CI runs.
	$(PYTEST) $(TESTS)

# With torch for the live parity, and the peers, whose losses and tokens the benchmarks' sides must equal.
nightly: $(VENV)/.setup-torch $(SMOLLM2)/config.json $(PEERS)/.setup $(TUNIX)/.setup attack  ## Runs every test, with the compiler's optimizations.
	JAX_DISABLE_MOST_OPTIMIZATIONS=false $(PYTEST) -m 'not attack' $(TESTS)

attack: $(VENV)/.setup-test  ## Kills runs, damages their files, fills disks and fuzzes every input: hours.
	$(BIN)/python -m pytest -m attack tests/attack
	HYPOTHESIS_PROFILE=nightly $(BIN)/python -m pytest tests/test_fuzz.py tests/test_fuzz_builders.py

lint: $(VENV)/.setup-test  ## Checks style and formatting.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.setup-test  ## Checks types.
	$(BIN)/mypy

docs: $(VENV)/.setup-test  ## Builds the documentation into site/; a warning is an error.
	$(BIN)/python docs/generate.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

format: $(VENV)/.setup-test  ## Formats the code in place.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

smollm2: $(VENV)/.setup  ## Fetches SmolLM2-135M-Instruct and leaves it as a hub folder in checkpoints/.
	$(BIN)/python -m popi_jax.model.gguf --output=$(SMOLLM2)

$(SMOLLM2)/config.json:
	$(MAKE) smollm2

$(PEERS)/.setup: benchmarks/peers.txt
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet -r benchmarks/peers.txt
	@touch $@

$(TUNIX)/.setup: benchmarks/tunix.txt
	$(PYTHON) -m venv $(TUNIX)
	$(TUNIX)/bin/python -m pip install --quiet -r benchmarks/tunix.txt
	@touch $@

bench: $(VENV)/.setup $(PEERS)/.setup $(TUNIX)/.setup $(SMOLLM2)/config.json  ## Measures popi_jax beside TRL, transformers and Tunix (ARGS=--smallest to try it out).
	$(BIN)/python -m benchmarks.run --peers=$(PEERS) --tunix=$(TUNIX) $(ARGS)

clean:  ## Removes .venv, the peers' too, and what the tools leave behind; runs/ and checkpoints/ stay.
	rm -rf $(VENV) $(PEERS) $(TUNIX) build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
