# `make demo` and `make test` need python3, git and make; they set up everything else. Run them again at no cost.
.DEFAULT_GOAL := help
PYTHON := .venv/bin/python
UV_HOME := $(CURDIR)/.venv/.uv
export HF_HUB_OFFLINE ?= 1

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

setup: .venv/.synced  ## virtual environment .venv with the locked dependencies

.venv/.synced: requirements.lock
	@test -x $(PYTHON) || python3 -m venv .venv
	@command -v uv >/dev/null || test -x $(UV_HOME)/bin/uv || $(PYTHON) -m pip install --quiet --target $(UV_HOME) uv
	@PATH="$$PATH:$(UV_HOME)/bin" uv pip sync --quiet --python $(PYTHON) requirements.lock
	@touch $@

demo: setup  ## train, sample and score on the embedded pictures, then write report.html (minutes on 2 CPU cores)
	@$(PYTHON) run.py experiment=demo run_name=demo
	@$(PYTHON) run.py task=report experiment=demo run_name=demo

demo-repa-e: setup  ## the same with REPA-E: the autoencoder is tuned too (three phases a step, so longer)
	@$(PYTHON) run.py experiment=repa_e_embedded run_name=demo
	@$(PYTHON) run.py task=report experiment=repa_e_embedded run_name=demo

test: setup  ## the tests, but for the slow ones and those that need a GPU
	@$(PYTHON) -m pytest -q -m "not gpu and not slow" -n 2 --dist loadgroup

test-slow: setup  ## the slow ones, for a night
	@$(PYTHON) -m pytest -q -m "slow and not gpu" -n 2 --dist loadgroup

golden: setup  ## our numbers against the official codes'
	@$(PYTHON) -m tests.golden

fingerprints: setup  ## take the fingerprint of every recipe again (experiments/fingerprints): after a change that is meant to change numbers
	@OMP_NUM_THREADS=1 $(PYTHON) run.py task=doctor debug=tiny task.write=true \
		"task.recipes=[$$(ls conf/experiment | sed 's/\.yaml$$//' | paste -sd, -)]"

docs: setup  ## the documentation site, site/index.html; a warning is an error
	@NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict --quiet
	@echo "site/index.html; with search: $(PYTHON) -m http.server -d site"

audit: setup  ## the supply chain: hashes, floors, licences, dead packages; known vulnerabilities where pip-audit is there
	@$(PYTHON) -m tests.security.audit

lint: setup  ## format, lint, types, import arrows
	@.venv/bin/ruff format --check .
	@.venv/bin/ruff check .
	@.venv/bin/pyright
	@.venv/bin/lint-imports --no-cache

lock:  ## resolve the dependencies anew
	@uv pip compile pyproject.toml --extra train --extra lora --extra sweep --extra eval --extra models --extra data --extra demo --extra curate --extra dashboard --extra play --extra docs --extra dev --generate-hashes --universal --python-version 3.11 \
		--no-emit-index-url --no-header --quiet --output-file requirements.lock

.PHONY: help setup demo demo-repa-e test test-slow golden fingerprints docs audit lint lock
