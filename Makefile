# make demo    set up and run the main job: the embedded model, end to end
# make test    set up and run every test that needs neither GPU nor network
# make check   format, lint, types, floors, fast tests
# make fmt     format everything
# make docs    rewrite the generated pages
# make rulegraph  draw docs/images/rulegraph.svg anew (needs graphviz)
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := demo
.PHONY: demo test check fmt docs rulegraph env dev clean

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RUN ?= demo
export PATH := $(abspath $(BIN)):$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# torch first and alone, with its exact version: any other package would otherwise choose a build of its own
define install
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install -q -c constraints.txt -e '$(1)'
	touch $@
endef

env: $(VENV)/.installed
dev: $(VENV)/.installed-dev

$(VENV)/.installed: pyproject.toml constraints.txt
	$(call install,.)

$(VENV)/.installed-dev: pyproject.toml constraints.txt
	$(call install,.[dev])

demo: env
	@start=$$(date +%s); \
	snakemake --cores all all --config run=$(RUN); \
	circuitmill summary results/$(RUN) --elapsed $$(( $$(date +%s) - start ))

test: dev
	python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

check: dev
	ruff format --check .
	snakefmt --check Snakefile workflow
	ruff check .
	snakemake --lint
	pyright
	lint-imports
	python -m pytest -m "not slow and not browser" -q

fmt: dev
	ruff format .
	ruff check --fix .
	snakefmt Snakefile workflow

docs: dev
	python -m pytest tests/docs --fix -q

rulegraph: dev
	rm -f docs/images/rulegraph.svg
	python -m pytest tests/docs/test_rulegraph.py --fix -q

clean:
	rm -rf results .snakemake
