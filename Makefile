# Two commands do everything: `make demo` trains a classifier on real documents, `make test` passes the tests.
# Each target sets up what it needs, inside this folder.

PYTHON  ?= python3
WORKERS ?= 2
MINUTES ?= 3
BIN     := .venv/bin

.PHONY: demo data test test-more test-all check bench soak clean test-processes test-parts

demo: .venv/ready data/newsgroups  ## train a text classifier on 20 Newsgroups: make demo WORKERS=3 gives the same bits
	$(BIN)/unisono train examples/text/newsgroups.toml --workers $(WORKERS)

data: .venv/ready data/newsgroups data/bbc data/tweets data/minilm  ## fetch the data of all examples

data/%: | .venv/ready
	$(BIN)/python examples/data.py $*

test: .venv/ready-dev data  ## the essence of every promise, in minutes: two halves side by side, since many tests wait
	@$(MAKE) --no-print-directory --jobs 2 test-processes test-parts

test-processes:  # half of `make test`: runs that lose workers, and forked workers
	$(BIN)/python -m pytest -m "not slow" tests/faults tests/ranks

test-parts:  # the other half
	$(BIN)/python -m pytest -m "not slow" --ignore tests/faults --ignore tests/ranks

test-more: .venv/ready-dev data  ## what `make test` leaves out: slow tests, and more examples of each property
	$(BIN)/python -m pytest -m "slow or hypothesis" --hypothesis-profile=full

test-all: .venv/ready-dev data  ## every test, with all examples
	$(BIN)/python -m pytest --hypothesis-profile=full

check: .venv/ready-dev  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/ready-dev data  ## measurements against peers, side by side
	$(BIN)/python benchmarks/run.py

soak: .venv/ready-dev  ## all kinds of faults mixed, on one run after another: make soak MINUTES=60
	$(BIN)/python benchmarks/faults/soak.py --minutes $(MINUTES)

.venv/ready: pyproject.toml constraints.txt $(wildcard src/unisono/kernels/_*.[ch])  ## what users have
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable .
	touch $@

.venv/ready-dev: .venv/ready  ## and what tests and measurements need
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	touch $@

clean:  ## remove what these targets made, but no runs and no data
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache build $(wildcard src/unisono/kernels/_*.so)
