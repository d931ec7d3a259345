# Short names for everyday work. Every target sets up .venv by itself; `make` alone lists the targets.

BIN := .venv/bin
MODEL ?=
ARGS ?=
PYTHON ?=

.DEFAULT_GOAL := help
.PHONY: help setup chat test lint fix conformance oracle models bench aot wheel pin

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: .venv/ready ## make .venv with everything that chat and test use
	@:

.venv/ready: pyproject.toml constraints.txt
	@python=; \
	for candidate in $(if $(PYTHON),"$(PYTHON)",python3.13 python3.12 python3.11 python3 python); do \
	  if "$$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	    python=$$candidate; break; \
	  fi; \
	done; \
	if [ -z "$$python" ]; then \
	  echo "localmoe needs Python 3.11 or newer with venv: install it (Debian, Ubuntu: apt install python3-venv)," >&2; \
	  echo "or name one: make setup PYTHON=/path/to/python3.12" >&2; exit 1; \
	fi; \
	echo "Setting up .venv with $$("$$python" --version) (once; a minute or two)"; \
	$(BIN)/python -c '' 2>/dev/null || "$$python" -m venv --clear .venv
	@$(BIN)/python -m pip install -q --disable-pip-version-check --require-hashes -r constraints.txt
	@$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@
	@echo "Ready: make chat, make test"

chat: setup ## talk to the bundled model, or to MODEL=path; further flags in ARGS
	@$(BIN)/localmoe chat $(if $(MODEL),"$(MODEL)") $(ARGS)

test: setup ## the tests, without the long ones; ARGS="-n 0" runs them one by one
	@$(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist loadfile $(ARGS)

lint: setup ## ruff, mypy, docs/cli.md and docs/models.md up to date
	@$(BIN)/ruff check -q
	@$(BIN)/ruff format -q --check
	@$(BIN)/mypy
	@$(BIN)/python docs/make_cli.py --check
	@$(BIN)/python docs/make_models.py --check

fix: setup ## what ruff can mend by itself
	@$(BIN)/ruff check -q --fix
	@$(BIN)/ruff format

conformance: setup ## the long runs over the golden data (LOCALMOE_CONFORMANCE=folder)
	@$(BIN)/python -m pytest -q -m conformance $(ARGS)

.venv/oracle: .venv/ready
	@$(BIN)/python -m pip install -q --disable-pip-version-check torch==2.13.0
	@$(BIN)/python -m pip install -q --disable-pip-version-check transformers==5.23.0
	@touch $@

oracle: setup .venv/oracle ## fresh random models against transformers; installs torch
	@$(BIN)/python -m pytest -q -m oracle $(ARGS)

# LOCALMOE_LLAMA_PERPLEXITY=path/to/llama-perplexity adds llama.cpp as a witness; without it, its last record stays.
models: setup .venv/oracle ## docs/models.md anew, from what make oracle and the golden logits find
	@LOCALMOE_RECORD=docs/models.json $(BIN)/python -m pytest -q -m oracle
	@LOCALMOE_RECORD=docs/models.json $(BIN)/python -m pytest -q tests/test_logits.py
	@$(BIN)/python docs/make_models.py

bench: test ## speed of MODEL=path (the bundled model without it), behind green tests
	@$(BIN)/localmoe bench "$(or $(MODEL),models/localmoe-demo.gguf)" $(ARGS)

aot: setup ## kernels as machine code for every target, so that no start compiles (minutes)
	@$(BIN)/python -m localmoe.kernels.cpu.ahead $(ARGS)

wheel: aot ## a wheel in dist/ with these kernels in it
	@$(BIN)/python -m pip wheel -q --disable-pip-version-check --no-deps --no-build-isolation -w dist .

pin: setup ## write constraints.txt anew from pyproject.toml, every platform
	@$(BIN)/python -m pip install -q --disable-pip-version-check uv
	@$(BIN)/uv pip compile -q pyproject.toml --extra dev --universal --python-version 3.11 --upgrade \
	  --generate-hashes --no-annotate --no-header --no-emit-index-url -o constraints.txt
