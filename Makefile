.DEFAULT_GOAL := help
.PHONY: help demo test lint docs format clean

PYTHON ?= python3
DEMO_OUTPUT ?= demo-output
BIN := .venv/bin
STAMP := .venv/.installed

# The nets here are small: more threads would mostly wait for one another.
export OMP_NUM_THREADS ?= 1

help:  ## this list
	@sed -n 's/^\([a-z]*\):.*##  *\(.*\)/make \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 14

demo: $(STAMP)  ## run every example, in order; what they write goes to demo-output/
	@set -e; for example in examples/[0-9][0-9]_*.py; do \
		echo "== $$example"; $(BIN)/python "$$example" --output "$(DEMO_OUTPUT)"; \
	done

test: lint docs  ## lint, the documentation, then the tests in two workers
	$(BIN)/pytest -n 2

lint: $(STAMP)  ## ruff (rules and format) and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The variable silences an advertisement; a warning still ends the build.
docs: $(STAMP)  ## the documentation as pages in site/; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

format: $(STAMP)  ## let ruff format and mend what it can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:  ## remove the virtual environment, the pages and what the demo wrote
	rm -rf .venv site "$(DEMO_OUTPUT)"

# Installed again only when one of these two files changes.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "constraints.txt needs Python 3.11 or newer: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $(STAMP)
