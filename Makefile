# Two commands: `make quickstart` and `make test`. Each sets up .venv by itself.
PYTHON ?= python3
BIN = .venv/bin

.PHONY: quickstart test check clean

# Threads that wait without spinning: a busy machine would slow training down tenfold.
quickstart: export GOMP_SPINCOUNT = 0
quickstart: .venv/installed
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/snakemake --snakefile study/Snakefile --configfile study/quickstart.yaml --cores all --nolock --quiet host reason
	@cat runs/quickstart/report/summary.txt

test: .venv/installed
	$(BIN)/python -m pytest -n 2 --dist loadgroup tests

check: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv/installed: setup.cfg constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[study,export,features,dev]"
	touch $@

clean:
	rm -rf runs/quickstart
