# Everything a newcomer or a machine does with this repository. `make` lists it.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
# Where ckptmgr and what it is compared with are installed together, for `make bench` alone.
BENCH := .venv-bench
# Processes that run the tests, more than two cores have to do, since many wait; 0 runs them in pytest's own.
WORKERS ?= 3
PIP_TO := python -m pip --disable-pip-version-check install --constraint constraints.txt
PIP := $(BIN)/$(PIP_TO)

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow torture mutants soak fuzz bench bench-quick lint docs check clean

help: ## list these targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /make \1\t/' | expand -t 14

demo: $(VENV)/installed ## kill a training job in the middle of a save and see that nothing is lost (about 2 min)
	$(BIN)/python tools/demo/demo.py $(DEMO)

test: $(VENV)/installed ## run the tests (about 14 min on two cores)
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup -m 'not slow' $(TESTS)

test-slow: $(VENV)/installed ## those that take long: demo, torture and soak in small, examples of the docs (about 5 min)
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup -m slow

torture: $(VENV)/installed ## every fault at every place of a run, and one table (needs gcc; at most 30 min; TORTURE='--seed 2 --budget 600')
	$(BIN)/python tools/torture $(TORTURE)

mutants: $(VENV)/installed ## deliberate defects of the product, each of which must be caught (needs gcc; about 10 min)
	$(BIN)/python tools/torture --mutants $(MUTANTS)

soak: $(VENV)/installed ## thousands of saves with random faults, and whether anything grows (at most 30 min; SOAK='--ranks 4 --saves 1500')
	$(BIN)/python tools/soak $(SOAK)

fuzz: $(VENV)/installed-fuzz ## every parser of bytes from disk, fed by coverage (about 20 min; FUZZ='--seconds 300 --only index')
	$(BIN)/python tools/fuzz $(FUZZ)

bench: $(BENCH)/installed ## how fast ckptmgr and its peers save and load, side by side (about 1 h; BENCH_OPTIONS='--scale 2 --docs')
	$(BENCH)/bin/python tools/bench $(BENCH_OPTIONS)

bench-quick: $(BENCH)/installed ## the main questions with small states (under 3 min on an idle machine)
	$(BENCH)/bin/python tools/bench --quick $(BENCH_OPTIONS)

lint: $(VENV)/installed-tools ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/installed-tools ## build the documentation into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

check: lint docs test ## all three

clean: ## remove everything that can be made again
	rm -rf $(VENV) $(BENCH) build dist site runs/demo runs/demo-small *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage
	find ckptmgr migrations tests tools -name __pycache__ -prune -exec rm -rf {} +

# Installed again only when what is to be installed has changed. torch comes first and alone, so that
# nothing else can decide which one it is.
$(VENV)/installed: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing torch and what else is needed into $(VENV); the first time this takes some minutes"
	$(PIP) torch==2.13.0
	$(PIP) -qq --editable '.[test]'
	@$(BIN)/python -m compileall -q ckptmgr  # as pip does for what it copies; an environment may forbid it later
	@touch $@

$(VENV)/installed-tools: $(VENV)/installed
	$(PIP) -qq --editable '.[test,lint,docs]'
	@touch $@

# Apart from all else: atheris has no wheel for every Python.
$(VENV)/installed-fuzz: $(VENV)/installed
	$(PIP) -qq --editable '.[test,fuzz]'
	@touch $@

# A peer that cannot be installed keeps nobody from measuring the others: its row says so.
$(BENCH)/installed: pyproject.toml constraints.txt tools/bench/requirements.txt | $(BIN)/python
	$(BIN)/python -m venv $(BENCH)
	$(BENCH)/bin/$(PIP_TO) torch==2.13.0
	$(BENCH)/bin/$(PIP_TO) -qq --editable .
	grep -v '^#' tools/bench/requirements.txt | while read -r peer; do \
		$(BENCH)/bin/$(PIP_TO) -qq "$$peer" || echo "without $$peer" >&2; done
	@touch $@

$(BIN)/python:
	@'$(PYTHON)' -c 'import sys; sys.version_info >= (3, 11) or sys.exit(f"ckptmgr needs Python 3.11 or newer, and $(PYTHON) is {sys.version.split()[0]}: make PYTHON=…")'
	'$(PYTHON)' -m venv $(VENV)
