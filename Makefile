# `make demo` and `make test` each work alone in a fresh clone: they need Python, a C++ compiler
# and a package index, and keep everything they install in .venv.

PYTHON ?= $(or $(shell for p in python3.11 python3; do $$p -c '' 2>/dev/null && echo $$p && break; done),python3)
VENV := .venv
BIN := $(VENV)/bin
INSTALL = $(BIN)/python -m pip install -c constraints.txt
CSRC := $(wildcard csrc/*.cpp csrc/*.h)
SOURCES := pyproject.toml setup.py constraints.txt $(CSRC)

.NOTPARALLEL:
.PHONY: help demo test lint lint-python lint-types lint-cpp format clean

help:
	@echo "make demo    train a sparse autoencoder on the sample data and print its figures"
	@echo "make test    run the tests"
	@echo "make lint    check formatting, style and types"
	@echo "make format  apply the formatting"
	@echo "make clean   remove the environment, the builds and the caches; keep runs/"

demo: $(VENV)/installed
	$(BIN)/fastsae demo

test: $(VENV)/installed-test
	$(BIN)/python -m pytest

lint: lint-python lint-types lint-cpp

lint-python: $(VENV)/installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check

lint-types: $(VENV)/installed-dev
	$(BIN)/mypy fastsae

lint-cpp: $(VENV)/installed-dev
	$(BIN)/clang-format --dry-run -Werror $(CSRC)

format: $(VENV)/installed-dev
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(CSRC)

clean:
	rm -rf $(VENV) build dist *.egg-info fastsae/*.so
	rm -rf .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache

$(BIN)/python:
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

# Each install contains the ones before it, so it renews their stamps too.
$(VENV)/installed: $(SOURCES) | $(BIN)/python
	$(INSTALL) -e .
	touch $@

$(VENV)/installed-test: $(SOURCES) | $(BIN)/python
	$(INSTALL) -e '.[test]'
	touch $(VENV)/installed $@

$(VENV)/installed-dev: $(SOURCES) | $(BIN)/python
	$(INSTALL) -e '.[dev]'
	touch $(VENV)/installed $(VENV)/installed-test $@
