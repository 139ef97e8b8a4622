# Every target does its own set-up in .venv: from a fresh clone, `make demo` is enough.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt

.PHONY: demo r1 chat test lint bench

demo: $(VENV)/.demo
	$(BIN)/python -m experiments.demo --resume $(ARGS)

r1: $(VENV)/.demo
	$(BIN)/python -m experiments.r1 --resume $(ARGS)

chat: $(VENV)/.chat
	$(BIN)/python -m experiments.chat $(ARGS)

test: $(VENV)/.test
	$(BIN)/python -m pytest -q -n 2 tests

bench: $(VENV)/.demo
	$(BIN)/python -m experiments.benchmarks.bench_kernels $(ARGS)

lint: $(VENV)/.lint
	$(BIN)/ruff check --line-length 120 --target-version py310 --select E,F,W,I --ignore E731,E741 .

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# A stamp is touched after an install that succeeded; a change of what is installed makes it stale.
$(VENV)/.demo: setup.py constraints.txt | $(BIN)/python
	$(PIP) -e .
	touch $@

$(VENV)/.chat: setup.py constraints.txt | $(BIN)/python
	$(PIP) -e '.[chat]'
	touch $(VENV)/.demo $@

$(VENV)/.test: setup.py constraints.txt | $(BIN)/python
	$(PIP) -e '.[test]'
	touch $(VENV)/.demo $(VENV)/.chat $@

$(VENV)/.lint: constraints.txt | $(BIN)/python
	$(PIP) ruff
	touch $@
