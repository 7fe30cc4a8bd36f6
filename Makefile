SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

VENV ?= .venv
HOST ?= 127.0.0.1
PORT ?= 8000
PYTEST_ARGS ?=
UV_VERSION := 0.13.8

BIN := $(VENV)/bin
export VENV TORCH PYTHON
# The packaged pyright runs on the packaged node: checking types fetches nothing.
export PYRIGHT_PYTHON_GLOBAL_NODE := 0
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1

.PHONY: help setup setup-dev serve test lint types format coverage lock

help: ## show this list
	@awk -F ":.*## " '/^[a-z-]+:.*## / { printf "  make %-11s%s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## make .venv and install what the server needs
	@scripts/install.sh

setup-dev: ## the same, with the tools of `make test`
	@scripts/install.sh --dev

serve: setup ## start the server (PORT=8000, HOST=127.0.0.1)
	@printf '%s\n' '' \
	  'Weft will answer on http://$(HOST):$(PORT) (Ctrl-C stops it). Try, in another terminal:' '' \
	  "  curl http://$(HOST):$(PORT)/v1/generate -H 'Content-Type: application/json' -H 'Accept: image/png' \\" \
	  "    -d '{\"prompt\": \"a red circle left of a blue square\", \"sampler\": \"unipc\", \"guidance\": \"apg\"}' -o picture.png" ''
	@exec $(BIN)/weft serve --host $(HOST) --port $(PORT)

test: setup-dev ## lint, check types and run the test suite
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --check --quiet .
	@$(BIN)/pyright
	@$(BIN)/pytest $(PYTEST_ARGS)

lint: setup-dev ## ruff and the format
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

types: setup-dev ## pyright
	@$(BIN)/pyright

format: setup-dev ## format, and repair what ruff can
	@$(BIN)/ruff check --fix --exit-zero --quiet .
	@$(BIN)/ruff format .

coverage: setup-dev ## the test suite with a table of the lines it misses
	@$(BIN)/pytest --cov $(PYTEST_ARGS)

lock: setup-dev ## resolve the dependencies anew (LOCK_ARGS=--upgrade for the newest)
	@uv=$$(mktemp -d); trap 'rm -rf "$$uv"' EXIT; \
	$(BIN)/python -m venv "$$uv"; "$$uv/bin/pip" install -qq uv==$(UV_VERSION); \
	PATH="$$uv/bin:$$PATH" $(BIN)/python scripts/lock.py $(LOCK_ARGS)
