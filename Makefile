# Two commands on a machine with Python 3.11+ and make: `make demo` and `make test`. A second call installs nothing.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt

.PHONY: demo test test-long test-pods test-beam lint types format api fuzz audit clean help

help:
	@echo "make demo       draw a catalogue, train on text and on text with pictures, show both (minutes)"
	@echo "make test       the default tests"
	@echo "make test-long  the slow ones"
	@echo "make test-pods  steps of large models compiled for TPU pods; no TPU is needed (hours)"
	@echo "make test-beam  vixml prepare by Apache Beam, in an environment of its own"
	@echo "make lint types the checks of CI"
	@echo "make api        docs/api.md from the docstrings"
	@echo "make fuzz READER=sparse SECONDS=60   one reader of files, coverage as the guide"
	@echo "make audit      known weaknesses of the pinned packages (needs the network)"

demo: .venv/run
	$(BIN)/vixml demo

# A file's tests share fixtures, so a file stays in one process.
test: .venv/test
	$(BIN)/python -m pytest -q -n 2 --dist loadfile

test-long: .venv/test
	$(BIN)/python -m pytest -q -m slow

# Each compiles for minutes on all cores.
test-pods: .venv/plan
	$(BIN)/python -m pytest -q -m pods

test-beam: .venv-beam/ready
	.venv-beam/bin/python -m pytest -q tests/beam_test.py

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/shellcheck --external-sources launch/*.sh

types: .venv/dev
	$(BIN)/pyright

format: .venv/dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

api: .venv/run
	$(BIN)/python docs/make_api.py

READER ?= sparse
SECONDS ?= 60

fuzz: .venv/fuzz
	JAX_PLATFORMS=cpu $(BIN)/python tests/fuzz/guided.py --reader=$(READER) --seconds=$(SECONDS)

audit: .venv/audit
	$(BIN)/pip-audit -r constraints.txt --disable-pip --no-deps --progress-spinner=off

clean:
	rm -rf .venv .venv-beam build dist *.egg-info

.venv/run: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) -e .
	@touch $@

# What each extra brings, on top of what the tests need or alone.
.venv/test .venv/audit: .venv/%: .venv/run
	$(PIP) -e '.[$*]'
	@touch $@

.venv/plan .venv/fuzz .venv/dev: .venv/%: .venv/test
	$(PIP) -e '.[test,$*]'
	@touch $@

# Beam wants older releases of some packages than the other tests run with.
.venv-beam/ready: pyproject.toml constraints.txt constraints-beam.txt
	$(PYTHON) -m venv .venv-beam
	awk -F== '!seen[tolower($$1)]++' constraints-beam.txt constraints.txt > .venv-beam/constraints.txt
	.venv-beam/bin/python -m pip --disable-pip-version-check install --quiet -c .venv-beam/constraints.txt \
	  -e '.[beam]' pytest
	@touch $@
