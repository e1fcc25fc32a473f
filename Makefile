# Needs git, make and a Python of 3.11 or newer. Everything else is installed into .venv, as uv.lock states it.
SHELL := /bin/sh
.DEFAULT_GOAL := help
.PHONY: help demo test lint types format check-wheel clean

VENV := .venv
BIN := $(VENV)/bin
UV_VERSION := 0.13.9
# Certificates of the system, as pip uses them: a company's proxy is then trusted by both.
UV := UV_SYSTEM_CERTS=1 UV_PYTHON_DOWNLOADS=never UV_PROJECT_ENVIRONMENT=$(VENV) UV_NO_PROGRESS=1 $(BIN)/uv
FIND_PYTHON = for p in $(PYTHON) python3.11 python3.12 python3.13 python3.14 python3 python; do \
	"$$p" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && { echo "$$p"; break; }; done

help:
	@echo "make demo    two network taps, joined and judged on this machine"
	@echo "make test    lint, types, layers, tests, and the wheel in a clean environment"
	@echo "make lint    ruff, mypy, import-linter"
	@echo "make format  let ruff rewrite what it can"
	@echo "make clean   remove what was built, .venv included"

$(BIN)/uv:
	@python=$$($(FIND_PYTHON)); \
	if [ -z "$$python" ]; then echo "no Python >= 3.11 with venv found; name one: make PYTHON=/path/to/python" >&2; exit 1; fi; \
	test -x $(BIN)/python || "$$python" -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)

# --inexact: uv itself stays, and `make demo` after `make test` takes nothing away.
$(VENV)/.user: pyproject.toml uv.lock | $(BIN)/uv
	@echo "installing into $(VENV), which may take some minutes the first time" >&2
	@$(UV) sync --quiet --frozen --inexact --no-dev --extra pcap
	@touch $@

$(VENV)/.dev: pyproject.toml uv.lock | $(BIN)/uv
	@echo "installing into $(VENV), with what tests need, which may take some minutes the first time" >&2
	@$(UV) sync --quiet --frozen --inexact --all-extras
	@touch $@ $(VENV)/.user

demo: $(VENV)/.user
	@$(BIN)/edgeserve demo

lint: $(VENV)/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.dev
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

# Much of it is waiting, for brokers that start and for deaths to be noticed. Each worker has brokers of its own.
test: lint
	$(BIN)/pytest -n 3 --dist loadfile
	@$(MAKE) --no-print-directory check-wheel

check-wheel: $(VENV)/.dev
	@$(UV) lock --check --quiet
	@UV="$(CURDIR)/$(BIN)/uv" UV_SYSTEM_CERTS=1 UV_PYTHON_DOWNLOADS=never UV_NO_PROGRESS=1 .ci/check-wheel $(CURDIR)/$(BIN)/python

clean:
	rm -rf $(VENV) dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
