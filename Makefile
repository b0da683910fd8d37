# `make demo` and `make test` set themselves up in .venv; all they need is Python 3.11 or newer.
# Set-up happens once, and again when pyproject.toml or constraints.txt changes.

PYTHON ?= python3
VENV := .venv
PIP := $(VENV)/bin/pip --disable-pip-version-check --quiet
TORCH := $(shell grep '^torch==' constraints.txt)

.PHONY: demo test lint types docs clean
.DEFAULT_GOAL := test

demo: $(VENV)/stamp-run
	$(VENV)/bin/dsp-auto demo

test: $(VENV)/stamp-test
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n auto --maxprocesses 4 --dist worksteal

lint: $(VENV)/stamp-test
	$(VENV)/bin/ruff check .

# On a copy with the packages where they install: below dsp_auto.
types: $(VENV)/stamp-types
	rm -rf build/types && mkdir -p build/types && cp -r dsp_auto build/types && cp -r passes cost_models examples build/types/dsp_auto
	cd build/types && ../../$(VENV)/bin/mypy --config-file ../../pyproject.toml -p dsp_auto

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis

$(VENV)/stamp-run: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("dsp_auto needs Python 3.11 or newer; \
	this is " + sys.version.split()[0] + ". Name another with: make PYTHON=...")'
	@echo "Setting up $(VENV) (once; PyTorch is a large download)"
	test -x $(VENV)/bin/pip || $(PYTHON) -m venv $(VENV)
	$(PIP) install $(TORCH) -c constraints.txt
	$(PIP) install -c constraints.txt -e .
	@touch $@

$(VENV)/stamp-test: $(VENV)/stamp-run
	$(PIP) install -c constraints.txt -e '.[test]'
	@touch $@

$(VENV)/stamp-types: $(VENV)/stamp-run
	$(PIP) install -c constraints.txt -e '.[types]'
	@touch $@

docs: $(VENV)/stamp-test
	$(VENV)/bin/python -m docs.make_ops
	$(VENV)/bin/python -m docs.make_api
	$(VENV)/bin/python -m docs.make_shown
