SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

VENV ?= .venv
HOST ?= 127.0.0.1
PORT ?= 8000
PYTEST_ARGS ?=
MINUTES ?= 10
FOLDER ?= docs/gpu
CONTRACT_EXAMPLES ?= 300
# Processes of `make test`. They share what is imported; each holds models of its own.
WORKERS ?= 2

BIN := $(VENV)/bin
export VENV TORCH PYTHON
# The packaged pyright runs on the packaged node: checking types fetches nothing.
export PYRIGHT_PYTHON_GLOBAL_NODE := 0
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1
# What is installed is compiled when it is first imported, which takes ten seconds and is to be kept.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help setup setup-dev serve test gpu test-all lint types format contract promises soak coverage lock

help: ## list these commands
	@awk -F ":.*## " '/^[a-z-]+:.*## / { printf "  make %-11s%s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## create .venv and install what the server needs
	@scripts/install.sh

setup-dev: ## the same, and the tools that `make test` needs
	@scripts/install.sh --dev

serve: setup ## start the server on the models that ship with it (HOST=127.0.0.1, PORT=8000)
	@printf '%s\n' '' \
	  'Weft is starting on http://$(HOST):$(PORT)/ (Ctrl-C stops it). Open that page in a browser,' \
	  'or, once the log says "ready", send a request from another terminal:' '' \
	  "  curl http://$(HOST):$(PORT)/v1/generate -H 'content-type: application/json' -H 'accept: image/png' -o picture.png \\" \
	  "    -d '{\"prompt\": \"a red circle to the left of a blue square\", \"guidance\": {\"name\": \"apg\", \"scale\": 4, \"policy\": \"reuse\"}}'" ''
	@exec $(BIN)/weft serve --host $(HOST) --port $(PORT)

test: setup-dev ## lint, type-check and run the test suite
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --check --quiet .
	@types=$$(mktemp); $(BIN)/pyright >"$$types" 2>&1 & checking=$$!; \
	trap 'kill $$checking 2>/dev/null || true; rm -f "$$types"' EXIT; \
	tested=0; $(BIN)/pytest --processes $(WORKERS) $(PYTEST_ARGS) || tested=$$?; \
	typed=0; wait $$checking || typed=$$?; cat "$$types"; \
	exit $$((tested ? tested : typed))

test-all: export EVERY_CELL := 1
test-all: test ## the same, with every combination of the tests' parameters

lint: setup-dev ## run ruff and check the formatting
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

types: setup-dev ## run pyright
	@$(BIN)/pyright

format: setup-dev ## format the code and apply the fixes that ruff offers
	@$(BIN)/ruff check --fix --exit-zero --quiet .
	@$(BIN)/ruff format .

gpu: setup-dev ## on a machine with a GPU: its tests and benchmarks, into FOLDER=docs/gpu; again to go on (25 minutes)
	@$(BIN)/python -m benchmarks.gpu --folder $(FOLDER)

contract: setup-dev ## call every route with CONTRACT_EXAMPLES=300 cases of each kind drawn from its schema (minutes)
	@CONTRACT_EXAMPLES=$(CONTRACT_EXAMPLES) $(BIN)/pytest -q -s tests/server/http/test_contract.py

promises: setup-dev ## attack a running server, weaken it, attack it again, and write docs/promises.md (12 minutes)
	@$(BIN)/python -m benchmarks.promises

soak: setup-dev ## let clients stall, vanish and flood a server for MINUTES=10, and see what they leave behind
	@$(BIN)/python -m benchmarks.soak --minutes $(MINUTES)

coverage: setup-dev ## run the test suite and list the lines it does not cover
	@$(BIN)/pytest --cov $(PYTEST_ARGS)

lock: setup-dev ## resolve the dependencies again (LOCK_ARGS=--upgrade for the newest versions)
	@uv=$$(mktemp -d); trap 'rm -rf "$$uv"' EXIT; \
	$(BIN)/python -m venv "$$uv"; "$$uv/bin/pip" install -qq --require-hashes -r requirements/uv.lock; \
	PATH="$$uv/bin:$$PATH" $(BIN)/python scripts/lock.py $(LOCK_ARGS)
