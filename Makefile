# `make demo` and `make test` set up what they need in .venv, once; everything else builds on that.
VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= python3
# an announcement of the theme's authors that has nothing to do with this site
export NO_MKDOCS_2_WARNING := 1
# one test process a core, and so one thread each
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 8
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test test-slow test-gpu check format bench docs records constraints clean
.DEFAULT_GOAL := help
.PHONY: help

help:
	@echo "make demo        set up, reproduce double descent on real data, draw the figure (results/)"
	@echo "make test        set up and run the tests"
	@echo "make test-slow   the experiments of more than a few seconds"
	@echo "make test-gpu    the Triton kernels on a GPU, where torch has one"
	@echo "make check       lint, formatting, types, catalogue consistency, docs in strict mode"
	@echo "make bench       the benchmarks, side by side with the alternatives"
	@echo "make docs        the documentation site, in site/"
	@echo "make records     run all reproductions again and keep their records in the package"
	@echo "make format      let ruff format and fix"

# What running the library takes, and what developing it takes, in one environment.  pip does nothing where
# nothing has changed, so a stamp is only there to save its start-up time.
$(VENV)/run.stamp: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "mlreviews needs Python 3.11 or newer: make PYTHON=python3.12 ..." >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) -e '.[plots,data]'
	@touch $@

$(VENV)/dev.stamp: $(VENV)/run.stamp
	$(INSTALL) -e '.[dev]'
	@touch $@

demo: $(VENV)/run.stamp
	$(BIN)/mlreviews reproduce double-descent

test: $(VENV)/dev.stamp
	$(PYTEST)

test-slow: $(VENV)/dev.stamp
	$(PYTEST) -m slow

test-gpu: $(VENV)/dev.stamp
	TRITON_INTERPRET=0 $(PYTEST) -m gpu tests/kernels/test_gpu.py

check: $(VENV)/dev.stamp
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_consistency.py
	$(BIN)/python -m mlreviews.catalogue.readme --check
	$(BIN)/mkdocs build --strict --quiet

format: $(VENV)/dev.stamp
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: $(VENV)/dev.stamp
	$(BIN)/mlreviews bench --all

docs: $(VENV)/dev.stamp
	$(BIN)/mkdocs build --strict
	@echo "open site/index.html"

records: $(VENV)/dev.stamp
	$(BIN)/mlreviews reproduce --all --out src/mlreviews/reproductions/records
	cp src/mlreviews/reproductions/records/double-descent.svg docs/assets/
	rm -f src/mlreviews/reproductions/records/*.svg src/mlreviews/reproductions/records/*.png

constraints: $(VENV)/dev.stamp
	$(BIN)/python -m pip freeze --exclude-editable | sed 's/+cpu//' > constraints.new
	{ echo "# The versions that the Makefile and CI install; regenerate with \`make constraints\`."; \
	  cat constraints.new; } > constraints.txt
	@rm constraints.new

clean:
	rm -rf $(VENV) site results .mypy_cache .ruff_cache .pytest_cache .hypothesis
