# Everything a newcomer or a machine does with this repository. `make` lists it.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
# Processes that run the tests; 0 runs them in pytest's own.
WORKERS ?= 2
PIP := $(BIN)/python -m pip --disable-pip-version-check install --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test torture mutants soak fuzz lint docs check clean

help: ## list these targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /make \1\t/' | expand -t 14

demo: $(VENV)/installed ## kill a training job in the middle of a save and see that nothing is lost (about 2 min)
	$(BIN)/python tools/demo/demo.py $(DEMO)

test: $(VENV)/installed ## run all tests
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup $(TESTS)

torture: $(VENV)/installed ## every fault at every place of a run, and one table (needs gcc; at most 30 min; TORTURE='--seed 2 --budget 600')
	$(BIN)/python tools/torture $(TORTURE)

mutants: $(VENV)/installed ## deliberate defects of the product, each of which must be caught (needs gcc; about 10 min)
	$(BIN)/python tools/torture --mutants $(MUTANTS)

soak: $(VENV)/installed ## thousands of saves with random faults, and whether anything grows (at most 30 min; SOAK='--ranks 4 --saves 1500')
	$(BIN)/python tools/soak $(SOAK)

fuzz: $(VENV)/installed-fuzz ## every parser of bytes from disk, fed by coverage (about 20 min; FUZZ='--seconds 300 --only index')
	$(BIN)/python tools/fuzz $(FUZZ)

lint: $(VENV)/installed-tools ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/installed-tools ## build the documentation into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

check: lint docs test ## all three

clean: ## remove everything that can be made again
	rm -rf $(VENV) build dist site runs/demo runs/demo-small *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage
	find ckptmgr migrations tests tools -name __pycache__ -prune -exec rm -rf {} +

# Installed again only when what is to be installed has changed. torch comes first and alone, so that
# nothing else can decide which one it is.
$(VENV)/installed: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing torch and what else is needed into $(VENV); the first time this takes some minutes"
	$(PIP) torch==2.13.0
	$(PIP) -qq --editable '.[test]'
	@touch $@

$(VENV)/installed-tools: $(VENV)/installed
	$(PIP) -qq --editable '.[test,lint,docs]'
	@touch $@

# Apart from all else: atheris has no wheel for every Python.
$(VENV)/installed-fuzz: $(VENV)/installed
	$(PIP) -qq --editable '.[test,fuzz]'
	@touch $@

$(BIN)/python:
	@'$(PYTHON)' -c 'import sys; sys.version_info >= (3, 11) or sys.exit(f"ckptmgr needs Python 3.11 or newer, and $(PYTHON) is {sys.version.split()[0]}: make PYTHON=…")'
	'$(PYTHON)' -m venv $(VENV)
