# make demo   train a small reasoning model here, from raw text, in minutes on a CPU
# make test   the fast tests         make test-long   the long ones too
# make test-ui   the web chat in a Chromium that is installed (Debian: apt-get install chromium)
# make check  lint and types         make docs        regenerate docs/paper.md
# make bench  every benchmark that this machine can run
#
# PYTHON=python3.12      another interpreter (3.11 or newer)
# VENV=path              another virtual environment
# TORCH_INDEX=URL        where torch comes from, e.g. https://download.pytorch.org/whl/cpu for the small CPU build
# ARGS="--recipe small"  more flags for `benthic demo`

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
TORCH := $(shell sed -n 's/^ *"\(torch[<>=][^"]*\)",$$/\1/p' pyproject.toml)
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check
PACKAGE := $(shell find benthic -name '*.py')

.PHONY: demo test test-long test-ui check docs bench

demo: $(VENV)/.server
	$(VENV)/bin/benthic demo $(ARGS)

test: $(VENV)/.dev
	$(VENV)/bin/python -m pytest

test-long: $(VENV)/.dev
	$(VENV)/bin/python -m pytest -m ""

test-ui: $(VENV)/.ui
	$(VENV)/bin/python -m pytest -m ui tests/ui

check: $(VENV)/.dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python

docs: docs/paper.md

docs/paper.md: docs/make_paper.py $(PACKAGE)
	$(PYTHON) docs/make_paper.py

bench: $(VENV)/.server
	@for file in benchmarks/*.py; do echo "== $$file"; $(VENV)/bin/python $$file || exit 1; done

$(VENV)/.torch:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "make: error: Benthic needs Python 3.11 or newer, '$(PYTHON)' is $$($(PYTHON) --version 2>&1 | head -n 1)" \
	       "-> make demo PYTHON=/path/to/python3.11" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) install $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$(TORCH)"
	@touch $@

# An editable install: a change of the source needs no new install, a change of pyproject.toml does.
$(VENV)/.server: pyproject.toml | $(VENV)/.torch
	$(PIP) install --quiet -e ".[server]"
	@touch $@

$(VENV)/.dev: pyproject.toml | $(VENV)/.torch
	$(PIP) install --quiet -e ".[dev]"
	@touch $@ $(VENV)/.server

$(VENV)/.ui: pyproject.toml | $(VENV)/.dev
	$(PIP) install --quiet -e ".[ui]"
	@touch $@
