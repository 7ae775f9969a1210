# Everything needs only python3 (3.11 or newer) and make; the environment is made here when it is missing.
PYTHON ?= python3
CORES ?= $(shell nproc 2>/dev/null || sysctl -n hw.ncpu)
BIN := .venv/bin

.PHONY: demo test test-slurm lint docs report help

help:
	@echo "make demo    the whole pipeline on the synthetic cohort: results/report"
	@echo "make report  tables, figures, quality, provenance in one file: results/report/report.html"
	@echo "make test    the tests"
	@echo "make test-slurm    trainings requeued and cancelled on a Slurm of this machine: apt-get install slurm-wlm munge, root"
	@echo "make lint    ruff, mypy, import-linter, snakefmt, snakemake --lint"
	@echo "make docs    the documentation as a site: site/index.html"

demo: .venv/installed report
	@echo "tables: results/report/tables  figures: results/report/figures  all of it: results/report/report.html"
	@echo "slides with their maps: $(BIN)/mad view"

# Of another configuration: make report CONFIG=configs/own-slides.yaml
OVERRIDE = $(if $(CONFIG),--configfile $(CONFIG))
RESULTS = $(shell $(BIN)/python -c "from mad.config import load_config; print(load_config('$(or $(CONFIG),config.yaml)').results)")

report: .venv/installed
	$(BIN)/snakemake --cores $(CORES) $(OVERRIDE)
	$(BIN)/snakemake --cores 1 $(OVERRIDE) --report $(RESULTS)/report/report.html
	@echo "$(RESULTS)/report/report.html"

# A file of tests at a time on every core (8 at most, each takes up to 2 GB), one thread each.
test: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder

test-slurm: .venv/installed
	$(BIN)/python -m pytest -m slurm -s -rs tests/test_slurm.py

lint: .venv/installed
	$(BIN)/ruff check mad tests benchmarks docs/hooks.py
	$(BIN)/ruff format --check mad tests benchmarks docs/hooks.py
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/snakefmt --check Snakefile workflow
	$(BIN)/snakemake --lint

# A link or an anchor that leads nowhere is an error.
docs: .venv/installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Constraints are the versions that were tested together; without a stamp a broken install is made again.
.venv/installed: pyproject.toml envs/constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint envs/constraints.txt --editable '.[dev,docs,slurm]'
	touch $@
